"""Shapes are drawn as they are labelled, and turned images are images of turned shapes."""

import math

import pytest
import torch

from sae_lib.shapes import COLOURS, KINDS, PLACES, SCALES, Shapes, colours, draw_shapes, shape, stroke


def shapes_in_the_middle(turns: int = 0, size: int = 24) -> torch.Tensor:
    """How much of each pixel each kind covers, slightly beside the middle, so that no pixel's ink is a matter of
    rounding."""
    kinds = torch.arange(len(KINDS))
    centre = torch.tensor([[0.013, 0.007]]) @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]]).matrix_power(turns)
    return shape(
        kinds, centre.expand(len(kinds), 2), torch.full((len(kinds),), 0.3), torch.full_like(kinds, turns), size
    )


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_turned_shape_is_drawn_as_the_turned_image(turns):
    upright = shapes_in_the_middle()
    assert 0.1 < upright.mean() < 0.3
    assert torch.allclose(shapes_in_the_middle(turns), upright.rot90(turns, (1, 2)), atol=1e-5)


@pytest.mark.parametrize(("kind", "poses"), [("disc", 1), ("bar", 2), *((kind, 4) for kind in KINDS[2:])])
def test_a_disc_has_one_pose_a_bar_two_and_every_other_shape_four(kind, poses):
    number = torch.tensor([KINDS.index(kind)])
    options = torch.zeros(1, 2), torch.tensor([0.3])
    drawn = [shape(number, *options, torch.tensor([turns]), 24) for turns in range(4)]
    different = [a for i, a in enumerate(drawn) if all((a - b).abs().max() > 0.5 for b in drawn[:i])]
    assert len(different) == poses
    assert sum(torch.allclose(drawn[0], b, atol=1e-5) for b in drawn) == 4 // poses


def test_each_turn_is_its_own_where_images_turn_differently():
    kinds, centre, radius = torch.tensor([3, 3, 3]), torch.zeros(3, 2), torch.full((3,), 0.3)
    drawn = shape(kinds, centre, radius, torch.tensor([0, 1, 3]), 24)
    assert torch.allclose(drawn[1], drawn[0].rot90(1, (0, 1)), atol=1e-5)
    assert torch.allclose(drawn[2], drawn[0].rot90(3, (0, 1)), atol=1e-5)


def test_ink_adds_up_to_the_area():
    radius = torch.tensor([0.3, 0.3])
    drawn = shape(torch.tensor([0, 1]), torch.tensor([[0.1, -0.1], [0.03, 0.02]]), radius, torch.tensor([0, 0]), 48)
    between = ((drawn > 0.01) & (drawn < 0.99)).sum((1, 2))  # the outline is as broad as a pixel
    assert between[1].item() == pytest.approx(2 * (1.9 + 0.6) * 0.3 * 48, rel=0.1)
    areas = drawn.mean((1, 2)).tolist()
    assert areas[0] == pytest.approx(math.pi * (0.85 * 0.3) ** 2, rel=0.01)
    assert areas[1] == pytest.approx(1.9 * 0.6 * 0.3**2, rel=0.03)


def test_up_is_up_and_right_is_right():
    arrow = shape(
        torch.tensor([KINDS.index("arrow")]), torch.tensor([[0.2, 0.1]]), torch.tensor([0.25]), torch.tensor([0]), 24
    )
    rows, columns = arrow[0].sum(1), arrow[0].sum(0)
    assert (columns * torch.arange(24)).sum() / columns.sum() == pytest.approx(11.5 + 0.2 * 24, abs=0.05)
    assert rows[:9].max() > 2 * rows[10:].max()  # the head is above


def test_a_stroke_by_hand():
    ends = torch.tensor([[[-0.25, 0.125], [0.25, 0.125]], [[0.125, 0.125], [0.125, 0.125]]])
    level, dot = stroke(ends, torch.tensor([0.125, 0.125]), size=4)  # pixels lie at -3/8, -1/8, 1/8, 3/8
    # one pixel of ink where the middle runs through, half where the outline does; round ends reach 1/8 further
    assert torch.allclose(level[1], torch.tensor([0.5, 1.0, 1.0, 0.5]))
    assert torch.allclose(level[0, 1:3], torch.tensor([0.0, 0.0]))
    assert torch.allclose(dot[1], torch.tensor([0.0, 0.0, 1.0, 0.0]))


def test_labels_say_what_is_drawn():
    drawn = draw_shapes(600, seed=1, clutter=0)
    saturation = drawn.pixels.amax(1) - drawn.pixels.amin(1)  # of a grey background, none
    strongest = drawn.pixels.flatten(2)[torch.arange(600), :, saturation.flatten(1).argmax(1)]
    for number, colour in enumerate([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 1]]):
        found = strongest[drawn.colour == number]
        pure = (found - found.amin(1, keepdim=True)) / (found.amax(1) - found.amin(1))[:, None]
        assert (pure.round() == torch.tensor(colour)).all(), COLOURS[number]
    ink = saturation.sum((1, 2)) / saturation.amax((1, 2))
    assert all(
        ink[(drawn.kind == 0) & (drawn.scale == s)].max() < 1.6 * ink[(drawn.kind == 0) & (drawn.scale == s)].min()
        for s in range(3)
    )
    means = [ink[drawn.scale == scale].mean() for scale in range(len(SCALES))]
    assert means == sorted(means)
    assert means[2] > 2 * means[0]


