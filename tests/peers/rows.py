"""Rows of the benchmark's results: where they come from, what tells them apart, how they are kept, what they say."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from sae_lib import results

ROOT = results.ROOT
BATCH, K = 4096, 32
KEY = ("work", "library", "variant", "d_in", "d_sae", "k", "batch", "threads")
"""What tells rows apart: a new measurement replaces the row with the same."""

TARGETS = {(256, 4096): (2.3, 7, 1.6, 2.0), (768, 12288): (2.5, 10, 0.75, 1.35)}
"""Asked of TopK: times as fast as the fastest peer, and as SAELens; at most so many units, and without fast bf16."""


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Median, least and largest of the rounds."""
    named = {"": statistics.median(values), "_min": min(values), "_max": max(values)}
    return {name + suffix: float(f"{value:.4g}") for suffix, value in named.items()}


def ratios(values: Sequence[float], units: Sequence[float]) -> list[float]:
    return [value / unit for value, unit in zip(values, units, strict=True)]


def megabytes(count: int) -> float:
    return round(count / 1e6, 1)


def provenance() -> dict[str, object]:
    """What a row must say about where it comes from."""
    made = {"python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}
    return results.provenance("tests/peers") | made


def read(path: Path) -> list[dict]:
    return json.loads(path.read_text()) if path.exists() else []


def write(path: Path, rows: list[dict]) -> None:
    """Put rows into the file, each in the place of the one with its key; the file is whole at every moment."""
    known = {tuple(row[name] for name in KEY): row for row in [*read(path), *rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}")
    new.write_text("[\n" + ",\n".join(json.dumps(row) for row in known.values()) + "\n]\n")
    os.replace(new, path)


def targets(rows: Sequence[dict]) -> list[dict]:
    """What was asked of this library before it was fast, and what the rows say of it; a row each.

    A peer's variant counts for the work of its name; sparsify's GroupMax, which selects otherwise, counts for none.
    """

    def of(work: str, variant: str, column: str = "gemm_ratio", library: str = "sae_lib") -> float | None:
        found = [row for row in here if (row["work"], row["variant"], row["library"]) == (work, variant, library)]
        return found[0][column] if found else None

    def share(a: float | None, b: float | None) -> float | None:
        return a / b if a and b else None

    found = []

    def ask(what: str, measured: float | None, bound: str, target: float) -> None:
        if measured is not None:
            met = measured >= target if bound == "at least" else measured <= target
            shape = {name: here[0][name] for name in ("d_in", "d_sae", "k", "batch", "threads")}
            row = {"work": "target", "library": "sae_lib", "variant": what, **shape}
            verdict = "met" if met else "missed"
            found.append(row | {"measured": round(measured, 3), "bound": bound, "target": target, "verdict": verdict})

    for shape, (peer, saelens, units, exact) in TARGETS.items():
        here = [row for row in rows if (row["d_in"], row["d_sae"], row["k"], row["batch"]) == (*shape, K, BATCH)]
        for work, least in {"topk": peer, "batchtopk": 4, "jumprelu": 4}.items():
            others = [row for row in here if row["work"] == work and row["library"] != "sae_lib"]
            fastest = min((row["gemm_ratio"] for row in others if row["variant"].startswith(work)), default=None)
            ask(f"{work}: the fastest peer's time / ours", share(fastest, of(work, work)), "at least", least)
        ask(
            "topk: SAELens's time / ours",
            share(of("topk", "topk", library="SAELens"), of("topk", "topk")),
            "at least",
            saelens,
        )
        ask("topk: our time / the scores' product", of("topk", "topk"), "at most", units)
        ask("topk, no bf16: our time / the scores' product", of("topk", "topk, no bf16"), "at most", exact)
        ask("AuxK, 10% dead / none dead", share(of("dead", "topk, 10% dead"), of("dead", "topk")), "at most", 1.4)
        for work in ("topk", "batchtopk", "jumprelu"):
            memory = share(of(work, work, "peak_above_mb"), of(work, work, "scores_mb"))
            ask(f"{work}: memory of a step / the scores'", memory, "at most", 1.5)
    for row in rows:
        here = [row]
        if row["work"] == "cache" and row["row_bytes"] >= 4096 and row["variant"].endswith("batches, cpu"):
            what = f"cache, {row['variant'].split(',')[0]}: plain sequential / shuffled read"
            ask(what, row["share"], "at least", 0.8)
        elif row["work"] == "cache beside a step":
            ask("cache, pocket: a batch read / a training step", row["share"], "at most", 0.1)
    here = [row for row in rows if row["work"] == "pocket"]
    total, forward, steps = (of("pocket", part, "cpu_ms") for part in ("train", "forward", "steps"))
    if total and forward:
        ask("8 SAEs, one stream: (total - forward) / steps", share(total - forward, steps), "at most", 1.05)
    return found
