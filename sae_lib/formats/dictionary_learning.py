"""dictionary_learning folders: ``ae.pt``, a state_dict, and ``config.json``, which names its class.

    AutoEncoder              z = ReLU((x - bias) W_enc + b_enc)           rows of W_dec get norm 1 when it is loaded
    AutoEncoderNew           z = ReLU(x W_enc + b_enc)                    rows of any norm (the April 2024 form)
    GatedAutoEncoder         as ours
    JumpReluAutoEncoder      as ours
    AutoEncoderTopK          as ours                                      its threshold is not used
    BatchTopKSAE             (x - b_dec) W_enc + b_enc, if above threshold and 0
    MatryoshkaBatchTopKSAE   the same

A class stores its matrices as ``encoder.weight`` (d_sae, d_in) and ``decoder.weight`` (d_in, d_sae), or as we do. Codes
are those of ``encode`` after its ``load_dictionary``. Read off dictionary_learning 0.1.0.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from sae_lib.formats.files import only, read_json, read_pickle
from sae_lib.formats.weights import made, moved, norms_folded, plain
from sae_lib.sae import SAE

FILES = ("config.json", "ae.pt")
OPTIONAL = ()
LINEAR = {"W_enc": "encoder.weight", "W_dec": "decoder.weight"}
"""Our names and theirs, of matrices that are stored transposed."""
AS_OURS = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
TOPK = LINEAR | {"b_enc": "encoder.bias", "b_dec": "b_dec", "threshold": "threshold", "k": "k"}
GATED = LINEAR | {"b_dec": "decoder_bias", "r_mag": "r_mag", "b_gate": "gate_bias", "b_mag": "mag_bias"}
CLASSES = {
    "AutoEncoder": ("relu", LINEAR | {"b_enc": "encoder.bias", "b_dec": "bias"}),
    "AutoEncoderNew": ("relu", LINEAR | {"b_enc": "encoder.bias", "b_dec": "decoder.bias"}),
    "GatedAutoEncoder": ("gated", GATED),
    "JumpReluAutoEncoder": ("jumprelu", AS_OURS),
    "AutoEncoderTopK": ("topk", TOPK),
    "BatchTopKSAE": ("batchtopk", TOPK),
    "MatryoshkaBatchTopKSAE": ("matryoshka", AS_OURS | {"k": "k", "group_sizes": "group_sizes"}),
}
"""Each class: our variant, and our names of its tensors with theirs."""


def read(folder: Path) -> SAE:
    """The SAE of a dictionary_learning folder.

    Raises:
        ValueError: if its class is not one of `CLASSES`, or the files are not what they should be.
    """
    config = read_json(folder / "config.json")
    trainer = config.get("trainer")
    dict_class = trainer.get("dict_class") if isinstance(trainer, dict) else None
    if dict_class not in CLASSES:
        raise ValueError(
            f"config.json must name a trainer.dict_class of {', '.join(CLASSES)}, got {dict_class!r} in {folder}"
        )
    variant, names = CLASSES[dict_class]
    tensors = only(read_pickle(folder / "ae.pt"), names.values(), f"{dict_class} in {folder}")
    weights = {ours: transposed(theirs, tensors[theirs]) for ours, theirs in names.items()}
    arguments = {name: weights.pop(name).tolist() for name in ("k", "group_sizes") if name in weights}
    if dict_class == "AutoEncoder" and not torch.allclose(
        norms := weights["W_dec"].norm(dim=1), torch.ones_like(norms)
    ):
        weights = norms_folded(weights, "b_enc")
    if dict_class == "AutoEncoderNew":
        weights["b_enc"] = moved(weights["b_enc"], weights["b_dec"], weights["W_enc"])
    if variant == "topk":
        del weights["threshold"]
    return made(variant, weights, **arguments)


def transposed(theirs: str, tensor: Tensor) -> Tensor:
    """A matrix of a torch.nn.Linear as ours, or one of ours as theirs."""
    return tensor.T if theirs in LINEAR.values() else tensor


def write(sae: SAE, folder: Path, model: str | None = None, site: str | None = None) -> None:
    """Write what ``load_dictionary`` reads.

    ReLU with rows of W_dec that are not of norm 1 becomes AutoEncoderNew, because AutoEncoder would change its codes.

    Args:
        sae: any variant that `sae_lib.formats.weights.plain` knows.
        folder: exists.
        model, site: for its config: on whose activations it was trained, and where.
    """
    same = plain(sae)
    free = same.name == "relu" and not same.unit_rows
    dict_class = next(
        name for name, (variant, _) in CLASSES.items() if variant == same.name and free == (name == "AutoEncoderNew")
    )
    names = CLASSES[dict_class][1]
    weights = {ours: getattr(same, ours) for ours in names if ours not in ("k", "group_sizes", "threshold")}
    if free:
        weights["b_enc"] = moved(same.b_enc, -same.b_dec, same.W_enc)
    if "threshold" in names:
        weights["threshold"] = same.threshold if same.name != "topk" else torch.tensor(-1.0)  # as it begins
    if "k" in names:
        weights["k"] = torch.tensor(same.k, dtype=torch.int32)
    if "group_sizes" in names:
        weights["group_sizes"] = torch.tensor(same.group_sizes)
    state = {names[ours]: transposed(names[ours], value.detach().cpu()) for ours, value in weights.items()}
    torch.save(
        {name: value.clone(memory_format=torch.contiguous_format) for name, value in state.items()}, folder / "ae.pt"
    )
    trainer = {"dict_class": dict_class, "activation_dim": same.d_in, "dict_size": same.d_sae}
    trainer |= {"k": same.k} if "k" in names else {}
    trainer |= {"lm_name": model, "submodule_name": site, "sae_lib_variant": sae.name}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}, indent=1) + "\n")
