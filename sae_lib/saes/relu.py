"""ReLU with an L1 penalty: the first sparse autoencoder of language models.

Bricken et al. 2023, "Towards monosemanticity", transformer-circuits.pub/2023/monosemantic-features; the form with
free norms is Anthropic's "Update on how we train SAEs", April 2024.

    z     = ReLU((x - b_dec) W_enc + b_enc)
    x_hat = z W_dec + b_dec
    L     = |x - x_hat|^2 + l1_coeff * sum_i z_i                  rows of W_dec have norm 1
    L     = |x - x_hat|^2 + l1_coeff * sum_i z_i |W_dec,i|        norm_weighted: free rows, no constraint

The penalty grows linearly over the first 5% of the run. In the second form, the rows' norms are folded into the
encoder at the end of training, which leaves the function as it is and makes latents comparable.

Differences from the papers: no resampling of dead latents. The coefficient presumes activations of mean squared norm
1, which training's global scale provides. How known: from code of dictionary_learning, whose 5,000 warm-up steps of
244,140 are our 5% at most; the papers' pages were not available. The p-annealed penalty (Karvonen et al. 2024) is
left out: it is the same architecture under another schedule, and no chapter needs it.
"""

from __future__ import annotations

import torch
from torch import nn

from sae_lib.data import Batch
from sae_lib.distributed import per_token
from sae_lib.embedding_loss import EmbeddingLoss
from sae_lib.sae import SAE, Loss, column_major, positive, squared_error, unit_dictionary
from sae_lib.selection import near
from sae_lib.sparse import Code, Scores

WARM_UP = 0.05
"""Share of the run over which the penalty grows to its full weight."""


class ReLUSAE(SAE):
    """Pairs with a positive score live; an L1 penalty keeps them few. Chapter `relu`.

    Args:
        d_in: width of the activations.
        d_sae: number of latents.
        l1_coeff: weight of the penalty, above 0; for activations of mean squared norm 1, 0.01 to 0.1 is usual.
        norm_weighted: penalise ``z_i |W_dec,i|`` and leave the rows' norms free (the April 2024 form).
        embedding_coeff: weight of the loss of the chapter `neuron_embeddings` (`sae_lib.embedding_loss`), at least 0.
        seed: of the initial weights.

    Raises:
        ValueError: if an argument is out of its range.
    """

    name = "relu"

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        l1_coeff: float,
        norm_weighted: bool = False,
        embedding_coeff: float = 0.0,
        seed: int = 0,
    ):
        super().__init__(d_in, d_sae, seed)
        self.l1_coeff = positive("l1_coeff", l1_coeff)
        self.norm_weighted = bool(norm_weighted)
        self.unit_rows = not self.norm_weighted
        directions = unit_dictionary(d_in, d_sae, self.generator)
        self.W_enc = nn.Parameter(column_major(0.1 * directions.T))  # (d_in, d_sae)
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter((0.1 if self.norm_weighted else 1.0) * directions)  # (d_sae, d_in)
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.warm = 1.0
        self.embedding_coeff = positive("embedding_coeff", embedding_coeff, or_zero=True)
        self.embedding = EmbeddingLoss(d_in, d_sae, self.embedding_coeff)
        if self.embedding_coeff:
            self.in_units_of_x += ("embedding.average",)

    def before_step(self, progress: float) -> None:
        self.warm = min(1.0, progress / WARM_UP)
        self.embedding.before_step(progress)

    def select(self, scores: Scores, batch: Batch) -> Code:
        return near(scores, torch.zeros_like(self.b_enc)).map(torch.relu).living()

    def loss(self, batch: Batch) -> Loss:
        code = self.select(self.scores(batch.x), batch)
        x_hat = self.decode(code)
        penalised = code.map(torch.mul, self.W_dec.norm(dim=1)) if self.norm_weighted else code
        return Loss(
            {
                "reconstruction": squared_error(batch.x, x_hat),
                "sparsity": self.l1_coeff * self.warm * per_token(penalised.sum(), len(batch.x)),
                **self.embedding(batch.x, code, self.W_enc),
            },
            code,
            x_hat,
        )

    @torch.no_grad()
    def after_step(self, batch: Batch, code: Code) -> None:
        super().after_step(batch, code)
        self.embedding.after_step(batch.x, code)

    @torch.no_grad()
    def fold(self, scale: float) -> None:
        super().fold(scale)
        if self.norm_weighted:
            norms = self.W_dec.norm(dim=1).clamp(min=torch.finfo(self.W_dec.dtype).tiny)
            self.W_dec.div_(norms.unsqueeze(1))
            self.W_enc.mul_(norms)
            self.b_enc.mul_(norms)
