"""Matched sparsity: SAEs are compared at the same L0 on held-out data, or not at all. Chapter `comparison`.

Two ways. *Search*: a variant whose sparsity follows from a penalty is trained again with another coefficient until its
measured L0 meets the target (`match_l0`, `Search`). *Interpolation*: measured at several L0s, its curve is read off at
the one of interest (`at_equal_l0`), which costs no search but needs the target inside the curve.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_lib.data import Batch
from sae_lib.sae import SAE, positive
from sae_lib.train import train

WITHIN = 0.03
"""Largest relative distance of a measured L0 from the target; and of an L0 from the end of a curve that is read."""
ROUNDS = 10
"""Most trainings of one search."""
SLOPES = {"l1_coeff": -1.5, "target_l0": 1.0, "htf": 1.0}
"""Usual slope of log L0 against the log of a coefficient, for the first step of a search; -1 for others."""


@dataclass
class Search:
    """The coefficient at which the measured L0 meets the target: a secant in log-log, kept inside what brackets it.

    Args:
        target: L0 to meet, above 0.
        guess: coefficient to try first, above 0; then the one to try next, at last the one that was found.
        slope: usual slope of log L0 against log coefficient; any but 0.

    >>> search = Search(target=16, guess=1.0, slope=-1.0)
    >>> while not search.met:
    ...     search.tell(l0=8 / search.guess**2)  # here, L0 is 8 at 1 and meets 16 at .707
    >>> [round(coefficient, 3) for coefficient, _ in search.tried]
    [1.0, 0.5, 0.707]
    """

    target: float
    guess: float
    slope: float = -1.0
    tried: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        positive("target", self.target)
        positive("the first coefficient", self.guess)

    @property
    def met(self) -> bool:
        """Whether the last L0 lies within 3% of the target."""
        return bool(self.tried) and abs(self.tried[-1][1] / self.target - 1) <= WITHIN

    def tell(self, l0: float) -> None:
        """The L0 that was measured with the coefficient `guess`; `guess` becomes the next one to try.

        Raises:
            ValueError: the target was not met in 10 trainings, or nothing new is left to try; the message lists them.
        """
        self.tried.append((self.guess, l0))
        if self.met:
            return
        aim = math.log(self.target)
        points = sorted((math.log(max(l0, 1e-3)), math.log(coefficient)) for coefficient, l0 in self.tried)
        below = [point for point in points if point[0] < aim]
        above = [point for point in points if point[0] > aim]
        if below and above:
            (low, a), (high, b) = below[-1], above[0]
            share = min(max((aim - low) / (high - low), 0.1), 0.9)
            self.guess = math.exp(a + share * (b - a))
        else:
            (near, at), slope = min(points, key=lambda point: abs(point[0] - aim)), self.slope
            others = [point for point in points if point[1] != at]
            if others:
                far, start = min(others, key=lambda point: abs(point[0] - aim))
                steepness = abs(far - near) / abs(start - at)
                slope = math.copysign(min(max(steepness, abs(slope) / 4), abs(slope) * 4), slope)
            step = (aim - near) / slope
            self.guess = math.exp(at + min(max(step, -math.log(8)), math.log(8)))
        if len(self.tried) == ROUNDS or any(math.isclose(self.guess, past, rel_tol=1e-4) for past, _ in self.tried):
            tried = ", ".join(f"{coefficient:.4g} gives {l0:.2f}" for coefficient, l0 in self.tried)
            raise ValueError(
                f"L0 must come within {WITHIN:.0%} of {self.target:g} in at most {ROUNDS} trainings, got: {tried}; "
                "choose another first coefficient, a reachable target, or train longer"
            )


def match_l0(
    make: Callable[[float], SAE],
    stream: Iterable[Batch | Tensor],
    held: Float[Tensor, "tokens d_in"],
    target: float,
    start: float,
    tokens: int = 1_000_000,
    slope: float = -1.0,
) -> tuple[SAE, float]:
    """Train a variant until its measured L0 on held-out rows lies within 3% of the target.

    Args:
        make: the untrained SAE for a coefficient, such as ``lambda c: ReLUSAE(128, 1024, l1_coeff=c)``.
        stream: to train on, from its start each time.
        held: held-out activations, in the units of x.
        target: the L0 to meet, above 0.
        start: coefficient of the first training, above 0.
        tokens: of each training.
        slope: usual slope of log L0 against log coefficient: negative for a penalty, 1 for ``target_l0``.

    Returns:
        The trained SAE and its coefficient.

    Raises:
        ValueError: the target was not met in 10 trainings; the message lists them.
    """
    search = Search(target, start, slope)
    while True:
        sae = make(search.guess)
        train(sae, stream, tokens)
        search.tell(measured_l0(sae, held))
        if search.met:
            return sae, search.guess


@torch.no_grad()
def measured_l0(sae: SAE, held: Float[Tensor, "tokens d_in"]) -> float:
    """Mean number of living latents a token, a part of the rows at a time."""
    parts = held.to(sae.W_dec.device).split(4096)
    return sum(float((sae.encode(part) != 0).sum()) for part in parts) / len(held)


def at_equal_l0(l0: Sequence[float] | np.ndarray, values: Sequence[float] | np.ndarray, at: float | int) -> float:
    """A metric's curve over L0, read off at one L0: linear in log L0 between the two nearest points.

    Args:
        l0: measured, above 0, at least one, all different.
        values: of the metric, one a point.
        at: the L0 of interest; inside the curve, or within 3% of its ends.

    Raises:
        ValueError: the curve does not reach `at`, or is none.

    >>> at_equal_l0([4, 16], [0.5, 0.3], at=8)  # half way, on a logarithmic axis
    0.4
    """
    if len(l0) != len(values) or len(l0) == 0 or len(set(l0)) < len(l0) or min(l0) <= 0:
        raise ValueError(f"a curve must have a value for each L0, all different and above 0, got {l0} and {values}")
    order = np.argsort(l0)
    x, y = np.log(np.asarray(l0, float)[order]), np.asarray(values, float)[order]
    allowed = np.log1p(WITHIN)
    if not x[0] - allowed <= math.log(positive("at", at)) <= x[-1] + allowed:
        raise ValueError(
            f"at must lie between the L0s of the curve, {min(l0):.2f} and {max(l0):.2f}, got {at:g}; "
            "measure a point beyond it"
        )
    return float(np.interp(math.log(at), x, y))
