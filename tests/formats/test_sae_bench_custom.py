"""SAEBench evaluates our SAEs as they are; `peers.sae_bench_custom` recorded what it found."""

import pytest
import torch
from peers.parity import TOLERANCE, recorded

import sae_lib
from sae_lib.formats import for_sae_bench

FOUND, VERSIONS = recorded("sae_bench_custom")
VARIANTS = {"topk": {"k": 3}, "jumprelu": {"target_l0": 3.0}, "batchtopk": {"k": 3}, "gba": {"groups": 2}}


def custom(name="topk"):
    sae = sae_lib.VARIANTS[name](8, 24, **VARIANTS[name])
    start = f"{name}.trained.state."
    sae.load_state_dict({key.removeprefix(start): FOUND[key] for key in FOUND if key.startswith(start)})
    return for_sae_bench(sae, "tiny", "blocks.0.hook_resid_post")


def test_the_record_says_where_it_comes_from():
    assert VERSIONS.keys() == {"sae-bench", "sae-lens", "torch", "numpy", "sources"}
    assert {name.split(".")[0] for name in FOUND if name.endswith(".scores")} == set(VARIANTS)


@pytest.mark.parametrize("name", VARIANTS)
def test_codes_and_reconstructions_of_any_leading_shape_are_those_that_it_saw(name):
    sae, x = custom(name), FOUND["x"]
    assert x.ndim == 3
    assert (sae.encode(x) - FOUND[f"{name}.trained.z"]).abs().max() < TOLERANCE
    assert (sae(x) - FOUND[f"{name}.trained.x_hat"]).abs().max() < TOLERANCE
    assert torch.equal(sae.decode(sae.encode(x)), sae(x))
    assert torch.allclose(sae.encode(x)[1], sae.sae.encode(x[1]), atol=TOLERANCE)


@pytest.mark.parametrize("name", ["topk", "jumprelu", "batchtopk"])
def test_its_scores_are_those_of_the_folder_that_we_write_for_saelens(name):
    scores = FOUND[f"{name}.trained.scores"]
    assert len(scores) == 26
    assert torch.allclose(scores, FOUND[f"{name}.trained.scores of the SAELens folder"], rtol=1e-5, atol=TOLERANCE)


def test_it_has_what_saebench_reads():
    sae = custom()
    assert (sae.cfg.model_name, sae.cfg.hook_name, sae.cfg.hook_layer) == ("tiny", "blocks.0.hook_resid_post", 0)
    assert (sae.cfg.d_in, sae.cfg.d_sae, sae.cfg.architecture) == (8, 24, "topk")
    assert (sae.dtype, sae.device, sae.cfg.dtype, sae.cfg.device) == (
        torch.float32,
        torch.device("cpu"),
        "float32",
        "cpu",
    )
    assert sae.W_enc.shape == (8, 24)
    assert sae.W_dec.shape == (24, 8)
    assert sae.b_enc.shape == (24,)
    assert sae.b_dec.shape == (8,)
    assert sae.cfg.to_dict()["d_sae"] == 24


def test_what_it_moves_says_so():
    sae = custom()
    assert sae.to(device="cpu", dtype=torch.bfloat16) is sae
    assert (sae.dtype, sae.cfg.dtype) == (torch.bfloat16, "bfloat16")
    assert sae.encode(FOUND["x"].bfloat16()).dtype == torch.bfloat16


def test_an_sae_in_training_is_evaluated_as_in_evaluation():
    sae = sae_lib.BatchTopKSAE(8, 24, 3).train()
    for_sae_bench(sae, "tiny", "blocks.0.hook_resid_post")
    assert not sae.training


def test_a_site_without_a_layer_is_refused():
    with pytest.raises(ValueError, match="SAEBench asks for the layer"):
        for_sae_bench(sae_lib.TopKSAE(8, 24, 3), "tiny", "hook_embed")


def test_codes_that_leave_the_pose_out_are_refused():
    with pytest.raises(ValueError, match="leave the pose out"):
        for_sae_bench(sae_lib.EquivariantSAE(8, 24, 3), "tiny", "blocks.0.hook_resid_post")
