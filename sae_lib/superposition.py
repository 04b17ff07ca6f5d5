"""Toy models of superposition: more features than dimensions, and what training makes of it. Chapter `superposition`.

Elhage, Hume, Olsson, Schiefer, Henighan, Kravec, Hatfield-Dodds, Lasenby, Drain, Chen, Grosse, McCandlish, Kaplan,
Amodei, Wattenberg, Olah 2022, "Toy models of superposition", arXiv 2209.10652.

    h_i   = 0 with probability S, else uniform in [0, 1)        features; S is the sparsity
    x     = h W                                                 hidden activations, d_hidden < n_features
    h_hat = ReLU(x W^T + b)                                     the same weights, backwards
    L     = sum_i I_i (h_i - h_hat_i)^2                         mean over samples; I_i is the importance

Row i of W is the direction that stands for feature i, as in every dictionary of this library; the paper writes its
transpose.

Differences from the paper: models of different sparsity see the same draws, which costs one draw instead of many and
makes them comparable. 1,500 steps of 256 samples with Adam at 0.01, decaying, take seconds; the paper's published
notebook takes 10,000 steps of 1,024 samples with AdamW at 0.001. The paper's text was not at hand: its equations and
settings are known from public copies of that notebook.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sae_lib.data import Batch


class ToyModels:
    """Toy models trained side by side, one for each sparsity. Chapter `superposition`.

    Args:
        n_features: number of features, at least 1.
        d_hidden: width of the hidden layer, at least 1.
        sparsity: S of each model, in [0, 1); repeat one to train it from several starts.
        importance: I, at least 0: a number, one a feature, or (models, n_features).
        seed: of the initial weights and of the training samples.

    Attributes:
        W: (models, n_features, d_hidden), random until `fit` has run.
        b: (models, n_features).
        sparsity: (models,).
        importance: (models, n_features).
        losses: (models,), L of each model over the last tenth of its training; NaN before.

    Raises:
        ValueError: if a size is below 1, a sparsity outside [0, 1), or an importance negative or of another shape.
    """

    W: Float[Tensor, "models n_features d_hidden"]
    b: Float[Tensor, "models n_features"]
    sparsity: Float[Tensor, " models"]
    importance: Float[Tensor, "models n_features"]
    losses: Float[Tensor, " models"]

    def __init__(
        self,
        n_features: int,
        d_hidden: int,
        sparsity: Sequence[float] | Float[Tensor, " models"],
        importance: float | Float[Tensor, "*models n_features"] = 1.0,
        seed: int = 0,
    ):
        for name, size in {"n_features": n_features, "d_hidden": d_hidden}.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {size!r}")
        self.sparsity = torch.as_tensor(sparsity, dtype=torch.float32)
        if self.sparsity.ndim != 1 or not len(self.sparsity):
            raise ValueError(f"sparsity must be a list of numbers, one a model, got {sparsity!r}")
        if not ((self.sparsity >= 0) & (self.sparsity < 1)).all():
            raise ValueError(f"sparsity must be in [0, 1), got {self.sparsity.tolist()}")
        importance = torch.as_tensor(importance, dtype=torch.float32)
        try:
            self.importance = importance.expand(len(self.sparsity), n_features)
        except RuntimeError:
            raise ValueError(
                f"importance must be a number, of shape (n_features={n_features},) or "
                f"(models={len(self.sparsity)}, n_features={n_features}), got {tuple(importance.shape)}"
            ) from None
        if not (self.importance >= 0).all():
            raise ValueError(f"importance must be at least 0, got {float(self.importance.min())}")
        self.n_features, self.d_hidden, self.seed = n_features, d_hidden, seed
        self._generator = torch.Generator().manual_seed(seed)
        shape = (len(self.sparsity), n_features, d_hidden)
        self.W = torch.randn(shape, generator=self._generator) / math.sqrt(n_features)
        self.b = torch.zeros(shape[:2])
        self.losses = torch.full(shape[:1], torch.nan)

    def fit(self, steps: int = 1500, batch_size: int = 256, learning_rate: float = 0.01) -> ToyModels:
        """Train all models together: Adam, its rate constant for half of the steps, then falling linearly to zero.

        Args:
            steps: at least 10.
            batch_size: samples a step and model, at least 1.
            learning_rate: of the first half.

        Returns:
            itself.
        """
        if steps < 10 or batch_size < 1:
            raise ValueError(f"steps must be at least 10 and batch_size at least 1, got {steps} and {batch_size}")
        self.W.requires_grad_(True)
        self.b.requires_grad_(True)
        optimiser = torch.optim.Adam([self.W, self.b], lr=learning_rate, fused=True)
        tail = torch.zeros(len(self.sparsity))
        for step in tqdm(range(steps), desc="toy models", leave=False):
            optimiser.param_groups[0]["lr"] = learning_rate * min(1.0, 2 * (steps - step) / steps)
            h = self._features(batch_size, self.sparsity, self._generator)
            loss = (self.importance * (h - self.output(self.hidden(h))).square().mean(1)).sum(1)
            optimiser.zero_grad()
            loss.sum().backward()
            optimiser.step()
            if step >= steps - steps // 10:
                tail += loss.detach() / (steps // 10)
        self.W, self.b, self.losses = self.W.detach(), self.b.detach(), tail
        return self

    def best(self) -> list[int]:
        """For each different sparsity, in ascending order, the place of the model with the lowest loss."""
        return [
            min((self.sparsity == value).nonzero().flatten().tolist(), key=lambda place: float(self.losses[place]))
            for value in self.sparsity.unique()
        ]

    def hidden(self, h: Float[Tensor, "models n n_features"]) -> Float[Tensor, "models n d_hidden"]:
        """``h W``."""
        return h @ self.W

    def output(self, x: Float[Tensor, "models n d_hidden"]) -> Float[Tensor, "models n n_features"]:
        """``ReLU(x W^T + b)``."""
        return torch.relu(torch.baddbmm(self.b[:, None], x, self.W.mT))

    def batches(self, place: int, batch_size: int, seed: int = 0) -> Iterator[Batch]:
        """Endless hidden activations of one model, with the features behind them as `truth`: a stream for `train`.

        Raises:
            ValueError: if there is no such model, or batch_size is below 1.
        """
        if not 0 <= place < len(self.sparsity) or batch_size < 1:
            raise ValueError(
                f"place must be in [0, {len(self.sparsity)}) and batch_size at least 1, got {place} and {batch_size}"
            )
        generator = torch.Generator().manual_seed(seed)
        while True:
            h = self._features(batch_size, self.sparsity[place : place + 1], generator)[0]
            yield Batch(h @ self.W[place], truth=h)

    def _features(
        self, n: int, sparsity: Float[Tensor, " models"], generator: torch.Generator
    ) -> Float[Tensor, "models n n_features"]:
        """Features, by one draw for all models: zero where it is below S, else its place between S and 1."""
        draw = torch.rand(n, self.n_features, generator=generator)
        sparsity = sparsity[:, None, None]
        return (draw - sparsity).clamp_(min=0) / (1 - sparsity)
