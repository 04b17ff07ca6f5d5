"""SAELens's SAEs, trained by its own `SAETrainer`, with its defaults."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

import torch
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from peers.worker import LEARNING_RATE, Encode, Train, Work, kth_largest

DISTRIBUTION = "sae-lens"
VARIANTS = {
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig, ("k",), {}),
    # its own sparse path, which is off by default; it cannot be differentiated together with the rescaling
    "topk_sparse": (
        TopKTrainingSAE,
        TopKTrainingSAEConfig,
        ("k",),
        {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False},
    ),
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, ("k",), {}),
    "jumprelu": (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig, (), {}),
    "relu": (StandardTrainingSAE, StandardTrainingSAEConfig, (), {}),
    "gated": (GatedTrainingSAE, GatedTrainingSAEConfig, (), {}),
}
SAMPLES = 10**10


def build(work: Work, x: Tensor) -> tuple[Train, Encode]:
    sae_class, config_class, takes, options = VARIANTS[work.variant]
    options = options | {name: getattr(work, name) for name in takes}
    sae = sae_class(config_class(d_in=work.d_in, d_sae=work.d_sae, **options))
    with torch.no_grad():
        threshold = kth_largest(sae.process_sae_in(x) @ sae.W_enc, work.k)
        if work.variant == "jumprelu":
            sae.threshold.fill_(threshold)
        elif work.variant == "relu":
            sae.b_enc.fill_(-threshold)
        elif work.variant == "gated":
            sae.b_gate.fill_(-threshold)

    def train(batches: Iterable[Tensor]) -> None:
        rate = {"lr": LEARNING_RATE, "lr_end": LEARNING_RATE / 10}
        config = SAETrainerConfig(total_training_samples=SAMPLES, train_batch_size_samples=work.batch, **rate)
        with suppress(StopIteration):  # the loop has no other end that comes early
            SAETrainer(config, sae, iter(batches)).fit()

    return train, lambda x: sae.encode_with_hidden_pre(x)[0].to_dense()
