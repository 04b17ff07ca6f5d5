"""Whether it is a neuron's weights that sort its examples, and whether the clusters mean anything.

Chapter `neuron_embeddings`. Table 1 of Foote 2024 (arXiv 2411.08166) compares clusters of ``h * w`` with clusters of
``h`` at one threshold. Here stand beside them, as `Reading`s of the same examples,

    permuted weights, another neuron's weights     any weights change distances: do the neuron's own do it best?
    the same number of clusters in both            a fixed threshold favours wide gaps
    a rotated basis                                the same activations; h * w knows the axes, h . w does not
    no dimensions of largest variance              a few may decide every cosine

and, against what the texts' generator knows and the method does not, the agreement of clusters with labels, and whether
a small cluster is another behaviour. *Blind to*: meanings that no label names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sae_lib.models import LanguageModel
from sae_lib.neuron_embeddings import collect, cosine_distances, cut, embeddings, neurons, proxies, tree
from sae_lib.records import Record

WEIGHTS = ("own", "none", "another neuron's", "permuted")
BASES = ("own", "rotated", "no outliers")
LABELS = ("word", "part", "topic", "register")
"""What agreement is measured with, from fine to coarse: base form and slot of the key token (the token itself where the
generator chose nothing); topic of its story (else the register); register."""
OUTLIERS = 3
"""Dimensions of largest variance that are left out."""
RARE = 0.05
"""A cluster with at most this share of a neuron's examples is a rare behaviour."""
LEAST = 5
"""Examples that agreement with labels is measured on, at least."""


