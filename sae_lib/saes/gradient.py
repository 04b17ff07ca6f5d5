"""Gradient SAE: each token keeps the k latents that are strong and that matter to the model's loss.

Olmo, Wilson, Forsey, Hepner, Howe, Wingate 2024, "Features that make a difference: leveraging gradients for improved
dictionary learning", arXiv 2411.10397 (g-SAE).

    z      = (x - b_dec) W_enc + b_enc
    g      = gradient of the model's loss with respect to x             constant
    score  = z (1 + beta |W_dec g| / s)                                 s = running mean of |W_dec g|, one number
    y_i    = ReLU(z_i) for the k largest scores of each token, else 0
    x_hat  = y W_dec + b_dec                                            rows of W_dec have norm 1
    L      = |x - x_hat|^2 + aux_coeff * AuxK                           as TopK

``z_i W_dec,i . g`` is, to first order, what latent i adds to the loss. ``g`` is computed from the true next tokens: who
chooses by it knows something of the answer. So there are two modes of evaluation, with the gradient (`encode` with
`grad`), and by the activation alone, which is TopK. beta = 0 is TopK to the bit.

Differences from the paper: kept values are z, and the gradient moves the choice only; the figure, read literally, keeps
the scores (``literal=True``). beta is measured in units of s, so that it does not depend on how losses are summed;
b_dec and AuxK, which the figure does not draw, are those of TopK. How known: score, W_dec and the absolute value are
read off the paper's architecture figure, on the website of one of its authors; of the text only the abstract was
available, which speaks of choosing. Loss, sizes, beta, and which mode the paper evaluates in are not known.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lib.data import Batch
from sae_lib.distributed import gathered, mine, per_token, processes
from sae_lib.sae import positive
from sae_lib.saes.topk import TopKSAE
from sae_lib.selection import top_of_rows, top_of_rows_by
from sae_lib.sparse import Code, Scores, linear

MEMORY = 0.95
"""Share of the running mean that one step keeps: it remembers about 20 batches."""

WEIGHTS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "absolute": lambda a, beta: a.abs_().mul_(beta).add_(1),
    "signed": lambda a, beta: a.mul_(beta).add_(1),
    "reversed": lambda a, beta: a.mul_(-beta).add_(1),
    "alone": lambda a, beta: a.abs_(),
}
"""By what z is multiplied, from the attribution ``a = W_dec g / s``, in place: as the figure, and controls of it."""
WEIGHTS |= {"of other tokens": WEIGHTS["absolute"], "of other latents": WEIGHTS["absolute"]}


class GradientSAE(TopKSAE):
    """The k latents of each token that are best by activation and gradient. Chapter `gradient`.

    Training needs batches with gradients: ``Activations(..., grad=True)``.

    Args:
        d_in: width of the activations.
        d_sae: number of latents.
        k: living latents a token, in [1, d_sae].
        beta: weight of the gradient, at least 0; 1 doubles the score of a latent whose attribution is of mean size.
        attribution: ``absolute``, or a control: ``signed`` favours latents that raise the loss, ``reversed`` those that
            lower it; ``alone`` leaves the 1 and beta out; in training, ``of other tokens`` takes the gradient of the
            row before, which in a shuffled batch is any other token's, and ``of other latents`` deals a token's
            attributions out to latents at random, anew in each step: noise of the same distribution.
        literal: keep the scores as values, as the figure draws it.
        aux_coeff: weight of AuxK, at least 0.
        seed: of the initial weights, and of what ``of other latents`` draws.

    Raises:
        ValueError: if an argument is out of its range; in training, if a batch has no gradient.
    """

    name = "gradient"
    needs = frozenset({"grad"})

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: int,
        beta: float = 1.0,
        attribution: str = "absolute",
        literal: bool = False,
        aux_coeff: float = 1 / 32,
        seed: int = 0,
    ):
        super().__init__(d_in, d_sae, k, aux_coeff, seed=seed)
        self.beta = positive("beta", beta, or_zero=True)
        if attribution not in WEIGHTS:
            raise ValueError(f"attribution must be one of {', '.join(WEIGHTS)}, got {attribution!r}")
        self.attribution, self.literal = attribution, bool(literal)
        self.register_buffer("mean_size", torch.tensor(1.0))  # s
        self.order = torch.arange(d_sae)

    @torch.no_grad()
    def start(self, batch: Batch, tokens: int) -> None:
        super().start(batch, tokens)
        if not self.tokens_trained:
            self.mean_size.copy_(self.slopes(gradient(batch)).abs_().mean())

    def before_step(self, progress: float) -> None:
        super().before_step(progress)
        if self.attribution == "of other latents":
            self.order = torch.randperm(self.d_sae, generator=self.generator)

    def encode(
        self, x: Float[Tensor, "batch d_in"], grad: Float[Tensor, "batch d_in"] | None = None
    ) -> Float[Tensor, "batch d_sae"]:
        """The code of each row of `x`, chosen with the gradient of the loss at `x` or, without it, by activation alone.

        Raises:
            ValueError: if `x` is not a floating matrix of width ``d_in``, or `grad` not one of the same shape.
        """
        x = self.checked(x)
        return self.select(self.scores(x), Batch(x, grad)).dense()

    def select(self, scores: Scores, batch: Batch) -> Code:
        weighed = self.beta > 0 or self.attribution == "alone"
        if not weighed or (batch.grad is None and not self.training):
            return top_of_rows(scores, self.k)
        weights = self.weights(batch)
        code = top_of_rows_by(scores, self.k, lambda z, rows: z.mul_(weights[rows]))
        if not self.literal:
            return code
        return code.map(lambda z: z * (weights if z.ndim == 2 else weights[code.rows, code.cols]))

    @torch.no_grad()
    def weights(self, batch: Batch) -> Float[Tensor, "batch d_sae"]:
        """By what each score is multiplied."""
        grad = gradient(batch)
        if self.training and self.attribution == "of other tokens":
            everywhere = grad if processes() == 1 else torch.cat(gathered(grad))
            grad = mine(Batch(everywhere.roll(1, 0))).x
        slopes = self.slopes(grad)
        if self.training and self.attribution == "of other latents":
            slopes = slopes[:, self.order.to(slopes.device)]
        attributions = slopes.div_(self.mean_size.clamp(min=torch.finfo(slopes.dtype).tiny))
        return WEIGHTS[self.attribution](attributions, self.beta)

    def slopes(self, grad: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        """``W_dec g``: how fast the loss rises along each latent's direction."""
        directions = self.W_dec.detach()
        return linear(grad.to(directions.dtype), directions, directions.new_zeros(self.d_sae))

    @torch.no_grad()
    def after_step(self, batch: Batch, code: Code) -> None:
        super().after_step(batch, code)
        self.mean_size.lerp_(per_token(self.slopes(gradient(batch)).abs_().mean(1).sum(), len(batch.x)), 1 - MEMORY)

    @torch.no_grad()
    def fold(self, scale: float) -> None:
        self.mean_size.mul_(self.scale / scale)  # where activations grow, gradients shrink
        super().fold(scale)


def gradient(batch: Batch) -> Float[Tensor, "batch d_in"]:
    """The batch's gradient, if it has one that fits."""
    if batch.grad is None:
        raise ValueError(
            "a batch must have the gradient of the model's loss to train a g-SAE, got none; stream them with "
            "Activations(..., grad=True)"
        )
    if batch.grad.shape != batch.x.shape:
        raise ValueError(f"grad must have the shape of x, {tuple(batch.x.shape)}, got {tuple(batch.grad.shape)}")
    return batch.grad
