"""The command line: ``python -m sae_lib <command>``."""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import shlex
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
except ImportError:
    raise SystemExit('the command line needs the extra "lm": pip install "sae-put-to-the-test[lm]"') from None

import sae_lib
from sae_lib.distributed import launched, rank
from sae_lib.formats import FORMATS, save_as
from sae_lib.pocket.provenance import write_bytes

ASSETS = Path(__file__).parent / "assets"

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)


@app.callback()
def main() -> None:
    """Sparse Autoencoders, Put to the Test."""


def arguments_of(variant: str) -> dict[str, inspect.Parameter]:
    """What a variant's constructor takes, but for d_in, which the stream knows."""
    parameters = dict(inspect.signature(sae_lib.VARIANTS[variant]).parameters)
    return {name: parameter for name, parameter in parameters.items() if name != "d_in"}


def usage(variant: str) -> str:
    """The options of a variant in one line."""
    return " ".join(
        [f"{variant}:"]
        + [name if p.default is p.empty else f"{name}={p.default}" for name, p in arguments_of(variant).items()]
    )


@app.command(
    context_settings={"ignore_unknown_options": True},
    epilog="\n\n".join(["Variants, and their options with their defaults:", *map(usage, sae_lib.VARIANTS)]),
)
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
    model: Annotated[str, typer.Option(help="pocket, a folder, or a name on the Hugging Face Hub.")] = "pocket",
    site: Annotated[str, typer.Option(help="Where the activations are taken.")] = "blocks.1.hook_resid_post",
    texts: Annotated[str, typer.Option(help="pocket, a .txt or .jsonl file, or a data set of the Hub.")] = "pocket",
    split: Annotated[str, typer.Option(help="Of pocket or a data set.")] = "train",
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many texts; the Hub needs it.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to train on.")] = 1_000_000,
    batch_size: Annotated[int, typer.Option(help="Tokens in a step.")] = 2048,
    seed: Annotated[int, typer.Option(help="Of the order of the data, and of SAEs that name none.")] = 0,
    checkpoint_every: Annotated[int | None, typer.Option(help="Tokens; a tenth of the run, if not given.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ...; the first GPU, if there is one.")] = None,
) -> None:
    """Train SAEs, several of them on the same batches; the same command goes on where an earlier one was stopped.

    python -m sae_lib train --variant topk --d-sae 1024 --k 16 --out runs/topk

    python -m sae_lib train --sae "topk d_sae=1024 k=16" --sae "relu d_sae=1024 l1_coeff=0.05" --out runs/both

    torchrun --nproc-per-node 2 -m sae_lib train --variant topk --d-sae 1024 --k 16 --out runs/topk
    """
    try:
        given = [*(sae or []), *([shlex.join([variant, *options(settings or [])])] if variant else [])]
        if not given or (settings and not variant):
            raise ValueError(f"give --variant with its options, or --sae, got {' '.join(settings or ['neither'])}")
        wanted = [described(text) for text in given]
        stream = sae_lib.Activations(
            sae_lib.load_model(model, device),
            site,
            texts=sae_lib.load_texts(texts, split, limit=limit),
            batch_size=batch_size,
            grad=any("grad" in made.needs for made, _ in wanted),
        )
        saes = [made(d_in=stream.d_in, **{"seed": seed} | arguments) for made, arguments in wanted]
        run = sae_lib.train(
            saes, stream, tokens, seed, checkpoint=out / "checkpoint", checkpoint_every=checkpoint_every
        )
        if rank():
            return
        rows = "".join(json.dumps(row) + "\n" for row in run.history)
        write_bytes(out / "history.jsonl", rows.encode())
        for place, trained in enumerate(run.saes):
            last = [row for row in run.history if row["sae"] == place][-1]
            path = trained.save(out / f"{place}-{trained.name}")
            typer.echo(f"{path}  fvu {last['fvu']:.3f}  l0 {last['l0']:.1f}  dead {last['dead']:.1%}")
    except KeyboardInterrupt as stop:
        if not rank():
            typer.echo(stop, err=True)
        raise typer.Exit(130) from None
    except (ValueError, OSError) as error:
        typer.secho("\n".join([f"error: {error}", *getattr(error, "__notes__", [])]), err=True, fg="red")
        raise typer.Exit(1) from None


def options(words: list[str]) -> list[str]:
    """``--aux-coeff 0.1`` or ``--aux-coeff=0.1`` as ``aux_coeff=0.1``."""
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    for name, value in zip(words[::2], [*words[1::2], "--"], strict=False):
        if not name.startswith("--") or value.startswith("--"):
            raise ValueError(f"options of a variant must be --name value, got {' '.join(words)}")
    return [f"{name[2:].replace('-', '_')}={value}" for name, value in zip(words[::2], words[1::2], strict=True)]


