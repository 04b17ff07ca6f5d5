"""From units and texts to what a page of the explorer holds: numbers of each unit, its examples, trees and maps.

Everything is read from the model and the texts; nothing is fitted. The same units and texts give the same page.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sae_lib.explorer.page import PART_UNITS, VERSION
from sae_lib.explorer.reading import (
    AHEAD,
    BACK,
    BINS,
    absorptions,
    around,
    decoder_neighbours,
    importances,
    logit_effects,
    token_texts,
)
from sae_lib.metrics.polysemanticity import effective_features
from sae_lib.models import LanguageModel
from sae_lib.neuron_embeddings import (
    Examples,
    Units,
    central,
    collect,
    cosine_distances,
    cut,
    embeddings,
    proxies,
    similar_clusters,
    tree,
)
from sae_lib.records import Record
from sae_lib.sae import SAE

EXAMPLES = 100_000
"""Most examples on a page: with as many it stays below `sae_lib.explorer.page.MOST_BYTES`."""
CUT = 0.5
"""Distance up to which examples are one cluster when a page opens; the paper's."""
IMPORTANT = 3
"""Clusters of a unit, the largest, for whose central example the importance of tokens is computed."""
FLOOR = 0.01
"""Least importance of the key token by which that of the others is divided."""
SIMILAR = 8
"""Clusters of other units beside a cluster."""
WORD_UNITS = 50
"""Most units that are listed for a token."""
KEY_TOKENS = 3
"""Commonest key tokens that stand for a unit in a list."""


@dataclass
class Shown:
    """The texts and tokens that a page shows, numbered in the order in which they are first met."""

    texts: dict[int, int] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)

    def text(self, number: int) -> int:
        return self.texts.setdefault(number, len(self.texts))

    def token(self, token: int) -> int:
        return self.tokens.setdefault(token, len(self.tokens))


@dataclass
class Clusters:
    """A unit's examples: how far they are from each other, how they merge, and their clusters at `CUT`."""

    distances: Float[np.ndarray, "K K"]
    tree: Float[np.ndarray, "merges 4"]
    labels: Int[np.ndarray, " K"]
    central: Int[np.ndarray, " clusters"]


