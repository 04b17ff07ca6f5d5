"""Before a run of hours: can it work here, what will it take, and what will it write? One screen; nothing is trained.

Tried are the model's ``config.json``, which of a gated model only those may read who may read its weights, and the
first text of each data set. Sizes and hours are those of `sae_lib.plan`, added up over what is still to do. They are
rough: hours count products at `UTILISATION` of a data sheet's peak, or of a product that is timed here where there is
no data sheet (the model in its own type, SAEs in float32), and leave out the measurements. Of two numbers the first is
for training everything once, the second for as many rounds as a search may take.

Chapter `gemma`.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sae_lib import reproduce
from sae_lib.data import load_texts
from sae_lib.experiments import UNTRAINED, Experiment, Planned
from sae_lib.hub import imported
from sae_lib.matching import ROUNDS
from sae_lib.measures import CONSISTENCY
from sae_lib.metrics.sparse_probing import labelled_texts
from sae_lib.models import ASSETS
from sae_lib.plan import DEVICES, Device, Plan, model_shape, plan

UTILISATION = 0.4
"""Of the peak: assumed."""
MOST_HOURS = 2000
"""What takes longer, even if everything is trained once, does not work: twelve weeks."""
STORED, ROW, TEXT = 4, 4000, 6000
"""Bytes of a parameter on the Hub, of a row of results, and of a text: about, or at most."""

Todo = Sequence[tuple[Experiment, int, list[Planned]]]


class Check(NamedTuple):
    """A line of the screen.

    Attributes:
        name: what was looked at.
        said: what was found.
        remedy: what to do about it, where the run cannot work; else empty.
    """

    name: str
    said: str
    remedy: str = ""


def preflight(todo: Todo, path: Path) -> list[Check]:
    """What is to do and what it takes, line by line.

    Args:
        todo: experiments with a seed and the SAEs that have no row yet; `sae_lib.reproduce.unfinished` finds them.
        path: of the results file.
    """
    saes = sum(len(part) for *_, part in todo)
    names = ", ".join(dict.fromkeys(f"{one.name} ({len(one.saes)})" for one, *_ in todo))
    lines = [
        Check("to do", f"{saes} rows: {names}; a row is an SAE and a seed" if todo else "nothing, all rows are there")
    ]
    grounds = [one.ground for one, *_ in todo if "model" in one.ground]
    models = {name: model_access(name) for name in dict.fromkeys(ground["model"] for ground in grounds)}
    lines += [check for check, _ in models.values()]
    if not any(line.remedy for line in lines):  # without a network, each further try takes half a minute
        sources = dict.fromkeys((ground["texts"], ground.get("limit")) for ground in grounds)
        labels = {str(ground["labelled"]): ground["labelled"] for ground in grounds if "labelled" in ground}
        lines += [texts_access(*source) for source in sources] + [labels_access(each) for each in labels.values()]
    if not any(line.remedy for line in lines):
        on_models = [(one, part) for one, _, part in todo if "model" in one.ground]
        units = [unit(one.ground, models[one.ground["model"]][1], part) for one, part in on_models]
        if units := [each for each in units if each]:
            lines += resources(units, sum(weights(name)[1] for name in models))
    lines.append(Check("writes", f"{path}, about {saes * ROW / 1e6:.1f} MB more; until then, {reproduce.WORK}/"))
    return lines


def table(checks: Sequence[Check]) -> str:
    """The lines as text, remedies under what they are for."""
    rows = []
    for name, said, remedy in checks:
        rows += [f"{name:10}{said}", *([f"{'':10}cannot work: {remedy}"] if remedy else [])]
    return "\n".join(rows)


# What is read ---------------------------------------------------------------------------------------------------------


def model_access(name: str) -> tuple[Check, Path | None]:
    """Whether a model can be opened, by its ``config.json`` alone; and the folder of that file."""
    for folder in (ASSETS / name, Path(name).expanduser()):
        if (folder / "config.json").is_file():
            return Check("model", f"{name}: here"), folder
    hub = imported()
    try:
        config = Path(hub.hf_hub_download(name, "config.json"))
    except hub.errors.GatedRepoError:
        remedy = f"accept its terms at https://huggingface.co/{name}, then log in: hf auth login"
        return Check("model", f"{name}: gated, and not open to you", remedy), None
    except (hub.errors.RepositoryNotFoundError, hub.errors.HFValidationError):
        return Check("model", f"{name}: not on the Hub", "check the name; a private one needs: hf auth login"), None
    except OSError:  # offline, or no network
        why = "HF_HUB_OFFLINE is set" if hub.constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
        remedy = "go online, or name a folder that holds the model: --model FOLDER --out FOLDER"
        return Check("model", f"{name}: not in the cache, and {why}", remedy), None
    here, size = weights(name, config.parent)
    said = "weights in the cache" if here else f"weights to be downloaded, at most {size / 1e9:.1f} GB"
    offline = hub.constants.HF_HUB_OFFLINE and not here
    return Check("model", f"{name}: open to you; {said}", "unset HF_HUB_OFFLINE" if offline else ""), config.parent


def weights(name: str, config: Path | None = None) -> tuple[bool, int]:
    """Whether a model's weights are here, and the bytes to download if they are not."""
    if any((folder / "config.json").is_file() for folder in (ASSETS / name, Path(name).expanduser())):
        return True, 0
    files = ("model.safetensors", "model.safetensors.index.json")
    if any(isinstance(imported().try_to_load_from_cache(name, file), str) for file in files):
        return True, 0
    return False, STORED * model_shape(config or name).parameters


