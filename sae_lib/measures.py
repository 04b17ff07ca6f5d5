"""Measurements by name: what ``measures`` of an experiment asks for, on SAEs and the ground that they were trained on.

Each takes trained SAEs, their ground, the seed of the training and the number of the repetition, which reseeds the
measurement itself: other held-out rows, other probes, other splits. It returns the metrics of each SAE.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sae_lib.data import Batch
from sae_lib.grounds import Ground, PlantedGround
from sae_lib.metrics.evaluation import evaluate
from sae_lib.metrics.recovery import latent_f1, mcc, mmcs, recovery_rate, uniqueness
from sae_lib.sae import SAE

Metrics = dict[str, float]


def reconstruction(saes: Sequence[SAE], ground: Ground, seed: int, repeat: int) -> list[Metrics]:
    """All of `evaluate`: reconstruction, sparsity and, on a language model, what it loses."""
    return evaluate(list(saes), ground.held_out(seed, repeat), tokens=ground.held)


@torch.no_grad()
def recovery(saes: Sequence[SAE], ground: PlantedGround, seed: int, repeat: int) -> list[Metrics]:
    """Directions and detection against the planted truth."""
    planted, held = ground.dictionary(seed), next(iter(ground.held_out(seed, repeat)))
    found = []
    for sae in saes:
        measures = {"mcc": mcc, "mmcs": mmcs, "recovery_rate": recovery_rate, "uniqueness": uniqueness}
        directions = {name: measure(sae.W_dec, planted.directions) for name, measure in measures.items()}
        found.append(directions | latent_f1(sae.W_dec, planted.directions, sae.encode(held.x), held.truth))
    return found


@torch.no_grad()
def sparsity(saes: Sequence[SAE], ground: Ground, seed: int, repeat: int) -> list[Metrics]:
    """How L0 is spread and kept: its standard deviation over tokens (``l0_sd``), L0 with the selection of training
    (``l0_train``), and L0 over the one that the SAE was asked for, where it was (``l0_ratio``)."""
    x, found = ground.rows(seed, repeat), []
    for sae in saes:
        living = (sae.encode(x) != 0).sum(1).double()
        asked = getattr(sae, "k", None) or getattr(sae, "target_l0", None)
        metrics = {"l0_sd": living.std().item()} | ({"l0_ratio": living.mean().item() / asked} if asked else {})
        sae.train()
        codes = [sae.select(sae.scores(part), Batch(part)).dense() for part in x.split(1024)]
        sae.eval()
        found.append(metrics | {"l0_train": sum(float((z != 0).sum()) for z in codes) / len(x)})
    return found


MEASURES: dict[str, Callable[[Sequence[SAE], Ground, int, int], list[Metrics]]] = {
    "reconstruction": reconstruction,
    "recovery": recovery,
    "sparsity": sparsity,
}
"""Name -> measurement."""
