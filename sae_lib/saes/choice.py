"""Mutual Choice and Feature Choice: tokens and latents choose each other, or each latent chooses its tokens.

Ayonrinde 2024, "Adaptive sparse allocation with mutual choice and feature choice sparse autoencoders", arXiv
2411.02124. With B tokens in the batch and F latents, each is a choice of k B of the B x F pairs:

    u = ReLU((x - b_dec) W_enc + b_enc)
    token choice      the k largest of each row                      TopK
    mutual choice     the k B largest of all                         BatchTopK, by another name
    feature choice    the m_i largest of column i                    equations 3 to 5; with

    m_i = k B / Z / (i + shift)^exponent,   Z = sum over i of (i + shift)^-exponent       Zipf budgets, algorithm 1
    m_i = k B / F                                                                         uniform budgets

where i = 1 is the latent that lives most often. The paper's alpha is `exponent`, its beta `shift`. Training has two
phases: mutual choice with two auxiliary losses, then feature choice with none,

    L = |x - x_hat|^2 + aux_coeff * AuxK(dead) + zipf_coeff * AuxK(dying, not yet dead)         `sae_lib.sae.auxk`

where a latent is *dying* (definition 3.1) if it is among the last quarter by density, lives less than 0.6 times as
often as Zipf's law says of its rank, m_i / B, and so does every latent after it.

In evaluation a token is alone: mutual choice compares with one threshold, as BatchTopK does, feature choice with one a
latent. Of either kind of code, the largest values of a token are a code too (`sae_lib.selection.top_of_rows`).

Differences from the paper, whose text was read in its anonymised revision of November 2024: m_i is rounded up or down
at random, right on average, where algorithm 1 rounds down, so that latents with m_i < 1 would never live (chapter
`choice`). Budgets larger than the batch are refused, not cut. Ours, where the paper is silent: how a latent's threshold
is found; both auxiliary losses weigh 1/32, and the second leaves out the dead, which are dying too and would count
twice; densities are running means; ranks are frozen when phase two begins, which is the last 20% of the run, in which
the learning rate falls. Activations are scaled by one global number, not centred and normalised token by token; the
optimiser is that of the other variants.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lib.data import Batch
from sae_lib.distributed import count, least, per_token, total
from sae_lib.sae import Loss, auxk, positive, squared_error
from sae_lib.saes.batchtopk import BatchTopKSAE
from sae_lib.selection import top_of_columns
from sae_lib.sparse import Code, Scores

DYING = 0.6
"""A latent that lives less often than this share of what Zipf's law says may be dying."""
DENSITY_MEMORY = 0.99
"""Share of the running mean of densities that one step keeps."""
STEP, LEAST_STEP = 0.3, 0.02
"""A latent's n-th step towards its threshold is 0.3 / n of it, and at least 0.02. Measured: after 60 to 70 steps of
phase two, the L0 of evaluation is about 2% above k with budgets by Zipf's law, 5% with equal ones."""


