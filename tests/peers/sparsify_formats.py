"""What sparsify makes of folders: of those that it writes itself, and of ours; see `sae_lens_formats`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from sparsify import SparseCoder, SparseCoderConfig, fused_encoder, sparse_coder
from torch import Tensor

from peers.folders import D_IN, D_SAE, K, activations, packed, random_weights
from peers.stand_ins import save


def theirs() -> Iterator[tuple[str, SparseCoder]]:
    """Some with random weights; one of them leaves the number of latents to the expansion factor."""
    settings = {
        "topk": {"num_latents": D_SAE},
        "topk, no number": {"num_latents": 0, "expansion_factor": D_SAE // D_IN},
    }
    settings["topk, free rows"] = {"num_latents": D_SAE, "normalize_decoder": False}
    for seed, (name, chosen) in enumerate(settings.items()):
        sae, weights = SparseCoder(D_IN, SparseCoderConfig(k=K, **chosen)), random_weights(seed + 40, "free" in name)
        weights = {key: weights[key] for key in ("b_dec", "W_dec")} | {
            "encoder.weight": weights["W_enc"].T,
            "encoder.bias": weights["b_enc"],
        }
        sae.load_state_dict(weights)
        yield name, sae


def codes(name: str, folder: Path) -> dict[str, Tensor]:
    """What its own loader makes of a folder."""
    sae, x = SparseCoder.load_from_disk(folder), activations()
    values, latents, _ = sae.encode(x)
    z = torch.zeros(len(x), D_SAE).scatter(1, latents, values).detach()
    return packed(name, folder) | {f"{name}.z": z, f"{name}.x_hat": sae(x).sae_out.detach()}


def main(file: str) -> None:
    folder = Path(file).with_suffix("")
    found = {"x": activations()}
    for kind, sae in theirs():
        sae.save_to_disk(folder / "theirs" / kind)
        found |= codes(f"sparsify.{kind}", folder / "theirs" / kind)
    for place in sorted((folder / "sparsify").iterdir()):
        found |= codes(f"ours.sparsify.{place.name}", place)
    save(file, found, ["eai-sparsify"], (sparse_coder, fused_encoder))


if __name__ == "__main__":
    main(*sys.argv[1:])
