"""What a language model loses when its activations at a site are replaced. Chapter `evaluation`.

    loss_patched = the model's mean next-token loss with x_hat in the place of x
    loss_recovered = (loss_zero - loss_patched) / (loss_zero - loss_clean)

BOS keeps its own activation in all of them. `sae_lib.evaluate` uses this for SAEs as they are; a measurement that
chooses latents otherwise, with the whole batch or with gradients in view, hands in its own reconstructions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sae_lib.activations import Activations
from sae_lib.metrics.reconstruction import divergences, loss_recovered
from sae_lib.models import Tokens

MODEL_TOKENS = 16_384
"""Tokens on which the model itself is run, if no other number is given."""

Reconstruct = Callable[[Float[Tensor, "some d_in"], slice], Float[Tensor, "some d_in"]]
"""From activations, and which of all rows they are, to what shall stand in their place."""


class PatchedLoss:
    """Held-out texts, the model's own loss on them, and its loss with reconstructions. Chapter `evaluation`.

    Rows are the texts' tokens in reading order, without BOS and padding.

    Args:
        stream: over texts, of a language model.
        tokens: to predict; as many whole forward passes as hold them.
        mean: activation of the ablation by the mean; None takes the mean of these rows.

    Attributes:
        sequences: what the model is given, a forward pass at a time.
        x: the activations.
        text: the number of the text, or window of one, that each row belongs to; ascending.
        loss: the model's own loss on each row's token, in nats.
        tokens: number of predictions.
        loss_clean: their mean loss with the site as it is.
        loss_zero: with the site zeroed.
        loss_mean: with the site at its mean.

    >>> import sae_lib
    >>> texts = sae_lib.load_texts("pocket", "test", limit=8)
    >>> stream = sae_lib.Activations(sae_lib.load_model("pocket"), "blocks.1.hook_resid_post", texts=texts)
    >>> patched = PatchedLoss(stream, tokens=100)
    >>> x_hat = 0.1 * patched.x
    >>> perfect, shrunk, zero = patched([lambda x, rows: x, lambda x, rows: x_hat[rows], lambda x, rows: 0 * x])
    >>> perfect["loss_recovered"], zero["loss_recovered"], zero["loss_recovered"] < shrunk["loss_recovered"] < 1
    (1.0, 0.0, True)
    """

    @torch.no_grad()
    def __init__(self, stream: Activations, tokens: int = MODEL_TOKENS, mean: Float[Tensor, " d_in"] | None = None):
        self.model, self.site, self.sequences, self.tokens = stream.model, stream.site, [], 0
        for sequence in stream.sequences(by_length=False):
            self.sequences.append(sequence)
            self.tokens += int(sequence.mask[:, 1:].sum())
            if self.tokens >= tokens:
                break
        contents = [self.model.content(sequence) for sequence in self.sequences]
        read = [self.model.activations(sequence, self.site) for sequence in self.sequences]
        self.x = torch.cat([x[content] for x, content in zip(read, contents, strict=True)]).float()
        firsts = torch.tensor([0, *(len(content) for content in contents)]).cumsum(0).tolist()
        self.text = torch.cat(
            [content.nonzero()[:, 0] + first for content, first in zip(contents, firsts, strict=False)]
        )
        mean = self.x.double().mean(0) if mean is None else mean
        replaced = {"zero": lambda x, rows: torch.zeros_like(x), "mean": lambda x, rows: mean.to(x).expand_as(x)}
        losses, sums = [], dict.fromkeys(replaced, 0.0)
        clean = 0.0
        for sequence, rows in self.parts():
            log_p, next_tokens = self.predicted(sequence), targets(sequence)
            clean += F.nll_loss(log_p, next_tokens, reduction="sum").item()
            of_content = self.model.content(sequence)[:, 1:][sequence.mask[:, 1:]]
            losses.append(F.nll_loss(log_p, next_tokens, reduction="none")[of_content])
            for name, reconstruct in replaced.items():
                log_q = self.predicted(sequence, reconstruct, rows)
                sums[name] += F.nll_loss(log_q, next_tokens, reduction="sum").item()
        self.loss = torch.cat(losses)
        self.loss_clean = clean / self.tokens
        self.loss_zero, self.loss_mean = (total / self.tokens for total in sums.values())

    def parts(self) -> Iterator[tuple[Tokens, slice]]:
        """Each forward pass, and which rows it holds."""
        first = 0
        for sequence in self.sequences:
            size = int(self.model.content(sequence).sum())
            yield sequence, slice(first, first + size)
            first += size

    def predicted(
        self, sequence: Tokens, reconstruct: Reconstruct | None = None, rows: slice = slice(None)
    ) -> Float[Tensor, "some vocabulary"]:
        """Logarithms of the probabilities of each next token that counts."""
        content = self.model.content(sequence)

        def patch(x: Float[Tensor, "batch pos d_in"]) -> Float[Tensor, "batch pos d_in"]:
            return x.index_put((content,), reconstruct(x[content].float(), rows).to(x.dtype))

        patched = () if reconstruct is None else (self.site, patch)
        return self.model.logits(sequence, *patched)[:, :-1][sequence.mask[:, 1:]].float().log_softmax(-1)

    @torch.no_grad()
    def __call__(self, reconstructions: Sequence[Reconstruct]) -> list[dict[str, int | float]]:
        """Loss and divergence of the model with each of the reconstructions.

        Returns:
            Of each, ``loss_patched``, ``loss_recovered`` against zero and ``loss_recovered_mean`` against the mean,
            ``kl`` of the patched prediction from the clean one; and what does not depend on it: ``loss_clean``,
            ``loss_zero``, ``loss_mean``, ``model_tokens``.
        """
        losses, away = [0.0] * len(reconstructions), [0.0] * len(reconstructions)
        for sequence, rows in self.parts():
            log_p = self.predicted(sequence)
            for place, reconstruct in enumerate(reconstructions):
                log_q = self.predicted(sequence, reconstruct, rows)
                losses[place] += F.nll_loss(log_q, targets(sequence), reduction="sum").item()
                away[place] += divergences(log_p, log_q).sum().item()
        shared = {
            "loss_clean": self.loss_clean,
            "loss_zero": self.loss_zero,
            "loss_mean": self.loss_mean,
            "model_tokens": self.tokens,
        }
        return [
            shared
            | {
                "loss_patched": loss / self.tokens,
                "loss_recovered": loss_recovered(self.loss_clean, loss / self.tokens, self.loss_zero),
                "loss_recovered_mean": loss_recovered(self.loss_clean, loss / self.tokens, self.loss_mean),
                "kl": divergence / self.tokens,
            }
            for loss, divergence in zip(losses, away, strict=True)
        ]


def targets(sequence: Tokens) -> Tensor:
    """The next tokens that count."""
    return sequence.ids[:, 1:][sequence.mask[:, 1:]]
