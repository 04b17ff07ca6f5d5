"""The embedding loss: inputs that activate a latent shall look alike, once weighted by its encoder row.

Foote 2024, "Tackling polysemanticity with neuron embeddings", arXiv 2411.08166, section 3.3.2. An option of `ReLUSAE`
and `TopKSAE`.

    L_N  = sum over the latents i that live on x, and lived before, of 1 - cos(a_i o w_i, x o w_i)        (eq. 4)
    L    = the variant's loss + embedding_coeff * L_N                                                     (eq. 5)
    a_i <- 0.9 a_i + 0.1 mean of x over the tokens of the batch on which i lives                          (eq. 6)

with ``w_i = W_enc[:, i]`` and o the product entry by entry. An average starts as the first such mean, and is moved
after the step. It is held constant, as x is, so the gradient reaches the encoder's weights and nothing else. Averages
are kept from the first step on; the loss is off for the first 40% of the run (the paper's 200 of 469 steps).

L_N has a trivial minimum: where x is not negative, as after a ReLU, a row with one weight left makes every distance 0.
Whether distances fell because latents became purer or because rows became narrower must be measured beside it.

Differences from the paper: it sums eq. 4 over a batch of fixed size, and so do we, but divide by the tokens, as in all
terms of this library; the coefficient then does not depend on the batch size. It is a sum over latents, not a mean over
living pairs, which would weigh the other terms anew whenever L0 moves. What becomes of several inputs of a batch that
activate one latent is not said: one update with their mean. How known: from the paper's text; its training code is not
published.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_lib.distributed import per_token, total
from sae_lib.sparse import Code, Pairs, Score, products, sum_by_latent

MOMENTUM = 0.9
"""Share of an average that a step keeps."""
OFF = 0.4
"""Share of the run before the loss is switched on."""


class EmbeddingLoss(nn.Module):
    """The term of the loss and the averages that it needs. With a coefficient of 0 it has none and does nothing.

    Args:
        d_in: width of the activations.
        d_sae: number of latents.
        coeff: weight of the term, at least 0.

    Attributes:
        average: (d_sae, d_in), the running average of the inputs that activated each latent.
        seen: (d_sae,), whether there was one.
    """

    average: Float[Tensor, "d_sae d_in"]

    def __init__(self, d_in: int, d_sae: int, coeff: float):
        super().__init__()
        self.coeff, self.on = coeff, True
        if coeff:
            self.register_buffer("average", torch.zeros(d_sae, d_in))
            self.register_buffer("seen", torch.zeros(d_sae, dtype=torch.bool))

    def before_step(self, progress: float) -> None:
        """`progress` goes from 0 to 1 over the run."""
        self.on = progress >= OFF

    def forward(
        self, x: Float[Tensor, "batch d_in"], code: Code, W_enc: Float[Tensor, "d_in d_sae"]
    ) -> dict[str, Float[Tensor, ""]]:
        """The term by its name, ``embedding``: ``coeff * L_N``, mean over tokens; of a coefficient of 0, no term."""
        if not self.coeff:
            return {}
        if not self.on:
            return {"embedding": x.new_zeros(())}
        distances = 1 - embedding_cosines(x, self.average, W_enc, code.pairs)
        return {"embedding": self.coeff * per_token((distances * self.seen[code.cols]).sum(), len(x))}

    @torch.no_grad()
    def after_step(self, x: Float[Tensor, "batch d_in"], code: Code) -> None:
        """Move the averages of the latents that live in this batch, that of all processes (eq. 6)."""
        if not self.coeff:
            return
        sums = sum_by_latent(x, torch.ones_like(code.values), code.pairs)
        counts = torch.bincount(code.cols, minlength=len(self.seen)).to(x.dtype)
        both = total(torch.cat([sums, counts[:, None]], dim=1))
        sums, counts = both[:, :-1], both[:, -1:]
        memory = MOMENTUM * self.seen[:, None]
        moved = memory * self.average + (1 - memory) * sums / counts.clamp(min=1)
        self.average.copy_(torch.where(counts > 0, moved, self.average))
        self.seen |= counts.squeeze(1) > 0


def embedding_cosines(
    x: Float[Tensor, "batch d_in"],
    average: Float[Tensor, "d_sae d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    pairs: Pairs,
) -> Float[Tensor, " pairs"]:
    """``cos(a_i o w_i, x_t o w_i)`` of each pair (t, i); its gradient goes to W_enc. 0 where an embedding is zero.

    ``<a o w, x o w> = <x, a w^2>`` and ``|x o w|^2 = <x^2, w^2>``, with powers entry by entry: two inner products a
    pair, as of a code's scores, and no matrix of (pairs, d_in).
    """
    x, squared = x.detach(), W_enc.T.square()
    inner = inner_products(x, average * squared, pairs)
    norms = inner_products(x.square(), squared, pairs) * (average.square() * squared).sum(1)[pairs.cols]
    return inner / norms.clamp(min=torch.finfo(norms.dtype).tiny).sqrt()


def inner_products(
    x: Float[Tensor, "batch d_in"], directions: Float[Tensor, "d_sae d_in"], pairs: Pairs
) -> Float[Tensor, " pairs"]:
    """``<x_t, directions_i>`` of each pair (t, i), with the sparse gradient of scores."""
    values = products(x, directions.detach(), pairs)
    return Score.apply(x, directions.T, directions.new_zeros(len(directions)), None, (values, x), pairs)
