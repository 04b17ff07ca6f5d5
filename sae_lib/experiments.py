"""A chapter's comparison is data, and one command runs it: ``python -m sae_lib reproduce <chapter> --scale <scale>``.

``book/experiments.yml`` has, below ``grounds``, a name for each ground, and for each chapter its experiments:

    <experiment>:
      version: raised when its meaning changes
      ground: name of a ground
      settings: the grid, a list of {name: value}; `target` is the L0 that is asked for
      saes: {label: {variant, its arguments; control or reading (stacked), if it has one; tokens, if it trains longer}}
      measures: names of `sae_lib.measures`
      repeats: how often each is repeated with another seed of its own
      scales: {<scale>: {tokens, seeds, and whatever above is other at this scale}}

An argument, of a ground too, that is the name of a setting takes its value; ``{match: target, start: 0.3}`` is searched
for, until the measured held-out L0 lies within 3% of the target (`sae_lib.matching`). What is costly can be kept to a
part of the grid: ``only: {target: 16}`` of an SAE, or ``{first_letter: {target: 16}}`` in place of a measure's name.
All SAEs of a seed are trained on one stream, in one order of the data; ``tokens`` counts activations, of which an orbit
has as many as poses. The ``version`` of an SAE is raised when its own training changes. `sae_lib.reproduce` runs it.

`CHANGES` make the comparison that is described another one's: of another model, site or texts, or of other sizes.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from itertools import groupby
from pathlib import Path
from typing import Any

from sae_lib.matching import SLOPES, Search
from sae_lib.measures import CONSISTENCY, MEASURES
from sae_lib.metrics.equivariance import OneMatrix
from sae_lib.metrics.feature_clusters import Reading
from sae_lib.results import ROOT, ResultsError, Row, read, sha256_of
from sae_lib.sae import SAE
from sae_lib.saes import VARIANTS
from sae_lib.saes.controls import freeze, untrained

DESCRIPTIONS = ROOT / "book" / "experiments.yml"
SCALES = ("smoke", "pocket", "paper")
NEEDED = ("version", "ground", "saes", "measures", "tokens", "seeds")
OPTIONAL = {"settings": [{}], "repeats": 3}
CONTROLS: dict[str, Callable[[SAE], SAE]] = {
    "untrained": untrained,
    "frozen decoder": lambda sae: freeze(sae, "W_dec"),
    "frozen encoder": lambda sae: freeze(sae, "W_enc", "b_enc"),
}
"""What is done to an SAE before its training."""
IN_PLACE: dict[str, type] = {"neurons": Reading, "matrix": OneMatrix}
"""What stands in place of an SAE and is only measured: ways to embed neurons, and to fit a matrix."""
ON_GROUND, ON_GRID = ("model", "site", "texts", "limit", "held_texts"), ("d_sae", "target")
CHANGES = (*ON_GROUND, *ON_GRID, "tokens")
"""What can be other than described, where the ground is a language model."""
HELD_TEXTS = 1000
"""Texts that are held out where others than described are read, unless it is said how many."""
UNTRAINED = {"pca": {"rank"}} | {name: {field.name for field in fields(kind)} for name, kind in IN_PLACE.items()}
"""What is not trained, components included, with its arguments."""


@dataclass(frozen=True)
class Planned:
    """One SAE of an experiment at one setting, to be trained with each seed.

    Attributes:
        label: its name in tables and figures.
        setting: a point of the grid.
        configuration: everything that its rows depend on, but the seed.
    """

    label: str
    setting: dict[str, Any]
    configuration: dict[str, Any]

    @property
    def tokens(self) -> int:
        return self.configuration["tokens"]

    @property
    def reading(self) -> str:
        """What its training reads beside single activations, or in place of them: see `Ground.stream`."""
        variant = self.configuration["variant"]
        needs = VARIANTS[variant].needs if variant in VARIANTS else ()
        return self.configuration.get("reading", next(iter(needs), ""))

    @property
    def search(self) -> tuple[str, Search] | None:
        """The argument that is searched for, if there is one, and a new search for it."""
        for name, value in self.configuration["arguments"].items():
            if isinstance(value, dict):
                return name, Search(value["match"], value["start"], SLOPES.get(name, -1.0))
        return None

    def make(self, d_in: int, seed: int, found: dict[str, float]) -> SAE:
        """The SAE before training, with what was found in place of what is searched for."""
        arguments = self.configuration["arguments"] | found
        sae = VARIANTS[self.configuration["variant"]](d_in=d_in, seed=seed, **arguments)
        control = self.configuration["control"]
        return CONTROLS[control](sae) if control else sae


@dataclass(frozen=True)
class Experiment:
    """What is trained and measured together. See the head of this file."""

    chapter: str
    name: str
    scale: str
    version: int
    ground: dict[str, Any]
    seeds: int
    saes: tuple[Planned, ...] = field(repr=False)


# What is asked for ----------------------------------------------------------------------------------------------------


def described(path: Path | None = None) -> dict[str, Any]:
    """The content of ``experiments.yml``."""
    import yaml

    return yaml.safe_load((path or DESCRIPTIONS).read_text(encoding="utf-8"))


def experiments(
    chapter: str, scale: str, path: Path | None = None, changes: Mapping[str, Any] | None = None
) -> list[Experiment]:
    """The experiments of a chapter at a scale, in their order.

    Args:
        chapter: one that is described.
        scale: smoke, pocket or paper.
        path: of the descriptions; ``book/experiments.yml``, if None.
        changes: some of `CHANGES`; then only experiments on language models are given. With d_sae or target, the grid
            is its first point; ``tokens`` changes the length of all trainings in proportion.

    Raises:
        ValueError: there is no such chapter or scale, or a description is not as the head of this file says.
    """
    if changes and (strange := set(changes) - set(CHANGES)):
        raise ValueError(f"changes must be among {', '.join(CHANGES)}, got {', '.join(sorted(strange))}")
    content = described(path)
    chapters = [name for name in content if name != "grounds"]
    if chapter not in chapters:
        near = ", ".join(difflib.get_close_matches(chapter, chapters)) or ", ".join(chapters)
        raise ValueError(f"chapter must be one of {', '.join(chapters)}, got {chapter!r}; nearest: {near}")
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
    found = []
    for name, parts in content[chapter].items():
        if scale in parts["scales"]:
            try:
                whole = OPTIONAL | {k: v for k, v in parts.items() if k != "scales"} | parts["scales"][scale]
                found += on_grounds(chapter, name, scale, whole, content["grounds"], changes or {})
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise ValueError(f"{chapter}/{name} at scale {scale}: {error}") from error
    if changes and not found:
        raise ValueError(
            f"{', '.join(changes)} can be changed of a language model, got {chapter} at scale {scale}, without"
        )
    return found


def on_grounds(
    chapter: str, name: str, scale: str, parts: dict[str, Any], grounds: dict[str, Any], changes: Mapping[str, Any]
) -> list[Experiment]:
    """One experiment, from what its description says at one scale; or several, where settings change the ground."""
    if missing := [part for part in NEEDED if part not in parts]:
        raise ValueError(f"an experiment must have {', '.join(NEEDED)}, got none of {', '.join(missing)}")
    if unknown := set(parts) - set(NEEDED) - set(OPTIONAL):
        raise ValueError(f"an experiment has {', '.join([*NEEDED, *OPTIONAL])}, got {', '.join(sorted(unknown))}")
    if parts["ground"] not in grounds:
        raise ValueError(f"ground must be one of {', '.join(grounds)}, got {parts['ground']!r}")
    ground = grounds[parts["ground"]]
    if changes and "model" not in ground:
        return []
    share = changes.get("tokens", parts["tokens"]) / parts["tokens"] if parts["tokens"] else 1
    shared = {
        "experiment": f"{chapter}/{name}",
        "version": parts["version"],
        "repeats": parts["repeats"],
    }
    measures = {}
    for measure in parts["measures"]:
        measures |= measure if isinstance(measure, dict) else {measure: {}}
    if strange := set(measures) - set(MEASURES) - {CONSISTENCY}:
        raise ValueError(
            f"measures must be among {', '.join([*MEASURES, CONSISTENCY])}, got {', '.join(sorted(strange))}"
        )
    saes, grid = [], {name: changes[name] for name in ON_GRID if name in changes}
    for point in parts["settings"][:1] if grid else parts["settings"]:
        setting = point | grid
        own = {
            "ground": changed(valued(ground, setting), changes),
            "measures": [measure for measure, only in measures.items() if matches(point, only)],
        }
        for label, asked in parts["saes"].items():
            if matches(point, asked.get("only", {})):
                length = valued(asked.get("tokens", parts["tokens"]), point) * share
                saes.append(planned(label, asked | {"tokens": round(length)}, setting, shared | own))
    return [
        Experiment(chapter, name, scale, parts["version"], ground, parts["seeds"], tuple(some))
        for ground, some in groupby(saes, key=lambda sae: sae.configuration["ground"])
    ]


def changed(ground: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The ground with another model, site or texts; of other texts the first are held out, unless they have splits."""
    if "texts" in changes:
        ground = {name: value for name, value in ground.items() if name != "held_texts"}
        if changes["texts"] == "pocket":
            ground.pop("limit", None)
        else:
            ground["held_texts"] = HELD_TEXTS
    return ground | {name: changes[name] for name in ON_GROUND if name in changes}


