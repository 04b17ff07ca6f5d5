"""What any torch module computes at a site, as rows: a row of activations for each input, position or place."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_lib.groups import Group
from sae_lib.models import SiteReached


def output_at(module: nn.Module, site: str, x: Tensor) -> Any:
    """Output of the submodule `site` on x. Nothing after it runs, and every module keeps its mode.

    Raises:
        ValueError: if the forward pass never calls it.
    """
    seen = []

    def stop(_module: nn.Module, _arguments: tuple, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple | list) else output)
        raise SiteReached

    modes = [(part, part.training) for part in module.modules()]
    handle = module.get_submodule(site).register_forward_hook(stop)
    try:
        module.eval()
        with torch.no_grad(), suppress(SiteReached):
            module(x)
    finally:
        handle.remove()
        for part, training in modes:
            part.training = training
    if not seen:
        raise ValueError(f"site must be a module that the forward pass calls, but it never calls {site!r}")
    return seen[0]


def rows_at(module: nn.Module, site: str, x: Tensor) -> Float[Tensor, "rows d_in"]:
    """The output at a site as rows of its last dimension, or of the channels of maps (n, channels, height, width).

    Raises:
        ValueError: if it is not a floating tensor of two to four dimensions.
    """
    return as_rows(output_at(module, site, x), site)


def orbits_at(module: nn.Module, site: str, x: Tensor, group: Group) -> Float[Tensor, "rows group d_in"]:
    """The same of all transformed inputs. Maps are turned back first, so that a row is of one place of the input.

    Raises:
        ValueError: as `rows_at`, and if the group cannot act on x or, turning back, on maps.
    """
    poses = []
    for element, inputs in enumerate(group.orbit(x).unbind(1)):
        output = output_at(module, site, inputs)
        if isinstance(output, Tensor) and output.ndim == 4:
            output = group.act(group.inverse[element], output)
        poses.append(as_rows(output, site))
    return torch.stack(poses, 1)


def as_rows(output: Any, site: str) -> Float[Tensor, "rows d_in"]:
    """See `rows_at`."""
    if not isinstance(output, Tensor) or not output.is_floating_point():
        kind = output.dtype if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"activations must be a floating tensor, got {kind} at {site!r}: choose another site")
    if output.ndim not in (2, 3, 4):
        raise ValueError(f"activations must have 2, 3 or 4 dimensions, got {tuple(output.shape)} at {site!r}")
    return (output.movedim(1, -1) if output.ndim == 4 else output).flatten(0, -2)
