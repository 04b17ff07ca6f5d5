"""Means over latents that fire alike. Chapter `gradient`.

A latent that fires rarely is another thing than one that fires all the time: it says less often, but more sharply, what
the token is about, and labels fit it better. If an SAE's latents are rarer than another's, any mean over latents mixes
that with what was to be compared. Here the latents are sorted into classes of firing frequency, the same for all SAEs,
and each class counts the same, however many latents it has. The fine differences inside a class remain.
"""

from __future__ import annotations

from itertools import pairwise

from jaxtyping import Float
from torch import Tensor

LIMITS = (2**-10, 2**-8, 2**-6, 2**-4)
"""Of the classes of firing frequency, as shares of the tokens: each is four times as wide as the one before."""


def matched_mean(values: Float[Tensor, " n"], frequencies: Float[Tensor, " n"]) -> float:
    """The mean over classes of firing frequency of the mean in each.

    Latents outside of `LIMITS` are left out: more than one token in 16, or less than one in 1,024.

    Args:
        values: of each latent.
        frequencies: share of the tokens on which it fires, in [0, 1].

    Returns:
        In the units of the values; NaN if a class has no latent, for then nothing can be matched.

    >>> import torch
    >>> matched_mean(torch.tensor([1.0, 3, 5, 6, 100]), torch.tensor([0.002, 0.002, 0.01, 0.02, 0.5]))
    4.333333333333333
    """
    classes = [values[(frequencies > low) & (frequencies <= high)] for low, high in pairwise(LIMITS)]
    return sum(of_class.mean().item() if len(of_class) else float("nan") for of_class in classes) / len(classes)
