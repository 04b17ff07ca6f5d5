"""Running a chapter's experiments: trainings, searches and measurements, none of them lost and none done twice.

A unit of work is an experiment and a seed: its SAEs are trained together, searched coefficients until they are found,
then measured, and their rows added to the results file in one move. Until then everything that was done is kept below
``_build/experiments``: trainings as checkpoints (`sae_lib.checkpoint`), measurements as they came. A run that is
stopped at any point, by SIGKILL too, goes on there.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from sae_lib.experiments import IN_PLACE, UNTRAINED, Experiment, Planned, experiments
from sae_lib.grounds import Ground, ground
from sae_lib.matching import measured_l0
from sae_lib.measures import CONSISTENCY, MEASURES, consistency
from sae_lib.metrics.equivariance import OneMatrix
from sae_lib.metrics.feature_clusters import Reading
from sae_lib.pocket.provenance import write_json
from sae_lib.results import ROOT, Row, append, environment, file_of, key, library_sha256, load, sha256_of
from sae_lib.sae import SAE, whole
from sae_lib.saes.controls import pca
from sae_lib.train import train

WORK = ROOT / "_build" / "experiments"
TWIN = 1000
"""Added to the seed of a twin's weights."""


def reproduce(
    chapter: str,
    scale: str,
    seeds: int | None = None,
    job: tuple[int, int] = (1, 1),
    folder: Path | None = None,
    path: Path | None = None,
    changes: Mapping[str, Any] | None = None,
) -> tuple[int, list[str]]:
    """Train and measure what a chapter's experiments ask for and its results file does not have.

    Args:
        chapter: a chapter of ``experiments.yml``, or ``chapter/experiment`` for one of its experiments.
        scale: smoke, pocket or paper.
        seeds: the first so many; as described, if None.
        job: ``(i, n)``: only the i-th of n parts of the pairs of experiment and seed, for n machines. Processes of one
            machine need no parts: each leaves alone what another is at.
        folder: of the results; ``book/results``, if None.
        path: of the descriptions; ``book/experiments.yml``, if None.
        changes: what is other than described; see `sae_lib.experiments.experiments`. Such rows need a folder of their
            own.

    Returns:
        How many rows were added; and, for each SAE without a row, because its L0 missed the target, the reason.

    Raises:
        ValueError: for a chapter, scale or description that is wrong, or a results file that cannot be read.
    """
    todo = unfinished(chapter, scale, seeds, job, folder, path, changes)
    chapter = chapter.partition("/")[0]
    added, missed, stand = 0, [], {}
    with tqdm(total=sum(len(saes) for *_, saes in todo), unit="SAE", desc=f"{chapter}, {scale}") as bar:
        for one, seed, saes in todo:
            asked_now = sha256_of([library_sha256(), *(sae.configuration for sae in saes)])
            work = WORK / f"{chapter}-{one.name}-{seed}-{asked_now}"
            work.parent.mkdir(parents=True, exist_ok=True)
            with suppress(Timeout), FileLock(f"{work}.lock", blocking=False):
                if lacking(one, seed, folder) == saes:
                    if stand.get("on") != one.ground:
                        stand = {"on": one.ground, "ground": ground(one.ground)}  # one at a time: a model may be large
                    rows, without = run(one, seed, saes, stand["ground"], work)
                    append(chapter, scale, rows, folder)
                    shutil.rmtree(work, ignore_errors=True)
                    added, missed = added + len(rows), missed + without
            bar.update(len(saes))
    return added, missed


def unfinished(
    chapter: str,
    scale: str,
    seeds: int | None = None,
    job: tuple[int, int] = (1, 1),
    folder: Path | None = None,
    path: Path | None = None,
    changes: Mapping[str, Any] | None = None,
) -> list[tuple[Experiment, int, list[Planned]]]:
    """What `reproduce` with the same arguments will do: an experiment, a seed, and the SAEs that have no row.

    Raises:
        ValueError: as there.
    """
    (chapter, _, only), (part, parts) = chapter.partition("/"), job
    if not 1 <= part <= parts:
        raise ValueError(f"jobs must be i/n with i from 1 to n, got {part}/{parts}")
    if changes and file_of(chapter, scale, folder).resolve() == file_of(chapter, scale).resolve():
        raise ValueError(
            f"what is not as described must not be mixed with the book's rows, got other {', '.join(changes)} and "
            f"{file_of(chapter, scale)}: name a folder of their own"
        )
    asked = [one for one in experiments(chapter, scale, path, changes) if only in ("", one.name)]
    if only and not asked:
        names = ", ".join(dict.fromkeys(one.name for one in experiments(chapter, scale, path, changes)))
        raise ValueError(f"experiment of {chapter} at scale {scale} must be one of {names or 'none'}, got {only!r}")
    pairs = [(one, seed) for one in asked for seed in range(one.seeds if seeds is None else whole("seeds", seeds))]
    return [(one, seed, saes) for one, seed in pairs[part - 1 :: parts] if (saes := lacking(one, seed, folder))]


