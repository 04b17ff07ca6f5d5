"""Who lives: the exact selections, each for the price of scoring all pairs once.

    top_of_rows       the k best latents of each token                      TopK
    top_of_rows_by    the k latents of each token that rank best            Gradient
    top_of_batch      the best k * batch pairs of all                       BatchTopK, Mutual Choice
    top_of_columns    the m_i best tokens of each latent i                  Feature Choice
    above             pairs above zero or a threshold                       ReLU, Gated, JumpReLU

All pairs are scored a few hundred tokens at a time, so that the scores stay in the processor's cache and no matrix of
(batch, d_sae) is stored. A bound from below on the last score that lives leaves few **candidates**, and the selection
is made among those.

On processors with fast bfloat16 the scoring is done in it. Its error is bounded, by Cauchy and Schwarz, by what
rounding took from the two vectors:

    |x . w - x' . w'| <= |x - x'| |w| + |x'| |w - w'|         x', w' rounded to bfloat16

(norms above 1e-18, which squares of 32 bits can hold), so every pair that may live is a candidate; candidates are
scored again in the weights' own precision, which decides. The selection is therefore the exact one, not an approximate
top-k. Where the bound leaves too many candidates, the whole batch is scored exactly.

Where many pairs live, all scores are computed in full and the code is a dense matrix: from `DENSITY` of all pairs where
their number is given, from twice that many candidates where it is found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lib.distributed import count, gathered, greatest, largest, least, processes, rank
from sae_lib.sparse import Code, Pairs, Scores, first_of_each, linear, products

DENSITY = 1 / 16
"""Share of living pairs from which dense products are faster (measured: chapter `speed`)."""
CHUNK = 2**22
"""Scores that are held at once; at least those of 256 rows."""
GROUP_SIZES = (32, 16, 8, 4, 2, 1)
"""A row's scores are looked at by groups first; the largest of these sizes that fits is taken."""
WORTH_ROUNDING = 2**29
"""Multiplications from which scoring in bfloat16 is worth what it costs to score candidates again."""
SAMPLE = 64
"""Tokens that are looked at first: they tell whether too many live, and `top_of_batch` a bound."""
ROUNDING = 1.01 * 2**-8
"""More than the largest relative difference between a number and its bfloat16."""
NOTHING = 1e-37
"""Scores that are not larger do not live."""


def top_of_rows(scores: Scores | Float[Tensor, "batch d_sae"], k: int) -> Code:
    """The k largest scores of each token that are positive. Chapter `topk`."""
    if isinstance(scores, Tensor) or k > DENSITY * scores.shape[1] or not scores.shape[0]:
        s = scores if isinstance(scores, Tensor) else scores.dense()
        values, cols = s.topk(k, dim=1, sorted=False)
        return Code.from_dense(torch.zeros_like(s).scatter(1, cols, values.relu()))
    x, W, b = recipe(scores)
    return scores.code(*best_of_rows(x, W, b, k, x.new_zeros(len(x))))


def top_of_rows_by(
    scores: Scores, k: int, rank: Callable[[Float[Tensor, "some d_sae"], slice], Float[Tensor, "some d_sae"]]
) -> Code:
    """The k pairs of each token that rank highest, if their ranks are positive. Chapter `gradient`.

    Args:
        rank: from the scores of some rows, zero where they are negative, and which rows they are, a number for each
            pair, zero where its score is; it may overwrite what it gets. The pairs' values are their scores. Where
            ranks are scores, this is `top_of_rows`, with equal scores in another order; but all pairs are scored in the
            weights' own precision.
    """
    if k > DENSITY * scores.shape[1] or not scores.shape[0]:
        s = scores.dense()
        with torch.no_grad():
            ranks, cols = rank(s.relu(), slice(None)).topk(k, dim=1, sorted=False)
        return Code.from_dense(torch.zeros_like(s).scatter(1, cols, s.gather(1, cols).relu() * (ranks > 0)))
    x, W, b = recipe(scores)
    found = []
    for start, s, _ in scored(x, W, b, exact=True):
        ranks, latents = rank(s.relu(), slice(start, start + len(s))).topk(k, dim=1)
        rows, places = (ranks > NOTHING).nonzero(as_tuple=True)
        cols = latents[rows, places]
        found.append((rows + start, cols, s[rows, cols]))
    rows, cols, values = (torch.cat(part) for part in zip(*found, strict=True))
    if fast(x, W):  # as `candidates` scores those that it finds
        values = products(x, W, Pairs(rows, cols, scores.shape)).add_(b[cols])
    return scores.code(rows, cols, values)


