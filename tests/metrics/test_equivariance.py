"""What is measured of codes in several poses: numbers by hand, and controls that must fail."""

import math

import pytest
import torch

from sae_lib.groups import Group
from sae_lib.metrics.equivariance import (
    OneMatrix,
    code_invariance,
    equivariance_error,
    map_r2,
    orbit_probing,
    order_error,
    pose_accuracy,
    shuffled,
    single_f1,
    top1_f1,
)
from sae_lib.orbits import PlantedOrbits

FOUR, MIRRORED = Group(4), Group(4, reflections=True)
QUARTER = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
ORBIT = torch.tensor([[[2.0, 0.0], [0.0, 2.0], [-2.0, 0.0], [0.0, -2.0]]])


# One matrix -----------------------------------------------------------------------------------------------------------


def test_r2_is_of_the_pairs_that_so_many_turns_make():
    found = map_r2(ORBIT, 0.5 * QUARTER[None], FOUR)  # off by 1 of 2, by 1.5, by 1.75; the mean is 0, the spread 4
    expected = {"map_r2": 1 - 1 / 4, "map_r2_2": 1 - 2.25 / 4, "map_r2_3": 1 - 3.0625 / 4}
    assert found == pytest.approx(expected)


def test_the_spread_is_about_the_mean_of_all_activations():
    found = map_r2(ORBIT + torch.tensor([10.0, 0.0]), torch.eye(2)[None], FOUR)
    assert found == pytest.approx({"map_r2": -1, "map_r2_2": -3, "map_r2_3": -1})


@pytest.mark.parametrize("group", [FOUR, MIRRORED, Group(3)], ids=str)
def test_planted_matrices_explain_everything_and_close(group):
    world = PlantedOrbits(20, 24, group=group)
    found = map_r2(world.sample(50)[0], world.matrices, group)
    assert list(found) == ["map_r2", *(f"map_r2_{p}" for p in range(2, group.order))] + (
        ["map_r2_mirror"] if group.reflections else []
    )
    assert list(found.values()) == pytest.approx([1.0] * len(found), abs=1e-6)
    assert order_error(world.matrices[0], group.order) < 1e-5
    assert order_error(world.matrices[0], group.order - 1) > 0.5
    if group.reflections:
        assert map_r2(world.sample(50)[0], world.matrices[[0, 0]], group)["map_r2_mirror"] < 0.5


def test_the_error_of_the_order_is_relative_to_the_width():
    assert order_error(torch.zeros(5, 5), 4) == pytest.approx(1)
    assert order_error(torch.diag(torch.tensor([2.0, 1.0])), 2) == pytest.approx(3 / math.sqrt(2))


def test_one_matrix_is_fitted_on_some_orbits_and_tested_on_others():
    world = PlantedOrbits(8, 8, active=2)
    (train, _), (held, _) = world.sample(300, 0), world.sample(300, 1)
    own, control = OneMatrix()(train, held, FOUR), OneMatrix(pairs="shuffled")(train, held, FOUR)
    assert own["map_r2"] > 0.999
    assert own["map_r2_3"] > 0.999
    assert own["order_error"] < 0.01
    assert control["map_r2"] < 0.5
    other = PlantedOrbits(8, 8, active=2, seed=1).sample(300, 1)[0]
    assert OneMatrix()(train, other, FOUR)["map_r2"] < 0.5


def test_shuffled_poses_are_those_of_other_inputs():
    orbits = torch.stack(torch.broadcast_tensors(torch.arange(50)[:, None], torch.arange(4)[None]), 2).float()
    found = shuffled(orbits, 3)
    assert torch.equal(found[:, :, 1], orbits[:, :, 1])
    assert [sorted(pose.tolist()) for pose in found[:, :, 0].unbind(1)] == [list(range(50))] * 4
    assert (found[:, 0, 0] == found[:, 1, 0]).float().mean() < 0.2
    assert not torch.equal(found, shuffled(orbits, 4))


@pytest.mark.parametrize("arguments", [{"pairs": "random"}, {"network": "small"}])
def test_one_matrix_of_an_unknown_kind_is_refused(arguments):
    with pytest.raises(ValueError, match="must be one of"):
        OneMatrix(**arguments)


def test_outputs_are_equivariant_where_turning_before_and_after_are_the_same():
    assert equivariance_error(ORBIT, QUARTER[None], FOUR) == pytest.approx(0)
    assert equivariance_error(ORBIT, torch.eye(2)[None], FOUR) == pytest.approx(2)  # 8 for each, over 4
    assert math.isnan(equivariance_error(torch.ones(3, 4, 2), QUARTER[None], FOUR))


# Codes in several poses -----------------------------------------------------------------------------------------------


def test_invariance_is_a_mean_over_all_pairs_of_poses():
    z = torch.tensor([[[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]]])
    found = code_invariance(z)
    assert found["code_cosine"] == pytest.approx((math.sqrt(0.5) + 0 + math.sqrt(0.5)) / 3)
    assert found["code_jaccard"] == pytest.approx((1 / 2 + 0 + 1 / 2) / 3)


