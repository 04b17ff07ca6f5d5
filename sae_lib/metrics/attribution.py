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

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lib.data import Batch
from sae_lib.models import LanguageModel, Tokens
from sae_lib.sae import SAE, whole
from sae_lib.sparse import Code, products

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


def attribution(
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


# Parts ---------------------------------------------------------------------------------------------------------------


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
    mode = sae.training
    try:
        sae.eval()
        x = sae.checked(model.activations(tokens, site)[where].float())
        return where, sae.select(sae.scores(x), Batch(x)).living()
    finally:
        sae.train(mode)


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
