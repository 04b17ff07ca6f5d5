"""Planted orbits obey the group, and one set of orbits has three readings of the same inputs in the same order."""

import pytest
import torch

from sae_lib import TopKSAE, train
from sae_lib.groups import Group
from sae_lib.orbits import Orbits, PlantedOrbits, stacks

GROUPS = [Group(4), Group(3), Group(4, reflections=True)]


def acted(orbits, matrices, group):
    """What the planted matrices make of the stored pose."""
    return torch.einsum("gij,nj->ngi", group.representation(matrices), orbits[:, 0])


@pytest.mark.parametrize("group", GROUPS, ids=str)
@pytest.mark.parametrize("representation", ["regular", "rotations", "trivial"])
def test_poses_follow_from_the_stored_one_by_the_planted_matrices(representation, group):
    world = PlantedOrbits(20, 24, group=group, representation=representation, seed=1)
    orbits, _ = world.sample(30, seed=2)
    group.checked_matrices(world.matrices, closes=True)
    assert torch.allclose(orbits, acted(orbits, world.matrices, group), atol=1e-5)


def test_what_a_turn_leaves_as_it_is():
    fixed = {}
    for representation in ("regular", "rotations", "trivial"):
        R = PlantedOrbits(4, 8, representation=representation).matrices[0]
        fixed[representation] = 8 - int(torch.linalg.matrix_rank(R - torch.eye(8), atol=1e-4))
    assert fixed == {"regular": 2, "rotations": 0, "trivial": 8}


def test_activations_are_sums_of_the_directions_of_their_pose():
    world = PlantedOrbits(20, 8, active=3, broken=0.4, seed=1)
    orbits, coefficients = world.sample(2000, seed=2)
    for pose in range(4):
        assert torch.allclose(orbits[:, pose], coefficients @ world.turned[:, pose], atol=1e-5)
    fires = coefficients > 0
    assert fires.sum(1).float().mean() == pytest.approx(3, abs=0.15)
    assert 0.5 <= coefficients[fires].min() < 0.55
    assert 1.45 < coefficients[fires].max() <= 1.5
    assert torch.allclose(world.turned.norm(dim=2), torch.ones(20, 4))
    assert torch.allclose(world.turned[:, 0], world.directions)


def test_features_in_poses_of_their_own_leave_orbits_of_the_group():
    group = Group(4, reflections=True)
    world = PlantedOrbits(6, 16, active=2, group=group, own_poses=True, seed=3)
    orbits, coefficients = world.sample(200, seed=2)
    assert torch.allclose(orbits, acted(orbits, world.matrices, group), atol=1e-5)
    alone = (coefficients > 0).sum(1) == 1
    feature = coefficients[alone].argmax(1)
    near = torch.einsum("nd,ngd->ng", orbits[alone, 0], world.turned[feature]) / coefficients[alone].amax(1)[:, None]
    assert torch.allclose(near.amax(1), torch.ones(int(alone.sum())), atol=1e-5)
    assert near.argmax(1).unique().tolist() == list(range(8))  # in every pose there is, not in the stored one alone


def test_a_world_is_broken_by_degrees():
    def likeness(broken):  # of the turned direction with what the matrix makes of the stored one
        world = PlantedOrbits(500, 32, broken=broken)
        return torch.einsum("ngd,ngd->ng", world.turned, acted(world.turned, world.matrices, Group()))[:, 1:].mean()

    assert likeness(0.0) == pytest.approx(1, abs=1e-5)
    assert likeness(0.5) == pytest.approx(0.5**0.5, abs=0.02)  # two directions at right angles, as a rule
    assert likeness(1.0) == pytest.approx(0, abs=0.02)


def test_noise_has_the_norm_that_is_asked_for_in_each_pose():
    clean, noisy = (PlantedOrbits(20, 8, noise=noise).sample(3000)[0] for noise in (0.0, 0.5))
    assert (noisy - clean).square().sum(2).mean(0).sqrt().tolist() == pytest.approx([0.5] * 4, abs=0.02)


def test_seeds_decide_world_and_samples():
    one, again, other = (PlantedOrbits(8, 8, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.sample(5, 3)[0], again.sample(5, 3)[0])
    assert not torch.equal(one.directions, other.directions)
    assert not torch.equal(one.matrices, other.matrices)
    assert not torch.equal(one.sample(5, 3)[1], one.sample(5, 4)[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"active": 9}, r"active must be in \(0, n_features=8\], got 9"),
        ({"broken": 1.1}, r"broken must be in \[0, 1\], got 1.1"),
        ({"noise": -1}, "noise must be a finite number of at least 0, got -1"),
        ({"d_in": 3}, "d_in must be at least the group's size 4, got 3"),
        ({"d_in": 7, "representation": "rotations"}, "d_in must be even for rotations, which turn planes, got 7"),
        ({"representation": "spin"}, "representation must be one of regular, rotations, trivial, got 'spin'"),
        ({"n_features": 0}, "n_features must be an integer at least 1, got 0"),
    ],
)
def test_worlds_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PlantedOrbits(**{"n_features": 8, "d_in": 8} | arguments)


# The stream -----------------------------------------------------------------------------------------------------------


def numbered(n=6, group=4):
    """Orbits that say which they are: input i in pose p is (i, p)."""
    return torch.stack(torch.broadcast_tensors(torch.arange(n)[:, None], torch.arange(group)[None]), 2).float()