def top_of_batch(scores: Scores | Float[Tensor, "batch d_sae"], k: int) -> Code:
    """The ``k * batch`` largest scores of the whole batch, of all processes, that are positive. Chapter `batchtopk`."""
    found, wanted = None, k * count(scores.shape[0])
    if isinstance(scores, Scores) and k <= DENSITY * scores.shape[1]:
        found = best_of_all(*recipe(scores), wanted)
    if found is not None:
        return scores.code(*found)
    s = scores if isinstance(scores, Tensor) else scores.dense()
    flat = s.flatten()
    places = largest(flat.detach(), wanted)
    z = torch.zeros_like(flat).scatter(0, places, flat.gather(0, places).relu())
    return Code.from_dense(z.view_as(s))


def top_of_columns(scores: Scores | Float[Tensor, "batch d_sae"], counts: Int[Tensor, " d_sae"]) -> Code:
    """Of each latent, as many tokens as `counts` says, in [0, batch]: its largest scores that are positive.

    The batch is that of all processes.
    """
    own = counts.clamp(max=scores.shape[0])  # not more are among this process's tokens
    if isinstance(scores, Tensor) or not scores.shape[0] or own.sum() > DENSITY * scores.shape[0] * scores.shape[1]:
        s = scores if isinstance(scores, Tensor) else scores.dense()
        values, rows = s.topk(int(own.max()), dim=0)
        chosen = torch.arange(len(values), device=s.device).unsqueeze(1) < own
        chosen[chosen.clone()] = of_all_processes(values.detach()[chosen], chosen.nonzero()[:, 1], counts)
        return Code.from_dense(torch.zeros_like(s).scatter(0, rows, values.relu() * chosen))
    x, W, b = recipe(scores)
    cols, rows, values = best_of_rows(W, x, x.new_zeros(len(x)), own, -b)
    if processes() > 1:
        chosen = of_all_processes(values + b[cols], cols, counts)
        cols, rows, values = cols[chosen], rows[chosen], values[chosen]
    by_token = rows.sort(stable=True).indices
    rows, cols, values = rows[by_token], cols[by_token], values[by_token]
    return scores.code(rows, cols, values + b[cols])


def near(scores: Scores | Float[Tensor, "batch d_sae"], threshold: Float[Tensor, " d_sae"]) -> Code:
    """At least the pairs whose score is above their latent's threshold, with their scores: those alone, or all pairs.

    What is made of them (`Code.map`) must leave out for itself what does not live.
    """
    if isinstance(scores, Tensor):
        return Code.from_dense(scores)
    x, W, b = recipe(scores)
    threshold = threshold.detach()
    found = candidates(x, W, b - threshold, lambda maxima, error, rows: NOTHING - error)
    if found is None:
        return Code.from_dense(scores.dense())
    rows, cols, excess = found
    passed = (excess > 0).nonzero().squeeze(1)
    rows, cols = rows[passed], cols[passed]
    return scores.code(rows, cols, excess[passed] + threshold[cols])


def above(scores: Scores | Float[Tensor, "batch d_sae"], threshold: Float[Tensor, "..."]) -> Code:
    """The scores that are positive and above a threshold: one for all latents, or one a latent."""
    threshold = threshold.clamp(min=0).expand(scores.shape[1])
    return near(scores, threshold).map(lambda s, over: s * (s > over), threshold).living()


# How they are found ---------------------------------------------------------------------------------------------------


def recipe(scores: Scores) -> tuple[Tensor, Tensor, Tensor]:
    """``x - b_dec``, the latents' encoder weights as rows, and their biases: without gradient."""
    return scores.centred, scores.W_enc.detach().T.contiguous(), scores.b_enc.detach()


