"""What a TopK step costs on a GPU, with and without the Triton kernels: rows to ``book/results/speed.gpu.json``.

    PYTHONPATH=tests python -m peers.gpu_speed

The shape is that of Gemma-2-2b's residual stream; weights and activations are random. A step is `train`'s own, with its
defaults, and is compared with the encoder's product alone, in three kinds of arithmetic. All take turns, a few steps
each, round after round; what counts is the time on the device, between two events. Run ``tests/test_kernels.py`` first:
there the kernels must agree with plain torch.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from tqdm import tqdm

import sae_lib
from peers.rows import KEY, ROOT, megabytes, provenance, ratios, spread, write
from sae_lib.data import Batch
from sae_lib.train import adam, one_step

RESULTS = ROOT / "book/results/speed.gpu.json"
D_IN, K, BATCH = 2304, 64, 4096
SIZES = (16384, 65536)
WARM_UP, ROUNDS, STEPS = 3, 20, 5
UNIT = "encoder GEMM"


def jobs(d_in: int, d_sae: int, k: int, batch: int, device: str) -> dict[str, Callable[[], object]]:
    """What takes turns, by name: one call is one step, or one product."""
    sae = sae_lib.TopKSAE(d_in, d_sae, k).to(device).train()
    optimiser = adam(sae, steps=10_000)
    x = torch.randn(batch, d_in, device=device) / d_in**0.5  # mean squared norm 1

    def step(kernels: str) -> None:
        os.environ["SAE_LIB_TRITON"] = kernels
        one_step(sae, optimiser, Batch(x), rate=1.0, progress=0.5)

    def product(dtype: torch.dtype, tf32: bool = False) -> torch.Tensor:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            return F.linear(inputs[dtype], weights[dtype])
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False

    inputs = {dtype: x.to(dtype) for dtype in (torch.float32, torch.bfloat16)}
    weights = {dtype: torch.randn(d_sae, d_in, device=device).to(dtype) for dtype in inputs}
    return {
        UNIT: partial(product, torch.float32),
        f"{UNIT}, tf32": partial(product, torch.float32, tf32=True),
        f"{UNIT}, bf16": partial(product, torch.bfloat16),
        "topk, without kernels": partial(step, "0"),
        "topk, with kernels": partial(step, "1"),
    }


def milliseconds(job: Callable[[], object]) -> float:
    """Time on the device of one call, mean over `STEPS`."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(STEPS):
        job()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / STEPS


def measure(d_sae: int) -> list[dict]:
    """The rows of one size."""
    began, work = time.perf_counter(), jobs(D_IN, d_sae, K, BATCH, "cuda")
    times, peaks = {name: [] for name in work}, dict.fromkeys(work, 0)
    for turn in tqdm(range(WARM_UP + ROUNDS), desc=f"d_sae {d_sae}", unit="round"):
        for name, job in work.items():
            torch.cuda.reset_peak_memory_stats()
            before, passed = torch.cuda.memory_allocated(), milliseconds(job)
            peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated() - before)
            if turn >= WARM_UP:
                times[name].append(passed)
    seconds = round(time.perf_counter() - began, 1)
    return [
        dict(zip(KEY, ("gpu", "sae_lib", name, D_IN, d_sae, K, BATCH, torch.get_num_threads()), strict=True))
        | {"weights": "random", "rounds": ROUNDS, "torch": torch.__version__, "cuda": torch.version.cuda}
        | spread("gpu_ms", times[name])
        | spread("gemm_ratio", ratios(times[name], times[UNIT]))
        | {"peak_above_mb": megabytes(peaks[name]), "scores_mb": megabytes(4 * BATCH * d_sae), "seconds": seconds}
        for name in work
    ]


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("no GPU was found: nothing was measured, and nothing written")
    from triton import __version__ as triton

    origin = provenance() | {"device": torch.cuda.get_device_name(), "triton": triton}
    for d_sae in SIZES:
        write(RESULTS, [row | origin for row in measure(d_sae)])
        torch.cuda.empty_cache()
    print(f"{RESULTS.relative_to(ROOT)}: {len(SIZES)} sizes")


if __name__ == "__main__":
    main()
