"""Verdicts on claims: what `book/claims.yml` asks, computed from what `book/results` holds, never typed by hand.

Each claim's test gives one effect a seed, and a region in which the claim is true, with theta its margin:

    difference, higher       effect > theta           non-inferiority, higher   effect > -theta
    difference, lower        effect < -theta          non-inferiority, lower    effect < theta
    range                    low < effect < high      identity                  a = b in every seed, to the last bit

(for a ratio, 1 stands where 0 does here). The t interval of the mean effect over n seeds decides: wholly inside, the
claim *holds*; wholly outside, it *fails*; else it is *inconclusive*, and the smallest effect that could have been
detected is told. Levels are adjusted by Holm within a paper: of the m claims with enough seeds, the one whose p value
is the i-th smallest gets the level 0.05 / (m - i + 1), as long as all before it were decided. A claim that asks for
equal L0 and did not get it is not decided. A claim without rows of the experiment as it is described now was *not run*.

Blind to: what differs between our small scale and the paper's, which the ledger shows beside each verdict; and to n
seeds of one model being no sample of models. `FEWEST` seeds decide nothing about tails: values that are far from normal
need more. Chapter `claims`.
"""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from sae_lib import experiments
from sae_lib.contrasts import STATISTICS, Undecided, effects
from sae_lib.results import ROOT, ResultsError, Row

CLAIMS = ROOT / "book" / "claims.yml"
ALPHA = 0.05
FEWEST = 3
"""Seeds that a verdict needs."""
POWER = 0.8
"""How often the smallest detectable effect would have been detected."""

WORDS = ("holds", "fails", "inconclusive", "not run")
KNOWN = ("paper's body", "figure", "abstract", "authors' code", "third party", "recalled", "inferred")
PREDICTIONS = {
    "difference": ("higher", "lower"),
    "non-inferiority": ("higher", "lower"),
    "range": ("within",),
    "identity": ("equal",),
}
FIELDS = (
    "id paper statement source prediction control kind margin scale date chapter test".split()  # all are needed
)
TEST = "experiment where metric statistic a b l0 saes equal beyond".split()


@dataclass(frozen=True)
class Claim:
    """What a paper says, and how we test it; the head of ``book/claims.yml`` says what each field means."""

    id: str
    paper: str
    statement: str
    source: Mapping[str, str]
    prediction: str
    control: str
    kind: str
    margin: float | Sequence[float | None]
    scale: str
    date: datetime.date
    chapter: str
    test: Mapping[str, Any] = field(repr=False)

    @property
    def statistic(self) -> str:
        return self.test.get("statistic", "difference")

    @property
    def command(self) -> str:
        """What makes the rows that the test needs."""
        return f"python -m sae_lib reproduce {self.test['experiment'].split('/')[0]} --scale {self.scale}"

    @property
    def neutral(self) -> float:
        """The effect of two SAEs that are alike."""
        return 1.0 if self.statistic == "ratio" else 0.0

    @property
    def region(self) -> tuple[float, float]:
        """Between which effects the claim is true."""
        if self.kind == "identity":
            return self.neutral, self.neutral
        if self.kind == "range":
            low, high = self.margin
            return -math.inf if low is None else low, math.inf if high is None else high
        margin = self.margin if self.kind == "difference" else -self.margin
        return (self.neutral + margin, math.inf) if self.prediction == "higher" else (-math.inf, self.neutral - margin)


@dataclass(frozen=True)
class Verdict:
    """What the results say of a claim.

    Attributes:
        word: holds, fails, inconclusive or not run.
        reason: why nothing was decided; empty if the interval alone says it.
        effects: of each seed.
        mean: of the effects.
        interval: of the mean, at the level `1 - alpha`; None if there is none.
        alpha: the level after Holm's adjustment.
        detectable: distance from the nearest end of the claim's region that `POWER` of such experiments would decide.
    """

    claim: Claim
    word: str
    reason: str = ""
    effects: Mapping[int, float] = field(default_factory=dict)
    mean: float | None = None
    interval: tuple[float, float] | None = None
    alpha: float | None = None
    detectable: float | None = None


# Reading the claims ---------------------------------------------------------------------------------------------------


def read_claims(path: Path | None = None) -> tuple[dict[str, str], list[Claim]]:
    """The papers, each with its name, and the claims, checked.

    Raises:
        ValueError: a claim is not as the head of ``book/claims.yml`` says.
    """
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # as safe, and ten times as fast where it was compiled
    content = yaml.load((path or CLAIMS).read_text(encoding="utf-8"), loader)
    claims = [checked(claim, content["papers"]) for claim in content["claims"]]
    ids = [claim.id for claim in claims]
    if twice := {each for each in ids if ids.count(each) > 1}:
        raise ValueError(f"ids must differ, got {', '.join(sorted(twice))} more than once")
    return content["papers"], claims