def test_a_quarter_turn_moves_the_shape_to_the_next_place():
    drawn = draw_shapes(200, seed=2, clutter=0, roam=1.0)
    saturation = drawn.pixels.amax(1) - drawn.pixels.amin(1)
    disc = drawn.kind == 0  # whose centre is the centre of its ink
    for turns in range(4):
        turned = saturation[disc].rot90(turns, (1, 2))
        grid = torch.arange(24) - 11.5
        right = (turned.sum(1) * grid).sum(1) > 0
        above = (turned.sum(2) * -grid).sum(1) > 0
        found = torch.where(above, (~right).long(), 2 + right.long())
        assert torch.equal(found, (drawn.place[disc] + turns) % len(PLACES))


def test_the_seed_decides_every_pixel_and_classes_are_even():
    one, again, other = draw_shapes(1500, seed=3), draw_shapes(1500, seed=3), draw_shapes(1500, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one.pixels[0], other.pixels[0])
    assert one.pixels.shape == (1500, 3, 24, 24)
    assert one.pixels.min() >= 0
    assert one.pixels.max() <= 1
    for label, names in zip(one[1:], (KINDS, COLOURS, SCALES, PLACES), strict=True):
        counts = label.bincount()
        assert len(counts) == len(names)
        assert counts.min() > 0.75 * 1500 / len(names)
    assert Shapes._fields == ("pixels", "kind", "colour", "scale", "place")


def test_shapes_stay_in_the_image_and_roam_as_far_as_they_are_let():
    for roam in (0.0, 0.25, 1.0):
        drawn = draw_shapes(400, seed=6, clutter=0, roam=roam)
        ink = (drawn.pixels.amax(1) - drawn.pixels.amin(1))[drawn.kind == 0]
        centres = (ink.sum(1) * (torch.arange(24) - 11.5)).sum(1) / ink.sum((1, 2)) / 24
        assert centres.abs().max().item() == pytest.approx(0.37 * roam, abs=0.03)  # small discs go furthest
        whole = ink.sum((1, 2)) / ink.amax((1, 2))
        assert whole.min() > 0.9 * 24**2 * torch.pi * (0.85 * 0.12) ** 2  # nothing is cut off


def test_clutter_is_behind_the_shape_and_everywhere():
    plain, full = draw_shapes(2000, seed=5, clutter=0, roam=1.0), draw_shapes(2000, seed=5, clutter=12, roam=1.0)
    # what has its colour is the shape, and it is drawn as it was without clutter
    shown = (plain.pixels - plain.pixels.amin((1, 2, 3), keepdim=True)).amax(1) > 0.35
    assert torch.equal(plain.kind, full.kind)
    marked = ((full.pixels - full.pixels.mean(1, keepdim=True)).abs().amax(1) < 1e-5) & ~shown
    ink = torch.where(marked, full.pixels[:, 0], torch.nan)
    assert ink.nanmean(0).std() < 0.01  # no place has more of it
    assert torch.where(marked, full.pixels[:, 0] - full.pixels[:, 0].amin((1, 2))[:, None, None], 0).amax() > 0.4


def test_dots_and_strokes_are_half_of_the_clutter_each():
    drawn = draw_shapes(500, seed=7, clutter=1).pixels, draw_shapes(500, seed=7, clutter=0).pixels
    marked = ((drawn[0] - drawn[1]).abs().amax(1) > 0.02).sum((1, 2)).float()
    assert marked.max() <= 9  # the first mark is a dot, of a radius of at most 0.035 * 24 pixels


def test_colours_by_hand():
    hue, one = torch.tensor([0.0, 1 / 6, 2 / 3, 11 / 12]), torch.ones(4)
    found = colours(hue, torch.tensor([1.0, 1.0, 0.5, 1.0]), one)
    expected = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.5, 0.5, 1.0], [1.0, 0.0, 0.5]])
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        ({"n": 0}, "n must be an integer of at least 1, got 0"),
        ({"n": 5, "size": 4}, "size must be an integer of at least 8, got 4"),
        ({"n": 5, "clutter": -1}, "clutter must be an integer of at least 0, got -1"),
        ({"n": 5, "roam": 2.0}, r"roam must be in \[0, 1\], got 2.0"),
        ({"n": 2.5}, "n must be an integer of at least 1, got 2.5"),
    ],
)
def test_numbers_out_of_range_are_refused(as_a_user, wrong, rule):
    with pytest.raises(ValueError, match=rule):
        draw_shapes(**wrong)
