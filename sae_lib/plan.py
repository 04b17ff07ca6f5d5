"""What training SAEs on a language model will take, from the model's configuration alone: pure arithmetic.

**Model**, for one position of a window of T, in a block of width d with H heads and G keys of h numbers each and an MLP
of width f (a multiplication and its addition are 2 FLOPs; what is elementwise is left out): queries, keys and values
2 d (H + 2 G) h; attention 4 T H h, its full square; its output 2 H h d; into the MLP 2 d f, twice that where it is
gated; out of it 2 f d. Blocks before the site count whole, its own as far as the site; nothing after it runs. T
positions hold T - 1 tokens and BOS, so a token costs T / (T - 1) positions. Padding is left out.

**SAE**, for one token of one step, n latents of which k live: a dense step has five products, the input's gradient not
needed, 10 d_in n. A sparse one has the encoder's, and four over living pairs (decode, gradients of values, W_dec, and
W_enc): 2 d_in n + 8 d_in k. That is the step of the variants with about k living latents a token; ReLU, Gated and
JumpReLU begin dense. Auxiliary losses are left out.

**Memory** of each process, in bytes, where P = 2 d_in n + n + d_in and b is a process' share of a batch: model
(parameters x itemsize); one block's forward, about (4 d + 4 f + 3 T H) x 4,096 tokens x itemsize; the buffer of
activations, buffer_size x d_in x itemsize; for each SAE weights and gradients, 4 P each, and Adam's two moments, 8 P;
and a sparse step, at most 1.5 x b x n x 4, one SAE at a time; a dense one takes up to 6.3 x b x n x 4 (Gated).

**Disk**: a cache has tokens x d_in x itemsize; a checkpoint has weights and moments, 12 P, and a counter a latent, 8 n,
for each SAE, and the buffer. Two stay, and a third is there while it is written.

**Hours**: for the model, FLOPs / (processes x peak x utilisation). For an SAE's step likewise, plus the bytes that it
moves / (bandwidth x utilisation): 28 P for Adam (weights, gradients and moments read, all but gradients written), 16 P
to write and clip the gradients, 12 P to keep W_dec's rows at norm 1, 16 b k d_in for the four products over pairs, and
8 b n for scores written and read. What processes send each other is left out. The utilisation is an assumption.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sae_lib.models import ASSETS

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
FORWARD_TOKENS = 4096
"""Of `sae_lib.Activations`, in one forward pass."""


class Family(NamedTuple):
    """What a model's ``model_type`` says beside its sizes.

    Attributes:
        gated: whether the MLP has a gate, a third matrix.
        biases: which linear maps have them: "", "qkv" or "all".
        norms: vectors of width d_model that the norms of a block hold.
        tied: whether the unembedding is the embedding, where the configuration does not say.
    """

    gated: bool
    biases: str
    norms: int
    tied: bool


FAMILIES = {
    "gpt2": Family(gated=False, biases="all", norms=4, tied=True),
    "gpt_neox": Family(gated=False, biases="all", norms=4, tied=False),
    "llama": Family(gated=True, biases="", norms=2, tied=False),
    "mistral": Family(gated=True, biases="", norms=2, tied=False),
    "qwen2": Family(gated=True, biases="qkv", norms=2, tied=False),
    "gemma": Family(gated=True, biases="", norms=2, tied=True),
    "gemma2": Family(gated=True, biases="", norms=4, tied=True),
}


class Device(NamedTuple):
    """A GPU by NVIDIA's data sheet: dense peaks in TFLOP/s, memory in GB, bandwidth in GB/s."""

    fp32: float
    tf32: float
    bf16: float
    memory: float
    bandwidth: float


DEVICES = {
    "h200": Device(fp32=67, tf32=494, bf16=989, memory=141, bandwidth=4800),  # SXM
    "h100": Device(fp32=67, tf32=494, bf16=989, memory=80, bandwidth=3350),  # SXM
    "a100": Device(fp32=19.5, tf32=156, bf16=312, memory=80, bandwidth=2039),  # SXM, 80 GB
    "l40s": Device(fp32=91.6, tf32=183, bf16=362, memory=48, bandwidth=864),
    "l4": Device(fp32=30.3, tf32=60, bf16=121, memory=24, bandwidth=300),
    "rtx-4090": Device(fp32=82.6, tf32=82.6, bf16=165, memory=24, bandwidth=1008),
}
ARITHMETIC = ("fp32", "tf32", "bf16")

