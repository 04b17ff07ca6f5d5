"""Seeded chance that stays the same across versions of Python.

Everything is built on ``random.Random(seed).random()``, the one method whose sequence Python promises to keep;
``choice``, ``sample`` and ``shuffle`` of the standard library have changed between versions.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import TypeVar

T = TypeVar("T")


@cache
def _zipf(n: int) -> list[float]:
    return list(accumulate(1 / (rank + 2.0) for rank in range(n)))


class Dice:
    """A source of chance.

    Args:
        seed: any string; equal seeds give equal sequences.
    """

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed).random

    def roll(self, n: int) -> int:
        """An integer in [0, n)."""
        return int(self.random() * n)

    def between(self, low: int, high: int) -> int:
        """An integer in [low, high], both ends included."""
        return low + self.roll(high - low + 1)

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def pick(self, items: Sequence[T]) -> T:
        """Any item, all equally likely."""
        return items[int(self.random() * len(items))]

    def zipf(self, items: Sequence[T]) -> T:
        """An item whose probability falls with its place in the list, as 1 / (place + 2) from place 0."""
        cumulative = _zipf(len(items))
        return items[bisect(cumulative, self.random() * cumulative[-1])]

    def weighted(self, weights: dict[T, float]) -> T:
        """A key, with probability proportional to its weight."""
        cumulative = list(accumulate(weights.values()))
        return list(weights)[bisect(cumulative, self.random() * cumulative[-1])]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        items = list(items)
        for last in range(len(items) - 1, 0, -1):
            other = self.roll(last + 1)
            items[last], items[other] = items[other], items[last]
        return items

    def sample(self, items: Sequence[T], n: int) -> list[T]:
        """``n`` different items in random order."""
        if n > len(items):
            raise ValueError(f"a sample must be at most as large as its {len(items)} items, got {n}")
        chosen: dict[int, None] = {}
        while len(chosen) < n:
            chosen[self.roll(len(items))] = None
        return [items[place] for place in chosen]
