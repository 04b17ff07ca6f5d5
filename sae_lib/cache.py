"""Activations written to disk once, so that many runs can read them.

Rows are written in the order of reading, a shard of 256 MiB after the other. What was cut off goes on after the last
whole shard, and the bytes are those of a cache that was never cut off.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Iterator
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sae_lib.cached import CachedActivations
from sae_lib.data import Batch
from sae_lib.distributed import processes
from sae_lib.models import LanguageModel
from sae_lib.shards import (
    DTYPES,
    FORMAT,
    HEADER_BYTES,
    MANIFEST,
    Manifest,
    dtype_of,
    fault,
    progress,
    read_manifest,
    row_shape,
    rows_that_fill_pages,
    write_manifest,
    write_shard,
)

SHARD_BYTES = 2**28
GRADIENT_PEAK = 2**10
"""In float16, the largest gradient of the first forward pass is stored between half of this and this."""


def cache(
    stream: Any, folder: str | Path, dtype: torch.dtype = torch.float32, tokens: int | None = None
) -> CachedActivations:
    """Write a stream's activations to `folder`, or open them if they are there. Chapter `speed`.

    A model's activations are written in the order of reading, any other stream's batches as they come; ``x`` and, where
    the stream has it, ``grad`` are kept. A folder that holds this stream is opened; one that was cut off, or has lost
    shards, is first written on from where the first one is missing.

    Args:
        stream: `Activations`, or anything with a ``fingerprint`` that yields `Batch` or tensors (batch, d_in).
        folder: new, empty, or a cache of the same stream.
        dtype: float32, bfloat16 or float16, in which the rows are stored. In float16, gradients are stored times one
            power of two, so that small ones survive.
        tokens: rows to write, at least 1; by default all that the model's stream has, which is also the most.

    Raises:
        ValueError: for a dtype or number out of range, a stream without fingerprint or end, a folder of something else
            or of another stream, too little free space, a disk that cannot be written, and values that are not
            finite or that float16 cannot hold.
    """
    folder = Path(folder)
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be torch.float32, torch.bfloat16 or torch.float16, got {dtype}")
    if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1):
        raise ValueError(f"tokens must be an integer of at least 1, got {tokens!r}")
    if tokens is None and not hasattr(stream, "sequences"):
        raise ValueError(f"tokens must be given for a {type(stream).__name__}, whose end is not known, got None")
    asked = {"dtype": str(dtype).removeprefix("torch."), "tokens": tokens, "source": source_of(stream)}
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        check_same(folder, asked, manifest)
        whole = list(takewhile(lambda shard: fault(folder, manifest, shard) is None, manifest["shards"]))
        if len(whole) < len(manifest["shards"]) or not manifest["complete"]:
            check_same(folder, {"order": order_of(stream)}, manifest)
            write(stream, folder, manifest | {"shards": whole, "complete": False})
    elif folder.exists() and (not folder.is_dir() or any(not path.name.startswith(".") for path in folder.iterdir())):
        raise ValueError(f"folder must be new, empty or a cache, got {folder}, which is something else; choose another")
    else:
        write(stream, folder, FORMAT | asked | beginning(stream, dtype))
    return CachedActivations(folder, stream.batch_size, stream.seed, getattr(stream, "device", "cpu"))


# Writing --------------------------------------------------------------------------------------------------------------


def write(stream: Any, folder: Path, manifest: Manifest) -> None:
    """Write the shards that the manifest does not name yet."""
    if processes() > 1:
        raise ValueError(f"a cache must be written by one process, got {processes()}; write it first, then all read it")
    done, limit = sum(shard["rows"] for shard in manifest["shards"]), manifest["tokens"] or math.inf
    shape, dtype = row_shape(manifest), dtype_of(manifest)
    expected = manifest["tokens"] or count(stream)
    check_space(folder, max(expected - done, 0), math.prod(shape) * dtype.itemsize)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".*.part"):
        leftover.unlink()
    write_manifest(folder, manifest)
    buffer, filled = torch.empty(manifest["shard_rows"], *shape, dtype=dtype), 0
    first, start = manifest["shards"][-1]["next"] if manifest["shards"] else (0, 0)
    with progress(expected, "token", "cache", done) as bar:
        for number, (x, grad) in enumerate(pieces(stream, first), start=first):
            rows = stored(x, grad, manifest, number)
            end = min(len(rows), start + limit - done)
            while start < end:
                some = min(len(buffer) - filled, end - start)
                buffer[filled : filled + some] = rows[start : start + some]
                start, filled, done = start + some, filled + some, done + some
                bar.update(some)
                if filled == len(buffer) or done == limit:
                    write_shard(folder, manifest, buffer[:filled], [number, start])
                    filled = 0
            if done == limit:
                break
            start = 0
    if filled:
        write_shard(folder, manifest, buffer[:filled], [number + 1, 0])
    if not done:
        raise ValueError(f"the stream must yield at least one row, got none in {number + 1} batches; give it more text")
    write_manifest(folder, manifest | {"complete": True})


def beginning(stream: Any, dtype: torch.dtype) -> Manifest:
    """What a manifest says of rows and shards before there are any, from a look at the stream's first batch."""
    first = next(pieces(stream, 0), None)
    if first is None:
        raise ValueError("the stream must yield at least one batch, got none; is it an iterator that was used up?")
    x, grad = first
    peak = float(grad.abs().max()) if grad is not None and len(grad) else 0.0
    scaled = dtype == torch.float16 and 0 < peak < math.inf
    return {
        "d_in": x.shape[1],
        "grad": grad is not None,
        "grad_scale": 2.0 ** math.floor(math.log2(GRADIENT_PEAK / peak)) if scaled else 1.0,
        "shard_rows": rows_that_fill_pages(x.shape[1] * dtype.itemsize * (1 if grad is None else 2), SHARD_BYTES),
        "order": order_of(stream),
        "complete": False,
        "shards": [],
    }


