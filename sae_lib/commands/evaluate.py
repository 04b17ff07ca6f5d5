"""``evaluate``: saved SAEs on held-out texts, and among the book's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from sae_lib.activations import Activations
from sae_lib.commands.options import MODEL, SITE, Device, Limit, Model, Site, Texts
from sae_lib.data import load_texts
from sae_lib.formats import load
from sae_lib.metrics.evaluation import evaluate as measure
from sae_lib.models import load_model


def evaluate(
    saes: Annotated[list[Path], typer.Argument(help="Folders of saved SAEs.")],
    model: Model = MODEL,
    site: Site = SITE,
    texts: Texts = "pocket",
    split: Annotated[str, typer.Option(help="Of pocket or a data set; not the one that was trained on.")] = "test",
    limit: Limit = None,
    tokens: Annotated[int, typer.Option(min=1, help="Held-out tokens.")] = 100_000,
    against: Annotated[str | None, typer.Option(help="book: draw them on the curves of its comparison.")] = None,
    out: Annotated[Path, typer.Option(help="The picture, with --against.")] = Path("against.png"),
    device: Device = None,
) -> None:
    """Measure saved SAEs on held-out texts; with --against book, beside the book's at the same L0.

    python -m sae_lib evaluate runs/topk/0-topk

    python -m sae_lib evaluate runs/topk/0-topk --against book --out mine.png
    """
    if against not in (None, "book"):
        raise ValueError(f"against must be book, got {against!r}")
    if against and not out.absolute().parent.is_dir():
        raise ValueError(f"the folder of the picture must exist, got {out}")
    opened = {path.name: load(path) for path in saes}
    if len(opened) < len(saes):
        raise ValueError(f"folders must have different names, got {', '.join(map(str, saes))}")
    rows = curves_of_book(model, site) if against else []
    held = Activations(load_model(model, device), site, texts=load_texts(texts, split, limit=limit))
    reports = dict(zip(opened, measure(list(opened.values()), held, tokens), strict=True))
    for name, report in reports.items():
        typer.echo(name + "".join(f"\n  {metric} {value:.6g}" for metric, value in report.items()))
    if against:
        draw_among(reports, rows, out)


def curves_of_book(model: str, site: str) -> list[dict[str, Any]]:
    """The rows of the book's comparison, and matplotlib ready to draw them where there is no screen."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError('--against needs the extra "book": pip install "sae-put-to-the-test[book]"') from None
    matplotlib.use("agg")
    from sae_lib.against import book_rows

    return book_rows(model, site)


def draw_among(reports: Mapping[str, Mapping[str, float]], rows: list[dict[str, Any]], out: Path) -> None:
    """Print what the book's variants measure at the same L0, and draw all of it."""
    from sae_lib.against import MEASURES, beside, draw

    for name, report in reports.items():
        for measured in MEASURES:
            typer.echo(f"{name}, {measured} at its L0 of {report['l0']:.1f}: {report[measured]:.4f}")
            for label, found in beside(report, rows, measured).items():
                there = "not measured at this L0" if found is None else "{:.4f} ± {:.4f}".format(*found)
                typer.echo(f"  {label} {there}")
    draw(reports, rows).savefig(out)
    typer.echo(f"{out}  drawn on the curves of {len({row['seed'] for row in rows})} seeds")
