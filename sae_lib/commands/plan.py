"""``plan``: what a training will take."""

from __future__ import annotations

from typing import Annotated

import typer


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
    """Print what training will take, FLOPs, memory, disk and hours, from the model's configuration alone.

    python -m sae_lib plan --model gemma-2-2b --d-sae 65536 --gpu h100,a100
    """
    from sae_lib.plan import plan

    sizes = {"site": site, "tokens": tokens, "saes": saes, "batch_size": batch_size, "context": context}
    made = plan(model, d_sae, k, processes=processes, model_dtype=model_dtype, cache_dtype=cache_dtype, **sizes)
    typer.echo(made.table(gpu.split(","), utilisation))
