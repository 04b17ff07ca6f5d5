"""Measurements of SAEs on orbits: each SAE is read as it was trained, and told nothing that it would not know."""

import pytest
import torch

from sae_lib import EquivariantSAE, TopKSAE, train
from sae_lib.grounds import PlantedOrbitGround
from sae_lib.measures import MEASURES, fitted, in_all_poses, pooled
from sae_lib.metrics.equivariance import OneMatrix, orbit_probing
from sae_lib.orbits import stacks


@pytest.fixture(scope="module")
def ground() -> PlantedOrbitGround:
    return PlantedOrbitGround({"n_features": 8, "d_in": 8, "active": 2}, inputs=400, batch_size=32, held=100)


@pytest.fixture(scope="module")
def saes(ground) -> dict:
    made = {
        "invariant": (EquivariantSAE(8, 8, 2, mode="invariant"), "orbit"),
        "random pose": (EquivariantSAE(8, 8, 2, mode="invariant", random_pose=True), "orbit"),
        "search": (EquivariantSAE(8, 8, 2, mode="search"), "orbit"),
        "TopK": (TopKSAE(8, 16, 2), ""),
        "crosscoder": (TopKSAE(32, 8, 2), "stacked"),
    }
    for sae, reading in made.values():
        train(sae, ground.stream(0, reading), 32 * 40 * (1 if reading else 4))
    return {name: sae for name, (sae, _) in made.items()} | {"matrix": OneMatrix()}


def measured(name, ground, saes):
    return dict(zip(saes, MEASURES[name](list(saes.values()), ground, 0, 0), strict=True))


def test_each_sae_reads_what_it_was_trained_on(ground, saes):
    held = ground.world(0).held
    assert torch.equal(in_all_poses(saes["TopK"], held, ground), held)
    assert torch.equal(in_all_poses(saes["crosscoder"], held, ground), stacks(held, ground.group))


def test_reconstruction_is_over_all_poses_and_parameters_count_the_matrix(ground, saes):
    found = measured("orbits", ground, saes)
    x = ground.world(0).held.flatten(0, 1)
    for name in ("invariant", "search", "TopK"):
        with torch.no_grad():
            left = (x - saes[name](x)).square().sum() / (x - x.mean(0)).square().sum()
        assert found[name]["explained_variance"] == pytest.approx(1 - left.item(), abs=1e-5)
        assert 0 < found[name]["l0"] <= 2
    assert found["TopK"]["parameters"] == 2 * 8 * 16 + 16 + 8
    assert found["search"]["parameters"] == 2 * 8 * 8 + 8 + 8 + 64
    assert found["crosscoder"]["parameters"] == 2 * 32 * 8 + 8 + 32  # 2 G d n + n + G d
    assert found["search"]["code_cosine"] > found["TopK"]["code_cosine"]
    assert found["matrix"] == "a matrix has no code"


def test_who_has_a_pose_is_asked_for_it_and_who_has_a_fixed_one_told(ground, saes):
    found = measured("orbits", ground, saes)
    assert {name for name in saes if "pose_accuracy" in found[name]} == {"invariant", "random pose", "search"}
    assert {name for name in saes if "explained_variance_known_pose" in found[name]} == {"invariant"}
    held, sae = ground.world(0).held, saes["invariant"]
    with torch.no_grad():
        told = torch.stack([sae.decode(sae.encode(held[:, p])) @ sae.representation()[p].T for p in range(4)], 1)
    left = (held - told).square().sum() / (held - held.mean((0, 1))).square().sum()
    assert found["invariant"]["explained_variance_known_pose"] == pytest.approx(1 - left.item(), abs=1e-5)
    assert found["search"]["pose_accuracy"] > 0.5


def test_planted_features_are_found_in_any_pose_by_latents_and_by_stacks_of_them(ground, saes):
    found = measured("orbit_recovery", ground, saes)
    features = ground.world(0).features
    exact = TopKSAE(8, 32, 2)
    exact.W_dec.data = features.flatten(0, 1).clone()
    stacked = TopKSAE(32, 8, 2)
    stacked.W_dec.data = stacks(features, ground.group)[:, 3].clone()
    for sae in (exact, stacked):
        (best,) = MEASURES["orbit_recovery"]([sae], ground, 0, 0)
        assert best["orbit_mmcs"] == pytest.approx(1, abs=1e-5)
        assert best["orbit_mcc"] == pytest.approx(1, abs=1e-5)
    assert found["search"]["f1"] > found["TopK"]["f1"]
    assert all(0 < found[name]["f1"] <= 1 for name in saes if name != "matrix")


def test_one_matrix_is_that_of_training_orbits_or_the_saes_own(ground, saes):
    found = measured("matrix", ground, saes)
    assert found["matrix"]["map_r2"] > 0.99
    assert found["search"]["map_r2"] > 0.9
    assert found["TopK"] == "topk has no matrix"
    (untrained,) = MEASURES["matrix"]([OneMatrix(network="untrained")], ground, 0, 0)
    assert untrained.startswith("planted orbits come from no network")


def test_pooled_codes_see_one_activation_and_what_the_matrices_make_of_it(ground, saes):
    held, rho = ground.world(0).held, ground.group.representation(fitted(ground, 0))
    with torch.no_grad():
        codes = pooled(held, rho, saes["TopK"].encode, torch.amax)
        moved = held.clone()
        moved[:, 0] = 0  # of other inputs
        assert torch.equal(codes[:, 1:], pooled(moved, rho, saes["TopK"].encode, torch.amax)[:, 1:])
    assert torch.allclose(codes, codes[:, :1].expand_as(codes), atol=0.02)  # planted: the matrices are exact
    by_hand = torch.stack([saes["TopK"].encode(held[:, 1] @ M.T) for M in rho]).amax(0)
    assert torch.equal(codes[:, 1], by_hand)


def test_probes_read_codes_activations_and_pooled_ones(ground, saes, monkeypatch):
    world = ground.world(0)
    labelled = world._replace(labels={"first": (world.truth[:, 0] > 0).long()})
    monkeypatch.setattr(ground, "world", lambda seed: labelled)
    found = measured("orbit_probing", ground, saes)
    dense = orbit_probing(world.held, labelled.labels, 0)
    z = saes["TopK"].encode(world.held.flatten(0, 1)).unflatten(0, (100, 4)).detach()
    assert found["TopK"].items() >= orbit_probing(z, labelled.labels, 0).items()
    for name, metrics in found.items():
        if name != "matrix":
            assert metrics["probing_f1_dense"] == dense["probing_f1"]
            assert ("probing_f1_pooled" in metrics) == (name != "crosscoder")
            assert "probing_f1_dense_pooled" in metrics
