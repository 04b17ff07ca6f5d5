"""What a training step costs, here and in other libraries: ``make bench``, rows to ``book/results/speed.cpu.json``.

    make bench BENCHFLAGS="--libraries sae_lib sparsify --sizes 256x4096 --rounds 5"

Every (library, variant) is a process of its own, in its library's environment (`worker`), and all are alive at the same
time. They take turns, a step or two each, round after round, so that whatever else the machine does meets all alike.
What counts is the processor's seconds, of all threads; a ratio is taken within each round, and its median over rounds
is the result. All train on the same activations: sums of features of a planted dictionary, plus noise.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from peers.rows import BATCH, KEY, ROOT, K, megabytes, provenance, ratios, read, spread, targets, write

PEERS = ROOT / "_build/peers"
RESULTS = ROOT / "book/results/speed.cpu.json"
THREADS = 2
BATCHES = 4
"""Different batches, trained on in turn."""
SIZES = {(256, 4096): 7, (768, 12288): 3}
"""d_in, d_sae, and how many rounds each is measured by default."""
WARM_UP = 1
PATIENCE = 300
"""Seconds until a worker that says nothing is given up."""
SURROUNDINGS = {
    "OMP_NUM_THREADS": str(THREADS),
    "OMP_WAIT_POLICY": "PASSIVE",  # a thread that waits takes no time
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "disabled",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
ENVIRONMENTS = {
    "sae_lib": (sys.executable, "ours"),
    "SAELens": (PEERS / "sae-lens/bin/python", "sae_lens"),
    "dictionary_learning": (PEERS / "dictionary-learning/bin/python", "dictionary_learning"),
    "sparsify": (PEERS / "eai-sparsify/bin/python", "sparsify"),
    "overcomplete": (PEERS / "overcomplete/bin/python", "overcomplete"),
}
"""Python and file of each library's worker."""
VARIANTS = {
    "topk": {
        "sae_lib": ("topk", "topk, no bf16"),
        "SAELens": ("topk", "topk_sparse"),
        "dictionary_learning": ("topk",),
        "sparsify": ("topk", "groupmax"),
        "overcomplete": ("topk",),
    },
    "batchtopk": dict.fromkeys(("sae_lib", "SAELens", "dictionary_learning", "overcomplete"), ("batchtopk",)),
    "jumprelu": dict.fromkeys(("sae_lib", "SAELens", "dictionary_learning", "overcomplete"), ("jumprelu",)),
    "relu": dict.fromkeys(("sae_lib", "SAELens", "dictionary_learning", "overcomplete"), ("relu",)),
    "gated": dict.fromkeys(("sae_lib", "SAELens", "dictionary_learning"), ("gated",)),
    "dead": {"sae_lib": ("topk", "topk, 10% dead")},
}
"""What is measured side by side: for each work, each library's variants."""
UNIT = "encoder GEMM"


@dataclass(frozen=True)
class Job:
    """One worker's work, and how many steps it makes when its turn comes."""

    library: str
    variant: str
    d_in: int
    d_sae: int
    k: int
    batch: int
    steps: int = 1
    module: str = ""


@dataclass(frozen=True)
class Work:
    """Jobs that take turns."""

    name: str
    jobs: list[Job]
    rounds: int

    def keys(self) -> list[tuple]:
        """What tells its rows from all others, by `KEY`, in the order of the jobs."""
        return [
            (self.name, job.library, job.variant, job.d_in, job.d_sae, job.k, job.batch, THREADS) for job in self.jobs
        ]


