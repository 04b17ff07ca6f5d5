"""``train``: SAEs described in words, trained on one stream."""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from sae_lib.activations import Activations
from sae_lib.commands.options import MODEL, SITE, Device, Limit, Model, Site, Texts
from sae_lib.data import load_texts
from sae_lib.distributed import launched, rank
from sae_lib.loggers import LOGGERS
from sae_lib.models import load_model
from sae_lib.pocket.provenance import write_bytes
from sae_lib.sae import SAE
from sae_lib.saes import VARIANTS
from sae_lib.train import train as train_saes


@launched()
def train(
    out: Annotated[Path, typer.Option(help="Folder for the SAEs, their history and the checkpoints.")],
    variant: Annotated[str | None, typer.Option(help="Of one SAE; its options are listed below.")] = None,
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="--NAME VALUE", help="Options of the variant, such as --k 16.")
    ] = None,
    sae: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help='One of several SAEs: "topk d_sae=1024 k=16".')
    ] = None,
    model: Model = MODEL,
    site: Site = SITE,
    texts: Texts = "pocket",
    split: Annotated[str, typer.Option(help="Of pocket or a data set.")] = "train",
    limit: Limit = None,
    tokens: Annotated[int, typer.Option(help="Tokens to train on.")] = 1_000_000,
    batch_size: Annotated[int, typer.Option(help="Tokens in a step.")] = 2048,
    seed: Annotated[int, typer.Option(help="Of the order of the data, and of SAEs that name none.")] = 0,
    checkpoint_every: Annotated[int | None, typer.Option(help="Tokens; a tenth of the run, if not given.")] = None,
    log: Annotated[str | None, typer.Option(help=f"{', '.join(LOGGERS)}: the history there too, as it grows.")] = None,
    device: Device = None,
) -> None:
    """Train SAEs, several of them on the same batches; the same command goes on where an earlier one was stopped.

    python -m sae_lib train --variant topk --d-sae 1024 --k 16 --log csv --out runs/topk

    python -m sae_lib train --sae "topk d_sae=1024 k=16" --sae "relu d_sae=1024 l1_coeff=0.05" --out runs/both

    torchrun --nproc-per-node 2 -m sae_lib train --variant topk --d-sae 1024 --k 16 --out runs/topk
    """
    given = [*(sae or []), *([shlex.join([variant, *options(settings or [])])] if variant else [])]
    if not given or (settings and not variant):
        raise ValueError(f"give --variant with its options, or --sae, got {' '.join(settings or ['neither'])}")
    wanted = [described(text) for text in given]
    if log not in (None, *LOGGERS):
        raise ValueError(f"log must be one of {', '.join(LOGGERS)}, got {log!r}")
    watch = LOGGERS[log](out) if log else None
    stream = Activations(
        load_model(model, device),
        site,
        texts=load_texts(texts, split, limit=limit),
        batch_size=batch_size,
        grad=any("grad" in made.needs for made, _ in wanted),
    )
    saes = [made(d_in=stream.d_in, **{"seed": seed} | arguments) for made, arguments in wanted]
    run = train_saes(saes, stream, tokens, seed, watch, out / "checkpoint", checkpoint_every)
    if rank():
        return
    rows = "".join(json.dumps(row) + "\n" for row in run.history)
    write_bytes(out / "history.jsonl", rows.encode())
    for written in [out / "history.jsonl", *([watch.path] if watch else [])]:
        typer.echo(f"{written}  {len(run.history):,} rows")
    for place, trained in enumerate(run.saes):
        last = [row for row in run.history if row["sae"] == place][-1]
        path = trained.save(out / f"{place}-{trained.name}")
        typer.echo(f"{path}  fvu {last['fvu']:.3f}  l0 {last['l0']:.1f}  dead {last['dead']:.1%}")


def arguments_of(variant: str) -> dict[str, inspect.Parameter]:
    """What a variant's constructor takes, but for d_in, which the stream knows."""
    parameters = dict(inspect.signature(VARIANTS[variant]).parameters)
    return {name: parameter for name, parameter in parameters.items() if name != "d_in"}


def usage(variant: str) -> str:
    """The options of a variant in one line."""
    return " ".join(
        [f"{variant}:"]
        + [name if p.default is p.empty else f"{name}={p.default}" for name, p in arguments_of(variant).items()]
    )


def options(words: list[str]) -> list[str]:
    """``--aux-coeff 0.1`` or ``--aux-coeff=0.1`` as ``aux_coeff=0.1``."""
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    for name, value in zip(words[::2], [*words[1::2], "--"], strict=False):
        if not name.startswith("--") or value.startswith("--"):
            raise ValueError(f"options of a variant must be --name value, got {' '.join(words)}")
    return [f"{name[2:].replace('-', '_')}={value}" for name, value in zip(words[::2], words[1::2], strict=True)]


def described(text: str) -> tuple[type[SAE], dict[str, Any]]:
    """The class and the arguments that ``"topk d_sae=1024 k=16"`` means, checked against what the class takes."""
    try:
        variant, *pairs = shlex.split(text) or [""]
    except ValueError:
        raise ValueError(f"quotation marks must be closed, got {text}") from None
    if variant not in VARIANTS:
        near = ", ".join(difflib.get_close_matches(variant, VARIANTS)) or ", ".join(VARIANTS)
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}; nearest: {near}")
    known, arguments = arguments_of(variant), {}
    for pair in pairs:
        name, is_pair, value = pair.partition("=")
        if not is_pair or name not in known:
            raise ValueError(f"{variant} takes {', '.join(known)} as name=value, got {pair!r}")
        try:
            arguments[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            arguments[name] = value
    missing = [name for name, p in known.items() if p.default is p.empty and name not in arguments]
    if missing:
        raise ValueError(f"{variant} needs {', '.join(missing)}, got {text!r}")
    return VARIANTS[variant], arguments