class MutualChoiceSAE(BatchTopKSAE):
    """BatchTopK with a second auxiliary loss, on latents that are about to die. Chapter `choice`.

    Args:
        d_in: width of the activations.
        d_sae: number of latents.
        k: living latents a token on average, in [1, d_sae].
        aux_coeff: weight of AuxK on dead latents, at least 0.
        zipf_coeff: weight of the same loss on dying latents, at least 0. At 0 this is BatchTopK to the bit.
        exponent: alpha of Zipf's law, at least 0.
        shift: beta of Zipf's law, at least 0; `sae_lib.metrics.zipf_shift` fits it to densities.
        seed: of the initial weights.

    Raises:
        ValueError: if an argument is out of its range.
    """

    name = "mutual_choice"

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: int,
        aux_coeff: float = 1 / 32,
        zipf_coeff: float = 1 / 32,
        exponent: float = 1.0,
        shift: float = 6.8,
        seed: int = 0,
    ):
        super().__init__(d_in, d_sae, k, aux_coeff, seed)
        self.zipf_coeff = positive("zipf_coeff", zipf_coeff, or_zero=True)
        self.exponent = positive("exponent", exponent, or_zero=True)
        self.shift = positive("shift", shift, or_zero=True)
        self.register_buffer("density", torch.ones(d_sae))  # nothing is dying until it was seen
        self.register_buffer("density_weight", torch.tensor(0.0))

    @property
    def dying(self) -> Bool[Tensor, " d_sae"]:
        """Latents that definition 3.1 calls dying: a suffix of the ranking by density, within its last quarter."""
        order = self.density.argsort(descending=True, stable=True)
        expected = zipf_densities(self.d_sae, self.k, self.exponent, self.shift).to(self.density)
        rare = self.density[order] < DYING * expected
        rare[: 3 * self.d_sae // 4] = False
        suffix = rare.flip(0).int().cumprod(0).flip(0).bool()
        return torch.zeros_like(rare).index_copy_(0, order, suffix)

    def loss(self, batch: Batch) -> Loss:
        scores = self.scores(batch.x)
        code = self.select(scores, batch)
        x_hat = self.decode(code)
        residual = batch.x - x_hat
        return Loss(
            {
                "reconstruction": squared_error(batch.x, x_hat),
                "aux": self.aux_coeff * auxk(self, scores, residual),
                "aux_zipf": self.zipf_coeff * auxk(self, scores, residual, self.dying & ~self.dead),
            },
            code,
            x_hat,
        )

    @torch.no_grad()
    def after_step(self, batch: Batch, code: Code) -> None:
        super().after_step(batch, code)
        fired = torch.bincount(code.cols, minlength=self.d_sae).to(self.density)
        self.density_weight.mul_(DENSITY_MEMORY).add_(1 - DENSITY_MEMORY)
        self.density.lerp_(per_token(fired, len(batch.x)), (1 - DENSITY_MEMORY) / self.density_weight)


class FeatureChoiceSAE(MutualChoiceSAE):
    """Mutual Choice, then each latent its share of the tokens: m_i for the latent of rank i. Chapter `choice`.

    Args:
        d_in: width of the activations.
        d_sae: number of latents.
        k: living latents a token on average, in [1, d_sae].
        budgets: of the latents in phase two: by Zipf's law, or the same for all.
        phase_two: share of the run, at its end, that is feature choice; between 0 and 1.
        aux_coeff: weight of AuxK on dead latents in phase one, at least 0.
        zipf_coeff: weight of the same loss on dying latents in phase one, at least 0.
        exponent: alpha of Zipf's law, at least 0.
        shift: beta of Zipf's law, at least 0; `sae_lib.metrics.zipf_shift` fits it to densities.
        seed: of the initial weights, and of the rounding.

    Raises:
        ValueError: if an argument is out of its range, or a latent's budget would exceed the batch.
    """

    name = "feature_choice"

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: int,
        budgets: Literal["zipf", "uniform"] = "zipf",
        phase_two: float = 0.2,
        aux_coeff: float = 1 / 32,
        zipf_coeff: float = 1 / 32,
        exponent: float = 1.0,
        shift: float = 6.8,
        seed: int = 0,
    ):
        super().__init__(d_in, d_sae, k, aux_coeff, zipf_coeff, exponent, shift, seed)
        if budgets not in ("zipf", "uniform"):
            raise ValueError(f"budgets must be zipf or uniform, got {budgets!r}")
        self.register_buffer("phase", torch.tensor(1))
        self.register_buffer("rank", torch.arange(d_sae))  # of each latent in phase two; 0 is the most frequent
        self.budgets, self.phase_two = budgets, positive("phase_two", phase_two)
        if self.phase_two >= 1:
            raise ValueError(f"phase_two must be below 1, got {phase_two}: ranks come from what the latents did before")
        if (largest := self.budget().max()) > 1:
            raise ValueError(
                f"budgets must not exceed the batch, got {largest:.2f} of it for the most frequent latent; lower k={k} "
                f"or exponent={exponent}, or raise shift={shift}"
            )
        self.register_buffer("threshold", torch.zeros(d_sae))
        self.register_buffer("moves", torch.zeros(d_sae))  # of each threshold in phase two
        self.register_buffer("draws", torch.zeros(d_sae, dtype=torch.float64), persistent=False)

    def budget(self) -> Float[Tensor, " d_sae"]:
        """Share of the batch, m_i / B, that each latent may keep in phase two; by its rank."""
        exponent = self.exponent if self.budgets == "zipf" else 0.0
        return zipf_densities(self.d_sae, self.k, exponent, self.shift).to(self.rank.device)[self.rank]

    @torch.no_grad()
    def before_step(self, progress: float) -> None:
        if progress < 1 - self.phase_two:
            self.phase.fill_(1)
            return
        if self.phase == 1:
            self.phase.fill_(2)
            order = self.density.argsort(descending=True, stable=True)
            self.rank[order] = torch.arange(self.d_sae, device=order.device)
            self.moves.zero_()
        self.draws.copy_(torch.rand(self.d_sae, generator=self.generator, dtype=torch.float64))

    def counts(self, tokens: int) -> Int[Tensor, " d_sae"]:
        """On how many of the batch's `tokens` each latent may live: its budget, rounded up or down at random."""
        return (tokens * self.budget() + self.draws).floor().long()

    def select(self, scores: Scores, batch: Batch) -> Code:
        if self.training and self.phase == 2:
            return top_of_columns(scores, self.counts(count(scores.shape[0])))
        return super().select(scores, batch)

    def loss(self, batch: Batch) -> Loss:
        if self.phase == 1:
            return super().loss(batch)
        code = self.select(self.scores(batch.x), batch)
        x_hat = self.decode(code)
        return Loss({"reconstruction": squared_error(batch.x, x_hat)}, code, x_hat)

    def update_threshold(self, code: Code) -> None:
        """In phase two each latent has a threshold of its own, above which m_i tokens a batch shall lie on average.

        Their number N is then about Poisson's, and all c that are kept lie above it with the probability P(N >= c). So
        it rises where they do, and falls where they do not, by steps that cancel each other at this probability.
        """
        if self.phase == 1:
            return super().update_threshold(code)
        values = code.values.detach()
        smallest = least(torch.full_like(self.threshold, torch.inf).scatter_reduce_(0, code.cols, values, "amin"))
        kept = total(torch.bincount(code.cols, minlength=self.d_sae).double())
        likely = torch.special.gammainc(kept.clamp(min=1), count(code.shape[0]) * self.budget())  # P(N >= kept)
        self.moves.add_(kept > 0)
        step = (STEP / self.moves.clamp(min=1)).clamp(min=LEAST_STEP) * (kept > 0)
        self.threshold.mul_(1 + step * ((smallest > self.threshold).double() - likely).to(step))


