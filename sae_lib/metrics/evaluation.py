"""One trained SAE on a held-out stream: every number of `reconstruction`, and what the model loses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sae_lib.activations import Activations
from sae_lib.data import Batch
from sae_lib.metrics.reconstruction import Reconstruction, kl, loss_recovered
from sae_lib.models import LanguageModel
from sae_lib.sae import SAE, whole

MODEL_TOKENS = 16_384
"""Tokens on which the model itself is run, four times each; fewer if fewer are asked for."""


@torch.no_grad()
def evaluate(
    sae: SAE, stream: Iterable[Batch | Tensor], tokens: int = 100_000, allow_train: bool = False
) -> dict[str, int | float]:
    """Flat report of an SAE on held-out activations. Chapter `relu`.

    Reconstruction and sparsity by the definitions of `sae_lib.metrics.reconstruction`, over the first `tokens` rows.
    If the stream reads texts through a language model, also the model's loss (nats a token) on its first sequences
    with the site as it is (``loss_clean``), reconstructed (``loss_patched``), zeroed (``loss_zero``) and at its mean
    (``loss_mean``), the share recovered against either ablation, and the divergence ``kl`` of the patched prediction
    from the clean one. BOS is left as it is in all.

    Args:
        sae: with `encode` and `forward`.
        stream: held-out activations, in the units of x; `Activations`, or anything that yields `Batch` or (batch,
            d_in).
        tokens: rows to use, at least 1; fewer if the stream ends. The report says how many.
        allow_train: accept a stream that begins with texts the SAE was trained on.

    Raises:
        ValueError: if the stream was trained on, is empty, or has another width.
    """
    whole("tokens", tokens)
    fingerprint = getattr(stream, "fingerprint", None)
    if fingerprint in getattr(sae, "trained_on", ()) and not allow_train:
        raise ValueError(
            "stream must be held out, got the texts that the SAE was trained on; "
            "load another split, or say allow_train=True"
        )
    was_training = sae.training
    sae.eval()
    try:
        totals, total = Reconstruction(), torch.zeros((), dtype=torch.float64)
        for x in rows(stream, tokens):
            totals.update(x, sae(x), sae.encode(x))
            total = total + x.double().sum(0).to(total.device)
        report = totals.compute()
        if isinstance(stream, Activations) and isinstance(stream.model, LanguageModel):
            mean = (total / totals.tokens).to(stream.model.device, stream.model.dtype)
            report |= on_model(sae, stream, mean, min(tokens, MODEL_TOKENS))
    finally:
        sae.train(was_training)
    return report


def rows(stream: Iterable[Batch | Tensor], tokens: int) -> Iterator[Float[Tensor, "batch d_in"]]:
    """The stream's activations, up to `tokens` rows; a model's in reading order, which needs no shuffle buffer."""
    seen = 0
    parts = (stream.read(item)[0].float() for item in stream.sequences()) if isinstance(stream, Activations) else stream
    with tqdm(total=tokens, unit="token", unit_scale=True, desc="evaluate", leave=False, delay=2) as bar:
        for part in parts:
            x = (part.x if isinstance(part, Batch) else part)[: tokens - seen]
            if not len(x):
                continue
            yield x
            seen += len(x)
            bar.update(len(x))
            if seen >= tokens:
                return
    if not seen:
        raise ValueError("the stream must yield at least one row, got none; is it an iterator that was used up?")


def on_model(sae: SAE, stream: Activations, mean: Float[Tensor, " d_in"], tokens: int) -> dict[str, int | float]:
    """Loss and divergence of the model when the site is replaced, over the stream's first sequences."""
    model, site = stream.model, stream.site
    replacements = {
        "patched": lambda x: sae(x.flatten(0, 1).float()).to(x.dtype).view_as(x),
        "zero": torch.zeros_like,
        "mean": lambda x: mean.expand_as(x),
    }
    sums, counted, divergence = dict.fromkeys(("clean", *replacements), 0.0), 0, 0.0
    for sequence in stream.sequences():
        content = model.content(sequence).unsqueeze(-1)
        keep = sequence.mask[:, 1:]
        targets = sequence.ids[:, 1:][keep]
        clean = model.logits(sequence)[:, :-1][keep].float()
        sums["clean"] += torch.nn.functional.cross_entropy(clean, targets, reduction="sum").item()
        for name, replacement in replacements.items():
            logits = model.logits(sequence, site, lambda x, f=replacement, c=content: torch.where(c, f(x), x))[:, :-1][
                keep
            ].float()
            sums[name] += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
            if name == "patched":
                divergence += kl(clean, logits).sum().item()
        counted += len(targets)
        if counted >= tokens:
            break
    losses = {name: value / counted for name, value in sums.items()}
    return {
        **{f"loss_{name}": value for name, value in losses.items()},
        "loss_recovered": loss_recovered(losses["clean"], losses["patched"], losses["zero"]),
        "loss_recovered_mean": loss_recovered(losses["clean"], losses["patched"], losses["mean"]),
        "kl": divergence / counted,
        "model_tokens": counted,
    }