def matches(setting: dict[str, Any], only: dict[str, Any]) -> bool:
    """Whether a point of the grid has the values that are asked for."""
    return all(setting.get(name) == value for name, value in only.items())


def valued(part: Any, setting: dict[str, Any]) -> Any:
    """A part of a description, names of settings in it replaced by their values."""
    if isinstance(part, dict):
        return {name: valued(inner, setting) for name, inner in part.items()}
    return setting.get(part, part) if isinstance(part, str) else part


def planned(label: str, asked: dict[str, Any], setting: dict[str, Any], shared: dict[str, Any]) -> Planned:
    """One SAE at one setting: names of settings replaced by their values, arguments checked."""
    parts = {name: valued(part, setting) for name, part in asked.items() if name != "only"}
    variant, control = parts.pop("variant", None), parts.pop("control", None)
    tokens = parts.pop("tokens")
    names = {"version": "sae_version", "reading": "reading"}
    where_asked = {names[part]: parts.pop(part) for part in names if part in parts}
    if variant not in (*VARIANTS, *UNTRAINED):
        raise ValueError(f"variant of {label} must be one of {', '.join([*VARIANTS, *UNTRAINED])}, got {variant!r}")
    if control not in (None, *CONTROLS):
        raise ValueError(f"control of {label} must be one of {', '.join(CONTROLS)}, got {control!r}")
    known = UNTRAINED.get(variant) or set(inspect.signature(VARIANTS[variant]).parameters) - {"d_in", "seed"}
    if strange := set(parts) - known:
        raise ValueError(f"{label} takes {', '.join(sorted(known))}, got {', '.join(sorted(strange))}")
    arguments = {name: value for name, value in setting.items() if name in known} | parts
    searched = [value for value in arguments.values() if isinstance(value, dict)]
    if any(set(value) != {"match", "start"} for value in searched) or len(searched) > 1:
        raise ValueError(f"{label} may search for one argument, by {{match: L0, start: guess}}, got {searched}")
    own = {"label": label, "variant": variant, "control": control, "tokens": tokens, "arguments": arguments}
    return Planned(label, setting, shared | own | where_asked)


# Reading what was run -------------------------------------------------------------------------------------------------


def rows(chapter: str, scale: str = "pocket", folder: Path | None = None, path: Path | None = None) -> list[Row]:
    """The rows of a chapter's results that were made with the descriptions as they are now; see `results.read`.

    Raises:
        ResultsError: there are no results, they cannot be read, or none has a configuration that is asked for now.
    """
    asked = {
        (one.name, one.version, sha256_of(sae.configuration))
        for one in experiments(chapter, scale, path)
        for sae in one.saes
    }
    read_rows = read(chapter, scale, folder)
    current = [row for row in read_rows if (row["experiment"], row["version"], row["configuration_sha256"]) in asked]
    if not current:
        raise ResultsError(
            f"results of {chapter} at scale {scale} must be of the configurations that experiments.yml asks for, got "
            f"{len(read_rows)} rows of others; to make them: python -m sae_lib reproduce {chapter} --scale {scale}"
        )
    return current
