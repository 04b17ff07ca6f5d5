"""What a latent does to the model: exactly, by zeroing it, and nearly, by gradients. Chapter `evaluation`.

At a site the activation is ``x = z W_dec + b_dec + e``, with e the error that the SAE leaves. A latent's *effect* on a
number m that is read off the logits is what m loses without it, where all else, the error too, stays as it is:

    ablation                effect_i  = m(x) - m(x - z_i W_dec,i)                       one forward pass a latent
    attribution             effect_i ~= z_i W_dec,i . dm/dx (x)                         one backward pass for all
    integrated gradients    effect_i ~= z_i W_dec,i . mean over l of dm/dx (x - (1 - l) z W_dec),   l = 1, 5/6, ... 1/6

All three have the units of m, and one sign: a positive effect means that the latent raises m. A drop that ablation
reports elsewhere as a negative score is a positive effect here. Where m is linear in x they agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lib.data import Batch
from sae_lib.models import LanguageModel, Tokens
from sae_lib.sae import SAE, whole
from sae_lib.sparse import Code, products

EFFECT_TEXTS, EFFECT_TOKENS = 32, 32
"""Texts in which single latents are zeroed, and most tokens of each, BOS included."""

Metric = Callable[[Float[Tensor, "batch pos vocab"]], Float[Tensor, "batch"]]
"""From the logits to one number a row, differentiably."""


def ablation(
    model: LanguageModel,
    tokens: Tokens,
    site: str,
    sae: SAE,
    metric: Metric,
    latents: Int[Tensor, "batch zeroed"],
    where: Bool[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, "batch"]:
    """``m(x) - m(x - sum_i z_i W_dec,i)``: what the metric loses without the latents i, zeroed together in each row.

    To zero many latents one by one on the same text, repeat its row. Units: those of the metric; 0 for latents that
    are silent. Blind to: what other latents would do in its place, had the model been trained without it. Source:
    Chanin et al. 2024 (arXiv 2409.14507), whose code has the opposite sign.

    Args:
        model: runs with the site as it is, and with the latents taken away.
        tokens: the texts.
        site: where `sae` reads.
        sae: on the model's device.
        metric: from the logits to a number for each row.
        latents: numbers of the latents to zero, for each row.
        where: positions at which they are zeroed; by default all tokens of the texts.

    Raises:
        ValueError: if shapes disagree, a latent does not exist, `where` marks nothing, padding or BOS, or the metric
            does not give a finite number for each row.
    """
    where, code = _code(model, tokens, site, sae, where)
    if len(latents) != len(where) or latents.ndim != 2:
        raise ValueError(f"latents must be (batch={len(where)}, zeroed), got {tuple(latents.shape)}")
    if latents.numel() and not 0 <= int(latents.min()) <= int(latents.max()) < sae.d_sae:
        raise ValueError(f"latents must be in [0, d_sae={sae.d_sae}), got {int(latents.min())} to {int(latents.max())}")
    row_of_position = where.nonzero()[:, 0]
    zeroed = (latents.to(where.device)[row_of_position[code.rows]] == code.cols[:, None]).any(1)
    removed = _added(sae, code, code.values * zeroed)
    with torch.no_grad():
        clean = _of_rows(metric, model.logits(tokens))
        without = _of_rows(metric, model.logits(tokens, site, lambda x: _put(x, where, x[where] - removed)))
    return clean - without


def gradient_times_activation(
    model: LanguageModel,
    tokens: Tokens,
    site: str,
    sae: SAE,
    metric: Metric,
    where: Bool[Tensor, "batch pos"] | None = None,
) -> Code:
    """``z_i W_dec,i . dm/dx``: gradient times activation, the first-order effect of every latent at every position.

    Units: those of the metric. Blind to: whatever is not linear; where the model's answer is saturated, a latent that
    carries it has no attribution. Source: Anthropic, "Circuits updates, March 2024", by way of Chanin et al. 2024.

    Args, returns and raises: as `integrated_gradients`, of which this is one step.
    """
    return integrated_gradients(model, tokens, site, sae, metric, where, steps=1)


def integrated_gradients(
    model: LanguageModel,
    tokens: Tokens,
    site: str,
    sae: SAE,
    metric: Metric,
    where: Bool[Tensor, "batch pos"] | None = None,
    steps: int = 6,
) -> Code:
    """``z_i W_dec,i . mean over l of dm/dx (x - (1 - l) z W_dec)``, with ``l = 1, (n - 1)/n, ... 1/n`` for n steps.

    The gradient is averaged while the latents fade together; with many steps, the effects add up to what the metric
    loses when all are zeroed (completeness). Units: those of the metric. Blind to: which of several latents that only
    matter together is to blame; the path leaves the activations that the model knows. Source: Chanin et al. 2024
    (arXiv 2409.14507), 6 steps at these levels; there the error fades with the latents, here it stays, as it does in
    ablation.

    Args:
        model: differentiated above the site.
        tokens: the texts.
        site: where `sae` reads.
        sae: on the model's device.
        metric: from the logits to a number for each row, differentiably; it must not mix rows.
        where: positions whose latents are attributed and fade; by default all tokens of the texts.
        steps: number of gradients, at least 1.

    Returns:
        The effects of the living latents, a `Code`: ``rows`` number the marked positions in the order of
        ``where.nonzero()``, ``cols`` are latents, ``values`` effects; ``.dense()`` is (positions, d_sae). Latents that
        are silent have none.

    Raises:
        ValueError: as `ablation`, or if the metric does not depend on the site.
    """
    whole("steps", steps)
    where, code = _code(model, tokens, site, sae, where)
    latent_part = _added(sae, code, code.values)
    gradient = torch.zeros_like(latent_part)
    for step in range(steps):
        gradient += _gradient(model, tokens, site, metric, where, latent_part * (step / steps)) / steps
    effects = code.values * products(gradient, sae.W_dec.detach().contiguous(), code.pairs)
    return Code(code.rows, code.cols, effects, code.shape)


class LatentEffects:
    """Zeroing single latents, and how well gradients foretell it. A task: built once, called on each SAE.

    The metric is a text's summed next-token loss (nats). Of every sampled latent one text is taken in which it fires,
    and the latent is zeroed there wherever it fires.

    Blind to: latents that fire in none of the texts, and so to most rare ones; whether a latent's effect makes sense.

    Args:
        model: is run, patched and differentiated at `site`.
        site: where the SAEs read.
        texts: strings, or records with ``.text``; the ones used are drawn from them and cut to their first tokens.
        seed: draws texts and latents; another one shows the measure's own noise.
        latents: how many are zeroed, at least 3; fewer if fewer fire, which the result says.

    Raises:
        ValueError: if an argument is out of range, or there are too few texts.
    """

    def __init__(self, model: LanguageModel, site: str, texts: Sequence[Any], seed: int = 0, latents: int = 256):
        self.model, self.site, self.seed, self.latents = model, site, seed, whole("latents", latents, least=3)
        (self.tokens,) = windows(model, texts, [(EFFECT_TEXTS, EFFECT_TOKENS)], seed)
        self.where = model.content(self.tokens)
        self.where[:, :-1] &= self.tokens.mask[:, 1:]  # a text's last token changes no loss
        self.where[:, -1] = False

    def __call__(self, sae: SAE) -> dict[str, float]:
        """How much single latents matter, and how well gradients say which.

        Returns:
            ``ablation_loss``: rise of the loss for each token at which a latent was zeroed, nats, mean over latents;
            ``attribution_r`` and ``integrated_r``: correlation (Pearson), over latents, of the effect on the text's
            loss with what the gradient, and what integrated gradients of 6 steps say; ``attribution_rank_r`` and
            ``integrated_rank_r``: the same of ranks (Spearman), which one large effect cannot decide; ``ablated``: how
            many latents. A correlation is NaN where all effects are equal.

        Raises:
            ValueError: if fewer than three latents fire in the texts.
        """
        from scipy.stats import spearmanr  # here, because it takes longer to import than all of this library

        arguments = self.model, self.tokens, self.site, sae, summed_loss(self.tokens), self.where
        near, nearer = gradient_times_activation(*arguments), integrated_gradients(*arguments)
        fires, *foretold = (self._of_texts(near, values) for values in (near.values != 0, near.values, nearer.values))
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(sae.d_sae, generator=generator).to(fires.device)
        latents = order[fires.any(0)[order]][: self.latents]
        if len(latents) < 3:
            raise ValueError(f"at least 3 latents must fire in the {len(fires)} texts, got {len(latents)}")
        chance = torch.rand(len(fires), len(latents), generator=generator).to(fires.device)
        texts = (chance * (fires[:, latents] > 0)).argmax(0)
        exact = []
        for text, latent in zip(texts.split(len(fires)), latents.split(len(fires)), strict=True):
            rows = Tokens(self.tokens.ids[text], self.tokens.mask[text])
            where = self.where[text]
            exact.append(ablation(self.model, rows, self.site, sae, summed_loss(rows), latent[:, None], where))
        exact = torch.cat(exact)
        report = {"ablation_loss": -(exact / fires[texts, latents]).mean().item(), "ablated": len(latents)}
        for name, effects in zip(("attribution", "integrated"), foretold, strict=True):
            pair = torch.stack([effects[texts, latents], exact]).cpu()
            report[f"{name}_r"] = torch.corrcoef(pair)[0, 1].item()
            report[f"{name}_rank_r"] = spearmanr(*pair.numpy()).statistic.item()
        return report

    def _of_texts(self, code: Code, values: Tensor) -> Float[Tensor, "texts d_sae"]:
        """Values of positions and latents, summed over each text."""
        sums = torch.zeros(len(self.where), code.shape[1], device=values.device)
        text_of_position = self.where.nonzero()[:, 0]
        return sums.index_put_((text_of_position[code.rows], code.cols), values.float(), accumulate=True)


# Parts ---------------------------------------------------------------------------------------------------------------


def summed_loss(tokens: Tokens) -> Metric:
    """The metric that sums the cross-entropies of a row's next tokens, in nats."""

    def metric(logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, "batch"]:
        loss = F.cross_entropy(logits[:, :-1].mT.float(), tokens.ids[:, 1:].to(logits.device), reduction="none")
        return (loss * tokens.mask[:, 1:].to(logits.device)).sum(1)

    return metric


