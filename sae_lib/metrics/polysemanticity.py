"""How many things a unit stands for. Chapters `superposition` and `polysemanticity`.

A *unit* is anything with one activation a token: a neuron, a latent, the projection on a direction. Where the features
are known, their weights say what a unit mixes (`feature_dimensionality`, `effective_features`). On a real model only
examples speak: the tokens on which a unit is most active (`top_examples`), and whether they are alike (`mixedness`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sae_lib.metrics.reconstruction import finite_matrices


def feature_dimensionality(W: Float[Tensor, "n_features d_hidden"]) -> Float[Tensor, " n_features"]:
    """``D_i = |W_i|^2 / sum_j (W_i/|W_i| . W_j)^2``: which share of a dimension each feature has to itself.

    Units: fraction of a dimension, in [0, 1]; 1 for a feature orthogonal to all others, 1/2 for one of two that are
    opposite, 2/3 in a triangle, 2/5 in a pentagon; 0 for a feature without weights. Blind to: how often features meet.
    Source: Elhage et al. 2022, arXiv 2209.10652, "Feature dimensionality".

    Args:
        W: directions of the features.

    >>> feature_dimensionality(torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))  # alone; an opposite pair
    tensor([1.0000, 0.5000, 0.5000])
    """
    (W,) = finite_matrices(W=W)
    interference = (F.normalize(W, dim=1) @ W.T).square().sum(1)
    squared = W.square().sum(1)
    return squared / interference.where(interference > 0, 1)


def feature_correlations(
    z: Float[Tensor, "tokens units"], truth: Float[Tensor, "tokens n_features"]
) -> Float[Tensor, "units n_features"]:
    """``corr(z_u, h_j)`` over tokens: how strongly each unit's activation follows each true feature.

    Units: -1 to 1; 0 for a unit or a feature that never changes. Blind to: whatever does not move them together in a
    straight line. Features that occur together correlate with the same units.

    Args:
        z: activations of the units.
        truth: coefficients of the features on the same tokens.

    Raises:
        ValueError: if the numbers of tokens differ.

    >>> feature_correlations(torch.tensor([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]]), torch.tensor([[6.0], [4.0], [2.0]]))
    tensor([[-1.],
            [ 0.]])
    """
    z, truth = finite_matrices(z=z, truth=truth)
    if len(z) != len(truth):
        raise ValueError(f"truth must have the {len(z)} tokens of z, got {len(truth)}")
    z, truth = (F.normalize(values - values.mean(0), dim=0) for values in (z.double(), truth.double()))
    return (z.T @ truth).float()


def effective_features(weights: Float[Tensor, "units n_features"]) -> Float[Tensor, " units"]:
    """``(sum_j w_j^2)^2 / sum_j w_j^4``: how many features a unit answers to, the participation ratio of its weights.

    Units: features, from 1 (one alone) to n_features (all alike); NaN for a unit without weights. Blind to: signs, and
    how often each feature occurs.

    Args:
        weights: of each feature on each unit, e.g. its `feature_correlations`.

    >>> effective_features(torch.tensor([[0.0, 3.0, 0.0], [1.0, 1.0, 0.0]]))
    tensor([1., 2.])
    """
    (weights,) = finite_matrices(weights=weights)
    squared = weights.square()
    return squared.sum(1).square() / squared.square().sum(1)


def top_examples(
    activations: Float[Tensor, "tokens units"],
    documents: Int[Tensor, " tokens"],
    threshold: float | int = 0.75,
    most: int = 100,
) -> Int[Tensor, "units most"]:
    """The tokens that show what a unit stands for: of each document its best one, if it comes near the unit's maximum.

    One token a document, so that one text which repeats itself does not decide. The rule of Foote 2024 (arXiv
    2411.08166), section 4.1: at least `threshold` times the largest activation, at most `most` examples; where more
    qualify, the paper keeps the first it meets, this function the most active ones.

    Args:
        activations: of all units on all tokens; a unit that is nowhere positive has no examples.
        documents: the number of each token's document; the tokens of a document stand together.
        threshold: share of the unit's largest activation, in [0, 1]; 0 takes the best documents however weak.
        most: examples a unit, at least 1.

    Returns:
        places of the tokens, most active first; -1 where a unit has fewer examples.

    Raises:
        ValueError: for a threshold or a number out of range, shapes that do not fit, or documents in pieces.

    >>> activations = torch.tensor([[4.0], [1.0], [2.0], [3.5]])
    >>> top_examples(activations, torch.tensor([0, 0, 1, 2]), threshold=0.75, most=3)  # 2 is below 0.75 * 4
    tensor([[ 0,  3, -1]])
    """
    (activations,) = finite_matrices(activations=activations)
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be a share of the maximum, in [0, 1], got {threshold}")
    if most < 1:
        raise ValueError(f"most must be at least 1, got {most}")
    if len(documents) != len(activations):
        raise ValueError(f"documents must number each of the {len(activations)} tokens, got {len(documents)} numbers")
    numbers, sizes = documents.unique_consecutive(return_counts=True)
    if len(numbers) != len(documents.unique()):
        raise ValueError("the tokens of a document must stand together, got one in several pieces; sort by document")
    values, places, start = [], [], 0
    for size in sizes.tolist():
        value, place = activations[start : start + size].max(0)
        values.append(value)
        places.append(place + start)
        start += size
    values, order = torch.stack(values, 1).sort(dim=1, descending=True, stable=True)
    values, order = values[:, :most], order[:, :most]
    shown = (values >= threshold * values[:, :1]) & (values > 0)
    found = torch.stack(places, 1).gather(1, order).masked_fill(~shown, -1)
    return F.pad(found, (0, most - found.shape[1]), value=-1)  # where documents are fewer than most


def mixedness(examples: Int[Tensor, "units most"], labels: Int[Tensor, " tokens"]) -> Float[Tensor, " units"]:
    """``1 - sum_c n_c (n_c - 1) / (n (n - 1))``: the probability that two examples of a unit are of different kinds.

    The two are drawn without replacement, which makes the number unbiased: units with few and with many examples can be
    compared (Simpson's index of diversity). ``1 / (1 - mixedness)`` is the number of equally frequent kinds that would
    give the same.

    Units: probability; 0: all examples carry one label; 1: no two carry the same. NaN for a unit with fewer than two
    examples. Blind to: meanings that the labels do not know (under labels of words, a unit for "before a comma" looks
    mixed); how unlike two kinds are (cow and goat count like cow and Tuesday); activations too weak to be examples.

    Args:
        examples: places of tokens, -1 for none, as `top_examples` gives them.
        labels: the kind of each token, numbered from 0.

    Raises:
        ValueError: if an example has no label, or a label is negative.

    >>> labels = torch.tensor([0, 0, 1, 2])
    >>> mixedness(torch.tensor([[0, 1, -1], [0, 1, 2], [3, -1, -1]]), labels)  # 1 pair alike; 1 of 3 pairs; no pair
    tensor([0.0000, 0.6667,    nan])
    """
    if len(labels) <= int(examples.max()) or int(labels.min()) < 0:
        raise ValueError(
            f"labels must number the kind of every token from 0, got {len(labels)} of them, the least "
            f"{int(labels.min())}, for examples up to token {int(examples.max())}"
        )
    kinds = torch.where(
        examples >= 0, labels[examples.clamp(min=0)], -1 - torch.arange(examples.shape[1], device=examples.device)
    )
    alike = (kinds[:, :, None] == kinds[:, None, :]).sum((1, 2)) - examples.shape[1]
    n = (examples >= 0).sum(1)
    return 1 - alike.float() / (n * (n - 1)).float()
