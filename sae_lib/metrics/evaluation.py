"""Trained SAEs on a held-out stream: every number of `reconstruction`, and what the model loses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sae_lib.activations import Activations
from sae_lib.data import Batch
from sae_lib.metrics.patched import MODEL_TOKENS, PatchedLoss
from sae_lib.metrics.reconstruction import Reconstruction
from sae_lib.models import LanguageModel
from sae_lib.sae import SAE, as_batch, whole

Report = dict[str, int | float]


@torch.no_grad()
def evaluate(
    saes: SAE | Sequence[SAE], stream: Iterable[Batch | Tensor], tokens: int = 100_000, allow_train: bool = False
) -> Report | list[Report]:
    """Flat report of an SAE on held-out activations; for a list of SAEs a list of them. Chapter `relu`.

    Reconstruction and sparsity by the definitions of `sae_lib.metrics.reconstruction`, over the first `tokens` rows.
    If the stream reads texts through a language model, also the model's loss (nats a token) on the first 16,384 of
    them with the site as it is (``loss_clean``), reconstructed (``loss_patched``), zeroed (``loss_zero``) and at its
    mean (``loss_mean``), the share recovered against either ablation, and the divergence ``kl`` of the patched
    prediction from the clean one. BOS is left as it is in all. What does not depend on the SAE is computed once.

    Args:
        saes: one SAE or a list; they are moved to the stream's device.
        stream: held-out activations, in the units of x; `Activations`, or anything that yields `Batch` or (batch,
            d_in).
        tokens: rows to use, at least 1; fewer if the stream ends. The report says how many.
        allow_train: accept a stream that begins with texts an SAE was trained on.

    Raises:
        ValueError: if the list is empty, or the stream was trained on, is empty, or has another width.
    """
    several = [saes] if isinstance(saes, SAE) else list(saes)
    if not several:
        raise ValueError("saes must be an SAE or a list of at least one, got none")
    whole("tokens", tokens)
    fingerprint = getattr(stream, "fingerprint", None)
    if any(fingerprint in sae.trained_on for sae in several) and not allow_train:
        raise ValueError(
            "stream must be held out, got the texts that the SAE was trained on; "
            "load another split, or say allow_train=True"
        )
    modes = [sae.training for sae in several]
    try:
        for sae in several:
            sae.eval()
        accumulators, total = [Reconstruction() for _ in several], 0.0
        for x in rows(stream, tokens):
            for sae, accumulator in zip(several, accumulators, strict=True):
                sae.to(x.device)
                accumulator.update(x, sae(x), sae.encode(x))
            total = total + x.double().sum(0)
        reports = [accumulator.compute() for accumulator in accumulators]
        if isinstance(stream, Activations) and isinstance(stream.model, LanguageModel):
            mean = total / accumulators[0].tokens
            patched = PatchedLoss(stream, min(tokens, MODEL_TOKENS), mean)
            losses = patched([lambda x, rows, sae=sae: sae(x) for sae in several])
            reports = [report | loss for report, loss in zip(reports, losses, strict=True)]
    finally:
        for sae, mode in zip(several, modes, strict=True):
            sae.train(mode)
    return reports[0] if isinstance(saes, SAE) else reports


def rows(stream: Iterable[Batch | Tensor], tokens: int) -> Iterator[Float[Tensor, "batch d_in"]]:
    """The stream's activations, up to `tokens` rows; a model's in reading order, which needs no shuffle buffer."""
    seen, parts = 0, stream
    if isinstance(stream, Activations):
        parts = (stream.read(item)[0].float().flatten(0, -2) for item in stream.sequences(by_length=False))
    with tqdm(total=tokens, unit="token", unit_scale=True, desc="evaluate", leave=False, delay=2) as bar:
        for part in parts:
            x = as_batch(part).x[: tokens - seen]
            if not len(x):
                continue
            yield x
            seen += len(x)
            bar.update(len(x))
            if seen >= tokens:
                return
    if not seen:
        raise ValueError("the stream must yield at least one row, got none; is it an iterator that was used up?")
