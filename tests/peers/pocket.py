"""Eight SAEs on one stream of the embedded model: the whole of `train`, and its parts alone.

Here the meter's batches only beat time; the activations are those of the language model.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import cycle, islice

from torch import Tensor

import sae_lib
from peers.ours import at_density, make
from peers.worker import Encode, Train, Work
from sae_lib.sae import SAE
from sae_lib.train import adam, one_step, rms_norm, scaled

DISTRIBUTION = "sae-put-to-the-test"
KEPT = 8
"""Batches that the steps alone are made on."""


def eight(d_in: int, d_sae: int, k: int, x: Tensor) -> list[SAE]:
    """Each baseline, and TopK and BatchTopK with twice the k, all at about k living latents a token."""
    saes = [make(variant, d_in, d_sae, k) for variant in ("relu", "gated", "jumprelu", "matryoshka")]
    saes += [make(variant, d_in, d_sae, size) for variant in ("topk", "batchtopk") for size in (k, 2 * k)]
    for sae in saes:
        at_density(sae, x, k)
    return saes


def build(work: Work, x: Tensor) -> tuple[Train, Encode]:
    texts = sae_lib.load_texts("pocket", split="train")
    site = "blocks.1.hook_resid_post"
    stream = sae_lib.Activations(
        sae_lib.load_model("pocket"), site, texts=texts, batch_size=work.batch, buffer_size=8 * work.batch
    )
    kept = list(islice(stream, KEPT))
    kept = [scaled(batch, rms_norm(kept)) for batch in kept]
    saes = eight(stream.d_in, work.d_sae, work.k, kept[0].x)

    def train(beats: Iterable[Tensor]) -> None:
        sae_lib.train(saes, (batch for _, batch in zip(beats, endless(stream), strict=False)), tokens=10**9)

    def forward(beats: Iterable[Tensor]) -> None:
        for _ in zip(beats, endless(stream), strict=False):
            pass

    def steps(beats: Iterable[Tensor]) -> None:
        optimisers = [adam(sae.train(), steps=10_000) for sae in saes]
        for _, batch in zip(beats, cycle(kept), strict=False):
            for sae, optimiser in zip(saes, optimisers, strict=True):
                one_step(sae, optimiser, batch, rate=1.0, progress=0.5)

    return {"train": train, "forward": forward, "steps": steps}[work.variant], lambda x: x


def endless(stream: sae_lib.Activations) -> Iterable:
    """The stream over and over."""
    while True:
        yield from stream
