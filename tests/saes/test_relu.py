"""ReLU with an L1 penalty: numbers by hand."""

import pytest
import torch

from sae_lib import Batch, ReLUSAE


def by_hand(norm_weighted=False):
    """Encoder: identity. Directions: 2 e_0 and e_1 if norms are free, else e_0 and e_1."""
    sae = ReLUSAE(2, 2, l1_coeff=0.5, norm_weighted=norm_weighted)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(2))
        sae.W_dec.copy_(torch.diag(torch.tensor([2.0 if norm_weighted else 1.0, 1.0])))
        sae.b_enc.copy_(torch.tensor([0.0, -1.0]))
        sae.b_dec.copy_(torch.tensor([1.0, 0.0]))
    return sae


X = torch.tensor([[3.0, 4.0], [0.0, 0.5]])
# x - b_dec = (2, 4), (-1, 0.5); scores = (2, 3), (-1, -0.5); z = (2, 3), (0, 0)


def test_the_bias_of_the_decoder_is_subtracted_before_the_encoder():
    assert by_hand().encode(X).tolist() == [[2, 3], [0, 0]]


def test_loss_by_hand():
    loss = by_hand().loss(Batch(X))
    assert loss.x_hat.tolist() == [[3, 3], [1, 0]]
    assert loss.terms["reconstruction"].item() == pytest.approx((1 + 1.25) / 2)
    assert loss.terms["sparsity"].item() == pytest.approx(0.5 * (5 + 0) / 2)


def test_the_april_form_weights_the_penalty_by_the_rows_norms():
    loss = by_hand(norm_weighted=True).loss(Batch(X))
    assert loss.x_hat.tolist() == [[5, 3], [1, 0]]
    assert loss.terms["sparsity"].item() == pytest.approx(0.5 * (2 * 2 + 3 * 1) / 2)


def test_folding_the_norms_leaves_the_function_as_it_is():
    sae = by_hand(norm_weighted=True)
    x_hat = sae(X)
    sae.fold(1.0)
    assert torch.allclose(sae(X), x_hat)
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(2))
    assert sae.encode(X).tolist() == [[4, 3], [0, 0]]


def test_the_penalty_grows_over_the_first_twentieth_of_the_run():
    sae = by_hand()
    full = sae.loss(Batch(X)).terms["sparsity"]
    for progress, share in [(0.0, 0.0), (0.025, 0.5), (0.05, 1.0), (0.9, 1.0)]:
        sae.before_step(progress)
        assert torch.isclose(sae.loss(Batch(X)).terms["sparsity"], share * full)


def test_a_larger_penalty_gives_fewer_living_latents():
    from sae_lib import PlantedDictionary, train

    planted = PlantedDictionary(16, 8, active=2)
    saes = [ReLUSAE(8, 16, l1_coeff) for l1_coeff in (0.02, 0.2, 0.6)]
    train(saes, planted.batches(256, seed=0), tokens=50_000)
    x = planted.sample(2000, seed=1)[0]
    l0 = [(sae.encode(x) > 0).float().sum(1).mean().item() for sae in saes]
    assert l0[0] > 1.3 * l0[1] > 1.3 * 1.3 * l0[2]


@pytest.mark.parametrize("l1_coeff", [0, -1.0, float("nan"), float("inf"), "much"])
def test_the_coefficient_must_be_a_finite_number_above_zero(l1_coeff, as_a_user):
    with pytest.raises(ValueError, match="l1_coeff must be a finite number above 0, got"):
        ReLUSAE(2, 2, l1_coeff)