@dataclass(frozen=True)
class Reading:
    """One way to embed the examples of neurons; in `reproduce`, what stands in place of an SAE.

    Attributes:
        weights: the neuron's own; none, so that the input alone is compared; another neuron's of the layer; or its own
            in another order.
        basis: own; rotated, inputs and weights alike; or without the dimensions of largest variance.
        part: see `sae_lib.neuron_embeddings.neurons`.
    """

    weights: str = "own"
    basis: str = "own"
    part: str = "gate"

    def __post_init__(self) -> None:
        for name, known in (("weights", WEIGHTS), ("basis", BASES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")

    def of(
        self, h: Float[Tensor, "places d_in"], weights: Float[Tensor, "units d_in"], seed: int
    ) -> tuple[Float[Tensor, "places d"], Float[Tensor, "units d"]]:
        """Inputs and weights as this reading has them; the seed draws neurons, orders and rotations."""
        generator = torch.Generator().manual_seed(seed)
        (units, d_in), weights = weights.shape, weights.cpu()
        if self.weights == "none":
            weights = torch.ones_like(weights)
        elif self.weights == "another neuron's":
            weights = weights.roll(int(torch.randint(1, units, (), generator=generator)), 0)
        elif self.weights == "permuted":
            weights = weights.gather(1, torch.rand(units, d_in, generator=generator).argsort(1))
        if self.basis == "rotated":
            Q = torch.linalg.qr(torch.randn(d_in, d_in, generator=generator)).Q
            h, weights = h @ Q, (weights if self.weights == "none" else weights @ Q)
        elif self.basis == "no outliers":
            kept = h.var(0).argsort()[: d_in - OUTLIERS]
            h, weights = h[:, kept], weights[:, kept]
        return h, weights


MAIN = Reading(), Reading("none")
"""What the paper compares."""


# Labels ---------------------------------------------------------------------------------------------------------------


def token_labels(
    model: LanguageModel, records: Sequence[Record], tokens: Sequence[Sequence[int]]
) -> list[Int[np.ndarray, "tokens labels"]]:
    """The `LABELS` of each token of each text, as numbers."""
    numbers: dict[str, int] = {}
    offsets = model.tokenizer(
        [record.text for record in records], add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )["offset_mapping"]
    found = []
    for record, ends, row in zip(records, offsets, tokens, strict=True):
        topic, ends = str(record.topic if record.register == "story" else record.register), ends[: len(row)]
        labels = []
        for (start, end), span in zip(ends, record.align(ends), strict=True):
            token = record.text[start:end].strip().lower()
            labels.append((*((span.value, span.slot) if span else (token, token)), topic, record.register))
        found.append(np.array([[numbers.setdefault(name, len(numbers)) for name in names] for names in labels]))
    return found


def agreement(clusters: Int[np.ndarray, " K"], labels: Int[np.ndarray, "K labels"]) -> Float[np.ndarray, " labels"]:
    """The adjusted Rand index of clusters with each label, over pairs of examples.

        (pairs alike in both - expected) / ((pairs alike in clusters + pairs alike in labels) / 2 - expected)

    Units: 1 the same classes, 0 as by chance, less where worse. Blind to: how unlike two labels are. NaN for fewer than
    `LEAST` examples, and for a label that is the same on all of them or on no two: it says nothing. Source: Hubert and
    Arabie 1985; as scikit-learn's, of all labels at once.

    >>> agreement(np.array([0, 0, 0, 1, 1]), np.array([[7], [7], [7], [8], [9]]))  # of 10 pairs 3 alike in both, 4, 3
    array([0.7826087])
    """
    K = len(clusters)
    if K < LEAST:
        return np.full(labels.shape[1], np.nan)
    same, alike = clusters[:, None] == clusters, labels[:, None] == labels
    both = (same[..., None] & alike).sum((0, 1)) - K
    a, b, pairs = same.sum() - K, alike.sum((0, 1)) - K, K * (K - 1)
    expected = a * b / pairs
    says = (b > 0) & (b < pairs)
    return np.where(says, both - expected, np.nan) / np.where(says, (a + b) / 2 - expected, 1)


def rare(
    clusters: Int[np.ndarray, " K"], labels: Int[np.ndarray, " K"], generator: np.random.Generator
) -> Iterator[tuple[bool, bool]]:
    """For each cluster of at most `RARE` of the examples: whether its most frequent label is another than the largest
    cluster's; and whether that of as many examples is which are drawn from the largest cluster itself.

    Args:
        clusters: numbered from 0, the largest.
        labels: of the examples.
        generator: of the draws.
    """

    def most_frequent(some: np.ndarray) -> int:
        return int(np.bincount(some).argmax())

    main = labels[clusters == 0]
    for size, cluster in zip(np.bincount(clusters), range(clusters.max() + 1), strict=True):
        if cluster and size <= RARE * len(clusters):
            behaviour = most_frequent(main)
            own, chance = labels[clusters == cluster], generator.choice(main, size, replace=False)
            yield most_frequent(own) != behaviour, most_frequent(chance) != behaviour


# Measuring ------------------------------------------------------------------------------------------------------------


def feature_clusters(
    model: LanguageModel, texts: Sequence[Record], readings: Sequence[Reading], seed: int = 0, tokens: int = 60_000
) -> list[dict[str, float]]:
    """The clusters of all neurons of all layers, by each reading of the same examples: Table 1 of the paper.

    Neurons with fewer than two examples have no distances and are left out. "Equal" means: in all readings as many
    clusters as ``h * w`` and ``h`` have at the threshold of 0.5, the mean of the two numbers, rounded up.

    Args:
        model: whose neurons.
        texts: from which some are drawn.
        readings: ways to embed the examples.
        seed: of this draw, and of the readings' own.
        tokens: about how many to read; fewer if the texts end.

    Returns:
        for each reading ``neurons``, how many there are; medians over neurons of their `proxies`, and of
        ``intra_distance_equal`` and ``inter_distance_equal``; means over neurons, ``intra_distance_average`` and
        ``inter_distance_average``; ``rand_index``, the `agreement` of the clusters at the threshold, mean over neurons,
        then over labels; ``rand_index_<label>``; ``rand_index_equal``, in as many clusters; ``rand_index_distinct``,
        with one example a distinct key token; ``rare``, how many rare clusters there are; ``rare_confirmed`` and
        ``rare_chance``, shares of them that are another behaviour, by the label "part".

    Raises:
        ValueError: if no neuron has two examples.
    """
    records, draws = drawn(model, texts, tokens, seed), np.random.default_rng(seed)
    found: list[list[Found]] = [[] for _ in readings]
    labels = None
    for layer in tqdm(range(model.n_layers), desc="neurons", unit="layer", leave=False, delay=2):
        examples = collect(neurons(model, layer), records)
        labels = labels or token_labels(model, records, examples.tokens)
        embedded = {
            reading: reading.of(examples.h, neurons(model, layer, reading.part).weights, seed)
            for reading in dict.fromkeys([*readings, *MAIN])
        }
        for unit in range(len(examples.maximum)):
            documents, positions, *_ = (part.tolist() for part in examples.of(unit))
            if len(documents) < 2:
                continue
            places = examples.place[unit, : len(documents)]
            merged = {}
            for reading, (h, weights) in embedded.items():
                distances = cosine_distances(embeddings(h[places], weights[unit]))
                merged[reading] = distances, tree(distances)
            clusters = math.ceil(np.mean([1 + cut(merged[reading][1]).max() for reading in MAIN]))
            at = list(zip(documents, positions, strict=True))
            known = np.array([labels[document][position] for document, position in at])
            ids = [examples.tokens[document][position] for document, position in at]
            for reading, of_neurons in zip(readings, found, strict=True):
                of_neurons.append(measured(*merged[reading], clusters, known, np.array(ids), draws))
    if not found or not found[0]:
        raise ValueError(f"some neuron must have two examples, got none in {len(records)} texts: take more texts")
    return [summary(of_neurons) for of_neurons in found]


class Found(NamedTuple):
    """One neuron by one reading: distances, agreement with each label in three ways, and its rare clusters."""

    distances: dict[str, float]
    agreement: dict[str, Float[np.ndarray, " labels"]]
    rare: list[tuple[bool, bool]]


def measured(
    distances: Float[np.ndarray, "K K"],
    merges: Float[np.ndarray, "merges 4"],
    clusters: int,
    labels: Int[np.ndarray, "K labels"],
    ids: Int[np.ndarray, " K"],
    draws: np.random.Generator,
) -> Found:
    """One neuron by one reading."""
    at_threshold, equal = cut(merges), cut(merges, clusters=clusters)
    of_equal = proxies(distances, equal)
    first = np.unique(ids, return_index=True)[1]  # of each distinct token
    distinct = cut(tree(distances[np.ix_(first, first)]))
    return Found(
        proxies(distances, at_threshold)
        | {f"{name}_equal": of_equal[name] for name in ("intra_distance", "inter_distance")},
        {
            "": agreement(at_threshold, labels),
            "_equal": agreement(equal, labels),
            "_distinct": agreement(distinct, labels[first]),
        },
        list(rare(at_threshold, labels[:, LABELS.index("part")], draws)),
    )


def summary(of_neurons: Sequence[Found]) -> dict[str, float]:
    """All neurons together."""
    values = {name: finite([one.distances[name] for one in of_neurons]) for name in of_neurons[0].distances}
    metrics = {"neurons": len(of_neurons)} | {name: nan_if_none(np.median, some) for name, some in values.items()}
    for name in ("intra_distance", "inter_distance"):
        metrics[f"{name}_average"] = nan_if_none(np.mean, values[name])
    for way in of_neurons[0].agreement:
        of_labels = [
            nan_if_none(np.mean, finite(column)) for column in np.array([one.agreement[way] for one in of_neurons]).T
        ]
        metrics[f"rand_index{way}"] = nan_if_none(np.mean, finite(of_labels))
        if not way:
            metrics |= {f"rand_index_{label}": value for label, value in zip(LABELS, of_labels, strict=True)}
    found = np.array([pair for one in of_neurons for pair in one.rare]).reshape(-1, 2)
    confirmed, chance = (nan_if_none(np.mean, column) for column in found.T)
    return metrics | {"rare": len(found), "rare_confirmed": confirmed, "rare_chance": chance}


def finite(values: Iterable[float]) -> Float[np.ndarray, " some"]:
    return np.array([value for value in values if math.isfinite(value)], dtype=float)


def nan_if_none(statistic: Callable[[np.ndarray], float], values: np.ndarray) -> float:
    return float(statistic(values)) if len(values) else math.nan


def drawn(model: LanguageModel, texts: Sequence[Record], tokens: int, seed: int) -> list[Record]:
    """Texts in an order of the seed, until they have so many tokens."""
    chosen, count = [], 0
    for place in np.random.default_rng(seed).permutation(len(texts)):
        if count >= tokens:
            break
        chosen.append(texts[place])
        count += min(len(model.encode([texts[place].text])[0]), model.context - 1)
    return chosen
