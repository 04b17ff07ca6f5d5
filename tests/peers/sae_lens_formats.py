"""What SAELens makes of folders: of those that it writes itself, and of ours; see `sae_bench`.

    <its environment>/bin/python -m peers.sae_lens_formats <file>

Ours are expected beside the file, in a folder of its name. Gemma Scope's ``params.npz`` is read by SAELens's loader of
its releases, which is told that the file was downloaded.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import sae_lens
import torch
from sae_lens import SAE
from sae_lens.loading import pretrained_sae_loaders as loaders
from safetensors.torch import save_file
from torch import Tensor

from peers.folders import D_IN, D_SAE, K, activations, packed, random_weights
from peers.stand_ins import save

SIZES = {"d_in": D_IN, "d_sae": D_SAE}


def filled(kind: str, seed: int, free: bool = False, **settings: object) -> SAE:
    """One of its SAEs, by the name of its class, with random weights."""
    sae = getattr(sae_lens, kind)(getattr(sae_lens, f"{kind}Config")(**SIZES, **settings))
    weights = random_weights(seed, free)
    with torch.no_grad():
        for name, value in sae.state_dict().items():
            value.copy_(weights["threshold"][0] if name == "topk_threshold" else weights[name])
    return sae


def inference() -> Iterator[tuple[str, SAE]]:
    """Its SAEs for use."""
    free, uncentred = {"free": True}, {"apply_b_dec_to_input": False}
    yield "standard", filled("StandardSAE", 1)
    yield "standard, uncentred, free rows", filled("StandardSAE", 2, **free, **uncentred)
    yield "gated", filled("GatedSAE", 3)
    yield "gated, uncentred, free rows", filled("GatedSAE", 4, **free, **uncentred)
    yield "topk", filled("TopKSAE", 5, k=K)
    yield "topk, uncentred, free rows", filled("TopKSAE", 6, k=K, **free, **uncentred)
    yield "topk, rescaled", filled("TopKSAE", 7, k=K, rescale_acts_by_decoder_norm=True, **free)
    yield "jumprelu", filled("JumpReLUSAE", 8)
    yield "jumprelu, uncentred, free rows", filled("JumpReLUSAE", 9, **free, **uncentred)


def training() -> Iterator[tuple[str, SAE]]:
    """Its SAEs in training."""
    rescaled = {"rescale_acts_by_decoder_norm": True, "free": True}
    widths = {"matryoshka_widths": [2, 6, D_SAE]}
    yield "batchtopk", filled("BatchTopKTrainingSAE", 10, k=K, rescale_acts_by_decoder_norm=False)
    yield "batchtopk, rescaled", filled("BatchTopKTrainingSAE", 11, k=K, **rescaled)
    yield "matryoshka", filled("MatryoshkaBatchTopKTrainingSAE", 12, k=K, **widths, **rescaled)
    normalised = {"normalize_activations": "expected_average_only_in"}
    yield "standard, normalised", filled("StandardTrainingSAE", 13, **normalised)
    yield "batchtopk, rescaled, normalised", filled("BatchTopKTrainingSAE", 14, k=K, **rescaled, **normalised)


def codes(name: str, sae: SAE) -> dict[str, Tensor]:
    x = activations()
    z = sae.encode(x)
    return {f"{name}.z": z.detach(), f"{name}.x_hat": sae.decode(z).detach()}


def theirs(folder: Path) -> dict[str, Tensor]:
    """Folders that it wrote, with the codes of what it reads in them, or of what it makes of them to be used."""
    found = {}
    for kind, sae in inference():
        name = f"sae_lens.{kind}"
        sae.save_model(folder / kind)
        found |= packed(name, folder / kind) | codes(name, SAE.load_from_disk(folder / kind))
    for kind, sae in training():
        name = f"sae_lens.checkpoint of {kind}"
        sae.save_model(folder / kind)
        if "normalised" in kind:
            (folder / kind / "activation_scaler.json").write_text('{"scaling_factor": 2.5, "has_whitening": false}')
        found |= packed(name, folder / kind)
        if "normalised" in kind:
            sae.fold_activation_norm_scaling_factor(2.5)
        sae.save_inference_model(folder / f"{kind}, done")
        done = SAE.load_from_disk(folder / f"{kind}, done")
        found |= codes(name, done)
        if not kind.startswith("standard"):
            found |= packed(f"sae_lens.{kind}, done", folder / f"{kind}, done") | codes(f"sae_lens.{kind}, done", done)
    found |= of_version_5(folder / "topk, version 5", filled("TopKSAE", 15, k=K))
    return found | gemma_scope("gemma_scope.jumprelu", folder / "params", np.savez)


def of_version_5(folder: Path, sae: SAE) -> dict[str, Tensor]:
    """A folder as it was written before version 6, when TopK was the activation of a standard SAE."""
    folder.mkdir(parents=True)
    cfg = SIZES | {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
    cfg |= {"dtype": "float32", "device": "cpu", "normalize_activations": "none", "finetuning_scaling_factor": False}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    save_file(dict(sae.state_dict()), folder / "sae_weights.safetensors")
    name = "sae_lens.topk, version 5"
    return packed(name, folder) | codes(name, SAE.load_from_disk(folder))


def gemma_scope(name: str, folder: Path, write: object = None) -> dict[str, Tensor]:
    """What its loader of Gemma Scope makes of a ``params.npz``, written here or there already."""
    if write is not None:
        folder.mkdir(parents=True)
        keep = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
        weights = random_weights(16)
        write(folder / "params.npz", **{key: weights[key].numpy() for key in keep})
    place = {"repo_id": "google/gemma-scope-2b-pt-res", "folder_name": "layer_12/width_16k/average_l0_82"}
    with patch.object(loaders, "hf_hub_download", lambda **_: str(folder / "params.npz")):
        cfg, state, _ = loaders.gemma_2_sae_huggingface_loader(**place)
    cfg = loaders.handle_config_defaulting(cfg | SIZES)
    sae = sae_lens.JumpReLUSAE(sae_lens.JumpReLUSAEConfig.from_dict(cfg))
    sae.load_state_dict(state)
    return packed(name, folder) | codes(name, sae)


def main(file: str) -> None:
    folder = Path(file).with_suffix("")
    found = {"x": activations()} | theirs(folder / "theirs")
    for path in sorted((folder / "sae_lens").iterdir()):
        found |= packed(f"ours.sae_lens.{path.name}", path)
        found |= codes(f"ours.sae_lens.{path.name}", SAE.load_from_disk(path))
    for path in sorted((folder / "gemma_scope").iterdir()):
        found |= gemma_scope(f"ours.gemma_scope.{path.name}", path)
    save(file, found, ["sae-lens"], (sae_lens.saes.sae, loaders))


if __name__ == "__main__":
    main(*sys.argv[1:])
