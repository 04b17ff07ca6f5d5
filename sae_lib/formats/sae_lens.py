"""SAELens folders: ``cfg.json`` and ``sae_weights.safetensors``.

    x' = x - b_dec   if apply_b_dec_to_input, else x
    standard         z = ReLU(x' W_enc + b_enc)
    gated            z = H(x' W_enc + b_gate) * ReLU(exp(r_mag) * (x' W_enc) + b_mag)
    topk             z = TopK(x' W_enc + b_enc)            rescale_acts_by_decoder_norm: each score times |W_dec,i|
    jumprelu         z = s H(s - threshold),   s = x' W_enc + b_enc
    x_hat            z W_dec + b_dec                       rescale_acts_by_decoder_norm: rows of W_dec over their norms

Checkpoints of its training have the architectures ``batchtopk`` and ``matryoshka_batchtopk``, which end as jumprelu
with one number for all thresholds; here they become ours of the same name. A checkpoint's ``activation_scaler.json``
holds the number s that activations were multiplied with, which SAELens folds at the end of training as we do here:
``W_enc s``, ``W_dec / s``, ``b_dec / s``.

Where ``reshape_activations`` is hook_z, x is what it makes of a token's heads: all of them in one row. Read off SAELens
6.54.12; folders of versions before 6, which keep everything in one level, are read as it reads them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sae_lib.formats.files import only, read_json, read_safetensors
from sae_lib.formats.weights import made, moved, norms_folded, plain
from sae_lib.sae import SAE

FILES = ("cfg.json", "sae_weights.safetensors")
OPTIONAL = ("activation_scaler.json",)
VERSION = "6.0.0"
"""Of the layout of cfg.json."""
REFUSED = {
    "abstopk": "its codes may be negative, ours are not",
    "matching_pursuit": "its encoder is a loop over residuals",
    "temporal": "its codes depend on the tokens before",
    "transcoder": "it predicts another place of the model than it reads",
}
"""Architectures that none of our variants expresses, and why."""
PER_TOKEN = ("layer_norm", "constant_norm_rescale")
KEYS = {
    "standard": {"b_enc"},
    "gated": {"b_gate", "b_mag", "r_mag"},
    "topk": {"b_enc"},
    "jumprelu": {"b_enc", "threshold"},
    "batchtopk": {"b_enc", "topk_threshold"},
    "matryoshka_batchtopk": {"b_enc", "topk_threshold"},
}
"""Tensors of each architecture beside W_enc, W_dec and b_dec."""


def read(folder: Path) -> SAE:
    """The SAE of a SAELens folder; its codes are those of SAELens's ``encode``.

    Raises:
        ValueError: if none of our variants expresses it, or the files are not what they should be.
    """
    cfg, tensors = configuration(folder), read_safetensors(folder / "sae_weights.safetensors")
    architecture = cfg["architecture"]
    if (tensors.pop("scaling_factor", torch.ones(1)) - 1).abs().max() > 1e-6:
        raise ValueError(f"scaling_factor must be 1, got another in {folder}: SAELens no longer applies it to codes")
    weights = only(tensors, {"W_enc", "W_dec", "b_dec"} | KEYS[architecture], f"{architecture} in {folder}")
    threshold = weights.pop("topk_threshold", None)
    rescaled = cfg.get("rescale_acts_by_decoder_norm", False)
    if (scale := scale_of(cfg, folder)) != 1:
        weights |= {name: weights[name] / scale for name in ("W_dec", "b_dec")} | {"W_enc": weights["W_enc"] * scale}
        threshold = threshold / scale if rescaled and threshold is not None else threshold
    if rescaled:
        weights = norms_folded(weights, "b_enc")
    if cfg.get("apply_b_dec_to_input", True) == (architecture == "jumprelu"):
        sign = -1 if architecture == "jumprelu" else 1
        for bias in KEYS[architecture] & {"b_enc", "b_gate", "b_mag"}:
            slope = weights["r_mag"].exp() if bias == "b_mag" else 1
            weights[bias] = moved(weights[bias], sign * weights["b_dec"], weights["W_enc"] * slope)
    if architecture in ("standard", "gated", "jumprelu"):
        return made({"standard": "relu"}.get(architecture, architecture), weights)
    if architecture == "topk":
        return made("topk", weights, k=cfg["k"])
    k = max(1, round(cfg["k"]))
    if architecture == "batchtopk":
        return made("batchtopk", weights | {"threshold": threshold}, k=k)
    d_sae = weights["W_enc"].shape[-1]
    ends = sorted({*cfg["matryoshka_widths"], d_sae})
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    return made("matryoshka", weights | {"threshold": threshold}, k=k, group_sizes=sizes)


def configuration(folder: Path) -> dict[str, Any]:
    """What cfg.json says, if we can do it."""
    cfg = read_json(folder / "cfg.json")
    activation = cfg.get("activation_fn") or cfg.get("activation_fn_str") or "relu"  # before version 6
    architecture = cfg.get("architecture") or "standard"
    if activation == "topk" and architecture == "standard":
        cfg["k"], architecture = cfg.get("activation_fn_kwargs", {}).get("k"), "topk"
    elif activation not in ("relu", "topk"):
        raise ValueError(
            f"activation_fn must be relu or topk, got {activation!r} in {folder}: no variant of ours has it"
        )
    if architecture not in KEYS:
        reason = next((why for name, why in REFUSED.items() if name in architecture), "it is not known here")
        raise ValueError(f"architecture must be one of {', '.join(KEYS)}, got {architecture!r} in {folder}: {reason}")
    needed = {"topk": ["k"], "batchtopk": ["k"], "matryoshka_batchtopk": ["k", "matryoshka_widths"]}
    for name in needed.get(architecture, []):
        if cfg.get(name) is None:
            raise ValueError(f"cfg.json of {architecture} must say {name}, got none in {folder}")
    return cfg | {"architecture": architecture}


def scale_of(cfg: dict[str, Any], folder: Path) -> float:
    """By what activations are multiplied before the SAE sees them."""
    normalised = cfg.get("normalize_activations") or "none"  # None and booleans: before version 6
    if normalised == "none":
        return 1.0
    if normalised in PER_TOKEN:
        raise ValueError(
            f"normalize_activations must not be {normalised}, in {folder}: it scales each token by itself, and none of "
            "our variants with this encoder does"
        )
    path = folder / "activation_scaler.json"
    scaler = read_json(path) if path.is_file() else {}
    if scaler.get("scaling_factor") is None or scaler.get("has_whitening"):
        raise ValueError(
            f"normalize_activations must be none, or come with a scaling_factor in activation_scaler.json, got "
            f"{normalised!r} in {folder}; let SAELens fold it: sae.fold_activation_norm_scaling_factor(factor) or "
            "sae.fold_activation_whitening(...), and save again"
        )
    return float(scaler["scaling_factor"])


def write(sae: SAE, folder: Path, model: str | None = None, site: str | None = None) -> None:
    """Write what SAELens's ``SAE.load_from_disk`` reads.

    BatchTopK, Matryoshka and the choices become jumprelu, as SAELens itself saves its own.

    Args:
        sae: any variant that `sae_lib.formats.weights.plain` knows.
        folder: exists.
        model, site: for its metadata: on whose activations it was trained, and where.
    """
    same = plain(sae)
    architecture = {"relu": "standard", "batchtopk": "jumprelu", "matryoshka": "jumprelu"}.get(same.name, same.name)
    names = {"W_enc", "W_dec", "b_dec"} | KEYS[architecture]
    weights = {name: getattr(same, name).detach() for name in names}
    if architecture == "jumprelu":
        weights["threshold"] = weights["threshold"].expand(same.d_sae)
    cfg = {"architecture": architecture, "d_in": same.d_in, "d_sae": same.d_sae, "dtype": "float32", "device": "cpu"}
    cfg |= {"apply_b_dec_to_input": same.name != "jumprelu", "normalize_activations": "none"}
    cfg |= {"reshape_activations": "none"}
    if architecture == "topk":
        cfg |= {"k": same.k, "rescale_acts_by_decoder_norm": False}
    cfg["metadata"] = {"sae_lens_version": VERSION, "model_name": model, "hook_name": site, "sae_lib_variant": sae.name}
    cfg["metadata"] |= {"prepend_bos": True}  # as all our streams of texts do
    save_file({name: value.cpu().contiguous() for name, value in weights.items()}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(cfg, indent=1) + "\n")
