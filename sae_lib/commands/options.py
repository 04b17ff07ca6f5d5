"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[str, typer.Option(help="pocket, a folder, or a name on the Hugging Face Hub.")]
Site = Annotated[str, typer.Option(help="Where the activations are taken.")]
Texts = Annotated[str, typer.Option(help="pocket, a .txt or .jsonl file, or a data set of the Hub.")]
Limit = Annotated[int | None, typer.Option(min=1, help="At most so many texts; the Hub needs it.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda ...; the first GPU, if there is one.")]

MODEL, SITE = "pocket", "blocks.1.hook_resid_post"
"""Defaults: the embedded model, and its residual stream after the second of its four blocks."""
