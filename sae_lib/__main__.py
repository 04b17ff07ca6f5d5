"""The command line: ``python -m sae_lib <command>``. A file of `sae_lib.commands` is one command."""

from __future__ import annotations

try:
    import typer
except ImportError:
    raise SystemExit('the command line needs the extra "lm": pip install "sae-put-to-the-test[lm]"') from None

from sae_lib.commands.convert import convert
from sae_lib.commands.ending import Commands
from sae_lib.commands.evaluate import evaluate
from sae_lib.commands.explore import explore
from sae_lib.commands.plan import plan
from sae_lib.commands.pocket import pocket
from sae_lib.commands.reproduce import reproduce
from sae_lib.commands.train import train, usage
from sae_lib.commands.vision import vision
from sae_lib.saes import VARIANTS

app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)


@app.callback()
def main() -> None:
    """Sparse Autoencoders, Put to the Test."""


app.command(
    context_settings={"ignore_unknown_options": True},
    epilog="\n\n".join(["Variants, and their options with their defaults:", *map(usage, VARIANTS)]),
)(train)
for command in (evaluate, reproduce, convert, explore, plan, pocket, vision):
    app.command()(command)

if __name__ == "__main__":
    app()
