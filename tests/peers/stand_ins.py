"""What other libraries' metrics ask for, reduced to tables: model, SAE and texts; and the file of what they compute."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable
from importlib.metadata import version
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

SITE = "blocks.0.hook_resid_post"


def floats(array: np.ndarray) -> Tensor:
    return torch.tensor(np.asarray(array), dtype=torch.float32)


class Known:
    """A sparse autoencoder that knows the codes z of the activations x, row by row."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, x: Tensor, z: Tensor, W_dec: Tensor, b_dec: Tensor | float = 0.0):
        self.x, self.z, self.W_dec, self.W_enc, self.b_dec = x, z, W_dec, W_dec.T, b_dec
        site = {"hook_name": SITE, "hook_head_index": None}
        self.cfg = SimpleNamespace(**site, hook_layer=0, metadata=SimpleNamespace(**site), d_sae=z.shape[1])

    def encode(self, x: Tensor) -> Tensor:
        same = (x[..., None, :] == self.x).all(-1)
        assert same.any(-1).all()
        return self.z[same.int().argmax(-1)]

    def decode(self, z: Tensor) -> Tensor:
        return z @ self.W_dec + self.b_dec


class Model:
    """A model in which token i has row i of x as its activation, and the word "a12" is token 12, twice."""

    tokenizer = "none"

    def __init__(self, x: Tensor, unembedding: Tensor | None = None):
        self.x, self.unembedding = x, unembedding

    def to_tokens(self, text: str) -> Tensor:
        return torch.tensor([2 * [int(text.strip("\n:")[1:])]])

    def run_with_cache(self, texts: list[str] | Tensor, **_) -> tuple[None, dict[str, Tensor]]:
        tokens = texts if isinstance(texts, Tensor) else torch.cat([self.to_tokens(text) for text in texts])
        return None, {SITE: self.x[tokens]}

    def run_with_hooks(self, tokens: Tensor, fwd_hooks: list[tuple[str, Callable]] = (), **_) -> tuple[Tensor, Tensor]:
        x = self.x[tokens]
        for _, hook in fwd_hooks:
            x = hook(x, hook=None)
        logits = x @ self.unembedding
        return logits, F.cross_entropy(logits[:, :-1].mT, tokens[:, 1:], reduction="none")

    __call__ = run_with_hooks


class Texts:
    """Two batches of texts of 60 tokens, with activations that have a mean, and a code that explains part of them.

    Token `left_out` counts nowhere; latent 0 never lives.
    """

    context_size, store_batch_size_prompts, left_out = 6, 8, 0

    def __init__(self, random: np.random.Generator):
        vocabulary, d_in, d_sae = 60, 6, 10
        self.x = random.standard_normal((vocabulary, d_in)) + np.array([2.0, -1, 0, 0, 1, 0])
        self.b_dec = self.x.mean(0) / 2
        W_dec = random.standard_normal((d_sae, d_in))
        self.W_dec = W_dec / np.linalg.norm(W_dec, axis=1, keepdims=True)
        self.z = np.maximum((self.x - self.b_dec) @ self.W_dec.T - 0.5, 0) / 2
        self.z[:, 0] = 0
        tokens = random.permutation(np.arange(96) % vocabulary)
        self.tokens = torch.tensor(tokens).view(2, self.store_batch_size_prompts, self.context_size)
        self.unembedding = floats(random.standard_normal((d_in, vocabulary)) / 4)
        self.reset_input_dataset()

    def in_unit(self, unit: float) -> tuple[Known, Model]:
        """Autoencoder and model, with activations, code and bias divided by the unit."""
        x, z, b_dec = (floats(value / unit) for value in (self.x, self.z, self.b_dec))
        return Known(x, z, floats(self.W_dec), b_dec), Model(x, self.unembedding)

    def inputs(self, name: str, sae: Known) -> dict[str, Tensor]:
        """What to record of them."""
        found = {"x": sae.x, "z": sae.z, "x_hat": sae.decode(sae.z), "tokens": self.tokens}
        return {f"{name}.{key}": value for key, value in (found | {"unembedding": self.unembedding}).items()}

    def reset_input_dataset(self) -> None:
        self.batches = iter(self.tokens)

    def get_batch_tokens(self, _: int) -> Tensor:
        return next(self.batches)


def batches(found: dict[str, Tensor], name: str = "core") -> list[tuple[Tensor, Tensor, Tensor]]:
    """x, x_hat and z of each batch of recorded texts, without the token that is left out."""
    kept = [tokens[tokens != Texts.left_out] for tokens in found[f"{name}.tokens"]]
    return [tuple(found[f"{name}.{table}"][tokens] for table in ("x", "x_hat", "z")) for tokens in kept]


def results(name: str, scores: dict[str, dict[str, float]], by_latent: dict[str, list[float]]) -> dict[str, Tensor]:
    """What the evaluations of SAELens and of its descendant sae-bench return, in one table."""
    found = {f"{name}.{key}": torch.tensor(value) for group in scores.values() for key, value in group.items()}
    return found | {f"{name}.feature_density": torch.tensor(by_latent["feature_density"])}


def save(file: str, found: dict[str, Tensor], distributions: Iterable[str], read: Iterable[ModuleType]) -> None:
    """Write what was found, with the versions it was found by and a hash of the library's files that were read."""
    about = {name: version(name) for name in (*distributions, "torch", "numpy")}
    sources = "".join(inspect.getsource(module) for module in read)
    about["sources"] = hashlib.sha256(sources.encode()).hexdigest()
    own = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in found.items()}
    save_file(own, file, metadata=about)
