"""Images of shapes before clutter, drawn by a seed, every property of which is known. Chapter `equivariant`.

The paper trains on synthetic images of rotated shapes; how they were made was not available, so these are our own.

An image shows one shape, upright: its **stored pose**. A quarter turn, `torch.rot90`, moves no pixel off the grid, so
all four poses of an image are exact. What a turn leaves alone are *pose-free* labels (kind, colour, scale); where in
the image the shape stands turns with it, a *posed* label.

A shape is where a function of the place is negative: the function is about the distance to the outline, in units of the
shape's radius, so that the ink of a pixel is 1/2 minus its distance in pixels, between 0 and 1. Pixels lie
symmetrically about the centre, at (column + 1/2) / size - 1/2, so that a turned shape is drawn as the turned image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

IMAGES_AT_ONCE = 1000
"""Images that are drawn together."""


def box(x: Tensor, y: Tensor, left: float, right: float, bottom: float, top: float) -> Tensor:
    """Negative inside a rectangle."""
    return torch.maximum(torch.maximum(left - x, x - right), torch.maximum(bottom - y, y - top))


def disc(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.85


def bar(x: Tensor, y: Tensor) -> Tensor:
    return box(x, y, -0.95, 0.95, -0.3, 0.3)


def triangle(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(-0.7 - y, (1.8 * x.abs() + y - 0.95) / math.hypot(1.8, 1))


def arrow(x: Tensor, y: Tensor) -> Tensor:
    head = torch.maximum(-y, (1.2 * x.abs() + y - 1) / math.hypot(1.2, 1))
    return torch.minimum(head, box(x, y, -0.25, 0.25, -0.95, 0.1))


def tee(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(box(x, y, -0.85, 0.85, 0.3, 0.9), box(x, y, -0.3, 0.3, -0.9, 0.4))


def ell(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(box(x, y, -0.65, -0.05, -0.9, 0.9), box(x, y, -0.65, 0.75, -0.9, -0.3))


def crescent(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(torch.hypot(x, y) - 0.9, 0.75 - torch.hypot(x, y - 0.5))


def dome(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(torch.hypot(x, y + 0.4) - 0.95, -0.4 - y)


OUTLINES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    outline.__name__: outline for outline in (disc, bar, triangle, arrow, tee, ell, crescent, dome)
}
KINDS = tuple(OUTLINES)
"""A disc looks the same however it is turned, a bar after a half turn; all others have four poses."""
COLOURS = ("red", "yellow", "green", "cyan", "blue", "magenta")
"""Hues of 0, 60, ... 300 degrees, each with up to 20 more or less."""
SCALES = ("small", "medium", "large")
"""Radii of 0.12 to 0.16, 0.17 to 0.21, and 0.22 to 0.26 of the image's side."""
PLACES = ("upper right", "upper left", "lower left", "lower right")
"""The quarter of the image where the shape's centre is; each quarter turn leads to the next."""


class Shapes(NamedTuple):
    """Images and what they show.

    Attributes:
        pixels: red, green and blue, in [0, 1]; stored pose: shapes are upright.
        kind: of the shape, in `KINDS`; pose-free.
        colour: of the shape, in `COLOURS`; pose-free.
        scale: of the shape, in `SCALES`; pose-free.
        place: of the shape, in `PLACES`: p quarter turns of the image add p, modulo 4.
    """

    pixels: Float[Tensor, "images 3 size size"]
    kind: Int[Tensor, " images"]
    colour: Int[Tensor, " images"]
    scale: Int[Tensor, " images"]
    place: Int[Tensor, " images"]


