"""Measurements by name: what ``measures`` of an experiment asks for, on SAEs and the ground that they were trained on.

Each takes trained SAEs, their ground, the seed of the training and the number of the repetition, which reseeds the
measurement itself: other held-out rows, other probes, other splits. It returns the metrics of each SAE, or the reason
why an SAE has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tqdm.auto import tqdm

from sae_lib.data import Batch
from sae_lib.grounds import Ground, ImageGround, LanguageGround, PlantedGround
from sae_lib.metrics.absorption import planted_absorption
from sae_lib.metrics.allocation import Allocation, BatchChoice, step_seconds
from sae_lib.metrics.attribution import LatentEffects
from sae_lib.metrics.autointerp import Autointerp
from sae_lib.metrics.choice_by_gradient import ChoiceByGradient
from sae_lib.metrics.consistency import shared_latents, strongest_shared
from sae_lib.metrics.evaluation import evaluate
from sae_lib.metrics.feature_clusters import Reading, feature_clusters
from sae_lib.metrics.first_letter import FirstLetter
from sae_lib.metrics.image_latents import image_latents
from sae_lib.metrics.latent_distances import LatentDistances
from sae_lib.metrics.masks import each_way, mask_shares, masked_codes
from sae_lib.metrics.patched import MODEL_TOKENS, PatchedLoss
from sae_lib.metrics.reconstruction import density
from sae_lib.metrics.recovery import latent_f1, mcc, mmcs, recovery_rate, uniqueness
from sae_lib.metrics.sparse_probing import SparseProbing
from sae_lib.metrics.steering import Steering
from sae_lib.metrics.zipf import zipf_fit, zipf_shift
from sae_lib.sae import SAE
from sae_lib.saes.atm import ATMSAE
from sae_lib.saes.topk import TopKSAE

Metrics = dict[str, float]
Measure = Callable[[Sequence[SAE], Ground, int, int], list[Metrics | str]]


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
def recovery_rates(saes: Sequence[SAE], ground: PlantedGround, seed: int, repeat: int) -> list[Metrics]:
    """Share of the planted features that some latent has a cosine of at least 0.8, and 0.9, with."""
    truth, at = ground.dictionary(seed).directions, {"recovery_rate_80": 0.8, "recovery_rate_90": 0.9}
    return [{name: recovery_rate(sae.W_dec, truth, threshold) for name, threshold in at.items()} for sae in saes]


@torch.no_grad()
def sparsity(saes: Sequence[SAE], ground: Ground, seed: int, repeat: int) -> list[Metrics]:
    """How L0 is spread and kept: its standard deviation over tokens (``l0_sd``), L0 with the selection of training
    (``l0_train``), and L0 over the one that the SAE was asked for, where it was (``l0_ratio``)."""
    x, found = ground.rows(seed, repeat), []
    for sae in saes:
        living = (sae.encode(x) != 0).sum(1).double()
        asked = getattr(sae, "k", None) or getattr(sae, "target_l0", None)
        metrics = {"l0_sd": living.std().item()} | ({"l0_ratio": living.mean().item() / asked} if asked else {})
        if not sae.needs:  # these rows have nothing beside x
            sae.train()
            codes = [sae.select(sae.scores(part), Batch(part)).dense() for part in x.split(1024)]
            sae.eval()
            metrics["l0_train"] = sum(float((z != 0).sum()) for z in codes) / len(x)
        found.append(metrics)
    return found


@torch.no_grad()
def planted_hierarchy(saes: Sequence[SAE], ground: PlantedGround, seed: int, repeat: int) -> list[Metrics | str]:
    """Absorption of parents by their children, with the planted truth in place of probes."""
    planted, held = ground.dictionary(seed), next(iter(ground.held_out(seed, repeat)))
    truth = planted.directions, held.truth, planted.parents
    return each(lambda sae: planted_absorption(held.x, sae.encode(held.x), sae.W_dec, *truth), saes)


def choice_by_gradient(saes: Sequence[SAE], ground: LanguageGround, seed: int, repeat: int) -> list[Metrics | str]:
    """Those of `reconstruction`, on the same texts, where the gradient has a say in the choice; of g-SAE and TopK."""
    prepared = ground.prepared(
        ("gradient", repeat), lambda: ChoiceByGradient(held_texts(ground, repeat), ground.held, seed=repeat)
    )
    able = [isinstance(sae, TopKSAE) for sae in saes]
    found = iter(prepared([sae for sae, can in zip(saes, able, strict=True) if can]))
    return [next(found) if can else "only g-SAE and TopK choose with the gradient" for can in able]


@torch.no_grad()
def densities(saes: Sequence[SAE], ground: Ground, seed: int, repeat: int) -> list[Metrics | str]:
    """The Zipf fit of how often the latents fire."""
    x = ground.rows(seed, repeat)
    return each(lambda sae: zipf_fit(density(sae.encode(x))), saes)


@torch.no_grad()
def shifted_densities(saes: Sequence[SAE], ground: Ground, seed: int, repeat: int) -> list[Metrics | str]:
    """The fit of Zipf's law with exponent 1 and a shift, which the paper of the chapter `choice` makes."""
    x = ground.rows(seed, repeat)
    return each(lambda sae: zipf_shift(density(sae.encode(x))), saes)


