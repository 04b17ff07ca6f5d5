"""Matryoshka BatchTopK: nested dictionaries, so that the first latents must explain the data without the later ones.

Bussmann, Nabeshima, Karvonen, Nanda 2025, "Learning multi-level features with Matryoshka sparse autoencoders", arXiv
2503.17547.

    z       = BatchTopK over the whole width
    x_hat_g = z[:, :N_g] W_dec[:N_g] + b_dec              N_g: latents in the first g groups
    L       = mean over g of |x - x_hat_g|^2 + aux_coeff * AuxK

A general latent in an early group cannot leave its work to a special one in a later group: that is what should lower
absorption.

Differences from the paper: the mean over the groups has weights that add up to 1; the authors' code adds the bias
alone as a group, dictionary_learning divides by the number of groups twice (which makes AuxK weigh that much more),
SAELens sums. Groups are fixed, not drawn anew each batch. How known: from those three codes; of the paper only the
abstract was available.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sae_lib.data import Batch
from sae_lib.sae import Loss, auxk, squared_error, whole
from sae_lib.saes.batchtopk import BatchTopKSAE


class MatryoshkaSAE(BatchTopKSAE):
    """BatchTopK whose prefixes reconstruct too. Chapter `matryoshka`.

    Args:
        d_in: width of the activations.
        d_sae: number of latents.
        k: living latents a token on average, in [1, d_sae].
        group_sizes: latents in each group, in order; they add up to `d_sae`. By default 1/32, 1/16, 1/8, 1/4 and the
            rest.
        aux_coeff: weight of AuxK, at least 0.
        seed: of the initial weights.

    Raises:
        ValueError: if an argument is out of its range, or the groups do not add up to `d_sae`.
    """

    name = "matryoshka"

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: int,
        group_sizes: Sequence[int] | None = None,
        aux_coeff: float = 1 / 32,
        seed: int = 0,
    ):
        super().__init__(d_in, d_sae, k, aux_coeff, seed)
        sizes = default_groups(d_sae) if group_sizes is None else group_sizes
        if not isinstance(sizes, Sequence):
            raise ValueError(f"group_sizes must be one number for each group, got {sizes!r}; [{sizes!r}] is one group")
        self.group_sizes = tuple(whole("a group size", size) for size in sizes)
        if sum(self.group_sizes) != d_sae:
            raise ValueError(
                f"group_sizes must add up to d_sae={d_sae}, got {self.group_sizes} with sum {sum(self.group_sizes)}"
            )

    def loss(self, batch: Batch) -> Loss:
        scores = self.scores(batch.x)
        code = self.select(scores, batch)
        x_hat, errors = self.b_dec, []
        for group, directions in zip(code.split(self.group_sizes), self.W_dec.split(self.group_sizes), strict=True):
            x_hat = x_hat + group.decode(directions)
            errors.append(squared_error(batch.x, x_hat))
        return Loss(
            {
                "reconstruction": torch.stack(errors).mean(),
                "aux": self.aux_coeff * auxk(self, scores, batch.x - x_hat),
            },
            code,
            x_hat,
        )


def default_groups(d_sae: int) -> tuple[int, ...]:
    """1/32, 1/16, 1/8 and 1/4 of the width, rounded down and without empty groups; the last group takes the rest."""
    sizes = [size for size in (d_sae // 32, d_sae // 16, d_sae // 8, d_sae // 4) if size]
    return (*sizes, d_sae - sum(sizes))
