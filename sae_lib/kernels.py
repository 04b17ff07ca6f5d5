"""The sparse step on a GPU: sums over living pairs, written in Triton.

Two kernels serve a step. `_sum_rows` adds up chosen rows of a matrix, each times a value: a token's directions are
summed to its reconstruction (`decode`), a latent's tokens to the gradient of its weights (`weight_gradient`).
`_dot_pairs` takes the inner product of a row of one matrix with a row of another: the gradient of a pair's value, and
its exact score (`pair_products`).

Both walk one slice of d_in at a time, for all tokens or latents: the slice of a matrix of weights then fits in the
cache of a large GPU, and each row comes from memory about once, not once a pair. Slices are as wide as d_in divides:
2304 in nine of 256, no lane idle. What is added up in which order depends on the shapes and offsets alone, so the same
arguments give the same bits; there are no atomics.

**Off unless asked for.** These kernels agree with plain torch in Triton's interpreter, on a CPU, and compile for NVIDIA
GPUs; they have not run on one. Until the tests have passed there and `tests/peers/gpu_speed.py` has shown what the
kernels gain, they run only where the environment says ``SAE_LIB_TRITON=1``.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import TYPE_CHECKING, no_type_check

import torch
from jaxtyping import Float, Int
from torch import Tensor

if TYPE_CHECKING:
    import triton.language as tl  # else `_compiled` brings it

ROWS_AT_ONCE = 8
"""Rows that one program of `_sum_rows` has in flight together."""
PAIRS_AT_ONCE = 16
"""Pairs of one program of `_dot_pairs`."""
LONGEST = 256
"""Most pairs that one program adds up; a longer run is split."""
WIDTHS = (64, 128, 256)
"""Of a slice, in numbers: powers of two, as Triton has it."""


def available() -> bool:
    """Whether Triton is installed; torch for CUDA brings it on Linux."""
    return importlib.util.find_spec("triton") is not None


def enabled() -> bool:
    """Whether the engine uses these kernels on CUDA: False, unless the environment says ``SAE_LIB_TRITON=1``.

    The reason is that they have never run on a device: no GPU was at hand when they were written. Without them the
    engine does the same arithmetic in plain torch.
    """
    return os.environ.get("SAE_LIB_TRITON") == "1"


def decode(
    W_dec: Float[Tensor, "d_sae d_in"],
    values: Float[Tensor, " pairs"],
    cols: Int[Tensor, " pairs"],
    offsets: Int[Tensor, " batch_and_1"],
) -> Float[Tensor, "batch d_in"]:
    """Sum over each token's living latents of value times direction.

    Not differentiable: its gradients are `pair_products` and `weight_gradient`.

    Args:
        W_dec: one direction a row.
        values: activation of each pair, sorted by token.
        cols: latent of each pair.
        offsets: where each token's pairs begin, and, last, the number of pairs.

    Returns:
        fp32; fp64 where `W_dec` is.
    """
    return _sums_of_rows(W_dec, values, cols, offsets)


def weight_gradient(
    g: Float[Tensor, "batch d"],
    values_by_latent: Float[Tensor, " pairs"],
    rows_by_latent: Int[Tensor, " pairs"],
    offsets: Int[Tensor, " d_sae_and_1"],
) -> Float[Tensor, "d_sae d"]:
    """Sum over each latent's tokens of value times row of `g`; zero for a latent that lives nowhere.

    The gradient of W_dec, where `g` is that of the reconstruction and the values are the code's; and that of W_enc,
    transposed, where `g` is x and the values are the gradients of the scores.

    Args:
        g: one row a token.
        values_by_latent: a number for each pair, sorted by latent.
        rows_by_latent: token of each pair.
        offsets: where each latent's pairs begin, and, last, the number of pairs.

    Returns:
        fp32; fp64 where `g` is.
    """
    return _sums_of_rows(g, values_by_latent, rows_by_latent, offsets)


def pair_products(
    a: Float[Tensor, "batch d"],
    b: Float[Tensor, "d_sae d"],
    rows: Int[Tensor, " pairs"],
    cols: Int[Tensor, " pairs"],
) -> Float[Tensor, " pairs"]:
    """The inner product ``a[rows] . b[cols]`` of each pair, in fp32; in fp64 where `a` is.

    The gradient of the values, where `a` is that of the reconstruction and `b` is W_dec; and the exact scores of
    candidates, where `a` is x and `b` is W_enc, transposed.
    """
    a, b, rows, cols = a.contiguous(), b.contiguous(), rows.contiguous(), cols.contiguous()
    pairs, d = len(rows), a.shape[1]
    width, slices = _slices(d)
    parts = torch.zeros(slices, pairs, dtype=_sum_dtype(a), device=a.device)
    if pairs:
        _, dot_pairs = _compiled()
        with torch.cuda.device_of(a):
            grid = (-(-pairs // PAIRS_AT_ONCE), slices)
            dot_pairs[grid](a, b, rows, cols, parts, pairs, d, PAIRS=PAIRS_AT_ONCE, WIDTH=width)
    return parts.sum(0)


def _sums_of_rows(table: Tensor, values: Tensor, index: Tensor, offsets: Tensor) -> Tensor:
    """``out[i]`` = sum over the pairs in ``[offsets[i], offsets[i + 1])`` of value times row of `table`.

    A run of more than `LONGEST` pairs is split: what follows its first piece is added up piece by piece into
    `parts`, and from there, in order, into its place. So a latent that lives on every token costs no program more than
    `LONGEST` pairs and a row of each part. There are never more than ``pairs // LONGEST`` parts, so their number need
    not be read from the device.
    """
    table, values, index = table.contiguous(), values.contiguous(), index.contiguous()
    runs, d, most_parts = len(offsets) - 1, table.shape[1], len(values) // LONGEST
    width, slices = _slices(d)
    start, stop = offsets[:-1].long(), offsets[1:].long()
    parts_of_run = (stop - start) // LONGEST
    parts_until = parts_of_run.cumsum(0)

    part = torch.arange(most_parts, device=table.device)
    run = torch.searchsorted(parts_until, part, right=True).clamp(max=runs - 1)
    part_start = start[run] + LONGEST * (1 + part - (parts_until - parts_of_run)[run])
    part_stop = torch.minimum(part_start + LONGEST, stop[run])  # before its start where there is no such part

    none = torch.zeros_like(part)
    work_of_parts = torch.stack([part_start, part_stop, none, none])
    work_of_runs = torch.stack([start, torch.minimum(start + LONGEST, stop), parts_until - parts_of_run, parts_until])
    parts = torch.empty(most_parts, d, dtype=_sum_dtype(table), device=table.device)
    out = torch.empty(runs, d, dtype=_sum_dtype(table), device=table.device)
    sum_rows, _ = _compiled()
    with torch.cuda.device_of(table):
        for work, result in ((work_of_parts, parts), (work_of_runs, out)):
            if len(result):
                sum_rows[(len(result), slices)](
                    table, values, index, work, parts, result, len(result), d, ROWS=ROWS_AT_ONCE, WIDTH=width
                )
    return out


def _slices(d: int) -> tuple[int, int]:
    """Width and number of the slices of `d` numbers: the widest among those that leave the fewest lanes idle."""
    width = min(WIDTHS, key=lambda width: (-d % width, -width))
    return width, -(-d // width)


def _sum_dtype(table: Tensor) -> torch.dtype:
    """What sums are added up and returned in."""
    return torch.float64 if table.dtype == torch.float64 else torch.float32


@functools.cache
def _compiled() -> tuple:
    """`_sum_rows` and `_dot_pairs` as Triton's functions. Only now is Triton imported: that takes a third of a second.

    Raises:
        ImportError: if it is not installed.
    """
    global tl
    try:
        import triton
        import triton.language as tl
    except ImportError as error:
        raise ImportError(
            "these kernels need triton, which is not installed: pip install triton, or unset SAE_LIB_TRITON"
        ) from error
    return triton.jit(_sum_rows), triton.jit(_dot_pairs)


@no_type_check  # Triton reads these functions' source: nothing may wrap them
def _sum_rows(table, values, index, work, parts, out, items, d, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """One slice of one row of `out`: pairs ``[start, stop)``, and then rows ``[part, last_part)`` of `parts`."""
    item = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (column < d)[None, :]
    start, stop = tl.load(work + item), tl.load(work + items + item)
    part, last_part = tl.load(work + 2 * items + item), tl.load(work + 3 * items + item)
    total = tl.full((ROWS, WIDTH), 0, out.dtype.element_ty)
    for place in range(start, stop, ROWS):
        pair = place + tl.arange(0, ROWS)
        value = tl.load(values + pair, mask=pair < stop, other=0).to(total.dtype)
        row = tl.load(index + pair, mask=pair < stop, other=0).to(tl.int64)
        wanted = (pair < stop)[:, None] & inside
        rows = tl.load(table + row[:, None] * d + column[None, :], mask=wanted, other=0)
        total += value[:, None] * rows.to(total.dtype)
    for place in range(part, last_part, ROWS):
        row = place + tl.arange(0, ROWS)
        wanted = (row < last_part)[:, None] & inside
        total += tl.load(parts + row[:, None] * d + column[None, :], mask=wanted, other=0)
    tl.store(out + item * d + column, tl.sum(total, 0), mask=column < d)


@no_type_check
def _dot_pairs(a, b, rows, cols, parts, pairs, d, PAIRS: tl.constexpr, WIDTH: tl.constexpr):
    """One slice of the inner products of some pairs, into a row of `parts`."""
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    alive = pair < pairs
    row = tl.load(rows + pair, mask=alive, other=0).to(tl.int64)
    col = tl.load(cols + pair, mask=alive, other=0).to(tl.int64)
    wanted = alive[:, None] & (column < d)[None, :]
    left = tl.load(a + row[:, None] * d + column[None, :], mask=wanted, other=0).to(parts.dtype.element_ty)
    right = tl.load(b + col[:, None] * d + column[None, :], mask=wanted, other=0).to(parts.dtype.element_ty)
    tl.store(parts + tl.program_id(1).to(tl.int64) * pairs + pair, tl.sum(left * right, 1), mask=alive)
