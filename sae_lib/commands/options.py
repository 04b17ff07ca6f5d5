"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import torch
import typer


def present(device: str | None) -> str | None:
    """A device that is here, or none named.

    Raises:
        ValueError: for one that is not.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        reason = str(error).splitlines()[0]
        raise ValueError(f"device must be one that is here, such as cpu, got {device!r}: {reason}") from None
    return device


Model = Annotated[str, typer.Option(help="pocket, a folder, or a name on the Hugging Face Hub.")]
Site = Annotated[str, typer.Option(help="Where the activations are taken.")]
Texts = Annotated[str, typer.Option(help="pocket, a .txt or .jsonl file, or a data set of the Hub.")]
Limit = Annotated[int | None, typer.Option(min=1, help="At most so many texts; the Hub needs it.")]
Device = Annotated[str | None, typer.Option(callback=present, help="cpu, cuda ...; the first GPU, if there is one.")]

MODEL, SITE = "pocket", "blocks.1.hook_resid_post"
"""Defaults: the embedded model, and its residual stream after the second of its four blocks."""
