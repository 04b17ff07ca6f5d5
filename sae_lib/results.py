"""Results files: what was measured, in tidy rows that say where they come from.

One file a chapter and scale, ``book/results/<chapter>.<scale>.json``:

    {"format": ..., "chapter": ..., "scale": ...,
     "configurations": {hash: what was trained and measured},
     "environments": {hash: commit, dirty, hash of the library, device, versions},
     "rows": [one SAE and seed each: experiment, setting, metrics, noise, ..., and its two hashes]}

Rows are added by `append` alone, under a lock and in one move, so that several processes may write to one file and a
reader sees it whole at every moment. Each row carries a checksum of itself with its configuration and environment: a
file that was cut off or edited by hand is refused, never read as if it were measured. Chapter `claims`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock  # the lock of a process that was killed is free

from sae_lib.pocket.provenance import write_bytes

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "book" / "results"
FORMAT = {"format": "sae_lib results", "format_version": 1}
VERSIONS = ("torch", "numpy", "scipy", "scikit-learn", "transformers", "transformer-lens")

Row = dict[str, Any]


class ResultsError(ValueError):
    """A results file is missing, damaged, or was changed by another hand than `append`."""


def file_of(chapter: str, scale: str, folder: str | Path | None = None) -> Path:
    """Where the rows of a chapter at a scale are kept."""
    return Path(folder or FOLDER) / f"{chapter}.{scale}.json"


def read(chapter: str, scale: str, folder: str | Path | None = None) -> list[Row]:
    """The rows of a chapter at a scale, each flat: what was asked, what was measured, and where it comes from.

    Keys: chapter, scale, experiment, version, sae (label), seed; the settings and the metrics by their names; ``noise``
    (of each metric, the standard deviation over repetitions with other seeds of the metric itself); ``unmeasured``
    (measurements without metrics: why); ``found`` (what was searched for); ``configuration`` and its hash,
    ``configuration_sha256``; commit, dirty, sae_lib_sha256, device, versions; seconds, date.

    Raises:
        ResultsError: there is no such file, or it is cut off, or was edited by hand.
    """
    content = load(file_of(chapter, scale, folder))
    if content is None:
        raise ResultsError(
            f"there are no results of {chapter} at scale {scale}; to make them: "
            f"python -m sae_lib reproduce {chapter} --scale {scale}"
        )
    return [flat(content, row) for row in content["rows"]]


def flat(content: dict, row: Row) -> Row:
    """One stored row with what it refers to, on one level."""
    own = ("experiment", "version", "sae", "seed", "noise", "unmeasured", "found", "seconds", "date")
    kept = {name: row[name] for name in own}
    return (
        {"chapter": content["chapter"], "scale": content["scale"]}
        | kept
        | {
            "configuration": content["configurations"][row["configuration"]],
            "configuration_sha256": row["configuration"],
        }
        | content["environments"][row["environment"]]
        | row["setting"]
        | row["metrics"]
    )


def load(path: Path) -> dict | None:
    """The whole content of a file, checked; None if it does not exist."""
    if not path.exists():
        return None
    remedy = "take back the committed file (git checkout), or delete it and run the command that made it"
    try:
        content = json.loads(path.read_bytes())
        if {name: content[name] for name in FORMAT} != FORMAT:
            raise ResultsError(f"{path} must be {FORMAT}, got {content['format']!r}, {content['format_version']!r}")
        broken = [row for row in content["rows"] if row["checksum"] != checksum(content, row)]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        if isinstance(error, ResultsError):
            raise
        raise ResultsError(f"{path} must be a whole results file, got {error!r}; {remedy}") from error
    if broken:
        row = broken[0]
        raise ResultsError(
            f"rows of {path} must be as they were written, got {len(broken)} that were changed since, the first of "
            f"them {row.get('experiment')}, {row.get('sae')}, seed {row.get('seed')}; {remedy}"
        )
    return content


def append(chapter: str, scale: str, rows: Iterable[Row], folder: str | Path | None = None) -> None:
    """Add rows to a chapter's file. A row of the same experiment, configuration and seed is replaced.

    Args:
        rows: each with experiment, version, sae, seed, setting, metrics, noise, unmeasured, found, seconds, date, and,
            as dictionaries, configuration and environment.

    Raises:
        ResultsError: the file that is there cannot be read; it stays as it is.
        ValueError: a number is not finite, or a metric has the name of a setting.
    """
    path = file_of(chapter, scale, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        content = load(path) or FORMAT | {"chapter": chapter, "scale": scale, "configurations": {}, "environments": {}}
        known = {key(row): row for row in content.pop("rows", [])}
        for row in rows:
            if shared := set(row["setting"]) & set(row["metrics"]):
                raise ValueError(f"settings must not be called like metrics, got {', '.join(sorted(shared))}")
            row = dict(row)
            for name, table in {"configuration": "configurations", "environment": "environments"}.items():
                digest = sha256_of(row[name])
                content[table][digest] = row[name]
                row[name] = digest
            row["checksum"] = checksum(content, row)
            known[key(row)] = row
        write_bytes(path, as_text(content | {"rows": list(known.values())}).encode())


def as_text(content: dict) -> str:
    """JSON with a line a row, so that a change shows as the lines it concerns."""
    tables = []
    for name, value in content.items():
        if name == "rows":
            lines = ",\n".join(canonical(row) for row in value)
        elif isinstance(value, dict):
            lines = ",\n".join(f"{json.dumps(key)}: {canonical(part)}" for key, part in value.items())
        else:
            tables.append(f"{json.dumps(name)}: {json.dumps(value)}")
            continue
        opening, closing = "[]" if name == "rows" else "{}"
        tables.append(f"{json.dumps(name)}: {opening}\n{lines}\n{closing}")
    return "{\n" + ",\n".join(tables) + "\n}\n"


def key(row: Row) -> tuple:
    """What tells rows apart."""
    return row["experiment"], row["version"], row["configuration"], row["seed"]


def checksum(content: dict, row: Row) -> str:
    """Of a row with everything that it refers to."""
    parts = {name: value for name, value in row.items() if name != "checksum"}
    whole = content["configurations"][row["configuration"]], content["environments"][row["environment"]]
    return sha256_of([content["chapter"], content["scale"], *whole, parts])


def canonical(value: object) -> str:
    """JSON of one spelling; numbers that are not finite are refused."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(", ", ": "))


