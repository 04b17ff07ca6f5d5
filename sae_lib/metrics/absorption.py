"""Absorption: a latent for a general property falls silent where a more special latent fires. Chapter `evaluation`.

"Begins with s" has a latent; yet on *snake* it is silent, and the latent of snakes carries the letter too: its
direction has a part along "begins with s". The code is sparser by one, and the first latent no longer means what it
says (Chanin et al. 2024, arXiv 2409.14507). Functions on tensors, for one property at a time:

    u    unit direction of the property (a probe's weights; of a planted feature, its dual direction)
    A    x . u                              how much of the property a word has
    c_i  cos(u, W_dec,i)                    how much of it latent i would write
    P_i  z_i (W_dec,i . u)                  how much of it latent i does write; with unit rows, z_i c_i
    S    the *main* latents, those that detect the property

Words are those that have the property and on which the probe says so; a rate is the mean over them. The numbers of
steps in the docstrings are those of the first-letter task (`sae_lib.metrics.first_letter`). All definitions were read
as code, in SAEBench (Karvonen et al. 2025, arXiv 2503.09532), its predecessor and sae-spelling.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lib.metrics.polysemanticity import feature_correlations
from sae_lib.metrics.reconstruction import finite_matrices

SILENT = 1e-8
"""A main latent below this activation is silent."""


# Whether a word is absorbed ------------------------------------------------------------------------------------------


def absorption_fraction(
    x: Float[Tensor, "words d_in"],
    z: Float[Tensor, "words d_sae"],
    W_dec: Float[Tensor, "d_sae d_in"],
    probe: Float[Tensor, " d_in"],
    main: Int[Tensor, " m"],
    cosine: float = 0.1,
    share: float = 0.4,
    most: int = 3,
) -> Float[Tensor, " words"]:
    """How much of the property other latents write in the main latents' stead; a number a word (step 5).

    With ``M = sum_S P_i`` and ``P_abs`` the sum of the `most` largest positive P_i outside S with ``c_i >= cosine``:

        0              if M >= A (nothing is missing) or P_abs / A < share (nobody steps in) or A <= 0
        1              else if M <= 0
        q / (q + M)    else, with q = min(P_abs, A - M)

    Units: fraction; 0 no absorption, 1 the main latents write nothing and others do. Blind to: whether the other
    latent is *special* (two latents that share the property evenly look absorbed, and so does a weak main latent
    beside a dense one that leans on the probe); words that the probe misses. What b_dec writes counts as missing.
    Source: SAEBench, absorption; there A = 0 divides by zero.

    Args:
        x: activations of words with the property.
        z: their code.
        W_dec: directions of the latents; norms are folded into the code.
        probe: direction of the property, of any length.
        main: the latents S, at least one.
        cosine: least cosine of a latent that may stand in.
        share: least part of A that those must write together.
        most: how many may.

    Raises:
        ValueError: if shapes disagree, something is not finite, the probe is zero, or a main latent does not exist.

    >>> x, W_dec = torch.tensor([[4.0, 0.0], [4.0, 3.0], [4.0, 3.0]]), torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    >>> z = torch.tensor([[4.0, 0.0], [0.0, 5.0], [1.0, 5.0]])  # M = 4, 0, 1; P_abs = 0, 4, 4; the last: 3 / (3 + 1)
    >>> absorption_fraction(x, z, W_dec, torch.tensor([2.0, 0.0]), torch.tensor([0]))
    tensor([0.0000, 1.0000, 0.7500])
    """
    A, P, c = _projections(x, z, W_dec, probe, main)
    M = P[:, main].sum(1)
    others = (c >= cosine).index_fill(0, main, False)
    P_abs = (P.clamp(min=0) * others).topk(min(most, len(c)), 1).values.sum(1)
    q = torch.minimum(P_abs, A - M)
    fraction = torch.where(M <= 0, 1.0, q / (q + M)).clamp(0, 1)
    none = (A <= 0) | (M >= A) | (P_abs / A < share)
    return fraction.masked_fill(none, 0).float()


def full_absorption(
    x: Float[Tensor, "words d_in"],
    z: Float[Tensor, "words d_sae"],
    W_dec: Float[Tensor, "d_sae d_in"],
    probe: Float[Tensor, " d_in"],
    main: Int[Tensor, " m"],
    cosine: float = 0.025,
    share: float = 0.4,
) -> Bool[Tensor, " words"]:
    """Whether one latent writes the property while all main latents are silent (step 6).

    True where every z_i in S is below 1e-8, the latent of the largest P_i has ``c_i >= cosine``, and writes
    ``P_i >= share * A`` of A > 0.

    Units: truth; its mean over words is a rate in [0, 1]. Blind to: partial silence; several latents that stand in
    together; why the main latents are silent: a weak detector that misses words which another latent knows looks the
    same. Arguments and errors as in `absorption_fraction`. Source: SAEBench, absorption.

    >>> x, W_dec = torch.tensor([[4.0, 0.0], [4.0, 3.0], [4.0, 3.0]]), torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    >>> z = torch.tensor([[4.0, 0.0], [0.0, 5.0], [0.0, 1.9]])  # P_1 = 0, 4, 1.52 of A = 4; the last writes 38%
    >>> full_absorption(x, z, W_dec, torch.tensor([2.0, 0.0]), torch.tensor([0]))
    tensor([False,  True, False])
    """
    A, P, c = _projections(x, z, W_dec, probe, main)
    largest = P.max(1)
    written = (c[largest.indices] >= cosine) & (A > 0) & (largest.values / A >= share)
    return _silent(z, main) & written


def absorption_older(
    x: Float[Tensor, "words d_in"],
    z: Float[Tensor, "words d_sae"],
    W_dec: Float[Tensor, "d_sae d_in"],
    probe: Float[Tensor, " d_in"],
    main: Int[Tensor, " m"],
    scores: Float[Tensor, " words"],
    cosine: float = 0.025,
    share: float = 0.4,
) -> Bool[Tensor, " words"]:
    """`full_absorption`, asked only of words that the k-sparse probe on the main latents misses (``scores <= 0``).

    The full rate of SAEBench before it had a fraction, with which the ATM paper's scores were made; the two must not be
    mixed. How it is known: the candidates' rule was read in the code of SAEBench's predecessor, the thresholds also in
    result files of the ATM authors' own baselines (February 2025). That these ran the rule is inferred: they have the
    old rate's fields and no fraction. Words whose main latents are silent nearly always score below 0, so the two
    rates are nearly equal; this one is never the larger.

    Args:
        scores: of the words, by the `k_sparse_probe` on the main latents. The others are those of `full_absorption`.

    >>> x, W_dec = torch.tensor([[4.0, 3.0], [4.0, 3.0]]), torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    >>> z, scores = torch.tensor([[0.0, 5.0], [0.0, 5.0]]), torch.tensor([-1.0, 0.5])
    >>> absorption_older(x, z, W_dec, torch.tensor([2.0, 0.0]), torch.tensor([0]), scores)
    tensor([ True, False])
    """
    if scores.shape != (len(x),) or not scores.isfinite().all():
        raise ValueError(f"scores must be a finite number for each of the {len(x)} words, got {tuple(scores.shape)}")
    return full_absorption(x, z, W_dec, probe, main, cosine, share) & (scores <= 0)


def absorption_by_ablation(
    effects: Float[Tensor, "words d_sae"],
    z: Float[Tensor, "words d_sae"],
    W_dec: Float[Tensor, "d_sae d_in"],
    probe: Float[Tensor, " d_in"],
    main: Int[Tensor, " m"],
    cosine: float = 0.025,
    margin: float = 1.0,
) -> Bool[Tensor, " words"]:
    """The original definition: silent main latents, and one other latent on which the model's answer depends.

    True where every z_i in S is below 1e-8, and the latent t of the largest ``|effect|`` raises the answer, by at least
    `margin` more than the second largest ``|effect|``, and ``cos(probe, W_dec,t) >= cosine``.

    Units: truth; its mean over words is a rate. Blind to: all that `full_absorption` is, but asks the model, not the
    probe, who carries the property; two latents that stand in together are never absorption. Source: Chanin et al.
    2024, sae-spelling, where effects have the opposite sign.

    Args:
        effects: what each latent adds to the answer's logit less the mean of the other answers', by
            `integrated_gradients`.
        z: code of the same words. The others are those of `absorption_fraction`.

    >>> W_dec, z = torch.tensor([[1.0, 0.0], [0.8, 0.6]]), torch.tensor([[0.0, 5.0], [0.0, 5.0], [1.0, 5.0]])
    >>> effects = torch.tensor([[0.0, 2.0], [0.0, 0.9], [0.0, 2.0]])  # the second: by less than 1
    >>> absorption_by_ablation(effects, z, W_dec, torch.tensor([1.0, 0.0]), torch.tensor([0]))
    tensor([ True, False, False])
    """
    z, effects = finite_matrices(z=z, effects=effects)
    if effects.shape != z.shape or z.shape[1] < 2:
        raise ValueError(
            f"effects must have the shape of z, and at least 2 latents, got {tuple(effects.shape)} and {tuple(z.shape)}"
        )
    c = _unit_cosines(W_dec, probe)
    top = effects.abs().topk(2, 1)
    first = top.indices[:, 0]
    raises = effects.gather(1, first[:, None])[:, 0] >= 0
    return _silent(z, main) & raises & (top.values[:, 0] - top.values[:, 1] >= margin) & (c[first] >= cosine)


# Where the truth is known --------------------------------------------------------------------------------------------


def planted_absorption(
    x: Float[Tensor, "samples d_in"],
    z: Float[Tensor, "samples d_sae"],
    W_dec: Float[Tensor, "d_sae d_in"],
    directions: Float[Tensor, "n_features d_in"],
    truth: Float[Tensor, "samples n_features"],
    parents: Int[Tensor, " n_features"],
) -> dict[str, float | int]:
    """Absorption of parents by their children in a planted hierarchy, without a probe: mean over parents.

    For each feature that has children: the words are the samples in which it truly fires; u is its dual direction (of
    the pseudo-inverse of `directions`), along which no other feature writes as long as ``n_features <= d_in``; the main
    latent is the one whose firing correlates most with the parent's. One latent only: the features that split a
    parent are its children, so that to call their latents main would define absorption away.

    Units: rates in [0, 1]; 0 for a dictionary with a latent for each feature. Blind to: parents without any latent that
    follows them, which are left out, hence their number is returned; and, with ``n_features > d_in``, whatever
    crosstalk the dual directions leave. Exact means: labels and directions are; the thresholds are those of
    `absorption_fraction` and `full_absorption`.

    Args:
        x: samples of a `PlantedDictionary`.
        z: their code.
        W_dec: directions of the latents.
        directions: of the features.
        truth: coefficients of the features in each sample.
        parents: index of each feature's parent, -1 for roots.

    Returns:
        ``absorption_fraction``, ``absorption_full``, and ``parents``, over how many features they are means.

    Raises:
        ValueError: if no feature has a parent, none has a latent, or shapes disagree.

    >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])  # parent, parent, both, none
    >>> z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])  # the child's latent writes both
    >>> planted_absorption(x, z, torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.eye(2), x.clone(), torch.tensor([-1, 0]))
    {'absorption_fraction': 0.3333333432674408, 'absorption_full': 0.3333333432674408, 'parents': 1}
    """
    x, z, truth, directions = finite_matrices(x=x, z=z, truth=truth, directions=directions)
    if truth.shape != (len(x), len(directions)) or parents.shape != (len(directions),):
        raise ValueError(
            f"truth must be (samples={len(x)}, n_features={len(directions)}) and parents (n_features,), "
            f"got {tuple(truth.shape)} and {tuple(parents.shape)}"
        )
    having_children = parents[parents >= 0].unique()
    if not len(having_children):
        raise ValueError("parents must name at least one parent, got none: plant a dictionary with hierarchy=")
    duals = torch.linalg.pinv(directions.double()).T
    follows = feature_correlations((z != 0).float(), (truth != 0).float())[:, having_children].max(0)
    rates = []
    for parent, main, correlation in zip(having_children, follows.indices, follows.values, strict=True):
        if correlation > 0:
            fires = truth[:, parent] != 0
            given = (x[fires], z[fires], W_dec, duals[parent], main[None])
            rates.append([absorption_fraction(*given).mean(), full_absorption(*given).float().mean()])
    if not rates:
        raise ValueError(f"a latent must follow at least one of the {len(having_children)} parents, got none")
    fraction, full = torch.tensor(rates).mean(0).tolist()
    return {"absorption_fraction": fraction, "absorption_full": full, "parents": len(rates)}


# Shared --------------------------------------------------------------------------------------------------------------


def _projections(x: Tensor, z: Tensor, W_dec: Tensor, probe: Tensor, main: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A, P and c of the module's docstring, in 64 bits."""
    x, z, W_dec = finite_matrices(x=x, z=z, W_dec=W_dec)
    if len(z) != len(x) or (z.shape[1], x.shape[1]) != tuple(W_dec.shape):
        raise ValueError(
            f"x must be (words, d_in={W_dec.shape[1]}) and z (words, d_sae={len(W_dec)}), of the same words, "
            f"got {tuple(x.shape)} and {tuple(z.shape)}"
        )
    c = _unit_cosines(W_dec, probe)
    x, z, W_dec, u = (value.detach().double() for value in (x, z, W_dec, probe))
    u = u / u.norm()
    _silent(z, main)
    return x @ u, z * (W_dec @ u), c


def _unit_cosines(W_dec: Tensor, probe: Tensor) -> Float[Tensor, " d_sae"]:
    if probe.shape != W_dec.shape[1:] or not probe.isfinite().all() or not probe.any():
        raise ValueError(
            f"probe must be a finite direction of width d_in={W_dec.shape[1]} and not zero, got shape "
            f"{tuple(probe.shape)} and norm {probe.norm().item()}"
        )
    return F.normalize(W_dec.detach().double(), dim=1) @ F.normalize(probe.detach().double(), dim=0)


def _silent(z: Tensor, main: Tensor) -> Bool[Tensor, " words"]:
    """Whether all main latents are silent, if they exist."""
    if main.ndim != 1 or not len(main) or main.min() < 0 or main.max() >= z.shape[1]:
        raise ValueError(f"main must be one or more latents in [0, d_sae={z.shape[1]}), got {main.tolist()}")
    return (z[:, main].abs() < SILENT).all(1)