def windows(model: LanguageModel, texts: Sequence[Any], groups: Sequence[tuple[int, int]], seed: int) -> list[Tokens]:
    """Groups of texts drawn without overlap: for each, how many, and to how many tokens, BOS included, they are cut."""
    total = sum(number for number, _ in groups)
    if len(texts) < total:
        raise ValueError(f"texts must be at least {total}, got {len(texts)}: pass more")
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    drawn = []
    for number, length in groups:
        chosen, order = order[:number], order[number:]
        rows = model.encode([getattr(texts[place], "text", texts[place]) for place in chosen])
        drawn.append(model.pad([row[: min(length, model.context) - 1] for row in rows]))
    return drawn


@contextmanager
def evaluating(sae: SAE) -> Iterator[None]:
    """The SAE as in evaluation, then again as it was."""
    mode = sae.training
    try:
        sae.eval()
        yield
    finally:
        sae.train(mode)


@torch.no_grad()
def _code(
    model: LanguageModel, tokens: Tokens, site: str, sae: SAE, where: Tensor | None
) -> tuple[Bool[Tensor, "batch pos"], Code]:
    """The positions, checked, and the living latents there."""
    content = model.content(Tokens(tokens.ids.to(model.device), tokens.mask.to(model.device)))
    where = content if where is None else where.to(model.device)
    if where.shape != content.shape or not where.any() or (where & ~content).any():
        raise ValueError(
            f"where must mark one or more tokens of the texts, {tuple(content.shape)}, neither BOS nor padding, got "
            f"{int(where.sum())} positions of {tuple(where.shape)}"
        )
    with evaluating(sae):
        x = sae.checked(model.activations(tokens, site)[where].float())
        return where, sae.select(sae.scores(x), Batch(x)).living()


