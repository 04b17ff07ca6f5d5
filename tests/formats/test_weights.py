"""What other libraries hold becomes one of our variants, and ours one of theirs, without a change of codes."""

import pytest
import torch
from peers.folders import random_weights
from peers.our_saes import SETTINGS, made

import sae_lib
from sae_lib.formats import weights
from sae_lib.formats.weights import REFUSED, SHARED, moved, norms_folded, plain, thresholds

X = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) / 2


def of_another(variant="topk", free=False, **arguments):
    """An SAE with weights of another library's; a threshold is one for all latents, or one a latent."""
    tensors = random_weights(3, free)
    chosen = {name: tensors[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    if variant in ("jumprelu", "batchtopk"):
        chosen["threshold"] = tensors["threshold"] if variant == "jumprelu" else torch.tensor(0.2)
    return weights.made(variant, chosen, **arguments)


def test_each_variant_is_expressed_or_refused_with_a_reason():
    assert {name.split(",")[0] for name in SETTINGS} | set(REFUSED) == set(sae_lib.VARIANTS)
    assert set(SHARED) < set(SETTINGS)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_plain_variant_has_the_same_codes_and_reconstructions(name):
    sae = made(name)
    same = plain(sae)
    assert same.name in SHARED
    assert (same is sae) == (sae.name in SHARED)
    assert sae.encode(X).count_nonzero() > 20
    assert torch.allclose(same.encode(X), sae.encode(X), atol=1e-6)
    assert torch.allclose(same(X), sae(X), atol=1e-6)


def test_the_hard_mask_leaves_out_what_is_below_the_threshold_of_importance():
    sae = made("atm, hard mask")
    left_out = sae.importance < sae.threshold
    assert 0 < left_out.sum() < 12
    assert not plain(sae).encode(X)[:, left_out].any()


@pytest.mark.parametrize("name", ["relu", "relu, free rows", "gated", "jumprelu", "batchtopk", "matryoshka"])
def test_thresholds_decide_the_same(name):
    sae = made(name)
    same = thresholds(sae)
    assert same.name == "jumprelu"
    assert torch.allclose(same.encode(X), sae.encode(X), atol=1e-6)
    assert torch.allclose(same(X), sae(X), atol=1e-6)


def test_a_moved_bias_by_hand():
    W_enc = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert moved(torch.tensor([10.0, 20.0]), torch.tensor([1.0, -1.0]), W_enc).tolist() == [8.0, 18.0]


def test_folded_norms_by_hand():
    given = {"W_enc": torch.ones(2, 1), "b_enc": torch.tensor([2.0]), "W_dec": torch.tensor([[3.0, 4.0]])}
    folded = norms_folded(given | {"b_dec": torch.zeros(2)}, "b_enc")
    assert folded["W_dec"].tolist() == [[pytest.approx(0.6), pytest.approx(0.8)]]
    assert (folded["W_enc"].tolist(), folded["b_enc"].tolist()) == ([[5.0], [5.0]], [10.0])
    assert not folded["b_dec"].any()


def test_rows_of_any_norm_stay_so_saved_loaded_and_trained_on(tmp_path):
    norms = random_weights(3, free=True)["W_dec"].norm(dim=1)
    sae = sae_lib.load(of_another(free=True, k=3).save(tmp_path / "sae"))
    assert torch.equal(sae.W_dec.norm(dim=1), norms)
    sae.learning_rate = 0.0
    sae_lib.train(sae, 5 * [X], tokens=250)
    assert torch.allclose(sae.W_dec.norm(dim=1), norms)


def test_rows_of_norm_1_are_kept_there_and_l1_weighs_free_ones():
    assert of_another(k=3).unit_rows
    assert not of_another("relu").norm_weighted
    assert of_another("relu", free=True).norm_weighted


@pytest.mark.parametrize("variant", ["topk", "jumprelu", "batchtopk"])
def test_training_goes_on_from_the_weights_in_the_units_of_x(variant):
    sae = of_another(variant, **({"k": 3} if variant != "jumprelu" else {}))
    before, sae.learning_rate = sae(X).detach(), 0.0
    threshold = getattr(sae, "threshold", torch.zeros(())).clone()
    sae_lib.train(sae, [7 * X] + 4 * [X], tokens=250)
    if variant == "batchtopk":
        assert sae.threshold_weight > 0.99
        assert not torch.equal(sae.threshold, threshold)  # it is a running mean
        sae.threshold.copy_(threshold)
    assert torch.allclose(sae(X), before, atol=1e-5)


def test_weights_are_laid_out_for_the_engine():
    assert of_another(k=3).W_enc.T.is_contiguous()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("W_enc", torch.ones(4), "must be a matrix"),
        ("b_enc", torch.ones(11), r"b_enc must have shape \(12,\)"),
        ("W_dec", torch.ones(12, 5), "is it a transcoder"),
        ("b_dec", torch.full((4,), torch.inf), "must be finite, got 4"),
    ],
)
def test_weights_that_do_not_fit_are_refused(name, value, message):
    tensors = {key: random_weights(3)[key] for key in ("W_enc", "b_enc", "W_dec", "b_dec")}
    with pytest.raises(ValueError, match=message):
        weights.made("topk", tensors | {name: value}, k=3)
