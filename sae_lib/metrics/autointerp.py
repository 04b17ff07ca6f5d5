"""Whether the generator's labels explain the latents: automatic interpretation without a language model.

    explain:  of all labels of tokens the one with the best F1 as a predictor of where the latent lives
    detect:   in 14 new pieces of text, is the latent active exactly where the label occurs?

Chapter `evaluation`. The detection score of SAEBench (Karvonen et al. 2025, arXiv 2503.09532, after Paulo et al. 2024),
with its pieces, thresholds and numbers, but **not its metric**: there, a language model reads examples, writes an
explanation and judges by it. Here an explanation is one label of a `Record`: the token itself, what the generator meant
by it (slot, or slot and value), or a property of its text. Numbers are comparable among themselves only.

*Blind to*: latents that mean something which no label names, alone or in conjunction; how strongly a latent is active;
whether it matters to the model. Ten of 14 pieces are random, and a rare latent is silent in most of them, so that the
answer "never" is right in up to 5 of 7. Random SAEs score high (Korznikov et al. 2026, arXiv 2602.14111): compare with
an untrained one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sae_lib.metrics.matched import matched_mean
from sae_lib.metrics.sparse_probing import PROPERTIES, read
from sae_lib.models import LanguageModel
from sae_lib.records import Record
from sae_lib.sae import SAE, whole

if TYPE_CHECKING:
    from scipy.sparse import csc_array

TOP, MIDDLE, RANDOM = 2, 2, 10
"""Pieces around strong, middling and random tokens, that are judged."""
STRONGEST = 12
"""The strong ones are drawn from so many; what is weaker than all of them is middling."""
AROUND = 10
"""Tokens of a piece on either side of its centre."""
ACTIVE = 0.01
"""Share of its maximum above which a latent counts as active."""
LEAST = 15
"""A latent that lives on no more tokens than this is left out."""
ROWS_AT_ONCE = 4096


class Explained(NamedTuple):
    """One latent.

    Attributes:
        latent: its number.
        label: the explanation.
        f1: of the label on the tokens that it was not chosen on.
        score: share of the 14 pieces on which label and latent agree.
        never: share of them in which the latent is not active, which the answer "never" would get.
        frequency: share of all tokens on which the latent lives.
    """

    latent: int
    label: str
    f1: float
    score: float
    never: float
    frequency: float


class Half(NamedTuple):
    """Half of the texts: their tokens, one after the other.

    Attributes:
        x: activations.
        first: of each token, the first one of its text.
        last: of each token, the last one of its text.
        labels: one list a token.
    """

    x: Float[Tensor, "tokens d_in"]
    first: Int[np.ndarray, " tokens"]
    last: Int[np.ndarray, " tokens"]
    labels: list[list[str]]


class Autointerp:
    """Detection by the best label, over the living latents. Chapter `evaluation`.

    Labels are chosen on one half of the texts and judged on the other. A piece is a token with ten tokens on either
    side, within its text. Two are drawn from the twelve strongest tokens of a latent (more than ten apart), two from
    those weaker than all twelve with probability in proportion to the squared activation, ten at random. A piece is
    active if some token exceeds 1% of the latent's maximum; the label says so if some token carries it. Building it
    reads the model; a call encodes.

    As SAEBench, but for the judge; pieces that are cut at the ends of texts, which are short here; and the number of
    tokens (2 million there).

    Args:
        model: the model that is read.
        site: where.
        texts: records, such as ``load_texts("pocket", split="test")``.
        seed: which texts are on which half, which latents, and which pieces.
        tokens: about how many tokens to read, at least 1; fewer if the texts end.
        latents: how many latents to explain, drawn from the living ones; fewer if fewer qualify.

    Raises:
        ValueError: if texts are no records, or fewer than two.
    """

    def __init__(
        self,
        model: LanguageModel,
        site: str,
        texts: Iterable[Record],
        seed: int = 0,
        tokens: int = 100_000,
        latents: int = 1000,
    ):
        self.seed, self.latents = whole("seed", seed, least=0), whole("latents", latents)
        records = list(texts)
        if len(records) < 2 or not all(isinstance(record, Record) for record in records):
            kinds = sorted({type(record).__name__ for record in records})
            raise ValueError(f"texts must be at least two records, got {len(records)} of {kinds}; use load_texts")
        order = np.random.default_rng(seed).permutation(len(records)).tolist()
        encoded = model.tokenizer(
            [records[place].text for place in order], add_special_tokens=False, return_offsets_mapping=True
        )
        sizes = accumulate(len(ids) for ids in encoded["input_ids"])
        until = max(2, sum(size < whole("tokens", tokens) for size in sizes) + 1)
        order = order[:until]
        rows = list(zip(*(encoded[name] for name in ("input_ids", "offset_mapping")), strict=True))[:until]
        self.explain, self.detect = (
            half(model, site, [records[place] for place in order[start::2]], rows[start::2]) for start in (0, 1)
        )
        from scipy.sparse import csc_array  # here, because it takes long to import

        self.names = sorted({name for part in (self.explain, self.detect) for names in part.labels for name in names})
        number = {name: place for place, name in enumerate(self.names)}
        self._labels = [
            csc_array(
                (
                    np.ones(sum(map(len, part.labels)), dtype=np.float32),
                    np.array([number[name] for names in part.labels for name in names], dtype=np.int32),
                    np.cumsum([0, *map(len, part.labels)]),
                ),
                shape=(len(number), len(part.x)),
            ).T.tocsc()
            for part in (self.explain, self.detect)
        ]

    def __call__(self, sae: SAE) -> dict[str, float]:
        """Means over latents; NaN where none qualifies.

        Returns:
            ``autointerp``, the score; ``autointerp_chance``, that of the answer "never"; ``autointerp_f1``, of the
            labels on tokens that they were not chosen on; ``autointerp_latents``, how many latents were judged;
            ``autointerp_matched``, the score by `matched_mean`, for SAEs whose latents fire more or less often.
        """
        return judged(self.explained(sae))

    def explained(self, sae: SAE) -> list[Explained]:
        """Each judged latent with its label; latents without enough middling tokens are left out."""
        generator = np.random.default_rng(self.seed)
        codes = [sparse_code(sae, part.x) for part in (self.explain, self.detect)]
        lives = sum(np.diff(code.indptr) for code in codes)
        living = np.flatnonzero(lives > LEAST)
        chosen = np.sort(generator.permutation(living)[: self.latents])
        if not len(chosen):
            return []
        codes = [code[:, chosen] for code in codes]
        limits = ACTIVE * np.max([code.max(axis=0).toarray().ravel() for code in codes], axis=0)
        best = f1_scores(above(codes[0], limits), self._labels[0]).argmax(1).tolist()
        found = []
        for place, latent in enumerate(tqdm(chosen.tolist(), desc="explaining latents", leave=False, delay=2)):
            tokens, values = column(codes[1], place)
            centres = pieces(tokens, values, len(self.detect.x), generator)
            if centres is None:
                continue
            begin = np.maximum(centres - AROUND, self.detect.first[centres])
            end = np.minimum(centres + AROUND, self.detect.last[centres])
            active, labelled = tokens[values > limits[place]], column(self._labels[1], best[place])[0]
            truth, said = occurs(active, begin, end), occurs(labelled, begin, end)
            found.append(
                Explained(
                    latent,
                    self.names[best[place]],
                    2 * len(np.intersect1d(active, labelled)) / (len(active) + len(labelled)),
                    float((truth == said).mean()),
                    float(1 - truth.mean()),
                    lives[latent] / sum(code.shape[0] for code in codes),
                )
            )
        return found


def judged(explained: Sequence[Explained]) -> dict[str, float]:
    """What `Autointerp` returns of the latents that it explained."""
    means = {
        key: float(np.mean([getattr(latent, name) for latent in explained])) if explained else float("nan")
        for key, name in {"autointerp": "score", "autointerp_chance": "never", "autointerp_f1": "f1"}.items()
    }
    score, frequency = (torch.tensor([getattr(one, name) for one in explained]) for name in ("score", "frequency"))
    return means | {"autointerp_latents": len(explained), "autointerp_matched": matched_mean(score, frequency)}


def half(model: LanguageModel, site: str, records: list[Record], rows: list[tuple]) -> Half:
    """Read texts; their tokens without BOS, as `read` keeps them, each with its labels."""
    parts, places = read(model, site, [record.text for record in records])
    by_text = [x[keep].float().cpu() for xs, keeps in parts for x, keep in zip(xs, keeps, strict=True)]
    by_text = [by_text[place] for place in places.tolist()]
    labels = []
    for record, (ids, offsets), x in zip(records, rows, by_text, strict=True):
        kept = [(token, ends) for token, ends in zip(ids, offsets, strict=True) if token != model.bos][: len(x)]
        of_text = [
            f"{name} {value}"
            for name in PROPERTIES
            if (value := getattr(record, name)) is not None and (name != "topic" or record.register == "story")
        ]
        for (begin, end), span in zip([ends for _, ends in kept], record.align(ends for _, ends in kept), strict=True):
            of_span = [] if span is None else [span.slot, f"{span.slot} {span.value}"]
            labels.append([f"token {record.text[begin:end].strip()!r}", *of_span, *of_text])
    sizes = np.array([len(x) for x in by_text])
    ends = np.cumsum(sizes)
    return Half(torch.cat(by_text), np.repeat(ends - sizes, sizes), np.repeat(ends - 1, sizes), labels)


@torch.no_grad()
def sparse_code(sae: SAE, x: Float[Tensor, "tokens d_in"]) -> csc_array:
    """The code of all tokens as a sparse matrix. Norms of decoder rows do not matter here: every limit is a share."""
    from scipy.sparse import csc_array

    mode, found = sae.training, []
    try:
        sae.eval()
        for start in tqdm(range(0, len(x), ROWS_AT_ONCE), desc="encoding", leave=False, delay=2):
            z = sae.encode(x[start : start + ROWS_AT_ONCE].to(sae.W_dec))
            tokens, latents = z.nonzero(as_tuple=True)
            found.append(torch.stack([(tokens + start).double(), latents.double(), z[tokens, latents].double()]).cpu())
    finally:
        sae.train(mode)
    tokens, latents, values = torch.cat(found, 1).numpy()
    return csc_array((values, (tokens.astype(np.int32), latents.astype(np.int32))), shape=(len(x), sae.d_sae))


def f1_scores(active: csc_array, labels: csc_array) -> Float[np.ndarray, "latents labels"]:
    """``2 hits / (active + labelled)``: every label as a predictor of where every latent lives, over tokens.

    Units: fraction. Blind to: magnitudes. Source: any textbook.

    Args:
        active: tokens x latents, zeros and ones.
        labels: tokens x labels, zeros and ones.

    >>> from scipy.sparse import csc_array
    >>> active, labels = csc_array([[1.0], [1.0], [0.0]]), csc_array([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    >>> f1_scores(active, labels).tolist()  # 2 * 2 / (2 + 3), and no hit
    [[0.8, 0.0]]
    """
    hits = (active.T @ labels).toarray()
    both = active.sum(0)[:, None] + labels.sum(0)[None, :]
    return 2 * hits / np.maximum(both, 1)


def pieces(
    tokens: Int[np.ndarray, " n"], values: Float[np.ndarray, " n"], most: int, generator: np.random.Generator
) -> Int[np.ndarray, " pieces"] | None:
    """Centres of the pieces that a latent is judged on, or None if it has too few strong or middling tokens.

    Args:
        tokens: where the latent lives.
        values: how strongly.
        most: number of all tokens.
        generator: of the draws.
    """
    strongest: list[int] = []
    for place in np.argsort(-values, kind="stable"):
        if all(abs(tokens[place] - tokens[other]) > AROUND for other in strongest):
            strongest.append(place)
        if len(strongest) == STRONGEST:
            break
    middling = np.flatnonzero(values < values[strongest].min()) if strongest else []
    if len(strongest) < TOP or len(middling) < MIDDLE:
        return None
    weights = values[middling].astype(np.float64) ** 2
    return np.concatenate(
        [
            tokens[generator.choice(strongest, TOP, replace=False)],
            tokens[generator.choice(middling, MIDDLE, replace=False, p=weights / weights.sum())],
            generator.integers(most, size=RANDOM),
        ]
    )


def occurs(
    tokens: Int[np.ndarray, " n"], begin: Int[np.ndarray, " pieces"], end: Int[np.ndarray, " pieces"]
) -> np.ndarray:
    """Whether any of the sorted tokens lies in each piece, both ends included."""
    return np.searchsorted(tokens, end, side="right") > np.searchsorted(tokens, begin)


def above(code: csc_array, limits: Float[np.ndarray, " latents"]) -> csc_array:
    """Ones where a latent exceeds its limit."""
    active = code.copy()
    active.data = (active.data > np.repeat(limits, np.diff(active.indptr))).astype(np.float32)
    return active


def column(matrix: csc_array, number: int) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Rows and values of one column, in order."""
    part = slice(matrix.indptr[number], matrix.indptr[number + 1])
    return matrix.indices[part], matrix.data[part]
