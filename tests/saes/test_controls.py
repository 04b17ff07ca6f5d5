import math

import pytest
import torch
from sklearn.decomposition import PCA

from sae_lib import Batch, BatchTopKSAE, MatryoshkaSAE, ReLUSAE, TopKSAE, load, train
from sae_lib.data import PlantedDictionary
from sae_lib.metrics import fvu, l0, mcc
from sae_lib.saes.controls import freeze, pca, untrained

D_IN, D_SAE = 8, 12


def batches(n=30, seed=0):
    """Activations with a large mean and unequal variances."""
    generator = torch.Generator().manual_seed(seed)
    stretch = torch.linspace(3, 0.5, D_IN)
    return [5 + stretch * torch.randn(64, D_IN, generator=generator) for _ in range(n)]


def before_and_after(sae):
    before = {name: value.detach().clone() for name, value in sae.named_parameters()}
    train(sae, batches(), tokens=30 * 64)
    return before, {name: value.detach() for name, value in sae.named_parameters()}


@pytest.mark.parametrize("variant", [TopKSAE, BatchTopKSAE])
def test_an_untrained_sae_keeps_its_weights_and_gets_its_offset_and_its_sparsity(variant):
    sae = untrained(variant(D_IN, D_SAE, k=3))
    before, after = before_and_after(sae)
    assert torch.equal(after["W_enc"], before["W_enc"])
    assert torch.equal(after["b_enc"], before["b_enc"])
    assert torch.allclose(after["W_dec"], before["W_dec"], atol=1e-6)  # its rows are set to norm 1 once more
    assert (after["b_dec"] - 5).abs().max() < 1
    assert l0(sae.encode(torch.cat(batches(seed=1))).detach()) == pytest.approx(3, abs=0.5)


def test_an_untrained_sae_finds_nothing_that_a_trained_one_finds():
    dictionary = PlantedDictionary(12, 8, active=1.0)
    control, sae = untrained(TopKSAE(8, 12, k=2)), TopKSAE(8, 12, k=2)
    train([control, sae], dictionary.batches(256), tokens=100_000)
    chance = mcc(TopKSAE(8, 12, k=2).W_dec, dictionary.directions)
    assert mcc(control.W_dec, dictionary.directions) == pytest.approx(chance, abs=1e-5)
    assert mcc(sae.W_dec, dictionary.directions) > chance + 0.1


@pytest.mark.parametrize(
    "sae",
    [
        TopKSAE(D_IN, D_SAE, k=3),
        BatchTopKSAE(D_IN, D_SAE, k=3),
        MatryoshkaSAE(D_IN, D_SAE, k=3, group_sizes=[4, 8]),
        ReLUSAE(D_IN, D_SAE, l1_coeff=0.1),
    ],
    ids=lambda sae: sae.name,
)
@pytest.mark.parametrize("frozen", [("W_dec",), ("W_enc", "b_enc")], ids=["decoder", "encoder"])
def test_training_changes_all_weights_but_the_frozen_ones(sae, frozen):
    sae = type(sae)(**sae.config())
    before, after = before_and_after(freeze(sae, *frozen))
    for name in before:
        assert torch.equal(after[name], before[name]) == (name in frozen), name


def test_pca_is_the_projection_that_an_independent_implementation_finds():
    x = torch.cat(batches())
    control = pca(batches(), rank=3, tokens=len(x))
    reference = PCA(3, svd_solver="full").fit(x.double().numpy())
    expected = reference.inverse_transform(reference.transform(x.double().numpy()))
    assert torch.allclose(control(x), torch.as_tensor(expected, dtype=torch.float32), atol=1e-4)
    assert fvu(x, control(x).detach()) == pytest.approx(1 - reference.explained_variance_ratio_.sum(), rel=1e-4)
    variances = control.encode(x).square().mean(0).view(2, 3).sum(0)  # of each component, both signs together
    assert variances.tolist() == sorted(variances.tolist(), reverse=True)


def test_pca_by_hand():
    x = torch.tensor([[11.0, 1.0], [9.0, 1.0], [10.0, 1.5], [10.0, 0.5]])  # mean (10, 1), the first axis varies most
    control = pca([x[:2], x[2:]], rank=1, tokens=4)
    assert torch.allclose(control(x), torch.tensor([[11.0, 1.0], [9.0, 1.0], [10.0, 1.0], [10.0, 1.0]]), atol=1e-5)
    assert l0(control.encode(x[:2]).detach()) == 1
    assert fvu(x, control(x).detach()) == pytest.approx(0.5 / 2.5)


def test_pca_has_as_many_living_latents_as_its_rank_and_full_rank_is_perfect():
    x = torch.cat(batches(seed=1))
    for rank in (1, 5, D_IN):
        assert l0(pca(batches(), rank, tokens=1920).encode(x).detach()) == rank
    assert fvu(x, pca(batches(), D_IN)(x).detach()) < 1e-9


def test_pca_uses_no_more_tokens_than_asked_and_the_batch_size_does_not_matter():
    x = torch.cat(batches())
    whole = pca([x[:500]], 2, tokens=500)
    in_parts = pca((Batch(part) for part in x.split(37)), 2, tokens=500)
    assert torch.allclose(whole.b_dec, in_parts.b_dec, atol=1e-6)
    assert torch.allclose(whole(x), in_parts(x), atol=1e-4)


def test_pca_is_an_ordinary_sae_that_remembers_its_stream(tmp_path):
    stream = PlantedDictionary(12, 8).batches(64)
    control = pca(stream, 3, tokens=640)
    assert control.trained_on == [stream.fingerprint]
    again = load(control.save(tmp_path / "pca"))
    x = batches(1)[0]
    assert torch.equal(again.encode(x), control.encode(x))


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pca(batches(), 9), r"rank must be an integer in \[1, d_in=8\], got 9"),
        (lambda: pca(batches(), 0), r"rank must be an integer in \[1, d_in=8\], got 0"),
        (lambda: pca(batches(), 2, tokens=0), "tokens must be an integer at least 1, got 0"),
        (lambda: pca([], 2), "the stream must yield at least one row, got none"),
        (lambda: pca([torch.ones(4, 3), torch.ones(4, 2)], 2), r"x must have shape \(batch, d_in=3\), got \(4, 2\)"),
        (lambda: pca([torch.ones(4, 3), torch.full((4, 3), math.inf)], 2), "activations must be finite"),
        (lambda: pca([torch.ones(4, 3, dtype=torch.int64)], 2), "x must be floating, got torch.int64"),
        (
            lambda: freeze(TopKSAE(4, 8, k=2), "W_decoder"),
            "some but not all of W_enc, b_enc, W_dec, b_dec, got W_decoder",
        ),
        (lambda: freeze(TopKSAE(4, 8, k=2)), "got none; to freeze all, use untrained"),
        (
            lambda: freeze(TopKSAE(4, 8, k=2), "W_enc", "b_enc", "W_dec", "b_dec"),
            "got W_enc, b_enc, W_dec, b_dec; to freeze",
        ),
    ],
)
def test_bad_input_is_refused_with_rule_value_and_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call()
