"""How every command ends when it does not end well: one line, an exit status, and no traceback for a user's mistake."""

from __future__ import annotations

import os
from typing import Any

import torch
import typer
from typer.core import TyperGroup

MISTAKES = (ValueError, OSError, MemoryError, torch.OutOfMemoryError)
"""What the library and the system raise for input that is wrong, missing or too large. All else is a mistake of ours,
and keeps its traceback."""


class Commands(TyperGroup):
    """The group of all commands. Exit status: 1 after a mistake, 2 after words it does not know, 130 after Ctrl-C."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # the reader went away, as `head` does: not for users
        except KeyboardInterrupt as stop:
            if os.environ.get("RANK", "0") == "0":  # of the processes that torchrun started, the first
                typer.echo(str(stop) or "stopped; what was written is whole, and the same command goes on", err=True)
            raise typer.Exit(130) from None
        except MISTAKES as error:
            said = str(error) or type(error).__name__
            typer.secho("\n".join([f"error: {said}", *getattr(error, "__notes__", [])]), err=True, fg="red")
            raise typer.Exit(1) from None
