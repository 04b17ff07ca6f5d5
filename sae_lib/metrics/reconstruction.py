"""How well activations are reconstructed, with how many latents, and at what cost to the model. Chapter `evaluation`.

Functions on tensors: ``x`` activations, ``x_hat`` their reconstruction, ``z`` the code; one row a token. Sums run
over all tokens given at once, in 64 bits; `Reconstruction` computes the same numbers over a stream, whatever its
batch size. A number that the definition leaves open (a mean over no tokens, a share of no variance) is NaN.
Definitions follow SAEBench (Karvonen et al. 2025, arXiv 2503.09532) where it is right, and say so where it is not.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

DENSE = 0.1
"""A latent that fires on more than this share of the tokens is called dense."""


# Reconstruction ------------------------------------------------------------------------------------------------------


def mse(x: Float[Tensor, "tokens d_in"], x_hat: Float[Tensor, "tokens d_in"]) -> float:
    """``mean |x - x_hat|^2``: squared distance, summed over dimensions, mean over tokens.

    Units: those of x, squared; 0 is perfect. Blind to: which tokens are wrong; a few tokens of huge norm can dominate
    it. Not to be compared between sites or models. SAEBench divides it by the number of tokens in a batch once more.

    >>> mse(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    2.0
    """
    x, x_hat = _pair(x, x_hat)
    return (x - x_hat).square().sum(1).mean().item()


def fvu(x: Float[Tensor, "tokens d_in"], x_hat: Float[Tensor, "tokens d_in"]) -> float:
    """``sum |x - x_hat|^2 / sum |x - mean(x)|^2``: fraction of variance unexplained.

    Units: fraction; 0 is perfect, 1 is as good as predicting the mean of these tokens, above 1 is worse. Blind to:
    what the lost part meant to the model. NaN if all tokens are alike. Source: the correct form of section "core" of
    SAEBench.

    >>> fvu(torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [2.0]]))  # residual 0 + 1, variance 1 + 1
    0.5
    """
    x, x_hat = _pair(x, x_hat)
    mean = x.mean(0)
    return _unexplained((x - x_hat).square().sum(), (x - mean).square().sum(), len(x) * mean.square().sum())


def explained_variance(x: Float[Tensor, "tokens d_in"], x_hat: Float[Tensor, "tokens d_in"]) -> float:
    """``1 - fvu``: fraction of the variance explained, centred over all tokens.

    Units: fraction; 1 is perfect, 0 is as good as the mean, negative is worse. Blind to: what `fvu` is blind to.
    Other libraries' numbers can differ: SAEBench 0.6 and SAELens 6.18, not 6.54, subtract the square of ``mean(x^2)``
    from the mean squared norm where the squared norm of ``mean(x)`` belongs, which has other units, so that the same
    data have 0.48 there, 0.65 when divided by ten, and 0.32 here both times; dictionary_learning 0.1 forgives a
    constant error, 0.42 (``tests/metrics/test_sae_bench.py`` and beside it).

    >>> explained_variance(torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [2.0]]))
    0.5
    """
    return 1 - fvu(x, x_hat)


def cosine(x: Float[Tensor, "tokens d_in"], x_hat: Float[Tensor, "tokens d_in"]) -> float:
    """``mean cos(x, x_hat)`` over tokens that are not zero; a reconstruction of zero counts as 0.

    Units: -1 to 1; 1 is perfect. Blind to: the length of the reconstruction. Source: SAEBench, core (NaN there for a
    zero).

    >>> cosine(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[3.0, 0.0], [7.0, 0.0]]))  # (0.6 + 1) / 2
    0.8
    """
    x, x_hat = _pair(x, x_hat)
    norms, norms_hat = x.norm(dim=1), x_hat.norm(dim=1)
    products = (x * x_hat).sum(1) / (norms * norms_hat).where(norms_hat > 0, 1)
    return products[norms > 0].mean().item()


def l2_ratio(x: Float[Tensor, "tokens d_in"], x_hat: Float[Tensor, "tokens d_in"]) -> float:
    """``mean |x_hat| / |x|`` over tokens that are not zero.

    Units: fraction; below 1 is shrinkage. Blind to: direction. A perfect reconstruction has 1, and the best linear
    one of noisy data has less. Source: SAEBench, core (which counts ``|x|`` below 1e-4 as 1 instead).

    >>> l2_ratio(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[0.0, 4.0], [1.0, 0.0]]))
    0.8
    """
    x, x_hat = _pair(x, x_hat)
    norms = x.norm(dim=1)
    return (x_hat.norm(dim=1) / norms)[norms > 0].mean().item()


def relative_reconstruction_bias(x: Float[Tensor, "tokens d_in"], x_hat: Float[Tensor, "tokens d_in"]) -> float:
    """``mean |x_hat|^2 / mean(x . x_hat)``: the inverse of the factor by which x_hat is best multiplied.

    Units: fraction; 1 is unbiased, below 1 is shrinkage: ``x_hat / bias`` has the least squared error. Blind to:
    errors across x_hat. NaN if every reconstruction is zero. Source: Rajamanoharan et al. 2024 (Gated), equation 10;
    both means over all tokens.

    >>> relative_reconstruction_bias(torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 0.0]]))  # 1 / 2
    0.5
    """
    x, x_hat = _pair(x, x_hat)
    return _ratio(x_hat.square().sum(), (x * x_hat).sum())


# Sparsity ------------------------------------------------------------------------------------------------------------


def l0(z: Float[Tensor, "tokens d_sae"]) -> float:
    """``mean #{i : z_i != 0}``: living latents a token.

    Units: latents, 0 to d_sae. Blind to: how large they are, and whether always the same ones live (see `density`).

    >>> l0(torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 3.0]]))
    1.5
    """
    return density(z).double().sum().item()


def density(z: Float[Tensor, "tokens d_sae"]) -> Float[Tensor, " d_sae"]:
    """Share of the tokens on which each latent lives (64 bits).

    Units: fraction, a latent. Blind to: in which documents; a latent may live often in few of them.

    >>> density(torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 3.0]])).tolist()
    [0.5, 0.0, 1.0]
    """
    (z,) = finite_matrices(z=z)
    return (z != 0).double().mean(0)


def alive(z: Float[Tensor, "tokens d_sae"]) -> float:
    """Share of the latents that live on at least one token.

    Units: fraction; 1 is none dead. It grows with the number of tokens, so that number belongs beside it: a latent of
    density p is missed by n tokens with probability ``(1 - p)^n``. Source: SAEBench, core (about 4 million tokens
    there).

    >>> alive(torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
    0.5
    """
    return (density(z) > 0).double().mean().item()


def dense(z: Float[Tensor, "tokens d_sae"], threshold: float = DENSE) -> float:
    """Share of the latents that live on more than `threshold` of the tokens.

    Units: fraction; dense latents are seldom interpretable. Source: SAEBench, core (``freq_over_10_percent``).

    >>> dense(torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
    0.5
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold must be in [0, 1), got {threshold}")
    return (density(z) > threshold).double().mean().item()


def density_histogram(
    densities: Float[Tensor, " d_sae"], decades: int = 6, bins_a_decade: int = 4
) -> tuple[Int[Tensor, " bins"], Float[Tensor, " edges"]]:
    """How many latents have which density, in bins of equal width in the logarithm.

    Args:
        densities: what `density` returns, in [0, 1].
        decades: the bins reach from ``10^-decades`` to 1; the lowest also holds all that is rarer, but above 0.
        bins_a_decade: number of bins from one power of ten to the next.

    Returns:
        Counts (latents) and edges (one more, fractions). A bin holds its upper edge. There are
        ``len(densities) - counts.sum()`` dead latents, which are in no bin.

    >>> counts, edges = density_histogram(torch.tensor([0.0, 0.05, 0.5, 1.0]), decades=2, bins_a_decade=1)
    >>> counts.tolist(), [round(edge, 2) for edge in edges.tolist()]
    ([1, 2], [0.01, 0.1, 1.0])
    """
    if densities.ndim != 1 or not len(densities) or not ((densities >= 0) & (densities <= 1)).all():
        raise ValueError(f"densities must be a vector of numbers in [0, 1], got shape {tuple(densities.shape)}")
    if decades < 1 or bins_a_decade < 1:
        raise ValueError(f"decades and bins_a_decade must be at least 1, got {decades} and {bins_a_decade}")
    edges = torch.logspace(-decades, 0, decades * bins_a_decade + 1, dtype=torch.float64)
    above_zero = densities[densities > 0].double().cpu()
    return torch.bincount(torch.bucketize(above_zero, edges[1:-1]), minlength=len(edges) - 1), edges


# What the model loses ------------------------------------------------------------------------------------------------


def loss_recovered(
    clean: Float[Tensor, " *tokens"] | float,
    patched: Float[Tensor, " *tokens"] | float,
    ablated: Float[Tensor, " *tokens"] | float,
) -> float:
    """``(ablated - patched) / (ablated - clean)``, each a mean over tokens: how much of what the site gives the model
    survives.

    Units: fraction; 1 is as good as the original activations, 0 as bad as the ablation; neither is a limit. Blind to:
    everything if the ablation does much harm: with zero ablation at an early site, 0.99 can still be nats away. So
    both ablations, by zero and by the mean, and the losses themselves, belong in a report. NaN if the ablation does
    not change the loss. The KL score of SAEBench is this function with ``clean=0`` and divergences for losses.
    Source: SAEBench, core.

    Args:
        clean: the model's loss a token, or its mean, in nats.
        patched: the same with the reconstruction in the site's place.
        ablated: the same with zeros, or with the mean activation, in the site's place.

    >>> loss_recovered(torch.tensor([2.0, 4.0]), torch.tensor([3.0, 4.0]), ablated=5.0)  # (5 - 3.5) / (5 - 3)
    0.75
    """
    clean, patched, ablated = (
        _finite_mean(name, losses) for name, losses in {"clean": clean, "patched": patched, "ablated": ablated}.items()
    )
    return (ablated - patched) / (ablated - clean) if ablated != clean else math.nan


def kl(
    logits: Float[Tensor, "*tokens vocabulary"], patched_logits: Float[Tensor, "*tokens vocabulary"]
) -> Float[Tensor, "*tokens"]:
    """``sum_v p_v (log p_v - log q_v)``, p the model's own prediction and q the patched one; a number a token, to be
    averaged.

    Units: nats; 0 is no change. Blind to: whether the change made the prediction better or worse. Source: SAEBench,
    core.

    >>> logits = torch.tensor([[0.0, 0.0], [1.0, 2.0]])  # p = (1/2, 1/2)
    >>> patched = torch.tensor([[0.0, math.log(3)], [3.0, 4.0]])  # q = (1/4, 3/4): KL = log(2)/2 + log(2/3)/2
    >>> [round(value, 4) for value in kl(logits, patched).tolist()]
    [0.1438, 0.0]
    """
    if logits.shape != patched_logits.shape or not logits.ndim or not logits.numel():
        raise ValueError(
            f"logits and patched_logits must have the same shape (..., vocabulary), got {tuple(logits.shape)} and "
            f"{tuple(patched_logits.shape)}"
        )
    divergence = divergences(logits.float().log_softmax(-1), patched_logits.float().log_softmax(-1))
    if not torch.isfinite(divergence).all():
        raise ValueError("logits must be finite, got NaN or infinite ones; look for overflow in a 16-bit model")
    return divergence


def divergences(
    log_p: Float[Tensor, "*tokens vocabulary"], log_q: Float[Tensor, "*tokens vocabulary"]
) -> Float[Tensor, "*tokens"]:
    """`kl` of logarithms of probabilities, which a caller with many q computes once of p."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


# Over a stream -------------------------------------------------------------------------------------------------------


class Reconstruction:
    """All of the above but the model's loss, over a stream: the same numbers as the functions on all tokens at once.

    Memory does not grow with the stream; sums are kept in 64 bits, the variance by Chan's update, so that neither the
    batch size nor a large mean matters.

    >>> x, z = torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    >>> accumulator = Reconstruction()
    >>> for token in range(2):
    ...     accumulator.update(x[[token]], z[[token]] @ torch.ones(2, 1), z[[token]])
    >>> report = accumulator.compute()
    >>> report["fvu"], report["l0"], report["alive"], report["tokens"]
    (0.5, 1.0, 0.5, 2)
    """

    def __init__(self) -> None:
        self.tokens = 0

    def update(
        self, x: Float[Tensor, "tokens d_in"], x_hat: Float[Tensor, "tokens d_in"], z: Float[Tensor, "tokens d_sae"]
    ) -> None:
        """Add a batch.

        Raises:
            ValueError: if a matrix is empty, not floating or not finite, or shapes disagree with each other or with
                the last batch.
        """
        x, x_hat = _pair(x, x_hat)
        (z,) = finite_matrices(z=z)
        if len(z) != len(x):
            raise ValueError(f"z must have a row for each of the {len(x)} tokens of x, got {len(z)}")
        if not self.tokens:
            self._mean, self._fires = x.new_zeros(x.shape[1]), x.new_zeros(z.shape[1])
            self._sums = x.new_zeros(7)
        if (x.shape[1], z.shape[1]) != (len(self._mean), len(self._fires)):
            raise ValueError(
                f"batches must keep their widths, d_in={len(self._mean)} and d_sae={len(self._fires)}, "
                f"got {x.shape[1]} and {z.shape[1]}; use one accumulator for each SAE and site"
            )
        mean, norms, norms_hat, products = x.mean(0), x.norm(dim=1), x_hat.norm(dim=1), (x * x_hat).sum(1)
        shift = mean - self._mean
        among = len(x) / (self.tokens + len(x))  # the batch's share of all tokens so far
        some = norms > 0
        self._sums += torch.stack(
            [
                (x - x_hat).square().sum(),
                (x - mean).square().sum() + shift.square().sum() * self.tokens * among,
                norms_hat.square().sum(),
                products.sum(),
                (products / (norms * norms_hat).where(norms_hat > 0, 1))[some].sum(),
                (norms_hat / norms)[some].sum(),
                some.sum(),
            ]
        )
        self._mean += shift * among
        self._fires += (z != 0).sum(0)
        self.tokens += len(x)

    @property
    def density(self) -> Float[Tensor, " d_sae"]:
        """Share of the tokens on which each latent lives, so far."""
        return self._fires / self._required_tokens()

    def compute(self) -> dict[str, float | int]:
        """The numbers of all tokens so far, by the names of the functions, and the number of tokens.

        Raises:
            ValueError: if there were no tokens.
        """
        tokens = self._required_tokens()
        residual, variance, squares_hat, products, cosines, ratios, some = self._sums
        unexplained = _unexplained(residual, variance, tokens * self._mean.square().sum())
        return {
            "tokens": tokens,
            "mse": residual.item() / tokens,
            "fvu": unexplained,
            "explained_variance": 1 - unexplained,
            "cosine": _ratio(cosines, some),
            "l2_ratio": _ratio(ratios, some),
            "relative_reconstruction_bias": _ratio(squares_hat, products),
            "l0": self.density.sum().item(),
            "alive": (self.density > 0).double().mean().item(),
            "dense": (self.density > DENSE).double().mean().item(),
        }

    def _required_tokens(self) -> int:
        if not self.tokens:
            raise ValueError("there must be at least one token, got none; call update first")
        return self.tokens


# Checks --------------------------------------------------------------------------------------------------------------


def finite_matrices(**matrices: Tensor) -> list[Tensor]:
    """The matrices, if each is a floating, finite, non-empty one; else a ValueError that names it."""
    for name, matrix in matrices.items():
        if matrix.ndim != 2 or not matrix.numel():
            raise ValueError(f"{name} must be a matrix with at least one row, got shape {tuple(matrix.shape)}")
        if not matrix.is_floating_point():
            raise ValueError(f"{name} must be floating, got {matrix.dtype}; convert it with {name}.float()")
        if matrix.sum().isfinite():  # as no sum with a NaN or infinite entry is; a hundred times as fast
            continue
        bad = int((~torch.isfinite(matrix)).any(1).sum())
        if bad:
            raise ValueError(f"{name} must be finite, got NaN or infinite entries in {bad} of {len(matrix)} rows")
    return list(matrices.values())


def _pair(x: Tensor, x_hat: Tensor) -> tuple[Tensor, Tensor]:
    """Both in 64 bits, if they are finite matrices of one shape."""
    finite_matrices(x=x, x_hat=x_hat)
    if x.shape != x_hat.shape:
        raise ValueError(f"x_hat must have the shape of x, {tuple(x.shape)}, got {tuple(x_hat.shape)}")
    return x.detach().double(), x_hat.detach().double()


def _ratio(above: Tensor, below: Tensor) -> float:
    return (above / below).item() if below != 0 else math.nan


def _unexplained(residual: Tensor, variance: Tensor, squared_mean: Tensor) -> float:
    """Residual by variance; a variance that rounding alone can make counts as none."""
    return _ratio(residual, variance if variance > 1e-24 * squared_mean else torch.zeros(()))


def _finite_mean(name: str, losses: Tensor | float) -> float:
    mean = torch.as_tensor(losses, dtype=torch.float64).mean().item()
    if not math.isfinite(mean):
        raise ValueError(f"{name} must be finite losses, at least one, got a mean of {mean}")
    return mean
