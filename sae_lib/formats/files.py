"""Reading other libraries' files. What is missing, unknown or of another kind is said, and nothing executes."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: if the file is none.
    """
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path.name} must be JSON, got {path}: {error}; copy it anew") from None
    if not isinstance(found, dict):
        raise ValueError(
            f"{path.name} must say its settings as a JSON object, got {str(found)[:80]} in {path}; copy it anew"
        )
    return found


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, those of floating point in 32 bits.

    Raises:
        ValueError: if the file is none.
    """
    try:
        return floats(load_safetensors(path.read_bytes()))
    except SafetensorError as error:
        raise ValueError(f"{path.name} must be safetensors, got {path}: {error}; copy it anew") from None


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors that torch saved, those of floating point in 32 bits; torch reads tensors alone, and runs nothing.

    Raises:
        ValueError: if the file holds anything else.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, LookupError, ValueError):
        reason = "it holds more than tensors, or is damaged"
    else:
        if isinstance(found, Mapping) and all(isinstance(value, Tensor) for value in found.values()):
            return floats(found)
        reason = "it holds more than a table of tensors, like a checkpoint of training does"
    raise ValueError(f"{path.name} must hold tensors and nothing else, got {path}: {reason}; save its state_dict alone")


def floats(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}


def only(tensors: Mapping[str, Tensor], names: Collection[str], where: str) -> dict[str, Tensor]:
    """`tensors`, if they have exactly these names.

    Raises:
        ValueError: if one is missing, or unknown: what it would do to codes is then unknown too.
    """
    missing, unknown = sorted(set(names) - set(tensors)), sorted(set(tensors) - set(names))
    if missing or unknown:
        wrong = [f"without {', '.join(missing)}"] * bool(missing) + [f"with {', '.join(unknown)}"] * bool(unknown)
        raise ValueError(f"the weights of {where} must be {', '.join(sorted(names))}, got some {' and '.join(wrong)}")
    return dict(tensors)
