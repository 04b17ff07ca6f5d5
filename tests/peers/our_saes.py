"""SAEs of ours with weights as after some training, each written as another library stores its own."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

import sae_lib
from peers.folders import D_IN, D_SAE, K, packed, random_weights, unpacked
from sae_lib import VARIANTS
from sae_lib.formats import save_as
from sae_lib.sae import SAE

SETTINGS = {
    "relu": {"l1_coeff": 0.1},
    "relu, free rows": {"l1_coeff": 0.1, "norm_weighted": True},
    "gated": {"l1_coeff": 0.1},
    "topk": {"k": K},
    "jumprelu": {"target_l0": 3.0},
    "batchtopk": {"k": K},
    "matryoshka": {"k": K, "group_sizes": [2, 4, 6]},
    "mutual_choice": {"k": K},
    "feature_choice": {"k": K},
    "gradient": {"k": K},
    "atm": {"l1_coeff": 0.1},
    "atm, hard mask": {"l1_coeff": 0.1, "eval_mask": "hard"},
    "atm, expected mask": {"l1_coeff": 0.1, "eval_mask": "expected"},
}
"""Each variant that other libraries can express; what follows a comma is for the reader."""
EXPRESSES = {
    "sae_lens": set(SETTINGS),
    "dictionary_learning": set(SETTINGS),
    "gemma_scope": set(SETTINGS) - {"topk", "gradient"},
    "sparsify": {"topk", "gradient"},
}
"""What each format can hold."""


ABOUT = {"model": "tiny", "site": "blocks.1.hook_resid_post"}
TOLERANCE = 1e-6


def made(name: str) -> SAE:
    """An SAE by its name in `SETTINGS`."""
    variant = name.split(",")[0]
    sae = VARIANTS[variant](D_IN, D_SAE, **SETTINGS[name]).eval()
    weights = random_weights(seed=list(SETTINGS).index(name), free="free" in name)
    with torch.no_grad():
        for key, value in sae.state_dict().items():
            if key == "threshold" and value.ndim == 0:
                value.fill_(0.2)
            elif key in weights:
                value.copy_(weights[key])
            elif key in ("magnitude", "frequency", "contribution"):
                value.copy_(torch.linspace(0, 2, D_SAE))
    return sae


def written(folder: Path, format: str) -> None:
    """Write all that a format can hold, a folder each."""
    for name in sorted(EXPRESSES[format]):
        save_as(made(name), folder / name, format, **ABOUT)


def distance(ours: Tensor, theirs: Tensor) -> float:
    """How far two tensors are apart at most, as a share of what is larger than 1."""
    return float(((ours - theirs).abs() / theirs.abs().clamp(min=1)).max())


@torch.no_grad()
def apart(found: dict[str, Tensor], name: str, folder: Path) -> tuple[float, float]:
    """The `distance` between what `load` makes of a recorded folder and what its library makes of it: of the codes, and
    of the reconstructions."""
    sae, x = sae_lib.load(unpacked(found, name, folder)), found["x"]
    return distance(sae.encode(x), found[f"{name}.z"]), distance(sae(x), found[f"{name}.x_hat"])


@torch.no_grad()
def gone_there(found: dict[str, Tensor], name: str, folder: Path) -> None:
    """Check a recorded folder of ours: the library has the codes that we have, and we write the same today."""
    _, format, ours = name.split(".", 2)
    sae, x = made(ours), found["x"]
    assert distance(sae.encode(x), found[f"{name}.z"]) < TOLERANCE
    assert distance(sae(x), found[f"{name}.x_hat"]) < TOLERANCE
    save_as(sae, folder, format, **ABOUT)
    now, then = packed(name, folder), {key: value for key, value in found.items() if key.startswith(f"{name}/")}
    assert now.keys() == then.keys()
    for key, value in now.items():
        assert value.shape == then[key].shape, key
        assert distance(value.double(), then[key].double()) < TOLERANCE, key
