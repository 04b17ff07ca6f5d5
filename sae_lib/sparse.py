"""The sparse engine: which (token, latent) pairs live, and what their directions add up to.

A code is stored as its living pairs where few live, and as a dense matrix where many do (ReLU before its penalty
bites). `Code.decode` costs as much as there are pairs: ``pairs x d_in`` multiplications, not ``batch x d_sae x d_in``.
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Code:
    """The living (token, latent) pairs of a batch, sorted by token.

    Args:
        rows: token of each pair, ascending.
        cols: latent of each pair.
        values: activation of each pair, positive.
        shape: ``(batch, d_sae)``.
    """

    def __init__(
        self,
        rows: Int[Tensor, " pairs"],
        cols: Int[Tensor, " pairs"],
        values: Float[Tensor, " pairs"],
        shape: tuple[int, int],
    ):
        self.rows, self.cols, self.values, self.shape = rows, cols, values, shape

    @classmethod
    def from_dense(cls, z: Float[Tensor, "batch d_sae"]) -> Code:
        """A code that keeps its dense matrix, for variants in which many pairs live."""
        return DenseCode(z)

    def dense(self) -> Float[Tensor, "batch d_sae"]:
        """The code as a matrix: zero wherever a pair does not live."""
        return self.values.new_zeros(self.shape).index_put((self.rows, self.cols), self.values)

    def decode(self, W_dec: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "batch d_in"]:
        """Sum over each token's living latents of value times direction, without the decoder's bias."""
        counts = torch.bincount(self.rows, minlength=self.shape[0])
        return F.embedding_bag(self.cols, W_dec, counts.cumsum(0) - counts, mode="sum", per_sample_weights=self.values)

    def latents(self, start: int, stop: int) -> Code:
        """The pairs whose latent lies in ``[start, stop)``; the shape stays."""
        keep = (self.cols >= start) & (self.cols < stop)
        return Code(self.rows[keep], self.cols[keep], self.values[keep], self.shape)

    def fired(self) -> Bool[Tensor, " d_sae"]:
        """Which latents live on at least one token of the batch."""
        return torch.bincount(self.cols, minlength=self.shape[1]) > 0

    def l0(self) -> Float[Tensor, ""]:
        """Living latents a token, mean over the batch."""
        return torch.as_tensor(len(self.cols) / self.shape[0], device=self.cols.device)


class DenseCode(Code):
    """A code held as its matrix; the pairs are found when they are asked for."""

    def __init__(self, z: Float[Tensor, "batch d_sae"]):
        self.z, self.shape = z, tuple(z.shape)

    @cached_property
    def _pairs(self) -> tuple[Tensor, Tensor]:
        return self.z.detach().nonzero(as_tuple=True)

    rows = property(lambda self: self._pairs[0])
    cols = property(lambda self: self._pairs[1])
    values = property(lambda self: self.z[self._pairs])

    def dense(self) -> Float[Tensor, "batch d_sae"]:
        return self.z

    def decode(self, W_dec: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "batch d_in"]:
        return self.z @ W_dec

    def fired(self) -> Bool[Tensor, " d_sae"]:
        return (self.z != 0).any(0)

    def l0(self) -> Float[Tensor, ""]:
        return (self.z != 0).sum(1).float().mean()


def top_of_rows(scores: Float[Tensor, "batch d_sae"], k: int) -> Code:
    """The k largest scores of each row that are positive."""
    values, cols = scores.topk(k, dim=1, sorted=False)
    alive = values > 0
    rows = torch.arange(len(scores), device=scores.device).unsqueeze(1).expand_as(cols)
    return Code(rows[alive], cols[alive], values[alive], tuple(scores.shape))


def top_of_batch(scores: Float[Tensor, "batch d_sae"], k: int) -> Code:
    """The ``k * batch`` largest scores of the whole batch that are positive."""
    flat = scores.flatten()
    values, index = flat.topk(k * len(scores), sorted=False)
    index = index[values > 0].sort().values
    rows = torch.div(index, scores.shape[1], rounding_mode="floor")
    return Code(rows, index % scores.shape[1], flat[index], tuple(scores.shape))


def above(scores: Float[Tensor, "batch d_sae"], threshold: Float[Tensor, "..."]) -> Code:
    """The scores that are positive and above a threshold: one for all latents, or one a latent."""
    return Code.from_dense(scores * (scores > threshold.clamp(min=0)))
