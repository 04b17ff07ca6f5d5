"""A training's history, handed over while it grows: ``train(..., watch=loggers.CSV("runs/topk"))``.

A row is handed over once, also when the training is stopped or killed and goes on from a checkpoint: it makes the rows
after the checkpoint again, with the same values, and those that were handed over before are left out. A logger serves
one training.
"""

from __future__ import annotations

import csv
import importlib
import io
import json
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterable
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from types import ModuleType
from typing import Any

from sae_lib.pocket.provenance import write_bytes, write_json

TIMED = "tokens_per_second"
"""The one column that is another in each part of a training."""
SHARED = ("tokens", TIMED)
"""Columns that are the same for all SAEs of a step."""


class CSV:
    """The history as ``history.csv``: a row a step and SAE, with the columns of `sae_lib.Run`.

    Args:
        folder: made if it is not there.

    Raises:
        ValueError: when called, if the file there begins as another training's does.
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / "history.csv"
        self.columns: list[str] = []
        self.rows = 0

    def __call__(self, history: list[dict[str, Any]]) -> None:
        """Write the rows that are new; the first time, and when a column is new, the whole file anew."""
        columns = list(dict.fromkeys(chain(self.columns, *history[self.rows :])))
        if self.rows == 0 and self.path.exists():
            with self.path.open(newline="") as file:
                first = next(csv.DictReader(file), {})
            must_begin_alike(self.path, {name: value for name, value in first.items() if value}, history[0])
        if columns != self.columns:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            header = dict(zip(columns, columns, strict=True))
            write_bytes(self.path, self.lines(columns, [header, *history]).encode())
        else:
            with self.path.open("a", newline="") as file:
                file.write(self.lines(columns, history[self.rows :]))
        self.columns, self.rows = columns, len(history)

    def lines(self, columns: list[str], rows: list[dict[str, Any]]) -> str:
        """Rows as the file has them; what a variant does not have stays empty."""
        text = io.StringIO()
        csv.DictWriter(text, columns, lineterminator="\n").writerows(rows)
        return text.getvalue()


class Steps(ABC):
    """What TensorBoard and Weights & Biases have in common: a step is handed over whole, and a file says how far."""

    package = module = ""

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / self.package
        self.service = installed(self.module, self.package)
        self.so_far: dict[str, Any] = {}
        self.run: Any = None

    def __call__(self, history: list[dict[str, Any]]) -> None:
        """Hand over the rows that are new, a step at a time."""
        mark = self.path / "handed-over.json"
        if not self.so_far:
            fresh = {"run": secrets.token_hex(4), "rows": 0, "first": beginning(history[0])}
            self.so_far = json.loads(mark.read_text()) if mark.exists() else fresh
            must_begin_alike(self.path, self.so_far["first"], history[0])
        new = history[self.so_far["rows"] :]
        if new and self.run is None:
            self.path.mkdir(parents=True, exist_ok=True)
            self.run = self.open(new[0]["step"])
        for step, rows in groupby(new, key=itemgetter("step")):
            self.write(step, of_step(rows))
        if new:
            self.so_far["rows"] = len(history)
            write_json(mark, self.so_far)

    @abstractmethod
    def open(self, step: int) -> Any:
        """What takes the steps, from this one on."""

    @abstractmethod
    def write(self, step: int, values: dict[str, float]) -> None:
        """Hand over one step."""


class TensorBoard(Steps):
    """Curves for ``tensorboard --logdir folder``, in ``folder/tensorboard``: a curve a column and SAE.

    Args:
        folder: made if it is not there.

    Raises:
        ValueError: if the package ``tensorboard`` is not installed; when called, if the curves there are another
            training's.
    """

    package, module = "tensorboard", "torch.utils.tensorboard"

    def open(self, step: int) -> Any:
        return self.service.SummaryWriter(self.path, purge_step=step)  # hides steps that a killed run began to write

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.run.add_scalar(name, value, step)
        self.run.flush()


class WeightsAndBiases(Steps):
    """A run of Weights & Biases, with its files in ``folder/wandb``; it ends with the process, or by ``run.finish()``.

    Where the environment says ``WANDB_MODE=offline`` nothing is sent: ``wandb sync`` does that later. A training that
    goes on continues the same run.

    Args:
        folder: made if it is not there; its name becomes the run's.
        settings: of ``wandb.init``, such as ``project`` or ``config``.

    Raises:
        ValueError: if the package ``wandb`` is not installed; when called, if the run there is another training's, or
            none can be opened, for example without having logged in.
    """

    package = module = "wandb"

    def __init__(self, folder: str | Path, **settings: Any):
        super().__init__(folder)
        self.settings = {"name": Path(folder).resolve().name} | settings

    def open(self, step: int) -> Any:
        same = {"id": self.so_far["run"], "resume": "allow", "reinit": "create_new"}
        try:
            return self.service.init(dir=self.path.parent, **same, **self.settings)
        except self.service.Error as error:
            raise ValueError(
                f"Weights & Biases must open a run, got: {error}; try wandb login, or WANDB_MODE=offline"
            ) from error

    def write(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)


LOGGERS = {"csv": CSV, "tensorboard": TensorBoard, "wandb": WeightsAndBiases}
"""By the word that ``python -m sae_lib train --log`` takes."""


def installed(module: str, package: str) -> ModuleType:
    """A module of a package that the library does not bring.

    Raises:
        ValueError: with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(
            f"this log needs the package {package}, which is not installed: pip install {package}"
        ) from None


def of_step(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """The rows of one step as named numbers: what the SAEs share bare, the rest as ``0-topk/loss``.

    >>> of_step([{"step": 3, "tokens": 40, "sae": 0, "variant": "topk", "loss": 0.5}])
    {'tokens': 40, '0-topk/loss': 0.5}
    """
    values = {}
    for row in rows:
        whose = f"{row['sae']}-{row['variant']}/"
        numbers = {name: value for name, value in row.items() if name not in ("step", "sae", "variant")}
        values |= {name if name in SHARED else whose + name: value for name, value in numbers.items()}
    return values


def beginning(row: dict[str, Any]) -> dict[str, str]:
    """A row as text, without the one column that depends on the machine's mood."""
    return {name: str(value) for name, value in row.items() if name != TIMED}


def must_begin_alike(path: Path, there: dict[str, Any], row: dict[str, Any]) -> None:
    """A training goes on in its own log, never in another's.

    Raises:
        ValueError: if the first rows differ.
    """
    if beginning(there) != beginning(row):
        raise ValueError(f"{path} must be new or of this training, got another's first row: name another folder")
