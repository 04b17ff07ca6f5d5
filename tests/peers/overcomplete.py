"""overcomplete's SAEs, trained by its own loop `train_sae`, with its defaults and the losses of its documentation."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from unittest.mock import MagicMock

import torch
from torch import Tensor

from peers.worker import LEARNING_RATE, Encode, Train, Work, kth_largest

# the package imports image models and pictures of its own, which want an older matplotlib; its SAEs need none of it
sys.modules |= {name: MagicMock() for name in ("timm", "torchvision", "overcomplete.visualization")}
from overcomplete.sae import SAE, BatchTopKSAE, JumpSAE, TopKSAE, mse_l1, train_sae  # noqa: E402

DISTRIBUTION = "overcomplete"


def build(work: Work, x: Tensor) -> tuple[Train, Encode]:
    sae = {
        "topk": lambda: TopKSAE(work.d_in, work.d_sae, top_k=work.k),
        "batchtopk": lambda: BatchTopKSAE(work.d_in, work.d_sae, top_k=work.k * work.batch),
        "jumprelu": lambda: JumpSAE(work.d_in, work.d_sae),
        "relu": lambda: SAE(work.d_in, work.d_sae),
    }[work.variant]()
    with torch.no_grad():
        scores = sae.encoder(x)[0]
        if work.variant == "jumprelu":
            sae.thresholds.fill_(kth_largest(scores, work.k)).log_()
        elif work.variant == "relu":
            sae.encoder.final_block[0].bias.sub_(kth_largest(scores, work.k))

    def squares(x, x_hat, pre_codes, codes, dictionary):
        return (x - x_hat).square().mean()

    def jumps(x, x_hat, pre_codes, codes, dictionary):
        loss = squares(x, x_hat, pre_codes, codes, dictionary)
        too_many = (codes > 0).float().mean().detach() > work.k / work.d_sae
        return loss - sae.thresholds.sum() if too_many else loss

    criterion = {"jumprelu": jumps, "relu": mse_l1}.get(work.variant, squares)
    optimiser = torch.optim.Adam(sae.parameters(), lr=LEARNING_RATE)

    def train(batches: Iterable[Tensor]) -> None:
        train_sae(sae, batches, criterion, optimiser, nb_epochs=1)

    return train, lambda x: sae.encode(x)[1]
