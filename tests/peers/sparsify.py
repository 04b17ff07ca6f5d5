"""sparsify's `Trainer`, its whole loop, with its defaults; the "model" shows activations to its hook, no more."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from tempfile import TemporaryDirectory

import torch
from sparsify import SparseCoderConfig, TrainConfig, Trainer
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from peers.worker import LEARNING_RATE, Encode, Train, Work

DISTRIBUTION = "eai-sparsify"


class Model(nn.Module):
    """A language model as the trainer sees one; its only layer puts out the activations at hand."""

    base_model = property(lambda self: self)

    def __init__(self, x: Tensor):
        super().__init__()
        self.x, self.layer = x, nn.Identity()
        self.device, self.dummy_inputs = x.device, {"input_ids": None}

    def forward(self, input_ids: Tensor | None) -> None:
        self.layer(self.x.unsqueeze(0))


class Texts(IterableDataset):
    """A text for each batch of activations, which become those of the model."""

    def __init__(self, model: Model):
        self.model, self.batches = model, []

    def __len__(self) -> int:
        return 1_000_000

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for x in self.batches:
            self.model.x = x
            yield {"input_ids": torch.zeros(len(x), dtype=torch.long)}


def build(work: Work, x: Tensor) -> tuple[Train, Encode]:
    model = Model(x)
    texts = Texts(model)
    sae = SparseCoderConfig(activation=work.variant, num_latents=work.d_sae, k=work.k)
    config = TrainConfig(sae, batch_size=1, lr=LEARNING_RATE, hookpoints=["layer"], log_to_wandb=False)
    trainer = Trainer(config, texts, model)

    def train(batches: Iterable[Tensor]) -> None:
        texts.batches = batches
        with TemporaryDirectory() as config.save_dir:
            trainer.fit()

    return train, lambda x: trainer.saes["layer"].encode(x).top_acts
