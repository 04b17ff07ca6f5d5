"""Texts and planted dictionaries: records and batches whose answer is known."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import lzma
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lib.records import Record, from_marked


class Batch(NamedTuple):
    """What a stream yields.

    Attributes:
        x: activations.
        grad: gradient of the model's summed loss at the site, where the stream was asked for it.
        orbit: activations of the transformed inputs; ``orbit[:, 0]`` is ``x``.
        truth: true coefficients of the features behind ``x``, where they are known (planted data).
    """

    x: Float[Tensor, "batch d_in"]
    grad: Float[Tensor, "batch d_in"] | None = None
    orbit: Float[Tensor, "batch group d_in"] | None = None
    truth: Float[Tensor, "batch n_features"] | None = None


TEXTS = Path(__file__).parent / "assets" / "texts"
SPLITS = ("train", "validation", "test")
FILES = (".txt", ".jsonl")


def load_texts(
    source: str | Path | Iterable[str] = "pocket",
    split: str = "train",
    register: str | None = None,
    limit: int | None = None,
) -> Sequence[Record]:
    """Texts as records. Chapter `pocket`.

    Args:
        source: ``pocket``, the embedded texts; a ``.txt`` file (a text a line) or ``.jsonl`` file (the key ``text`` of
            each line); a data set of the Hub (``org/name``), streamed by ``datasets``; or any iterable of strings.
        split: train, validation or test, for ``pocket`` and the Hub.
        register: of the embedded texts, keep only these records.
        limit: at most this many texts; the Hub needs it.

    Raises:
        ValueError: unknown source, split or register; no texts.
        ImportError: a Hub name, and ``datasets`` is not installed.
    """
    if not isinstance(source, str | Path):
        records = [Record(text) for text in itertools.islice(source, limit)]
    elif source == "pocket":
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        records = read_records(TEXTS / f"{split}.jsonl.xz")
    elif Path(source).is_file():
        records = _file(Path(source))
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and Path(source).suffix not in FILES:
        records = _hub(str(source), split, limit)
    else:
        files = [path.name for path in Path(source).parent.glob("*") if path.suffix in FILES]
        near = ", ".join(difflib.get_close_matches(Path(source).name, ["pocket", *files], cutoff=0.3)) or "pocket"
        raise ValueError(f"texts must be 'pocket', a .txt or .jsonl file, or org/name, got {source!r}; nearest: {near}")
    if register is not None:
        known = sorted({record.register for record in records})
        if register not in known:
            raise ValueError(f"register must be one of {', '.join(known)}, got {register!r}")
        records = [record for record in records if record.register == register]
    if not records or not any(record.text.strip() for record in records):
        raise ValueError(f"texts must not be empty, got {len(records)} of them without a character; check the source")
    return records[:limit]


def read_records(path: Path) -> list[Record]:
    """The records of one compressed file, as the embedded texts are stored."""
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        return [from_marked(json.loads(line)) for line in lines]


def _file(path: Path) -> list[Record]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"texts must be in UTF-8, got {path} with {error}; save it anew in UTF-8") from error
    if path.suffix != ".jsonl":
        return [Record(line) for line in lines]
    try:
        return [Record(json.loads(line)["text"]) for line in lines]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"each line of {path} must be a JSON object with the key 'text', got {error!r}") from error


def _hub(name: str, split: str, limit: int | None) -> list[Record]:
    try:
        import datasets
    except ImportError as missing:
        raise ImportError(f"{name!r} is on the Hub, which needs datasets: pip install datasets") from missing
    if limit is None:
        raise ValueError(f"limit must be given for a data set of the Hub such as {name!r}; how many texts are wanted?")
    rows = iter(datasets.load_dataset(name, split=split, streaming=True))
    first = next(rows, {"text": ""})
    if not isinstance(first.get("text"), str):
        raise ValueError(
            f"{name!r} must have a column 'text' of strings, got {', '.join(first)}: take another data set"
        )
    texts = (row["text"] for row in itertools.chain([first], rows))
    return [Record(text) for text in itertools.islice(filter(str.strip, texts), limit)]


class PlantedDictionary:
    """Activations made of known features: ``x = sum_i c_i v_i + noise``, with unit directions ``v_i``. Chapter `topk`.

    The defaults give the plainest case: independent features that all fire equally often. Each further argument adds
    one property of real activations. SynthSAEBench (16,384 features in 768 dimensions) combines all of them; this is
    its small version, without its scaling of a child by its parent's magnitude, and with exact frequencies.

    *Directions.* Orthonormal if ``n_features <= d_in``. Otherwise as even as 100 steps of descent on the sum of
    ``cos(v_i, v_j)^4`` make them (about ``4 n_features^2 d_in`` operations a step): 64 directions in 32 dimensions
    have ``|cos|`` up to about 0.17, where 0.126 is the least possible and random directions (``even=False``) reach 0.6.

    *Frequencies.* Feature i fires with probability proportional to ``(i + 1)^-zipf`` times, in a hierarchy,
    ``1 / (b + 1)`` for each step down from its root, with b the number of children there. Features are ordered from
    the most frequent to the rarest, and all probabilities add up to `active`. ``active=(3, 20)`` mixes sparse samples
    with dense ones: each sample draws one of these numbers with equal chance, and all its frequencies follow it.

    *Hierarchy.* ``hierarchy=(4, 2)`` means trees of roots with 4 children with 2 children each. A child fires only if
    its parent does; siblings exclude each other, or fire independently given the parent. There are as many whole trees
    as fit into n_features; the features left over are roots without children.

    *Correlation.* A Gaussian copula with eight shared factors couples the roots: root i fires where
    ``sqrt(correlation) a_i . s + sqrt(1 - correlation) e_i`` is low, with ``a_i`` a random unit vector and s, ``e_i``
    normal. Children correlate through their roots.

    *Magnitudes.* A feature that fires has coefficient ``|1 + spread * normal|``, over the sample's norm if ``unit``.

    Args:
        n_features: number of features, at least 1.
        d_in: width of the activations, at least 1.
        active: mean number of features that fire in a sample, above 0 and at most n_features; or several such numbers.
        zipf: exponent of the frequencies, at least 0; 0 makes them equal.
        hierarchy: number of children of a feature, for each level below the roots; ``()`` for none.
        exclusive: whether at most one child of a feature fires.
        correlation: share of the copula's variance that is common, in [0, 1).
        noise: root mean square norm of the Gaussian noise added to a sample (a feature has norm about 1), at least 0.
        spread: standard deviation of the coefficients, at least 0.
        even: whether directions that do not fit are spread out; if not, they are random.
        unit: whether every sample is divided by its norm, noise included; an empty one stays zero.
        seed: of the directions and the copula; samples have seeds of their own.
        device: where samples are drawn; the dictionary itself is the same on every device.

    Attributes:
        directions: (n_features, d_in), unit rows.
        frequencies: (n_features,), the probability that each feature fires; exact.
        parents: (n_features,), the index of each feature's parent, -1 for roots.

    Raises:
        ValueError: if an argument is outside its range, no tree fits, or a frequency would exceed 1.
    """

    directions: Float[Tensor, "n_features d_in"]
    frequencies: Float[Tensor, " n_features"]
    parents: Int[Tensor, " n_features"]

    def __init__(
        self,
        n_features: int,
        d_in: int,
        active: float | int | tuple[float | int, ...] = 3.0,
        *,
        zipf: float | int = 0.0,
        hierarchy: tuple[int, ...] = (),
        exclusive: bool = True,
        correlation: float | int = 0.0,
        noise: float | int = 0.0,
        spread: float | int = 0.25,
        even: bool = True,
        unit: bool = False,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ):
        if not isinstance(hierarchy, (tuple, list)):
            raise ValueError(f"hierarchy must be a tuple of integers, such as (4,), got {hierarchy!r}")
        hierarchy = tuple(hierarchy)
        for name, sizes in {"n_features": (n_features,), "d_in": (d_in,), "hierarchy": hierarchy}.items():
            if not all(isinstance(size, int) and size >= 1 for size in sizes):
                raise ValueError(f"{name} must consist of integers of at least 1, got {', '.join(map(repr, sizes))}")
        levels = active if isinstance(active, tuple) else (active,)
        if not levels or not all(0 < level <= n_features for level in levels):
            raise ValueError(f"active must be in (0, n_features={n_features}], got {active}")
        if not 0 <= correlation < 1:
            raise ValueError(f"correlation must be in [0, 1), got {correlation}")
        for name, value in {"zipf": zipf, "noise": noise, "spread": spread}.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a finite number of at least 0, got {value}")
        self.n_features, self.d_in, self.device = n_features, d_in, torch.device(device)
        self.exclusive, self.correlation, self.noise, self.spread = exclusive, correlation, noise, spread
        self.unit = unit
        self._identity = (n_features, d_in, active, zipf, hierarchy, exclusive, correlation, noise, spread, seed)
        self._identity += () if even else ("random directions",)
        self._identity += ("unit samples",) if unit else ()
        mean = sum(levels) / len(levels)
        self._of_samples = torch.tensor([level / mean for level in levels], device=self.device)

        level_sizes = list(itertools.accumulate(hierarchy, lambda nodes, b: nodes * b, initial=1))
        trees = n_features // sum(level_sizes)
        if trees == 0:
            least = sum(level_sizes)
            raise ValueError(f"n_features must be at least {least}, a tree of {hierarchy=}, got {n_features}")
        self._n_roots = n_features - trees * sum(level_sizes[1:])
        self._levels = []  # of each level below the roots: first parent, first child, parents, children of each
        first_parent, first_child = 0, self._n_roots
        weights = torch.arange(1, n_features + 1, dtype=torch.float64) ** -zipf
        parents = torch.full((n_features,), -1)
        for nodes, b in zip(level_sizes, hierarchy, strict=False):
            self._levels.append((first_parent, first_child, trees * nodes, b))
            parents[first_child : first_child + trees * nodes * b] = first_parent + torch.arange(trees * nodes * b) // b
            weights[first_child:] /= b + 1
            first_parent, first_child = first_child, first_child + trees * nodes * b
        frequencies = weights * mean / weights.sum()
        highest = frequencies[0] * max(levels) / mean
        if highest > 1 + 1e-9:
            raise ValueError(
                f"active must leave every frequency at most 1, got active={active}, with which feature 0 would fire "
                f"with probability {highest:.3g}; lower active, zipf or the depth of the hierarchy"
            )
        generator = seeded("dictionary", seed)
        self.directions = _directions(n_features, d_in, even, generator).to(self.device)
        self.frequencies, self.parents = frequencies.float().to(self.device), parents.to(self.device)
        given_parent = torch.where(parents < 0, frequencies, frequencies / frequencies[parents])
        self._given_parent = given_parent.float().to(self.device)
        loadings = F.normalize(torch.randn(self._n_roots, 8, generator=generator), dim=1)
        self._loadings = (math.sqrt(correlation) * loadings).to(self.device)

    def sample(
        self, n: int, seed: int | torch.Generator = 0
    ) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n n_features"]]:
        """`n` activations and the coefficients that they are made of.

        Args:
            n: number of samples, at least 1.
            seed: a number, for the samples that `batches` of the same seed starts with; or a generator on `device`.

        Raises:
            ValueError: if `n` is below 1.
        """
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        generator = seed if isinstance(seed, torch.Generator) else seeded("samples", seed, device=self.device)
        draw = {"generator": generator, "device": self.device}
        alive = self._fires(n, draw).flatten().nonzero().squeeze(1)
        coefficients = torch.zeros(n * self.n_features, device=self.device)
        coefficients[alive] = (1 + self.spread * torch.randn(len(alive), **draw)).abs()
        coefficients = coefficients.view(n, self.n_features)
        x = coefficients @ self.directions
        if self.noise:
            x.add_(torch.randn(n, self.d_in, **draw), alpha=self.noise / math.sqrt(self.d_in))
        if self.unit:
            norms = x.norm(dim=1, keepdim=True)
            norms[norms == 0] = 1
            x, coefficients = x / norms, coefficients / norms
        return x, coefficients

    def _fires(self, n: int, draw: dict) -> Bool[Tensor, "n n_features"]:
        """Which features fire: the roots by themselves, then each level given its parents."""
        fires = torch.empty(n, self.n_features, dtype=torch.bool, device=self.device)
        roots = slice(0, self._n_roots)
        frequencies = self.frequencies[roots]
        if len(self._of_samples) > 1:
            places = torch.randint(len(self._of_samples), (n, 1), **draw)
            frequencies = frequencies * self._of_samples[places]
        if self.correlation:
            own = torch.randn(n, self._n_roots, **draw) * math.sqrt(1 - self.correlation)
            normal = torch.addmm(own, torch.randn(n, 8, **draw), self._loadings.T)
            fires[:, roots] = normal < torch.special.ndtri(frequencies)
        else:
            torch.lt(torch.rand(n, self._n_roots, **draw), frequencies, out=fires[:, roots])
        for first_parent, first_child, parents, b in self._levels:
            children = slice(first_child, first_child + parents * b)
            upper = self._given_parent[children].view(parents, b)
            if self.exclusive:  # one draw for all siblings, each of which owns an interval
                upper = upper.cumsum(1)
                lower = F.pad(upper[:, :-1], (1, 0))
                uniform = torch.rand(n, parents, 1, **draw)
            else:
                lower = 0
                uniform = torch.rand(n, parents, b, **draw)
            parent_fires = fires[:, first_parent : first_parent + parents].unsqueeze(2)
            fires[:, children] = (parent_fires & (uniform >= lower) & (uniform < upper)).flatten(1)
        return fires

    def batches(self, batch_size: int, seed: int = 0) -> PlantedStream:
        """An endless stream of batches with their true coefficients; another seed gives held-out data."""
        return PlantedStream(self, batch_size, seed)


class PlantedStream:
    """Endless batches of a `PlantedDictionary`, the same ones each time it is iterated over.

    Attributes:
        d_in: width of the activations.
        batch_size: samples a batch.
        seed: of the samples; `train(seed=)` may replace it.
    """

    def __init__(self, dictionary: PlantedDictionary, batch_size: int, seed: int):
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
        self.dictionary, self.d_in, self.batch_size, self.seed = dictionary, dictionary.d_in, batch_size, seed
        self._generator: torch.Generator | None = None
        self._resume: Tensor | None = None

    @property
    def fingerprint(self) -> str:
        """A hash of the dictionary and the seed. Streams of the same samples have the same."""
        return hashlib.sha256(repr((self.dictionary._identity, self.seed)).encode()).hexdigest()

    def __iter__(self) -> Iterator[Batch]:
        iteration, self._resume = _Samples(self, self._started()), None
        self._generator = iteration.generator
        return iteration

    def _started(self) -> torch.Generator:
        """The generator of the next iteration."""
        generator = seeded("samples", self.seed, device=self.dictionary.device)
        return generator if self._resume is None else generator.set_state(self._resume)

    def state_dict(self) -> dict[str, Tensor]:
        """Where the latest iteration stands (else, the start), as tensors; see `Activations.state_dict`."""
        generator = self._generator if self._resume is None and self._generator else self._started()
        return _Samples(self, generator).state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Let the next `iter()` go on where `state` was taken, with the same bits.

        Raises:
            ValueError: if the state comes from a stream of other samples.
        """
        if bytes(state["fingerprint"].tolist()).hex() != self.fingerprint:
            raise ValueError("state must be that of a stream of the same dictionary and seed, got another: pass these")
        self._resume = state["generator"].clone()