@dataclass
class Measured:
    """What a worker said, round by round."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)


def works(
    libraries: Sequence[str], sizes: Iterable[tuple[int, int]], rounds: int | None, k: int, batch: int
) -> list[Work]:
    """All that is measured, of the chosen libraries and sizes."""
    found = []
    for d_in, d_sae in sizes:
        times = rounds or SIZES.get((d_in, d_sae), 4)

        def job(library: str, variant: str, shape=(d_in, d_sae, k, batch)) -> Job:
            return Job(library, variant, *shape)

        for name, variants in VARIANTS.items():
            jobs = [
                job(library, variant) for library in variants if library in libraries for variant in variants[library]
            ]
            if jobs:
                units = [UNIT, f"{UNIT}, bf16"] if name == "topk" else [UNIT]
                found.append(Work(name, [*(job("sae_lib", unit) for unit in units), *jobs], times))
        if "sae_lib" in libraries:
            found.append(Work("scaling", scaling(job("sae_lib", "topk")), times))
    if "sae_lib" in libraries:
        found.append(Work("density", density(Job("sae_lib", "topk", *min(sizes), k, batch)), rounds or 5))
        parts = ("forward", "steps", "train")
        jobs = [
            Job("sae_lib", part, 128, min(32 * k, 1024), min(k, 16), min(batch, 2048), 20, "pocket") for part in parts
        ]
        found.append(Work("pocket", jobs, rounds or 5))
    return found


def scaling(usual: Job) -> list[Job]:
    """The usual job, and with half and with twice the batch, the width, and k."""
    sizes = [(name, getattr(usual, name)) for name in ("batch", "d_sae", "k")]
    return [usual, *(replace(usual, **{name: value}) for name, size in sizes for value in (size // 2, 2 * size))]


def density(usual: Job) -> list[Job]:
    """Sparse and dense steps at several shares of living pairs."""
    ks = [usual.d_sae // share for share in (128, 48, 24, 12, 6)]
    return [replace(usual, k=k, variant=f"topk, {how}") for k in ks for how in ("sparse", "dense")]


class Worker:
    """A process that trains one sparse autoencoder, a few steps at a time.

    Raises:
        RuntimeError: from each of its methods, if the process ended or is silent for too long; with what it said last.
    """

    def __init__(self, job: Job, activations: Path):
        python, module = ENVIRONMENTS[job.library]
        self.job, self.measured = job, Measured()
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        work = json.dumps({name: getattr(job, name) for name in ("variant", "d_in", "d_sae", "k", "batch")})
        self.process = subprocess.Popen(
            [python, "-m", "peers.worker", job.module or module, work, activations],
            cwd=ROOT / "tests",
            env=os.environ | SURROUNDINGS,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )

    def hear(self) -> dict:
        """The next thing that it says."""
        ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE)
        line = self.process.stdout.readline() if ready else ""
        if not line:
            self.close()
            self.errors.seek(0)
            why = "ended" if ready else f"was silent for {PATIENCE} seconds"
            raise RuntimeError(f"{self.job.library}, {self.job.variant} {why}:\n{self.errors.read()[-2000:]}")
        return json.loads(line)

    def ask(self, command: str) -> dict:
        """Its answer to a command."""
        with suppress(BrokenPipeError):  # `hear` says why
            print(command, file=self.process.stdin, flush=True)
        return self.hear()

    def step(self, keep: bool) -> None:
        """Let it make its steps; their mean is what the round measured."""
        answer = self.ask(f"step {self.job.steps}")
        if keep:
            self.measured.cpu.append(statistics.mean(answer["cpu"]))
            self.measured.wall.append(statistics.mean(answer["wall"]))

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def measure(work: Work, activations: dict[int, Path], bar: tqdm) -> tuple[list[dict], list[str]]:
    """The rows of one work, and what went wrong: a worker that fails is left out, the others go on."""
    began, failures, said = time.perf_counter(), [], {}
    workers = [Worker(job, activations[job.d_in]) for job in work.jobs]

    def all_do(action) -> None:
        for worker in list(workers):
            try:
                action(worker)
            except RuntimeError as failure:
                failures.append(str(failure))
                workers.remove(worker)

    try:
        all_do(lambda worker: said.update({worker: worker.hear()}))
        for turn in range(WARM_UP + work.rounds):
            bar.set_description(f"{work.name} {work.jobs[0].d_in}x{work.jobs[0].d_sae}, round {turn + 1 - WARM_UP}")
            all_do(lambda worker, turn=turn: worker.step(keep=turn >= WARM_UP))
            bar.update()
        all_do(lambda worker: said[worker].update(worker.ask("peak 2") | worker.ask("report")))
    finally:
        for worker in workers:
            worker.process.stdin.close()
        for worker in workers:
            worker.close()
    seconds = time.perf_counter() - began
    units = {worker.job.d_in: worker.measured for worker in workers if worker.job.variant == UNIT}
    rows = []
    for worker in workers:
        measured, job = worker.measured, worker.job
        key = work.keys()[work.jobs.index(job)]
        rows.append(
            dict(zip(KEY, key, strict=True))
            | {"version": said[worker]["version"], "torch": said[worker]["torch"], "rounds": work.rounds}
            | {"l0": None if UNIT in job.variant or job.module else round(said[worker]["l0"], 3)}
            | spread("cpu_ms", [1000 * value for value in measured.cpu])
            | spread("wall_ms", [1000 * value for value in measured.wall])
            | (spread("gemm_ratio", ratios(measured.cpu, units[job.d_in].cpu)) if job.d_in in units else {})
            | {"peak_mb": megabytes(said[worker]["peak"])}
            | {"peak_above_mb": megabytes(said[worker]["peak"] - said[worker]["weights"])}
            | {"scores_mb": megabytes(4 * job.batch * job.d_sae), "seconds": round(seconds, 1)}
        )
    return rows, failures


def cache_rows(gigabytes: float, rounds: int) -> list[dict]:
    """What `cache_speed` measures, as rows; raises subprocess.CalledProcessError if it fails."""
    command = [sys.executable, Path(__file__).with_name("cache_speed.py"), "--gigabytes", str(gigabytes)]
    began = time.perf_counter()
    ran = subprocess.run(
        [*command, "--rounds", str(rounds)], cwd=ROOT, env=os.environ | SURROUNDINGS, stdout=subprocess.PIPE, check=True
    )
    rows = []
    for found in json.loads(ran.stdout):
        variant = [str(found[name]) for name in ("dtype", "beside", "clock") if name in found]
        row = dict.fromkeys(KEY) | {"library": "sae_lib", "variant": ", ".join(variant) or "read beside a step"}
        for name, value in found.items():
            if isinstance(value, dict):  # a median and its quarter points
                row |= {name: value["median"], f"{name}_low": value["low"], f"{name}_high": value["high"]}
            else:
                row[name] = value
        rows.append(row | {"seconds": round(time.perf_counter() - began, 1)})
    return rows


def activations(d_in: int, tokens: int) -> Path:
    """A file of tokens: sums of 32 of 2 d_in features, some more frequent, with noise; mean squared norm 1."""
    from sae_lib.data import PlantedDictionary

    path = PEERS / f"activations-{tokens}x{d_in}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        dictionary = PlantedDictionary(2 * d_in, d_in, active=min(32, d_in // 8), zipf=0.5, spread=0.35, noise=0.3)
        x, _ = dictionary.sample(tokens, seed=0)
        new = path.with_name(f".{path.name}")
        np.save(new, (x / x.square().sum(1).mean().sqrt()).numpy())
        os.replace(new, path)
    return path


def done(work: Work, rows: list[dict], now: dict[str, object]) -> bool:
    """Whether all of a work's rows are there already, measured on this machine with this very library."""
    same = [row for row in rows if all(row[name] == now[name] for name in ("sae_lib_sha256", "device"))]
    return set(work.keys()) <= {tuple(row[name] for name in KEY) for row in same}


