"""How well a dictionary finds the true directions, where they are known. Chapter `comparison`.

Functions on tensors: ``W_dec`` (d_sae, d_in), whose rows are the latents' directions; ``directions`` (n_features,
d_in), the true ones; ``z`` the code and ``truth`` the true coefficients of the same tokens. Rows need not have norm
1: only their cosines are used, and a row of zeros has cosine 0 with everything. Between two runs in place of truth,
`mcc` and `recovery_rate` measure consistency.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lib.metrics.reconstruction import finite_matrices


def cosines(W_dec: Float[Tensor, "d_sae d_in"], directions: Float[Tensor, "n d_in"]) -> Float[Tensor, "d_sae n"]:
    """The cosine of each latent's direction with each true one (64 bits).

    Raises:
        ValueError: if a matrix is empty, not floating or not finite, or the widths differ.
    """
    W_dec, directions = finite_matrices(W_dec=W_dec, directions=directions)
    if W_dec.shape[1] != directions.shape[1]:
        raise ValueError(f"directions must have the width of W_dec, d_in={W_dec.shape[1]}, got {directions.shape[1]}")
    W_dec, directions = (torch.nn.functional.normalize(rows.detach().double(), dim=1) for rows in (W_dec, directions))
    return W_dec @ directions.T


def mcc(W_dec: Float[Tensor, "d_sae d_in"], directions: Float[Tensor, "n d_in"]) -> float:
    """Mean ``|cos|`` over the best one-to-one pairing of latents with features: the mean correlation coefficient.

    Units: 0 to 1; 1 means that every feature is some latent's direction (or, with fewer latents than features, every
    latent's direction a feature: only ``min(d_sae, n)`` pairs count). Dead latents take part. Blind to: signs, the
    encoder, surplus latents. Random directions do not have 0: compare with an untrained SAE. Pairing: Hungarian
    algorithm. Source: SynthSAEBench.

    >>> mcc(torch.tensor([[0.0, 2.0], [-3.0, 4.0]]), torch.eye(2))  # pairs: second feature 1, first feature 3/5
    0.8
    """
    from scipy.optimize import linear_sum_assignment  # here, because it takes longer to import than all of this library

    similarity = cosines(W_dec, directions).abs().cpu()
    return similarity[linear_sum_assignment(similarity.numpy(), maximize=True)].mean().item()


def mmcs(W_dec: Float[Tensor, "d_sae d_in"], directions: Float[Tensor, "n d_in"]) -> float:
    """Mean over features of the largest cosine with any latent: mean max cosine similarity.

    Units: -1 to 1; 1 means that every feature is some latent's direction, sign included. Blind to: one latent serving
    several features; it rises with d_sae by chance alone. Source: Sharkey et al. 2022, by way of SynthSAEBench's
    code.

    >>> mmcs(torch.tensor([[3.0, 4.0]]), torch.eye(2))  # (3/5 + 4/5) / 2
    0.7
    """
    return cosines(W_dec, directions).amax(0).mean().item()


def recovery_rate(
    W_dec: Float[Tensor, "d_sae d_in"], directions: Float[Tensor, "n d_in"], threshold: float = 0.9
) -> float:
    """Share of the features that some latent has a cosine of at least `threshold` with: the feature recovery rate.

    Units: fraction; blind to what `mmcs` is blind to. Source: Chen et al. 2025 (GBA, arXiv 2506.14002), thresholds .8
    and .9.

    >>> recovery_rate(torch.tensor([[3.0, 4.0]]), torch.eye(2), threshold=0.75)
    0.5
    """
    if not -1 <= threshold <= 1:
        raise ValueError(f"threshold must be a cosine, in [-1, 1], got {threshold}")
    return (cosines(W_dec, directions).amax(0) >= threshold).double().mean().item()


def uniqueness(W_dec: Float[Tensor, "d_sae d_in"], directions: Float[Tensor, "n d_in"]) -> float:
    """Number of distinct features that are nearest (by ``|cos|``) to some latent, divided by d_sae.

    Units: fraction; 1 means that no two latents share their nearest feature; it cannot exceed ``n / d_sae``. Blind
    to: how near. Source: SynthSAEBench.

    >>> uniqueness(torch.tensor([[1.0, 0.1], [-2.0, 0.0], [0.0, 1.0]]), torch.eye(2))  # two features, three latents
    0.6666666666666666
    """
    return cosines(W_dec, directions).abs().argmax(1).unique().numel() / len(W_dec)


def latent_f1(
    W_dec: Float[Tensor, "d_sae d_in"],
    directions: Float[Tensor, "n d_in"],
    z: Float[Tensor, "tokens d_sae"],
    truth: Float[Tensor, "tokens n"],
) -> dict[str, float]:
    """Each latent as a detector of its nearest feature (by ``|cos|``): ``z_i != 0`` predicts ``truth_j != 0``.

    ``precision = TP / predicted``, ``recall = TP / true``, ``f1 = 2 TP / (predicted + true)``, each per latent with
    TP, predicted and true counted over tokens, 0 where undefined; then the mean over *all* latents, so that dead ones
    pull it down.

    Units: fractions; 1 is perfect. Blind to: features that are no latent's nearest; magnitudes. Source: SynthSAEBench.

    Returns:
        ``precision``, ``recall`` and ``f1``.

    Raises:
        ValueError: if shapes disagree, or a matrix is empty, not floating or not finite.

    >>> z = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    >>> truth = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 0.0], [1.0, 1.0]])
    >>> latent_f1(torch.eye(2), torch.eye(2), z, truth)  # latent 0: 1/2, 1/3 and 2/5; latent 1 is dead
    {'precision': 0.25, 'recall': 0.16666666666666666, 'f1': 0.2}
    """
    z, truth = finite_matrices(z=z, truth=truth)
    if len(z) != len(truth) or z.shape[1] != len(W_dec) or truth.shape[1] != len(directions):
        raise ValueError(
            f"z must be (tokens, d_sae={len(W_dec)}) and truth (tokens, n_features={len(directions)}), of the same "
            f"tokens, got {tuple(z.shape)} and {tuple(truth.shape)}"
        )
    nearest = cosines(W_dec, directions).abs().argmax(1)
    predicted, true = z != 0, (truth != 0)[:, nearest]
    hits, n_predicted, n_true = (pairs.double().sum(0) for pairs in (predicted & true, predicted, true))
    shares = {
        "precision": hits / n_predicted.clamp(min=1),
        "recall": hits / n_true.clamp(min=1),
        "f1": 2 * hits / (n_predicted + n_true).clamp(min=1),
    }
    return {name: share.mean().item() for name, share in shares.items()}


def orbit_cosines(
    W_dec: Float[Tensor, "d_sae d_in"], orbits: Float[Tensor, "n_features group d_in"]
) -> Float[Tensor, "d_sae n_features"]:
    """``max_p cos(w_i, v_jp)``: each latent against the nearest transformed copy of each feature (64 bits).

    Where data have a symmetry, such as rotation by 90°, a feature is an *orbit*: the directions ``v_j0 ... v_jp`` of
    its transformed copies. A latent has found the feature if it has found any of them.

    Args:
        W_dec: directions of the latents.
        orbits: of each feature, its directions under every element of the group; with a group of one, plain features.

    Raises:
        ValueError: if a tensor is empty, not floating or not finite, or the widths differ.

    >>> orbits = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])  # one feature, and itself turned by 90°
    >>> orbit_cosines(torch.tensor([[0.0, 2.0, 0.0], [3.0, 4.0, 0.0], [-1.0, 0.0, 0.0]]), orbits).tolist()
    [[1.0], [0.8], [0.0]]
    """
    if orbits.ndim != 3:
        raise ValueError(f"orbits must have shape (n_features, group, d_in), got {tuple(orbits.shape)}")
    return cosines(W_dec, orbits.flatten(0, 1)).unflatten(1, orbits.shape[:2]).amax(2)


def orbit_mcc(W_dec: Float[Tensor, "d_sae d_in"], orbits: Float[Tensor, "n_features group d_in"]) -> float:
    """`mcc` up to symmetry: mean ``max_p |cos(w_i, v_jp)|`` over the best one-to-one pairing of latents with features.

    One latent may stand for a feature by any of its transformed copies; a second latent on another copy of it is
    surplus, which counts neither for nor against. So an SAE with one latent an orbit and one with a latent for each
    copy both have 1 if they are exact, while `mcc` against all copies asks for the latter.

    Units: 0 to 1. Blind to: signs, the encoder, surplus latents, and which copy was found: whether the SAE can tell
    poses apart, or fires on one pose alone. Chance is higher than for `mcc`, since the best of ``group`` directions
    counts: compare with an untrained SAE. Source: none; made for equivariant SAEs (Erdogan and Lucic 2025, arXiv
    2511.09432), whose own definition of recovery is not known here.

    >>> orbits = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], [[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]])
    >>> orbit_mcc(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), orbits)  # two copies of one feature: (1 + 0) / 2
    0.5
    >>> orbit_mcc(torch.tensor([[0.0, 1.0, 0.0], [0.0, 3.0, 4.0]]), orbits)  # (1 + 4/5) / 2
    0.9
    """
    from scipy.optimize import linear_sum_assignment

    both = torch.stack([orbit_cosines(W_dec, orbits), orbit_cosines(-W_dec, orbits)]).amax(0).cpu()
    return both[linear_sum_assignment(both.numpy(), maximize=True)].mean().item()


def orbit_mmcs(W_dec: Float[Tensor, "d_sae d_in"], orbits: Float[Tensor, "n_features group d_in"]) -> float:
    """`mmcs` up to symmetry: mean over features of the largest cosine of any latent with any transformed copy.

    Units: -1 to 1; sign included. Blind to: what `mmcs` and `orbit_mcc` are blind to.

    >>> orbits = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, -1.0]]])
    >>> orbit_mmcs(torch.tensor([[3.0, 4.0]]), orbits)  # (4/5 + 3/5) / 2
    0.7
    """
    return orbit_cosines(W_dec, orbits).amax(0).mean().item()
