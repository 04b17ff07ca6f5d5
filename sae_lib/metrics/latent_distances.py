"""How far apart the examples of an SAE's latents lie, and whether that says how well labels explain them.

Chapter `neuron_embeddings`. Foote 2024 (arXiv 2411.08166) proposes the distances of `sae_lib.neuron_embeddings.proxies`
as a score of SAEs, and leaves language models to future work. A low distance may mean a pure latent. It may also mean
one that fires rarely, or on one token; or a row with few weights, under which all inputs look alike. So beside it stand

    the distance of random inputs under the same weights      what the weights alone do
    the participation ratio of the weights                    how many of them there are
    means over latents that fire equally often                `matched_mean`
    rank correlation with `Autointerp`'s score, latent by latent, given frequency and variety of tokens

*Blind to*: meanings that lie in directions which the encoder row does not read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.stats import rankdata
from tqdm.auto import tqdm

from sae_lib.metrics.autointerp import Autointerp, Explained, judged
from sae_lib.metrics.feature_clusters import drawn, finite, nan_if_none
from sae_lib.metrics.matched import matched_mean
from sae_lib.metrics.polysemanticity import effective_features
from sae_lib.models import LanguageModel
from sae_lib.neuron_embeddings import collect, cosine_distances, cut, embeddings, latents, proxies, tree
from sae_lib.records import Record
from sae_lib.sae import SAE

PROXIES = ("max_distance", "mean_distance", "intra_distance", "inter_distance", "size", "clusters")
RANDOM = 100
"""Random inputs, as many as a latent has examples at most."""
LEAST = 10
"""Latents that a correlation over latents needs."""


class LatentDistances:
    """Distances of examples, over the latents that have two, and how they go with automatic interpretation.

    Building it reads the model; a call collects examples. Chapter `neuron_embeddings`.

    Args:
        model: the model that is read.
        site: where.
        texts: records, such as ``load_texts("pocket", split="test")``.
        seed: which texts, which random inputs, and that of `Autointerp`.
        tokens: about how many to read, for examples and for `Autointerp` each.
        latents: how many latents `Autointerp` explains.
    """

    def __init__(
        self,
        model: LanguageModel,
        site: str,
        texts: Sequence[Record],
        seed: int = 0,
        tokens: int = 40_000,
        latents: int = 500,
    ):
        self.model, self.site, self.records = model, site, drawn(model, texts, tokens, seed)
        self.autointerp = Autointerp(model, site, texts, seed, tokens, latents)
        x = torch.cat([self.autointerp.explain.x, self.autointerp.detect.x])
        self.random = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:RANDOM]]

    def __call__(self, sae: SAE) -> dict[str, float]:
        """Medians over latents, unless said otherwise; NaN where there are none.

        Returns:
            the `proxies` of the clusters at 0.5, and ``clusters_near`` at the 0.05 of the paper's files;
            ``distance_ratio``, the mean distance over that of random inputs under the same weights;
            ``row_dimensions``, the participation ratio of the squared weights; ``mean_distance_matched``, by
            `matched_mean`; all of `Autointerp`; ``distance_autointerp``, Spearman's correlation over latents of mean
            distance and score, and ``distance_autointerp_partial``, given frequency and `token_entropy`;
            ``latents_measured``, how many latents have two examples; ``l0``, the mean number of living latents.
        """
        examples = collect(latents(self.model, self.site, sae), self.records)
        weights, random = sae.W_enc.detach().T.float().cpu(), self.random.float()
        found: dict[int, dict[str, float]] = {}
        for latent in tqdm(range(sae.d_sae), desc="clusters of latents", unit="latent", leave=False, delay=2):
            documents, positions, _, h = examples.of(latent)
            if len(documents) < 2:
                continue
            distances = cosine_distances(embeddings(h, weights[latent]))
            merges = tree(distances)
            ids = [examples.tokens[d][p] for d, p in zip(documents.tolist(), positions.tolist(), strict=True)]
            one = proxies(distances, cut(merges)) | {
                "clusters_near": 1 + int(cut(merges, 0.05).max()),
                "frequency": examples.frequency[latent].item(),
                "token_entropy": token_entropy(np.array(ids)),
            }
            others = cosine_distances(embeddings(random, weights[latent]))
            at_random = proxies(others, np.zeros(len(others), dtype=int))["mean_distance"]
            ratio = one["mean_distance"] / at_random if at_random > 1e-12 else math.nan
            found[latent] = one | {"distance_ratio": ratio}
        metrics = {
            name: nan_if_none(np.median, finite([one[name] for one in found.values()]))
            for name in (*PROXIES, "clusters_near", "distance_ratio")
        }
        explained = self.autointerp.explained(sae)
        of_rows = effective_features(weights[sorted(found)]).tolist() if found else []
        frequency, mean = (
            torch.tensor([one[name] for one in found.values()]) for name in ("frequency", "mean_distance")
        )
        return (
            metrics
            | {"row_dimensions": nan_if_none(np.median, finite(of_rows)), "latents_measured": len(found)}
            | {"l0": examples.frequency.sum().item()}
            | {"mean_distance_matched": matched_mean(mean, frequency)}
            | judged(explained)
            | self.with_scores(explained, found)
        )

    def with_scores(self, explained: Sequence[Explained], found: dict[int, dict[str, float]]) -> dict[str, float]:
        """How distances and scores go together, over the latents that have both."""
        both = [(one.score, found[one.latent]) for one in explained if one.latent in found]
        score = np.array([score for score, _ in both])
        distance, frequency, entropy = (
            np.array([one[name] for _, one in both]) for name in ("mean_distance", "frequency", "token_entropy")
        )
        return {
            "distance_autointerp": partial_rank_correlation(distance, score),
            "distance_autointerp_partial": partial_rank_correlation(distance, score, frequency, entropy),
        }


def token_entropy(ids: Int[np.ndarray, " K"]) -> float:
    """``-sum_t p_t log p_t`` over the tokens of a latent's examples.

    Units: nats, from 0, all the same, to the logarithm of the number of examples. Blind to: how alike two tokens are.

    >>> round(token_entropy(np.array([7, 7, 8, 8])), 4)
    0.6931
    """
    p = np.unique(ids, return_counts=True)[1] / len(ids)
    return float(-(p * np.log(p)).sum())


def partial_rank_correlation(
    a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"], *given: Float[np.ndarray, " n"]
) -> float:
    """Spearman's correlation of a and b, what ranks of the given ones predict of their ranks taken away.

    Units: -1 to 1; NaN for fewer than `LEAST` values, or where nothing is left of a or b. Blind to: what the given ones
    predict in another way than linearly in ranks. Source: any textbook.

    >>> a = np.arange(20.0)
    >>> partial_rank_correlation(a, -(a**3))
    -1.0
    """
    if len(a) < LEAST:
        return math.nan
    ranks = [rankdata(values) for values in (a, b, *given)]
    known = np.stack([np.ones(len(a)), *ranks[2:]], 1)
    left = [rank - known @ np.linalg.lstsq(known, rank, rcond=None)[0] for rank in ranks[:2]]
    if min(np.ptp(part) for part in left) < 1e-6:
        return math.nan
    return round(float(np.corrcoef(*left)[0, 1]), 12)
