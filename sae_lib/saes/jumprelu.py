"""JumpReLU: a latent lives above a threshold of its own, which is learned although it has no gradient.

Rajamanoharan, Lieberum, Sonnerat, Conmy, Varma, Kramar, Nanda 2024, "Jumping ahead: improving reconstruction fidelity
with JumpReLU sparse autoencoders", arXiv 2407.14435.

    s     = x W_enc + b_enc
    z     = s * H(s - threshold)                      H is 1 above 0, else 0; threshold >= 0, one a latent
    x_hat = z W_dec + b_dec                           rows of W_dec have norm 1
    L     = |x - x_hat|^2 + warm * (L0 / target_l0 - 1)^2         L0 = mean over tokens of sum_i H(s_i - threshold_i)
    L     = |x - x_hat|^2 + warm * l0_coeff * L0                  the paper's form

The jump has zero gradient almost everywhere, so the threshold learns through a window of width `bandwidth` around it
(pseudo-derivatives of the paper), K(v) = 1 for |v| < 1/2, else 0:

    dz/dthreshold = -(threshold / bandwidth) K((s - threshold) / bandwidth)
    dH/dthreshold = -(1 / bandwidth)         K((s - threshold) / bandwidth)           no gradient of H towards s

Differences from the paper: the squared target (as in dictionary_learning) beside the paper's penalty; the threshold
itself is the parameter, not its logarithm; the default bandwidth is wider than the paper's 0.001, because in short
runs so narrow a window holds no scores and thresholds do not move. The window looks at the scores, on both sides of
the threshold; dictionary_learning looks at the values after the jump and so halves the gradient. How known: from that
code; the paper's text was not available.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_lib.data import Batch
from sae_lib.distributed import per_token
from sae_lib.sae import SAE, Loss, column_major, positive, squared_error, unit_dictionary
from sae_lib.selection import above, near
from sae_lib.sparse import Code, Scores

WARM_UP = 0.05
"""Share of the run over which the sparsity term grows to its full weight."""


class JumpReLUSAE(SAE):
    """Scores above a learned threshold per latent. Chapter `jumprelu`.

    Args:
        d_in: width of the activations.
        d_sae: number of latents.
        target_l0: living latents a token that the squared term aims at, in (0, d_sae].
        l0_coeff: instead of a target, the weight of L0 itself, above 0.
        bandwidth: width of the window through which thresholds learn (epsilon), in units of activations of mean
            squared norm 1.
        seed: of the initial weights.

    Raises:
        ValueError: if an argument is out of its range, or not exactly one of `target_l0` and `l0_coeff` is given.
    """

    name = "jumprelu"
    betas = (0.0, 0.999)
    in_units_of_x = ("b_enc", "b_dec", "threshold")

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        target_l0: float | None = None,
        l0_coeff: float | None = None,
        bandwidth: float = 0.03,
        seed: int = 0,
    ):
        super().__init__(d_in, d_sae, seed)
        if (target_l0 is None) == (l0_coeff is None):
            raise ValueError(
                f"give exactly one of target_l0 and l0_coeff, got target_l0={target_l0!r}, l0_coeff={l0_coeff!r}"
            )
        self.target_l0 = None if target_l0 is None else positive("target_l0", target_l0)
        if self.target_l0 is not None and self.target_l0 > d_sae:
            raise ValueError(f"target_l0 must be in (0, d_sae={d_sae}], got {target_l0}")
        self.l0_coeff = None if l0_coeff is None else positive("l0_coeff", l0_coeff)
        self.bandwidth = positive("bandwidth", bandwidth)
        directions = unit_dictionary(d_in, d_sae, self.generator)
        self.W_enc = nn.Parameter(column_major(directions.T))  # (d_in, d_sae)
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(directions.clone())  # (d_sae, d_in)
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.threshold = nn.Parameter(torch.full((d_sae,), 0.001))
        self.warm = 1.0

    def before_step(self, progress: float) -> None:
        self.warm = min(1.0, progress / WARM_UP)

    def scores(self, x: Float[Tensor, "batch d_in"]) -> Scores:
        """``x W_enc + b_enc``: this variant does not subtract `b_dec` first."""
        return Scores(x, self.W_enc, self.b_enc)

    def select(self, scores: Scores, batch: Batch) -> Code:
        return self.jumped(self.window(scores)).living() if self.training else above(scores, self.threshold)

    def window(self, scores: Scores) -> Code:
        """The scores through which thresholds learn: those in the window, and above it."""
        return near(scores, self.threshold - self.bandwidth / 2)

    def jumped(self, scores: Code) -> Code:
        """``s * H(s - threshold)``."""
        return scores.map(lambda s, threshold: Jump.apply(s, threshold, self.bandwidth), self.threshold)

    def loss(self, batch: Batch) -> Loss:
        scores = self.window(self.scores(batch.x))
        z = self.jumped(scores)
        lives = scores.map(lambda s, threshold: Step.apply(s, threshold, self.bandwidth), self.threshold)
        x_hat = self.decode(z)
        l0 = per_token(lives.sum(), len(batch.x))
        sparsity = self.l0_coeff * l0 if self.target_l0 is None else (l0 / self.target_l0 - 1).square()
        terms = {"reconstruction": squared_error(batch.x, x_hat), "sparsity": self.warm * sparsity}
        return Loss(terms, z.living(), x_hat)

    @torch.no_grad()
    def after_step(self, batch: Batch, code: Code) -> None:
        super().after_step(batch, code)
        self.threshold.clamp_(min=0)


class Jump(torch.autograd.Function):
    """``s * H(s - threshold)``, with the paper's pseudo-derivative towards the threshold."""

    @staticmethod
    def forward(ctx, scores, threshold, bandwidth):
        ctx.save_for_backward(scores, threshold)
        ctx.bandwidth = bandwidth
        return scores * (scores > threshold)

    @staticmethod
    def backward(ctx, grad):
        scores, threshold = ctx.saved_tensors
        window = (scores - threshold).abs() < ctx.bandwidth / 2
        by_threshold = -(threshold / ctx.bandwidth) * (grad * window)
        return grad * (scores > threshold), by_threshold.sum_to_size(threshold.shape), None


class Step(torch.autograd.Function):
    """``H(s - threshold)``, with the paper's pseudo-derivative towards the threshold and none towards the scores."""

    @staticmethod
    def forward(ctx, scores, threshold, bandwidth):
        ctx.save_for_backward(scores, threshold)
        ctx.bandwidth = bandwidth
        return (scores > threshold).to(scores.dtype)

    @staticmethod
    def backward(ctx, grad):
        scores, threshold = ctx.saved_tensors
        window = (scores - threshold).abs() < ctx.bandwidth / 2
        return None, -(grad * window / ctx.bandwidth).sum_to_size(threshold.shape), None
