"""The sparse engine: scores of all pairs as a recipe, a code as its living pairs, and gradients through those alone.

Dense, a training step costs five products of a (batch, d_in) with a (d_in, d_sae) matrix: scores, reconstruction, and
the gradients of both weights and of the code. Where few pairs live, four of the five touch those pairs only, and what
remains is the first: to know who lives, all pairs are scored once. `sae_lib.selection` does that; here stand the code
that it returns and the gradients, first derivatives only. Chapter `speed`.

    x_hat_t       = sum over living latents i of token t    z_ti W_dec,i
    dL/dz_ti      = dL/dx_hat_t . W_dec,i
    dL/dW_dec,i   = sum over tokens t where i lives         z_ti dL/dx_hat_t
    dL/dW_enc,:i  = sum over tokens t where i lives         dL/ds_ti (x_t - b_dec)
    dL/db_dec     = - W_enc dL/db_enc                       the part that comes through the encoder
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from functools import cached_property
from itertools import accumulate

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae_lib import kernels


class Pairs:
    """Which (token, latent) pairs live, sorted by token, and the same sorted by latent.

    Args:
        rows: token of each pair, ascending.
        cols: latent of each pair.
        shape: ``(batch, d_sae)``.
    """

    def __init__(self, rows: Int[Tensor, " pairs"], cols: Int[Tensor, " pairs"], shape: tuple[int, int]):
        self.rows, self.cols, self.shape = rows, cols, shape

    @cached_property
    def starts(self) -> Int[Tensor, " batch"]:
        """Where each token's pairs begin."""
        return first_of_each(self.rows, self.shape[0])

    @cached_property
    def by_latent(self) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " d_sae"]]:
        """The order of the pairs that sorts them by latent, then token, and where each latent's pairs begin."""
        # numbers of 32 bits are sorted in half the time
        return self.cols.int().sort(stable=True).indices, first_of_each(self.cols, self.shape[1])


class Code:
    """The living (token, latent) pairs of a batch, sorted by token, and their values.

    Args:
        rows: token of each pair, ascending.
        cols: latent of each pair.
        values: activation of each pair.
        shape: ``(batch, d_sae)``.
    """

    def __init__(
        self,
        rows: Int[Tensor, " pairs"],
        cols: Int[Tensor, " pairs"],
        values: Float[Tensor, " pairs"],
        shape: tuple[int, int],
    ):
        self.pairs, self.values = Pairs(rows, cols, shape), values

    rows = property(lambda self: self.pairs.rows)
    cols = property(lambda self: self.pairs.cols)
    shape = property(lambda self: self.pairs.shape)

    @classmethod
    def from_dense(cls, z: Float[Tensor, "batch d_sae"]) -> Code:
        """A code that keeps its dense matrix, for variants in which many pairs live."""
        return DenseCode(z)

    def dense(self) -> Float[Tensor, "batch d_sae"]:
        """The code as a matrix: zero wherever a pair does not live."""
        return self.values.new_zeros(self.shape).index_put_((self.rows, self.cols), self.values)

    def decode(self, W_dec: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "batch d_in"]:
        """Sum over each token's living latents of value times direction, without the decoder's bias."""
        return Decode.apply(W_dec, self.values, self.pairs)

    def map(self, function: Callable[..., Tensor], *of_latents: Float[Tensor, " d_sae"]) -> Code:
        """The same pairs with values ``function(values, ...)``, followed by each pair's entry of vectors over latents.

        `function` works entry by entry, and must give zero for pairs that do not live.
        """
        return self._with(function(self.values, *(vector.index_select(0, self.cols) for vector in of_latents)))

    def _with(self, values: Float[Tensor, " pairs"]) -> Code:
        code = copy(self)
        code.values = values
        return code

    def sum(self) -> Float[Tensor, ""]:
        """Sum of all values."""
        return self.values.sum()

    def living(self) -> Code:
        """The pairs whose value is positive."""
        alive = (self.values > 0).nonzero().squeeze(1)
        return Code(self.rows[alive], self.cols[alive], self.values[alive], self.shape)

    def split(self, sizes: Sequence[int]) -> list[Code]:
        """One code for each of consecutive groups of latents, whose `sizes` add up to d_sae."""
        codes = []
        for size, stop in zip(sizes, accumulate(sizes), strict=True):
            chosen = ((self.cols >= stop - size) & (self.cols < stop)).nonzero().squeeze(1)
            codes.append(
                Code(self.rows[chosen], self.cols[chosen] - (stop - size), self.values[chosen], (self.shape[0], size))
            )
        return codes

    def fired(self) -> Bool[Tensor, " d_sae"]:
        """Which latents live on at least one token of the batch."""
        return torch.bincount(self.cols, minlength=self.shape[1]) > 0

    def l0(self) -> Float[Tensor, ""]:
        """Living latents a token, mean over the batch."""
        return torch.as_tensor(len(self.cols) / self.shape[0], device=self.cols.device)


