"""sparsify folders: ``cfg.json`` and ``sae.safetensors``, of TopK and nothing else.

    z = TopK(ReLU((x - b_dec) encoder.weight^T + encoder.bias)),   x_hat = z W_dec + b_dec

The encoder is a torch.nn.Linear, with weights (d_sae, d_in); W_dec is as ours. ``num_latents: 0`` in cfg.json means
``expansion_factor * d_in``; the weights themselves say how many there are. Read off sparsify 1.3.3.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from sae_lib.formats.files import only, read_json, read_safetensors
from sae_lib.formats.weights import made, plain
from sae_lib.sae import SAE

FILES = ("cfg.json", "sae.safetensors")
OPTIONAL = ()
NAMES = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}
REFUSED = {
    "transcode": "a transcoder predicts another place of the model than it reads",
    "skip_connection": "its reconstruction has a part that is linear in x and in no latent",
    "signed": "its codes may be negative, ours are not",
}
"""Options of cfg.json that none of our variants expresses, and why."""


def read(folder: Path) -> SAE:
    """The SAE of a sparsify folder.

    Raises:
        ValueError: if it is no TopK autoencoder, or the files are not what they should be.
    """
    cfg = read_json(folder / "cfg.json")
    for option, why in REFUSED.items():
        if cfg.get(option):
            raise ValueError(f"cfg.json must not say {option}, got {cfg[option]!r} in {folder}: {why}")
    if cfg.get("activation", "topk") != "topk":
        raise ValueError(
            f"activation must be topk, got {cfg['activation']!r} in {folder}: groupmax keeps the best of each group, "
            "and none of our variants does"
        )
    if "k" not in cfg:
        raise ValueError(f"cfg.json must say k, got {', '.join(cfg) or 'nothing'} in {folder}")
    tensors = only(read_safetensors(folder / "sae.safetensors"), NAMES.values(), f"an autoencoder in {folder}")
    weights = {ours: tensors[theirs] for ours, theirs in NAMES.items()}
    d_in = weights["b_dec"].numel()
    latents = cfg.get("num_latents") or cfg.get("expansion_factor", 0) * d_in
    if latents and latents != len(weights["W_enc"]):
        raise ValueError(
            f"encoder.weight must have the {latents} latents of cfg.json, got {len(weights['W_enc'])} in {folder}"
        )
    return made("topk", weights | {"W_enc": weights["W_enc"].T}, k=cfg["k"])


def write(sae: SAE, folder: Path, model: str | None = None, site: str | None = None) -> None:
    """Write what ``SparseCoder.load_from_disk`` reads.

    Args:
        sae: TopK or g-SAE.
        folder: exists.
        model, site: are not used: a folder of sparsify does not say whose activations it was trained on.

    Raises:
        ValueError: if `sae` is another variant.
    """
    same = plain(sae)
    if same.name != "topk":
        raise ValueError(
            f"sparsify has TopK alone, got {sae.name}, which does not keep the k best of each token; use sae_lens or "
            "dictionary_learning"
        )
    weights = {theirs: getattr(same, ours).detach().cpu() for ours, theirs in NAMES.items()}
    weights["encoder.weight"] = weights["encoder.weight"].T
    cfg = {"activation": "topk", "num_latents": same.d_sae, "k": same.k, "normalize_decoder": same.unit_rows}
    cfg |= {"multi_topk": False, "skip_connection": False, "transcode": False, "d_in": same.d_in}
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps(cfg, indent=1) + "\n")
