"""What a training run is made of: its identity, and every tensor that training changes, by name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sae_lib.sae import SAE

SETTINGS = ("site", "d_in", "batch_size", "seed", "grad", "buffer_size", "forward_tokens", "context")
"""Attributes of a stream that decide what it yields, where it has them."""


def identity(saes: Sequence[SAE], stream: Any, tokens: int) -> dict[str, Any]:
    """What makes a run this run and no other, as JSON values.

    A stream's `identity`, where it has one, tells what it reads. Left out are the weights that the SAEs came with: the
    same call goes on, whatever they are by then.
    """
    found = {
        "saes": [
            {
                "variant": sae.name,
                "class": type(sae).__qualname__,
                "config": sae.config(),
                "learning_rate": sae.learning_rate,
                "betas": sae.betas,
                "clip": sae.clip,
                "frozen": [name for name, parameter in sae.named_parameters() if not parameter.requires_grad],
            }
            for sae in saes
        ],
        "tokens": tokens,
        "stream": {
            "type": type(stream).__name__,
            "fingerprint": stream.fingerprint,
            **{name: getattr(stream, name) for name in SETTINGS if hasattr(stream, name)},
            **getattr(stream, "identity", {}),
        },
        "versions": {"torch": torch.__version__.split("+")[0]},
    }
    return json.loads(json.dumps(found))


def differences(there: dict[str, Any], here: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What two identities disagree in: dotted name -> the two values, "missing" where one has none."""
    there, here = flat(there), flat(here)
    pairs = {name: (there.get(name, "missing"), here.get(name, "missing")) for name in [*there, *here]}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested dicts and lists of dicts as one dict, the keys joined by dots."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {name: value}
    return {
        key: item
        for part, inner in value.items()
        for key, item in flat(inner, f"{name}.{part}" if name else str(part)).items()
    }


def tensors_of(saes: Sequence[SAE], optimisers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Every tensor that training changes, by name; views, no copies."""
    found = {}
    for place, sae in enumerate(saes):
        found |= {f"sae.{place}.{name}": value for name, value in sae.state_dict().items()}
        found[f"generator.{place}"] = sae.generator.get_state()
    for prefix, optimiser, parameter in optimised(saes, optimisers):
        found |= {prefix + key: value for key, value in optimiser.state.get(parameter, {}).items()}
    return {name: by_rows(value.detach()) for name, value in found.items()}


@torch.no_grad()
def restore(stored: dict[str, Tensor], saes: Sequence[SAE], optimisers: Sequence[torch.optim.Optimizer]) -> None:
    """The contrary of `tensors_of`, into SAEs and new optimisers; each tensor keeps its memory layout.

    Raises:
        ValueError: if a name, a shape or a type is not that of these SAEs; none of them is touched then.
    """
    places = tensors_of(saes, optimisers)
    for prefix, optimiser, parameter in optimised(saes, optimisers):
        for key, value in stored.items():
            if key.startswith(prefix):
                alike = value.shape == by_rows(parameter).shape
                place = torch.empty_like(parameter) if alike else value.to(parameter.device, copy=True)
                optimiser.state[parameter][key.removeprefix(prefix)] = place
                places[key] = by_rows(place)
    kinds = [{name: (value.shape, value.dtype) for name, value in tensors.items()} for tensors in (places, stored)]
    if wrong := sorted({name for name, _ in kinds[0].items() ^ kinds[1].items()}):
        raise ValueError(
            "tensors must be those of these SAEs, got other names, shapes or types for "
            f"{', '.join(wrong[:3])}{' ...' if len(wrong) > 3 else ''}"
        )
    for name, value in stored.items():
        places[name].copy_(value)
    for place, sae in enumerate(saes):
        sae.generator.set_state(places[f"generator.{place}"])


def optimised(
    saes: Sequence[SAE], optimisers: Sequence[torch.optim.Optimizer]
) -> Iterator[tuple[str, torch.optim.Optimizer, Tensor]]:
    """Of each parameter that is trained, the beginning of its names, its optimiser, and what that takes it for."""
    for place, (sae, optimiser) in enumerate(zip(saes, optimisers, strict=True)):
        names = [name for name, parameter in sae.named_parameters() if parameter.requires_grad]
        parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
        for name, parameter in zip(names, parameters, strict=True):
            yield f"optimiser.{place}.{name}.", optimiser, parameter


def by_rows(value: Tensor) -> Tensor:
    """A view of a matrix that is stored column by column, like ``W_enc``, as its transpose: so it costs no copy."""
    return value.T if value.ndim == 2 and not value.is_contiguous() else value
