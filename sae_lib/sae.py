"""The contract of all sparse autoencoders: an encoder scores, a selection chooses, a decoder adds up.

What every variant shares stands here: the checks, the dead latents and the loss that revives them, the units, and
saving. A variant (one file in `sae_lib.saes`) adds `select` and `loss`.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from sae_lib.data import Batch
from sae_lib.distributed import anywhere, count, per_token, total
from sae_lib.hub import card, push
from sae_lib.selection import top_of_rows
from sae_lib.sparse import Code, Scores

FORMAT = {"format": "sae_lib", "format_version": 1}


class Loss(NamedTuple):
    """What `SAE.loss` returns.

    Attributes:
        terms: named terms; their sum is minimised.
        code: the living pairs of the batch.
        x_hat: the reconstruction.
    """

    terms: dict[str, Float[Tensor, ""]]
    code: Code
    x_hat: Float[Tensor, "batch d_in"]

    @property
    def total(self) -> Float[Tensor, ""]:
        return torch.stack(list(self.terms.values())).sum()


class SAE(nn.Module, ABC):
    """A sparse autoencoder. Introduced in the chapter `relu`; the table of selections is in `index`.

    A variant has, as parameters or read-only properties, ``W_enc (d_in, d_sae)``, ``b_enc (d_sae,)``, ``W_dec (d_sae,
    d_in)`` and ``b_dec (d_in,)``; the rows of ``W_dec`` are the latents' directions. Each constructor argument is
    kept as an attribute of the same name, so that `config` can rebuild the variant.

    Args:
        d_in: width of the activations, at least 1.
        d_sae: number of latents, at least 1.
        seed: of the initial weights, and of whatever the variant draws later.

    Raises:
        ValueError: if a size is not a positive integer.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    """Which of {"grad", "orbit"} the stream must yield beside x."""
    learning_rate: ClassVar[float | None] = None
    """None: `sae_lib.train.default_learning_rate`, which serves small and large widths, short and long runs."""
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)
    clip: ClassVar[float] = 1.0
    """Largest norm of the gradient of all parameters together."""
    unit_rows: bool = True
    """Whether the rows of W_dec are kept at norm 1."""
    in_units_of_x: ClassVar[tuple[str, ...]] = ("b_enc", "b_dec")
    """Parameters and buffers that grow with the activations; `fold` multiplies them."""

    def __init__(self, d_in: int, d_sae: int, seed: int = 0):
        super().__init__()
        self.d_in, self.d_sae, self.seed = whole("d_in", d_in), whole("d_sae", d_sae), whole("seed", seed, least=0)
        self.generator = torch.Generator().manual_seed(self.seed)
        self.trained_on: list[str] = []
        self.register_buffer("scale", torch.tensor(1.0))
        self.register_buffer("dead_window", torch.tensor(10_000_000))
        self.register_buffer("tokens_trained", torch.tensor(0))
        self.register_buffer("tokens_since_fired", torch.zeros(self.d_sae, dtype=torch.int64))

    # What a variant defines -------------------------------------------------------------------------------------------

    def scores(self, x: Float[Tensor, "batch d_in"]) -> Scores:
        """``(x - b_dec) W_enc + b_enc``, of which a selection computes what it needs; ``.dense()`` gives all."""
        return Scores(x, self.W_enc, self.b_enc, self.b_dec)

    @abstractmethod
    def select(self, scores: Scores, batch: Batch) -> Code:
        """Which pairs live, and with which value. In training it may look at the whole batch; in evaluation it is
        deterministic and treats each token alone."""

    @abstractmethod
    def loss(self, batch: Batch) -> Loss:
        """The named terms of the loss on one batch. Reads the buffers, never writes them.

        Terms are made of sums over the batch's tokens, by `squared_error`, `auxk` and `sae_lib.distributed.per_token`:
        then they are right in several processes too, of which each has a slice of the batch."""

    # What every variant does ------------------------------------------------------------------------------------------

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        """The code of each row of `x` as a dense, non-negative matrix.

        Raises:
            ValueError: if `x` is not a floating matrix of width ``d_in``.
        """
        x = self.checked(x)
        return self.select(self.scores(x), Batch(x)).dense()

    def decode(self, z: Code | Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_in"]:
        """``z W_dec + b_dec``."""
        return (z.decode(self.W_dec) if isinstance(z, Code) else z @ self.W_dec) + self.b_dec

    def forward(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        """The reconstruction of `x`, in the units of `x`."""
        x = self.checked(x)
        return self.decode(self.select(self.scores(x), Batch(x)))

    def checked(self, x: Tensor) -> Tensor:
        """`x` in the weights' precision, if it is a floating matrix of the right width."""
        if x.ndim != 2 or x.shape[1] != self.d_in:
            raise ValueError(
                f"x must have shape (batch, d_in={self.d_in}), got {tuple(x.shape)}; "
                "flatten positions with x.flatten(0, -2)"
            )
        if not x.is_floating_point():
            raise ValueError(f"x must be floating, got {x.dtype}; convert it with x.float()")
        return x.to(self.W_dec.dtype)

    # What training calls, in this order -------------------------------------------------------------------------------

    @torch.no_grad()
    def start(self, batch: Batch, tokens: int) -> None:
        """Once a run, before its first step: what depends on the data or on the length of the run (`tokens`)."""
        self.dead_window.fill_(min(10_000_000, max(tokens // 20, len(batch.x))))

    def before_step(self, progress: float) -> None:
        """Before each step; `progress` goes from 0 to 1 over the run: warm-ups and phases."""

    @torch.no_grad()
    def after_backward(self) -> None:
        """Between the gradient and the optimiser: the gradient of a unit row loses its part along the row."""
        if self.unit_rows and self.W_dec.grad is not None:
            for grad, rows in zip(self.W_dec.grad.split(1024), self.W_dec.split(1024), strict=True):  # fits a cache
                grad.addcmul_((grad * rows).sum(1, keepdim=True), rows, value=-1)

    @torch.no_grad()
    def after_step(self, batch: Batch, code: Code) -> None:
        """After the optimiser; the only place where state is written."""
        tokens = count(len(batch.x))
        self.tokens_trained.add_(tokens)
        self.tokens_since_fired.add_(tokens).masked_fill_(anywhere(code.fired()), 0)
        if self.unit_rows and self.W_dec.requires_grad:
            self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp(min=torch.finfo(self.W_dec.dtype).tiny))

    @property
    def dead(self) -> Bool[Tensor, " d_sae"]:
        """Latents that have not fired for `dead_window` tokens: 5% of the run, from one batch to 10 million."""
        return self.tokens_since_fired >= self.dead_window

    @torch.no_grad()
    def fold(self, scale: float) -> None:
        """Rewrite the weights for activations `scale` times as large as those of the training's units.

        Training divides its stream by one number and folds that number back in at its end, so that a trained SAE
        takes raw activations. Codes and reconstructions grow by the same factor; ``fold(1)`` returns to the
        training's units.
        """
        for name in self.in_units_of_x:
            attrgetter(name)(self).mul_(scale / self.scale)
        self.scale.fill_(scale)

    # Saving -----------------------------------------------------------------------------------------------------------

    def config(self) -> dict:
        """The constructor's arguments, as plain JSON values."""
        values = {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def save(self, path: str | Path) -> Path:
        """Write the folder `path`: ``config.json`` and ``weights.safetensors``.

        The folder appears whole: it is written beside its place and renamed. An older SAE saved there is replaced.

        Raises:
            ValueError: if `path` exists and is not a saved SAE.
        """
        path = Path(path)
        if path.exists() and not is_saved(path):
            raise ValueError(
                f"path must be new or a saved SAE, got {path}, which holds something else; choose another path"
            )
        weights = safetensors_bytes({key: value.contiguous().cpu() for key, value in self.state_dict().items()})
        config = FORMAT | {
            "variant": self.name,
            "config": self.config(),
            "unit_rows": self.unit_rows,
            "trained_on": self.trained_on,
            "weights_sha256": hashlib.sha256(weights).hexdigest(),
        }
        with whole_folder(path) as folder:
            (folder / "weights.safetensors").write_bytes(weights)
            (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        return path

    def push_to_hub(
        self,
        name: str,
        metrics: Mapping[str, float] | None = None,
        model: str | None = None,
        site: str | None = None,
        private: bool = False,
    ) -> str:
        """Upload this SAE to the Hugging Face Hub, with a card; ``sae_lib.load("hf:org/name")`` gets it back.

        Args:
            name: of the repository, ``org/name``; it is made if it is not there.
            metrics: for the card, such as `sae_lib.evaluate` returns.
            model: for the card: name of the model on whose activations it was trained.
            site: for the card: where in the model.
            private: whether a new repository is for its owner alone.

        Returns:
            The repository's address.

        Raises:
            ValueError: if the Hub does not take it, or huggingface_hub is not installed.
        """
        with tempfile.TemporaryDirectory() as temporary:
            folder = self.save(Path(temporary) / "sae")
            config = json.loads((folder / "config.json").read_text())
            about = {"model": model, "site": site}
            if self.tokens_trained > 1:  # else it comes from another library, and how many they were is not known
                about["tokens trained on"] = f"{int(self.tokens_trained):,}"
            about |= {
                "texts, by their hashes": ", ".join(self.trained_on),
                "sha256 of the weights": config["weights_sha256"],
            }
            about |= {"library": f"sae-put-to-the-test {version('sae-put-to-the-test')}, torch {torch.__version__}"}
            known = {key: value for key, value in about.items() if value}
            return push(folder, name, card(name, config, known, metrics or {}), private)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A new folder to write into, which becomes `path` when all is written; what was at `path` is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        new.chmod(0o755)
        yield new
        for file in new.iterdir():
            file.chmod(0o644)  # safetensors writes for its owner alone
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            os.replace(path, old)
            os.replace(new, path)
            shutil.rmtree(old)
        else:
            os.replace(new, path)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def is_saved(path: Path) -> bool:
    """Whether `SAE.save` wrote this folder, and nobody put anything else into it."""
    try:
        alone = {part.name for part in path.iterdir()} == {"config.json", "weights.safetensors"}
        return alone and json.loads((path / "config.json").read_text())["format"] == FORMAT["format"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def as_batch(item: Batch | Tensor | tuple | list) -> Batch:
    """What a stream yields, as a `Batch`: a tensor or, as data loaders have it, a tuple or list that starts with one.

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(item, Batch):
        return item
    x = item[0] if isinstance(item, tuple | list) and len(item) else item
    if not isinstance(x, Tensor):
        raise ValueError(f"a stream must yield Batch or tensors (batch, d_in), got {type(x).__name__}; use torch.stack")
    return Batch(x)


def whole(name: str, value: int, least: int = 1, most: int | None = None, most_name: str = "") -> int:
    """`value`, if it is an integer in ``[least, most]``; else a ValueError that names the rule and the value."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        limit = (
            f"in [{least}, {most_name + '=' if most_name else ''}{most}]" if most is not None else f"at least {least}"
        )
        raise ValueError(f"{name} must be an integer {limit}, got {value!r}")
    return value


def positive(name: str, value: float, or_zero: bool = False) -> float:
    """`value`, if it is a finite number above zero (or zero, where allowed); else a ValueError."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not (0 < number < float("inf") or (or_zero and number == 0)):
        raise ValueError(f"{name} must be a finite number {'of at least' if or_zero else 'above'} 0, got {value!r}")
    return number


def unit_dictionary(d_in: int, d_sae: int, generator: torch.Generator) -> Float[Tensor, "d_sae d_in"]:
    """Directions drawn uniformly from the sphere, one a row."""
    return F.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1)


def column_major(W_enc: Float[Tensor, "d_in d_sae"]) -> Float[Tensor, "d_in d_sae"]:
    """The same matrix, stored so that each latent's weights (a column) are contiguous."""
    return W_enc.T.contiguous().T


def geometric_median(x: Float[Tensor, "batch d_in"], tolerance: float = 1e-5) -> Float[Tensor, " d_in"]:
    """The point with the least summed distance to the rows (Weiszfeld's iteration, at most 100 rounds)."""
    point = x.mean(0)
    for _ in range(100):
        weight = 1 / (x - point).norm(dim=1, keepdim=True).clamp(min=1e-6)
        last, point = point, (x * weight).sum(0) / weight.sum()
        if (point - last).norm() <= tolerance * (1 + last.norm()):
            break
    return point


def squared_error(x: Float[Tensor, "batch d_in"], x_hat: Float[Tensor, "batch d_in"]) -> Float[Tensor, ""]:
    """Squared distance, summed over dimensions, mean over the batch."""
    return per_token((x - x_hat).square().sum(1).sum(), len(x))


def spread(x: Float[Tensor, "batch d_in"]) -> Float[Tensor, ""]:
    """Squared distance from the batch's mean, summed over dimensions and the batch."""
    return total((x - per_token(x.sum(0), len(x))).square().sum())


def auxk(
    sae: SAE, scores: Scores, residual: Float[Tensor, "batch d_in"], latents: Bool[Tensor, " d_sae"] | None = None
) -> Float[Tensor, ""]:
    """The loss that revives dead latents, or such as are chosen: how badly the best of them explain what is left over.

    ``AuxK = |e - e_hat|^2 / |e - mean(e)|^2`` with ``e`` the residual, held constant, and ``e_hat`` its
    reconstruction from the ``min(d_in // 2, number dead)`` largest positive scores of dead latents; each summed over
    dimensions and the batch. 0 where none is dead. Source: Gao et al. 2024, section 2.4, as in the
    dictionary_learning library. Chapter `topk`.
    """
    dead = (sae.dead if latents is None else latents).nonzero().squeeze(1)
    if not len(dead):
        return residual.new_zeros(())
    residual = residual.detach()
    code = top_of_rows(scores.of(dead), min(max(sae.d_in // 2, 1), len(dead)))
    error = total((residual - code.decode(sae.W_dec.index_select(0, dead))).square().sum())
    size = spread(residual)
    return error / size.masked_fill(size == 0, torch.inf)  # a batch of one token has no spread
