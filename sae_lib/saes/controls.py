"""Controls: what learns nothing, or less, and must be beaten. Chapter `comparison`.

Korznikov et al. 2026, "Sanity checks for sparse autoencoders", arXiv 2602.14111, found that sparse autoencoders with
random, frozen directions come close to trained ones on several benchmarks. A number of a trained one means little
without them.

    untrained(sae)                   random weights; training sets units, offset and running threshold alone
    freeze(sae, "W_dec")             random directions, of which a trained encoder chooses
    freeze(sae, "W_enc", "b_enc")    a random encoder, whose choices a trained decoder makes the best of
    pca(stream, rank)                the best linear code of that rank: the same directions for all tokens

The first two take any variant, change it and return it, to be given to `train` with the others, on the same batches.
How known: from the paper's abstract and from summaries; its softly frozen decoder, which stays within a cosine of 0.8
of its start, is left out.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from sae_lib.data import Batch
from sae_lib.sae import SAE, as_batch, whole
from sae_lib.saes.relu import ReLUSAE


def untrained(sae: SAE) -> SAE:
    """The random SAE: training leaves its weights as they were drawn. Chapter `comparison`.

    Give it to `train` all the same: there it gets its units, its offset ``b_dec`` where the variant starts it at the
    data's median, and its running threshold, so that a variant with k keeps k latents a token. Variants whose
    sparsity is learned (ReLU, Gated, JumpReLU) keep the L0 of their start.
    """
    sae.learning_rate = 0.0
    return sae


def freeze(sae: SAE, *weights: str) -> SAE:
    """The same SAE, of which training leaves the named weights as they were drawn. Chapter `comparison`.

    A saved and reloaded SAE is no longer frozen. The norms of frozen rows may be folded into the encoder at the end
    of training (`ReLUSAE(norm_weighted=True)`); their directions stay.

    Args:
        sae: any variant, before training.
        weights: names of parameters, such as ``W_dec``; at least one, and not all.

    Raises:
        ValueError: if a name is no parameter of `sae`, or none or all are named.
    """
    parameters = dict(sae.named_parameters())
    unknown = sorted(set(weights) - set(parameters))
    if unknown or not weights or set(weights) == set(parameters):
        raise ValueError(
            f"weights must name some but not all of {', '.join(parameters)}, "
            f"got {', '.join(unknown or weights) or 'none'}; to freeze all, use untrained(sae)"
        )
    for name in weights:
        parameters[name].requires_grad_(False)
    return sae


@torch.no_grad()
def pca(stream: Iterable[Batch | Tensor], rank: int, tokens: int = 100_000) -> ReLUSAE:
    """Principal components as an SAE: each component is two latents, one for either sign. Chapter `comparison`.

        x_hat = mean + sum_j ((x - mean) . v_j) v_j,   z = [ReLU((x - mean) . v_j), ReLU(-(x - mean) . v_j)]

    L0 is `rank`, so that a TopK SAE of the same L0 spends as many numbers on a token; but the components are the same
    for all tokens. No linear code of this rank has a smaller squared error on the tokens it was computed from.

    Args:
        stream: anything that yields `Batch` or floating tensors of shape (batch, d_in); what it reads counts as
            trained on.
        rank: number of components, in [1, d_in].
        tokens: rows to compute the covariance from, at least 1; fewer if the stream ends.

    Returns:
        A `ReLUSAE` with ``d_sae = 2 * rank`` whose weights are computed, not trained; its ``l1_coeff`` means nothing.

    Raises:
        ValueError: if rank or tokens is out of range, the stream is empty, or its values are not finite or of
            changing width.
    """
    whole("tokens", tokens)
    sae, seen = None, 0
    for item in stream:
        x = as_batch(item).x[: tokens - seen]
        if not len(x):
            continue
        if sae is None:
            d_in = x.shape[-1]
            sae = ReLUSAE(d_in, 2 * whole("rank", rank, most=d_in, most_name="d_in"), l1_coeff=1.0).to(x.device).eval()
            origin = x.double().mean(0)  # near the mean: keeps the squares below small
            total, squares = torch.zeros_like(origin), origin.new_zeros(d_in, d_in)
        x = sae.checked(x).double() - origin
        if not torch.isfinite(x).all():
            share = 1 - torch.isfinite(x).double().mean().item()
            raise ValueError(
                f"activations must be finite, got {share:.2%} NaN or infinite entries after {seen} rows; "
                "look for overflow in a 16-bit model, or drop those rows"
            )
        total += x.sum(0)
        squares += x.T @ x
        seen += len(x)
        if seen >= tokens:
            break
    if sae is None:
        raise ValueError("the stream must yield at least one row, got none; is it an iterator that was used up?")
    mean = total / seen
    components = torch.linalg.eigh(squares / seen - mean.outer(mean)).eigenvectors[:, -rank:].T.flip(0)  # largest first
    sae.W_dec.copy_(torch.cat([components, -components]))
    sae.W_enc.copy_(sae.W_dec.T)
    sae.b_dec.copy_(origin + mean)
    sae.tokens_trained.fill_(seen)
    if fingerprint := getattr(stream, "fingerprint", None):
        sae.trained_on = [fingerprint]
    return sae