def test_an_empty_code_shares_nothing_and_two_of_them_do_not_count():
    z = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]], [[0.0, 5.0], [0.0, 1.0]]])
    assert code_invariance(z) == {"code_cosine": 0.5, "code_jaccard": 0.5}
    assert all(map(math.isnan, code_invariance(torch.zeros(2, 4, 3)).values()))


def test_a_pose_follows_from_that_of_the_stored_input():
    every = torch.arange(8)
    right = torch.tensor([[MIRRORED.product(i, q) for i in every.tolist()] for q in every.tolist()])
    assert pose_accuracy(right, MIRRORED) == 1
    assert pose_accuracy(torch.zeros(5, 4, dtype=torch.long), FOUR) == 0
    wrong = right.clone()
    wrong[0, 5] = 0
    assert pose_accuracy(wrong, MIRRORED) == pytest.approx(1 - 1 / 56)
    from_the_right = torch.tensor([[MIRRORED.product(q, i) for i in every.tolist()] for q in every.tolist()])
    assert pose_accuracy(from_the_right, MIRRORED) < 1


def test_a_latent_of_one_pose_of_four_has_an_f1_of_two_fifths():
    truth = torch.tensor([[1.0], [2.0], [0.0]])
    one_pose = torch.zeros(3, 4, 2)
    one_pose[:2, 0, 1] = 3.0
    assert top1_f1(one_pose, truth) == pytest.approx(0.4)  # 2 of 2 predicted, of 8
    assert top1_f1((truth[:, None] * torch.ones(3, 4, 1)), truth) == 1


def test_the_best_latent_counts_and_features_that_never_fire_do_not(as_a_user):
    z = torch.zeros(4, 2, 3)
    z[:, :, 0] = 1.0  # fires everywhere
    z[0, :, 1] = 1.0
    truth = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert top1_f1(z, truth) == pytest.approx((1 + 2 / 3) / 2)  # the third by latent 0 or 1: 2 * 4 / 12, 2 * 2 / 6
    with pytest.raises(ValueError, match="truth must have a row for each of the 4 inputs, got 3"):
        top1_f1(z, truth[:3])


# Probes ---------------------------------------------------------------------------------------------------------------


def codes(n=200, group=4, seed=0):
    """Labels 0 to 2, and codes of one latent a label."""
    label = torch.randint(3, (n,), generator=torch.Generator().manual_seed(seed))
    z = torch.nn.functional.one_hot(label, 3).float()[:, None].expand(-1, group, -1)
    return z, label


def test_a_code_that_holds_the_label_in_all_poses_is_read_perfectly_and_tells_no_pose():
    z, label = codes()
    found = orbit_probing(z, {"kind": label})
    for name in ("probing_f1", "probing_f1_kind", "probing_f1_other_poses", "probing_top1_f1"):
        assert found[name] == 1, name
    assert found["pose_probe"] == pytest.approx(0.25)


def test_a_code_that_holds_the_label_in_the_stored_pose_alone_fails_in_the_others():
    z, label = codes()
    z = torch.cat([z * (torch.arange(4) == 0)[:, None], z * (torch.arange(4) > 0)[:, None]], dim=2)
    found = orbit_probing(z, {"kind": label})
    assert found["probing_f1"] == 1  # a probe of all poses has both parts
    assert found["probing_f1_other_poses"] < 0.4
    assert found["probing_top1_f1"] == pytest.approx(6 / 7)  # three poses of four: recall 3/4
    assert found["pose_probe"] > 0.4  # the stored pose can be told from the others


def test_a_random_label_cannot_be_read_since_no_input_is_in_both_parts():
    z, _ = codes(n=400)
    z = z + 3 * torch.randn(400, 1, 3, generator=torch.Generator().manual_seed(1))  # every input is unlike all others
    z = torch.cat([z, torch.randn(400, 1, 60, generator=torch.Generator().manual_seed(3)).expand(-1, 4, -1)], dim=2)
    label = torch.randint(2, (400,), generator=torch.Generator().manual_seed(2))
    assert 0.35 < orbit_probing(z, {"random": label})["probing_f1"] < 0.65


def test_numbers_are_means_over_labels_and_the_seed_is_that_of_the_split(as_a_user):
    z, label = codes()
    noise = torch.randint(2, (200,), generator=torch.Generator().manual_seed(2))
    found = orbit_probing(z, {"kind": label, "noise": noise})
    assert found["probing_f1"] == pytest.approx((1 + found["probing_f1_noise"]) / 2)
    assert orbit_probing(z, {"noise": noise}, seed=0) == orbit_probing(z, {"noise": noise}, seed=0)
    assert orbit_probing(z, {"noise": noise}, seed=0) != orbit_probing(z, {"noise": noise}, seed=1)
    for wrong in ({}, {"kind": label[:5]}):
        with pytest.raises(ValueError, match="labels must be one or more, each of the 200 inputs"):
            orbit_probing(z, wrong)


def test_the_single_latent_is_chosen_on_the_training_rows():
    lives = torch.tensor([[True, False], [True, True], [False, True], [False, False]])
    labels = torch.tensor([0, 0, 1, 1])
    assert single_f1(lives, labels, lives, labels) == pytest.approx((1 + 1 / 2) / 2)
    assert single_f1(lives, labels, lives.flip(1), labels) == pytest.approx((1 / 2 + 0) / 2)  # the same two latents