class _Samples:
    """One iteration over a stream of samples."""

    def __init__(self, stream: PlantedStream, generator: torch.Generator):
        self.stream, self.generator = stream, generator

    def __iter__(self) -> _Samples:
        return self

    def __next__(self) -> Batch:
        x, coefficients = self.stream.dictionary.sample(self.stream.batch_size, self.generator)
        return Batch(x, truth=coefficients)

    def state_dict(self) -> dict[str, Tensor]:
        """See `PlantedStream.state_dict`."""
        fingerprint = torch.tensor(list(bytes.fromhex(self.stream.fingerprint)), dtype=torch.uint8)
        return {"generator": self.generator.get_state(), "fingerprint": fingerprint}


def seeded(*key: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one purpose and seed: a plain ``manual_seed(0)`` would draw an SAE's initial directions again."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "big")
    return torch.Generator(device).manual_seed(seed)


def _directions(n: int, d: int, even: bool, generator: torch.Generator) -> Float[Tensor, "n d"]:
    """Orthonormal rows if they fit; else unit rows, spread out by descent on the fourth powers of their cosines, or
    random."""
    rows = torch.randn(n, d, generator=generator)
    if n <= d:
        return torch.linalg.qr(rows.T).Q.T.contiguous()
    rows = F.normalize(rows, dim=1)
    for step in torch.linspace(0.2, 0, 100 if even else 0):
        cosines = (rows @ rows.T).fill_diagonal_(0)
        rows = F.normalize(rows - step * F.normalize(cosines.pow(3) @ rows, dim=1), dim=1)
    return rows
