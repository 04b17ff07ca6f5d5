"""Checkpoints of a training run: whole or absent, and checked to the last byte before one of them is used.

    runs/topk/checkpoint/000000000409600/     named after the tokens trained on
        state.safetensors   weights in the training's units, optimisers, generators, position and buffer of the stream
        run.json            whose run it is, the global scale, counters, history
        SHA256SUMS          of these two; `sha256sum --check SHA256SUMS` reads it too

A checkpoint is written into a hidden folder beside its place, flushed to the disk and renamed; only then is an old one
removed, and two stay. Nothing is unpickled. What is not kept, because nothing here draws from them: torch's, NumPy's
and Python's global generators.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from sae_lib.distributed import greatest, rank
from sae_lib.interruption import Interruption
from sae_lib.sae import SAE, whole
from sae_lib.state import by_rows, differences, identity, restore, tensors_of

FORMAT = {"format": "sae_lib checkpoint", "format_version": 1}
STATE, RUN, SUMS = "state.safetensors", "run.json", "SHA256SUMS"
NAME = re.compile(r"\d{15}(-finished)?")
KEEP = 2
"""Whole checkpoints that stay."""
EVERY, PARTS = 10_000_000, 10
"""By default a run writes a checkpoint after each tenth of its tokens, at the latest after 10 million."""


class CheckpointError(ValueError):
    """A checkpoint cannot be written, or must not be used: says which file, why, and what is still safe."""


class Saved(NamedTuple):
    """A whole checkpoint: its folder, what ``run.json`` says, and the tensors by name."""

    path: Path
    run: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def counters(self) -> dict[str, Any]:
        """Tokens, scale, history and whatever else `Checkpoints.write` was given."""
        return self.run["counters"]

    @property
    def finished(self) -> bool:
        """Whether it stands at the run's end."""
        return self.path.name.endswith("-finished")

    @property
    def stream(self) -> dict[str, Tensor]:
        """What the stream's `load_state_dict` takes."""
        return {
            name.removeprefix("stream."): value for name, value in self.tensors.items() if name.startswith("stream.")
        }

    def restore(self, saes: Sequence[SAE], optimisers: Sequence[torch.optim.Optimizer]) -> None:
        """Put weights, buffers, generators and the optimisers' state back, each in the memory layout that it had.

        Raises:
            CheckpointError: if names or shapes are not those of these SAEs; none of them is touched then.
        """
        try:
            restore({name: v for name, v in self.tensors.items() if not name.startswith("stream.")}, saes, optimisers)
        except ValueError as error:
            raise CheckpointError(f"{self.path / STATE}: {error}; pass checkpoint= another folder") from error
        for sae, trained_on in zip(saes, self.run["trained_on"], strict=True):
            sae.trained_on = list(trained_on)
        self.tensors.clear()  # they are as large as the run itself


