"""``vision``: the shipped autoencoders of shapes, made anew."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sae_lib.autoencoders import SHIPPED_IN, make_autoencoders


def vision(
    out: Annotated[Path, typer.Option(help="Folder for the autoencoders.")] = SHIPPED_IN,
    steps: Annotated[int, typer.Option(min=1, help="Of each training, with 128 images each.")] = 1500,
    images: Annotated[int, typer.Option(min=10, help="Shapes to train on; a tenth as many are held out.")] = 20_000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of shapes, weights and data.")] = 0,
) -> None:
    """Make the shipped autoencoders of shapes; those that are in the folder are left as they are.

    python -m sae_lib vision --seed 1 --out runs/vision
    """
    made = make_autoencoders(out, seed, steps, images)
    for name, said in made.items():
        typer.echo(
            f"{out / name}.safetensors  "
            "{cpu_seconds} s  explained variance {explained_variance}  R2 {map_r2}".format(**said)
        )
    if not made:
        typer.echo(f"{out} is complete; to make other autoencoders, name another folder with --out")
