"""Whether the densities of latents follow Zipf's law. Chapter `evaluation`.

    log p_i = c - alpha log(i + beta),     i = 1, 2, ...: rank of the latent by density, the most frequent first

Ayonrinde 2024 (Mutual Choice and Feature Choice, arXiv 2411.02124) finds this law in trained SAEs, with alpha = 1 and
beta = 6.8, and allots firings by it; R2 there is about .98, without saying of which fit.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from scipy.optimize import minimize_scalar
from torch import Tensor

LEAST = 10
"""Living latents that a fit needs."""


def zipf_fit(densities: Float[Tensor, " d_sae"], shift: float | int = 0.0) -> dict[str, float]:
    """Least squares of ``log p_i`` on ``log(i + shift)`` over the living latents, and how well a log-normal does.

    Units: the exponent is alpha, 0 for equal densities, 1 for Zipf's own law; R2 is the share of the variance of
    ``log p`` that the line explains, at most 1. Blind to: the head: every rank is one point, so that most of the fit
    is the many rare latents, while the tokens belong to the few frequent ones; how rare the dead are; noise, for
    densities in descending order are smooth whatever they are. A high R2 is therefore no evidence by itself: almost
    any falling curve has one. ``lognormal_r2`` is that of the nearest rival, a normal distribution of ``log p`` (its
    squared correlation with the quantiles): Zipf's law is supported where it wins. Rare densities are counts of few
    firings: use many tokens.

    Args:
        densities: share of the tokens on which each latent lives, in any order; zeros are left out.
        shift: beta, at least 0, which bends the law flat for the first ranks; 0 is Zipf's own law, 6.8 the paper's.

    Returns:
        ``zipf_exponent``, ``zipf_r2``, ``lognormal_r2``, and ``zipf_latents``, how many live. NaN for R2 if all
        densities are equal.

    Raises:
        ValueError: if densities are not in [0, 1], fewer than ten latents live, or the shift is negative.

    >>> fit = zipf_fit(0.5 / torch.arange(1, 101) ** 2.0)
    >>> round(fit["zipf_exponent"], 4), round(fit["zipf_r2"], 4), fit["zipf_latents"]
    (2.0, 1.0, 100)
    """
    if not 0 <= shift < float("inf"):
        raise ValueError(f"shift must be a finite number of at least 0, got {shift}")
    logs, ranks, normal = _ranked(densities)
    slope, r2 = _line((ranks + shift).log(), logs)
    return {
        "zipf_exponent": -slope,
        "zipf_r2": r2,
        "lognormal_r2": _line(normal, logs)[1],
        "zipf_latents": len(logs),
    }


def zipf_shift(densities: Float[Tensor, " d_sae"], exponent: float = 1.0) -> dict[str, float]:
    """The shift beta with which ``p_i = c / (i + beta)^exponent`` fits the living latents best: twice, in the logarithm
    of p and in p itself.

    Units: ranks. The paper fixes the exponent at 1 and fits beta, so that two numbers are free, as those of a
    log-normal; it gives R2 without saying of which fit. Blind to: as `zipf_fit` in the logarithms; in p itself to the
    tail, whose latents all have next to no density. Feature Choice, which allots tokens by this law, wants the latter.
    Chapter `choice`.

    Args:
        densities: share of the tokens on which each latent lives, in any order; zeros are left out.
        exponent: alpha, above 0.

    Returns:
        ``zipf_shift`` and ``zipf_r2`` of the logarithms, ``zipf_shift_linear`` and ``zipf_r2_linear`` of the densities;
        ``lognormal_r2`` and ``zipf_latents`` as `zipf_fit`. A shift is at least 0, and at most 10 for each living
        latent.

    Raises:
        ValueError: if densities are not in [0, 1], fewer than ten latents live, or the exponent is not above zero.

    >>> fit = zipf_shift(3 / (torch.arange(1, 101) + 6.8))
    >>> round(fit["zipf_shift"], 3), round(fit["zipf_shift_linear"], 3), round(fit["zipf_r2_linear"], 4)
    (6.8, 6.8, 1.0)
    """
    if not 0 < exponent < float("inf"):
        raise ValueError(f"exponent must be a finite number above 0, got {exponent}")
    logs, ranks, normal = _ranked(densities)
    p, found = logs.exp(), {}

    def in_logarithms(shift: float) -> Tensor:
        return (logs + exponent * (ranks + shift).log()).var(correction=0)

    def in_densities(shift: float) -> Tensor:
        law = (ranks + shift) ** -exponent
        return (p - (p @ law) / (law @ law) * law).square().mean()

    for end, unexplained, values in (("", in_logarithms, logs), ("_linear", in_densities, p)):
        best = minimize_scalar(
            lambda u, unexplained=unexplained: unexplained(math.expm1(u)).item(),
            bounds=(0, math.log1p(10 * len(logs))),
            method="bounded",
            options={"xatol": 1e-6},
        )
        found["zipf_shift" + end] = math.expm1(best.x)
        found["zipf_r2" + end] = 1 - float(best.fun) / values.var(correction=0).item()
    return found | {"lognormal_r2": _line(normal, logs)[1], "zipf_latents": len(logs)}


def _ranked(
    densities: Float[Tensor, " d_sae"],
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Logarithms of the densities above zero, in descending order; their ranks; and a normal distribution's quantiles.

    Raises:
        ValueError: if densities are not in [0, 1], or fewer than ten latents live.
    """
    if densities.ndim != 1 or not ((densities >= 0) & (densities <= 1)).all():
        raise ValueError(f"densities must be a vector of numbers in [0, 1], got shape {tuple(densities.shape)}")
    logs = densities[densities > 0].detach().double().cpu().sort(descending=True).values.log()
    if len(logs) < LEAST:
        raise ValueError(f"at least {LEAST} latents must live for a fit, got {len(logs)}: use more tokens")
    ranks = torch.arange(1, len(logs) + 1, dtype=torch.float64)
    return logs, ranks, torch.special.ndtri((ranks - 0.5) / len(logs))


def _line(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> tuple[float, float]:
    """Slope of the least-squares line, and its R2."""
    x, y = x - x.mean(), y - y.mean()
    slope = (x @ y) / (x @ x)
    return slope.item(), (1 - (y - slope * x).square().sum() / y.square().sum()).item()
