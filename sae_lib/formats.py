"""Read a saved sparse autoencoder."""

from __future__ import annotations

import difflib
import hashlib
import json
from pathlib import Path

from safetensors.torch import load as load_safetensors

from sae_lib.sae import FORMAT, SAE
from sae_lib.saes import VARIANTS


def load(path: str | Path, device: str = "cpu") -> SAE:
    """The SAE saved in the folder `path` by `SAE.save`, in evaluation mode; its codes are the same to the bit.

    Args:
        path: folder with ``config.json`` and ``weights.safetensors``.
        device: where the weights go.

    Raises:
        ValueError: if the folder is missing, was not written by this library, or its two files do not belong together.
    """
    path = Path(path)
    if not (path / "config.json").is_file() or not (path / "weights.safetensors").is_file():
        near = difflib.get_close_matches(
            path.name, [p.name for p in path.parent.glob("*/")] if path.parent.is_dir() else []
        )
        hint = f"; near it lie {', '.join(near)}" if near else ""
        raise ValueError(f"path must be a folder with config.json and weights.safetensors, got {path}{hint}")
    try:
        saved = json.loads((path / "config.json").read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"config.json must be JSON, got {path / 'config.json'}: {error}; save the SAE again") from None
    if not isinstance(saved, dict) or any(saved.get(key) != value for key, value in FORMAT.items()):
        raise ValueError(f"config.json must say {FORMAT}, got {str(saved)[:80]} in {path}; save it with this version")
    if saved.get("variant") not in VARIANTS:
        raise ValueError(
            f"variant must be one of {sorted(VARIANTS)}, got {saved.get('variant')!r} in {path}; update the library"
        )
    weights = (path / "weights.safetensors").read_bytes()
    if hashlib.sha256(weights).hexdigest() != saved.get("weights_sha256"):
        raise ValueError(
            f"weights.safetensors must have the sha256 that config.json names, got another in {path}; "
            "copy both files anew"
        )
    try:
        sae = VARIANTS[saved["variant"]](**saved["config"])
        sae.load_state_dict(load_safetensors(weights))
    except (KeyError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"config.json must fit its weights, but not in {path} ({reason}); copy both anew") from None
    sae.trained_on = list(saved.get("trained_on", []))
    return sae.to(device).eval()