def zipf_densities(d_sae: int, k: float, exponent: float, shift: float) -> Float[Tensor, " d_sae"]:
    """Densities that add up to k and follow Zipf's law, the most frequent latent first: m_i / B of algorithm 1, before
    it is rounded. Exponent 0 makes them equal."""
    shares = (torch.arange(1, d_sae + 1, dtype=torch.float64) + shift) ** -exponent
    return k * shares / shares.sum()


def nfm_loss(W_dec: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, ""]:
    """``|C|``, Frobenius norm of the matrix of cosines between all directions: small if they spread. Appendix C.

    Between ``d_sae / sqrt(d_in)`` (evenly spread) and d_sae (all alike), for d_sae of at least d_in. A small multiple
    of it may be added to a loss against feature splitting. Computed as ``|W^T W|`` of the unit rows W, which is the
    same number from a matrix (d_in, d_in).

    >>> nfm_loss(torch.tensor([[2.0, 0.0], [0.0, 1.0]])).item()  # cosines 1, 0, 0, 1
    1.4142135381698608
    """
    W = F.normalize(W_dec, dim=1)
    return (W.T @ W).norm()


def nfm_inf_loss(W_dec: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, ""]:
    """Mean over latents of the largest cosine with another latent's direction, in [-1, 1]. Appendix C.

    The paper's formula has the diagonal too, with which each maximum is 1, and the loss constant.

    >>> nfm_inf_loss(torch.tensor([[2.0, 0.0], [0.0, 1.0]])).item()
    0.0
    """
    W = F.normalize(W_dec, dim=1)
    return (W @ W.T).fill_diagonal_(-torch.inf).amax(1).mean()
