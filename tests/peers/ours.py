"""This library: `train`'s own step, with its defaults; and the bare product that all times are compared with."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

import sae_lib
from peers.worker import LEARNING_RATE, Encode, Train, Work, kth_largest
from sae_lib import selection
from sae_lib.data import Batch
from sae_lib.sae import SAE
from sae_lib.train import adam, one_step

DISTRIBUTION = "sae-put-to-the-test"
DEAD = 0.1
"""Share of latents that are dead in the variants named so."""


def build(work: Work, x: Tensor) -> tuple[Train, Encode]:
    variant, _, condition = work.variant.partition(", ")
    if variant == "encoder GEMM":
        return product(work, torch.bfloat16 if condition == "bf16" else torch.float32)
    if condition == "no bf16":
        selection.fast_bf16 = lambda: False
    elif condition in ("dense", "sparse"):  # whatever would be faster
        selection.DENSITY = {"dense": 0.0, "sparse": 1.0}[condition]
    sae = make(variant, work.d_in, work.d_sae, work.k)
    at_density(sae, x, work.k)
    dead = slice(0, round(DEAD * work.d_sae) if condition == "10% dead" else 0)
    with torch.no_grad():
        sae.W_enc[:, dead] /= 4  # so that they score, but never win
    sae.train()
    optimiser = adam(sae, steps=10_000)

    def train(batches: Iterable[Tensor]) -> None:
        for batch in batches:
            sae.tokens_since_fired[dead] = sae.dead_window
            one_step(sae, optimiser, Batch(batch), rate=1.0, progress=0.5)

    return train, sae.encode


def make(variant: str, d_in: int, d_sae: int, k: int) -> SAE:
    """A variant by its name, with a learning rate that leaves it as it is."""
    argument = {"jumprelu": "target_l0", "relu": "l1_coeff", "gated": "l1_coeff"}.get(variant, "k")
    sae = sae_lib.VARIANTS[variant](d_in, d_sae, **{argument: 0.05 if argument == "l1_coeff" else k})
    sae.learning_rate = LEARNING_RATE
    return sae


@torch.no_grad()
def at_density(sae: SAE, x: Tensor, k: int) -> None:
    """Set the thresholds or biases of variants that have them so that about k latents a token live."""
    if sae.name in ("jumprelu", "relu", "gated"):
        threshold = kth_largest(x @ sae.W_enc, k)
        if sae.name == "jumprelu":
            sae.threshold.fill_(threshold)
        else:
            sae.b_enc.fill_(-threshold)


def product(work: Work, dtype: torch.dtype) -> tuple[Train, Encode]:
    """The encoder's product alone."""
    W, b = torch.randn(work.d_sae, work.d_in).to(dtype), torch.zeros(work.d_sae, dtype=dtype)

    def train(batches: Iterable[Tensor]) -> None:
        for batch in batches:
            F.linear(batch.to(dtype), W, b)

    return train, lambda x: F.linear(x.to(dtype), W, b)
