"""sparsify reads our folders as we do, and we its; `peers.sparsify_formats` recorded what it computed."""

import json

import pytest
import torch
from peers.folders import cases, unpacked
from peers.our_saes import EXPRESSES, SETTINGS, TOLERANCE, apart, gone_there, made
from peers.parity import recorded
from safetensors.torch import load_file, save_file

import sae_lib
from sae_lib.formats import save_as

FOUND, VERSIONS = recorded("sparsify_formats")
THEIRS = cases(FOUND, "sparsify.")


def test_the_record_is_complete():
    assert VERSIONS.keys() == {"eai-sparsify", "torch", "numpy", "sources"}
    assert len(THEIRS) == 3
    assert {name.removeprefix("ours.sparsify.") for name in cases(FOUND, "ours.")} == EXPRESSES["sparsify"]


@pytest.mark.parametrize("name", THEIRS)
def test_a_folder_of_theirs_has_their_codes_and_reconstructions(name, tmp_path):
    assert max(apart(FOUND, name, tmp_path / "sae")) < TOLERANCE


@pytest.mark.parametrize("name", cases(FOUND, "ours."))
def test_a_folder_of_ours_has_our_codes_and_reconstructions_there(name, tmp_path):
    gone_there(FOUND, name, tmp_path / "sae")


def test_no_number_of_latents_means_the_expansion_factor(tmp_path):
    folder = unpacked(FOUND, "sparsify.topk, no number", tmp_path / "sae")
    cfg = json.loads((folder / "cfg.json").read_text())
    assert (cfg["num_latents"], cfg["expansion_factor"]) == (0, 3)
    assert sae_lib.load(folder).d_sae == 12
    (folder / "cfg.json").write_text(json.dumps(cfg | {"expansion_factor": 4}))
    with pytest.raises(ValueError, match="must have the 16 latents of cfg.json, got 12"):
        sae_lib.load(folder)


def changed(tmp_path, tensors=None, **settings):
    folder = unpacked(FOUND, "sparsify.topk", tmp_path / "sae")
    cfg = json.loads((folder / "cfg.json").read_text()) | settings
    (folder / "cfg.json").write_text(json.dumps({key: value for key, value in cfg.items() if value is not None}))
    save_file(load_file(folder / "sae.safetensors") | (tensors or {}), folder / "sae.safetensors")
    return folder


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"transcode": True}, "another place"),
        ({"skip_connection": True}, "linear in x"),
        ({"signed": True}, "negative"),
        ({"activation": "groupmax"}, "best of each group"),
        ({"k": None}, "must say k"),
        ({"tensors": {"W_skip": torch.ones(4, 4)}}, "with W_skip"),
    ],
)
def test_what_we_cannot_express_is_refused_with_the_reason(settings, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        sae_lib.load(changed(tmp_path, **settings))


@pytest.mark.parametrize("name", sorted(set(SETTINGS) - EXPRESSES["sparsify"]))
def test_it_cannot_hold_what_is_not_topk(name, tmp_path):
    with pytest.raises(ValueError, match="sparsify has TopK alone"):
        save_as(made(name), tmp_path / "sae", "sparsify")
    assert not list(tmp_path.iterdir())


def test_damaged_weights_are_refused(tmp_path):
    folder = unpacked(FOUND, "sparsify.topk", tmp_path / "sae")
    (folder / "sae.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="must be safetensors"):
        sae_lib.load(folder)
