"""``convert``: a saved SAE in another library's format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sae_lib.formats import FORMATS, load, save_as


def convert(
    source: Annotated[str, typer.Argument(help="A folder of any format, or hf:org/name on the Hugging Face Hub.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The new folder.")],
    to: Annotated[str, typer.Option(help=f"{', '.join(FORMATS)}.")] = "sae_lib",
    model: Annotated[
        str | None, typer.Option(help="On whose activations it was trained, for formats that say.")
    ] = None,
    site: Annotated[str | None, typer.Option(help="Where in the model, for formats that say.")] = None,
) -> None:
    """Write a saved SAE as another library stores its own; codes and reconstructions stay as they are.

    python -m sae_lib convert runs/topk/0-topk --to sae_lens --out runs/topk-sae-lens
    """
    sae = load(source)
    path = save_as(sae, out, to, model, site)
    typer.echo(f"{path}  {sae.name} with {sae.d_sae:,} latents, as {to}: {', '.join(FORMATS[to].FILES)}")
