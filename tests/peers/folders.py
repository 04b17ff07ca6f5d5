"""Folders of saved SAEs as tensors of a record, and back; and the activations on which they are compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

D_IN, D_SAE, K, TOKENS = 4, 12, 3, 16


def activations() -> Tensor:
    x = 0.4 * np.random.default_rng(0).standard_normal((TOKENS, D_IN)) + 0.1
    return torch.tensor(x, dtype=torch.float32)


def random_weights(seed: int, free: bool = False) -> dict[str, Tensor]:
    """Weights in our layout; the rows of W_dec have norm 1, or any norm if `free`."""
    random = np.random.default_rng(seed)
    W_dec = random.standard_normal((D_SAE, D_IN))
    W_dec *= (random.uniform(0.5, 2, (D_SAE, 1)) if free else 1) / np.linalg.norm(W_dec, axis=1, keepdims=True)
    found = {"W_dec": W_dec, "W_enc": W_dec.T + 0.2 * random.standard_normal((D_IN, D_SAE))}
    for name in ("b_enc", "b_gate", "b_mag", "r_mag"):
        found[name] = 0.1 * random.standard_normal(D_SAE)
    found |= {"b_dec": 0.4 * random.standard_normal(D_IN), "threshold": random.uniform(0.1, 0.3, D_SAE)}
    return {name: torch.tensor(value, dtype=torch.float32) for name, value in found.items()}


def packed(name: str, folder: Path) -> dict[str, Tensor]:
    """All that is in a folder: JSON as its bytes, and the tensors of all other files."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".json":
            found[path.name] = torch.tensor(list(path.read_bytes()), dtype=torch.uint8)
        elif path.suffix == ".npz":
            with np.load(path) as arrays:
                found |= {f"{path.name}:{key}": torch.tensor(arrays[key]) for key in arrays}
        else:
            tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
            found |= {f"{path.name}:{key}": value for key, value in tensors.items()}
    return {f"{name}/{key}": value for key, value in found.items()}


def unpacked(found: dict[str, Tensor], name: str, folder: Path) -> Path:
    """Write the folder that was `packed` under this name."""
    folder.mkdir(parents=True)
    files: dict[str, dict[str, Tensor]] = {}
    for place, tensor in found.items():
        if place.startswith(f"{name}/"):
            file, _, key = place.removeprefix(f"{name}/").partition(":")
            files.setdefault(file, {})[key] = tensor
    for file, tensors in files.items():
        path = folder / file
        if path.suffix == ".json":
            path.write_bytes(bytes(tensors[""].tolist()))
        elif path.suffix == ".npz":
            np.savez(path, **{key: value.numpy() for key, value in tensors.items()})
        elif path.suffix == ".safetensors":
            save_file(tensors, path)
        else:
            torch.save(tensors, path)
    return folder


def cases(found: dict[str, Tensor], start: str) -> list[str]:
    """The names that begin so, of SAEs in a record: those of which the codes are there."""
    return sorted({name.removesuffix(".z") for name in found if name.startswith(start) and name.endswith(".z")})