def texts_access(source: str, limit: int | None) -> Check:
    """Whether texts can be read: the first of them is."""
    try:
        load_texts(source, "train", limit=1)
    except (ValueError, OSError, ImportError) as error:
        return Check(
            "texts", f"{source}: {first_line(error)}", "go online, or name others: --texts SOURCE --out FOLDER"
        )
    streamed = source != "pocket" and not Path(source).is_file()
    size = (
        f"; up to {limit:,} of them are held in memory, about {limit * TEXT / 1e9:.1f} GB" if streamed and limit else ""
    )
    return Check("texts", f"{source}: readable{size}")


def labels_access(labelled: dict[str, Any]) -> Check:
    """Whether labelled texts can be read; they are small, and are downloaded."""
    try:
        labelled_texts(**labelled | {"limit": 1})
    except (ValueError, OSError, ImportError) as error:
        return Check("labels", f"{labelled['name']}: {first_line(error)}", "go online")
    return Check("labels", f"{labelled['name']}: readable")


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# What it takes --------------------------------------------------------------------------------------------------------


class Unit(NamedTuple):
    """An experiment and a seed: what its SAEs take together.

    Attributes:
        plans: of each SAE, with how often it is trained at least and at most, and whether its steps are dense.
        dtype: of the model.
        streams: how often the model reads the texts at least and at most, one that is differentiated counting twice.
        every: FLOPs of the whole model for a token, over those up to the site.
    """

    plans: list[tuple[Plan, int, int, bool]]
    dtype: str
    streams: tuple[float, float]

    @property
    def memory(self) -> int:
        """Bytes, if all are trained at once and each step is dense."""
        first, widest = self.plans[0][0].memory, max(plan.d_sae for plan, *_ in self.plans)
        shared = sum(first[part] for part in ("model", "one block's forward, about", "buffer of activations"))
        own = sum(
            plan.memory[part] for plan, *_ in self.plans for part in ("weights of the SAEs", "gradients", "optimiser")
        )
        return shared + own + int(6.3 * 4 * self.plans[0][0].batch_size * widest)

    @property
    def disk(self) -> tuple[int, int]:
        """What checkpoints take, in bytes, three of the first round and, at most, two more of each further one."""
        buffer = self.plans[0][0].memory["buffer of activations"]
        one = [plan.disk["three checkpoints"] // 3 - buffer for plan, *_ in self.plans]
        rounds = [most - 1 for _, _, most, _ in self.plans]
        further = sum(size * count for size, count in zip(one, rounds, strict=True)) + buffer * max(rounds)
        return 3 * (sum(one) + buffer), 3 * (sum(one) + buffer) + 2 * further

    def hours(self, device: Device) -> tuple[float, float]:
        """With every search done at once, and with the most rounds."""
        arithmetic = "bf16" if self.dtype != "float32" else "fp32"
        reading = max(plan.hours(device, arithmetic, UTILISATION)["model"] for plan, *_ in self.plans)
        low, high = (reading * count for count in self.streams)
        for plan_of, least, most, dense in self.plans:
            step = "dense step" if dense else "sparse step"
            own = plan_of.hours(device, "fp32", UTILISATION, step)["saes"]
            low, high = low + own * least, high + own * most
        return low, high


def unit(ground: dict[str, Any], config: str | Path, saes: Sequence[Planned]) -> Unit | None:
    """The plans of what is trained; None if nothing is."""
    shape, trained = model_shape(config), [sae for sae in saes if sae.configuration["variant"] not in UNTRAINED]
    if not trained:
        return None
    dtype, context = ground.get("dtype", "float32"), ground.get("context") or shape.context
    plans, streams = [], {}
    for sae in trained:
        arguments = sae.configuration["arguments"]
        twins = 2 if CONSISTENCY in sae.configuration["measures"] else 1
        d_sae = arguments["d_sae"]
        k = min(d_sae, round(arguments.get("k") or sae.setting.get("target") or 64))
        made = plan(
            config, d_sae, k, ground["site"], sae.tokens, 1, ground["batch_size"], context=context, model_dtype=dtype
        )
        most = (ROUNDS if sae.search else 1) + twins - 1
        plans.append((made, twins, most, "k" not in arguments))
        reading = "grad" if ground.get("grad") else sae.reading
        whole = 2 * (shape.flops(shape.layers, 0, context) + 2 * shape.d_model * shape.vocabulary)  # there and back
        cost = whole / made.flops["model"] if reading == "grad" else 1.0
        low, high = streams.get((sae.tokens, reading), (0.0, 0.0))
        streams[sae.tokens, reading] = max(low, cost * twins), max(high, cost * most)
    longest = max(sae.tokens for sae in trained)
    totals = [sum(tokens / longest * cost[end] for (tokens, _), cost in streams.items()) for end in (0, 1)]
    return Unit(plans, dtype, (totals[0], totals[1]))


def resources(units: Sequence[Unit], download: int) -> list[Check]:
    """Memory, disk and hours, against what is there."""
    needed, there, where = max(unit.memory for unit in units), *free_memory()
    said = f"{where}: {there / 1e9:.1f} GB free; about {needed / 1e9:.1f} GB needed" if there else f"{where}: unknown"
    remedy = "free memory, take a larger GPU, or fewer latents: --d-sae N --out FOLDER"
    lines = [Check("memory", said, remedy if there and needed > there else "")]
    low, high = (max(sizes) + download for sizes in zip(*(unit.disk for unit in units), strict=True))
    work = existing(reproduce.WORK)
    free = shutil.disk_usage(work).free
    said = f"{free / 1e9:.1f} GB free at {work}; {low / 1e9:.1f} to {high / 1e9:.1f} GB for checkpoints and download"
    lines.append(Check("disk", said, "free some, or let _build be a link to a larger disk" if low > free else ""))
    device, sheet = this_device()
    low, high = (sum(hours) for hours in zip(*(unit.hours(device) for unit in units), strict=True))
    said = f"{low:,.1f} to {high:,.1f}, at {UTILISATION:.0%} of {sheet}; measurements not counted"
    remedy = f"more than {MOST_HOURS:,} even at best: take a GPU, --seeds 1, or --tokens N --out FOLDER"
    return [*lines, Check("hours", said, remedy if low > MOST_HOURS else "")]


def free_memory() -> tuple[int, str]:
    """Bytes that are free where models run, and where that is; 0 if it is not known."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0], torch.cuda.get_device_name()
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), "no GPU, CPU"
    except (OSError, StopIteration):
        return 0, "no GPU, CPU"


def existing(path: Path) -> Path:
    """The nearest folder above that is there."""
    return path if path.is_dir() else existing(path.parent)


def this_device() -> tuple[Device, str]:
    """The data sheet of this GPU; or, where there is none, what a product and a copy reach here."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    for name, known in DEVICES.items():
        if name.replace("-", " ") in gpu.lower().replace("-", " "):
            return known, f"the data sheet's peaks of {name.upper()}"
    place = "cuda" if gpu else "cpu"
    a, b = (torch.ones(1024, 1024, device=place) for _ in range(2))
    product = 2 * 1024**3 / seconds(lambda: a @ b) / 1e12
    copy = 2 * a.nbytes / seconds(a.clone) / 1e9
    sheet = Device(fp32=product, tf32=product, bf16=product, memory=0, bandwidth=copy)
    return sheet, f"what a product reaches on this {gpu or f'CPU with {os.cpu_count()} cores'}"


def seconds(run: Callable[[], object]) -> float:
    """The quickest of some runs, on whatever device."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)
