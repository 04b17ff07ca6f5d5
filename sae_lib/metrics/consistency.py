"""Whether another seed finds the same latents. Chapter `comparison`.

    c_i = max_j cos(w_i, w'_j)     over the living latents j of another run, for each living latent i of this one

A dictionary that describes the data, rather than the accident of its start, comes back. Source: Chen et al. 2025 (GBA,
arXiv 2506.14002), threshold .9; that dead latents are left out is this library's choice: they lie where they started,
unlike anything, and would count training that failed as disagreement.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations, permutations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_lib.metrics.recovery import cosines


def shared_latents(
    decoders: Sequence[Float[Tensor, "_ d_in"]],
    alive: Sequence[Bool[Tensor, " _"]] | None = None,
    threshold: float | int = 0.9,
) -> dict[str, float]:
    """How much of each run's dictionary another run has too, over all ordered pairs of runs.

    Both directions of a pair count, for a small dictionary may lie within a large one and not the reverse. First the
    mean over a run's living latents, then over pairs.

    Units: fraction, and cosine; 1 means that every living latent comes back. Blind to: whether what comes back is
    right: runs with one start, or one frozen decoder, agree without learning anything, so seeds must differ; several
    latents of a run may share one partner; when they fire. Two latents that split between them what one does in
    another run count as lost. Random directions reach more in low dimensions: compare with untrained SAEs.

    Args:
        decoders: ``W_dec`` of each run, at least two; their numbers of latents may differ.
        alive: which latents of each run live, e.g. ``Reconstruction.density > 0``; None counts all.
        threshold: cosine from which a latent counts as found again, in [-1, 1].

    Returns:
        ``consistency``, the share with ``c_i >= threshold``; ``consistency_mmcs``, the mean of ``c_i``; and
        ``consistency_pairs``, the number of unordered pairs.

    Raises:
        ValueError: for fewer than two runs, masks that do not fit, a run without living latents, a threshold out of
            range, or decoders of different widths.

    >>> import torch
    >>> runs = [torch.eye(2), torch.tensor([[2.0, 0.0], [3.0, 4.0]])]
    >>> shared_latents(runs)  # c of the first: 1 and 4/5; of the second: 1 and 4/5
    {'consistency': 0.5, 'consistency_mmcs': 0.9, 'consistency_pairs': 1}
    >>> shared_latents(runs, alive=[torch.tensor([True, False]), torch.tensor([True, True])])  # 1; and 1, 3/5
    {'consistency': 0.75, 'consistency_mmcs': 0.9, 'consistency_pairs': 1}
    """
    if len(decoders) < 2:
        raise ValueError(f"decoders must be those of at least two runs, got {len(decoders)}")
    if not -1 <= threshold <= 1:
        raise ValueError(f"threshold must be a cosine, in [-1, 1], got {threshold}")
    if alive is not None:
        shapes = [tuple(mask.shape) for mask in alive], [(len(W_dec),) for W_dec in decoders]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"alive must be a mask for the latents of each run, of shapes {shapes[1]}, got {shapes[0]}"
            )
        if dead := [number for number, mask in enumerate(alive) if not mask.any()]:
            raise ValueError(f"each run must have living latents, got none in run {dead[0]}: leave it out")
        decoders = [W_dec[mask] for W_dec, mask in zip(decoders, alive, strict=True)]
    best = []
    for one, other in combinations(decoders, 2):
        similarity = cosines(one, other)
        best += [similarity.amax(1), similarity.amax(0)]
    return {
        "consistency": sum((found >= threshold).double().mean().item() for found in best) / len(best),
        "consistency_mmcs": sum(found.mean().item() for found in best) / len(best),
        "consistency_pairs": len(best) // 2,
    }


def strongest_shared(
    decoders: Sequence[Float[Tensor, "_ d_in"]],
    strengths: Sequence[Float[Tensor, " _"]],
    share: float = 0.01,
    threshold: float | int = 0.9,
) -> float:
    """How much of each run's strongest latents another run has, too: with `share` 1, of all its living latents.

    Of the living latents of one run, the `share` (rounded up) with the largest activations are looked for among all
    living latents of another; the mean over them, then over all ordered pairs of runs.

    Units: fraction; blind to what `shared_latents` is blind to, and to what a latent does below its maximum, which is a
    single token's. Source: Chen et al. 2025 (GBA, arXiv 2506.14002), as others describe its figure.

    Args:
        decoders: ``W_dec`` of each run, at least two.
        strengths: the largest activation of each latent of each run; 0 is dead.
        share: of the living latents, in (0, 1].
        threshold: cosine from which a latent counts as found again.

    Raises:
        ValueError: for fewer than two runs, strengths that do not fit, a run without living latents, or a share out of
            range.

    >>> import torch
    >>> runs = [torch.eye(2), torch.tensor([[0.0, 1.0], [3.0, 4.0]])]
    >>> strongest_shared(runs, [torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0])], share=0.5)  # cosines 1 and 4/5
    0.5
    """
    if len(decoders) < 2:
        raise ValueError(f"decoders must be those of at least two runs, got {len(decoders)}")
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    if [tuple(each.shape) for each in strengths] != [(len(W_dec),) for W_dec in decoders]:
        shapes = [(len(W_dec),) for W_dec in decoders], [tuple(each.shape) for each in strengths]
        raise ValueError(f"strengths must be one for each latent of each run, of shapes {shapes[0]}, got {shapes[1]}")
    if dead := [number for number, each in enumerate(strengths) if not (each > 0).any()]:
        raise ValueError(f"each run must have living latents, got none in run {dead[0]}: leave it out")
    found = []
    for one, other in permutations(range(len(decoders)), 2):
        strongest = strengths[one].topk(math.ceil(share * int((strengths[one] > 0).sum()))).indices
        best = cosines(decoders[one][strongest], decoders[other][strengths[other] > 0]).amax(1)
        found.append((best >= threshold).double().mean())
    return torch.stack(found).mean().item()
