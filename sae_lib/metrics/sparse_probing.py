"""Whether a few latents are enough to tell a property of a text: k-sparse probing. Chapter `evaluation`.

    z_t   = mean of the code over the tokens of text t
    k latents with the largest |mean of z over texts with the property - mean over texts without|
    accuracy of logistic regression on these k, on texts that it was not fitted on

If one latent does as well as a probe on all of the activation, the SAE has a latent for that property. Definitions of
SAEBench (Karvonen et al. 2025, arXiv 2503.09532), sparse probing; `SparseProbing` says where it differs.

*Blind to*: what no label names; whether the model uses the property; precision on single tokens, for texts are
averaged. C = 1 acts on raw magnitudes, so that very small activations are held back. Random SAEs score high: read the
numbers beside an untrained SAE, single neurons and the dense probe (Korznikov et al. 2026, arXiv 2602.14111).

*Not here, on purpose*: two relatives in SAEBench that ablate latents and watch probes, SCR (spurious correlation
removal) and TPP (targeted probe perturbation). Chanin et al. 2026 (arXiv 2605.18229, known here from its abstract and
summaries) report that TPP gets worse as SAEs are trained longer and that SCR turns against quality where many latents
are ablated, while probing is the most reliable of the kind. The variant of Kantamneni et al. 2025 (sae-probes, arXiv
2502.16681: last token, L1 penalty by cross-validation, latents divided by their mean) is another metric, also left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sae_lib.metrics.probing import linear_probe
from sae_lib.metrics.reconstruction import finite_matrices
from sae_lib.models import LanguageModel, empty_text
from sae_lib.records import Record
from sae_lib.sae import SAE, whole

PROPERTIES = ("register", "language", "topic", "tense", "sentiment", "gender")
"""Attributes of a `Record` that are probed; the topic of stories only, elsewhere the word means something else."""
CLASSES, LEAST = 5, 20
"""At most so many classes of a property, the most frequent ones; and texts that a class needs."""
CONTEXT, TOKENS_AT_ONCE = 128, 4096
"""Most tokens of a text, BOS included, as in SAEBench; and of a forward pass."""
SIZES = (1, 2, 5)
"""Numbers of latents in a probe."""


def pooled(z: Float[Tensor, "texts position d"], keep: Bool[Tensor, "texts position"]) -> Float[Tensor, "texts d"]:
    """``sum_p keep_p z_p / sum_p keep_p``: the mean over the tokens that count, text by text.

    Units: those of z. Blind to: where in the text, and whether once strongly or often weakly. SAEBench keeps the
    tokens other than BOS, EOS and padding.

    Args:
        z: a code or activations, of padded texts.
        keep: True where a position counts; at least one in each text.

    Raises:
        ValueError: if a text has no token that counts.

    >>> z = torch.tensor([[[9.0, 9.0], [1.0, 0.0], [2.0, 4.0]]])
    >>> pooled(z, torch.tensor([[False, True, True]]))  # (1 + 2) / 2 and (0 + 4) / 2
    tensor([[1.5000, 2.0000]])
    """
    counted = keep.sum(1, keepdim=True)
    if not (counted > 0).all():
        raise ValueError(
            f"keep must be True for at least one position of each text, got none in {int((counted == 0).sum())} "
            f"of {len(keep)} texts: leave these out"
        )
    return (keep.to(z.dtype).unsqueeze(1) @ z).squeeze(1) / counted


def strongest_latents(z: Float[Tensor, "n d_sae"], labels: Bool[Tensor, " n"], k: int) -> Int[Tensor, " k"]:
    """The k latents with the largest ``|mean of z where labels - mean of z elsewhere|``, the strongest first.

    Not divided by any spread: latents of large activations come first. Source: SAEBench, sparse probing.

    Args:
        z: code of each example.
        labels: whether it has the property; both kinds must occur.
        k: number of latents, in [1, d_sae].

    Raises:
        ValueError: if k is out of range, labels do not fit or are all alike, or z is not finite.

    >>> z = torch.tensor([[1.0, 0.0, 5.0], [3.0, 0.0, 5.0], [0.0, 4.0, 5.0]])
    >>> strongest_latents(z, torch.tensor([True, True, False]), k=2)  # differences 2, -4 and 0
    tensor([1, 0])
    """
    (z,) = finite_matrices(z=z)
    whole("k", k, most=z.shape[1], most_name="d_sae")
    _check_labels("labels", labels, z)
    return (z[labels].mean(0) - z[~labels].mean(0)).abs().topk(k).indices


def sparse_probe_accuracy(
    z_train: Float[Tensor, "n_train d_sae"],
    y_train: Bool[Tensor, " n_train"],
    z_test: Float[Tensor, "n_test d_sae"],
    y_test: Bool[Tensor, " n_test"],
    k: int,
) -> float:
    """Accuracy on the test examples of logistic regression (L2, C = 1) on the `strongest_latents` of the training ones.

    Units: fraction; 1 is perfect; chance is the share of the more frequent label, 1/2 if balanced. Blind to: see the
    file. Source: SAEBench, sparse probing (scikit-learn, at most 1,000 iterations).

    Args:
        z_train, y_train: code and property of the examples that latents are chosen and fitted on; both kinds occur.
        z_test, y_test: of those that are counted.
        k: number of latents, in [1, d_sae].

    Raises:
        ValueError: as `strongest_latents`, and if the two codes have different widths.

    >>> z = torch.tensor([[2.0, 0.3], [3.0, 0.1], [0.0, 0.2], [0.0, 0.2]])
    >>> y = torch.tensor([True, True, False, False])
    >>> new = torch.tensor([[4.0, 0.0], [0.0, 9.0], [5.0, 0.0], [0.0, 0.0]])  # latent 0 lives in two, one of them is
    >>> sparse_probe_accuracy(z, y, new, torch.tensor([True, True, False, False]), k=1)
    0.5
    """
    from sklearn.linear_model import LogisticRegression

    chosen = strongest_latents(z_train, y_train, k)
    (z_test,) = finite_matrices(z_test=z_test)
    if z_test.shape[1] != z_train.shape[1]:
        raise ValueError(f"z_test must have the width of z_train, d_sae={z_train.shape[1]}, got {z_test.shape[1]}")
    if len(y_test) != len(z_test):
        raise ValueError(f"y_test must tell the property of each of the {len(z_test)} rows, got {len(y_test)}")
    probe = LogisticRegression(C=1.0, max_iter=1000)
    probe.fit(z_train[:, chosen].float().cpu().numpy(), y_train.cpu().numpy())
    return float(probe.score(z_test[:, chosen].float().cpu().numpy(), y_test.cpu().numpy()))


def labelled_texts(
    name: str, text: str = "text", label: str = "label", split: str = "train", limit: int = 50_000, seed: int = 0
) -> list[tuple[str, str]]:
    """Texts with their labels from a data set of the Hub, or a folder that ``datasets`` can read, for `SparseProbing`.

    Args:
        name: ``org/name`` or a folder.
        text: name of the column with the texts.
        label: name of the column with the labels; numbered classes get their names.
        split: of the data set.
        limit: at most this many texts, drawn from all, for many data sets are sorted by label.
        seed: of the draw.

    Returns:
        (text, label), shuffled.

    Raises:
        ValueError: if a column does not exist.
        ImportError: if ``datasets`` is not installed.
    """
    try:
        import datasets
    except ImportError as missing:
        raise ImportError(f"{name!r} is read by datasets, which is not installed: pip install datasets") from missing
    rows = datasets.load_dataset(name, split=split)
    for column in (text, label):
        if column not in rows.column_names:
            raise ValueError(f"text and label must be columns of {name!r}, {rows.column_names}, got {column!r}")
    rows = rows.shuffle(seed=seed).select(range(min(whole("limit", limit), len(rows))))
    kind = rows.features[label]
    name_of = kind.int2str if isinstance(kind, datasets.ClassLabel) else str
    return [(row[text], name_of(row[label])) for row in rows.select_columns([text, label])]


class Problem(NamedTuple):
    """One class against the others of its property: rows of the pooled texts, and which of them are of the class."""

    property: str
    value: str
    train: Int[Tensor, " n_train"]
    y_train: Bool[Tensor, " n_train"]
    test: Int[Tensor, " n_test"]
    y_test: Bool[Tensor, " n_test"]


class SparseProbing:
    """`sparse_probe_accuracy` on labelled texts, over all classes. Chapter `evaluation`.

    Every class of a property is told from the property's other classes, one against the rest, on as many texts of it as
    of them, the others taken evenly; of two classes, one is probed, for the other is its mirror. Four fifths of the
    texts are fitted on. Accuracies are averaged over the classes of a property, then over properties. Equal texts count
    once, so that none is on both sides. Building it reads the model and fits the baselines; a call encodes and probes.

    As SAEBench, but for: the texts; the dense probe, which is scikit-learn's on standardised activations and never sees
    the test texts (there, early stopping does). SAEBench has 5,000 texts a class, 8 data sets, 35 classes; for data
    from the Hub make one of these a data set (`labelled_texts`): all activations are kept in memory.

    Args:
        model: the model that is read.
        site: where.
        texts: records, such as ``load_texts("pocket")``, whose attributes are the properties; or (text, label) pairs.
        seed: which texts of a class, and on which side. Another seed shows how far the metric itself is uncertain.
        size: most texts a class, those of the class and the others together, at least 10; fewer where texts are fewer.

    Attributes:
        problems: property, value and examples of each class.
        baselines: what does not depend on the SAE, as a call returns it.

    Raises:
        ValueError: if no property has two classes of 20 texts.
    """

    def __init__(
        self,
        model: LanguageModel,
        site: str,
        texts: Iterable[Record | tuple[str, str]],
        seed: int = 0,
        size: int = 5000,
    ):
        self.problems, chosen = problems(list(texts), whole("seed", seed, least=0), whole("size", size, least=10))
        self._parts, self._places = read(model, site, chosen)
        x = torch.cat([pooled(x.float(), keep) for x, keep in self._parts]).cpu()[self._places]
        self.baselines = self._scores(x, "probing_neurons_") | {
            "probing_dense": self._mean(_dense_accuracy, x),
            "probing_chance": self._mean(_chance, x),
            "probing_classes": len(self.problems),
            "probing_texts": min(len(problem.train) + len(problem.test) for problem in self.problems),
        }

    @torch.no_grad()
    def __call__(self, sae: SAE) -> dict[str, float]:
        """Scores of one SAE beside those that do not depend on it.

        Returns:
            ``probing_1``, ``_2``, ``_5``: mean accuracy with so many latents; ``probing_neurons_1``, ``_2``, ``_5``:
            with so many dimensions of the activation; ``probing_dense``: of all of it; ``probing_chance``;
            ``probing_classes``, and ``probing_texts``: the texts of the smallest class, both sides together.
        """
        mode = sae.training
        try:
            sae.eval()
            z = [
                pooled(sae.encode(x.flatten(0, 1).to(sae.W_dec)).view(*keep.shape, -1), keep.to(sae.W_dec.device))
                for x, keep in tqdm(self._parts, desc="sparse probing", leave=False, delay=2)
            ]
        finally:
            sae.train(mode)
        z = (torch.cat(z) * sae.W_dec.norm(dim=1)).cpu()[self._places]  # as with rows of norm 1
        return self._scores(z, "probing_") | self.baselines

    def _scores(self, z: Float[Tensor, "texts d"], prefix: str) -> dict[str, float]:
        """Mean accuracy for each number of latents."""
        return {
            f"{prefix}{k}": self._mean(lambda *problem, k=k: sparse_probe_accuracy(*problem, k=k), z) for k in SIZES
        }

    def _mean(self, accuracy, z: Float[Tensor, "texts d"]) -> float:
        """Mean over the classes of a property, then over properties."""
        of_property: dict[str, list[float]] = {}
        for problem in self.problems:
            score = accuracy(z[problem.train], problem.y_train, z[problem.test], problem.y_test)
            of_property.setdefault(problem.property, []).append(score)
        return sum(sum(scores) / len(scores) for scores in of_property.values()) / len(of_property)


def problems(texts: list[Record | tuple[str, str]], seed: int, size: int) -> tuple[list[Problem], list[str]]:
    """The classes' examples, and the texts that they are rows of."""
    known = list(dict(map(_labels, texts)).items())  # equal texts once
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed)).tolist()
    found, rows, counts = [], {}, {}
    for name in sorted({name for _, labels in known for name in labels}):
        of_class: dict[str, list[str]] = {}
        for text, labels in (known[place] for place in order):
            if name in labels:
                of_class.setdefault(labels[name], []).append(text)
        counts[name] = sorted(((value, len(members)) for value, members in of_class.items()), key=lambda c: (-c[1], c))
        kept = [value for value, count in counts[name] if count >= LEAST][:CLASSES]
        for value in kept[: {1: 0, 2: 1}.get(len(kept))]:
            turns = zip_longest(*(of_class[other] for other in kept if other != value))
            rest = [text for turn in turns for text in turn if text is not None]
            half = min(size // 2, len(of_class[value]), len(rest))
            cut, true = round(0.8 * half), torch.tensor([True, False])
            sides = [
                torch.tensor([rows.setdefault(text, len(rows)) for text in members[:half]])
                for members in (of_class[value], rest)
            ]
            train, test = (torch.cat([side[part] for side in sides]) for part in (slice(cut), slice(cut, None)))
            y_train, y_test = true.repeat_interleave(cut), true.repeat_interleave(half - cut)
            found.append(Problem(name, value, train, y_train, test, y_test))
    if not found:
        largest = {name: dict(of_name[:3]) for name, of_name in counts.items()}
        raise ValueError(
            f"texts must have a property with two classes of at least {LEAST} different texts each, got {largest}"
        )
    return found, list(rows)


def read(
    model: LanguageModel, site: str, texts: list[str]
) -> tuple[list[tuple[Float[Tensor, "texts position d_in"], Bool[Tensor, "texts position"]]], Int[Tensor, " texts"]]:
    """Activations of texts, those of like length together and cut at `CONTEXT`; and the place of each text in them."""
    ids = [row[: min(CONTEXT, model.context) - 1] for row in model.encode(texts)]
    if not all(ids):
        number = next(number for number, row in enumerate(ids) if not row)
        raise empty_text(texts[number], number)
    order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
    groups: list[list[list[int]]] = [[]]
    for number in order:
        if groups[-1] and (len(groups[-1]) + 1) * (len(ids[number]) + 1) > TOKENS_AT_ONCE:
            groups.append([])
        groups[-1].append(ids[number])
    parts = []
    for group in tqdm(groups, desc="reading texts", leave=False, delay=2):
        tokens = model.pad(group)
        parts.append((model.activations(tokens, site), model.content(tokens)))
    return parts, torch.tensor(order).argsort()


def _labels(text: Record | tuple[str, str]) -> tuple[str, dict[str, str]]:
    """A text and its label in each property."""
    if not isinstance(text, Record):
        return text[0], {"label": text[1]}
    names = (name for name in PROPERTIES if name != "topic" or text.register == "story")
    return text.text, {name: value for name in names if (value := getattr(text, name)) is not None}


def _dense_accuracy(x_train: Tensor, y_train: Tensor, x_test: Tensor, y_test: Tensor) -> float:
    """Of a probe on the whole activation."""
    return linear_probe(x_train, y_train.long()).accuracy(x_test, y_test.long())


def _chance(x_train: Tensor, y_train: Tensor, x_test: Tensor, y_test: Tensor) -> float:
    """Of the answer that is most frequent in training."""
    return (y_test == (y_train.float().mean() >= 0.5)).float().mean().item()


def _check_labels(name: str, labels: Tensor, z: Tensor) -> None:
    """Refuse labels of another number of rows, or of one kind only."""
    if len(labels) != len(z):
        raise ValueError(f"{name} must tell the property of each of the {len(z)} rows, got {len(labels)}")
    if labels.dtype != torch.bool or labels.all() or not labels.any():
        raise ValueError(
            f"{name} must be True for some and False for other rows, got {labels.unique().tolist()} in all: "
            "a probe needs both kinds"
        )
