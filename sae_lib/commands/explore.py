"""``explore``: neurons and latents on one page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from sae_lib.commands.options import MODEL, SITE, Device, Limit, Model, Texts
from sae_lib.data import load_texts
from sae_lib.formats import load
from sae_lib.models import load_model


def explore(
    out: Annotated[Path, typer.Option("--out", "-o", help="The page, one HTML file.")] = Path("explorer.html"),
    model: Model = MODEL,
    layer: Annotated[int | None, typer.Option(help="Whose neurons; without --sae, the middle one.")] = None,
    sae: Annotated[
        list[Path] | None, typer.Option(help="Folder of a saved SAE; another one, or --layer, beside it.")
    ] = None,
    site: Annotated[str, typer.Option(help="Where the SAE reads.")] = SITE,
    texts: Texts = "pocket",
    split: Annotated[str, typer.Option(help="Of pocket or a data set.")] = "test",
    limit: Limit = None,
    examples: Annotated[
        int | None, typer.Option(min=1, help="Most of a unit; by default 100, fewer of many units.")
    ] = None,
    device: Device = None,
) -> None:
    """Make a page that shows what neurons or latents stand for; it opens from disk, without a network.

    python -m sae_lib explore --model pocket --layer 1 -o explorer.html

    python -m sae_lib explore --sae runs/topk/0-topk --layer 1 -o both.html
    """
    from sae_lib.explorer import render, write
    from sae_lib.explorer.page import free, sizes
    from sae_lib.neuron_embeddings import latents, neurons

    free(out)
    opened = load_model(model, device)
    sets = [latents(opened, site, load(path, str(opened.device))) for path in sae or []]
    sets = [replace(units, name=f"{path.name}: {units.name}") for path, units in zip(sae or [], sets, strict=True)]
    if layer is not None or not sets:
        sets = [neurons(opened, (opened.n_layers - 1) // 2 if layer is None else layer), *sets]
    records = load_texts(texts, split, limit=limit)
    source = f"texts of pocket, {split}" if texts == "pocket" else f"texts of {Path(texts).name}"
    html = render(sets, records, source=source, most=examples)
    bytes_of = {name: f"{size / 1e6:.2f} MB" for name, size in sizes(html).items()}
    typer.echo(f"{write(html, out)}  {' and '.join(f'{len(units):,} of {units.name}' for units in sets)}")
    typer.echo("  {all}: index {index}, texts {documents}, units {units}, the page itself {page}".format(**bytes_of))
