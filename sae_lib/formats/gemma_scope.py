"""Gemma Scope's ``params.npz``: a JumpReLU SAE, in numpy's format, and nothing beside it.

    s = x W_enc + b_enc,   z = s H(s - threshold),   x_hat = z W_dec + b_dec                    all in our layout

Lieberum et al. 2024, "Gemma Scope: open sparse autoencoders everywhere all at once on Gemma 2", arXiv 2408.05147.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import numpy as np
import torch

from sae_lib.formats.files import floats, only
from sae_lib.formats.weights import made, plain, thresholds
from sae_lib.sae import SAE

FILES = ("params.npz",)
OPTIONAL = ()
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")


def read(folder: Path) -> SAE:
    """The SAE of a Gemma Scope folder.

    Its transcoders have the same file. They are told by the name of their repository alone.

    Raises:
        ValueError: if it is a transcoder, or the file is not what it should be.
    """
    if any(re.search("gemma-scope.*transcoder", part) for part in folder.parts):
        raise ValueError(f"a transcoder predicts another place of the model than it reads, got {folder}")
    try:
        with np.load(folder / "params.npz", allow_pickle=False) as arrays:
            tensors = {name: torch.from_numpy(arrays[name]) for name in arrays}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"params.npz must hold arrays of numbers, got {folder}: {error}; copy it anew") from None
    return made("jumprelu", only(floats(tensors), NAMES, f"params.npz in {folder}"))


def write(sae: SAE, folder: Path, model: str | None = None, site: str | None = None) -> None:
    """Write ``params.npz``. Whatever is decided by thresholds becomes JumpReLU: ReLU has thresholds of 0.

    Args:
        sae: any variant that `sae_lib.formats.weights.plain` knows, but for TopK and g-SAE.
        folder: exists.
        model, site: are not used: the file does not say whose activations it was trained on.

    Raises:
        ValueError: if what lives is not decided by a threshold.
    """
    same = thresholds(plain(sae))
    np.savez(folder / "params.npz", **{name: getattr(same, name).detach().cpu().numpy() for name in NAMES})
