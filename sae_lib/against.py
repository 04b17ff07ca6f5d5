"""A user's own SAE among the book's: its numbers beside those of all variants at the same L0. Chapter `comparison`.

The book's rows are curves over L0, one a variant, with a point for each target and seed: those of the baselines from
`comparison`, those of a paper's variants from its chapter. A curve is read off at the L0
of the SAE in question, seed by seed (`sae_lib.matching.at_equal_l0`), never beyond its ends. Nothing but the variant
should differ: model, site, held-out texts and width; what does is named in the figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from sae_lib import experiments
from sae_lib.figures import INK, frontier, interval
from sae_lib.matching import at_equal_l0
from sae_lib.results import ResultsError, Row

MEASURES = {"fvu": "FVU (fraction)", "kl": "KL (nats a token)", "alive": "alive latents (share)"}

CURVES = "pocket"
"""The experiment that has the curves over L0, in `comparison` and in the papers' chapters."""
PAPERS = {
    "choice": ("Mutual Choice", "Feature Choice"),
    "gradient": ("g-SAE",),
    "atm": ("ATM",),
    "gba": ("GBA",),
}
"""Chapter -> the variants of its paper; what else its experiment trains are controls and baselines again."""


def book_rows(model: str, site: str) -> list[Row]:
    """The rows of the book's curves at a site of a model, of the width that the comparison has a curve of.

    Raises:
        ValueError: the book has no curve there.
    """
    scale = "pocket" if model == "pocket" else "paper"
    every = experiments.rows("comparison", scale)
    for chapter, labels in PAPERS.items():
        with suppress(ResultsError):  # a chapter that was not run yet
            rows = experiments.rows(chapter, scale)
            every += [row for row in rows if row["experiment"] == CURVES and row["sae"] in labels]
    there = [row for row in every if {"model": model, "site": site}.items() <= row["configuration"]["ground"].items()]
    targets: dict[int, set] = {}
    for row in there:
        targets.setdefault(row["d_sae"], set()).add(row["target"])
    widest = max(targets, key=lambda width: len(targets[width]), default=None)
    if widest is None or len(targets[widest]) < 2:
        sites = sorted({row["configuration"]["ground"].get("site", "a planted world") for row in every})
        raise ValueError(f"the book's comparison must have a curve at {site} of {model}, it has {', '.join(sites)}")
    return [row for row in there if row["d_sae"] == widest]


def curves(rows: Sequence[Row], measure: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Label -> (L0, measure), each (settings, seeds), of the SAEs that were measured at more than one target.

    Args:
        rows: of one experiment and one width, as `sae_lib.experiments.rows` gives them.
        measure: a metric of the rows.

    Raises:
        ValueError: if no SAE was measured at two targets.
    """
    found = {}
    for label in dict.fromkeys(row["sae"] for row in rows):
        own = [row for row in rows if row["sae"] == label and row.get(measure) is not None]
        targets, seeds = sorted({row["target"] for row in own}), sorted({row["seed"] for row in own})
        at = {(row["target"], row["seed"]): row for row in own}
        whole = [seed for seed in seeds if all((target, seed) in at for target in targets)]
        if len(targets) > 1 and whole:
            found[label] = tuple(
                np.array([[at[target, seed][name] for seed in whole] for target in targets]) for name in ("l0", measure)
            )
    if not found:
        raise ValueError(f"rows must hold SAEs at two or more targets with {measure}, got {len(rows)} rows")
    return found


def beside(report: Mapping[str, Any], rows: Sequence[Row], measure: str = "fvu") -> dict[str, Any]:
    """Each variant's value at the L0 of the report: mean and half-width of the 95% interval over seeds.

    Args:
        report: what `evaluate` returned.
        rows: see `curves`.
        measure: a metric of both.

    Returns:
        Label -> (mean, half-width), or None where that curve does not reach the L0.
    """
    found: dict[str, Any] = {}
    for label, (l0, values) in curves(rows, measure).items():
        try:
            found[label] = interval([at_equal_l0(x, y, report["l0"]) for x, y in zip(l0.T, values.T, strict=True)])
        except ValueError:
            found[label] = None
    return found


def draw(reports: Mapping[str, Mapping[str, Any]], rows: Sequence[Row]) -> Figure:
    """The book's curves, and the SAEs in question as stars.

    Args:
        reports: name -> what `evaluate` returned.
        rows: see `curves`.
    """
    shown = {m: label for m, label in MEASURES.items() if all(m in report for report in reports.values())}
    figure, axes = plt.subplots(1, len(shown), figsize=(4.2 * len(shown), 3.9), squeeze=False, layout="constrained")
    for ax, (measure, label) in zip(axes[0], shown.items(), strict=True):
        frontier(curves(rows, measure), ax, y_label=label)
        if legend := ax.get_legend():
            legend.remove()
        for name, report in reports.items():
            ax.plot(report["l0"], report[measure], "*", color=INK, markersize=13, zorder=5, clip_on=False)
            ax.annotate(name, (report["l0"], report[measure]), (6, 6), textcoords="offset points")
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:g}")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6)
    widths = ", ".join(f"{row:,}" for row in sorted({row["d_sae"] for row in rows}))
    figure.suptitle(f"stars: yours; curves: the book's, {widths} latents, mean and 95% over seeds", fontsize="small")
    return figure