def draw_shapes(n: int, seed: int = 0, size: int = 24, clutter: int = 3, roam: float = 0.25) -> Shapes:
    """Images of one shape each: kind, colour and scale equally often, the rest continuous. Chapter `equivariant`.

    Within a class hue and radius vary; so do saturation, brightness, the background's grey, and the position, such that
    the whole shape is in the image. Where shapes may be anywhere, no linear probe reads their kind, neither off pixels
    nor off a small code, so by default they do not roam far. The clutter behind the shape is dots and strokes of grey,
    anywhere and in all directions: a turn makes clutter that is as likely.

    Args:
        n: images, at least 1.
        seed: of everything that is drawn.
        size: pixels on a side, at least 8.
        clutter: dots and strokes in an image, at least 0.
        roam: how far centres are from the image's centre, in [0, 1]: a share of the room that there is.

    Raises:
        ValueError: for a number out of range.
    """
    for name, value, least in (("n", n, 1), ("size", size, 8), ("clutter", clutter, 0)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    if not 0 <= roam <= 1:
        raise ValueError(f"roam must be in [0, 1], got {roam}")
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Float[Tensor, "n ..."]:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    kind, colour, scale = (torch.randint(len(names), (n,), generator=generator) for names in (KINDS, COLOURS, SCALES))
    radius = 0.12 + 0.05 * scale + uniform(0, 0.04)
    centre = uniform(-1, 1, 2) * roam * (0.5 - radius)[:, None]
    ink = colours((colour / len(COLOURS) + uniform(-1 / 18, 1 / 18)) % 1, uniform(0.6, 1), uniform(0.6, 1))
    grey = uniform(0, 0.2)
    ends = uniform(-0.5, 0.5, clutter, 1, 2) + uniform(-0.12, 0.12, clutter, 2, 2)
    ends[:, ::2, 1] = ends[:, ::2, 0]  # a dot is a stroke that ends where it starts
    width, shade = uniform(0.01, 0.035, clutter), uniform(0, 0.6, clutter)

    pixels = torch.empty(n, 3, size, size)
    for rows in tqdm(torch.arange(n).split(IMAGES_AT_ONCE), desc="shapes", unit="000", leave=False, delay=2):
        canvas = grey[rows, None, None, None].expand(-1, 3, size, size)
        for mark in range(clutter):
            covered = stroke(ends[rows, mark], width[rows, mark], size)[:, None]
            canvas = torch.lerp(canvas, shade[rows, mark, None, None, None], covered)
        covered = shape(kind[rows], centre[rows], radius[rows], torch.zeros_like(rows), size)[:, None]
        pixels[rows] = torch.lerp(canvas, ink[rows, :, None, None], covered)
    left, below = centre[:, 0] < 0, centre[:, 1] < 0
    return Shapes(pixels, kind, colour, scale, place=torch.where(below, 3 - left.long(), left.long()))


def shape(
    kind: Int[Tensor, " images"],
    centre: Float[Tensor, "images 2"],
    radius: Float[Tensor, " images"],
    turns: Int[Tensor, " images"],
    size: int,
) -> Float[Tensor, "images size size"]:
    """How much of each pixel a shape covers, in [0, 1].

    Args:
        kind: in `KINDS`.
        centre: to the right of the image's centre, and above it, in sides of the image.
        radius: in sides of the image.
        turns: quarter turns of the shape about its own centre, counter-clockwise.
        size: pixels on a side.
    """
    x, y = places(centre, size)
    for _ in range(int(turns.max())):  # a point of the turned shape is one of the upright shape, turned back
        turned = (turns > 0)[:, None, None]
        x, y, turns = torch.where(turned, y, x), torch.where(turned, -x, y), turns - 1
    distance = torch.empty_like(x)
    for number, outline in enumerate(OUTLINES.values()):
        chosen, unit = kind == number, radius[kind == number, None, None]
        distance[chosen] = outline(x[chosen] / unit, y[chosen] / unit) * unit
    return coverage(distance, size)


def stroke(
    ends: Float[Tensor, "images 2 2"], width: Float[Tensor, " images"], size: int
) -> Float[Tensor, "images size size"]:
    """How much of each pixel a stroke with round ends covers, in [0, 1]; `width` is half of its breadth."""
    x, y = places(ends[:, 0], size)
    dx, dy = (ends[:, 1] - ends[:, 0]).T[:, :, None, None]
    along = ((x * dx + y * dy) / (dx * dx + dy * dy).clamp_min(1e-12)).clamp(0, 1)
    return coverage(torch.hypot(x - along * dx, y - along * dy) - width[:, None, None], size)


def places(origin: Float[Tensor, "images 2"], size: int) -> tuple[Tensor, Tensor]:
    """The pixels' places to the right of each image's origin and above it, (images, size, size), in sides."""
    grid = (2 * torch.arange(size) + 1 - size) / (2 * size)  # of opposite pixels, the same number with another sign
    x, y = origin[:, :, None, None].unbind(1)
    return (grid[None, None, :] - x).expand(-1, size, size), (-grid[None, :, None] - y).expand(-1, size, size)


def coverage(distance: Float[Tensor, "images size size"], size: int) -> Float[Tensor, "images size size"]:
    """Of pixels at a distance from an outline, negative inside, in sides of the image."""
    return (0.5 - distance * size).clamp(0, 1)


def colours(
    hue: Float[Tensor, " images"], saturation: Float[Tensor, " images"], value: Float[Tensor, " images"]
) -> Float[Tensor, "images 3"]:
    """Red, green and blue of a hue, a saturation and a brightness, all in [0, 1].

    >>> colours(torch.tensor([1 / 3]), torch.tensor([1.0]), torch.tensor([0.5])).round(decimals=3).abs().tolist()
    [[0.0, 0.5, 0.0]]
    """
    away = (6 * hue[:, None] - torch.tensor([0.0, 2.0, 4.0]) + 3) % 6 - 3  # from red, green, blue; in sixths of a turn
    return value[:, None] * (1 - saturation[:, None] * (away.abs() - 1).clamp(0, 1))
