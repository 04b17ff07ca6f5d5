"""What the benchmark's workers share: a meter that hands out batches, and the lines they speak.

A worker is one process with one sparse autoencoder, which its library trains as its users have it do, on batches that
come from a `Meter`. A step lasts from the moment at which a batch is asked for to the moment at which the next one is.
The file of a library has a function `build` (see `Build`) and the name of its `DISTRIBUTION`.

    standard input      step 3              make three steps, and say what each cost
                        peak 2              make two, and say how much memory they needed at most
                        report              say how many latents live on a token, and what weights take
                        (end of input)      stop
    standard output     a line of JSON when ready, and one for each line read

Everything a library prints goes to standard error. This file needs torch and numpy alone, because each library has an
environment of its own.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

LEARNING_RATE = 1e-6
"""So low that steps change nothing but rounding: what is measured is then the same in the first step and the last."""


@dataclass(frozen=True)
class Work:
    """What a worker is to train.

    Attributes:
        variant: as the library's file names it.
        d_in: width of the activations.
        d_sae: number of latents.
        k: living latents a token.
        batch: tokens a step.
    """

    variant: str
    d_in: int
    d_sae: int
    k: int
    batch: int


Train = Callable[[Iterable[Tensor]], None]
Encode = Callable[[Tensor], Tensor]
Build = Callable[[Work, Tensor], tuple[Train, Encode]]
"""From the work and a batch that decides thresholds: what trains on batches, and what encodes one."""


class Meter:
    """Batches on command, and what each step costs.

    Args:
        batches: without end.
        encode: from a batch to its code.
        channel: where answers go.
        base: bytes that the process held before it had a sparse autoencoder.
    """

    def __init__(self, batches: Iterator[Tensor], encode: Encode, channel: IO[str], base: int):
        self.batches, self.encode, self.channel, self.base = batches, encode, channel, base

    def __iter__(self) -> Iterator[Tensor]:
        batch = None
        for line in sys.stdin:
            command, *count = line.split()
            if command == "report":
                with torch.no_grad():
                    self.say(l0=(self.encode(batch) != 0).sum(1).float().mean().item(), weights=weights())
                continue
            cpu, wall, peak = [], [], 0
            for _ in range(int(count[0])):
                if command == "peak":
                    forget()
                cpu_before, wall_before = time.process_time(), time.perf_counter()
                batch = next(self.batches)
                yield batch
                cpu.append(time.process_time() - cpu_before)
                wall.append(time.perf_counter() - wall_before)
                peak = max(peak, memory("VmHWM"))
            self.say(**({"peak": peak - self.base} if command == "peak" else {"cpu": cpu, "wall": wall}))
        raise SystemExit

    def say(self, **answer: object) -> None:
        print(json.dumps(answer), file=self.channel, flush=True)


def main(library: str, work: str, activations: str) -> None:
    """Be a worker: ``python -m peers.worker <file of the library> '<work as JSON>' <file of activations>``."""
    channel = os.fdopen(os.dup(1), "w")  # what the library prints must not come between our lines
    os.dup2(2, 1)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    module = import_module(f"peers.{library}")
    build: Build = module.build
    work = Work(**json.loads(work))
    batches = torch.from_numpy(np.load(activations)).split(work.batch)
    rehearse(build, work, batches[0])
    forget()
    base = memory("VmRSS")
    train, encode = build(work, batches[0])
    meter = Meter(cycle(batches), encode, channel, base)
    meter.say(version=version(module.DISTRIBUTION), torch=torch.__version__, threads=torch.get_num_threads())
    train(meter)


def rehearse(build: Build, work: Work, x: Tensor) -> None:
    """Two steps of a tiny version, so that what a library loads and reserves once is not counted as a step's memory."""
    small = replace(work, d_in=16, d_sae=256, k=4, batch=64)
    x = x[:64, :16].clone()
    train, encode = build(small, x)
    train([x, x])
    encode(x)
    gc.collect()


def cycle(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """The batches over and over."""
    while True:
        yield from batches


def kth_largest(scores: Tensor, k: int) -> float:
    """The threshold above which k scores a row live, on average."""
    flat = scores.detach().flatten()
    return float(flat.kthvalue(len(flat) - k * len(scores)).values)


def weights() -> int:
    """Bytes of all weights, their gradients, and what optimisers keep of them."""
    found = 0
    for thing in gc.get_objects():
        if type(thing) is torch.nn.Parameter:
            found += 2 * thing.nbytes
        elif issubclass(type(thing), torch.optim.Optimizer):
            states = [value for state in thing.state.values() for value in state.values()]
            found += sum(value.nbytes for value in states if isinstance(value, Tensor))
    return found


def memory(field: str) -> int:
    """Bytes that the process holds now (VmRSS), or held at most since the last `forget` (VmHWM)."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1])


def forget() -> None:
    """Give back to the system what was freed, and let the peak of memory begin anew; of Linux."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    from peers.worker import main as run  # under the name by which the library's file knows this module

    run(*sys.argv[1:])
