"""TopK: numbers by hand."""

import pytest
import torch

from sae_lib import Batch, TopKSAE


def by_hand(k):
    sae = TopKSAE(3, 3, k)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(3))
        sae.W_dec.copy_(torch.eye(3))
    return sae


X = torch.tensor([[3.0, 1.0, 2.0], [-1.0, -2.0, 0.5], [-1.0, -1.0, -1.0]])


@pytest.mark.parametrize(
    ("k", "expected"),
    [
        (1, [[3, 0, 0], [0, 0, 0.5], [0, 0, 0]]),
        (2, [[3, 0, 2], [0, 0, 0.5], [0, 0, 0]]),
        (3, [[3, 1, 2], [0, 0, 0.5], [0, 0, 0]]),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_each_token_keeps_its_k_best_positive_scores(k, expected, training):
    assert by_hand(k).train(training).encode(X).tolist() == expected


def test_loss_by_hand():
    loss = by_hand(1).loss(Batch(X))
    assert loss.terms["reconstruction"].item() == pytest.approx(((1 + 4) + (1 + 4) + 3) / 3)
    assert loss.terms["aux"] == 0


def test_values_are_not_shrunk():
    assert torch.equal(by_hand(3)(X.abs()), X.abs())


def test_a_token_of_value_zero_does_not_count_as_alive():
    code = by_hand(3).loss(Batch(X)).code
    assert code.fired().tolist() == [True, True, True]
    assert code.l0().item() == pytest.approx(4 / 3)
    assert by_hand(3).loss(Batch(X[1:])).code.fired().tolist() == [False, False, True]


def test_the_decoders_bias_starts_at_the_geometric_median_of_the_first_batch():
    sae = by_hand(1)
    sae.start(Batch(torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [1.0, 0, 0], [50.0, 0, 0]])), 100)
    assert torch.allclose(sae.b_dec, torch.tensor([1.0, 0, 0]), atol=0.01)


def test_auxk_revives_dead_latents():
    from sae_lib import PlantedDictionary, train

    planted = PlantedDictionary(32, 16, active=2, seed=3)
    saes = [TopKSAE(16, 64, 2, aux_coeff=aux_coeff) for aux_coeff in (0.0, 1 / 32)]
    for sae in saes:
        with torch.no_grad():
            sae.b_enc[:32] = -1.0  # half of the latents cannot compete at first
    train(saes, planted.batches(256, seed=0), tokens=100_000)
    z = [sae.encode(planted.sample(5000, seed=1)[0]) for sae in saes]
    without, with_aux = [(code > 0).any(0).sum().item() for code in z]
    assert with_aux > without


@pytest.mark.parametrize("k", [0, 25, 1.5])
def test_k_must_be_in_range(k, as_a_user):
    with pytest.raises(ValueError, match=rf"k must be an integer in \[1, d_sae=24\], got {k}"):
        TopKSAE(3, 24, k)


def test_the_aux_coefficient_must_not_be_negative():
    with pytest.raises(ValueError, match="aux_coeff must be a finite number of at least 0, got -1"):
        TopKSAE(3, 24, 2, aux_coeff=-1.0)
