"""E-SAE: what its two modes promise on activations that a group turns exactly, and what it refuses."""

import pytest
import torch

import sae_lib
from sae_lib import Batch, EquivariantSAE
from sae_lib.groups import Group

D_IN, FEATURES = 16, 12


class World:
    """Sparse features whose activations exact matrices turn; `broken` adds activations of the pose alone."""

    def __init__(self, group=None, broken=0.0, seed=0):
        self.group, self.broken = group or Group(4), broken
        generator = torch.Generator().manual_seed(seed)
        self.matrices = self.group.regular(D_IN, generator)
        self.directions = torch.nn.functional.normalize(torch.randn(FEATURES, D_IN, generator=generator), dim=1)
        self.of_poses = torch.randn(self.group.size, FEATURES, D_IN, generator=generator) / D_IN**0.5

    def orbits(self, n, seed=0):
        generator = torch.Generator().manual_seed(seed)
        c = (torch.rand(n, FEATURES, generator=generator) < 0.15) * (0.5 + torch.rand(n, FEATURES, generator=generator))
        turned = torch.einsum("gij,nj->ngi", self.group.representation(self.matrices), c @ self.directions)
        return (1 - self.broken) * turned + self.broken * torch.einsum("nf,gfi->ngi", c, self.of_poses)

    def batches(self, n, size=64):
        orbits = self.orbits(n * size, seed=1).split(size)
        return [Batch(part[:, 0], orbit=part) for part in orbits]


def trained(world=None, steps=300, **arguments):
    world = world or World()
    settings = {"k": 3, "group_order": world.group.order, "reflections": world.group.reflections} | arguments
    sae = EquivariantSAE(D_IN, FEATURES, **settings)
    sae_lib.train(sae, world.batches(steps), tokens=64 * steps)
    return sae


def cosines(sae, orbits):
    """Mean cosine of the codes of two poses."""
    z = sae.encode(orbits.flatten(0, 1)).view(len(orbits), orbits.shape[1], -1)
    return torch.nn.functional.cosine_similarity(z[:, :1], z[:, 1:], dim=2)[(z[:, 0] > 0).any(1)].mean()