def described(text: str) -> tuple[type[sae_lib.SAE], dict[str, Any]]:
    """The class and the arguments that ``"topk d_sae=1024 k=16"`` means, checked against what the class takes."""
    variant, *pairs = shlex.split(text) or [""]
    if variant not in sae_lib.VARIANTS:
        near = ", ".join(difflib.get_close_matches(variant, sae_lib.VARIANTS)) or ", ".join(sae_lib.VARIANTS)
        raise ValueError(f"variant must be one of {', '.join(sae_lib.VARIANTS)}, got {variant!r}; nearest: {near}")
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
    return sae_lib.VARIANTS[variant], arguments


@app.command()
def evaluate(
    saes: Annotated[list[Path], typer.Argument(help="Folders of saved SAEs.")],
    model: Annotated[str, typer.Option(help="pocket, a folder, or a name on the Hugging Face Hub.")] = "pocket",
    site: Annotated[str, typer.Option(help="Where the activations are taken.")] = "blocks.1.hook_resid_post",
    texts: Annotated[str, typer.Option(help="pocket, a .txt or .jsonl file, or a data set of the Hub.")] = "pocket",
    split: Annotated[str, typer.Option(help="Of pocket or a data set; not the one that was trained on.")] = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many texts; the Hub needs it.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Held-out tokens.")] = 100_000,
    against: Annotated[str | None, typer.Option(help="book: draw them on the curves of its comparison.")] = None,
    out: Annotated[Path, typer.Option(help="The picture, with --against.")] = Path("against.png"),
    device: Annotated[str | None, typer.Option(help="cpu, cuda ...; the first GPU, if there is one.")] = None,
) -> None:
    """Measure saved SAEs on held-out texts; with --against book, beside the book's at the same L0.

    python -m sae_lib evaluate runs/topk/0-topk --against book --out mine.png
    """
    try:
        if against not in (None, "book"):
            raise ValueError(f"against must be book, got {against!r}")
        opened = {path.name: sae_lib.load(path) for path in saes}
        if len(opened) < len(saes):
            raise ValueError(f"folders must have different names, got {', '.join(map(str, saes))}")
        held = sae_lib.Activations(
            sae_lib.load_model(model, device), site, texts=sae_lib.load_texts(texts, split, limit=limit)
        )
        reports = sae_lib.evaluate(list(opened.values()), held, tokens)
        reports = dict(zip(opened, reports, strict=True))
        for name, report in reports.items():
            typer.echo(name + "".join(f"\n  {metric} {value:.6g}" for metric, value in report.items()))
        if against:
            import matplotlib

            from sae_lib.against import MEASURES, beside, book_rows, draw

            matplotlib.use("agg")
            rows = book_rows(model, site)
            for name, report in reports.items():
                for measure in MEASURES:
                    typer.echo(f"{name}, {measure} at its L0 of {report['l0']:.1f}: {report[measure]:.4f}")
                    for label, found in beside(report, rows, measure).items():
                        there = "not measured at this L0" if found is None else "{:.4f} ± {:.4f}".format(*found)
                        typer.echo(f"  {label} {there}")
            draw(reports, rows).savefig(out)
            typer.echo(f"{out}  drawn on the curves of {len({row['seed'] for row in rows})} seeds")
    except (ValueError, OSError) as error:
        typer.secho(f"error: {error}", err=True, fg="red")
        raise typer.Exit(1) from None


