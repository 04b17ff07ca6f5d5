"""SAEBench's interface for SAEs of others: what its evaluations call on them, around one of ours.

They give activations of any leading shape, and read ``cfg``, ``dtype``, ``device`` and the weights. Read off sae-bench
0.6.0.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_lib.sae import SAE


@dataclass
class Config:
    """What SAEBench asks of ``sae.cfg``, to which it adds more by itself."""

    model_name: str
    hook_name: str
    hook_layer: int
    d_in: int
    d_sae: int
    architecture: str
    dtype: str
    device: str
    hook_head_index: None = None
    prepend_bos: bool = True
    normalize_activations: str = "none"

    def to_dict(self) -> dict[str, Any]:
        """For SAEBench's result files."""
        return asdict(self)


class CustomSAE(nn.Module):
    """An SAE of ours as SAEBench calls it; made by `for_sae_bench`."""

    def __init__(self, sae: SAE, cfg: Config):
        super().__init__()
        self.sae, self.cfg = sae, cfg

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:
        return self.sae.W_enc

    @property
    def b_enc(self) -> Float[Tensor, " d_sae"]:
        return self.sae.b_enc

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_in"]:
        return self.sae.W_dec

    @property
    def b_dec(self) -> Float[Tensor, " d_in"]:
        return self.sae.b_dec

    @property
    def dtype(self) -> torch.dtype:
        return self.sae.W_dec.dtype

    @property
    def device(self) -> torch.device:
        return self.sae.W_dec.device

    def to(self, *args: Any, **kwargs: Any) -> CustomSAE:
        super().to(*args, **kwargs)
        self.cfg.dtype, self.cfg.device = str(self.dtype).removeprefix("torch."), str(self.device)
        return self

    def encode(self, x: Float[Tensor, "*tokens d_in"]) -> Float[Tensor, "*tokens d_sae"]:
        return self.sae.encode(x.reshape(-1, x.shape[-1])).unflatten(0, x.shape[:-1])

    def decode(self, z: Float[Tensor, "*tokens d_sae"]) -> Float[Tensor, "*tokens d_in"]:
        return self.sae.decode(z.reshape(-1, z.shape[-1])).unflatten(0, z.shape[:-1])

    def forward(self, x: Float[Tensor, "*tokens d_in"]) -> Float[Tensor, "*tokens d_in"]:
        return self.decode(self.encode(x))


def for_sae_bench(sae: SAE, model: str, site: str) -> CustomSAE:
    """`sae` as SAEBench's evaluations take it: ``multiple_evals([("my-release", for_sae_bench(sae, ...))], ...)``.

    It is the same SAE, not a copy: what SAEBench moves to another device or precision is moved.

    Args:
        sae: any variant but EquivariantSAE.
        model: name of the model on the Hugging Face Hub, as TransformerLens knows it.
        site: where the SAE reads, such as ``blocks.12.hook_resid_post``.

    Raises:
        ValueError: if `site` does not name a layer, or codes of `sae` do not say all that `decode` needs.
    """
    if sae.name == "equivariant":
        raise ValueError("SAEBench reconstructs from codes alone, got equivariant, whose codes leave the pose out")
    layer = re.match(r"blocks\.(\d+)\.", site)
    if layer is None:
        raise ValueError(f"site must be blocks.<layer>.<name>, got {site!r}: SAEBench asks for the layer")
    cfg = Config(model, site, int(layer[1]), sae.d_in, sae.d_sae, sae.name, "float32", "cpu")
    return CustomSAE(sae.eval(), cfg).to(sae.W_dec.device)
