"""What ATM's mask does: numbers by hand."""

import pytest
import torch

from sae_lib import ATMSAE
from sae_lib.metrics import mask_shares, masked_codes
from sae_lib.metrics.masks import each_way


def by_hand(**arguments):
    """Identity, and an importance of 3, 1, 0, 0 around a threshold of 1."""
    sae = ATMSAE(4, 4, **{"l1_coeff": 0.1, "deviations": 0, "weights": (1, 0, 0)} | arguments).eval()
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(4))
        sae.W_dec.copy_(torch.eye(4))
    sae.magnitude.copy_(torch.tensor([3.0, 1.0, 0.0, 0.0]))
    return sae


def test_shares_of_latents_and_steps_that_were_masked():
    sae = by_hand(rate=1e6)
    for _ in range(3):
        sae.before_step(0.5)
    sae.magnitude.copy_(torch.tensor([3.0, 0.0, 1.0, 0.0]))  # latents 1 and 3 are below now, were 2 and 3
    sae.before_step(0.5)
    assert mask_shares(sae) == {
        "masked": 0.5,
        "mask_probability": 0.5,
        "masked_in_training": (0 + 1 / 4 + 3 / 4 + 1) / 4,
        "always_masked": 0.25,
    }


def test_without_a_mask_all_shares_are_zero():
    sae = by_hand(rate=0)
    sae.before_step(0.5)
    assert set(mask_shares(sae).values()) == {0.0}
    assert set(mask_shares(by_hand(rate=0)).values()) == {0.0}  # nothing drawn


def test_codes_in_the_three_ways():
    sae, x = by_hand(rate=0.5), torch.tensor([[1.0, 2.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    found, variance = masked_codes(sae, x), 9 / 2
    left = 2 * torch.exp(torch.tensor(-0.5)).item()  # of latent 2, on average
    assert found == pytest.approx(
        {
            "l0_none": 1.5,
            "fvu_none": 0,
            "l0_hard": 1,
            "fvu_hard": 4 / variance,
            "l0_expected": 1.5,
            "fvu_expected": (2 - left) ** 2 / variance,
        }
    )
    assert sae.eval_mask == "none"


def test_the_way_of_evaluation_is_put_back_even_if_the_metric_fails():
    sae = by_hand(eval_mask="hard")
    with pytest.raises(ZeroDivisionError):
        each_way(sae, lambda sae: {"undefined": 1 / 0})
    assert sae.eval_mask == "hard"
