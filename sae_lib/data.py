"""Texts and planted dictionaries: records and batches whose answer is known."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class Batch(NamedTuple):
    """What a stream yields.

    Attributes:
        x: activations.
        grad: gradient of the model's summed loss at the site, where the stream was asked for it.
        orbit: activations of the transformed inputs; ``orbit[:, 0]`` is ``x``.
        truth: true coefficients of the features behind ``x``, where they are known (planted data).
    """

    x: Float[Tensor, "batch d_in"]
    grad: Float[Tensor, "batch d_in"] | None = None
    orbit: Float[Tensor, "batch group d_in"] | None = None
    truth: Float[Tensor, "batch n_features"] | None = None
