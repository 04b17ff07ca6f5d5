"""dictionary_learning's trainers, called by its own loop `trainSAE`, with its defaults."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from dictionary_learning.trainers import (
    BatchTopKTrainer,
    GatedSAETrainer,
    JumpReluTrainer,
    StandardTrainer,
    TopKTrainer,
)
from dictionary_learning.training import trainSAE
from torch import Tensor

from peers.worker import LEARNING_RATE, Encode, Train, Work, kth_largest

DISTRIBUTION = "dictionary-learning"
TRAINERS = {
    "topk": TopKTrainer,
    "batchtopk": BatchTopKTrainer,
    "jumprelu": JumpReluTrainer,
    "relu": StandardTrainer,
    "gated": GatedSAETrainer,
}
STEPS = 1_000_000


def build(work: Work, x: Tensor) -> tuple[Train, Encode]:
    made = []

    class Trainer(TRAINERS[work.variant]):
        """The library's trainer, with thresholds at which about k latents live."""

        def __init__(self, **config):
            super().__init__(**config)
            made.append(self.ae)
            with torch.no_grad():
                if work.variant == "jumprelu":
                    self.ae.threshold.fill_(kth_largest(x @ self.ae.W_enc + self.ae.b_enc, work.k))
                elif work.variant == "relu":
                    self.ae.encoder.bias.fill_(-kth_largest(x @ self.ae.encoder.weight.T, work.k))
                elif work.variant == "gated":
                    scores = self.ae.encoder(x - self.ae.decoder_bias)
                    self.ae.gate_bias.fill_(-kth_largest(scores, work.k))

    config = {"activation_dim": work.d_in, "dict_size": work.d_sae, "layer": 0, "lm_name": "none", "device": "cpu"}
    config |= {"trainer": Trainer, "steps": STEPS, "lr": LEARNING_RATE}
    if work.variant in ("topk", "batchtopk"):
        config["k"] = work.k
    elif work.variant == "jumprelu":
        config["target_l0"] = work.k

    def train(batches: Iterable[Tensor]) -> None:
        trainSAE(batches, [config], steps=STEPS, device="cpu")

    options = {"use_threshold": False} if work.variant == "batchtopk" else {}
    return train, lambda x: made[-1].encode(x, **options)