@app.command()
def reproduce(
    chapter: Annotated[str, typer.Argument(help="Of book/experiments.yml: a chapter, chapter/experiment, or all.")],
    scale: Annotated[str, typer.Option(help="smoke, pocket or paper.")],
    seeds: Annotated[int | None, typer.Option(min=1, help="The first so many; by default, as described.")] = None,
    jobs: Annotated[str, typer.Option(metavar="I/N", help="Only the I-th of N parts, for N machines.")] = "1/1",
    out: Annotated[Path | None, typer.Option(help="Folder of the results; what is not the book's needs one.")] = None,
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
    try:
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
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on from here", err=True)
        raise typer.Exit(130) from None
    except (ValueError, OSError) as error:
        typer.secho("\n".join([f"error: {error}", *getattr(error, "__notes__", [])]), err=True, fg="red")
        raise typer.Exit(1) from None


@app.command()
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
    try:
        sae = sae_lib.load(source)
        path = save_as(sae, out, to, model, site)
        typer.echo(f"{path}  {sae.name} with {sae.d_sae:,} latents, as {to}: {', '.join(FORMATS[to].FILES)}")
    except (ValueError, OSError) as error:
        typer.secho(f"error: {error}", err=True, fg="red")
        raise typer.Exit(1) from None


@app.command()
def explore(
    out: Annotated[Path, typer.Option("--out", "-o", help="The page, one HTML file.")] = Path("explorer.html"),
    model: Annotated[str, typer.Option(help="pocket, a folder, or a name on the Hugging Face Hub.")] = "pocket",
    layer: Annotated[int | None, typer.Option(help="Whose neurons; without --sae, the middle one.")] = None,
    sae: Annotated[
        list[Path] | None, typer.Option(help="Folder of a saved SAE; another one, or --layer, beside it.")
    ] = None,
    site: Annotated[str, typer.Option(help="Where the SAE reads.")] = "blocks.1.hook_resid_post",
    texts: Annotated[str, typer.Option(help="pocket, a .txt or .jsonl file, or a data set of the Hub.")] = "pocket",
    split: Annotated[str, typer.Option(help="Of pocket or a data set.")] = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many texts; the Hub needs it.")] = None,
    examples: Annotated[
        int | None, typer.Option(min=1, help="Most of a unit; by default 100, fewer of many units.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ...; the first GPU, if there is one.")] = None,
) -> None:
    """Make a page that shows what neurons or latents stand for; it opens from disk, without a network.

    python -m sae_lib explore --model pocket -o explorer.html

    python -m sae_lib explore --sae runs/topk/0-topk --layer 1 -o both.html
    """
    from dataclasses import replace

    from sae_lib.explorer import render, write
    from sae_lib.explorer.page import free, sizes
    from sae_lib.neuron_embeddings import latents, neurons

    try:
        free(out)
        opened = sae_lib.load_model(model, device)
        sets = [latents(opened, site, sae_lib.load(path, str(opened.device))) for path in sae or []]
        sets = [replace(units, name=f"{path.name}: {units.name}") for path, units in zip(sae or [], sets, strict=True)]
        if layer is not None or not sets:
            sets = [neurons(opened, (opened.n_layers - 1) // 2 if layer is None else layer), *sets]
        records = sae_lib.load_texts(texts, split, limit=limit)
        source = f"texts of pocket, {split}" if texts == "pocket" else f"texts of {Path(texts).name}"
        html = render(sets, records, source=source, most=examples)
        bytes_of = {name: f"{size / 1e6:.2f} MB" for name, size in sizes(html).items()}
        typer.echo(f"{write(html, out)}  {' and '.join(f'{len(units):,} of {units.name}' for units in sets)}")
        typer.echo(
            "  {all}: index {index}, texts {documents}, units {units}, the page itself {page}".format(**bytes_of)
        )
    except KeyboardInterrupt:
        typer.echo("stopped; nothing was written", err=True)
        raise typer.Exit(130) from None
    except (ValueError, OSError) as error:
        typer.secho(f"error: {error}", err=True, fg="red")
        raise typer.Exit(1) from None


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


@app.command()
def vision(
    out: Annotated[Path, typer.Option(help="Folder for the autoencoders.")] = ASSETS / "vision",
    steps: Annotated[int, typer.Option(min=1, help="Of each training, with 128 images each.")] = 1500,
    images: Annotated[int, typer.Option(min=10, help="Shapes to train on; a tenth as many are held out.")] = 20_000,
    seed: Annotated[int, typer.Option(help="Seed of shapes, weights and data.")] = 0,
) -> None:
    """Make the shipped autoencoders of shapes; those that are in the folder are left as they are."""
    from sae_lib.autoencoders import make_autoencoders

    for name, made in make_autoencoders(out, seed, steps, images).items():
        typer.echo("{}  {cpu_seconds} s  explained variance {explained_variance}  R2 {map_r2}".format(name, **made))


@app.command()
def plan(
    model: Annotated[
        str, typer.Option(help="pocket, a known name such as gemma-2-2b, or a folder with a config.json.")
    ],
    d_sae: Annotated[int, typer.Option(help="Latents of each SAE.")],
    k: Annotated[int, typer.Option(help="Living latents a token.")] = 64,
    site: Annotated[str | None, typer.Option(help="blocks.<layer>.<name>; by default in the middle.")] = None,
    tokens: Annotated[int, typer.Option(help="Training tokens.")] = 500_000_000,
    saes: Annotated[int, typer.Option(help="SAEs that train on the same stream.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Tokens in a step, over all processes.")] = 4096,
    context: Annotated[int | None, typer.Option(help="Tokens in a window.")] = None,
    processes: Annotated[int, typer.Option(help="Processes, one on a GPU.")] = 1,
    model_dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    cache_dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    gpu: Annotated[
        str, typer.Option(help="One or more of h200, h100, a100, l40s, l4, rtx-4090, with commas.")
    ] = "h100",
    utilisation: Annotated[float, typer.Option(help="Share of the peaks that is reached: an assumption.")] = 0.4,
) -> None:
    """Print what training will take, FLOPs, memory, disk and hours, from the model's configuration alone."""
    from sae_lib.plan import plan

    sizes = {"site": site, "tokens": tokens, "saes": saes, "batch_size": batch_size, "context": context}
    try:
        made = plan(model, d_sae, k, processes=processes, model_dtype=model_dtype, cache_dtype=cache_dtype, **sizes)
        typer.echo(made.table(gpu.split(","), utilisation))
    except ValueError as error:
        typer.secho(f"error: {error}", err=True, fg="red")
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app()
