"""The book's figures: arrays in, matplotlib Axes out. Nothing here loads or trains.

Every function draws on the Axes it is given, or on a new one, and returns it. Uncertainty is drawn wherever there are
several values: the interval that holds the mean in 95% of repetitions (Student's t). Lines differ in colour, marker and
dash, so that nothing depends on colour alone. Figures are light cards with dark ink, and stay that on a dark page.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from numpy.typing import ArrayLike
from scipy.stats import t as student_t

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F5AA8", "#5C5C5C")
"""Okabe and Ito's colours, which colour-blind readers can tell apart, with a violet and a grey for yellow and black."""
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*", "p", "h", "<", ">")
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)))
INK, CARD, GRID = "#2B2F36", "#FFFFFF", "#E3E5E8"
DIVERGING, SEQUENTIAL = "RdBu_r", "cividis"
"""Colour maps: for values around zero, and for values from zero up."""

UNITS = {
    "loss": "loss (squared norms)",
    "l0": "L0 (living latents a token)",
    "fvu": "FVU (fraction)",
    "dead": "dead latents (share)",
    "learning_rate": "learning rate",
    "tokens_per_second": "tokens a second",
}
"""Axis label of each column of a training history."""


def set_style() -> None:
    """The book's style for all figures that follow; each chapter calls it once in its set-up."""
    rc = {
        "figure.figsize": (6.4, 3.8),
        "figure.dpi": 110,
        "figure.facecolor": CARD,
        "axes.facecolor": CARD,
        "savefig.facecolor": CARD,
        "savefig.bbox": "tight",
        "savefig.pad_inches": 0.12,
        "figure.constrained_layout.use": True,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "axes.titlelocation": "left",
        "axes.titlesize": "medium",
        "axes.grid": True,
        "grid.color": GRID,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "legend.frameon": False,
        "lines.linewidth": 1.6,
        "image.cmap": SEQUENTIAL,
    }
    sns.set_theme(context="notebook", style="ticks", palette=list(PALETTE), font_scale=0.85, rc=rc)
    mpl.rcParams["axes.spines.top"] = mpl.rcParams["axes.spines.right"] = False


