"""Neuron embeddings: the examples of a neuron fall into clusters, one for each thing that it looks for.

Alex Foote, "Tackling Polysemanticity with Neuron Embeddings", 2024, arXiv 2411.08166. Chapter `neuron_embeddings`.

    e_k    = h_k * w                      h_k: what the neuron reads at the key token of example k; w: its input weights
    d(k,l) = 1 - cos(e_k, e_l)            an example's sum of e_k, plus a bias, is what the neuron's nonlinearity sees
    features = clusters of the examples   average linkage, merged up to a distance of 0.5

A *unit* is a neuron of an MLP or a latent of an SAE: anything with input weights. Its *examples* are texts in which it
comes near its maximum, each seen at its *key token*, where it is most active.

**Differences from the paper**, all of whose nine pages were available, but no code of the method: ``h`` is read after
the norm before the MLP, with nothing folded into the weights (the paper does not say where); for a latent ``h`` is
the SAE's input without ``b_dec`` subtracted; maxima are of the same texts, not of a larger set; one example a text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sae_lib.models import LanguageModel, Tokens, empty_text
from sae_lib.records import Record
from sae_lib.sae import SAE, whole

TOKENS_AT_ONCE = 4096
"""Tokens of one forward pass."""


@dataclass(frozen=True)
class Units:
    """Neurons of an MLP, or latents of an SAE: made by `neurons` and `latents`.

    Attributes:
        name: for people.
        model: the language model that they live in.
        site: where `h` is read.
        weights: how each unit reads it.
        values: where the model has the units' activations, or the SAE that computes them from `h`.
    """

    name: str
    model: LanguageModel
    site: str
    weights: Float[Tensor, "units d_in"]
    values: str | SAE

    def __len__(self) -> int:
        return len(self.weights)

    @torch.no_grad()
    def activations(
        self, tokens: Tokens | Tensor
    ) -> tuple[Float[Tensor, "batch pos d_in"], Float[Tensor, "batch pos units"]]:
        """What the units read and, after their nonlinearity or selection, their activations; one forward pass."""
        if isinstance(self.values, str):
            return self.model.activations(tokens, (self.site, self.values))
        h, mode = self.model.activations(tokens, self.site), self.values.training
        try:
            return h, self.values.eval().encode(h.flatten(0, 1)).unflatten(0, h.shape[:2])
        finally:
            self.values.train(mode)


def neurons(model: LanguageModel, layer: int, part: str = "gate") -> Units:
    """The neurons of one layer's MLP. Chapter `neuron_embeddings`.

    With ``h`` at ``mlp.hook_in``, after the norm and its gain, a neuron is ``act(h . w + b)``, or in a gated MLP
    ``act(h . w_gate) (h . w_up)``. Nothing is folded or centred, so ``h * w`` sums to what the nonlinearity sees.

    Args:
        model: of any family whose MLPs TransformerLens names ``blocks.<layer>.mlp``.
        layer: from 0.
        part: of a gated MLP, whose weights embed: those of the ``gate``, or the others, ``up``. No matter elsewhere.

    Raises:
        ValueError: if there is no such layer or part.
    """
    if part not in ("gate", "up"):
        raise ValueError(f"part must be gate or up, got {part!r}")
    site, values = f"blocks.{layer}.mlp.hook_in", f"blocks.{layer}.mlp.out.hook_in"
    for name in (site, values):
        model.width(name)
    gate = model.mlp_weights(layer, "gate")
    weights = model.mlp_weights(layer, "in") if gate is None or part == "up" else gate
    name = f"blocks.{layer}.mlp neurons" + ("" if gate is None else f", {part} weights")
    return Units(name, model, site, weights.detach().float(), values)


def latents(model: LanguageModel, site: str, sae: SAE) -> Units:
    """The latents of an SAE that reads `site`; a latent's weights are its column of ``W_enc``.

    ``h`` is the activation itself, not less ``b_dec``: so the paper writes it, and so its released SAEs were trained.

    Raises:
        ValueError: if the widths differ.
    """
    if model.width(site) != sae.d_in:
        raise ValueError(f"the SAE must read {site!r}, which is {model.width(site)} wide, got d_in={sae.d_in}")
    name = f"{type(sae).__name__}, {sae.d_sae:,} latents, at {site}"
    return Units(name, model, site, sae.W_enc.detach().T.float(), sae)


# Examples -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Examples:
    """The examples of all units, as `collect` finds them; -1 (value: 0) where a unit has fewer than `most`.

    Attributes:
        tokens: of each text, the ids that were read, without BOS.
        maximum: of each unit, its largest activation.
        frequency: share of tokens on which it is active, above 0.
        document: the text of each example, in the order met.
        position: of the key token in its text, from 0.
        value: the activation there.
        place: of what the unit read there, in `h`.
        h: what was read at all key tokens, each place once.
    """

    tokens: list[list[int]]
    maximum: Float[Tensor, " units"]
    frequency: Float[Tensor, " units"]
    document: Int[Tensor, "units most"]
    position: Int[Tensor, "units most"]
    value: Float[Tensor, "units most"]
    place: Int[Tensor, "units most"]
    h: Float[Tensor, "places d_in"]

    @cached_property
    def alive(self) -> Bool[Tensor, " units"]:
        """Whether a unit is active anywhere."""
        return self.maximum > 0

    def of(
        self, unit: int
    ) -> tuple[Int[Tensor, " K"], Int[Tensor, " K"], Float[Tensor, " K"], Float[Tensor, "K d_in"]]:
        """Documents, positions, activations and `h` of one unit's examples."""
        here = self.document[unit] >= 0
        parts = (values[unit, here] for values in (self.document, self.position, self.value))
        return *parts, self.h[self.place[unit, here]]


