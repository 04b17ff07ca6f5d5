"""The command line: ``python -m sae_lib <command>``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

try:
    import typer
except ImportError:
    raise SystemExit('the command line needs the extra "lm": pip install "sae-put-to-the-test[lm]"') from None

ASSETS = Path(__file__).parent / "assets"

app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.callback()
def main() -> None:
    """Sparse Autoencoders, Put to the Test."""


@app.command()
def pocket(
    out: Annotated[Path, typer.Option(help="Folder for the texts and the model.")] = ASSETS,
    tokens: Annotated[int, typer.Option(min=1, help="Training tokens.")] = 30_000_000,
    seed: Annotated[int, typer.Option(help="Seed of texts, weights and data.")] = 0,
) -> None:
    """Make the embedded texts and language model; goes on where an earlier run stopped."""
    from sae_lib.pocket.build import build, restart_with_fast_memory

    restart_with_fast_memory()
    build(out, tokens, seed)


if __name__ == "__main__":
    app()
