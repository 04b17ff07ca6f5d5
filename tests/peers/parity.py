"""Whether we give what other libraries' own functions give, on the same inputs: ``make parity``.

The file of a library (`sae_bench`) runs in that library's environment and writes inputs and outputs to a file. Such a
file is kept in ``tests/fixtures``, and ``test_<library>.py`` compares with it wherever tests run. Here it is written
anew, to ``_build/parity``, and compared with the one that is kept; then the same tests run on the new one. If the
library has changed its mind, and it is us who should follow, copy the new file over the kept one.

Metrics are compared, and saved SAEs: a library with `GIVEN` reads folders that we write for it, and we read its own.

To add a library: its file here, its tests there, a line in `LIBRARIES`, its name in the Makefile.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from peers.folders import cases
from peers.our_saes import TOLERANCE, apart, written

ROOT = Path(__file__).parents[2]
KEPT, NEW = ROOT / "tests/fixtures", ROOT / "_build/parity"
CHOSEN = "SAE_LIB_PARITY"
"""The environment variable that names the folder whose files tests read, in place of `KEPT`."""
LIBRARIES = {
    "sae_bench": "sae-bench",
    "sae_lens_evals": "sae-lens",
    "dictionary_learning_evaluation": "dictionary-learning",
    "sae_lens_formats": "sae-lens",
    "dictionary_learning_formats": "dictionary-learning",
    "sparsify_formats": "eai-sparsify",
    "sae_bench_custom": "sae-bench",
}
"""File and environment of each library."""
GIVEN = {
    "sae_lens_formats": ("sae_lens", "gemma_scope"),
    "dictionary_learning_formats": ("dictionary_learning",),
    "sparsify_formats": ("sparsify",),
}
"""The formats in which a library is given SAEs of ours."""
TRAINED = 1e-4
"""Of what is trained: a sum's rounding can decide a sign near zero, and L1 and Adam go by signs."""


def recorded(library: str, folder: Path | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What a library was given and what it computed, by name; and the versions it did so with."""
    path = Path(folder or os.environ.get(CHOSEN, KEPT)) / f"{library}.safetensors"
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def record(library: str) -> None:
    """Let the library compute anew.

    Raises:
        subprocess.CalledProcessError: if it cannot; what it said is on standard error.
    """
    shutil.rmtree(NEW / library, ignore_errors=True)
    (NEW / library).mkdir(parents=True)
    for format in GIVEN.get(library, ()):
        written(NEW / library / format, format)
    python = ROOT / f"_build/peers/{LIBRARIES[library]}/bin/python"
    quiet = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    subprocess.run(
        [python, "-m", f"peers.{library}", NEW / f"{library}.safetensors"],
        cwd=ROOT / "tests",
        env=os.environ | quiet | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "0"},
        stdout=subprocess.DEVNULL,
        check=True,
    )


def differences(kept: dict[str, Tensor], new: dict[str, Tensor]) -> list[str]:
    """Where two records differ by more than `TOLERANCE` or `TRAINED`, a line each."""
    found = [f"{name} is only in one of the two" for name in kept.keys() ^ new.keys()]
    for name in kept.keys() & new.keys():
        a, b, most = kept[name].double(), new[name].double(), TRAINED if ".trained." in name else TOLERANCE
        if a.shape != b.shape:
            found.append(f"{name} had shape {tuple(a.shape)}, now has {tuple(b.shape)}")
        elif not torch.allclose(a, b, rtol=most, atol=most, equal_nan=True):
            found.append(f"{name} differs by up to {(a - b).abs().max():.2g}")
    return sorted(found)


def file_of_tests(library: str) -> Path:
    """The file of tests that compares with its record."""
    (path,) = (ROOT / "tests").glob(f"*/test_{library}.py")
    return path


def table(found: dict[str, Tensor]) -> list[str]:
    """How far we are from a library, a line a folder: of codes, and of reconstructions."""
    with tempfile.TemporaryDirectory() as folder:
        rows = {name: apart(found, name, Path(folder) / name) for name in cases(found, "")}
    return [f"  {name:60} {codes:.0e} {reconstructions:.0e}" for name, (codes, reconstructions) in rows.items()]


def main() -> None:
    failed = False
    for library in LIBRARIES:
        record(library)
        new, now = recorded(library, NEW)
        kept, before = recorded(library, KEPT) if (KEPT / f"{library}.safetensors").exists() else ({}, {})
        changed = differences(kept, new)
        others = [f"({name} was {before.get(name)}, is {now[name]})" for name in now if before.get(name) != now[name]]
        print(f"{library}: of {len(new)} tensors, {len(changed)} differ from those kept", *changed, *others, sep="\n  ")
        print(*(table(new) if library in GIVEN else []), sep="\n", flush=True)
        command = [sys.executable, "-m", "pytest", "--quiet", file_of_tests(library)]
        ran = subprocess.run(command, cwd=ROOT, env=os.environ | {CHOSEN: str(NEW)})
        failed |= bool(changed or ran.returncode)
    sys.exit(failed)


if __name__ == "__main__":
    main()
