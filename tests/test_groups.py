"""Groups: their law, their action on images, and matrices that follow it."""

import pytest
import torch

from sae_lib.groups import Group, explained, least_squares

GROUPS = [Group(2), Group(3), Group(4), Group(2, reflections=True), Group(3, reflections=True), Group(4, True)]
ON_IMAGES = [group for group in GROUPS if group.order != 3]
each_group = pytest.mark.parametrize("group", GROUPS, ids=repr)


def turned_orbits(group, n=300, d_in=16, seed=0):
    """Activations that exact matrices turn, and these matrices."""
    generator = torch.Generator().manual_seed(seed)
    matrices = group.regular(d_in, generator)
    x = torch.randn(n, d_in, generator=generator) + 1
    return torch.einsum("gij,nj->ngi", group.representation(matrices), x), matrices


def test_a_dihedral_group_has_the_products_worked_by_hand():
    group = Group(4, reflections=True)
    assert group.size == 8
    assert group.product(1, 1) == 2
    assert group.product(3, 1) == 0
    assert group.product(1, 4) == 5  # the mirror, then a turn: r s
    assert group.product(4, 1) == 7  # a turn, then the mirror: s r = r^3 s
    assert group.inverse == [0, 3, 2, 1, 4, 5, 6, 7]  # a turned mirror undoes itself


@each_group
def test_the_product_is_associative_and_inverses_undo(group):
    numbers = range(group.size)
    assert all(
        group.product(group.product(i, j), k) == group.product(i, group.product(j, k))
        for i in numbers
        for j in numbers
        for k in numbers
    )
    assert all(group.product(i, group.inverse[i]) == group.product(group.inverse[i], i) == 0 for i in numbers)


def test_one_turn_of_an_image_is_a_quarter_against_the_clock_and_the_mirror_swaps_left_and_right():
    image = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    orbit = Group(4, reflections=True).orbit(image)[0, :, 0]
    assert orbit[0].tolist() == [[1, 2], [3, 4]]
    assert orbit[1].tolist() == [[2, 4], [1, 3]]
    assert orbit[2].tolist() == [[4, 3], [2, 1]]
    assert orbit[4].tolist() == [[2, 1], [4, 3]]
    assert orbit[5].tolist() == [[1, 3], [2, 4]]  # the mirrored image, turned


@pytest.mark.parametrize("group", ON_IMAGES, ids=repr)
def test_turning_the_pose_of_an_orbit_is_multiplying_its_number(group):
    images = torch.rand(3, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    orbit = group.orbit(images)
    for i in range(group.size):
        for j in range(group.size):
            assert torch.equal(group.act(i, orbit[:, j]), orbit[:, group.product(i, j)])


@each_group
def test_matrices_of_elements_multiply_as_the_elements_do(group):
    matrices = group.regular(17, torch.Generator().manual_seed(0))  # 17: some dimensions are left over
    group.checked_matrices(matrices, closes=True)
    elements = group.representation(matrices)
    for i in range(group.size):
        for j in range(group.size):
            assert torch.allclose(elements[i] @ elements[j], elements[group.product(i, j)], atol=1e-4)
    assert not torch.allclose(matrices[0], torch.eye(17), atol=0.1)


@each_group
def test_a_fit_finds_the_matrices_that_made_the_orbits(group):
    orbits, matrices = turned_orbits(group)
    fitted = group.fit(orbits)
    assert torch.allclose(fitted, matrices, atol=2e-3)
    assert explained(group.moments(orbits.double()), fitted.double()) > 0.9999


def test_a_fit_of_unrelated_activations_explains_next_to_nothing():
    group, orbits = Group(4), torch.randn(2000, 4, 8, generator=torch.Generator().manual_seed(0))
    moments = group.moments(orbits.double())
    assert explained(moments, least_squares(moments)) < 0.01
    assert explained(moments, torch.eye(8).double()[None]) < -0.9  # a and g a are independent: twice the variance


def test_r2_by_moments_is_one_less_error_over_spread():
    group, orbits = Group(4), torch.randn(50, 4, 3, generator=torch.Generator().manual_seed(1)).double() + 2
    M = torch.randn(1, 3, 3, generator=torch.Generator().manual_seed(2)).double()
    error = (orbits.roll(-1, 1) - orbits @ M[0].T).square().sum()
    spread = (orbits - orbits.mean((0, 1))).square().sum()
    assert torch.isclose(explained(group.moments(orbits), M), 1 - error / spread)


def test_a_fit_leaves_dimensions_that_never_vary_alone_and_has_an_inverse():
    orbits, _ = turned_orbits(Group(4), d_in=8)
    padded = torch.cat([orbits, torch.zeros(len(orbits), 4, 3)], 2)
    M = Group(4).fit(padded)[0]
    assert torch.allclose(M[8:, 8:], torch.eye(3), atol=1e-5)
    assert torch.linalg.svdvals(M)[-1] > 0.1


def test_other_groups_take_their_own_generators():
    rows = torch.arange(12.0).view(2, 6)
    orbit = Group(3, turn=lambda x: x.roll(2, -1)).orbit(rows)
    assert orbit[0].tolist() == [[0, 1, 2, 3, 4, 5], [4, 5, 0, 1, 2, 3], [2, 3, 4, 5, 0, 1]]


@pytest.mark.parametrize("order", [1, 0, -4, 2.0, True])
def test_orders_below_two_are_refused(order, as_a_user):
    with pytest.raises(ValueError, match="order of a group must be an integer of at least 2"):
        Group(order)


def test_bad_inputs_are_refused_with_rule_and_value(as_a_user):
    with pytest.raises(ValueError, match=r"images must be square.*\(2, 1, 4, 5\)"):
        Group(4).orbit(torch.zeros(2, 1, 4, 5))
    with pytest.raises(ValueError, match="order 3: give Group its turn"):
        Group(3).orbit(torch.zeros(2, 1, 4, 4))
    with pytest.raises(ValueError, match=r"turn must give back what it was given after 4 times"):
        Group(4, turn=lambda x: x.roll(1, -1)).orbit(torch.arange(5.0).repeat(2, 1))
    with pytest.raises(ValueError, match="^flip must give back what it was given after 2 times"):
        Group(4, True, flip=lambda x: x.roll(1, -1)).orbit(torch.rand(2, 1, 4, 4))
    with pytest.raises(ValueError, match="turn and flip must give back"):
        Group(4, True, flip=lambda x: -x, turn=lambda x: x.rot90(1, (-2, -1))).orbit(torch.rand(2, 1, 4, 4) + 1)
    with pytest.raises(ValueError, match=r"orbits must have shape \(n, group=4, d_in\).*\(5, 3, 2\)"):
        Group(4).fit(torch.zeros(5, 3, 2))
    with pytest.raises(ValueError, match="a matrix must have an inverse, got singular values from 1 to 0"):
        Group(4).checked_matrices(torch.diag(torch.tensor([1.0, 0.0]))[None])
    with pytest.raises(ValueError, match="a matrix must have an inverse"):
        Group(4).checked_matrices(torch.diag(torch.tensor([1.0, 1e-8]))[None])
    with pytest.raises(ValueError, match=r"generators=2, d_in, d_in\), got \(1, 3, 3\)"):
        Group(4, True).representation(torch.eye(3)[None])
    with pytest.raises(ValueError, match="turn must give back what it was given after 4 times"):
        Group(4).checked_matrices(2 * torch.eye(3)[None], closes=True)
    with pytest.raises(ValueError, match="d_in must be at least the group's size 8, got 7"):
        Group(4, True).regular(7, torch.Generator())
