"""The feature clusters of all neurons of a model: a file a layer, none of them done twice.

GPT-2 small has 36,864 neurons. A layer of 3,072 over 10,000 texts of 1,024 tokens takes about 200 MB while it is read
(a value and a position a text and neuron), up to 1 GB for what was read at its examples, and leaves a file of 12 MB.
A run that is stopped goes on with the first layer that has no file. Chapter `neuron_embeddings`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from tqdm.auto import tqdm

from sae_lib.models import LanguageModel
from sae_lib.neuron_embeddings import Units, collect, cosine_distances, cut, embeddings, neurons, proxies, tree
from sae_lib.pocket.provenance import write_bytes
from sae_lib.records import Record


def write_model(model: LanguageModel, texts: Sequence[str | Record], folder: str | Path, most: int = 100) -> list[Path]:
    """`write_clusters` of the neurons of each layer, from the first; the files' paths."""
    paths = [Path(folder) / f"layer-{layer}.safetensors" for layer in range(model.n_layers)]
    for layer, path in enumerate(tqdm(paths, desc="layers", unit="layer", delay=2)):
        write_clusters(neurons(model, layer), texts, path, most)
    return paths


def write_clusters(units: Units, texts: Sequence[str | Record], path: str | Path, most: int = 100) -> bool:
    """Collect and cluster all units, and write them as one safetensors file, whole or not at all.

    The file has ``maximum`` and ``frequency`` (units); ``document``, ``position``, ``value`` and ``cluster`` (units,
    most), -1 or 0 where there are fewer; ``tree`` (units, most - 1, 3), scipy's without the sizes, NaN where there are
    fewer; and each of the `proxies` (units), at a threshold of 0.5.

    Args:
        units: what `neurons` or `latents` returns.
        texts: what `collect` takes.
        path: of the file; one that holds these units over these texts is left as it is.
        most: examples a unit.

    Returns:
        whether there was anything to do.

    Raises:
        ValueError: if the file holds something else.
    """
    path = Path(path)
    words = [text.text if isinstance(text, Record) else text for text in texts]
    weights = hashlib.sha256(units.weights.cpu().numpy().tobytes()).hexdigest()
    written = hashlib.sha256(json.dumps(words).encode()).hexdigest()
    identity = {"units": units.name, "weights": weights, "texts": written, "most": str(most)}
    if path.exists():
        with safe_open(path, "pt") as file:
            held = file.metadata() or {}
        if held != identity:
            said = ", ".join(name for name in identity if held.get(name) != identity[name])
            raise ValueError(f"{path} must hold the clusters of {units.name}, got other {said}: choose another path")
        return False
    examples = collect(units, words, most=most)
    count = len(examples.maximum)
    cluster = torch.full((count, most), -1, dtype=torch.int16)
    merges = torch.full((count, most - 1, 3), torch.nan)
    found = []
    for unit in tqdm(range(count), desc=units.name, unit="unit", leave=False, delay=2):
        h = examples.of(unit)[3]
        distances = cosine_distances(embeddings(h, units.weights[unit].cpu()))
        one = tree(distances)
        labels = cut(one)[: len(h)]
        cluster[unit, : len(h)] = torch.from_numpy(labels)
        merges[unit, : len(one)] = torch.from_numpy(one[:, :3]).float()
        found.append(proxies(distances, labels))
    tensors = {name: getattr(examples, name) for name in ("maximum", "frequency", "value")}
    tensors |= {name: getattr(examples, name).int() for name in ("document", "position")}
    tensors |= {name: torch.tensor([float(one[name]) for one in found]) for name in found[0]}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, save(tensors | {"cluster": cluster, "tree": merges}, metadata=identity))
    return True