def taken(stream, batches):
    iteration = iter(stream)
    return [next(iteration) for _ in range(batches)]


def test_the_three_readings_give_the_same_inputs_in_the_same_order():
    orbit, apart, stacked = (
        taken(Orbits(numbered(), 2, reading, seed=5), 7) for reading in ("orbit", "apart", "stacked")
    )
    for whole, rows, stack in zip(orbit, apart, stacked, strict=True):
        assert whole.orbit.shape == (2, 4, 2)
        assert torch.equal(whole.x, whole.orbit[:, 0])
        assert whole.x[:, 1].tolist() == [0, 0]
        assert torch.equal(rows.x, whole.orbit.flatten(0, 1))
        assert stack.x.shape == (2, 8)
        assert torch.equal(stack.x[:, ::2], whole.orbit[:, :, 0])
        turns = stack.x[:, 1::2]
        assert torch.equal(turns, (turns[:, :1] + torch.arange(4)) % 4)  # from some pose on
    assert {int(stack.x[i, 1]) for stack in stacked for i in (0, 1)} == {0, 1, 2, 3}


def test_an_epoch_has_every_input_once_and_the_next_another_order():
    order = [int(batch.x[0, 0]) for batch in taken(Orbits(numbered(), 1), 12)]
    assert sorted(order[:6]) == sorted(order[6:]) == list(range(6))
    assert order[:6] != order[6:]
    assert order != [int(batch.x[0, 0]) for batch in taken(Orbits(numbered(), 1, seed=1), 12)]
    assert {int(i) for batch in taken(Orbits(numbered(), 4), 20) for i in batch.x[:, 0]} == set(range(6))


def test_a_stack_is_the_orbit_of_the_pose_that_it_begins_with():
    for group in GROUPS:
        orbits = numbered(3, group.size)
        found = stacks(orbits, group)
        assert torch.equal(found[:, 0], orbits.flatten(1))
        for q in range(group.size):
            expected = [group.product(i, q) for i in range(group.size)]
            assert found[1, q, 1::2].tolist() == expected
        seen = torch.cat([batch.x for batch in taken(Orbits(orbits, 3, "stacked", group=group), 40)])
        assert len(torch.unique(seen, dim=0)) == 3 * group.size  # each input from each pose on, and nothing else
        assert {*map(tuple, seen.tolist())} == {*map(tuple, found.flatten(0, 1).tolist())}


def test_truth_goes_with_its_input():
    truth = numbered()[:, 0] * 10
    for reading in ("orbit", "apart", "stacked"):
        for batch in taken(Orbits(numbered(), 2, reading, truth), 4):
            assert torch.equal(batch.truth[:, 0], 10 * batch.x[:, 0])


def test_a_stream_goes_on_where_it_stood():
    for reading in ("orbit", "apart", "stacked"):
        stream = Orbits(numbered(), 2, reading, seed=3)
        iteration = iter(stream)
        for _ in range(4):
            next(iteration)
        state = stream.state_dict()
        expected = [next(iteration).x for _ in range(5)]
        again = Orbits(numbered(), 2, reading, seed=3)
        again.load_state_dict(state)
        assert all(torch.equal(batch.x, x) for batch, x in zip(taken(again, 5), expected, strict=True))
        assert not torch.equal(taken(again, 1)[0].x, expected[0])  # the next iteration starts anew
        for other in (Orbits(numbered() + 1, 2, seed=3), Orbits(numbered(), 3, seed=3), Orbits(numbered(), 2, seed=4)):
            with pytest.raises(ValueError, match="state must be that of a stream of the same orbits"):
                other.load_state_dict(state)


def test_an_interrupted_training_ends_with_the_same_bits(tmp_path):
    orbits, _ = PlantedOrbits(8, 8).sample(64)
    whole, parted = (TopKSAE(32, 8, 2) for _ in range(2))
    train(whole, Orbits(orbits, 16, "stacked"), 320, seed=1)

    class Cut(Exception):
        pass

    def cut(history):
        if history[-1]["step"] >= 9:
            raise Cut

    with pytest.raises(Cut):
        train(parted, Orbits(orbits, 16, "stacked"), 320, seed=1, watch=cut, checkpoint=tmp_path, checkpoint_every=64)
    fresh = TopKSAE(32, 8, 2)
    train(fresh, Orbits(orbits, 16, "stacked"), 320, seed=1, checkpoint=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), fresh.state_dict().values(), strict=True))


def test_streams_of_the_same_orbits_are_known_as_such():
    one, other, more = Orbits(numbered(), 2), Orbits(numbered(), 3, "apart", seed=7), Orbits(numbered(7), 2)
    assert one.fingerprint == other.fingerprint != more.fingerprint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"orbits": torch.zeros(6, 4)}, r"orbits must have shape \(n, group, d_in\), got \(6, 4\)"),
        ({"group": Group(4, reflections=True)}, r"orbits must have shape \(n, group=8, d_in\)"),
        ({"batch_size": 7}, r"batch_size must be an integer in \[1, number of orbits=6\], got 7"),
        ({"reading": "turned"}, "reading must be one of orbit, apart, stacked, got 'turned'"),
        ({"truth": torch.zeros(5, 1)}, "truth must have a row for each of the 6 orbits, got 5"),
    ],
)
def test_streams_that_cannot_be_are_refused(arguments, message, as_a_user):
    with pytest.raises(ValueError, match=message):
        Orbits(**{"orbits": numbered(), "batch_size": 2} | arguments)
