"""Finite groups: the transformations of an input, and matrices that do the same to its activations.

A cyclic group C_n has one generator, the turn r: n turns are none. A dihedral group D_n has a mirror s too, with
``s s = 1`` and ``s r s = r^-1``. Its element number ``i = f n + p`` is ``g_i = r^p s^f``: first the mirror, if f is 1,
then p turns. An *orbit* holds what becomes of one input under all elements, in this order; the first is the input as
it is stored. Chapter `equivariant`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

RIDGE = 1e-4
"""Pull of a fitted matrix towards the identity, in units of the mean squared activation of a dimension: dimensions
that never vary are left alone, and the matrix has an inverse."""
SINGULAR = 1e-6
"""A matrix whose smallest singular value is below this share of its largest has no inverse that could be used."""


class Moments(NamedTuple):
    """Sums over the activations of orbits, all that a least-squares fit reads; the sums of two sets add up.

    Attributes:
        count: number of activations.
        total: their sum.
        products: sum of ``a a^T``.
        turned: of each generator g, sum of ``a(g x) a(x)^T``.
    """

    count: Float[Tensor, ""]
    total: Float[Tensor, " d_in"]
    products: Float[Tensor, "d_in d_in"]
    turned: Float[Tensor, "generators d_in d_in"]


class Group:
    """C_n, or D_n with reflections, and how it acts on a batch of inputs. Chapter `equivariant`.

    Args:
        order: n, how many turns are none; at least 2.
        reflections: whether the mirror belongs to it.
        turn: one turn of a batch of inputs (n, ...). By default that of square images (..., h, h), by a quarter
            (order 4) or a half (order 2), exactly; other orders must be given theirs.
        flip: the mirror of a batch of inputs; by default that of images, left to right.

    Attributes:
        size: number of elements.
        generators: 1 or 2.

    Raises:
        ValueError: if the order is not an integer of at least 2.

    >>> Group(4, reflections=True).product(4, 1)  # a turn, then the mirror: s r = r^-1 s = r^3 s
    7
    """

    def __init__(
        self,
        order: int = 4,
        reflections: bool = False,
        turn: Callable[[Tensor], Tensor] | None = None,
        flip: Callable[[Tensor], Tensor] | None = None,
    ):
        if isinstance(order, bool) or not isinstance(order, int) or order < 2:
            raise ValueError(
                f"order of a group must be an integer of at least 2, got {order!r}: without turns, use TopK"
            )
        self.order, self.reflections = order, bool(reflections)
        self.size, self.generators = order * (1 + self.reflections), 1 + self.reflections
        self._turn, self._flip = turn, flip

    def __repr__(self) -> str:
        return f"Group(order={self.order}, reflections={self.reflections})"

    # The group itself -------------------------------------------------------------------------------------------------

    def product(self, i: int, j: int) -> int:
        """The number of ``g_i g_j``: first ``g_j``, then ``g_i``."""
        (f, p), (h, q) = divmod(i, self.order), divmod(j, self.order)
        return (f + h) % 2 * self.order + (p + (-q if f else q)) % self.order

    @cached_property
    def inverse(self) -> list[int]:
        """Of each element, the number of the one that undoes it."""
        return [next(j for j in range(self.size) if not self.product(i, j)) for i in range(self.size)]

    @cached_property
    def targets(self) -> list[list[int]]:
        """Of each generator g, the number of ``g g_i`` for every i."""
        numbers = [1, self.order][: self.generators]
        return [[self.product(g, i) for i in range(self.size)] for g in numbers]

    # What it does to inputs -------------------------------------------------------------------------------------------

    def act(self, element: int, inputs: Float[Tensor, "n *shape"]) -> Float[Tensor, "n *shape"]:
        """Inputs, or maps (n, channels, h, h) of them, transformed by one element."""
        if element >= self.order:
            inputs = torch.flip(inputs, (-1,)) if self._flip is None else self._flip(inputs)
        for _ in range(element % self.order):
            inputs = self._once(inputs)
        return inputs

    def _once(self, inputs: Tensor) -> Tensor:
        """One turn."""
        if self._turn is not None:
            return self._turn(inputs)
        if self.order not in (2, 4):
            raise ValueError(f"images turn exactly by quarters and halves, got order {self.order}: give Group its turn")
        if inputs.ndim < 3 or inputs.shape[-1] != inputs.shape[-2]:
            raise ValueError(f"images must be square, (..., h, h), got {tuple(inputs.shape)}: crop or pad them")
        return torch.rot90(inputs, 4 // self.order, (-2, -1))

    def orbit(self, inputs: Float[Tensor, "n *shape"]) -> Float[Tensor, "n group *shape"]:
        """What becomes of each input under every element.

        Raises:
            ValueError: if images are not square, or a generator does not close: ``order`` turns, two mirrors, or
                mirror, turn, mirror, turn must give back the inputs.
        """
        turned = self.act(1, inputs)
        must_close("turn", self.order, self._once(self.act(self.order - 1, inputs)), inputs)
        if self.reflections:
            mirrored = self.act(self.order, inputs)
            must_close("flip", 2, self.act(self.order, mirrored), inputs)
            must_close("turn and flip", 2, self.act(self.order, self._once(self.act(self.order, turned))), inputs)
        return torch.stack([self.act(element, inputs) for element in range(self.size)], 1)

    # What it does to activations --------------------------------------------------------------------------------------

    def checked(self, orbits: Float[Tensor, "n group d_in"]) -> Float[Tensor, "n group d_in"]:
        """`orbits`, if they have one activation for each element."""
        if orbits.ndim != 3 or orbits.shape[1] != self.size:
            raise ValueError(
                f"orbits must have shape (n, group={self.size}, d_in) for {self}, got {tuple(orbits.shape)}: "
                "one activation for each element of the group"
            )
        return orbits

    def representation(self, matrices: Float[Tensor, "generators d_in d_in"]) -> Float[Tensor, "group d_in d_in"]:
        """The matrix of every element, ``R^p S^f``, from those of the generators, R and S.

        Raises:
            ValueError: if there is not one square matrix for each generator.
        """
        self.checked_shape(matrices)
        elements = [torch.eye(matrices.shape[1], dtype=matrices.dtype, device=matrices.device)]
        for _ in range(self.order - 1):
            elements.append(elements[-1] @ matrices[0])
        if self.reflections:
            elements += [turned @ matrices[1] for turned in elements]
        return torch.stack(elements)

    def checked_shape(self, matrices: Tensor) -> Float[Tensor, "generators d_in d_in"]:
        """`matrices`, if there is a square one for each generator."""
        if matrices.ndim != 3 or len(matrices) != self.generators or matrices.shape[1] != matrices.shape[2]:
            raise ValueError(
                f"matrices must have shape (generators={self.generators}, d_in, d_in), got {tuple(matrices.shape)}"
            )
        return matrices

    def checked_matrices(
        self, matrices: Float[Tensor, "generators d_in d_in"], closes: bool = False
    ) -> Float[Tensor, "generators d_in d_in"]:
        """`matrices`, if they have inverses; with `closes`, if they obey the group's law.

        Raises:
            ValueError: if they do not, or are of another number or shape.
        """
        self.checked_shape(matrices)
        sizes = torch.linalg.svdvals(matrices.detach().double())
        if not (sizes[:, -1] > SINGULAR * sizes[:, 0]).all():
            raise ValueError(
                f"a matrix must have an inverse, got singular values from {sizes[:, 0].max():.3g} to "
                f"{sizes[:, -1].min():.3g}: leave out what never varies, or fit it by Group.fit"
            )
        if closes:
            R, one = matrices[0], torch.eye(matrices.shape[1]).to(matrices)
            must_close("turn", self.order, torch.linalg.matrix_power(R, self.order), one)
            if self.reflections:
                must_close("flip", 2, matrices[1] @ matrices[1], one)
                must_close("turn and flip", 2, matrices[1] @ R @ matrices[1] @ R, one)
        return matrices

    def regular(self, d_in: int, generator: torch.Generator) -> Float[Tensor, "generators d_in d_in"]:
        """Matrices that obey the group's law: as many copies of the regular representation as fit, in a random basis.

        In the regular representation the elements themselves are the coordinates, and an element permutes them. What
        does not fit into whole copies stays as it is.

        Raises:
            ValueError: if not one copy fits.
        """
        if d_in < self.size:
            raise ValueError(f"d_in must be at least the group's size {self.size}, got {d_in}: nothing would turn")
        copies = d_in // self.size
        basis = torch.linalg.qr(torch.randn(d_in, d_in, generator=generator)).Q
        matrices = torch.eye(d_in).repeat(self.generators, 1, 1)
        for matrix, targets in zip(matrices, self.targets, strict=True):
            permuted = torch.eye(self.size)[targets].T  # column i has its 1 in row g g_i
            matrix[: copies * self.size, : copies * self.size] = torch.block_diag(*[permuted] * copies)
        return basis @ matrices @ basis.T

    # One matrix a generator, by least squares -------------------------------------------------------------------------

    def moments(self, orbits: Float[Tensor, "n group d_in"]) -> Moments:
        """Of all activations, and of all pairs that a generator leads from one to the other."""
        a = self.checked(orbits)
        rows = a.flatten(0, 1)
        turned = [a[:, targets].flatten(0, 1).T @ rows for targets in self.targets]
        return Moments(a.new_tensor(float(len(rows))), rows.sum(0), rows.T @ rows, torch.stack(turned))

    def fit(self, orbits: Float[Tensor, "n group d_in"]) -> Float[Tensor, "generators d_in d_in"]:
        """``M = argmin sum |a(g x) - M a(x)|^2`` over all orbits and poses, for each generator g (64 bits inside).

        Raises:
            ValueError: if the orbits have another size than the group.
        """
        return least_squares(self.moments(orbits.double())).to(orbits.dtype)


def least_squares(moments: Moments) -> Float[Tensor, "generators d_in d_in"]:
    """The matrices with the least squared error, and a small ridge towards the identity (`RIDGE`)."""
    d_in = len(moments.total)
    one = torch.eye(d_in).to(moments.products)
    ridge = RIDGE * moments.products.trace().clamp(min=torch.finfo(one.dtype).tiny) / d_in * one
    return torch.linalg.solve(moments.products + ridge, (moments.turned + ridge).mT).mT


def explained(moments: Moments, matrices: Float[Tensor, "generators d_in d_in"]) -> Float[Tensor, ""]:
    """R2 of matrices on the activations whose moments these are: 1 less squared error over spread; at most 1."""
    count, total, products, turned = moments
    size = products.trace()
    errors = [
        size - 2 * (M * pairs).sum() + (M @ products * M).sum() for M, pairs in zip(matrices, turned, strict=True)
    ]
    spread = (size - total.square().sum() / count).clamp(min=torch.finfo(size.dtype).tiny)
    return 1 - torch.stack(errors).mean() / spread


def must_close(name: str, times: int, back: Tensor, inputs: Tensor) -> None:
    """Refuse a generator that does not lead back."""
    if back.shape != inputs.shape or not torch.allclose(back, inputs, rtol=1e-4, atol=1e-4):
        how = tuple(back.shape) if back.shape != inputs.shape else f"{(back - inputs).abs().max():.3g} away"
        raise ValueError(
            f"{name} must give back what it was given after {times} times, got {how}: is the group's order right?"
        )