def lacking(one: Experiment, seed: int, folder: Path | None) -> list[Planned]:
    """The SAEs of an experiment that have no row of this seed."""
    content = load(file_of(one.chapter, one.scale, folder)) or {"rows": []}
    known = {key(row) for row in content["rows"]}
    return [sae for sae in one.saes if (one.name, one.version, sha256_of(sae.configuration), seed) not in known]


@dataclass
class Trained:
    """A trained SAE, what was found by a search, the seconds that it took; and its twin, if one is asked for."""

    planned: Planned
    sae: SAE | Reading | OneMatrix
    found: dict[str, float]
    seconds: float
    twin: SAE | None = None


def run(one: Experiment, seed: int, saes: Sequence[Planned], ground: Ground, work: Path) -> tuple[list[Row], list[str]]:
    """The rows of one seed. All that is done is kept in `work`, so that nothing is done twice if this is stopped."""
    work.mkdir(exist_ok=True)
    trained, missed = train_all(saes, seed, ground, work)
    train_twins(trained, seed, ground, work / "twins")
    rows = []
    for made, (metrics, noise, unmeasured, seconds) in zip(
        trained, measure_all(trained, seed, ground, work), strict=True
    ):
        rows.append(
            {
                "experiment": one.name,
                "version": one.version,
                "sae": made.planned.label,
                "seed": seed,
                "setting": made.planned.setting,
                "metrics": metrics,
                "noise": noise,
                "unmeasured": unmeasured,
                "found": made.found,
                "seconds": round(made.seconds + seconds, 2),
                "date": time.strftime("%Y-%m-%d"),
                "configuration": made.planned.configuration,
                "environment": environment(),
            }
        )
    return rows, missed


def train_all(saes: Sequence[Planned], seed: int, ground: Ground, work: Path) -> tuple[list[Trained], list[str]]:
    """Train them on one stream; those whose L0 misses its target again, with another coefficient, until it meets it."""
    searches = [sae.search for sae in saes]
    held = torch.cat([ground.rows(seed, repeat) for repeat in (0, 1)]) if any(searches) else None
    done: dict[int, Trained] = {}
    missed, spent, pending = [], [0.0] * len(saes), list(range(len(saes)))
    for turn in itertools.count():
        found = {place: {search[0]: search[1].guess} if (search := searches[place]) else {} for place in pending}
        made = train_once([saes[place] for place in pending], list(found.values()), seed, ground, work / str(turn))
        for place, (sae, seconds) in zip(pending, made, strict=True):
            spent[place] += seconds
            done[place] = Trained(saes[place], sae, found[place], spent[place])
            if searches[place]:
                try:
                    argument, search = searches[place]
                    search.tell(measured_l0(sae, held))
                    saes[place].make(sae.d_in, seed, {argument: search.guess})  # refuses a value that is out of range
                except ValueError as error:
                    missed.append(f"{saes[place].label}, {saes[place].setting}, seed {seed}: {error}")
                    done.pop(place)
                    searches[place] = None
        pending = [place for place in pending if searches[place] and not searches[place][1].met]
        if not pending:
            return [done[place] for place in sorted(done)], missed


def train_twins(trained: Sequence[Trained], seed: int, ground: Ground, work: Path) -> None:
    """Give those whose consistency is measured a twin: other initial weights, all else alike."""
    asked = [made for made in trained if CONSISTENCY in made.planned.configuration["measures"]]
    if asked:
        found = [made.found for made in asked]
        twins = train_once([made.planned for made in asked], found, seed, ground, work, seed + TWIN)
        for made, (twin, seconds) in zip(asked, twins, strict=True):
            made.twin, made.seconds = twin, made.seconds + seconds


