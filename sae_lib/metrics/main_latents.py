"""Which latents stand for a property: probes on a code, and how many latents they need. Chapter `evaluation`.

The first three steps of the first-letter task (`sae_lib.metrics.first_letter`): a probe on the activations is the truth
to hold the code against (`one_vs_rest`); an L1 probe on the code orders the latents; logistic regressions on the first
k of them (`k_sparse_probe`) tell how many are needed (`feature_splits`). Those are the *main* latents, by which
`sae_lib.metrics.absorption` judges. Read as code: SAEBench, absorption (Karvonen et al. 2025, arXiv 2503.09532).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lib.metrics.reconstruction import finite_matrices


class OneVsRest(NamedTuple):
    """Probes for several classes, each against all others: class c is predicted where ``x W_c + b_c > 0``."""

    W: Float[Tensor, "d_in classes"]
    b: Float[Tensor, " classes"]

    def __call__(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n classes"]:
        """The logits."""
        return x @ self.W + self.b


def one_vs_rest(
    x: Float[Tensor, "n d_in"],
    truth: Bool[Tensor, "n classes"],
    batch_size: int = 64,
    weight_decay: float = 1e-4,
    l1: float = 0.0,
    seed: int = 0,
) -> OneVsRest:
    """Logistic probes for all classes, trained jointly: step 1, and with ``l1=0.01`` the first half of step 2.

    ``L = mean of BCE(x W + b, truth) + l1 * mean_c |W_c|_1``, where a class' positives weigh its negatives divided by
    its positives. Adam for 50 epochs; the learning rate falls from 0.01 to 0.00001, by the same factor each epoch.
    Defaults are those of the ground-truth probe; the sparse one has ``batch_size=4096, weight_decay=1e-6, l1=0.01``.
    Weights start at random, up to ``1 / sqrt(d_in)``: with few steps it is chance that orders them, so few examples
    need small batches.

    Args:
        x: activations or codes, a row an example.
        truth: which classes each belongs to.
        batch_size: examples in a step; their order is drawn anew each epoch.
        weight_decay: L2 penalty inside Adam's gradient.
        l1: weight of the L1 penalty.
        seed: of the initial weights and the order.

    Raises:
        ValueError: if x is not finite, shapes disagree, or a class has only positives or only negatives.

    >>> x = torch.tensor([[-1.0, 1.0], [-1.0, -1.0], [1.0, 1.0], [1.0, -1.0]]).repeat(500, 1)
    >>> (one_vs_rest(x, x > 0)(x[:4]) > 0).int().T  # class c is the sign of coordinate c
    tensor([[0, 0, 1, 1],
            [1, 0, 1, 0]], dtype=torch.int32)
    """
    (x,) = finite_matrices(x=x)
    positives = _both_kinds(truth, len(x))
    x, truth = x.detach().float(), truth.float()
    generator = torch.Generator().manual_seed(seed)
    W = torch.empty(x.shape[1], truth.shape[1]).uniform_(-1, 1, generator=generator) / math.sqrt(x.shape[1])
    W, b = W.to(x.device).requires_grad_(), torch.zeros(truth.shape[1], device=x.device, requires_grad=True)
    optimizer = torch.optim.Adam([W, b], lr=0.01, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=(1e-5 / 0.01) ** (1 / 50))
    weight = (len(x) - positives) / positives
    with torch.enable_grad():
        for _ in range(50):
            for rows in torch.randperm(len(x), generator=generator).to(x.device).split(batch_size):
                logits = x[rows] @ W + b
                loss = F.binary_cross_entropy_with_logits(logits, truth[rows], pos_weight=weight)
                if l1:
                    loss = loss + l1 * W.abs().sum(0).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
    return OneVsRest(W.detach(), b.detach())


class KSparseProbe(NamedTuple):
    """What `k_sparse_probe` returns.

    Attributes:
        latents: the k latents, the most important first.
        scores: logit of each test word; above 0 predicts the class.
        f1: of these predictions.
    """

    latents: Int[Tensor, " k"]
    scores: Float[Tensor, " words"]
    f1: float


def k_sparse_probe(
    z: Float[Tensor, "n d_sae"],
    truth: Bool[Tensor, " n"],
    z_test: Float[Tensor, "words d_sae"],
    truth_test: Bool[Tensor, " words"],
    weights: Float[Tensor, " d_sae"],
    k: int,
) -> KSparseProbe:
    """Logistic regression on the k latents of the largest weights: the second half of step 2.

    `weights` are a class' column of the L1 probe on the code (`one_vs_rest`); they count with their sign, since a
    latent that speaks against the class cannot stand for it. The regression (scikit-learn, balanced classes) is fitted
    on `z`, its F1 is measured on `z_test`.

    Units: F1 is a fraction, 1 is perfect. Blind to: latents that the L1 probe left out because others say the same.

    Raises:
        ValueError: if k is out of range, shapes disagree, or either truth is of one kind only.

    >>> z, truth = torch.tensor([[0.0, 1.0], [0.0, 0.0], [1.0, 1.0], [2.0, 0.0]]), torch.tensor([0, 0, 1, 1]).bool()
    >>> test = torch.tensor([[0.0, 9.0], [3.0, 0.0], [0.0, 0.0]])  # the last is missed: 2 * 1 / (1 + 2)
    >>> probe = k_sparse_probe(z, truth, test, torch.tensor([0, 1, 1]).bool(), torch.tensor([5.0, -6.0]), k=1)
    >>> probe.latents.tolist(), round(probe.f1, 4)
    ([0], 0.6667)
    """
    from sklearn.linear_model import LogisticRegression

    z, z_test = finite_matrices(z=z, z_test=z_test)
    _both_kinds(truth[:, None], len(z))
    _both_kinds(truth_test[:, None], len(z_test))
    if not len(weights) == z.shape[1] == z_test.shape[1]:
        raise ValueError(
            f"weights must have one for each of the latents of z and z_test, got {len(weights)} for "
            f"{z.shape[1]} and {z_test.shape[1]}"
        )
    if not 1 <= k <= len(weights):
        raise ValueError(f"k must be in [1, d_sae={len(weights)}], got {k}")
    latents = weights.topk(k).indices
    fitted = LogisticRegression(max_iter=500, class_weight="balanced")
    fitted.fit(z[:, latents].cpu().numpy(), truth.cpu().numpy())
    scores = torch.from_numpy(fitted.decision_function(z_test[:, latents].cpu().numpy())).to(z.device)
    return KSparseProbe(latents, scores, f1_score(scores > 0, truth_test))


def f1_score(predicted: Bool[Tensor, " n"], true: Bool[Tensor, " n"]) -> float:
    """``2 TP / (predicted + true)``, the harmonic mean of precision and recall; 0 where nothing is either.

    >>> f1_score(torch.tensor([True, True, False]), torch.tensor([True, False, False]))  # 2 * 1 / (2 + 1)
    0.6666666666666666
    """
    return 2 * int((predicted & true).sum()) / max(1, int(predicted.sum()) + int(true.sum()))


def best_threshold(logits: Float[Tensor, " n"], true: Bool[Tensor, " n"]) -> float:
    """The logit at and above which predicting the class gives the largest F1.

    >>> best_threshold(torch.tensor([3.0, 2.0, 1.0, 0.0]), torch.tensor([True, False, True, False]))  # 4/5, not 2/3
    1.0
    """
    order = logits.argsort(descending=True)
    predicted = torch.arange(1, len(logits) + 1, device=logits.device)
    return logits[order[(true[order].cumsum(0) / (predicted + true.sum())).argmax()]].item()


def feature_splits(f1: Sequence[float], gain: float = 0.03) -> int:
    """How many latents share a property: the first k that one more does not improve by more than `gain` (step 3).

    Units: latents, at least 1; 1 means that one latent stands for the property. Blind to: a set of latents that help
    only together. Source: SAEBench, absorption; the main latents S are those of the k-sparse probe of this k.

    Args:
        f1: of the k-sparse probes with k = 1, 2, ...
        gain: by how much F1 must rise.

    >>> feature_splits([0.60, 0.70, 0.72, 0.99])  # the third adds 0.02 only; what comes after is not asked
    2
    """
    if not len(f1) or not all(math.isfinite(value) for value in f1):
        raise ValueError(f"f1 must hold at least one finite number, got {list(f1)}")
    for k in range(1, len(f1)):
        if f1[k] <= f1[k - 1] + gain:
            return k
    return len(f1)


def _both_kinds(truth: Tensor, n: int) -> Float[Tensor, " classes"]:
    """The number of positives of each class, if it has both kinds."""
    if truth.ndim != 2 or len(truth) != n or truth.dtype != torch.bool:
        raise ValueError(f"truth must be boolean, for each of the {n} rows, got {truth.dtype} {tuple(truth.shape)}")
    positives = truth.float().sum(0)
    if not ((positives > 0) & (positives < n)).all():
        raise ValueError(f"each class must have positives and negatives, got {positives.int().tolist()} of {n} rows")
    return positives
