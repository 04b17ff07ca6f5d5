"""What reading a cache of activations costs: ``python tests/peers/cache_speed.py`` prints rows of JSON.

The cache (noise, 1 GiB) is read in random order by `CachedActivations`, and from start to end in two plain ways:

- ``bytes``: ``readinto`` of the shards, a batch's bytes after the other, into as many buffers in turn as the reader of
  the cache keeps alive. In 16 bits this is less work: the bytes stay as they are, and batches are float32.
- ``batches``: the shards opened by safetensors, cut into batches, each copied to a new float32 tensor.

All take turns, round after round, in one process whose pages are warm; a share is the ratio of seconds within a round,
and its median over rounds is the result. On the embedded model's shape, reading is held against a training step too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

import sae_lib
from sae_lib.cache import cache
from sae_lib.cached import AHEAD
from sae_lib.train import adam, one_step

BATCH = 2048
SHAPES = [
    (1024, torch.float32),
    (2304, torch.float32),
    (2048, torch.bfloat16),
    (2048, torch.float16),
    (128, torch.float32),
]
POCKET = {"d_in": 128, "d_sae": 1024, "k": 16}


class Noise:
    """Batches of the same normal numbers, without end."""

    fingerprint, batch_size, seed = "noise", BATCH, 0

    def __init__(self, d_in: int):
        self.x = torch.randn(BATCH, d_in, generator=torch.Generator().manual_seed(0))

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield self.x


def seconds(work: Callable[[], None]) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def shuffled(stream: sae_lib.CachedActivations) -> None:
    for _ in stream:
        pass


def sequential_bytes(stream: sae_lib.CachedActivations) -> None:
    buffers = torch.empty(1 + AHEAD + 1, BATCH, stream.d_in, dtype=stream.dtype)
    views = cycle([memoryview(buffer.view(torch.uint8).numpy()).cast("B") for buffer in buffers])
    for path in sorted(stream.folder.glob("*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(next(views)):
                pass


def sequential_batches(stream: sae_lib.CachedActivations) -> None:
    for path in sorted(stream.folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for rows in file.get_tensor("x").split(BATCH):
                rows.to(torch.float32, copy=True)


def spread(rounds: list[float]) -> dict[str, float]:
    """Median, and the quarter points around it."""
    low, middle, high = statistics.quantiles(rounds, n=4)
    return {"median": round(middle, 3), "low": round(low, 3), "high": round(high, 3)}


def shares(d_in: int, dtype: torch.dtype, gigabytes: float, rounds: int) -> list[dict]:
    """Speed of the shuffled epoch as a share of each sequential one's, in processor's and in wall seconds."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        tokens = int(gigabytes * 2**30) // (d_in * dtype.itemsize)
        stream = cache(Noise(d_in), Path(folder) / "cache", dtype, tokens)
        ways = {"shuffled": shuffled, "bytes": sequential_bytes, "batches": sequential_batches}
        for way in ways.values():
            way(stream)
        taken = [{name: seconds(lambda way=way: way(stream)) for name, way in ways.items()} for _ in range(rounds)]
    row = {
        "work": "cache",
        "d_in": d_in,
        "dtype": str(dtype).removeprefix("torch."),
        "row_bytes": d_in * dtype.itemsize,
    }
    row |= {"batch": BATCH, "tokens": tokens, "threads": torch.get_num_threads(), "rounds": rounds}
    return [
        row
        | {"beside": name, "clock": clock}
        | {"share": spread([once[name][clock] / once["shuffled"][clock] for once in taken])}
        | {"microseconds_a_row": spread([1e6 * once["shuffled"][clock] / tokens for once in taken])}
        for name in ("bytes", "batches")
        for clock in ("cpu", "wall")
    ]


def share_of_a_step(rounds: int) -> dict:
    """Processor's seconds of reading a batch of the embedded model's shape, as a share of a training step of TopK."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        stream = cache(Noise(POCKET["d_in"]), Path(folder) / "cache", tokens=300_000)
        sae = sae_lib.TopKSAE(**POCKET)
        optimiser = adam(sae, steps=1000)
        batch = next(iter(stream))

        def step() -> None:
            for _ in range(10):
                one_step(sae, optimiser, batch, rate=1.0, progress=0.5)

        work = {"read": lambda: shuffled(stream), "step": step}
        for part in work.values():
            part()
        taken = [{name: seconds(part)["cpu"] for name, part in work.items()} for _ in range(rounds)]
    read = [once["read"] / len(stream) for once in taken]
    steps = [once["step"] / 10 for once in taken]
    return {
        "work": "cache beside a step",
        **POCKET,
        "batch": BATCH,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "milliseconds_a_read": spread([1e3 * each for each in read]),
        "milliseconds_a_step": spread([1e3 * each for each in steps]),
        "share": spread([each / step for each, step in zip(read, steps, strict=True)]),
    }


def measure(gigabytes: float = 1.0, rounds: int = 7) -> list[dict]:
    """All rows."""
    rows = [row for d_in, dtype in SHAPES for row in shares(d_in, dtype, gigabytes, rounds)]
    return [*rows, share_of_a_step(rounds)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of each cache")
    parser.add_argument("--rounds", type=int, default=7)
    print(json.dumps(measure(**vars(parser.parse_args())), indent=1))
