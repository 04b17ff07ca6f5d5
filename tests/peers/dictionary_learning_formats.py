"""What dictionary_learning makes of folders: of those of all its classes, and of ours; see `sae_lens_formats`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import dictionary_learning
import torch
from dictionary_learning import dictionary, utils
from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k
from torch import Tensor

from peers.folders import D_IN, D_SAE, K, activations, packed, random_weights
from peers.stand_ins import save

NAMES = {"decoder_bias": "b_dec", "gate_bias": "b_gate", "mag_bias": "b_mag", "bias": "b_dec", "decoder.bias": "b_dec"}
NAMES |= {"encoder.weight": "W_enc", "decoder.weight": "W_dec", "encoder.bias": "b_enc"}


def all_classes() -> Iterator[tuple[str, dictionary.Dictionary]]:
    """One of each, and of the first another with rows of W_dec of any norm."""
    yield "AutoEncoder", dictionary.AutoEncoder(D_IN, D_SAE)
    yield "AutoEncoder, free rows", dictionary.AutoEncoder(D_IN, D_SAE)
    yield "AutoEncoderNew, free rows", dictionary.AutoEncoderNew(D_IN, D_SAE)
    yield "GatedAutoEncoder", dictionary.GatedAutoEncoder(D_IN, D_SAE)
    yield "JumpReluAutoEncoder", dictionary.JumpReluAutoEncoder(D_IN, D_SAE)
    yield "AutoEncoderTopK", top_k.AutoEncoderTopK(D_IN, D_SAE, K)
    yield "BatchTopKSAE", batch_top_k.BatchTopKSAE(D_IN, D_SAE, K)
    yield "BatchTopKSAE, free rows", batch_top_k.BatchTopKSAE(D_IN, D_SAE, K)
    yield "MatryoshkaBatchTopKSAE", matryoshka_batch_top_k.MatryoshkaBatchTopKSAE(D_IN, D_SAE, K, [2, 4, 6])


def fill(sae: dictionary.Dictionary, weights: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in sae.state_dict().items():
            if name not in ("k", "group_sizes"):
                ours = weights[NAMES.get(name, name)]
                ours = ours[0] if value.ndim == 0 else ours
                value.copy_(ours.T if name in ("encoder.weight", "decoder.weight") else ours)


def codes(name: str, folder: Path) -> dict[str, Tensor]:
    """What its own loader makes of a folder."""
    sae, _ = utils.load_dictionary(str(folder), device="cpu")
    z = sae.encode(activations())
    return packed(name, folder) | {f"{name}.z": z.detach(), f"{name}.x_hat": sae.decode(z).detach()}


def main(file: str) -> None:
    folder = Path(file).with_suffix("")
    found = {"x": activations()}
    for seed, (kind, sae) in enumerate(all_classes()):
        fill(sae, random_weights(seed + 20, free="free" in kind))
        place = folder / "theirs" / kind
        place.mkdir(parents=True)
        torch.save(sae.state_dict(), place / "ae.pt")
        config = {"trainer": {"dict_class": type(sae).__name__, "k": K}, "buffer": {}}
        (place / "config.json").write_text(json.dumps(config))
        found |= codes(f"dictionary_learning.{kind}", place)
    for place in sorted((folder / "dictionary_learning").iterdir()):
        found |= codes(f"ours.dictionary_learning.{place.name}", place)
    read = (dictionary, utils, top_k, batch_top_k, matryoshka_batch_top_k)
    save(file, found, [dictionary_learning.__name__.replace("_", "-")], read)


if __name__ == "__main__":
    main(*sys.argv[1:])
