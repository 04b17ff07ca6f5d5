"""Codes of inputs in several poses: whether they stay, what can be read off them, and what a matrix explains. Chapter
`equivariant`.

Functions on tensors with an axis for the pose: ``orbits`` (n, group, d_in), activations of n inputs under every element
of a `Group`, in its order; ``z`` (n, group, d_sae), their codes. Of the paper (Erdogan and Lucic 2025, arXiv
2511.09432) no definition of a measure was available: that a matrix has a high R2 and that probes have an F1 stands in
its abstract, and the formulae are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lib.data import seeded
from sae_lib.groups import Group, explained
from sae_lib.metrics.probing import linear_probe

TRAIN_SHARE = 0.8
"""Of the inputs, for a probe; it is tested on the others."""


# One matrix -----------------------------------------------------------------------------------------------------------


def map_r2(
    orbits: Float[Tensor, "n group d_in"], matrices: Float[Tensor, "generators d_in d_in"], group: Group
) -> dict[str, float]:
    """``1 - sum |a(r^p x) - M^p a(x)|^2 / sum |a - mean(a)|^2`` for p turns, over all orbits and poses x.

    Units: fraction; 1 is perfect, 0 is as good as the mean of all activations, negative is worse. Blind to: what moves
    nothing, since a model whose activations ignore the pose has 1 with the identity. On the activations that M was
    fitted to, it says little. 64 bits.

    Returns:
        ``map_r2`` for one turn, ``map_r2_2`` for two by the square, and so on; ``map_r2_mirror`` where the group has
        reflections.

    >>> quarter = torch.tensor([[[0.0, -1.0], [1.0, 0.0]]])
    >>> orbit = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]])
    >>> map_r2(orbit, quarter, Group(4))
    {'map_r2': 1.0, 'map_r2_2': 1.0, 'map_r2_3': 1.0}
    >>> map_r2(orbit, torch.eye(2)[None], Group(4))  # every pose is off by the root of 2, or by 2
    {'map_r2': -1.0, 'map_r2_2': -3.0, 'map_r2_3': -1.0}
    """
    a = group.checked(orbits).double()
    names = {p: "map_r2" if p == 1 else f"map_r2_{p}" for p in range(1, group.order)}
    names |= {group.order: "map_r2_mirror"} if group.reflections else {}
    elements = group.representation(matrices.double())
    spread = (a - a.mean((0, 1))).square().sum()
    found = {}
    for g, name in names.items():
        aim = a[:, [group.product(g, i) for i in range(group.size)]]
        found[name] = 1 - ((aim - a @ elements[g].T).square().sum() / spread).item()
    return found


def order_error(matrix: Float[Tensor, "d_in d_in"], order: int) -> float:
    """``|M^n - 1| / sqrt(d_in)``, the norm over all entries: how far n turns are from none.

    Units: 0 is a turn that closes; a matrix of zeros has 1. Blind to: directions in which nothing varies count as much
    as others.

    >>> order_error(torch.tensor([[0.0, -1.0], [1.0, 0.0]]), 4)
    0.0
    >>> order_error(2 * torch.eye(4), 2)  # |4 - 1|, on every diagonal entry
    3.0
    """
    back = torch.linalg.matrix_power(matrix.double(), order) - torch.eye(len(matrix), dtype=torch.float64)
    return (back.norm() / len(matrix) ** 0.5).item()


def equivariance_error(
    outputs: Float[Tensor, "n group d_in"], matrices: Float[Tensor, "generators d_in d_in"], group: Group
) -> float:
    """``1 - R2`` of the matrices on outputs, such as reconstructions, of inputs in all poses; mean over generators.

    Units: fraction; 0 means that turning before and after are the same. Blind to: whether the outputs are right; a
    constant that no matrix moves is equivariant. NaN for outputs that do not vary.

    >>> half = torch.tensor([[[-1.0]]])
    >>> equivariance_error(torch.tensor([[[1.0], [-1.0]]]), half, Group(2))
    0.0
    >>> equivariance_error(torch.tensor([[[1.0], [0.0]]]), half, Group(2))  # errors 1 and 1, spread 1/4 and 1/4
    4.0
    """
    outputs = group.checked(outputs).double()
    if not (outputs != outputs[:1, :1]).any():
        return float("nan")
    return 1 - explained(group.moments(outputs), matrices.double()).item()


@dataclass(frozen=True)
class OneMatrix:
    """What stands in place of an SAE where a matrix alone is measured: how it is fitted. Chapter `equivariant`.

    Args:
        pairs: ``own``, an input's activations in its poses; or the control ``shuffled``: every pose is that of another
            input.
        network: ``trained``, or the control ``untrained``, with the weights that training starts from.

    Raises:
        ValueError: if an argument is none of these.
    """

    pairs: str = "own"
    network: str = "trained"

    def __post_init__(self) -> None:
        for name, known in {"pairs": ("own", "shuffled"), "network": ("trained", "untrained")}.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")

    def __call__(
        self,
        train: Float[Tensor, "n group d_in"],
        held: Float[Tensor, "m group d_in"],
        group: Group,
        seed: int = 0,
    ) -> dict[str, float]:
        """`map_r2` and `order_error` of the least-squares matrices of `train` on `held`; the seed shuffles."""
        if self.pairs == "shuffled":
            train, held = (shuffled(orbits, seed) for orbits in (train, held))
        matrices = group.fit(train)
        return map_r2(held, matrices, group) | {"order_error": order_error(matrices[0], group.order)}


def shuffled(orbits: Float[Tensor, "n group d_in"], seed: int) -> Float[Tensor, "n group d_in"]:
    """The same activations in the same poses, those of one row from as many inputs as there are poses."""
    generator = seeded("shuffled poses", seed)
    return torch.stack([pose[torch.randperm(len(pose), generator=generator)] for pose in orbits.unbind(1)], 1)


# Codes in several poses -----------------------------------------------------------------------------------------------


def code_invariance(z: Float[Tensor, "n group d_sae"]) -> dict[str, float]:
    """How much of the code stays when the input is transformed: mean over inputs and pairs of poses.

    ``code_cosine = cos(z_p, z_q)``, and ``code_jaccard``, the latents that live in both poses over those that live in
    either. A pair of which one code is empty has 0; a pair of empty ones does not count.

    Units: 0 to 1; 1 is the same code, or the same latents. Blind to: what the code says; a constant code has 1. NaN if
    all codes are empty.

    >>> z = torch.tensor([[[3.0, 4.0, 0.0], [3.0, 0.0, 0.0]], [[0.0, 0.0, 1.0], [0.0, 0.0, 2.0]]])
    >>> code_invariance(z)  # cosines 3/5 and 1; one of two latents in common, and one of one
    {'code_cosine': 0.8, 'code_jaccard': 0.75}
    """
    norms = z.double().norm(dim=2)
    cosines, overlaps, weight = 0.0, 0.0, 0
    for p, q in combinations(range(z.shape[1]), 2):
        both, one = (z[:, p] != 0) & (z[:, q] != 0), (z[:, p] != 0) | (z[:, q] != 0)
        counts = one.any(1)
        products = (z[:, p].double() * z[:, q].double()).sum(1)
        cosines += (products / (norms[:, p] * norms[:, q]).where(products != 0, 1))[counts].sum().item()
        overlaps += (both.sum(1)[counts] / one.sum(1)[counts].double()).sum().item()
        weight += int(counts.sum())
    means = (cosines / weight, overlaps / weight) if weight else (float("nan"), float("nan"))
    return dict(zip(("code_cosine", "code_jaccard"), means, strict=True))


def pose_accuracy(poses: Int[Tensor, "n group"], group: Group) -> float:
    """Share of the transformed inputs whose inferred pose follows from that of the input as it is stored: that of
    ``g_i x`` is ``g_i`` times that of ``x``.

    Units: fraction; chance is one over the group's size, and a constant pose has 0. Blind to: which pose is called
    canonical, since nothing says. Inputs with a symmetry of their own, such as a disc, are in several poses at once.

    >>> pose_accuracy(torch.tensor([[3, 0, 1, 2], [1, 2, 2, 2]]), Group(4))  # all three, and one of three
    0.6666666666666666
    """
    table = torch.tensor([[group.product(i, q) for i in range(group.size)] for q in range(group.size)])
    return (poses == table.to(poses.device)[poses[:, 0]])[:, 1:].double().mean().item()


def top1_f1(z: Float[Tensor, "n group d_sae"], truth: Float[Tensor, "n n_features"]) -> float:
    """Of each feature the F1 of the latent that detects it best in all poses; mean over the features that fire.

    Latent i predicts feature j where it lives: ``F1 = 2 TP / (predicted + true)``, counted over inputs and poses.

    Units: 0 to 1. A latent that lives in one pose of four has at most 0.4. Blind to: one latent serving several
    features; the best latent is chosen on the rows that it is tested on, which helps wide codes a little.

    >>> z = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[0.0, 0.0], [0.0, 0.0]]])
    >>> top1_f1(z, torch.tensor([[1.0], [0.0]]))  # either latent detects the feature in one of its two poses
    0.6666666666666666
    """
    lives, true = (z != 0), (truth != 0).double()
    if len(z) != len(truth):
        raise ValueError(f"truth must have a row for each of the {len(z)} inputs, got {len(truth)}")
    hits = true.T @ lives.double().sum(1)
    predicted, positives = lives.double().sum((0, 1)), z.shape[1] * true.sum(0)
    f1 = 2 * hits / (predicted + positives[:, None]).clamp(min=1)
    return f1.amax(1)[positives > 0].mean().item()


# Probes ---------------------------------------------------------------------------------------------------------------


def orbit_probing(
    z: Float[Tensor, "n group d"], labels: Mapping[str, Int[Tensor, " n"]], seed: int = 0
) -> dict[str, float]:
    """What can be read off codes, or activations, of inputs in all poses: labels that do not depend on the pose, and
    the pose.

    A probe is a logistic regression on standardised numbers, C = 1 (`linear_probe`), fitted on 80% of the inputs and
    tested on the others: no input is in both in any pose. F1 is the mean over classes.

    Units: fractions; 1 is perfect. The pose has a chance of one over the group's size. Blind to: what the model does
    with it; a wide code has more numbers to fit.

    Args:
        z: to read from.
        labels: of each input, by name; at least one.
        seed: of the split.

    Returns:
        ``probing_f1``, fitted and tested in all poses, mean over labels, and ``probing_f1_<label>``;
        ``probing_f1_other_poses``, fitted in the stored pose and tested in the others; ``probing_top1_f1``, of the best
        single latent of each class (`single_f1`); ``pose_probe``, the accuracy of a probe for the pose.

    Raises:
        ValueError: if there are no labels, or not one for each input.
    """
    n, poses = z.shape[:2]
    if not labels or any(len(label) != n for label in labels.values()):
        raise ValueError(f"labels must be one or more, each of the {n} inputs, got {[*map(len, labels.values())]}")
    order = torch.randperm(n, generator=seeded("probes", seed))
    train, test = order[: round(TRAIN_SHARE * n)], order[round(TRAIN_SHARE * n) :]
    fitted, tested = z[train].flatten(0, 1), z[test].flatten(0, 1)
    found: dict[str, list[float]] = {"probing_f1": [], "probing_f1_other_poses": [], "probing_top1_f1": []}
    own = {}
    for name, label in labels.items():
        known, asked = label[train].repeat_interleave(poses), label[test].repeat_interleave(poses)
        own[f"probing_f1_{name}"] = macro_f1(asked, linear_probe(fitted, known)(tested))
        others = linear_probe(z[train, 0], label[train])(z[test, 1:].flatten(0, 1))
        found["probing_f1"].append(own[f"probing_f1_{name}"])
        found["probing_f1_other_poses"].append(macro_f1(label[test].repeat_interleave(poses - 1), others))
        found["probing_top1_f1"].append(single_f1(fitted != 0, known, tested != 0, asked))
    pose = linear_probe(fitted, torch.arange(poses).repeat(len(train)))
    own["pose_probe"] = pose.accuracy(tested, torch.arange(poses).repeat(len(test)))
    return {name: float(np.mean(values)) for name, values in found.items()} | own


def macro_f1(labels: Int[Tensor, " n"], predicted: Int[Tensor, " n"]) -> float:
    """``2 TP / (predicted + true)`` of each class that occurs, and their mean."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels.numpy(), predicted.numpy(), average="macro"))


def single_f1(
    lives: Bool[Tensor, "n d_sae"], labels: Int[Tensor, " n"], lives_test: Bool[Tensor, "m d_sae"], labels_test: Tensor
) -> float:
    """Of each class the F1 of the one latent whose living predicts it best on the training rows, on the test rows; mean
    over classes.

    >>> lives = torch.tensor([[True, False], [True, True], [False, True]])
    >>> single_f1(lives, torch.tensor([0, 0, 1]), lives, torch.tensor([0, 1, 1]))  # latents 0 and 1: 2/3 and 1
    0.8333333333333333
    """
    classes = labels.unique()

    def f1(lives: Tensor, labels: Tensor) -> Float[Tensor, "classes d_sae"]:
        true = (labels == classes[:, None]).double()
        return 2 * (true @ lives.double()) / (true.sum(1)[:, None] + lives.double().sum(0)).clamp(min=1)

    best = f1(lives, labels).argmax(1, keepdim=True)
    return f1(lives_test, labels_test).gather(1, best).mean().item()
