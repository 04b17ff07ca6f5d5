"""Saved sparse autoencoders: ours, and those of other libraries, both ways.

    sae = sae_lib.load("runs/topk")                          a folder; its files say whose it is
    sae = sae_lib.load("hf:org/name/folder")                 the same on the Hugging Face Hub
    save_as(sae, "runs/topk-sae-lens", "sae_lens")           for SAELens, which gets the same codes

One file of this package is one format: `read` makes one of our variants, `write` one of its folders. Neither changes a
code or a reconstruction by more than rounding; what cannot be said in the other's terms is refused, with the reason.
On the command line: ``python -m sae_lib convert``.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from types import ModuleType

from sae_lib.formats import dictionary_learning, gemma_scope, own, sae_lens, sparsify
from sae_lib.formats.custom_sae import for_sae_bench
from sae_lib.hub import PREFIX, fetch
from sae_lib.sae import SAE, whole_folder

__all__ = ["FORMATS", "for_sae_bench", "load", "save_as"]

FORMATS: dict[str, ModuleType] = {
    "sae_lib": own,
    "sae_lens": sae_lens,
    "dictionary_learning": dictionary_learning,
    "sparsify": sparsify,
    "gemma_scope": gemma_scope,
}
"""The formats, by name."""
FILES = {name for part in FORMATS.values() for name in (*part.FILES, *part.OPTIONAL)}


def load(path: str | Path, device: str = "cpu") -> SAE:
    """A saved SAE, in evaluation mode. Its files say whose format it is: ours, SAELens, dictionary_learning, sparsify
    or Gemma Scope.

    One that `SAE.save` wrote has the same codes to the bit. One of another library becomes the variant of ours that
    computes the same: what is normalised is folded into the weights, and codes are those of that library's ``encode``.
    How it was trained is not known; before training it on, set ``l1_coeff`` or ``l0_coeff``, where the variant has one.

    Args:
        path: a folder, or a file in it, or ``hf:org/name`` or ``hf:org/name/folder`` on the Hugging Face Hub.
        device: where the weights go.

    Raises:
        ValueError: if there is no such folder, its files are of no known format or do not belong together, or none of
            our variants computes what it does.
    """
    folder = fetch(str(path), FILES) if str(path).startswith(PREFIX) else Path(path)
    if folder.is_file():
        folder = folder.parent
    return format_of(folder).read(folder).to(device)


def format_of(folder: Path) -> ModuleType:
    """The format whose files are all there."""
    for part in FORMATS.values():
        if all((folder / name).is_file() for name in part.FILES):
            return part
    known = "; ".join(f"{name}: {' and '.join(part.FILES)}" for name, part in FORMATS.items())
    if folder.is_dir():
        inside = sorted({path.parent.name for name in FILES for path in folder.glob(f"*/{name}")})
        hint = f"; in it lie {', '.join(inside[:5])}" if inside else ""
    else:
        names = [path.name for path in folder.parent.glob("*/")] if folder.parent.is_dir() else []
        near = difflib.get_close_matches(folder.name, names)
        hint = f"; near it lie {', '.join(near)}" if near else ""
    raise ValueError(f"path must be a folder with the files of a format ({known}), got {folder}{hint}")


def save_as(sae: SAE, path: str | Path, format: str, model: str | None = None, site: str | None = None) -> Path:
    """Write `sae` as another library stores its own: layout and names change, codes and reconstructions do not.

    Args:
        sae: any variant whose evaluation the format can express.
        path: a folder that does not exist; it appears whole.
        format: a name of `FORMATS`.
        model, site: on whose activations it was trained, and where, for formats that say so.

    Raises:
        ValueError: if the format is not known or cannot express `sae`, or there is something at `path`.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if format == "sae_lib":
        return sae.save(path)
    path = Path(path)
    if path.exists():
        raise ValueError(f"path must be new, got {path}, which exists; choose another path")
    with whole_folder(path) as folder:
        FORMATS[format].write(sae, folder, model, site)
    return path