def left_over(x, x_hat):
    return ((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()).item()


@pytest.mark.parametrize("group", [Group(4), Group(2), Group(4, reflections=True)], ids=repr)
def test_with_exact_matrices_a_search_gives_every_pose_the_same_code_and_tells_the_poses_apart(group):
    world = World(group)
    sae, orbits = trained(world, steps=150, matrix="fitted"), world.orbits(200, seed=2)
    with torch.no_grad():
        sae.matrices.copy_(world.matrices)
        orbits = orbits[orbits[:, 0].norm(dim=1) > 0]
        assert cosines(sae, orbits) > 0.999
        pose = sae.pose(orbits.flatten(0, 1)).view(len(orbits), group.size)
    expected = torch.tensor([[group.product(p, int(q)) for p in range(group.size)] for q in pose[:, 0]])
    assert (pose == expected).double().mean() > 0.95


def test_turning_the_input_turns_the_reconstruction_of_a_search():
    world = World()
    sae = trained(world, steps=50)
    with torch.no_grad():
        sae.matrices.copy_(world.matrices)
        orbits = world.orbits(100, seed=3)
        orbits = orbits[orbits[:, 0].norm(dim=1) > 0]  # nothing has no pose
        turned = sae(orbits[:, 1])
        assert torch.allclose(turned, sae(orbits[:, 0]) @ world.matrices[0].T, atol=1e-4)


def test_a_random_canonical_pose_makes_the_invariant_mode_blind_to_the_pose():
    world = World()
    orbits = world.orbits(300, seed=2)
    fixed, drawn = (trained(world, mode="invariant", random_pose=random) for random in (False, True))
    assert cosines(drawn, orbits) > 0.9 > cosines(fixed, orbits)
    assert fixed.loss(Batch(orbits[:, 0], orbit=orbits)).terms["invariance"] > 0


def test_poses_are_drawn_anew_for_each_step_and_the_orbit_goes_on_from_there():
    sae = EquivariantSAE(3, 4, 1, reflections=True, mode="invariant", random_pose=True)
    numbers = torch.arange(8.0)[None, :, None].expand(50, -1, 3)
    sae.before_step(0.0)
    first = sae.from_another_pose(numbers)[:, :, 0].int().tolist()
    assert {row[0] for row in first} == set(range(8))
    assert all(row == [sae.group.product(i, row[0]) for i in range(8)] for row in first)
    assert sae.from_another_pose(numbers)[:, :, 0].int().tolist() == first
    sae.before_step(0.0)
    assert sae.from_another_pose(numbers)[:, :, 0].int().tolist() != first


@pytest.mark.parametrize("matrix", ["learned", "fitted", "frozen"])
def test_the_matrix_is_found(matrix):
    world = World()
    sae = trained(world, steps=60, matrix=matrix)
    assert torch.allclose(sae.matrices, world.matrices, atol=0.02)
    assert sae.equivariance > 0.99


def test_what_is_fitted_goes_on_being_fitted_and_what_is_frozen_does_not():
    world = World(broken=0.3)
    seen = torch.cat([batch.orbit for batch in world.batches(10)])
    fitted, frozen = (trained(world, steps=10, matrix=matrix).matrices for matrix in ("fitted", "frozen"))
    assert torch.allclose(fitted, world.group.fit(seen), atol=1e-3)
    assert torch.allclose(frozen, world.group.fit(seen[:64]), atol=1e-3)
    assert not torch.allclose(fitted, frozen, atol=0.02)


def test_another_run_looks_at_its_own_activations():
    sae = trained(World(), steps=5)
    assert sae.seen == 5 * 64 * 4
    sae_lib.train(sae, World(broken=1.0).batches(5), tokens=64 * 5)
    assert sae.seen == 5 * 64 * 4
    assert sae.equivariance < 0.5


def test_a_long_run_stops_looking():
    assert trained(World(), steps=20).seen == 13 * 64 * 4  # the first above 200 activations a dimension


def test_the_loss_gives_the_reconstruction_of_the_stored_pose():
    sae, batch = trained(steps=20), World().batches(1)[0]
    assert torch.allclose(sae.loss(batch).x_hat, sae(batch.x), atol=1e-6)


def test_a_fit_that_shrinks_all_that_it_cannot_predict_is_no_mistake():
    unrelated = torch.randn(64, 4, D_IN, generator=torch.Generator().manual_seed(0))
    unrelated[..., 0] = unrelated[:, :1, 0] * torch.tensor([1.0, 0.0, 0.0, 0.0])  # M has to send it to nothing
    sae = EquivariantSAE(D_IN, FEATURES, 3)
    sae_lib.train(sae, [Batch(unrelated[:, 0], orbit=unrelated)] * 2, tokens=128)
    assert torch.isfinite(sae(unrelated[:, 1])).all()


def test_known_matrices_can_be_put_in():
    world = World()
    sae = EquivariantSAE(D_IN, FEATURES, 3, matrix="identity")
    with torch.no_grad():
        sae.matrices.copy_(world.matrices)
    sae_lib.train(sae, world.batches(5), tokens=64 * 5)
    assert torch.equal(sae.matrices, world.matrices)


def test_controls_keep_their_matrices_and_the_random_ones_close():
    world = World()
    sae = trained(world, steps=5, matrix="random")
    sae.group.checked_matrices(sae.matrices, closes=True)
    assert (sae.matrices - world.matrices).norm() > 1
    assert torch.equal(trained(world, steps=5, matrix="identity").matrices[0], torch.eye(D_IN))


def test_equivariance_falls_as_the_model_loses_it_and_the_search_loses_nothing_to_topk():
    found = [trained(World(broken=b), steps=30).equivariance.item() for b in (0.0, 0.3, 0.6, 1.0)]
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.99
    assert found[-1] < 0.5
    world = World(broken=1.0)
    x = world.orbits(500, seed=4).flatten(0, 1)
    topk = sae_lib.TopKSAE(D_IN, FEATURES, 3)
    sae_lib.train(topk, [batch.orbit.flatten(0, 1) for batch in world.batches(300)], tokens=4 * 64 * 300)
    assert left_over(x, trained(world)(x)) < left_over(x, topk(x)) + 0.02


def test_without_equivariance_the_invariant_mode_is_topk_on_all_poses():
    sae = EquivariantSAE(D_IN, FEATURES, 3, mode="invariant")
    batch = World().batches(1)[0]
    sae.start(batch, 1000)
    sae.equivariance.fill_(0.0)
    terms = sae.loss(batch).terms
    topk = sae_lib.TopKSAE(D_IN, FEATURES, 3)
    topk.load_state_dict({k: v for k, v in sae.state_dict().items() if k in topk.state_dict()}, strict=False)
    assert terms["invariance"] == 0
    assert torch.isclose(terms["reconstruction"], topk.loss(Batch(batch.orbit.flatten(0, 1))).terms["reconstruction"])


def test_the_losses_of_the_invariant_mode_are_those_worked_by_hand():
    sae = EquivariantSAE(2, 1, 1, group_order=2, mode="invariant", adaptive=False, equivariance_coeff=0.5)
    with torch.no_grad():  # one latent, that reads and writes the first coordinate; the turn swaps the two
        sae.W_enc.copy_(torch.tensor([[1.0], [0.0]]))
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0]]))
        sae.matrices.copy_(torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]))
    orbit = torch.tensor([[[3.0, 1.0], [1.0, 3.0]]])
    terms = sae.loss(Batch(orbit[:, 0], orbit=orbit)).terms
    assert terms["invariance"] == (1 + (3 - 1) ** 2 + 1) / 2  # r = (3, 0) and (1, 0), both for (3, 1)
    assert terms["reconstruction"] == 0.5 * (1 + 1 + (3 - 1) ** 2) / 2  # (3, 0) for (3, 1), (0, 1) for (1, 3)
    assert terms["matrix"] == 0


