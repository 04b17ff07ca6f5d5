"""``pocket``: the embedded texts and language model, made anew."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sae_lib.models import ASSETS


def pocket(
    out: Annotated[Path, typer.Option(help="Folder for the texts and the model.")] = ASSETS,
    tokens: Annotated[int, typer.Option(min=1, help="Training tokens.")] = 30_000_000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of texts, weights and data.")] = 0,
) -> None:
    """Make the embedded texts and language model; goes on where an earlier run stopped.

    python -m sae_lib pocket --seed 1 --out runs/pocket
    """
    from sae_lib.pocket.build import build, restart_with_fast_memory

    restart_with_fast_memory()
    build(out, tokens, seed)