class DenseCode(Code):
    """A code held as its matrix; the pairs are found when they are asked for."""

    def __init__(self, z: Float[Tensor, "batch d_sae"]):
        self.z = z

    @cached_property
    def pairs(self) -> Pairs:
        return Pairs(*self.z.detach().nonzero(as_tuple=True), tuple(self.z.shape))

    shape = property(lambda self: tuple(self.z.shape))
    values = property(lambda self: self.z[self.rows, self.cols])

    def dense(self) -> Float[Tensor, "batch d_sae"]:
        return self.z

    def decode(self, W_dec: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "batch d_in"]:
        return self.z @ W_dec

    def map(self, function: Callable[..., Tensor], *of_latents: Float[Tensor, " d_sae"]) -> Code:
        return DenseCode(function(self.z, *of_latents))

    def sum(self) -> Float[Tensor, ""]:
        return self.z.sum()

    def living(self) -> Code:
        return self

    def split(self, sizes: Sequence[int]) -> list[Code]:
        return [DenseCode(z) for z in self.z.split(list(sizes), dim=1)]

    def fired(self) -> Bool[Tensor, " d_sae"]:
        return (self.z != 0).any(0)

    def l0(self) -> Float[Tensor, ""]:
        return (self.z != 0).sum(1).float().mean()


class Scores:
    """The scores of all (token, latent) pairs, ``(x - b_dec) W_enc + b_enc``, as a recipe.

    A selection computes of them what it needs (`sae_lib.selection`); `dense` computes all.

    Args:
        x: activations.
        W_enc: encoder; laid out column-major (`sae_lib.sae.column_major`), a latent's weights are read in one piece.
        b_enc: bias of each latent.
        b_dec: subtracted from x first; None for variants that do not.
    """

    def __init__(
        self,
        x: Float[Tensor, "batch d_in"],
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, " d_sae"],
        b_dec: Float[Tensor, " d_in"] | None = None,
    ):
        self.x, self.W_enc, self.b_enc, self.b_dec = x, W_enc, b_enc, b_dec
        self.shape = (len(x), W_enc.shape[1])

    def dense(self) -> Float[Tensor, "batch d_sae"]:
        """All scores; gradients through this are dense products."""
        s = linear(self.centred, self.W_enc.detach().T, self.b_enc.detach())
        return Score.apply(self.x, self.W_enc, self.b_enc, self.b_dec, (s, self.centred), None)

    def of(self, latents: Int[Tensor, " some"]) -> Scores:
        """The scores of some latents only."""
        return Scores(self.x, self.W_enc.T.index_select(0, latents).T, self.b_enc[latents], self.b_dec)

    @cached_property
    def centred(self) -> Float[Tensor, "batch d_in"]:
        """``x - b_dec``, without gradient."""
        return self.x.detach() if self.b_dec is None else self.x.detach() - self.b_dec.detach()

    def code(self, rows: Int[Tensor, " pairs"], cols: Int[Tensor, " pairs"], values: Float[Tensor, " pairs"]) -> Code:
        """The code of some pairs, whose `values` are their scores: gradients flow through these pairs only."""
        code = Code(rows, cols, values, self.shape)
        known = (values, self.centred)
        return code._with(Score.apply(self.x, self.W_enc, self.b_enc, self.b_dec, known, code.pairs))