@torch.no_grad()
def best_of_rows(
    a: Float[Tensor, "n d_in"],
    b: Float[Tensor, "m d_in"],
    bias: Float[Tensor, " m"],
    k: int | Int[Tensor, " n"],
    floor: Float[Tensor, " n"],
) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"], Float[Tensor, " pairs"]]:
    """Of each row of ``a b^T + bias``, the k largest entries that are above the row's floor.

    The k-th largest of the groups' maxima is a bound from below on the k-th largest entry.
    """
    alike = isinstance(k, int)
    each = torch.full((len(a),), k, device=a.device) if alike else k
    most = max(1, int(each.max()))

    def bound(maxima: Tensor, error: Tensor, rows: slice) -> Tensor:
        best = maxima.topk(most, dim=1, sorted=not alike).values
        kth = best.amin(1) if alike else best.gather(1, (each[rows, None] - 1).clamp(min=0)).squeeze(1)
        return torch.maximum(kth - ROUNDING * kth.abs() - error, floor[rows] + NOTHING) - error

    found = candidates(a, b, bias, bound, float(each.sum()), groups=2 * most)
    if found is None:  # more come into question than is worth a list, as where many scores are equal; or some are NaN
        entries = [(start, *s.topk(most, dim=1)) for start, s, _ in scored(a, b, bias, exact=True)]
        values, cols = (torch.cat([entry[part] for entry in entries]) for part in (1, 2))
        rows = torch.arange(len(a), device=a.device)[:, None]
        keep = ~(values <= floor[:, None]) & (torch.arange(most, device=a.device) < each[:, None])
        return rows.expand_as(cols)[keep], cols[keep], values[keep]
    rows, cols, values = found
    starts = first_of_each(rows, len(a))
    slot = torch.arange(len(rows), device=a.device) - starts[rows]
    table = a.new_full((len(a), max(1, int(slot.max()) + 1) if len(slot) else 1), -torch.inf)
    table[rows, slot] = values
    best, slot = table.topk(min(most, table.shape[1]), dim=1)
    keep = (best > floor[:, None]) & (torch.arange(best.shape[1], device=a.device) < each[:, None])
    chosen = (starts[:, None] + slot)[keep]
    return rows[chosen], cols[chosen], values[chosen]