class Checkpoints:
    """The checkpoints of one run, in one folder. As a context, it makes signals wait for `stop`, and errors say what is
    still safe.

    Args:
        folder: made if it is missing; what else lies in it is left alone.
        saes: what is trained, as given.
        stream: what it is trained on.
        tokens: length of the run.
        every: tokens between two checkpoints, at least 1; None for a tenth of the run, at most 10 million.

    Raises:
        ValueError: if the stream cannot go on where it stood.
        CheckpointError: if nothing can be written to the folder.
    """

    def __init__(self, folder: str | Path, saes: Sequence[SAE], stream: Iterable, tokens: int, every: int | None):
        missing = [name for name in ("state_dict", "load_state_dict", "fingerprint") if not hasattr(stream, name)]
        if missing:
            raise ValueError(
                f"a stream must have state_dict, load_state_dict and fingerprint for checkpoints, got "
                f"{type(stream).__name__} without {', '.join(missing)}; use sae_lib.Activations(model, site, "
                "inputs=batches), or leave checkpoint= out"
            )
        self.folder, self.saes = Path(folder), saes
        self.source = stream  # whose position is kept; `train` puts its own iterator here
        self.identity = identity(saes, stream, tokens)
        self.every = max(1, min(EVERY, tokens // PARTS)) if every is None else whole("checkpoint_every", every)
        self.length = tokens
        self.tokens = 0  # where the last whole checkpoint stands
        self.interruption = Interruption()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob(".*") if not rank() else ():  # by a process that was killed while it wrote
                if NAME.fullmatch(left.name[1:].split(".")[0]):
                    shutil.rmtree(left)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise CheckpointError(
                f"checkpoint must be a folder that can be written to, got {self.folder} ({reason(error)}); "
                f"{self.safe()}; pass another folder"
            ) from error

    def all(self) -> list[Path]:
        """The checkpoints of the folder, the newest last."""
        return sorted(path for path in self.folder.glob("*") if NAME.fullmatch(path.name))

    def safe(self) -> str:
        """What a run that stops now can go on from."""
        if not self.tokens:
            return f"{self.folder} holds no checkpoint of this run yet"
        return f"{self.folder} still holds a whole checkpoint, after {self.tokens:,} tokens"

    # Reading ----------------------------------------------------------------------------------------------------------

    def newest(self) -> Saved | None:
        """The newest checkpoint, if there is one: whole, and of this run.

        Raises:
            CheckpointError: if it is damaged, or of another run.
        """
        if not (paths := self.all()):
            return None
        *older, path = paths
        try:
            saved = read(path)
        except CheckpointError as error:
            good = [other for other in older if is_whole(other)]
            remedy = (
                f"{good[-1]} is whole: remove {path}, and the same call goes on from there"
                if good
                else f"no other checkpoint of {self.folder} is whole: remove {path}, and the same call starts anew"
            )
            raise CheckpointError(f"{error}; {remedy}") from error
        differ = differences(saved.run["identity"], self.identity)
        said = "; ".join(f"{name} is {there} there and {here} here" for name, (there, here) in differ.items())
        if differ and (saved.finished or not all(name.endswith(".learning_rate") for name in differ)):
            raise CheckpointError(
                f"{path} must be a checkpoint of this run, but {said}; it was left as it is: pass checkpoint= another "
                "folder, or what that run had"
            )
        if differ and not rank():
            tqdm.write(f"goes on from {path} although {said}", file=sys.stderr)
        self.tokens = saved.counters["tokens"]
        if not rank():
            does = "it is finished: returned is what was saved" if saved.finished else "goes on from there"
            tqdm.write(f"{path} holds this run after {self.tokens:,} tokens; {does}", file=sys.stderr)
        return saved

    # Writing ----------------------------------------------------------------------------------------------------------

    def due(self, tokens: int) -> bool:
        """Whether a checkpoint is to be written now, after `tokens`; one comes at the end anyway."""
        return tokens < self.length and (self.asked() or tokens - self.tokens >= self.every)

    def write(self, counters: dict[str, Any], optimisers: Sequence, finished: bool = False) -> None:
        """Write a checkpoint; then keep the newest two.

        Args:
            counters: what ``run.json`` keeps of the run: tokens, scale, history and whatever else; JSON values.
            optimisers: one an SAE.
            finished: whether this is the end, so that the stream's state is not needed any more.

        Raises:
            CheckpointError: if weights are not finite, or the disk does not take them; the last checkpoint stays.
        """
        for place, sae in enumerate(self.saes):
            extremes = [extreme for parameter in sae.parameters() for extreme in by_rows(parameter.detach()).aminmax()]
            if not torch.stack(extremes).isfinite().all():
                raise CheckpointError(
                    f"weights must stay finite, got NaN or infinity in sae {place} ({sae.name}) after "
                    f"{counters['tokens']:,} tokens; {self.safe()}; set sae.learning_rate lower"
                )
        tensors = tensors_of(self.saes, optimisers)
        if not finished:
            tensors |= {f"stream.{name}": value for name, value in self.source.state_dict().items()}
        path = self.folder / f"{counters['tokens']:015d}{'-finished' if finished else ''}"
        trained_on = [sae.trained_on for sae in self.saes]
        run = {"name": path.name, "identity": self.identity, "trained_on": trained_on, "counters": counters}
        new = None
        try:
            new = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=self.folder))
            save_file({name: value.contiguous() for name, value in tensors.items()}, new / STATE)
            (new / RUN).write_text(json.dumps(FORMAT | run) + "\n")
            (new / SUMS).write_text(sums(new))
            for part in (new / STATE, new / RUN, new / SUMS, new):
                flush(part)
            new.chmod(0o755)
            new.rename(path)
            flush(self.folder)
            self.tokens = counters["tokens"]
        except (OSError, SafetensorError) as error:
            needed = sum(value.nbytes for value in tensors.values()) / 1e6
            free = shutil.disk_usage(self.folder).free / 1e6 if self.folder.is_dir() else 0
            raise CheckpointError(
                f"{path} must be written, but was not ({reason(error)}): it takes {needed:,.1f} MB, {free:,.1f} MB are "
                f"free; {self.safe()}; once it can be written, the same call goes on from there"
            ) from error
        finally:
            if new is not None:
                shutil.rmtree(new, ignore_errors=True)
        for old in self.all()[:-KEEP]:
            with suppress(OSError):  # what cannot be removed does no harm
                hidden = old.rename(old.with_name(f".{old.name}.old"))
                shutil.rmtree(hidden, ignore_errors=True)

    # Stopping ---------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Checkpoints:
        self.interruption.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        self.interruption.__exit__()
        if error is not None and self.interruption.signal is None and not isinstance(error, CheckpointError):
            goes_on = "; the same call goes on from there, also with another sae.learning_rate" if self.tokens else ""
            error.add_note(self.safe() + goes_on)

    def asked(self) -> bool:
        """Whether a signal has asked this process, or another of the run, to stop."""
        if found := greatest(self.interruption.signal or 0):
            self.interruption.signal = found
        return bool(found)

    def stop(self) -> None:
        """Stop, if a signal has asked for it: KeyboardInterrupt, or for SIGTERM exit with status 143."""
        if self.asked():
            self.interruption.act(f"stopped as asked; {self.safe()}; the same call goes on from there")


