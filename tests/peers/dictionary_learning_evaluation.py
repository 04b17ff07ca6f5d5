"""What dictionary_learning computes: its evaluation of seeded activations, batch by batch; see `sae_bench`."""

from __future__ import annotations

import sys

import numpy as np
from dictionary_learning import evaluation
from torch import Tensor, tensor

from peers.stand_ins import Known, Texts, save


class Dictionary:
    """The sparse autoencoder, as its evaluation calls it."""

    def __init__(self, sae: Known):
        self.sae, self.dict_size = sae, sae.cfg.d_sae

    def __call__(self, x: Tensor, output_features: bool) -> tuple[Tensor, Tensor]:
        z = self.sae.encode(x)
        return self.sae.decode(z), z


def main(file: str) -> None:
    texts = Texts(np.random.default_rng(3))
    sae, _ = texts.in_unit(1)
    batches = (sae.x[tokens[tokens != texts.left_out]] for tokens in texts.tokens)
    scores = evaluation.evaluate(Dictionary(sae), batches, n_batches=len(texts.tokens))
    found = texts.inputs("core", sae) | {f"core.{name}": tensor(value) for name, value in scores.items()}
    save(file, found, ["dictionary-learning"], [evaluation])


if __name__ == "__main__":
    main(*sys.argv[1:])
