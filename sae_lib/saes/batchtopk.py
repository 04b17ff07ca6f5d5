"""BatchTopK: the batch keeps its k * batch best pairs, so that hard tokens may use more latents than easy ones.

Bussmann, Leask, Nanda 2024, "BatchTopK sparse autoencoders", arXiv 2412.06410.

    u = ReLU((x - b_dec) W_enc + b_enc)
    z = the k * batch largest of all u in the batch                           in training
    z = u where u > threshold, else 0                                         in evaluation
    threshold = mean over past batches of the smallest living value           one number for all latents
    L = |x - x_hat|^2 + aux_coeff * AuxK                                      as TopK

Differences from the paper: the mean is exponential with a bias correction (as in Adam), so that it is right from the
first batch on; in implementations that start at -1 and wait 1,000 steps, a short run evaluates as a plain ReLU.
Activations are scaled by one global number. How known: from code of dictionary_learning and of the authors; of the
paper only the abstract.
"""

from __future__ import annotations

import torch
from torch import nn

from sae_lib.data import Batch
from sae_lib.distributed import greatest, least
from sae_lib.sae import SAE, Loss, auxk, column_major, geometric_median, positive, squared_error, unit_dictionary, whole
from sae_lib.selection import above, top_of_batch
from sae_lib.sparse import Code, Scores

MEMORY = 0.95
"""Share of the running mean that one step keeps: it remembers about 20 batches. A batch's smallest living value hardly
varies, and a short run leaves its past behind: in 300 batches of pocket, 0.99 kept 93% of the L0, 0.95 keeps 101%."""


class BatchTopKSAE(SAE):
    """The best pairs of the whole batch, k a token on average. Chapter `batchtopk`.

    Args:
        d_in: width of the activations.
        d_sae: number of latents.
        k: living latents a token on average, in [1, d_sae].
        aux_coeff: weight of AuxK, at least 0.
        seed: of the initial weights.

    Raises:
        ValueError: if an argument is out of its range.
    """

    name = "batchtopk"
    in_units_of_x = ("b_enc", "b_dec", "threshold")

    def __init__(self, d_in: int, d_sae: int, k: int, aux_coeff: float = 1 / 32, seed: int = 0):
        super().__init__(d_in, d_sae, seed)
        self.k = whole("k", k, most=d_sae, most_name="d_sae")
        self.aux_coeff = positive("aux_coeff", aux_coeff, or_zero=True)
        directions = unit_dictionary(d_in, d_sae, self.generator)
        self.W_enc = nn.Parameter(column_major(directions.T))  # (d_in, d_sae)
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(directions.clone())  # (d_sae, d_in)
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.register_buffer("threshold", torch.tensor(0.0))
        self.register_buffer("threshold_weight", torch.tensor(0.0))

    @torch.no_grad()
    def start(self, batch: Batch, tokens: int) -> None:
        super().start(batch, tokens)
        if not self.tokens_trained:
            self.b_dec.copy_(geometric_median(batch.x))

    def select(self, scores: Scores, batch: Batch) -> Code:
        return top_of_batch(scores, self.k) if self.training else above(scores, self.threshold)

    def loss(self, batch: Batch) -> Loss:
        scores = self.scores(batch.x)
        code = self.select(scores, batch)
        x_hat = self.decode(code)
        return Loss(
            {
                "reconstruction": squared_error(batch.x, x_hat),
                "aux": self.aux_coeff * auxk(self, scores, batch.x - x_hat),
            },
            code,
            x_hat,
        )

    @torch.no_grad()
    def after_step(self, batch: Batch, code: Code) -> None:
        super().after_step(batch, code)
        self.update_threshold(code)

    def update_threshold(self, code: Code) -> None:
        """Move the running mean `threshold` towards this batch's smallest living value, if anything lives."""
        if greatest(len(code.values)):
            nothing = code.values.new_tensor([torch.inf])  # in this process
            smallest = least(torch.cat([code.values.detach(), nothing]).min())
            self.threshold_weight.mul_(MEMORY).add_(1 - MEMORY)
            self.threshold.lerp_(smallest, (1 - MEMORY) / self.threshold_weight)