class Score(torch.autograd.Function):
    """Scores of some pairs, or of all (`pairs` is None), as a function of x and the encoder; computed before."""

    @staticmethod
    def forward(ctx, x, W_enc, b_enc, b_dec, known, pairs):
        values, centred = known
        ctx.save_for_backward(W_enc, centred.contiguous())
        ctx.pairs = pairs
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (W_enc, centred), pairs = ctx.saved_tensors, ctx.pairs
        for_x, for_W_enc, for_b_enc, for_b_dec = ctx.needs_input_grad[:4]
        d_x = d_W_enc = d_b_enc = d_b_dec = None
        if for_b_enc or for_b_dec:
            d_b_enc = grad.sum(0) if pairs is None else W_enc.new_zeros(W_enc.shape[1]).index_add_(0, pairs.cols, grad)
        if for_W_enc:
            d_W_enc = (grad.T @ centred if pairs is None else sum_by_latent(centred, grad, pairs)).T
        if for_b_dec:
            d_b_dec = -(W_enc @ d_b_enc)
        if for_x:
            d_x = grad @ W_enc.T if pairs is None else sum_by_token(W_enc.T, grad, pairs)
        return d_x, d_W_enc, d_b_enc if for_b_enc else None, d_b_dec, None, None


class Decode(torch.autograd.Function):
    """Sum of value times direction over the living pairs of each token."""

    @staticmethod
    def forward(ctx, W_dec, values, pairs):
        ctx.save_for_backward(W_dec, values)
        ctx.pairs = pairs
        return sum_by_token(W_dec, values, pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (W_dec, values), pairs = ctx.saved_tensors, ctx.pairs
        grad = grad.contiguous()
        d_W_dec = sum_by_latent(grad, values, pairs) if ctx.needs_input_grad[0] else None
        d_values = products(grad, W_dec.contiguous(), pairs) if ctx.needs_input_grad[1] else None
        return d_W_dec, d_values, None


def linear(
    x: Float[Tensor, "batch d_in"], directions: Float[Tensor, "d_sae d_in"], bias: Float[Tensor, " d_sae"]
) -> Float[Tensor, "batch d_sae"]:
    """``x directions^T + bias``, without gradient.

    In 32 bits on a CPU it is oneDNN that multiplies, where torch would take MKL, which is slow on AMD's processors.
    """
    if x.dtype == torch.float32 and x.device.type == "cpu" and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, directions, bias, "none", [], "")
    return F.linear(x, directions, bias)


# Three operations over pairs; each reads one row of a matrix a pair and never stores (pairs, d_in) --------------------


def products(
    x: Float[Tensor, "batch d_in"], directions: Float[Tensor, "d_sae d_in"], pairs: Pairs
) -> Float[Tensor, " pairs"]:
    """The inner product of each pair's row of `x` and row of `directions`.

    Taken latent by latent, because the rows of `x`, which are then read in no order, fit in the processor's cache.
    """
    if x.is_cuda and kernels.enabled():
        return kernels.pair_products(x, directions, pairs.rows, pairs.cols)
    order, starts = pairs.by_latent
    if not len(order):
        return x.new_zeros(0)
    rows, cols = pairs.rows[order], pairs.cols[order]
    found = torch.ops.aten._embedding_bag_per_sample_weights_backward(directions, x, rows, starts, cols, 0)
    return torch.empty_like(found).index_copy_(0, order, found)


def sum_by_token(
    directions: Float[Tensor, "d_sae d_in"], values: Float[Tensor, " pairs"], pairs: Pairs
) -> Float[Tensor, "batch d_in"]:
    """Sum over each token's pairs of value times the latent's row of `directions`."""
    directions = directions.contiguous()
    if values.is_cuda and kernels.enabled():
        return kernels.decode(directions, values, pairs.cols, F.pad(pairs.starts, (0, 1), value=len(values)))
    return F.embedding_bag(pairs.cols, directions, pairs.starts, mode="sum", per_sample_weights=values)


def sum_by_latent(
    x: Float[Tensor, "batch d_in"], values: Float[Tensor, " pairs"], pairs: Pairs
) -> Float[Tensor, "d_sae d_in"]:
    """Sum over each latent's pairs of value times the token's row of `x`."""
    order, starts = pairs.by_latent
    values, rows = values[order], pairs.rows[order]
    if values.is_cuda and kernels.enabled():
        return kernels.weight_gradient(x, values, rows, F.pad(starts, (0, 1), value=len(values)))
    return F.embedding_bag(rows, x, starts, mode="sum", per_sample_weights=values)


def first_of_each(groups: Int[Tensor, " pairs"], count: int) -> Int[Tensor, " count"]:
    """Where each of `count` groups begins among pairs that are sorted by group."""
    sizes = torch.bincount(groups, minlength=count)
    return sizes.cumsum(0).sub_(sizes)
