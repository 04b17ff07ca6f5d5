"""Gated: one path decides which latents live, another how strongly, so that the penalty no longer shrinks the values.

Rajamanoharan, Conmy, Smith, Lieberum, Varma, Kramar, Shah, Nanda 2024, "Improving dictionary learning with gated sparse
autoencoders", arXiv 2404.16014.

    p     = (x - b_dec) W_enc
    gate  = p + b_gate                                    a latent lives where gate > 0
    z     = H(gate) * ReLU(exp(r) * p + b_mag)
    x_hat = z W_dec + b_dec                               rows of W_dec have norm 1
    L     = |x - x_hat|^2
          + l1_coeff * sum_i ReLU(gate_i)
          + |x - (ReLU(gate) W_dec + b_dec)|^2            W_dec and b_dec held constant

H has no gradient: the gate learns from the last two terms only, and p from all three.

Differences from the paper: none known; a penalty weighted by the decoder's norm and an auxiliary decoder that is not
held constant, as in SAELens, are other choices. How known: from code of dictionary_learning; the paper's text was not
available.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_lib.data import Batch
from sae_lib.distributed import per_token
from sae_lib.sae import SAE, Loss, column_major, positive, squared_error, unit_dictionary
from sae_lib.selection import near
from sae_lib.sparse import Code, Scores

WARM_UP = 0.05
"""Share of the run over which the penalty grows to its full weight."""


class GatedSAE(SAE):
    """Pairs whose gate is open. Chapter `gated`.

    Args:
        d_in: width of the activations.
        d_sae: number of latents.
        l1_coeff: weight of the penalty on the gate, above 0; for activations of mean squared norm 1.
        seed: of the initial weights.

    Raises:
        ValueError: if an argument is out of its range.
    """

    name = "gated"
    betas = (0.0, 0.999)
    in_units_of_x = ("b_gate", "b_mag", "b_dec")

    def __init__(self, d_in: int, d_sae: int, l1_coeff: float, seed: int = 0):
        super().__init__(d_in, d_sae, seed)
        self.l1_coeff = positive("l1_coeff", l1_coeff)
        directions = unit_dictionary(d_in, d_sae, self.generator)
        self.W_enc = nn.Parameter(column_major(directions.T))  # (d_in, d_sae)
        self.r_mag = nn.Parameter(torch.zeros(d_sae))
        self.b_gate = nn.Parameter(torch.zeros(d_sae))
        self.b_mag = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(directions.clone())  # (d_sae, d_in)
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.warm = 1.0

    @property
    def b_enc(self) -> Float[Tensor, " d_sae"]:
        """The gate's bias: it decides who lives."""
        return self.b_gate

    def before_step(self, progress: float) -> None:
        self.warm = min(1.0, progress / WARM_UP)

    def scores(self, x: Float[Tensor, "batch d_in"]) -> Scores:
        """``(x - b_dec) W_enc``: what gate and magnitude share, before their biases."""
        return Scores(x, self.W_enc, torch.zeros_like(self.b_gate), self.b_dec)

    def select(self, scores: Scores, batch: Batch) -> Code:
        return self.magnitudes(near(scores, -self.b_gate)).living()

    def magnitudes(self, shared: Code) -> Code:
        """``H(gate) * ReLU(exp(r) * p + b_mag)`` of pairs with what gate and magnitude share."""
        return shared.map(magnitude, self.r_mag, self.b_mag, self.b_gate)

    def loss(self, batch: Batch) -> Loss:
        shared = near(self.scores(batch.x), -self.b_gate)
        code = self.magnitudes(shared).living()
        x_hat = self.decode(code)
        gate = shared.map(lambda p, b_gate: (p + b_gate).relu(), self.b_gate)
        gate_x_hat = gate.decode(self.W_dec.detach()) + self.b_dec.detach()
        return Loss(
            {
                "reconstruction": squared_error(batch.x, x_hat),
                "sparsity": self.l1_coeff * self.warm * per_token(gate.sum(), len(batch.x)),
                "aux": squared_error(batch.x, gate_x_hat),
            },
            code,
            x_hat,
        )


def magnitude(
    p: Float[Tensor, "*pairs"], r_mag: Float[Tensor, "..."], b_mag: Float[Tensor, "..."], b_gate: Float[Tensor, "..."]
) -> Float[Tensor, "*pairs"]:
    """The activation of pairs, pair by pair; zero where the gate is shut."""
    return (r_mag.exp() * p + b_mag).relu() * (p + b_gate > 0)