def pieces(stream: Any, skip: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Activations and gradients, a forward pass or batch at a time, without the first `skip` of these."""
    if hasattr(stream, "sequences"):
        yield from map(stream.read, islice(stream.sequences(), skip, None))
        return
    for item in islice(stream, skip, None):
        batch = item if isinstance(item, Batch) else Batch(item)
        if not isinstance(batch.x, Tensor) or batch.x.ndim != 2 or not batch.x.is_floating_point():
            raise ValueError(f"a stream must yield Batch or floating tensors (batch, d_in), got {type(item).__name__}")
        yield batch.x, batch.grad


def stored(x: Tensor, grad: Tensor | None, manifest: Manifest, number: int) -> Tensor:
    """Rows as they are stored; refuses those of another shape, and values that are not finite or would not be."""
    dtype = dtype_of(manifest)
    if x.shape[1] != manifest["d_in"] or (grad is not None) != manifest["grad"]:
        raise ValueError(
            f"all batches must have d_in={manifest['d_in']} and a gradient if the first one has, got "
            f"{tuple(x.shape)} {'without' if grad is None else 'with'} gradient in batch {number}"
        )
    rows = x if grad is None else torch.stack([x.float(), grad.float() * manifest["grad_scale"]], dim=1)
    result = rows.to(dtype)
    if not result.isfinite().all():
        finite = rows.isfinite()
        if not finite.all():
            share = 1 - finite.float().mean().item()
            raise ValueError(
                f"activations must be finite, got {share:.2%} NaN or infinite entries in batch {number} of the stream: "
                "open the model in another dtype, or drop those inputs"
            )
        raise ValueError(
            f"{dtype} must hold every value, up to {torch.finfo(dtype).max:g}, got {float(rows.abs().max()):g} in "
            f"batch {number} of the stream: take dtype=torch.bfloat16 or torch.float32, and another folder"
        )
    return result.cpu()


def count(stream: Any) -> int:
    """Rows that a model's stream has, or a few more: of texts by their tokens, of inputs by the first one."""
    if not isinstance(stream.model, LanguageModel):
        first = next(stream.sequences())
        return math.ceil(len(stream.read(first)[0]) / len(first) * sum(map(len, stream.sequences())))
    total = 0
    with progress(None, "token", "count") as bar:
        for sequence in stream.sequences():
            total += int(stream.model.content(sequence).sum())
            bar.update(total - bar.n)
    return total


def check_space(folder: Path, rows: int, row_bytes: int) -> None:
    """Refuse to begin what the disk cannot hold."""
    needed = rows * row_bytes + (rows * row_bytes // SHARD_BYTES + 1) * HEADER_BYTES
    place = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ValueError(
            f"{folder} must have room for {needed / 1e9:.3g} GB ({rows:,} tokens of {row_bytes:,} bytes), got "
            f"{free / 1e9:.3g} GB free; free some, store fewer tokens=, or dtype=torch.bfloat16, half of float32"
        )


# Knowing a stream again -----------------------------------------------------------------------------------------------


def source_of(stream: Any) -> dict[str, Any]:
    """What is read, and through which model: streams that agree in it have the same rows."""
    if not hasattr(stream, "fingerprint"):
        raise ValueError(
            f"stream must have a fingerprint, by which the cache is known again, got a {type(stream).__name__}; cache "
            "Activations or planted batches"
        )
    source = {"stream": type(stream).__name__, "fingerprint": stream.fingerprint}
    if not hasattr(stream, "sequences"):
        return source
    language = isinstance(stream.model, LanguageModel)
    return source | {
        "model": stream.model.name if language else type(stream.model).__name__,
        "weights": hash_of_weights(stream.model.bridge.original_model if language else stream.model),
        "site": stream.site,
        "grad": stream.grad,
        "context": stream.context if language else None,
        "items": len(stream.source) if hasattr(stream.source, "__len__") else None,
    }


def order_of(stream: Any) -> dict[str, Any]:
    """What decides the order of writing: what was cut off goes on in the same one only."""
    return {"seed": stream.seed, "at_once": getattr(stream, "forward_tokens", stream.batch_size)}


def hash_of_weights(module: nn.Module) -> str:
    """A hash over 64 values or more of each parameter and buffer: other training or precision gives another."""
    digest = hashlib.sha256()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        values = tensor.detach().flatten()[:: max(1, tensor.numel() // 64)].cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_same(folder: Path, asked: dict[str, Any], found: dict[str, Any]) -> None:
    """Refuse a cache of something else, and say in what it differs."""
    for key, value in asked.items():
        if isinstance(value, dict):
            check_same(folder, value, found[key])
        elif found.get(key) != value:
            raise ValueError(
                f"{folder} must be a cache of this stream, but was written with {key}={found.get(key)!r}, got "
                f"{value!r}; pass the same, or choose another folder"
            )
