"""JumpReLU: numbers by hand, pseudo-derivatives included."""

import pytest
import torch

from sae_lib import Batch, JumpReLUSAE, PlantedDictionary, train


def by_hand(**arguments):
    """Scores are x itself; thresholds 1 and 2; a window from -0.25 to +0.25 around them."""
    sae = JumpReLUSAE(2, 2, bandwidth=0.5, **arguments)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(2))
        sae.W_dec.copy_(torch.eye(2))
        sae.threshold.copy_(torch.tensor([1.0, 2.0]))
    return sae


X = torch.tensor([[1.1, 1.9], [3.0, 2.2], [0.9, 0.0]])


@pytest.mark.parametrize("training", [True, False])
def test_scores_above_their_latents_threshold_live_with_their_full_value(training):
    z = by_hand(target_l0=1.0).train(training).encode(X)
    assert torch.equal(z, torch.tensor([[1.1, 0], [3.0, 2.2], [0, 0]]))


def test_the_threshold_learns_from_scores_in_its_window_on_both_sides():
    sae = by_hand(l0_coeff=1.0).train()
    sae.loss(Batch(X)).terms["sparsity"].backward()
    # L0 = mean over 3 tokens; latent 0: 1.1 and 0.9 are near 1; latent 1: 1.9 and 2.2 are near 2
    assert sae.threshold.grad.tolist() == pytest.approx([-2 / (3 * 0.5), -2 / (3 * 0.5)])
    assert sae.W_enc.grad is None or sae.W_enc.grad.count_nonzero() == 0


def test_the_reconstructions_pseudo_derivative_by_hand():
    sae = by_hand(target_l0=1.0).train()
    sae.loss(Batch(X)).terms["reconstruction"].backward()
    # d|x - z|^2/dz = 2 (z - x) / 3. Latent 0: token 0 (z = x) 0, token 2 (0 - 0.9); times -threshold / bandwidth = -2.
    # Latent 1: token 0 (0 - 1.9), token 1 0; times -4.
    assert sae.threshold.grad.tolist() == pytest.approx([-2 * 2 * -0.9 / 3, -4 * 2 * -1.9 / 3], rel=1e-5)


def test_sparsity_by_hand():
    assert by_hand(target_l0=2.0).loss(Batch(X)).terms["sparsity"].item() == pytest.approx(
        (1 / 2 - 1) ** 2
    )  # L0 is 3 / 3
    assert by_hand(l0_coeff=0.3).loss(Batch(X)).terms["sparsity"].item() == pytest.approx(0.3)


def test_thresholds_never_become_negative():
    sae, batch = by_hand(target_l0=1.0), Batch(X)
    with torch.no_grad():
        sae.threshold.fill_(-0.1)
    sae.after_step(batch, sae.loss(batch).code)
    assert sae.threshold.tolist() == [0, 0]


def test_training_lands_near_its_target():
    planted = PlantedDictionary(16, 8, active=2)
    sae = JumpReLUSAE(8, 16, target_l0=2.0)
    train(sae, planted.batches(256, seed=0), tokens=150_000)
    l0 = (sae.encode(planted.sample(4000, seed=1)[0]) > 0).float().sum(1).mean()
    assert l0.item() == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of target_l0 and l0_coeff"),
        ({"target_l0": 1.0, "l0_coeff": 1.0}, "exactly one"),
        ({"target_l0": 5.0}, r"target_l0 must be in \(0, d_sae=4\], got 5"),
        ({"target_l0": 0.0}, "above 0, got 0"),
        ({"l0_coeff": -1.0}, "above 0, got -1"),
        ({"target_l0": 1.0, "bandwidth": 0.0}, "bandwidth must be"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        JumpReLUSAE(2, 4, **arguments)