@torch.no_grad()
def best_of_all(
    a: Float[Tensor, "n d_in"], b: Float[Tensor, "m d_in"], bias: Float[Tensor, " m"], wanted: int
) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"], Float[Tensor, " pairs"]] | None:
    """The `wanted` largest positive entries of ``a b^T + bias``; None where too many come into question.

    A few rows guess a bound that a little more than `wanted` entries should reach; if fewer do, it is lowered. The rows
    are those of all processes, and so is every decision: each returns what is among its own rows.
    """
    if greatest(not len(a)):
        return None
    sample = a[:: max(1, len(a) // SAMPLE)]
    guesses = torch.cat([s.float().flatten() for _, s, _ in scored(sample, b, bias)])
    share = wanted / (count(len(a)) * len(b))
    for generous in (1.25, 2.5, None):
        bound = 0.0
        if generous is not None:
            rank = min(len(guesses), 1 + int(generous * share * len(guesses)))
            bound = max(0.0, float(least(guesses.topk(rank, sorted=False).values.min())))
        found = candidates(a, b, bias, lambda maxima, error, rows, bound=bound: max(bound, NOTHING) - error, wanted)
        if greatest(found is None):
            return None
        rows, cols, values = found
        if bound == 0 or count(int((values >= bound).sum())) >= wanted:
            chosen = largest(values, wanted).sort().values
            chosen = chosen[values[chosen] > 0]
            return rows[chosen], cols[chosen], values[chosen]


def of_all_processes(
    values: Float[Tensor, " pairs"], cols: Int[Tensor, " pairs"], counts: Int[Tensor, " d_sae"]
) -> Bool[Tensor, " pairs"]:
    """Which pairs are among the largest of their latent over all processes, as many as `counts` says."""
    if processes() == 1:
        return torch.ones_like(cols, dtype=torch.bool)
    parts = gathered(cols)
    values, cols = torch.cat(gathered(values)), torch.cat(parts)
    order = values.sort(descending=True, stable=True).indices
    order = order[cols[order].sort(stable=True).indices]  # by latent, the largest first
    place = torch.arange(len(cols), device=cols.device) - first_of_each(cols, len(counts))[cols[order]]
    chosen = torch.empty_like(cols, dtype=torch.bool).index_copy_(0, order, place < counts[cols[order]])
    return chosen.split([len(part) for part in parts])[rank()]


@torch.no_grad()
def candidates(
    a: Float[Tensor, "n d_in"],
    b: Float[Tensor, "m d_in"],
    bias: Float[Tensor, " m"],
    bound: Callable[[Float[Tensor, "some groups"], Float[Tensor, " some"], slice], Float[Tensor, " some"]],
    wanted: float = torch.inf,
    groups: int = 1,
) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"], Float[Tensor, " pairs"]] | None:
    """All entries of ``a b^T + bias`` that may reach their row's bound: rows (ascending), columns, exact values.

    Args:
        bound: from the groups' largest scores, the error that these may have, and the rows they belong to, a bound
            from below on the scores, as computed, that are wanted.
        wanted: how many entries will be chosen, if that is known.
        groups: least number of groups in a row.

    Returns:
        None if too many entries come into question, more than twice `DENSITY` of all; if a score is NaN; if there is
        no entry.
    """
    if not len(a):
        return None
    size = next(size for size in GROUP_SIZES if len(b) % size == 0 and (len(b) >= groups * size or size == 1))
    many = 2 * DENSITY * len(b)  # of a row, on average

    def reaching(exact: bool, many: float) -> tuple[Tensor, Tensor, Tensor] | None:
        parts, seen = [], 0
        for start, s, error in scored(a, b, bias, exact):
            grouped = s.unflatten(1, (size, -1))
            maxima = grouped.amax(1)
            lowest = bound(maxima.to(a.dtype), error, slice(start, start + len(s)))
            lowest = (lowest - 2 * ROUNDING * lowest.abs()).to(s.dtype)  # what storing in bfloat16 may take, twice
            if maxima.isnan().any() or (start == 0 and (s >= lowest[:, None]).sum() > many * len(s)):
                return None
            rows, group = (maxima >= lowest[:, None]).nonzero().unbind(1)
            members = grouped[rows, :, group]
            pair, place = (members >= lowest[rows, None]).nonzero().unbind(1)
            parts.append((rows[pair] + start, group[pair] + place * grouped.shape[2], members[pair, place]))
            seen += len(pair)
            if seen > many * (start + len(s)):
                return None
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    if not fast(a, b):
        return reaching(True, many)
    found = reaching(False, min(many, 4 * wanted / len(a) + 64))
    if found is None:  # one very long latent makes the bound on rounding useless
        return reaching(True, many)
    rows, cols, _ = found
    return rows, cols, products(a, b, Pairs(rows, cols, (len(a), len(b)))).add_(bias[cols])


def scored(
    a: Float[Tensor, "n d_in"], b: Float[Tensor, "m d_in"], bias: Float[Tensor, " m"], exact: bool = False
) -> Iterator[tuple[int, Float[Tensor, "some m"], Float[Tensor, " some"]]]:
    """``a b^T + bias`` a few rows at a time: first row, scores, and how far each row's scores may be off.

    In bfloat16 where that is fast, unless they must be exact; the error is then that before the result's own rounding.
    """
    rows = len(a) if a.is_cuda else max(256, CHUNK // len(b) // 256 * 256)  # other numbers cost a tenth more
    error = a.new_zeros(len(a))
    if fast(a, b) and not exact:
        a16, b16, bias16 = a.bfloat16(), b.bfloat16(), bias.bfloat16()
        size_a, size_b = row_norms(a), row_norms(b).max()
        lost_a, lost_b = row_norms(a, a16), row_norms(b, b16).max()
        summing = a.shape[1] * 2.0**-23 * size_a * size_b
        of_bias = (bias - bias16).nan_to_num(0).abs().max()  # an infinite bias loses nothing
        error = 1.01 * (lost_a * size_b + (size_a + lost_a) * lost_b + summing + of_bias)
        a, b, bias = a16, b16, bias16
    for start in chain([0], range(SAMPLE, len(a), rows)):  # a few rows first, which show if too many live
        part = slice(start, start + rows if start else SAMPLE)
        yield start, linear(a[part], b, bias), error[part]


def fast(a: Float[Tensor, "n d_in"], b: Float[Tensor, "m d_in"]) -> bool:
    """Whether scoring in bfloat16, and candidates again, is faster than scoring exactly."""
    worth = len(a) * len(b) * a.shape[1] >= WORTH_ROUNDING
    return worth and a.dtype == torch.float32 and a.device.type == "cpu" and fast_bf16()


def row_norms(a: Float[Tensor, "n d_in"], less: Tensor | None = None) -> Float[Tensor, " n"]:
    """Norms of the rows of a, or of a - less; a piece at a time, which the processor's cache holds."""
    if less is None:
        return a.norm(dim=1)
    return torch.cat([(p - q).norm(dim=1) for p, q in zip(a.split(1024), less.split(1024), strict=True)])


@cache
def fast_bf16() -> bool:
    """Whether this processor multiplies bfloat16 matrices faster than those of 32 bits."""
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return fast and torch.backends.mkldnn.is_available()
