"""SAELens reads our folders as we do, and we its; of Gemma Scope's file too. `peers.sae_lens_formats` recorded what it
computed."""

import json

import pytest
import torch
from peers.folders import cases, unpacked
from peers.our_saes import EXPRESSES, TOLERANCE, apart, gone_there, made
from peers.parity import recorded
from safetensors.torch import load_file, save_file

import sae_lib
from sae_lib.formats import save_as

FOUND, VERSIONS = recorded("sae_lens_formats")
VARIANT_OF = {
    "sae_lens.standard": "relu",
    "sae_lens.gated": "gated",
    "sae_lens.topk": "topk",
    "sae_lens.topk, version 5": "topk",
    "sae_lens.jumprelu": "jumprelu",
    "sae_lens.batchtopk, done": "jumprelu",
    "sae_lens.checkpoint of batchtopk, rescaled, normalised": "batchtopk",
    "sae_lens.checkpoint of matryoshka": "matryoshka",
    "gemma_scope.jumprelu": "jumprelu",
}


def test_the_record_is_complete():
    assert VERSIONS.keys() == {"sae-lens", "torch", "numpy", "sources"}
    assert len(cases(FOUND, "sae_lens.")) == 19
    for format in ("sae_lens", "gemma_scope"):
        start = f"ours.{format}."
        assert {name.removeprefix(start) for name in cases(FOUND, start)} == EXPRESSES[format]


@pytest.mark.parametrize("name", cases(FOUND, "sae_lens.") + cases(FOUND, "gemma_scope."))
def test_a_folder_of_theirs_has_their_codes_and_reconstructions(name, tmp_path):
    assert max(apart(FOUND, name, tmp_path / "sae")) < TOLERANCE


@pytest.mark.parametrize("name", cases(FOUND, "ours."))
def test_a_folder_of_ours_has_our_codes_and_reconstructions_there(name, tmp_path):
    gone_there(FOUND, name, tmp_path / "sae")


@pytest.mark.parametrize(("name", "variant"), VARIANT_OF.items())
def test_each_becomes_the_variant_that_computes_the_same(name, variant, tmp_path):
    assert sae_lib.load(unpacked(FOUND, name, tmp_path / "sae")).name == variant


def test_a_checkpoint_keeps_k_groups_and_its_threshold(tmp_path):
    sae = sae_lib.load(unpacked(FOUND, "sae_lens.checkpoint of matryoshka", tmp_path / "sae"))
    assert (sae.k, sae.group_sizes) == (3, (2, 4, 6))
    assert sae.threshold > 0
    assert sae.threshold_weight == 1


def changed(tmp_path, name="sae_lens.standard", without=(), tensors=None, **settings):
    """A folder of theirs with other settings or tensors."""
    folder = unpacked(FOUND, name, tmp_path / "sae")
    cfg = json.loads((folder / "cfg.json").read_text()) | settings
    (folder / "cfg.json").write_text(json.dumps({key: value for key, value in cfg.items() if key not in without}))
    weights = load_file(folder / "sae_weights.safetensors") | (tensors or {})
    save_file(weights, folder / "sae_weights.safetensors")
    return folder


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"architecture": "abstopk"}, "negative"),
        ({"architecture": "skip_transcoder"}, "another place"),
        ({"architecture": "temporal"}, "tokens before"),
        ({"architecture": "matching_pursuit"}, "loop over residuals"),
        ({"architecture": "new"}, "not known here"),
        ({"normalize_activations": "layer_norm"}, "each token by itself"),
        ({"normalize_activations": "constant_norm_rescale"}, "each token by itself"),
        ({"normalize_activations": "expected_average_only_in"}, "fold_activation_norm_scaling_factor"),
        ({"normalize_activations": "covariance_whitening"}, "fold_activation_whitening"),
        ({"activation_fn": "tanh-relu"}, "must be relu or topk"),
        ({"architecture": "topk"}, "must say k"),
        ({"architecture": "batchtopk", "k": 2}, "without topk_threshold"),
        ({"tensors": {"W_skip": torch.ones(2, 2)}}, "with W_skip"),
        ({"tensors": {"scaling_factor": torch.full((12,), 2.0)}}, "scaling_factor must be 1"),
        ({"tensors": {"W_enc": torch.ones(4, 11)}}, "must have shape"),
        ({"tensors": {"W_dec": torch.full((12, 4), torch.nan)}}, "must be finite"),
    ],
)
def test_what_we_cannot_express_is_refused_with_the_reason(settings, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        sae_lib.load(changed(tmp_path, **settings))


def test_a_whitened_checkpoint_is_refused(tmp_path):
    folder = changed(tmp_path, "sae_lens.checkpoint of standard, normalised")
    (folder / "activation_scaler.json").write_text('{"scaling_factor": 1.0, "has_whitening": true}')
    with pytest.raises(ValueError, match="fold_activation_whitening"):
        sae_lib.load(folder)


def test_a_scaling_factor_of_ones_says_nothing(tmp_path):
    sae_lib.load(changed(tmp_path, tensors={"scaling_factor": torch.ones(12)}))


def test_settings_that_are_left_out_have_their_defaults(tmp_path):
    before = ("architecture", "apply_b_dec_to_input", "normalize_activations")  # version 6
    sae = sae_lib.load(changed(tmp_path, without=before))
    assert torch.equal(sae.encode(FOUND["x"]), FOUND["sae_lens.standard.z"])


def test_the_metadata_say_where_it_comes_from(tmp_path):
    path = save_as(made("batchtopk"), tmp_path / "sae", "sae_lens", model="gpt2", site="blocks.1.hook_resid_post")
    cfg = json.loads((path / "cfg.json").read_text())
    assert cfg["architecture"] == "jumprelu"
    assert cfg["metadata"]["model_name"] == "gpt2"
    assert cfg["metadata"]["hook_name"] == "blocks.1.hook_resid_post"
    assert cfg["metadata"]["sae_lib_variant"] == "batchtopk"


@pytest.mark.parametrize("content", [b"", b"PK no zip"])
def test_a_damaged_file_of_gemma_scope_is_refused(content, tmp_path):
    (tmp_path / "params.npz").write_bytes(content)
    with pytest.raises(ValueError, match="params.npz must hold arrays"):
        sae_lib.load(tmp_path)


def test_a_transcoder_of_gemma_scope_is_told_by_the_name_of_its_repository(tmp_path):
    sae_lib.load(unpacked(FOUND, "gemma_scope.jumprelu", tmp_path / "my-transcoders/gemma-scope-2b-pt-res/layer_12"))
    folder = unpacked(FOUND, "gemma_scope.jumprelu", tmp_path / "gemma-scope-2b-pt-transcoders/layer_12")
    with pytest.raises(ValueError, match="another place"):
        sae_lib.load(folder)


@pytest.mark.parametrize("name", ["topk", "gradient"])
def test_gemma_scope_cannot_hold_the_k_best(name, tmp_path):
    with pytest.raises(ValueError, match="k=3 best depends on the token's other pairs"):
        save_as(made(name), tmp_path / "sae", "gemma_scope")
    assert not list(tmp_path.iterdir())