SITES = {
    "hook_resid_pre": (0, "d_model"),
    "attn.hook_z": (2, "d_heads"),
    "hook_attn_out": (3, "d_model"),
    "hook_resid_mid": (3, "d_model"),
    "mlp.hook_post": (4, "d_ff"),
    "hook_mlp_out": (5, "d_model"),
    "hook_resid_post": (5, "d_model"),
}
"""How many parts of a block have run when a site is reached, in the order of the formulae, and the width there."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a language model; `model_shape` reads them.

    Attributes:
        layers: blocks.
        d_model: width of the residual stream.
        d_ff: width of the MLP.
        heads: of attention.
        keys: of attention; several heads may share one.
        head_dim: width of a head.
        vocabulary: tokens that it knows.
        context: most positions.
        tied: whether the unembedding is the embedding.
        family: what its ``model_type`` says.
    """

    layers: int
    d_model: int
    d_ff: int
    heads: int
    keys: int
    head_dim: int
    vocabulary: int
    context: int
    tied: bool
    family: Family

    @property
    def d_heads(self) -> int:
        """Width of all heads together."""
        return self.heads * self.head_dim

    @property
    def parameters(self) -> int:
        """All of them, embeddings included, and a tied unembedding once."""
        d, f, qkv = self.d_model, self.d_ff, (self.heads + 2 * self.keys) * self.head_dim
        learned_positions = self.family is FAMILIES["gpt2"]
        block = d * qkv + self.d_heads * d + (3 if self.family.gated else 2) * d * f + self.family.norms * d
        block += {"": 0, "qkv": qkv, "all": qkv + d + f + d}[self.family.biases]
        last_norm = 2 * d if self.family.biases == "all" else d
        embeddings = self.vocabulary * d * (1 if self.tied else 2) + self.context * d * learned_positions
        return embeddings + self.layers * block + last_norm

    def flops(self, layer: int, parts: int, window: int) -> int:
        """For one position of a `window`, to where `parts` of block `layer` have run."""
        d, f = self.d_model, self.d_ff
        block = [
            2 * d * (self.heads + 2 * self.keys) * self.head_dim,
            4 * window * self.d_heads,
            2 * self.d_heads * d,
            2 * d * f * (2 if self.family.gated else 1),
            2 * f * d,
        ]
        return layer * sum(block) + sum(block[:parts])


KNOWN = {
    # the defaults of transformers' GPT2Config and Gemma2Config
    "gpt2": ModelShape(12, 768, 3072, 12, 12, 64, 50257, 1024, True, FAMILIES["gpt2"]),
    "gemma-2-2b": ModelShape(26, 2304, 9216, 8, 4, 256, 256000, 8192, True, FAMILIES["gemma2"]),
    # as published; their parameters come to the published totals
    "gpt2-medium": ModelShape(24, 1024, 4096, 16, 16, 64, 50257, 1024, True, FAMILIES["gpt2"]),
    "gemma-2-9b": ModelShape(42, 3584, 14336, 16, 8, 256, 256000, 8192, True, FAMILIES["gemma2"]),
    "pythia-70m": ModelShape(6, 512, 2048, 8, 8, 64, 50304, 2048, False, FAMILIES["gpt_neox"]),
    "pythia-160m": ModelShape(12, 768, 3072, 12, 12, 64, 50304, 2048, False, FAMILIES["gpt_neox"]),
    "llama-3.1-8b": ModelShape(32, 4096, 14336, 32, 8, 128, 128256, 131072, False, FAMILIES["llama"]),
}
"""Models that are known without their ``config.json``."""

GPT2_NAMES = {
    "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions", "intermediate_size": "n_inner",
}  # fmt: skip


