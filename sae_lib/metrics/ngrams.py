"""What counting words achieves: the baselines that a language model must beat. Chapter `pocket`.

    unigram    p(w)     = (c(w) + 1) / (N + V)
    bigram     p(w | v) = (c(v, w) + T(v) p(w)) / (c(v) + T(v))

with counts c in N tokens of a vocabulary of V, and T(v) the number of different tokens seen after v: a context that has
had many followers is likely to have another one, so the bigram trusts the unigram by as much as it was surprised before
(Witten and Bell 1991, in the interpolated form that Chen and Goodman 1999 describe).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor


class NGrams:
    """Unigram and bigram counts of token ids, and the loss that they give.

    Args:
        rows: token ids, one list a text, each with the token that starts it (BOS), which is context, never predicted.
        vocab_size: V, at least 1.

    Raises:
        ValueError: if no row has two tokens, or an id is outside the vocabulary.
    """

    def __init__(self, rows: Sequence[Sequence[int]], vocab_size: int):
        pairs = [torch.tensor([row[:-1], row[1:]]) for row in rows if len(row) > 1]
        if not pairs:
            raise ValueError(f"rows must hold at least one text of two tokens, got {len(rows)} shorter ones")
        before, after = torch.cat(pairs, 1)
        low, high = min(int(before.min()), int(after.min())), max(int(before.max()), int(after.max()))
        if low < 0 or high >= vocab_size:
            raise ValueError(f"token ids must be in [0, {vocab_size}), got {low} to {high}")
        self.vocab_size = vocab_size
        self._unigram = (torch.bincount(after, minlength=vocab_size) + 1).double() / (len(after) + vocab_size)
        self._pairs, self._counts = (before * vocab_size + after).unique(return_counts=True)
        self._before = torch.bincount(before, minlength=vocab_size)
        self._followers = torch.bincount(self._pairs // vocab_size, minlength=vocab_size)

    def unigram(self, ids: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch next"]:
        """``-log p(w)`` of each next token, in nats, as `LanguageModel.loss` gives it.

        >>> counted = NGrams([[0, 1, 2, 1, 3]], vocab_size=4)
        >>> counted.unigram(torch.tensor([[0, 1, 2]])).exp()  # (2 + 1) and (1 + 1) of 4 + 4
        tensor([[2.6667, 4.0000]])
        """
        return -self._unigram[ids[:, 1:]].log().float()

    def bigram(self, ids: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch next"]:
        """``-log p(w | v)`` of each next token w, given the token v before it, in nats.

        >>> counted = NGrams([[0, 1, 2, 1, 3]], vocab_size=4)
        >>> counted.bigram(torch.tensor([[1, 2]])).exp()  # 1 was followed by 2 and 3: (1 + 2 * 1/4) / (2 + 2)
        tensor([[2.6667]])
        """
        before, after = ids[:, :-1], ids[:, 1:]
        pairs = before * self.vocab_size + after
        place = torch.searchsorted(self._pairs, pairs.contiguous()).clamp(max=len(self._pairs) - 1)
        count = torch.where(self._pairs[place] == pairs, self._counts[place], 0)
        followers = self._followers[before].double()
        likely = (count + followers * self._unigram[after]) / (self._before[before] + followers)
        return -torch.where(followers > 0, likely, self._unigram[after]).log().float()