def train_once(
    saes: Sequence[Planned],
    found: Sequence[dict[str, float]],
    seed: int,
    ground: Ground,
    work: Path,
    weights: int | None = None,
) -> list[tuple[SAE | Reading | OneMatrix, float]]:
    """Each SAE trained, those of one length together; and the seconds of each. `weights`: a seed of their own.

    Those that read gradients or orbits have a stream of their own, unless the ground gives gradients to all.
    """
    made: dict[int, tuple[SAE | Reading | OneMatrix, float]] = {}
    together: dict[tuple[int, str], list[int]] = {}
    for place, sae in enumerate(saes):
        together.setdefault((sae.tokens, "grad" if ground.grad else sae.reading), []).append(place)
    for (tokens, reading), places in sorted(together.items()):
        trainees = [place for place in places if saes[place].configuration["variant"] not in UNTRAINED]
        for place in set(places) - set(trainees):
            began = time.perf_counter()
            kind, arguments = (saes[place].configuration[part] for part in ("variant", "arguments"))
            sae = pca(ground.stream(seed), **arguments, tokens=tokens) if kind == "pca" else IN_PLACE[kind](**arguments)
            made[place] = sae, time.perf_counter() - began
        if trainees:
            stream = ground.stream(seed, reading)
            d_in, activations = ground.row(reading)
            new = [saes[place].make(d_in, seed if weights is None else weights, found[place]) for place in trainees]
            rows = max(1, tokens // activations)
            every, folder = max(1, min(10_000_000, rows // 3)), work / f"{tokens} {reading}".strip()
            run = train(new, stream, rows, seed, checkpoint=folder, checkpoint_every=every)
            made |= {place: (sae, run.seconds / len(new)) for place, sae in zip(trainees, new, strict=True)}
    return [made[place] for place in range(len(saes))]


def measure_all(
    trained: Sequence[Trained], seed: int, ground: Ground, work: Path
) -> list[tuple[dict, dict, dict, float]]:
    """Of each SAE: the mean of each metric over the repetitions, their standard deviation, why a measurement has no
    metrics, and the seconds."""
    values: list[dict[str, list[float]]] = [{} for _ in trained]
    unmeasured: list[dict[str, str]] = [{} for _ in trained]
    seconds = [0.0] * len(trained)
    asked = [made.planned.configuration for made in trained]
    for name in dict.fromkeys(name for own in asked for name in own["measures"]):
        places = [place for place, own in enumerate(asked) if name in own["measures"]]
        repeats = 1 if name == CONSISTENCY else max(asked[place]["repeats"] for place in places)
        for repeat in range(repeats):
            path = work / f"{name}-{repeat}.json"
            if not path.exists():
                began = time.perf_counter()
                found = measure(name, [trained[place] for place in places], ground, seed, repeat)
                write_json(path, {"found": found, "seconds": time.perf_counter() - began})
            content = json.loads(path.read_text())
            for place, metrics in zip(places, content["found"], strict=True):
                seconds[place] += content["seconds"] / len(places)
                if isinstance(metrics, str):
                    unmeasured[place][name] = metrics
                    continue
                for metric, value in metrics.items():
                    values[place].setdefault(metric, []).append(value)
    means = [{metric: average(each) for metric, each in own.items()} for own in values]
    noise = [{metric: deviation(each) for metric, each in own.items() if len(each) > 1} for own in values]
    return list(zip(means, noise, unmeasured, seconds, strict=True))


def measure(name: str, trained: Sequence[Trained], ground: Ground, seed: int, repeat: int) -> list[dict | str]:
    """One repetition of one measurement."""
    if name == CONSISTENCY:
        return [consistency(made.sae, made.twin, ground, seed) for made in trained]
    return MEASURES[name]([made.sae for made in trained], ground, seed, repeat)


def average(values: Sequence[float]) -> float | None:
    """Their mean; None if one of them is not finite: unknown."""
    return fmean(values) if all(map(math.isfinite, values)) else None


def deviation(values: Sequence[float]) -> float | None:
    """Their standard deviation; None if one of them is not finite."""
    return stdev(values) if all(map(math.isfinite, values)) else None