def size(text: str) -> tuple[int, int]:
    """ "256x4096" as (256, 4096)."""
    d_in, d_sae = text.split("x")
    return int(d_in), int(d_sae)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--libraries", nargs="+", choices=ENVIRONMENTS, default=list(ENVIRONMENTS), metavar="NAME")
    parser.add_argument(
        "--works", nargs="+", choices=[*VARIANTS, "scaling", "density", "pocket", "cache"], metavar="NAME"
    )
    parser.add_argument("--sizes", nargs="+", type=size, default=list(SIZES), metavar="D_INxD_SAE")
    parser.add_argument(
        "--rounds", type=int, help="how often each is measured; by default more often where it is quick"
    )
    parser.add_argument("--resume", action="store_true", help="leave out what this very library was measured on before")
    parser.add_argument("--smoke", action="store_true", help="one round of tiny sizes, to see that everything runs")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the file of rows")
    chosen = parser.parse_args()
    k, batch, output = K, BATCH, chosen.output
    if chosen.smoke:
        k, batch, chosen.sizes, chosen.rounds = 4, 64, [(16, 256)], 1
        output = PEERS / "speed.smoke.json" if output == RESULTS else output

    origin, failures = provenance(), []
    todo = works(chosen.libraries, chosen.sizes, chosen.rounds, k, batch)
    todo = [work for work in todo if chosen.works is None or work.name in chosen.works]
    if chosen.resume:
        todo = [work for work in todo if not done(work, read(output), origin)]
    files = {job.d_in: activations(job.d_in, BATCHES * batch) for work in todo for job in work.jobs}
    with tqdm(total=sum(WARM_UP + work.rounds for work in todo), unit="round") as bar:
        for work in todo:
            rows, failed = measure(work, files, bar)
            write(output, [row | origin for row in rows])
            failures += failed
    if "sae_lib" in chosen.libraries and (chosen.works is None or "cache" in chosen.works):
        here = [row for row in read(output) if row["work"] == "cache beside a step"]
        if not (chosen.resume and here and here[0]["sae_lib_sha256"] == origin["sae_lib_sha256"]):
            gigabytes, rounds = (0.01, 2) if chosen.smoke else (0.5, chosen.rounds or 5)
            try:
                write(output, [row | origin for row in cache_rows(gigabytes, rounds)])
            except subprocess.CalledProcessError as failure:
                failures.append(f"cache: {failure}")
    asked = targets(read(output))
    write(output, [row | origin for row in asked])
    for row in asked:
        print("{d_in:5} {variant:56} {measured:6.2f} {bound} {target}: {verdict}".format(**row))
    print(f"{output.relative_to(ROOT) if output.is_relative_to(ROOT) else output}: {len(read(output))} rows")
    if failures:
        sys.exit("\n\n".join([f"{len(failures)} were not measured:", *failures]))


if __name__ == "__main__":
    main()