def sha256_of(value: object) -> str:
    """Of a JSON value; 16 hexadecimal digits."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:16]


# Where rows come from -------------------------------------------------------------------------------------------------


@lru_cache
def environment() -> dict[str, Any]:
    """What a row must say of the code and the machine: taken once, when a run starts."""
    versions = {}
    for name in VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return provenance() | {"versions": {"python": platform.python_version()} | versions}


def provenance(*folders: str) -> dict[str, Any]:
    """Commit, whether the sources differ from it, their hash, and the device.

    Args:
        folders: beside `sae_lib`, what must be as committed for the row not to count as dirty.
    """

    def git(*arguments: str) -> str:
        try:
            return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "sae_lib", *folders)
    return {
        "commit": git("rev-parse", "HEAD") or "unknown",
        "dirty": bool(changed),
        "sae_lib_sha256": library_sha256(),
        "device": device(),
    }


def library_sha256() -> str:
    """Of the source of `sae_lib`, names and contents."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "sae_lib").rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def device() -> str:
    """The accelerator's name, or the processor in words: its name, its cores, and which fast arithmetic it has."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    name = re.search(r"model name\s*: (.+)", text)
    flags = re.search(r"flags\s*: (.+)", text)
    known = ("avx512f", "avx512_bf16", "amx_bf16")
    fast = [flag for flag in known if flags and flag in flags[1].split()]
    return f"{name[1] if name else platform.machine()}, {os.cpu_count()} cores, {' '.join(fast) or 'no fast bf16'}"
