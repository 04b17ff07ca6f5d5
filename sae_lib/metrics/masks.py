"""What ATM's mask does: whom it held in training, and what the code is with and without it. Chapter `atm`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lib.metrics.reconstruction import fvu, l0
from sae_lib.sae import SAE
from sae_lib.saes.atm import ATMSAE, EVAL_MASKS


@torch.no_grad()
def mask_shares(sae: ATMSAE) -> dict[str, float]:
    """How much of a trained ATM is masked.

    Returns:
        ``masked``: share of latents below the threshold, as training left it; ``mask_probability``: mean over latents
        of the probability in the next step; ``masked_in_training``: share of all latents and steps, from when masks
        are drawn; ``always_masked``: share of latents that were masked in each of these steps, and so learned nothing
        in them. The last two are 0 where no mask was drawn.

    Blind to: whether the masked latents were of use.

    >>> sae = ATMSAE(2, 4, l1_coeff=0.1, deviations=0, rate=0.7, weights=(1, 0, 0))
    >>> sae.magnitude += torch.tensor([3.0, 1.0, 0.0, 0.0])  # importance 3, 1, 0, 0; the threshold is its mean, 1
    >>> shares = mask_shares(sae)
    >>> shares["masked"], round(shares["mask_probability"], 3)  # (0 + 0 + 2 (1 - exp(-0.7))) / 4
    (0.5, 0.252)
    """
    probability, drawn = sae.mask_probability.double(), sae.times_masked.double() / sae.draws.clamp(min=1)
    return {
        "masked": (probability > 0).double().mean().item(),
        "mask_probability": probability.mean().item(),
        "masked_in_training": drawn.mean().item(),
        "always_masked": (drawn == 1).double().mean().item(),
    }


@torch.no_grad()
def masked_codes(sae: ATMSAE, x: Float[Tensor, "tokens d_in"]) -> dict[str, float]:
    """L0 and FVU of the code without a mask, with the hard and with the expected one: ``l0_hard``, ``fvu_hard`` ..."""

    def measured(sae: SAE) -> dict[str, float]:
        z = sae.encode(x)
        return {"l0": l0(z), "fvu": fvu(x, sae.decode(z))}

    return each_way(sae, measured)


def each_way(sae: ATMSAE, metric: Callable[[SAE], dict[str, float]]) -> dict[str, float]:
    """What a metric says of the SAE evaluated in each of the three ways; names end in the way's."""
    found, own = {}, sae.eval_mask
    try:
        for sae.eval_mask in EVAL_MASKS:
            found |= {f"{name}_{sae.eval_mask}": value for name, value in metric(sae).items()}
    finally:
        sae.eval_mask = own
    return found