@torch.no_grad()
def collect(units: Units, texts: Iterable[str | Record], threshold: float | int = 0.75, most: int = 100) -> Examples:
    """The examples of all units: the first texts whose best token comes near the unit's maximum. Chapter
    `neuron_embeddings`.

    Section 3.2 of the paper: not the strongest but the first, for variety below the maximum. The texts are read
    twice: for the best token of each text and unit, then for what is read at the chosen ones. Memory grows with
    texts x units (one value and one position), not with tokens x units.

    Args:
        units: what `neurons` or `latents` returns.
        texts: strings or records; of a text longer than the model's context only the beginning is read.
        threshold: share of the unit's maximum over these texts, in [0, 1].
        most: examples a unit, at least 1.

    Raises:
        ValueError: for a number out of range, no texts, or a text without tokens.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be a share of the maximum, in [0, 1], got {threshold}")
    whole("most", most)
    model, strings = units.model, [text.text if isinstance(text, Record) else text for text in texts]
    if not strings:
        raise ValueError("texts must hold at least one text, got none")
    rows = [row[: model.context - 1] for row in model.encode(strings)]
    if not all(rows):
        number = next(number for number, row in enumerate(rows) if not row)
        raise empty_text(strings[number], number)

    best = torch.empty(len(rows), len(units))
    where = torch.empty(len(rows), len(units), dtype=torch.int32)
    active = torch.zeros(len(units), dtype=torch.int64)
    for documents, tokens in passes(model, rows, range(len(rows)), "examples"):
        a = units.activations(tokens)[1].float()
        a = a.masked_fill(~model.content(tokens)[..., None], -torch.inf)
        value, position = a.max(1)
        best[documents], where[documents] = value.cpu(), position.int().cpu() - 1  # without BOS
        active += (a > 0).sum((0, 1)).cpu()

    maximum = best.amax(0).clamp(min=0)
    near = (best >= threshold * maximum) & (best > 0)
    turn = near.cumsum(0, dtype=torch.int32)
    unit, document = (near & (turn <= most)).T.nonzero(as_tuple=True)
    slot = unit, turn[document, unit] - 1
    position = where[document, unit].long()

    longest = max(map(len, rows))
    found, place = (document * longest + position).unique(return_inverse=True)
    h = torch.empty(len(found), units.weights.shape[1])
    of_place, at = found // longest, found % longest
    for documents, tokens in passes(model, rows, of_place.unique().tolist(), "inputs of examples"):
        x = model.activations(tokens, units.site).float().cpu()
        for row, number in enumerate(documents):
            start, end = torch.searchsorted(of_place, torch.tensor([number, number + 1])).tolist()
            h[start:end] = x[row, at[start:end] + 1]

    def table(values: Tensor, empty: int) -> Tensor:
        filled = torch.full((len(units), most), empty, dtype=values.dtype)
        filled[slot] = values
        return filled

    return Examples(
        tokens=rows,
        maximum=maximum,
        frequency=active / sum(sum(token != model.bos for token in row) for row in rows),
        document=table(document, -1),
        position=table(position, -1),
        value=table(best[document, unit], 0),
        place=table(place, -1),
        h=h,
    )


def passes(
    model: LanguageModel, rows: Sequence[Sequence[int]], documents: Iterable[int], what: str
) -> Iterator[tuple[list[int], Tokens]]:
    """Forward passes over texts, those of like length together: their numbers, and their tokens."""
    groups: list[list[int]] = [[]]
    for number in sorted(documents, key=lambda number: len(rows[number])):
        if groups[-1] and (len(groups[-1]) + 1) * (len(rows[number]) + 1) > TOKENS_AT_ONCE:
            groups.append([])
        groups[-1].append(number)
    for group in tqdm(groups, desc=what, unit="pass", leave=False, delay=2):
        yield group, model.pad([rows[number] for number in group])


# Clusters -------------------------------------------------------------------------------------------------------------


def embeddings(h: Float[Tensor, "K d_in"], w: Float[Tensor, " d_in"]) -> Float[Tensor, "K d_in"]:
    """``e_k = h_k * w``: the neuron embeddings of examples. Equations 1 and 2 of the paper.

    >>> embeddings(torch.tensor([[1.0, 2.0]]), torch.tensor([3.0, -1.0]))
    tensor([[ 3., -2.]])
    """
    return h * w


def cosine_distances(embeddings: Float[Tensor, "K d_in"]) -> Float[np.ndarray, "K K"]:
    """``d(k, l) = 1 - cos(e_k, e_l)``: equation 3.

    Units: 0 (the same direction) to 2 (opposite); 1 from a zero embedding to any other. Blind to: lengths, so also to
    how active the unit is.

    >>> cosine_distances(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]))
    array([[0., 0., 1.],
           [0., 0., 1.],
           [1., 1., 0.]])
    """
    e = F.normalize(embeddings.detach().double().cpu(), dim=1)
    distances = (1 - e @ e.T).clamp(0, 2).fill_diagonal_(0).numpy()
    return (distances + distances.T) / 2


def tree(distances: Float[np.ndarray, "K K"]) -> Float[np.ndarray, "merges 4"]:
    """The hierarchy of examples: `scipy.cluster.hierarchy.linkage` with average linkage; heights are distances.

    The paper does not name its linkage; its figures' heights are average distances between the merged clusters.
    """
    from scipy.cluster.hierarchy import linkage  # here, because it takes long to import
    from scipy.spatial.distance import squareform

    if len(distances) < 2:
        return np.empty((0, 4))
    return linkage(squareform(distances, checks=False), "average")


def cut(
    tree: Float[np.ndarray, "merges 4"], threshold: float | int = 0.5, clusters: int | None = None
) -> Int[np.ndarray, " K"]:
    """The cluster of each example, numbered from 0 by size, the largest first.

    Args:
        tree: what `tree` returns.
        threshold: clusters are merged up to this distance. The paper's is 0.5; its files for SAEs have 0.05.
        clusters: exactly so many instead, in [1, K]: the last merges are undone.

    Raises:
        ValueError: for a number of clusters that the examples do not allow.

    >>> cut(np.array([[1, 2, 0.1, 2], [0, 3, 0.9, 3]]))  # examples 1 and 2 are alike
    array([1, 0, 0])
    """
    from scipy.cluster.hierarchy import fcluster

    count = len(tree) + 1
    if clusters is not None:
        whole("clusters", clusters, most=count, most_name="examples")
        tree = tree.copy()
        tree[:, 2] = np.arange(1, count)  # the number of a merge in place of its height: no ties
        threshold = count - clusters
    labels = fcluster(tree, threshold, "distance") if count > 1 else np.ones(1, dtype=int)
    _, first, labels, sizes = np.unique(labels, return_index=True, return_inverse=True, return_counts=True)
    return np.lexsort((first, -sizes)).argsort()[labels]


def proxies(distances: Float[np.ndarray, "K K"], labels: Int[np.ndarray, " K"]) -> dict[str, float]:
    """How mixed a unit is, without knowing what its examples mean. Section 3.3.1.

    Units: distances from 0 to 2; lower and fewer: more monosemantic. Blind to: what the distances come from. They are
    all 0 for a unit that has one weight left, and they shrink where all inputs are alike: compare with other inputs
    under the same weights.

    Returns:
        ``max_distance``; ``mean_distance``, over pairs of different examples; ``intra_distance``, over pairs within a
        cluster, all clusters together; ``inter_distance``, over pairs of different clusters; ``size``, the number of
        examples; ``clusters``. NaN for a mean of no pairs.

    >>> distances = cosine_distances(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]))
    >>> found = proxies(distances, np.array([0, 0, 1]))
    >>> found["intra_distance"], found["inter_distance"], round(found["mean_distance"], 3), found["clusters"]
    (0.0, 1.0, 0.667, 2)
    """
    others = ~np.eye(len(labels), dtype=bool)
    same = labels[:, None] == labels[None, :]

    def mean(pairs: np.ndarray) -> float:
        return float(distances[pairs].mean()) if pairs.any() else float("nan")

    return {
        "max_distance": float(distances[others].max()) if others.any() else float("nan"),
        "mean_distance": mean(others),
        "intra_distance": mean(same & others),
        "inter_distance": mean(~same),
        "size": len(labels),
        "clusters": len(np.unique(labels)),
    }


def central(distances: Float[np.ndarray, "K K"], labels: Int[np.ndarray, " K"]) -> Int[np.ndarray, " clusters"]:
    """The example of each cluster that is most like the others in it."""
    within = np.where(labels[:, None] == labels[None, :], distances, 0).sum(1)
    return np.array([min(np.flatnonzero(labels == label), key=within.__getitem__) for label in np.unique(labels)])


@torch.no_grad()
def similar_clusters(
    inputs: Float[Tensor, "clusters d_in"], units: Int[Tensor, " clusters"], most: int = 20
) -> tuple[Int[Tensor, "clusters most"], Float[Tensor, "clusters most"]]:
    """The clusters of *other* units that are most like each: by the cosine of what was read at central examples.

    Without the weights, as in the paper's viewer: two neurons with different weights may look for the same thing.

    Args:
        inputs: `h` of each cluster's `central` example.
        units: whose cluster it is.
        most: neighbours of each, at least 1; fewer if there are fewer clusters.

    Returns:
        numbers of clusters, the most similar first, and cosines, from -1 to 1; -1 and NaN where no other unit has one.
    """
    e, found = F.normalize(inputs.float(), dim=1), []
    for rows, owners in zip(e.split(1024), units.split(1024), strict=True):
        cosine = (rows @ e.T).masked_fill(owners[:, None] == units, -torch.inf)
        found.append(cosine.topk(min(whole("most", most), len(e))))
    cosine, cluster = (torch.cat(parts) for parts in zip(*found, strict=True))
    none = cosine.isinf()
    return cluster.masked_fill(none, -1), cosine.masked_fill(none, torch.nan)


@torch.no_grad()
def importance(units: Units, unit: int, ids: Sequence[int], position: int) -> Float[Tensor, " tokens"]:
    """How much each token matters to a unit: the change of its activation at `position` when the token is replaced.

    The method of Foote et al. 2023, which the paper's viewer shows: ``a(text) - a(text with a padding token in place
    of token t)``, for each t up to `position`. In the units of the activation; negative where a token holds it back.

    Args:
        units: which population.
        unit: which one.
        ids: tokens of the text, without BOS.
        position: of the key token.

    Raises:
        ValueError: if the text has no such position.
    """
    whole("position", position, least=0, most=len(ids) - 1, most_name="tokens - 1")
    rows = replaced(units.model, ids[: position + 1], range(position + 1))
    values = torch.empty(len(rows))
    for numbers, tokens in passes(units.model, rows, range(len(rows)), "importance"):
        values[numbers] = units.activations(tokens)[1][:, -1, unit].float().cpu()
    return values[0] - values[1:]


def replaced(model: LanguageModel, ids: Sequence[int], places: Iterable[int]) -> list[list[int]]:
    """The text, then the text with a padding token in place of each of the given tokens."""
    padding = model.bos if (token := model.tokenizer.pad_token_id) is None else token
    return [list(ids), *([*ids[:t], padding, *ids[t + 1 :]] for t in places)]
