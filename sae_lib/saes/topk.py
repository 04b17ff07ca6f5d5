"""TopK: each token keeps its k best latents.

Gao, la Tour, Tillman, Goh, Troll, Radford, Sutskever, Leike, Wu 2024, "Scaling and evaluating sparse autoencoders",
arXiv 2406.04093.

    z     = TopK((x - b_dec) W_enc + b_enc)           the k largest of each row, if positive
    x_hat = z W_dec + b_dec                           rows of W_dec have norm 1
    L     = |x - x_hat|^2 + aux_coeff * AuxK          mean over tokens of the sum over dimensions; `sae_lib.sae.auxk`

Differences from the paper: activations are divided by one global number, not normalised token by token; the loss is
not divided by the variance (that number makes the mean squared norm 1); a latent is dead after 5% of the run (at most
10 million tokens), so that AuxK acts in short runs too. A token with fewer than k positive scores keeps fewer: in
some implementations latents of value zero count as alive there and escape AuxK. How known: from code of
dictionary_learning and openai/sparse_autoencoder; of the paper's text only the abstract was available.
"""

from __future__ import annotations

import torch
from torch import nn

from sae_lib.data import Batch
from sae_lib.embedding_loss import EmbeddingLoss
from sae_lib.sae import SAE, Loss, auxk, column_major, geometric_median, positive, squared_error, unit_dictionary, whole
from sae_lib.selection import top_of_rows
from sae_lib.sparse import Code, Scores


class TopKSAE(SAE):
    """The k best latents of each token. Chapter `topk`.

    Args:
        d_in: width of the activations.
        d_sae: number of latents.
        k: living latents a token, in [1, d_sae].
        aux_coeff: weight of AuxK (alpha of the paper), at least 0.
        embedding_coeff: weight of the loss of the chapter `neuron_embeddings` (`sae_lib.embedding_loss`), at least 0.
        seed: of the initial weights.

    Raises:
        ValueError: if an argument is out of its range.
    """

    name = "topk"

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: int,
        aux_coeff: float = 1 / 32,
        embedding_coeff: float = 0.0,
        seed: int = 0,
    ):
        super().__init__(d_in, d_sae, seed)
        self.k = whole("k", k, most=d_sae, most_name="d_sae")
        self.aux_coeff = positive("aux_coeff", aux_coeff, or_zero=True)
        directions = unit_dictionary(d_in, d_sae, self.generator)
        self.W_enc = nn.Parameter(column_major(directions.T))  # (d_in, d_sae)
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(directions.clone())  # (d_sae, d_in)
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.embedding_coeff = positive("embedding_coeff", embedding_coeff, or_zero=True)
        self.embedding = EmbeddingLoss(d_in, d_sae, self.embedding_coeff)
        if self.embedding_coeff:
            self.in_units_of_x += ("embedding.average",)

    @torch.no_grad()
    def start(self, batch: Batch, tokens: int) -> None:
        super().start(batch, tokens)
        if not self.tokens_trained:
            self.b_dec.copy_(geometric_median(batch.x))

    def before_step(self, progress: float) -> None:
        self.embedding.before_step(progress)

    def select(self, scores: Scores, batch: Batch) -> Code:
        return top_of_rows(scores, self.k)

    def loss(self, batch: Batch) -> Loss:
        scores = self.scores(batch.x)
        code = self.select(scores, batch)
        x_hat = self.decode(code)
        return Loss(
            {
                "reconstruction": squared_error(batch.x, x_hat),
                "aux": self.aux_coeff * auxk(self, scores, batch.x - x_hat),
                **self.embedding(batch.x, code, self.W_enc),
            },
            code,
            x_hat,
        )

    @torch.no_grad()
    def after_step(self, batch: Batch, code: Code) -> None:
        super().after_step(batch, code)
        self.embedding.after_step(batch.x, code)