def steps(saes: Sequence[SAE], ground: Ground, seed: int, repeat: int) -> list[Metrics]:
    """Seconds of a training step, ``step_seconds``, of SAEs that take theirs in turn."""
    batch = ground.rows(seed, repeat)[: ground.batch_size]
    return [{"step_seconds": seconds} for seconds in step_seconds(saes, batch)]


def held_texts(on: LanguageGround, seed: int) -> PatchedLoss:
    return on.prepared(("patched", seed), lambda: PatchedLoss(on.held_out(0, seed), min(on.held, MODEL_TOKENS)))


@torch.no_grad()
def masks(saes: Sequence[SAE], ground: Ground, seed: int, repeat: int) -> list[Metrics | str]:
    """How much of an ATM is masked, and its code with and without the mask."""
    x = ground.rows(seed, repeat)
    return each(lambda sae: mask_shares(with_mask(sae)) | masked_codes(sae, x), saes)


def masked_letters(saes: Sequence[SAE], ground: LanguageGround, seed: int, repeat: int) -> list[Metrics | str]:
    """`first_letter` of an ATM that is evaluated without a mask, with the hard and with the expected one."""
    prepared = ground.prepared((letters, repeat), lambda: letters(ground, repeat))
    return each(lambda sae: each_way(with_mask(sae), prepared), saes)


def with_mask(sae: SAE) -> ATMSAE:
    if not isinstance(sae, ATMSAE):
        raise ValueError(f"only ATM has a mask, got {sae.name}")
    return sae


def letters(on: LanguageGround, seed: int) -> FirstLetter:
    return FirstLetter(on.model, on.site, *on.spelled, seed=seed)


def probing(on: LanguageGround, seed: int) -> SparseProbing:
    if on.probed is None:
        raise ValueError("sparse probing needs labelled texts, this ground has none: give it labelled")
    texts, size = on.probed
    return SparseProbing(on.model, on.site, texts, seed=seed, size=size)


def task(make: Callable[[LanguageGround, int], Callable[[SAE], Metrics]]) -> Measure:
    """A measurement that prepares much, once for each repetition, and then takes one SAE at a time."""

    def measure(saes: Sequence[SAE], ground: LanguageGround, seed: int, repeat: int) -> list[Metrics | str]:
        try:
            prepared = ground.prepared((make, repeat), lambda: make(ground, repeat))
        except ValueError as error:
            return [str(error)] * len(saes)
        return each(prepared, saes)

    return measure


def each(measure: Callable[[SAE], Metrics], saes: Sequence[SAE]) -> list[Metrics | str]:
    """The metrics of each SAE; where they cannot be had, such as those of latents that never fire, the reason."""
    found: list[Metrics | str] = []
    for sae in tqdm(saes, desc="measured", unit="SAE", leave=False, delay=5):
        try:
            found.append(measure(sae))
        except ValueError as error:
            found.append(str(error))
    return found


@torch.no_grad()
def consistency(sae: SAE, twin: SAE, ground: Ground, seed: int) -> Metrics:
    """How many latents, and how many of the strongest 1%, an SAE shares with its twin: other initial weights, the same
    data in the same order."""
    x = ground.rows(seed, 0)
    decoders = [sae.W_dec.detach(), twin.W_dec.detach()]
    strengths = [one.encode(x).amax(0) for one in (sae, twin)]
    found = shared_latents(decoders, [strength > 0 for strength in strengths])
    found["consistency_top"] = strongest_shared(decoders, strengths)
    return {name: value for name, value in found.items() if name != "consistency_pairs"}


def neurons(readings: Sequence[Reading], ground: LanguageGround, seed: int, repeat: int) -> list[Metrics]:
    """The clusters of all neurons of the ground's model, by each reading of the same examples; the seed draws texts."""
    return feature_clusters(ground.model, ground.texts["train"], readings, seed, ground.held)


def images(saes: Sequence[SAE], ground: ImageGround, seed: int, repeat: int) -> list[Metrics | str]:
    """All of `image_latents`, on the classifier and the images of the seed."""
    return each(lambda sae: image_latents(sae, *ground.world(seed), seed=repeat), saes)


MEASURES: dict[str, Measure] = {
    "reconstruction": reconstruction,
    "sparsity": sparsity,
    "recovery": recovery,
    "recovery_rates": recovery_rates,
    "planted_absorption": planted_hierarchy,
    "density": densities,
    "gradient": choice_by_gradient,
    "zipf": shifted_densities,
    "step_seconds": steps,
    "allocation": task(lambda on, seed: Allocation(held_texts(on, seed))),
    "batch_choice": task(lambda on, seed: BatchChoice(held_texts(on, seed), seed)),
    "masks": masks,
    "masked_letters": masked_letters,
    "first_letter": task(letters),
    "sparse_probing": task(probing),
    "steering": task(lambda on, seed: Steering(on.model, on.site, on.texts["test"], seed=seed)),
    "effects": task(lambda on, seed: LatentEffects(on.model, on.site, on.texts["test"], seed=seed)),
    "neurons": neurons,
    "images": images,
    "latent_distances": task(lambda on, seed: LatentDistances(on.model, on.site, on.texts["test"], seed=seed)),
    "autointerp": task(lambda on, seed: Autointerp(on.model, on.site, on.texts["test"], seed=seed)),
}
"""Name -> measurement, repeated with other seeds of its own."""
CONSISTENCY = "consistency"
"""The measurement that trains a twin of each SAE; it has no repetitions."""
