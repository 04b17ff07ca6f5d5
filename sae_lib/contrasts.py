"""What the rows say to a claim's test: one effect a seed, paired.

A test names an experiment, the settings that count (`where`), a statistic of a metric, and the SAEs that it compares,
`a` and `b`, each of which may name a metric and settings of its own; ``book/claims.yml`` begins with their meaning.
Undefined numbers leave their seed out, never a zero in. What cannot be compared raises `Undecided`. Chapter `claims`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from scipy import stats

from sae_lib import matching
from sae_lib.results import Row

ALIKE = 0.03
"""Relative difference up to which two means count as equal, where a claim asks for that."""

Test = Mapping[str, Any]


class Undecided(Exception):
    """Why a claim has no effects: a word and a reason."""


def effects(test: Test, rows: Sequence[Row]) -> dict[int, float]:
    """The effect of each seed in which it is defined.

    Raises:
        sae_lib.contrasts.Undecided: there are no such rows, no seed in which the effect is defined, or means that
            should be equal are not.
    """
    name = test["experiment"].split("/")[1]
    rows = [row for row in rows if row["experiment"] == name]
    if not rows:
        raise Undecided("not run", f"{test['experiment']} has no rows at this scale")
    found = STATISTICS[test.get("statistic", "difference")](test, rows)
    if "beyond" in test:
        elsewhere = {name: part for name, part in test.items() if name != "beyond"}
        elsewhere["where"] = test.get("where", {}) | test["beyond"]
        other = effects(elsewhere, rows)
        found = {seed: found[seed] - other[seed] for seed in found if seed in other}
    found = {seed: effect for seed, effect in sorted(found.items()) if math.isfinite(effect)}
    if not found:
        raise Undecided("inconclusive", "the statistic is undefined in every seed")
    for name in test.get("equal", []):
        a, b = (arm(test, which, rows, name) for which in "ab")
        means = [np.mean([values[seed] for seed in found if seed in values] or math.nan) for values in (a, b)]
        if not abs(means[0] - means[1]) <= ALIKE * abs(means[1]):
            said = f"{means[0]:.4g} against {means[1]:.4g}"
            raise Undecided("inconclusive", f"{name} must be equal within {ALIKE:.0%} and is not: {said}")
    return found


def chosen(rows: Sequence[Row], wanted: Mapping[str, Any]) -> list[Row]:
    found = [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]
    if not found:
        said = ", ".join(f"{name} {value}" for name, value in wanted.items()) or "this experiment"
        raise Undecided("not run", f"there are no rows of {said}")
    return found


def number(row: Row, metric: str) -> float:
    """NaN where it is undefined."""
    value = row.get(metric)
    return math.nan if value is None else float(value)


def rows_of_arm(test: Test, which: str, rows: Sequence[Row], metric: str | None) -> tuple[list[Row], str]:
    """The rows of one side of the comparison, and the name of what is compared."""
    own = dict(test[which])
    metric = metric or own.get("metric", test.get("metric"))
    own.pop("metric", None)
    found = chosen(rows, test.get("where", {}) | own)
    if not any(metric in row for row in found):
        if reasons := sorted({reason for row in found for reason in row["unmeasured"].values()}):
            raise Undecided("inconclusive", f"{test[which]['sae']} has no {metric}: {'; '.join(reasons)}")
        raise Undecided("not run", f"{metric} was not measured")
    return found, metric


def arm(test: Test, which: str, rows: Sequence[Row], metric: str | None = None) -> dict[int, float]:
    """The metric of one side, one number a seed."""
    found, metric = rows_of_arm(test, which, rows, metric)
    values = {row["seed"]: number(row, metric) for row in found}
    if len(values) < len(found):
        raise Undecided(
            "not run", f"{len(found)} rows of {test[which]['sae']} for {len(values)} seeds: its settings vary"
        )
    return values


def both(test: Test, rows: Sequence[Row]) -> dict[int, tuple[float, float]]:
    a, b = arm(test, "a", rows), arm(test, "b", rows)
    if not a.keys() & b.keys():
        raise Undecided("not run", f"{test['a']['sae']} and {test['b']['sae']} have no seed in common")
    return {seed: (a[seed], b[seed]) for seed in a if seed in b}


def difference(test: Test, rows: Sequence[Row]) -> dict[int, float]:
    return {seed: a - b for seed, (a, b) in both(test, rows).items()}


def ratio(test: Test, rows: Sequence[Row]) -> dict[int, float]:
    return {seed: a / b if b else math.nan for seed, (a, b) in both(test, rows).items()}


def value(test: Test, rows: Sequence[Row]) -> dict[int, float]:
    return arm(test, "a", rows)


def spread(test: Test, rows: Sequence[Row]) -> dict[int, float]:
    pairs = both(test, rows)
    a, b = np.nanmedian(list(pairs.values()), axis=0)
    return {seed: abs(pair[0] - a) - abs(pair[1] - b) for seed, pair in pairs.items()}


def at_equal_l0(test: Test, rows: Sequence[Row]) -> dict[int, float]:
    """Each side's curve, read off at one L0 (`sae_lib.matching`). Undefined in a seed whose curve does not reach it, or
    lacks a point that others have."""

    def read_off(which: str) -> dict[int, float]:
        found, metric = rows_of_arm(test, which, rows, None)
        curves: dict[int, list[tuple[float, float]]] = {}
        for row in found:
            if number(row, "l0") > 0 and math.isfinite(number(row, metric)):
                curves.setdefault(row["seed"], []).append((row["l0"], row[metric]))
        most = max(map(len, curves.values()), default=0)
        values = {}
        for seed, curve in curves.items():
            if len(curve) == most:
                with suppress(ValueError):  # it does not reach this L0
                    values[seed] = matching.at_equal_l0(*zip(*curve, strict=True), at=test["l0"])
        return values

    a, b = read_off("a"), read_off("b")
    return {seed: a[seed] - b[seed] for seed in a if seed in b}


def points(test: Test, rows: Sequence[Row]) -> dict[int, list[Row]]:
    """The rows of each seed that has all the SAEs that the test names, or all that there are."""
    found = chosen(rows, test.get("where", {}))
    saes = {*test.get("saes", [row["sae"] for row in found])}
    for label in sorted(saes):
        chosen(found, {"sae": label})
    of_seeds: dict[int, list[Row]] = {}
    for row in found:
        if row["sae"] in saes:
            of_seeds.setdefault(row["seed"], []).append(row)
    return {seed: some for seed, some in of_seeds.items() if {row["sae"] for row in some} == saes}


def rank_correlation(test: Test, rows: Sequence[Row]) -> dict[int, float]:
    """Spearman's, over SAEs and settings; undefined for fewer than three of them, or where one metric is constant."""
    found = {}
    for seed, some in points(test, rows).items():
        pairs = np.array([[number(row, metric) for metric in test["metric"]] for row in some])
        pairs = pairs[np.isfinite(pairs).all(1)]
        varied = len(pairs) >= 3 and (np.ptp(pairs, axis=0) > 0).all()
        found[seed] = float(stats.spearmanr(*pairs.T).statistic) if varied else math.nan
    return found


def reliability(test: Test, rows: Sequence[Row]) -> dict[int, float]:
    """``1 - mean of noise^2 / variance over SAEs``: 1 if repeating the metric changes nothing, 0 or less if as much."""
    metric, found = test["metric"], {}
    for seed, some in points(test, rows).items():
        values = np.array([number(row, metric) for row in some])
        noise = np.array([number(row["noise"], metric) for row in some])
        between = values.var(ddof=1) if len(values) > 1 else 0.0
        found[seed] = 1 - float((noise**2).mean()) / between if between else math.nan
    return found


STATISTICS: dict[str, Callable[[Test, Sequence[Row]], dict[int, float]]] = {
    "difference": difference,
    "ratio": ratio,
    "value": value,
    "spread": spread,
    "at_equal_l0": at_equal_l0,
    "rank_correlation": rank_correlation,
    "reliability": reliability,
}
