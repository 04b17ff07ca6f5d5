"""Measurements by name: what ``measures`` of an experiment asks for, on SAEs and the ground that they were trained on.

Each takes trained SAEs, their ground, the seed of the training and the number of the repetition, which reseeds the
measurement itself: other held-out rows, other probes, other splits. It returns the metrics of each SAE, or the reason
why an SAE has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sae_lib.data import Batch
from sae_lib.grounds import Ground, ImageGround, LanguageGround, OrbitGround, PlantedGround
from sae_lib.metrics.absorption import planted_absorption
from sae_lib.metrics.allocation import Allocation, BatchChoice, step_seconds
from sae_lib.metrics.attribution import LatentEffects
from sae_lib.metrics.autointerp import Autointerp
from sae_lib.metrics.choice_by_gradient import ChoiceByGradient
from sae_lib.metrics.consistency import shared_latents, strongest_shared
from sae_lib.metrics.equivariance import (
    OneMatrix,
    code_invariance,
    equivariance_error,
    map_r2,
    orbit_probing,
    order_error,
    pose_accuracy,
    top1_f1,
)
from sae_lib.metrics.evaluation import evaluate
from sae_lib.metrics.feature_clusters import Reading, feature_clusters
from sae_lib.metrics.first_letter import FirstLetter
from sae_lib.metrics.image_latents import image_latents
from sae_lib.metrics.latent_distances import LatentDistances
from sae_lib.metrics.masks import each_way, mask_shares, masked_codes
from sae_lib.metrics.patched import MODEL_TOKENS, PatchedLoss
from sae_lib.metrics.reconstruction import alive, density, explained_variance, l0
from sae_lib.metrics.recovery import latent_f1, mcc, mmcs, orbit_mcc, orbit_mmcs, recovery_rate, uniqueness
from sae_lib.metrics.sparse_probing import SparseProbing
from sae_lib.metrics.steering import Steering
from sae_lib.metrics.zipf import zipf_fit, zipf_shift
from sae_lib.orbits import stacks
from sae_lib.sae import SAE
from sae_lib.saes.atm import ATMSAE
from sae_lib.saes.equivariant import EquivariantSAE
from sae_lib.saes.topk import TopKSAE

Metrics = dict[str, int | float]
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


def each(measure: Callable[[SAE], Metrics], saes: Sequence[SAE | OneMatrix]) -> list[Metrics | str]:
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


# Inputs in all poses --------------------------------------------------------------------------------------------------


def in_all_poses(
    sae: SAE | OneMatrix, orbits: Float[Tensor, "n group d"], ground: OrbitGround
) -> Float[Tensor, "n group d_in"]:
    """What an SAE reads of inputs in every pose: activations or, if it is a group crosscoder, the orbit from there."""
    if isinstance(sae, OneMatrix):
        raise ValueError("a matrix has no code")
    return orbits if sae.d_in == ground.d_in else stacks(orbits, ground.group)


@torch.no_grad()
def orbits(saes: Sequence[SAE | OneMatrix], ground: OrbitGround, seed: int, repeat: int) -> list[Metrics | str]:
    """Reconstruction and sparsity over all poses, what stays of the code, and parameters, matrices included.

    Also, where the SAE has one: the accuracy of its pose, and the variance that it explains if it is told how the
    stored pose was turned (``explained_variance_known_pose``). Of a group crosscoder all of an orbit is reconstructed,
    which is also what it reads; the others read one activation. ``equivariance_error`` is that of the reconstruction.
    """
    group, held = ground.group, ground.world(seed).held
    matrices = fitted(ground, seed)

    def measure(sae: SAE | OneMatrix) -> Metrics:
        inputs = in_all_poses(sae, held, ground)
        x = inputs.flatten(0, 1)
        z, x_hat = sae.encode(x), sae(x)
        posed = x_hat.view_as(inputs)[..., : ground.d_in]
        found = {"explained_variance": explained_variance(x, x_hat), "l0": l0(z), "alive": alive(z)}
        found |= code_invariance(z.unflatten(0, inputs.shape[:2]))
        found |= {"equivariance_error": equivariance_error(posed, matrices, group)}
        found |= {"parameters": sum(p.numel() for p in sae.parameters())}
        if isinstance(sae, EquivariantSAE):
            found["pose_accuracy"] = pose_accuracy(sae.pose(x).unflatten(0, inputs.shape[:2]), group)
            if sae.mode == "invariant" and not sae.random_pose:
                canonical = sae.decode(z).view_as(inputs)
                told = torch.einsum("gij,ngj->ngi", sae.representation(), canonical)
                found["explained_variance_known_pose"] = explained_variance(x, told.flatten(0, 1))
        return found

    return each(measure, saes)


@torch.no_grad()
def orbit_recovery(saes: Sequence[SAE | OneMatrix], ground: OrbitGround, seed: int, repeat: int) -> list[Metrics | str]:
    """Directions and detection of planted features, in whichever pose."""
    world = ground.world(seed)

    def measure(sae: SAE | OneMatrix) -> Metrics:
        inputs, features = in_all_poses(sae, world.held, ground), in_all_poses(sae, world.features, ground)
        z = sae.encode(inputs.flatten(0, 1)).unflatten(0, inputs.shape[:2])
        directions = {"orbit_mmcs": orbit_mmcs(sae.W_dec, features), "orbit_mcc": orbit_mcc(sae.W_dec, features)}
        return directions | {"f1": top1_f1(z, world.truth)}

    return each(measure, saes)


@torch.no_grad()
def orbit_probes(saes: Sequence[SAE | OneMatrix], ground: OrbitGround, seed: int, repeat: int) -> list[Metrics | str]:
    """What probes read off the codes of held-out images; off the activations themselves (``..._dense``); and off what a
    fitted matrix makes of one of them without any training for symmetry (``probing_f1_pooled``, see `pooled`)."""
    group, world = ground.group, ground.world(seed)
    rho = group.representation(fitted(ground, seed))

    def probed(z: Float[Tensor, "n group d"]) -> Metrics:
        return orbit_probing(z, world.labels, repeat)

    def of_activations() -> Metrics:
        found = {f"{name}_dense": value for name, value in probed(world.held).items()}
        turned = pooled(world.held, rho, lambda x: x, torch.mean)
        return found | {"probing_f1_dense_pooled": probed(turned)["probing_f1"]}

    dense = ground.prepared(("probes", seed, repeat), of_activations)

    def measure(sae: SAE | OneMatrix) -> Metrics:
        inputs = in_all_poses(sae, world.held, ground)
        found = probed(sae.encode(inputs.flatten(0, 1)).unflatten(0, inputs.shape[:2])) | dense
        if sae.d_in == ground.d_in:
            found["probing_f1_pooled"] = probed(pooled(world.held, rho, sae.encode, torch.amax))["probing_f1"]
        return found

    return each(measure, saes)


def pooled(
    orbits: Float[Tensor, "n group d_in"],
    rho: Float[Tensor, "group d_in d_in"],
    encode: Callable[[Tensor], Tensor],
    pool: Callable[..., Tensor],
) -> Float[Tensor, "n group d"]:
    """``pool_q encode(rho(g_q) a)`` of each activation: of what the matrices make of it, none but itself is read."""
    return pool(torch.stack([encode(orbits.flatten(0, 1) @ M.T) for M in rho]), dim=0).unflatten(0, orbits.shape[:2])


def fitted(ground: OrbitGround, seed: int) -> Float[Tensor, "generators d_in d_in"]:
    """The least-squares matrices of the training orbits."""
    return ground.prepared(("matrices", seed), lambda: ground.group.fit(ground.world(seed).train))


@torch.no_grad()
def one_matrix(saes: Sequence[SAE | OneMatrix], ground: OrbitGround, seed: int, repeat: int) -> list[Metrics | str]:
    """What a matrix explains of how held-out activations turn: one fitted to the training's, or an E-SAE's own."""

    def measure(sae: SAE | OneMatrix) -> Metrics:
        if isinstance(sae, OneMatrix):
            world = ground.world(seed, sae.network)
            return sae(world.train, world.held, ground.group, seed)
        if not isinstance(sae, EquivariantSAE):
            raise ValueError(f"{sae.name} has no matrix")
        error = order_error(sae.matrices[0], ground.group.order)
        return map_r2(ground.world(seed).held, sae.matrices, ground.group) | {"order_error": error}

    return each(measure, saes)


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
    "orbits": orbits,
    "orbit_recovery": orbit_recovery,
    "orbit_probing": orbit_probes,
    "matrix": one_matrix,
    "latent_distances": task(lambda on, seed: LatentDistances(on.model, on.site, on.texts["test"], seed=seed)),
    "autointerp": task(lambda on, seed: Autointerp(on.model, on.site, on.texts["test"], seed=seed)),
}
"""Name -> measurement, repeated with other seeds of its own."""
CONSISTENCY = "consistency"
"""The measurement that trains a twin of each SAE; it has no repetitions."""