def model_shape(model: str | os.PathLike) -> ModelShape:
    """The sizes of a model, without its weights.

    Args:
        model: `"pocket"`, a name in `KNOWN` (with or without its owner), or a folder with a ``config.json``.

    Raises:
        ValueError: if the model, or its ``model_type``, is not known, or its configuration lacks a size.
    """
    name = os.fspath(model)
    file = (ASSETS / "pocket" if name == "pocket" else Path(name).expanduser()) / "config.json"
    if not file.is_file():
        if (known := name.split("/")[-1].lower()) in KNOWN:
            return KNOWN[known]
        raise ValueError(
            f"model must be pocket, one of {', '.join(KNOWN)}, or a folder that holds a config.json, got {name!r}: "
            "download that one file of the model and name its folder"
        )
    try:
        config = dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} must be a model's configuration in JSON, got {error}: download it again") from error
    _one_of(f"model_type of {file}", config.get("model_type"), FAMILIES)
    family = FAMILIES[config["model_type"]]

    def size(key: str, default: int | None = None) -> int:
        key = GPT2_NAMES.get(key, key) if family is FAMILIES["gpt2"] else key
        value = default if config.get(key) is None else config[key]
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{key} must be a positive integer, got {value!r} from {name}: look into its config.json")
        return value

    d_model, heads = size("hidden_size"), size("num_attention_heads")
    d_ff = size("intermediate_size", 4 * d_model if family is FAMILIES["gpt2"] else None)
    keys, head_dim = size("num_key_value_heads", heads), size("head_dim", d_model // heads)
    tied = config.get("tie_word_embeddings", family.tied)
    sizes = size("num_hidden_layers"), d_model, d_ff, heads, keys, head_dim, size("vocab_size")
    return ModelShape(*sizes, size("max_position_embeddings"), tied, family)


@dataclass(frozen=True)
class Plan:
    """What a run will take; `plan` makes it. All formulae stand at the head of the file.

    Attributes:
        parameters: of the model, and of one SAE.
        flops: of a token: the model's to the site, and one SAE's step, sparse and dense.
        memory: bytes of each process, by what they are for.
        disk: bytes, by what they are for.
        moved: bytes that one step of one SAE moves in a process.
    """

    model: str
    site: str
    d_in: int
    d_sae: int
    k: int
    tokens: int
    saes: int
    batch_size: int
    processes: int
    parameters: dict[str, int]
    flops: dict[str, int]
    memory: dict[str, int]
    disk: dict[str, int]
    moved: int

    def hours(
        self, device: str | Device, arithmetic: str, utilisation: float = 0.4, step: str = "sparse step"
    ) -> dict[str, float]:
        """Of the model's forward and of the SAEs' steps, on as many devices as there are processes.

        Args:
            device: one of `DEVICES`, or a data sheet of your own.
            arithmetic: of matrix products: one of `ARITHMETIC`.
            utilisation: share of the peaks that is reached, in (0, 1]: an assumption.
            step: "sparse step" or "dense step".

        Raises:
            ValueError: for an argument out of range.
        """
        if not isinstance(device, Device):
            _one_of("device", device, DEVICES)
            device = DEVICES[device]
        _one_of("arithmetic", arithmetic, ARITHMETIC)
        if not 0 < utilisation <= 1:
            raise ValueError(f"utilisation must be in (0, 1], got {utilisation}")
        peak = getattr(device, arithmetic) * 1e12 * utilisation * self.processes
        bandwidth = device.bandwidth * 1e9 * utilisation
        steps = self.tokens / self.batch_size
        model = self.tokens * self.flops["model"] / peak
        saes = self.saes * (self.tokens * self.flops[step] / peak + steps * self.moved / bandwidth)
        return {"model": model / 3600, "saes": saes / 3600}

    def table(self, devices: Sequence[str] = ("h100",), utilisation: float = 0.4) -> str:
        """The plan as text."""
        memory, sae = sum(self.memory.values()), self.flops["sparse step"]
        lines = [
            f"{self.saes} SAE(s) of {self.d_sae:,} latents on {self.model}, {self.site} (d_in {self.d_in:,}), "
            f"k {self.k}, {self.tokens:,} tokens in batches of {self.batch_size:,}, {self.processes} process(es)",
            "",
            *_rows("parameters", self.parameters, 1e6, "million"),
            *_rows("FLOPs a token", self.flops, 1e9, "billion"),
            f"  {'in the whole run':32}{self.tokens * (self.flops['model'] + self.saes * sae) / 1e18:12,.3f} exaFLOP",
            *_rows("memory of each process", self.memory, 1e9, "GB"),
            f"  {'together':32}{memory / 1e9:12,.3f} GB",
            *_rows("disk", self.disk, 1e9, "GB"),
            f"hours, at {utilisation:.0%} of the data sheet's peaks (assumed, not measured)",
        ]
        for device in devices:
            for arithmetic in ARITHMETIC:
                hours = self.hours(device, arithmetic, utilisation)
                parts = ", ".join(f"{part} {value:,.2f}" for part, value in hours.items())
                lines.append(f"  {f'{device}, {arithmetic}':32}{sum(hours.values()):12,.2f} h ({parts})")
            if memory > DEVICES[device].memory * 1e9:
                lines.append(f"  {device} has {DEVICES[device].memory} GB: too little for a process")
        return "\n".join(lines)


def _rows(title: str, values: dict[str, int], unit: float, name: str) -> list[str]:
    return [title, *(f"  {key:32}{value / unit:12,.3f} {name}" for key, value in values.items())]


def plan(
    model: str | os.PathLike,
    d_sae: int,
    k: int = 64,
    site: str | None = None,
    tokens: int = 500_000_000,
    saes: int = 1,
    batch_size: int = 4096,
    buffer_size: int | None = None,
    context: int | None = None,
    processes: int = 1,
    model_dtype: str = "float32",
    cache_dtype: str = "float32",
) -> Plan:
    """What training will take: FLOPs, memory, disk and hours.

    Args:
        model: `"pocket"`, a name in `KNOWN`, or a folder with a ``config.json``.
        d_sae: latents of each SAE.
        k: living latents a token, at most `d_sae`.
        site: as in `sae_lib.Activations`, one of `SITES` after "blocks.<layer>."; by default the middle block's
            hook_resid_post.
        tokens: to train on.
        saes: that train on the same stream.
        batch_size: tokens in a step, over all processes; a multiple of `processes`.
        buffer_size: of the stream; by default, as there, 65,536 or 8 * batch_size if that is more.
        context: tokens in a window; by default 1,024, or the model's if that is less.
        processes: that share each batch, one on a GPU.
        model_dtype: of the model's weights and the buffer: float32, bfloat16 or float16.
        cache_dtype: of cached activations, likewise.

    Raises:
        ValueError: for an argument out of range, or an unknown model.
    """
    shape = model_shape(model)
    counts = {"d_sae": d_sae, "k": k, "tokens": tokens, "saes": saes, "batch_size": batch_size, "processes": processes}
    buffer_size = max(65_536, 8 * batch_size) if buffer_size is None else buffer_size
    for name, value in {**counts, "buffer_size": buffer_size}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if k > d_sae:
        raise ValueError(f"k must be in [1, d_sae={d_sae}], got {k}")
    if batch_size % processes:
        raise ValueError(f"batch_size must be a multiple of processes={processes}, got {batch_size}")
    context = min(1024, shape.context) if context is None else context
    if not 2 <= context <= shape.context:
        raise ValueError(f"context must be in [2, {shape.context}], the model's, got {context}")
    _one_of("model_dtype", model_dtype, ITEMSIZE)
    _one_of("cache_dtype", cache_dtype, ITEMSIZE)
    site = f"blocks.{shape.layers // 2}.hook_resid_post" if site is None else site
    layer, parts, d_in = _place(site, shape)

    sae, share, itemsize = 2 * d_in * d_sae + d_sae + d_in, batch_size // processes, ITEMSIZE[model_dtype]
    working = 4 * shape.d_model + 4 * shape.d_ff + 3 * context * shape.heads
    return Plan(
        model=str(model), site=site, d_in=d_in, **counts,
        parameters={"model": shape.parameters, "each SAE": sae},
        flops={
            "model": round(shape.flops(layer, parts, context) * context / (context - 1)),
            "sparse step": 2 * d_in * d_sae + 8 * d_in * k,
            "dense step": 10 * d_in * d_sae,
        },
        memory={
            "model": shape.parameters * itemsize,
            "one block's forward, about": working * FORWARD_TOKENS * itemsize,
            "buffer of activations": buffer_size * d_in * itemsize,
            "weights of the SAEs": 4 * sae * saes,
            "gradients": 4 * sae * saes,
            "optimiser": 8 * sae * saes,
            "a sparse step, at most": 6 * share * d_sae,
        },
        disk={
            f"cache, {cache_dtype}": tokens * d_in * ITEMSIZE[cache_dtype],
            "three checkpoints": 3 * ((12 * sae + 8 * d_sae) * saes + buffer_size * d_in * itemsize),
        },
        moved=(28 + 16 + 12) * sae + 16 * share * k * d_in + 8 * share * d_sae,
    )  # fmt: skip


def _one_of(name: str, value: object, known: Collection[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def _place(site: str, shape: ModelShape) -> tuple[int, int, int]:
    """Block of a site, how many parts of it run, and d_in there."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", site)
    if not match or int(match[1]) >= shape.layers or match[2] not in SITES:
        raise ValueError(
            f"site must be blocks.<layer>.<name> with layer in [0, {shape.layers - 1}] and name one of "
            f"{', '.join(SITES)}, got {site!r}"
        )
    parts, width = SITES[match[2]]
    return int(match[1]), parts, getattr(shape, width)