def read(path: Path) -> Saved:
    """A checkpoint, if it is whole."""
    try:
        expected = sums(path)
        if (path / SUMS).read_bytes() != expected.encode():
            known = (path / SUMS).read_text(errors="replace")
            wrong = [line.split()[1] for line in expected.splitlines() if line not in known] or [SUMS]
            raise CheckpointError(f"{path / wrong[0]} is damaged: its SHA-256 is not the one in {SUMS}")
        run = json.loads((path / RUN).read_text())
        if {key: run.get(key) for key in FORMAT} != FORMAT:
            raise CheckpointError(f"{path / RUN} must say {FORMAT}, got {str(run)[:80]}; use the version that wrote it")
        if run["name"] != path.name:
            raise CheckpointError(f"{path} must have the name that it was written under, {run['name']}: rename it")
        return Saved(path, run, load_file(path / STATE))
    except OSError as error:
        raise CheckpointError(f"{error.filename or path} cannot be read ({reason(error)})") from error
    except (KeyError, TypeError, AttributeError, ValueError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} must hold a checkpoint, but {type(error).__name__}: {error}") from error


def is_whole(path: Path) -> bool:
    """Whether a checkpoint can be read."""
    try:
        return bool(read(path))
    except CheckpointError:
        return False


def sums(path: Path) -> str:
    """What ``SHA256SUMS`` says of a whole checkpoint."""
    lines = []
    for name in (STATE, RUN):
        with (path / name).open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n")
    return "".join(lines)


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reason(error: Exception) -> str:
    """An error of the system in words."""
    return getattr(error, "strerror", None) or str(error)
