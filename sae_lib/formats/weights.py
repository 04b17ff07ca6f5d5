"""From another library's tensors to one of our variants, and from any of ours to one that other libraries have.

Other libraries have the six variants `SHARED`, and differ in layout and in what they subtract first. Nothing here
changes a code or a reconstruction. Subtracting b_dec from x and moving a bias are the same:

    (x - b_dec) W_enc + b_enc = x W_enc + (b_enc - b_dec W_enc)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lib.sae import SAE
from sae_lib.saes import VARIANTS

SHARED = ("relu", "gated", "topk", "jumprelu", "batchtopk", "matryoshka")
"""Variants that other libraries have too."""
UNKNOWN = {"relu": {"l1_coeff": 1.0}, "gated": {"l1_coeff": 1.0}, "jumprelu": {"l0_coeff": 1.0}}
"""Arguments of training that no format tells; they mean nothing."""
REFUSED = {
    "gba": "its scores depend on each token's norm, which no other library's encoder knows",
    "equivariant": "its code is that of another pose of each activation, which no other library's encoder knows",
}
"""Variants that no other library's forward pass can express, and why."""
UNIT = 1e-3
"""How far from 1 a row's norm may be through rounding to 16 bits."""


@torch.no_grad()
def made(variant: str, weights: Mapping[str, Tensor], **arguments: object) -> SAE:
    """A variant with these weights, in 32 bits and evaluation mode.

    Rows of W_dec that are not of norm 1 stay as they are, in further training too. How many tokens it saw is not
    known; that it is trained, is: training goes on from its weights.

    Args:
        variant: one of `SHARED`.
        weights: of its parameters and buffers, in our layout: ``W_enc (d_in, d_sae)``, ``W_dec (d_sae, d_in)`` ...
        arguments: of its constructor, but for the sizes and for `UNKNOWN`.

    Raises:
        ValueError: if a weight is not finite, or does not have the shape that the others ask for.
    """
    if weights["W_enc"].ndim != 2:
        raise ValueError(f"W_enc must be a matrix (d_in, d_sae), got shape {tuple(weights['W_enc'].shape)}")
    norms = weights["W_dec"].double().norm(dim=-1)
    unit = bool(torch.allclose(norms, torch.ones_like(norms), atol=UNIT))
    arguments = UNKNOWN.get(variant, {}) | arguments | ({"norm_weighted": not unit} if variant == "relu" else {})
    sae = VARIANTS[variant](*weights["W_enc"].shape, **arguments)
    state = sae.state_dict()
    for name, value in weights.items():
        if value.shape != state[name].shape:
            raise ValueError(
                f"{name} must have shape {tuple(state[name].shape)}, as W_enc has {tuple(state['W_enc'].shape)}, got "
                f"{tuple(value.shape)}; is it a transcoder, or are its weights transposed?"
            )
        if not value.isfinite().all():
            raise ValueError(
                f"{name} must be finite, got {value.isfinite().logical_not().sum()} NaN or infinite entries"
            )
        state[name].copy_(value)
    sae.unit_rows = unit
    sae.tokens_trained.fill_(1)
    if "threshold_weight" in state:
        sae.threshold_weight.fill_(1)  # the running mean goes on from the threshold
    return sae.eval()


@torch.no_grad()
def plain(sae: SAE) -> SAE:
    """The variant of `SHARED` that evaluates as `sae` does: itself, or its weights under another name.

    What training does beside is lost: g-SAE chooses by activation alone, as it does in `SAE.forward`; ATM's mask is
    what its `eval_mask` says of it.

    Raises:
        ValueError: if no other library can express what `sae` does.
    """
    if sae.name in SHARED:
        return sae
    weights = {name: getattr(sae, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    if sae.name == "gradient":
        return made("topk", weights, k=sae.k)
    if sae.name == "mutual_choice":
        return made("batchtopk", weights | {"threshold": sae.threshold}, k=sae.k)
    if sae.name == "feature_choice":
        weights["b_enc"] = moved(sae.b_enc, -sae.b_dec, sae.W_enc)
        return made("jumprelu", weights | {"threshold": sae.threshold})
    if sae.name == "atm":
        above = (sae.importance >= sae.threshold).to(sae.b_enc)
        kept = {"none": torch.ones_like(above), "hard": above, "expected": 1 - sae.mask_probability}[sae.eval_mask]
        return made("relu", weights | {"W_enc": sae.W_enc * kept, "b_enc": sae.b_enc * kept})
    reason = REFUSED.get(sae.name, "no other library has it")
    raise ValueError(f"variant must be one that other libraries can express, got {sae.name}: {reason}; use sae.save")


@torch.no_grad()
def thresholds(sae: SAE) -> SAE:
    """A variant of `SHARED` as a JumpReLU SAE, with one threshold a latent and nothing subtracted from x.

    Raises:
        ValueError: if what lives is not decided by a threshold.
    """
    if sae.name == "jumprelu":
        return sae
    if sae.name == "topk":
        raise ValueError(
            f"what lives must be decided by thresholds, got {sae.name}: which pairs are among a token's k={sae.k} best "
            "depends on the token's other pairs; choose sae_lens, dictionary_learning or sparsify"
        )
    weights = {"W_enc": sae.W_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    if sae.name == "gated":  # p + b_gate > 0 is exp(r) p + b_mag > b_mag - exp(r) b_gate
        weights["W_enc"] = sae.W_enc * sae.r_mag.exp()
        weights["threshold"] = (sae.b_mag - sae.r_mag.exp() * sae.b_gate).clamp(min=0)
        weights["b_enc"] = moved(sae.b_mag, -sae.b_dec, weights["W_enc"])
    else:
        weights["threshold"] = sae.threshold.expand(sae.d_sae) if sae.name != "relu" else torch.zeros_like(sae.b_enc)
        weights["b_enc"] = moved(sae.b_enc, -sae.b_dec, sae.W_enc)
    return made("jumprelu", weights)


def moved(
    bias: Float[Tensor, " d_sae"], by: Float[Tensor, " d_in"], W_enc: Float[Tensor, "d_in d_sae"]
) -> Float[Tensor, " d_sae"]:
    """``bias + by W_enc``, summed in 64 bits: with ``by`` b_dec, the bias of an encoder that subtracts b_dec first,
    from that of one which does not; with -b_dec, the other way."""
    return (bias.double() + by.double() @ W_enc.double()).to(bias.dtype)


def norms_folded(weights: Mapping[str, Tensor], *scaled: str) -> dict[str, Tensor]:
    """The same function with rows of W_dec of norm 1: each latent's encoder, and what else is named, takes its norm."""
    norms = weights["W_dec"].norm(dim=1).clamp(min=1e-8)  # as SAELens does
    folded = {name: weights[name] * norms for name in ("W_enc", *scaled)}
    return dict(weights) | folded | {"W_dec": weights["W_dec"] / norms.unsqueeze(1)}
