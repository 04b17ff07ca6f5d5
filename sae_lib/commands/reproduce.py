"""``reproduce``: a chapter's experiments, at any scale, on the book's model or another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def reproduce(
    chapter: Annotated[str, typer.Argument(help="Of book/experiments.yml: a chapter, chapter/experiment, or all.")],
    scale: Annotated[str, typer.Option(help="smoke, pocket or paper.")],
    seeds: Annotated[int | None, typer.Option(min=1, help="The first so many; by default, as described.")] = None,
    jobs: Annotated[str, typer.Option(metavar="I/N", help="Only the I-th of N parts, for N machines.")] = "1/1",
    out: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder of the results; what is not the book's needs one.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Another model: a folder, or a name on the Hub.")] = None,
    site: Annotated[str | None, typer.Option(help="Another site in the model.")] = None,
    texts: Annotated[str | None, typer.Option(help="Other texts: a .txt or .jsonl file, or a data set.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many texts.")] = None,
    held_texts: Annotated[int | None, typer.Option(min=1, help="The first so many only measure; 1,000.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Of a training.")] = None,
    d_sae: Annotated[int | None, typer.Option(min=1, help="Latents; of the grid's first point alone.")] = None,
    target: Annotated[int | None, typer.Option(min=1, help="L0 that is asked for, likewise.")] = None,
) -> None:
    """Run a chapter's experiments into book/results; what is there is not run again, what was stopped goes on.

    Several processes may run the same command: each leaves alone what another is at. At scale paper, and for a model of
    your own, it first says in one screen what the run takes, and refuses what cannot work here.

    python -m sae_lib reproduce comparison --scale pocket

    python -m sae_lib reproduce gemma --scale paper

    python -m sae_lib reproduce gemma/short --scale paper --model gpt2 --site blocks.6.hook_resid_post --out runs/gpt2
    """
    from sae_lib import preflight
    from sae_lib.experiments import described
    from sae_lib.reproduce import reproduce, unfinished
    from sae_lib.results import file_of

    asked = {"model": model, "site": site, "texts": texts, "limit": limit, "held_texts": held_texts}
    asked |= {"tokens": tokens, "d_sae": d_sae, "target": target}
    changes = {name: value for name, value in asked.items() if value is not None}
    part, slash, parts = jobs.partition("/")
    if not (slash and part.isdigit() and parts.isdigit()):
        raise ValueError(f"jobs must be I/N, such as 1/2, got {jobs!r}")
    failed = False
    for one in [name for name in described() if name != "grounds"] if chapter == "all" else [chapter]:
        what = {"seeds": seeds, "job": (int(part), int(parts)), "folder": out, "changes": changes}
        path = file_of(one.partition("/")[0], scale, out)
        if scale == "paper" or changes:
            checks = preflight.preflight(unfinished(one, scale, **what), path)
            typer.echo(preflight.table(checks))
            if any(check.remedy for check in checks):
                raise ValueError(f"{one} at scale {scale} cannot work here, see above; nothing was written")
        added, missed = reproduce(one, scale, **what)
        typer.echo(f"{path}  {added} rows added")
        for line in missed:
            typer.secho(f"no row: {line}", err=True, fg="red")
        failed = failed or bool(missed)
    if failed:
        raise typer.Exit(1)