def test_the_poses_history_counts_latents_an_activation():
    run = sae_lib.train(EquivariantSAE(D_IN, FEATURES, 3), World().batches(3), tokens=192)
    assert 0 < run.history[0]["l0"] <= 3


def test_bad_arguments_and_orbits_are_refused(as_a_user):
    with pytest.raises(ValueError, match=r"order of a group must be an integer of at least 2, got 1"):
        EquivariantSAE(8, 16, 2, group_order=1)
    with pytest.raises(ValueError, match="mode must be one of invariant, search, got 'orbit'"):
        EquivariantSAE(8, 16, 2, mode="orbit")
    with pytest.raises(ValueError, match="matrix must be one of learned, .* got 'best'"):
        EquivariantSAE(8, 16, 2, matrix="best")
    with pytest.raises(ValueError, match=r"k must be an integer in \[1, d_sae=16\], got 17"):
        EquivariantSAE(8, 16, 17)
    sae = EquivariantSAE(8, 16, 2)
    with pytest.raises(ValueError, match=r"orbits must have shape \(n, group=4, d_in\).*got \(64, 3, 8\)"):
        sae_lib.train(sae, [Batch(torch.rand(64, 8), orbit=torch.rand(64, 3, 8))], tokens=64)
    with pytest.raises(ValueError, match="equivariant needs orbit from the stream"):
        sae_lib.train(sae, [torch.rand(64, 8)], tokens=64)
    sae = EquivariantSAE(D_IN, FEATURES, 3, matrix="identity")
    with torch.no_grad():
        sae.matrices[0, 3] = 0
    with pytest.raises(ValueError, match="a matrix must have an inverse"):
        sae_lib.train(sae, World().batches(1), tokens=64)