def styles(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A colour, a marker and a dash for each label, by its place: the same labels look the same in every figure.

    Raises:
        ValueError: if a label occurs twice, or there are more than can be told apart.
    """
    labels, most = list(labels), math.lcm(len(PALETTE), len(MARKERS))
    if len(set(labels)) != len(labels):
        raise ValueError(f"labels must differ from each other, got {labels}")
    if len(labels) > most:
        raise ValueError(f"at most {most} labels can be told apart, got {len(labels)}; split the figure")
    return {
        label: {
            "color": PALETTE[i % len(PALETTE)],
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": DASHES[i % len(DASHES)],
        }
        for i, label in enumerate(labels)
    }


def interval(values: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """Mean and half-width of its t interval, ``t * s / sqrt(n)``; the half-width of one value is NaN: not known.

    Args:
        values: one number a seed; NaN counts as missing.
        level: how often the interval holds the mean, in (0, 1).

    Raises:
        ValueError: if no value is left, or `level` is out of its range.
    """
    values = np.asarray(values, dtype=float).ravel()
    values = values[~np.isnan(values)]
    if not len(values):
        raise ValueError("values must hold at least one number, got none")
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    if len(values) == 1:
        return float(values[0]), float("nan")
    half = student_t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean()), float(half)


def frontier(
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]],
    ax: Axes | None = None,
    x_label: str = UNITS["l0"],
    y_label: str = "FVU (fraction of variance unexplained)",
) -> Axes:
    """What each variant pays for its sparsity: a line a variant, a point a setting, 95% intervals over seeds.

    Args:
        curves: label -> (x, y), each of shape (settings, seeds), or (settings,) for a single seed.
        ax: where to draw; None makes a figure.
        x_label: with its unit.
        y_label: with its unit.

    Raises:
        ValueError: if there is no curve, or x and y of one differ in shape.
    """
    if not curves:
        raise ValueError("curves must hold at least one variant, got none")
    ax = ax if ax is not None else plt.subplots()[1]
    for label, style in styles(list(curves)).items():
        x, y = (np.asarray(part, dtype=float) for part in curves[label])
        if x.shape != y.shape or x.ndim not in (1, 2):
            raise ValueError(f"x, y of {label!r} must both have shape (settings, seeds), got {x.shape} and {y.shape}")
        x, y = (part[:, None] if part.ndim == 1 else part for part in (x, y))
        x_mean, x_half = np.array([interval(row) for row in x]).T
        y_mean, y_half = np.array([interval(row) for row in y]).T
        order = np.argsort(x_mean)
        ax.errorbar(
            x_mean[order],
            y_mean[order],
            xerr=None if np.isnan(x_half).all() else x_half[order],
            yerr=None if np.isnan(y_half).all() else y_half[order],
            label=label,
            markersize=5,
            capsize=2.5,
            elinewidth=1,
            **style,
        )
    ax.set(xlabel=x_label, ylabel=y_label)
    if len(curves) > 1:
        ax.legend()
    return ax


def estimates(
    values: Mapping[str, ArrayLike], ax: Axes | None = None, x_label: str = "value", control: float | None = None
) -> Axes:
    """One number a seed for each label: every seed a dot, the mean with its 95% interval beside them.

    Args:
        values: label -> (seeds,).
        ax: where to draw; None makes a figure.
        x_label: with its unit.
        control: value to compare with, drawn as a line.

    Raises:
        ValueError: if there is no label, or one without values.
    """
    if not values:
        raise ValueError("values must hold at least one label, got none")
    ax = ax if ax is not None else plt.subplots(figsize=(6.4, 0.9 + 0.42 * len(values)))[1]
    for place, (label, style) in enumerate(styles(list(values)).items()):
        seeds = np.asarray(values[label], dtype=float).ravel()
        mean, half = interval(seeds)
        look = {"color": style["color"], "marker": style["marker"], "linestyle": "none"}
        ax.plot(seeds, np.full(len(seeds), place + 0.18), alpha=0.45, markersize=4, **look)
        ax.errorbar(mean, place - 0.08, xerr=None if np.isnan(half) else half, capsize=3, **look)
    if control is not None:
        ax.axvline(control, color=INK, linewidth=1, linestyle=":", label="control")
        ax.legend()
    ax.set(xlabel=x_label, yticks=range(len(values)), yticklabels=list(values), ylim=(len(values) - 0.5, -0.5))
    ax.grid(axis="y", visible=False)
    return ax


def bars(
    values: Mapping[str, ArrayLike], groups: Sequence[str], ax: Axes | None = None, x_label: str = "value"
) -> Axes:
    """A bar a label, from zero to the first of its three numbers, and a line from the second to the third: its range.

    Args:
        values: label -> (middle, least, largest), from the top down.
        groups: what each label belongs to, in the same order; bars of one group have one colour.
        ax: where to draw; None makes a figure.
        x_label: with its unit.

    Raises:
        ValueError: if there is no label, or not a group for each.
    """
    if not values or len(groups) != len(values):
        raise ValueError(f"groups must name one group for each of at least one label, got {len(groups)}, {len(values)}")
    ax = ax if ax is not None else plt.subplots(figsize=(6.4, 0.9 + 0.24 * len(values)))[1]
    looks = styles(sorted(set(groups)))
    middle, least, largest = np.array(list(values.values()), dtype=float).T
    ends, line = [middle - least, largest - middle], {"ecolor": INK, "error_kw": {"elinewidth": 1}}
    ax.barh(range(len(values)), middle, xerr=ends, color=[looks[group]["color"] for group in groups], **line)
    ax.set(xlabel=x_label, yticks=range(len(values)), yticklabels=list(values), ylim=(len(values) - 0.4, -0.6))
    ax.grid(axis="y", visible=False)
    return ax


def heat_map(
    matrix: ArrayLike,
    ax: Axes | None = None,
    x_label: str = "direction",
    y_label: str = "direction",
    value_label: str = "cosine",
    limits: tuple[float, float] | None = (-1, 1),
) -> Axes:
    """A matrix as colours; around zero in two colours, from zero up in one.

    Args:
        matrix: (rows, columns), e.g. cosines between directions.
        ax: where to draw; None makes a figure.
        x_label: what a column is.
        y_label: what a row is.
        value_label: what a colour is, with its unit.
        limits: values at the ends of the colour scale; None: 0 (minus the largest, if any is negative) to the largest.

    Raises:
        ValueError: if `matrix` is not a matrix.
    """
    matrix = np.asarray(matrix, dtype=float)
    if matrix.ndim != 2 or not matrix.size:
        raise ValueError(f"matrix must have shape (rows, columns), got {matrix.shape}")
    if limits is None:
        largest = float(np.nanmax(np.abs(matrix))) or 1.0
        limits = (-largest if np.nanmin(matrix) < 0 else 0.0, largest)
    ax = ax if ax is not None else plt.subplots(figsize=(5, 4.2))[1]
    colours = DIVERGING if limits[0] < 0 else SEQUENTIAL
    image = ax.imshow(matrix, cmap=colours, vmin=limits[0], vmax=limits[1], interpolation="nearest")
    ax.figure.colorbar(image, ax=ax, label=value_label, shrink=0.85)
    ax.set(xlabel=x_label, ylabel=y_label)
    ax.grid(False)
    return ax


def densities(rates: Mapping[str, ArrayLike], ax: Axes | None = None) -> Axes:
    """How often latents fire: for each label a histogram of the latents' firing rates on a logarithmic axis.

    Latents that never fire have no place on that axis; the legend counts them.

    Args:
        rates: label -> (d_sae,), the share of tokens on which each latent lives, in [0, 1].
        ax: where to draw; None makes a figure.

    Raises:
        ValueError: if there is no label, or a rate is outside [0, 1].
    """
    if not rates:
        raise ValueError("rates must hold at least one label, got none")
    ax = ax if ax is not None else plt.subplots()[1]
    for label, style in styles(list(rates)).items():
        rate = np.asarray(rates[label], dtype=float).ravel()
        if not ((rate >= 0) & (rate <= 1)).all():
            raise ValueError(f"rates of {label!r} must be in [0, 1], got values from {rate.min()} to {rate.max()}")
        never = int((rate == 0).sum())
        ax.hist(
            np.log10(rate[rate > 0]),
            bins=np.linspace(-6, 0, 49),
            histtype="step",
            linewidth=1.6,
            color=style["color"],
            linestyle=style["linestyle"],
            label=f"{label} ({never} of {len(rate)} never fire)",
        )
    ax.set(xlabel="firing rate (share of tokens, log10)", ylabel="latents")
    ax.legend()
    return ax


def history_curves(
    history: Sequence[Mapping[str, Any]],
    columns: Sequence[str] = ("loss", "fvu", "l0", "dead"),
    labels: Sequence[str] | None = None,
) -> np.ndarray:
    """A training run over its tokens: a panel a column of the history, a line an SAE; raw steps faint behind a mean.

    Args:
        history: rows of `sae_lib.train`, each with ``sae``, ``tokens`` and the columns.
        columns: which to draw, e.g. "loss", "reconstruction", "sparsity", "aux", "fvu", "l0", "dead".
        labels: a name for each SAE, in the order of training; by default its variant.

    Returns:
        The Axes, one a column.

    Raises:
        ValueError: if the history is empty, no row has a column, or the labels do not fit.
    """
    if not history:
        raise ValueError("history must hold at least one row, got none")
    places = sorted({row["sae"] for row in history})
    if labels is None:
        variants = {row["sae"]: row.get("variant", str(row["sae"])) for row in history}
        names = list(variants.values())
        labels = [f"{variants[p]} {p}" if names.count(variants[p]) > 1 else variants[p] for p in places]
    if len(labels) != len(places):
        raise ValueError(f"labels must name each of the {len(places)} SAEs, got {list(labels)}")
    wide = min(len(columns), 2)
    tall = -(-len(columns) // wide)
    _, grid = plt.subplots(tall, wide, figsize=(3.9 * wide, 2.7 * tall), squeeze=False)
    for ax, column in zip(grid.flat, columns, strict=False):
        if not any(column in row for row in history):
            raise ValueError(f"columns must be in the history, got {column!r}; it has {sorted(history[-1])}")
        for place, (label, style) in zip(places, styles(labels).items(), strict=True):
            rows = [row for row in history if row["sae"] == place and column in row]
            if rows:
                draw_curve(ax, [row["tokens"] for row in rows], [row[column] for row in rows], label, style)
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        ax.set(xlabel="tokens", ylabel=UNITS.get(column, f"{column} (term of the loss)"))
        if column == "dead":
            ax.set_ylim(-0.02, 1.02)
        elif column == "loss":
            ax.set_yscale("log")
    for ax in grid.flat[len(columns) :]:
        ax.remove()
    if len(places) > 1:
        grid.flat[0].legend(fontsize="small")
    return grid.flatten()[: len(columns)]


def draw_curve(ax: Axes, x: ArrayLike, y: ArrayLike, label: str, style: Mapping[str, Any]) -> None:
    """`y` over `x`, faint, and its centred running mean over 1/50 of the run, strong."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    width = max(1, len(y) // 50)
    mean = np.convolve(np.pad(y, (width // 2, (width - 1) // 2), mode="edge"), np.ones(width) / width, mode="valid")
    every = max(1, len(y) // 1000)
    if width > 1:
        ax.plot(x[::every], y[::every], color=style["color"], alpha=0.2, linewidth=0.8)
    ax.plot(x[::every], mean[::every], color=style["color"], linestyle=style["linestyle"], label=label)


class LossCurve:
    """A loss curve that grows in a notebook while training runs: ``train(..., watch=LossCurve())``. Chapter `relu`.

    It redraws as often as costs at most a tenth of the time, and once more when the cell ends.

    Args:
        column: of the history, e.g. "loss" or "fvu".

    Raises:
        ValueError: outside IPython.
    """

    def __init__(self, column: str = "loss"):
        from IPython import get_ipython

        self.shell = get_ipython()
        if self.shell is None:
            raise ValueError("LossCurve needs a notebook, got a plain Python process; leave out watch=")
        self.column, self.history, self.drawn = column, [], 0
        self.handle, self.next_draw = None, 0.0

    def __call__(self, history: list[dict[str, Any]]) -> None:
        """Take the history so far; draw it if the last drawing is long enough ago."""
        if self.handle is None:
            self.shell.events.register("post_run_cell", self.finish)
        self.history = history
        if history and time.monotonic() >= self.next_draw:
            self.draw()

    def draw(self) -> None:
        """Draw the history on the display that the first drawing opened."""
        from IPython.display import display

        began = time.monotonic()
        figure: Figure = history_curves(self.history, [self.column])[0].figure
        figure.set_size_inches(6.4, 3.2)
        plt.close(figure)
        if self.handle is None:
            self.handle = display(figure, display_id=True)
        else:
            self.handle.update(figure)
        self.drawn = len(self.history)
        self.next_draw = time.monotonic() + 9 * (time.monotonic() - began)

    def finish(self, *_: Any) -> None:
        """Draw the rows that came after the last drawing; called when the cell ends."""
        self.shell.events.unregister("post_run_cell", self.finish)
        if self.drawn < len(self.history):
            self.draw()