def checked(claim: Mapping[str, Any], papers: Mapping[str, str]) -> Claim:
    """The claim, if it is one that can be tested."""
    name = claim.get("id", "a claim without id")

    def must(rule: object, said: str, got: object) -> None:
        if not rule:
            raise ValueError(f"{name}: {said}, got {got!r}")

    must(set(claim) == set(FIELDS), f"fields must be {', '.join(FIELDS)}", sorted(set(claim) ^ set(FIELDS)))
    paper, kind, margin, test = (claim[part] for part in ("paper", "kind", "margin", "test"))
    must(paper in papers, f"paper must be one of {', '.join(papers)}", paper)
    must(re.fullmatch(rf"{paper}-[\w-]+", str(name)), f"id must be {paper}-<number>[-<part>]", name)
    for part in ("statement", "control", "chapter"):
        must(isinstance(claim[part], str) and claim[part], f"{part} must be a text", claim[part])
    for part in ("source", "test"):
        must(isinstance(claim[part], dict), f"{part} must be a mapping", claim[part])
    must(set(claim["source"]) == {"where", "known"}, "source must have where and known", claim["source"])
    must(claim["source"]["known"] in KNOWN, f"known must be one of {', '.join(KNOWN)}", claim["source"]["known"])
    must(kind in PREDICTIONS, f"kind must be one of {', '.join(PREDICTIONS)}", kind)
    allowed = ", ".join(PREDICTIONS[kind])
    must(claim["prediction"] in PREDICTIONS[kind], f"the prediction of a {kind} must be {allowed}", claim["prediction"])
    if kind == "range":
        pair = isinstance(margin, list) and len(margin) == 2 and margin != [None, None]
        must(pair and (None in margin or margin[0] < margin[1]), "margin must be [low, high], one may be null", margin)
    else:
        must(isinstance(margin, int | float) and margin >= 0, "margin must be a number from 0", margin)
    must(claim["scale"] in experiments.SCALES, f"scale must be one of {', '.join(experiments.SCALES)}", claim["scale"])
    must(isinstance(claim["date"], datetime.date), "date must be year-month-day", claim["date"])
    check_test(test, kind, must)
    return Claim(**claim)


def check_test(test: Mapping[str, Any], kind: str, must: Callable[[object, str, object], None]) -> None:
    """The same for what a claim says of its rows."""
    statistic = test.get("statistic", "difference")
    must(set(test) <= set(TEST), f"a test has {', '.join(TEST)}", sorted(set(test) - set(TEST)))
    whole = test.get("experiment", "")
    must(re.fullmatch(r"\w+/\w+", str(whole)), "experiment must be <chapter>/<experiment>", whole)
    must(statistic in STATISTICS, f"statistic must be one of {', '.join(STATISTICS)}", statistic)
    arms = {"value": ["a"], "rank_correlation": [], "reliability": []}.get(statistic, ["a", "b"])
    must({"a", "b"} & set(test) == set(arms), f"{statistic} takes {' and '.join(arms) or 'neither a nor b'}", test)
    for arm in arms:
        must("sae" in test[arm], f"{arm} must name its sae", test[arm])
        must("metric" in test or "metric" in test[arm], f"{arm} must have a metric", test[arm])
    must(bool(arms) or "metric" in test, "a test must have a metric", test)
    must(
        (statistic == "rank_correlation") == (isinstance(test.get("metric"), list) and len(test["metric"]) == 2),
        "metric must be one name, or two for a rank correlation",
        test.get("metric"),
    )
    must((statistic == "at_equal_l0") == ("l0" in test), "l0 belongs to at_equal_l0", test)
    must("saes" not in test or not arms, "saes belongs to rank_correlation and reliability", test)
    must("equal" not in test or len(arms) == 2, "equal needs a and b", test)
    must(len(arms) == 2 or kind == "range", f"{statistic} has no neutral value: kind must be range", kind)
    must(kind != "identity" or statistic == "difference", "an identity compares values of a and b", statistic)


# From effects to verdicts ---------------------------------------------------------------------------------------------


def t_interval(values: Sequence[float], alpha: float) -> tuple[float, float]:
    """Of the mean, holding it in `1 - alpha` of all experiments if effects are normal.

    >>> low, high = t_interval([1.0, 2.0, 3.0], alpha=0.05)  # 2 -+ 4.303 * 1 / sqrt(3)
    >>> round(low, 3), round(high, 3)
    (-0.484, 4.484)
    """
    mean, n = np.mean(values), len(values)
    half = stats.t.ppf(1 - alpha / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n)
    return float(mean - half), float(mean + half)