@torch.no_grad()
def _added(sae: SAE, code: Code, values: Float[Tensor, " pairs"]) -> Float[Tensor, "positions d_in"]:
    """What the pairs, with these values, add to the reconstruction."""
    return Code(code.rows, code.cols, values, code.shape).decode(sae.W_dec)


def _put(x: Tensor, where: Bool[Tensor, "batch pos"], rows: Tensor) -> Tensor:
    """x with other rows at the marked positions."""
    return x.index_put((where,), rows.to(x.dtype))


def _of_rows(metric: Metric, logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, "batch"]:
    """The metric of each row, if it is one finite number."""
    values = metric(logits)
    if not isinstance(values, Tensor) or values.shape != logits.shape[:1] or not values.isfinite().all():
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"metric must give a finite number for each of the {len(logits)} rows, got {got}")
    return values.float()


def _gradient(
    model: LanguageModel, tokens: Tokens, site: str, metric: Metric, where: Tensor, removed: Tensor
) -> Float[Tensor, "positions d_in"]:
    """dm/dx at the marked positions, after `removed` was taken away there."""
    leaves = []

    def splice(x: Tensor) -> Tensor:
        leaves.append(_put(x.detach(), where, x.detach()[where] - removed).requires_grad_())
        return leaves[0]

    with torch.enable_grad():
        total = _of_rows(metric, model.logits(tokens, site, splice)).sum()
    (gradient,) = torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else (None,)
    if gradient is None:
        raise ValueError(f"metric must depend on the activations at {site!r}, got one that has no gradient there")
    return gradient[where].float()