def contents(
    sets: Sequence[Units],
    texts: Iterable[str | Record],
    title: str | None = None,
    source: str = "texts",
    threshold: float | int = 0.75,
    most: int | None = None,
) -> tuple[dict, dict[str, object]]:
    """Index and parts, for `sae_lib.explorer.page.page`.

    Args:
        sets: one population of units, or two of the same model, from `sae_lib.neuron_embeddings.neurons` or `latents`.
        texts: in which their examples are found, strings or records.
        title: of the page; by default, what the sets are called.
        source: what the texts are, for the reader.
        threshold: share of a unit's maximum from which a text is an example.
        most: examples a unit, at least 1; by default the paper's 100, or fewer where that makes more than `EXAMPLES`.

    Raises:
        ValueError: for no sets or more than two, or two models; for texts and numbers that `collect` refuses.
    """
    if not 1 <= len(sets) <= 2:
        raise ValueError(f"a page shows one set of units, or two side by side, got {len(sets)}")
    model = sets[0].model
    if any(units.model is not model for units in sets):
        raise ValueError(f"both sets must be of one model that was opened once, got {[s.model.name for s in sets]}")
    if most is None:
        most = max(1, min(100, EXAMPLES // sum(map(len, sets))))
    texts, shown, parts, entries = list(texts), Shown(), {}, []
    for number, units in enumerate(sets):
        examples = collect(units, texts, threshold, most)
        entry, data = described(units, examples, shown, number)
        pieces = [data[start : start + PART_UNITS] for start in range(0, len(data), PART_UNITS)]
        names = [f"explorer-part-{len(parts) + i}" for i in range(len(pieces))]
        parts |= dict(zip(names, pieces, strict=True))
        tokens = sum(map(len, examples.tokens))
        read = {"read": f"{tokens:,} tokens of {len(examples.tokens):,} {source}"}
        entry["facts"] = read | {"examples": f"at most {most} a unit, the first that were met"} | entry["facts"]
        entries.append(entry | {"at_least": threshold, "parts": names})
    parts["explorer-documents"] = {
        "tokens": [[shown.token(token) for token in examples.tokens[text]] for text in shown.texts]
    }
    if len({entry["key"] for entry in entries}) < len(entries):
        entries = [entry | {"key": f"{entry['key']}-{number}"} for number, entry in enumerate(entries, 1)]
    index = {
        "title": title or f"{known_as(model)}: " + " and ".join(units.name for units in sets),
        "version": VERSION,
        "vocab": token_texts(model.tokenizer, shown.tokens),
        "documents": "explorer-documents",
        "sets": entries,
    }
    return index, parts


def described(units: Units, examples: Examples, shown: Shown, number: int) -> tuple[dict, list[dict]]:
    """A set's entry in the index, but for its parts, and the data of its units."""
    n, latent = len(units), isinstance(units.values, SAE)
    clusters = [clustered(units, examples, unit) for unit in tqdm(range(n), "clusters", leave=False, delay=2)]
    near = similar(examples, clusters, number)
    asked = [(unit, int(k)) for unit, found in enumerate(clusters) for k in found.central[:IMPORTANT]]
    wanted = [(unit, int(examples.document[unit, k]), int(examples.position[unit, k])) for unit, k in asked]
    important = [{} for _ in range(n)]
    for (unit, k), found in zip(asked, importances(units, examples.tokens, wanted), strict=True):
        important[unit][str(k)] = (255 * found / max(float(found[-1]), FLOOR)).clamp(0, 255).round().int().tolist()
    windows, counts, inputs = around(units, examples)
    ends = logit_effects(units)
    data, words, keys = [], {}, []
    for unit, found in enumerate(clusters):
        document, position, value, _ = (part.tolist() for part in examples.of(unit))
        key_tokens = Counter(shown.token(examples.tokens[d][p]) for d, p in zip(document, position, strict=True))
        keys.append([token for token, _ in key_tokens.most_common(KEY_TOKENS)])
        for token, times in key_tokens.items():
            words.setdefault(token, []).append((-times, unit))
        lengths = [len(examples.tokens[d]) for d in document]
        spans = [(max(0, BACK - p), BACK + min(AHEAD + 1, m - p)) for p, m in zip(position, lengths, strict=True)]
        data.append(
            {
                "examples": [[shown.text(d), p, short(v)] for d, p, v in zip(document, position, value, strict=True)],
                **drawn(found),
                "windows": [windows[unit, k, start:end].tolist() for k, (start, end) in enumerate(spans)],
                "importance": important[unit],
                "histogram": {"edges": steps(examples.maximum[unit]), "counts": counts[unit].tolist()},
                "promotes": [] if ends is None else pairs(map(shown.token, ends[0][unit].tolist()), ends[1][unit]),
                "suppresses": [] if ends is None else pairs(map(shown.token, ends[2][unit].tolist()), ends[3][unit]),
                "similar": near[unit],
            }
        )
    facts = {
        "dead": f"{int((~examples.alive).sum()):,} of {n:,} are active on no token",
        "active at a token": f"{float(examples.frequency.sum()):,.1f} on average",
    }
    if latent:
        neighbours, cosines = decoder_neighbours(units.values)
        absorbers, facts["absorption"] = absorptions(units)
        for unit, each in enumerate(data):
            each["decoder_neighbours"] = pairs(neighbours[unit].tolist(), cosines[unit])
            each["absorption"] = [[a.letter, a.main, short(a.share)] for a in absorbers if a.latent == unit]
    return {
        "key": "latents" if latent else f"neurons-{units.site.split('.')[1]}",
        "name": units.name,
        "kind": "latents" if latent else "neurons",
        "model": known_as(units.model),
        "site": units.site,
        "n": n,
        "threshold": CUT,
        "facts": facts,
        "summary": summary(units, examples, clusters, inputs),
        "words": {str(token): [unit for _, unit in sorted(found)[:WORD_UNITS]] for token, found in words.items()},
        "keys": keys,
    }, data


def known_as(model: LanguageModel) -> str:
    """The model's name; of a folder only its last part, since a page may be passed on."""
    return Path(model.name).resolve().name if Path(model.name).is_dir() else model.name


def clustered(units: Units, examples: Examples, unit: int) -> Clusters:
    """The clusters of one unit's examples; none for a unit without examples."""
    h = examples.of(unit)[3]
    distances = cosine_distances(embeddings(h, units.weights[unit].cpu()))
    merges = tree(distances)
    labels = cut(merges, CUT) if len(h) else np.empty(0, dtype=int)
    return Clusters(distances, merges, labels, central(distances, labels) if len(h) else labels)


def similar(examples: Examples, clusters: Sequence[Clusters], number: int) -> list[dict[str, list]]:
    """Of each unit and cluster the most similar clusters of other units: set, unit, central example, cosine."""
    owners = torch.tensor([unit for unit, found in enumerate(clusters) for _ in found.central], dtype=torch.int64)
    if not len(owners):
        return [{} for _ in clusters]
    heads = torch.tensor([int(k) for found in clusters for k in found.central])
    nearest, cosines = similar_clusters(examples.h[examples.place[owners, heads]], owners, SIMILAR)
    near, own = [{} for _ in clusters], Counter()
    for owner, others, row in zip(owners.tolist(), nearest.tolist(), cosines.tolist(), strict=True):
        found = zip(others, row, strict=True)
        near[owner][str(own[owner])] = [[number, int(owners[o]), int(heads[o]), short(c)] for o, c in found if o >= 0]
        own[owner] += 1
    return near


def summary(
    units: Units, examples: Examples, clusters: Sequence[Clusters], inputs: Float[Tensor, "random d_in"]
) -> dict[str, list]:
    """A number a unit for each measure; None where it is undefined.

    The proxies, and two measures without which their smallness says nothing: ``random_distance``, the mean distance of
    random inputs under the same weights, and ``participation``, how many inputs the weights rest on.
    """
    one = np.zeros(len(inputs), dtype=int)
    at_random = [proxies(cosine_distances(embeddings(inputs, w)), one)["mean_distance"] for w in units.weights.cpu()]
    found = [proxies(each.distances, each.labels) for each in clusters]
    names = ("max_distance", "mean_distance", "intra_distance", "inter_distance")
    return {
        "frequency": shorts(examples.frequency),
        "maximum": shorts(examples.maximum),
        "examples": [each["size"] for each in found],
        "clusters": [each["clusters"] for each in found],
        **{name: shorts([each[name] for each in found]) for name in names},
        "random_distance": shorts(at_random),
        "participation": shorts(effective_features(units.weights.cpu())),
    }


def drawn(found: Clusters) -> dict[str, object]:
    """The tree, its leaves' order, the distances in bytes, and a map."""
    from scipy.cluster.hierarchy import leaves_list

    count = len(found.labels)
    return {
        "tree": [[int(a), int(b), short(height)] for a, b, height, _ in found.tree],
        "order": leaves_list(found.tree).tolist() if count > 1 else list(range(count)),
        "closeness": in_bytes(found.distances),
        "map": plane(found.distances).round(3).tolist(),
    }


def in_bytes(distances: Float[np.ndarray, "K K"]) -> str:
    """The upper triangle, row by row, in 255ths of the largest distance, in base64.

    >>> list(base64.b64decode(in_bytes(np.array([[0, 1, 0.2], [1, 0, 0.8], [0.2, 0.8, 0]]))))
    [255, 51, 204]
    """
    upper = distances[np.triu_indices(len(distances), 1)]
    largest = upper.max(initial=0) or 1
    return base64.b64encode((255 * upper / largest).round().astype(np.uint8).tobytes()).decode()


def plane(distances: Float[np.ndarray, "K K"]) -> Float[np.ndarray, "K 2"]:
    """The examples as points whose distances are as true as a plane allows: classical scaling, in the unit square.

    The two largest eigenvectors of ``-1/2 C D^2 C`` with C = I - 1/K, each times the root of its eigenvalue (Torgerson
    1952). One scale for both axes; each axis is turned so that its largest coordinate is positive.

    >>> plane(np.array([[0, 1, 4], [1, 0, 3], [4, 3, 0.0]])).round(2)  # in a row
    array([[0.  , 0.5 ],
           [0.25, 0.5 ],
           [1.  , 0.5 ]])
    """
    count = len(distances)
    if count < 2:
        return np.full((count, 2), 0.5)
    square = distances**2
    centred = -(square - square.mean(0) - square.mean(1, keepdims=True) + square.mean()) / 2
    values, vectors = np.linalg.eigh(centred)  # smallest first
    points = (vectors * np.sqrt(values.clip(min=0)))[:, :-3:-1]
    points = points * np.where(points[np.abs(points).argmax(0), [0, 1]] < 0, -1, 1)
    low, high = points.min(0), points.max(0)
    return (points - (low + high) / 2) / (max(high - low) or 1) + 0.5


def steps(maximum: Float[Tensor, ""]) -> list[float]:
    """Edges of a histogram's bars."""
    return [short(edge) for edge in np.linspace(0, float(maximum), BINS + 1)]


def pairs(numbers: Iterable[int], values: Float[Tensor, " n"]) -> list[list]:
    return [[number, short(value)] for number, value in zip(numbers, values.tolist(), strict=True)]


def shorts(values: Sequence[float] | Tensor) -> list[float | None]:
    return [short(value) for value in torch.as_tensor(values).tolist()]


def short(value: float) -> float | None:
    """Four digits, which is more than anybody reads; None for what is undefined."""
    return float(f"{value:.4g}") if np.isfinite(value) else None