def p_value(values: Sequence[float], region: tuple[float, float]) -> float:
    """Of the t test that decides: the interval at level `1 - alpha` leaves out both ends of the region iff p < alpha.

    >>> round(p_value([1.0, 2.0, 3.0], (0.0, math.inf)), 4)  # t = 2 * sqrt(3) with two degrees of freedom
    0.0742
    """
    mean, n = np.mean(values), len(values)
    error = np.std(values, ddof=1) / math.sqrt(n)
    far = [abs(mean - end) for end in region if math.isfinite(end)]
    nearest = min(far)
    return float(2 * stats.t.sf(nearest / error, n - 1)) if error else float(nearest == 0)


def holm(p_values: Mapping[str, float], alpha: float = ALPHA) -> dict[str, float]:
    """The level of each test, so that a wrong decision among all of them is made with probability alpha at most.

    >>> holm({"a": 0.04, "b": 0.01, "c": 0.03})  # b: 0.05 / 3 decides; c: 0.05 / 2 does not, nor does a after it
    {'b': 0.016666666666666666, 'c': 0.025, 'a': 0.025}
    """
    levels, level, going_on = {}, alpha, True
    for before, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        if going_on:
            level = alpha / (len(p_values) - before)
        levels[name] = level
        going_on = going_on and p_values[name] < level
    return levels


def decided(claim: Claim, found: Mapping[int, float], alpha: float) -> Verdict:
    """The verdict of the interval at the adjusted level."""
    values, (low, high) = list(found.values()), claim.region
    bottom, top = t_interval(values, alpha)
    outside = top < low or high < bottom
    word = "holds" if low < bottom and top < high else "fails" if outside else "inconclusive"
    n = len(values)
    quantiles = stats.t.ppf(1 - alpha / 2, n - 1) + stats.t.ppf(POWER, n - 1)
    detectable = float(quantiles * np.std(values, ddof=1) / math.sqrt(n))
    return Verdict(claim, word, "", found, float(np.mean(values)), (bottom, top), alpha, detectable)


def judge(claims: Sequence[Claim], rows_of: Callable[[str, str], Sequence[Row]]) -> list[Verdict]:
    """A verdict on each claim, in their order.

    Args:
        rows_of: the rows of a chapter at a scale; raises `ResultsError` where there are none.
    """
    found: dict[str, dict[int, float]] = {}
    done: dict[str, Verdict] = {}
    for claim in claims:
        try:
            found[claim.id] = effects(claim.test, rows_of(claim.test["experiment"].split("/")[0], claim.scale))
        except ResultsError as error:
            done[claim.id] = Verdict(claim, "not run", str(error).partition("; to make them")[0])
        except Undecided as undecided:
            done[claim.id] = Verdict(claim, *undecided.args)
    for claim in claims:
        if claim.id in found:
            seeds = found[claim.id]
            unequal = claim.kind == "identity" and any(seeds.values())
            mean = float(np.mean(list(seeds.values())))
            if unequal:
                done[claim.id] = Verdict(claim, "fails", "a and b differ", seeds, mean)
            elif len(seeds) < FEWEST:
                reason = f"a verdict needs {FEWEST} seeds, there are {len(seeds)}"
                done[claim.id] = Verdict(claim, "inconclusive", reason, seeds, mean)
            elif claim.kind == "identity":
                done[claim.id] = Verdict(claim, "holds", "", seeds, mean)
    for paper in dict.fromkeys(claim.paper for claim in claims):
        family = {claim.id: claim for claim in claims if claim.paper == paper and claim.id not in done}
        levels = holm({name: p_value(list(found[name].values()), claim.region) for name, claim in family.items()})
        done |= {name: decided(claim, found[name], levels[name]) for name, claim in family.items()}
    return [done[claim.id] for claim in claims]


def verdicts(folder: Path | None = None) -> list[Verdict]:
    """A verdict on each claim of ``book/claims.yml``, from the results in a folder, by default ``book/results``."""
    described, read = experiments.described(), {}

    def rows_of(chapter: str, scale: str) -> Sequence[Row]:
        if chapter not in described:
            raise ResultsError("its experiment is not described yet")
        if (chapter, scale) not in read:
            try:
                read[chapter, scale] = experiments.rows(chapter, scale, folder)
            except ResultsError as error:
                read[chapter, scale] = error
        if isinstance(read[chapter, scale], ResultsError):
            raise read[chapter, scale]
        return read[chapter, scale]

    return judge(read_claims()[1], rows_of)
