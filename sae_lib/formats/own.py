"""Our own folders, which `SAE.save` writes: ``config.json`` and ``weights.safetensors``."""

from __future__ import annotations

import hashlib
from pathlib import Path

from safetensors.torch import load as load_safetensors

from sae_lib.formats.files import read_json
from sae_lib.sae import FORMAT, SAE
from sae_lib.saes import VARIANTS

FILES = ("config.json", "weights.safetensors")
OPTIONAL = ()


def read(folder: Path) -> SAE:
    """The SAE that was saved, with the same codes to the bit.

    Raises:
        ValueError: if it was saved by another version, or the two files do not belong together.
    """
    saved = read_json(folder / "config.json")
    if any(saved.get(key) != value for key, value in FORMAT.items()):
        raise ValueError(f"config.json must say {FORMAT}, got {str(saved)[:80]} in {folder}; save it with this version")
    if saved.get("variant") not in VARIANTS:
        raise ValueError(
            f"variant must be one of {sorted(VARIANTS)}, got {saved.get('variant')!r} in {folder}; update the library"
        )
    weights = (folder / "weights.safetensors").read_bytes()
    if hashlib.sha256(weights).hexdigest() != saved.get("weights_sha256"):
        raise ValueError(
            f"weights.safetensors must have the sha256 that config.json names, got another in {folder}; "
            "copy both files anew"
        )
    try:
        sae = VARIANTS[saved["variant"]](**saved["config"])
        sae.load_state_dict(load_safetensors(weights))
    except (KeyError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"config.json must fit its weights, but not in {folder} ({reason}); copy both anew") from None
    sae.trained_on = list(saved.get("trained_on", []))
    sae.unit_rows = saved.get("unit_rows", sae.unit_rows)
    return sae.eval()
