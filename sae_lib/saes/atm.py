"""Adaptive Temporal Masking: latents that matter little, by running averages, are switched off by chance in training.

Li, Ren 2025, "Time-aware feature selection: adaptive temporal masking for stable sparse autoencoder training", arXiv
2510.08855.

    f     = ReLU((x - b_dec) W_enc + b_enc)
    z     = f * kept                                  kept_i = 0 with probability p_i, drawn once a step, else 1
    x_hat = z W_dec + b_dec                           rows of W_dec have norm 1
    L     = |x - x_hat|^2 + l1_coeff * sum_i z_i      mean over tokens

    p_i   = 1 - exp(-rate (theta - I_i) / theta)      where I_i < theta, else 0
    theta = mean(I) + deviations * sd(I)              over all latents
    I_i   = weighted mean of A_i / mean(A)            over the three running averages A below

    magnitude      mean over tokens of f_i
    frequency      share of the tokens with f_i > 0
    contribution   mean over tokens of |e + f_i d_i|^2 - |e|^2 = 2 f_i <e, d_i> + f_i^2, not below 0: how much the
                   squared error rises without the latent; e = x - f W_dec - b_dec, d_i = W_dec,i

`rate` bounds the probability: a latent that never fires is masked in 1 - exp(-rate) of the steps (0.63 at 1).

Differences from the paper, and how known: of the paper itself only title, abstract and the first sentences were
available. They name a probabilistic mask, importance that evolves over training, and the three averages; the equations
of p and theta come from a summary by others. All else is our reading: the plain SAE with L1 below the mask; how the
three averages join, and what contribution means; that they are of the code without the mask, so that no latent is held
down by having been masked; one draw a latent and step; that what is kept is not scaled up; every constant. Nothing is
masked during the first 10% of the run. The averages remember 4% of the run, the 100 of 2,441 steps of an earlier idea
of the authors; that they start at zero cancels in A_i / mean(A). Whether the mask stays on after training is not known
either: `eval_mask` has the three ways. Coefficients presume activations of mean squared norm 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_lib.data import Batch
from sae_lib.distributed import per_token
from sae_lib.sae import SAE, Loss, column_major, positive, squared_error, unit_dictionary
from sae_lib.selection import near
from sae_lib.sparse import Code, Scores, products

WARM_UP, UNMASKED, MEMORY = 0.05, 0.1, 0.04
"""Shares of the run: over which the penalty grows; without a mask; that the running averages remember."""
EVAL_MASKS = ("none", "hard", "expected")
"""What becomes of the mask after training."""


class ATMSAE(SAE):
    """ReLU with an L1 penalty, and a mask over latents of little importance. Chapter `atm`.

    Args:
        d_in: width of the activations.
        d_sae: number of latents.
        l1_coeff: weight of the penalty, above 0.
        deviations: how many standard deviations the threshold lies above the mean importance (c); below
            ``-mean / sd`` the threshold is no longer positive, and nothing is masked.
        rate: how fast the probability of the mask rises below the threshold (r), at least 0; 0 is no mask, and a very
            large one masks all that lies below with certainty.
        weights: of magnitude, frequency and contribution in the importance, each at least 0, not all 0; their sum does
            not matter.
        eval_mask: after training "none": the code is f; "hard": only latents that are not below the threshold live;
            "expected": f times the probability to be kept.
        seed: of the initial weights and of the masks.

    Attributes:
        magnitude: running average of f, one number a latent.
        frequency: that of whether it fires.
        contribution: that of how much the squared error rises without it.
        times_masked: in how many steps each latent was masked, of the `draws` steps that drew a mask.

    Raises:
        ValueError: if an argument is out of its range.
    """

    name = "atm"
    in_units_of_x = ("b_enc", "b_dec", "magnitude")

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        l1_coeff: float,
        deviations: float = 0.5,
        rate: float = 1.0,
        weights: Sequence[float] = (1.0, 1.0, 1.0),
        eval_mask: str = "none",
        seed: int = 0,
    ):
        super().__init__(d_in, d_sae, seed)
        self.l1_coeff = positive("l1_coeff", l1_coeff)
        if not isinstance(deviations, int | float) or not abs(deviations) < float("inf"):
            raise ValueError(f"deviations must be a finite number, got {deviations!r}")
        self.deviations = float(deviations)
        self.rate = positive("rate", rate, or_zero=True)
        if not isinstance(weights, Sequence) or len(weights) != 3:
            raise ValueError(f"weights must be of magnitude, frequency and contribution, got {weights!r}")
        self.weights = tuple(positive("a weight", weight, or_zero=True) for weight in weights)
        if not any(self.weights):
            raise ValueError(f"weights must not all be 0, got {self.weights}; for no mask, say rate=0")
        if eval_mask not in EVAL_MASKS:
            raise ValueError(f"eval_mask must be one of {', '.join(EVAL_MASKS)}, got {eval_mask!r}")
        self.eval_mask = eval_mask
        directions = unit_dictionary(d_in, d_sae, self.generator)
        self.W_enc = nn.Parameter(column_major(0.1 * directions.T))  # (d_in, d_sae)
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(directions.clone())  # (d_sae, d_in)
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        for average in ("magnitude", "frequency", "contribution"):
            self.register_buffer(average, torch.zeros(d_sae))
        self.register_buffer("decay", torch.tensor(0.99))
        self.register_buffer("kept", torch.ones(d_sae), persistent=False)  # drawn anew before each step
        self.register_buffer("times_masked", torch.zeros(d_sae, dtype=torch.int64))
        self.register_buffer("draws", torch.tensor(0))
        self.warm = 1.0

    # The mask ---------------------------------------------------------------------------------------------------------

    @property
    def importance(self) -> Float[Tensor, " d_sae"]:
        """I: the weighted mean of the three averages, each divided by its mean over latents; its own mean is 1."""
        averages = torch.stack([self.magnitude, self.frequency, self.contribution])
        relative = averages / averages.mean(1, keepdim=True).clamp(min=torch.finfo(averages.dtype).tiny)
        weights = averages.new_tensor(self.weights)
        return weights @ relative / weights.sum()

    @property
    def threshold(self) -> Float[Tensor, ""]:
        """theta: latents of less importance may be masked."""
        return self.importance.mean() + self.deviations * self.importance.std(correction=0)

    @property
    def mask_probability(self) -> Float[Tensor, " d_sae"]:
        """p: how likely each latent is masked in the next step, in [0, 1]."""
        importance, threshold = self.importance, self.threshold
        masked = 1 - torch.exp(-self.rate * (threshold - importance) / threshold)
        return torch.where(importance < threshold, masked, 0.0)

    # The contract -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def start(self, batch: Batch, tokens: int) -> None:
        super().start(batch, tokens)
        steps = tokens / len(batch.x)
        self.decay.fill_(1 - 1 / max(1.0, MEMORY * steps))

    @torch.no_grad()
    def before_step(self, progress: float) -> None:
        self.warm = min(1.0, progress / WARM_UP)
        self.kept.fill_(1)
        if progress >= UNMASKED:
            draw = torch.rand(self.d_sae, generator=self.generator).to(self.kept.device)
            self.kept.copy_(draw >= self.mask_probability)
            self.times_masked.add_(self.kept == 0)
            self.draws.add_(1)

    def select(self, scores: Scores, batch: Batch) -> Code:
        code = near(scores, torch.zeros_like(self.b_enc)).map(torch.relu).living()
        if self.training or self.eval_mask == "none":
            return code
        hard = (self.importance >= self.threshold).to(self.b_enc.dtype)
        return code.map(torch.mul, hard if self.eval_mask == "hard" else 1 - self.mask_probability).living()

    def loss(self, batch: Batch) -> Loss:
        """`Loss.code` is f, without the mask: what fires, and the averages, are of f."""
        code = self.select(self.scores(batch.x), batch)
        masked = code.map(torch.mul, self.kept) if self.training else code
        x_hat = self.decode(masked)
        return Loss(
            {
                "reconstruction": squared_error(batch.x, x_hat),
                "sparsity": self.l1_coeff * self.warm * per_token(masked.sum(), len(batch.x)),
            },
            code,
            x_hat,
        )

    @torch.no_grad()
    def after_step(self, batch: Batch, code: Code) -> None:
        super().after_step(batch, code)
        f, error = code.values, batch.x - self.decode(code)
        rise = 2 * f * products(error, self.W_dec, code.pairs) + f.square()
        sums = f.new_zeros(3, self.d_sae).index_add_(1, code.cols, torch.stack([f, torch.ones_like(f), rise]))
        magnitude, frequency, contribution = per_token(sums, len(batch.x))
        self.magnitude.lerp_(magnitude, 1 - self.decay)
        self.frequency.lerp_(frequency, 1 - self.decay)
        self.contribution.lerp_(contribution.clamp(min=0), 1 - self.decay)

    @torch.no_grad()
    def fold(self, scale: float) -> None:
        self.contribution.mul_((scale / self.scale) ** 2)
        super().fold(scale)
