"""Orbits: the activations of an input and of its transformed copies. Planted ones, and a stream of any. Chapter
`equivariant`.

    orbits[:, i] = a(g_i x)        the elements g_i of a group, in the order of `sae_lib.groups`; orbits[:, 0] is the
                                   input as it is stored

A planted world in which turning an input does to its activation what a matrix does, ``a(g x) = rho(g) a(x)``:

    a(x) = sum_i c_i v_i + noise   unit directions v_i, coefficients c_i of the few features that fire

and worlds in which it does not, by as much as one likes. Of the paper's own toy data no description was available:
this one is inferred.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sae_lib.data import Batch, seeded
from sae_lib.groups import Group
from sae_lib.sae import positive, whole

REPRESENTATIONS = ("regular", "rotations", "trivial")
READINGS = ("orbit", "apart", "stacked")


class PlantedOrbits:
    """Orbits made of known features: ``a(g x) = sum_i c_i rho(g) v_i + noise``. Chapter `equivariant`.

    Args:
        n_features: number of features, at least 1.
        d_in: width of the activations.
        active: mean number of features that fire in an input, above 0 and at most n_features. A feature that fires has
            a coefficient drawn evenly from 0.5 to 1.5.
        group: what the inputs are transformed by.
        representation: what turns do to activations, in a random orthonormal basis. ``regular``: as many copies of the
            regular representation as fit, each with one direction that stays as it is; ``rotations``: planes that turn
            by 2 pi / order, so that nothing stays as it is; ``trivial``: nothing moves.
        own_poses: whether each feature that fires stands in a pose of its own within the input. Then the input has no
            pose as a whole that could be undone.
        broken: from 0 to 1, how far the world is from equivariant: in a pose other than the stored one, a feature's
            direction is ``(1 - broken) rho(g) v_i + broken u``, made a unit, with a random unit u of that feature and
            pose alone.
        noise: root mean square norm of the Gaussian noise added to each activation, at least 0.
        seed: of directions and basis; samples have seeds of their own.

    Attributes:
        matrices: of the generators of the group.
        directions: ``v_i``, unit rows.
        turned: each feature's direction in each pose.

    Raises:
        ValueError: if an argument is out of its range, or the representation does not fit into d_in.
    """

    matrices: Float[Tensor, "generators d_in d_in"]
    directions: Float[Tensor, "n_features d_in"]
    turned: Float[Tensor, "n_features group d_in"]

    def __init__(
        self,
        n_features: int,
        d_in: int,
        active: float | int = 3,
        group: Group | None = None,
        representation: str = "regular",
        own_poses: bool = False,
        broken: float | int = 0.0,
        noise: float | int = 0.0,
        seed: int = 0,
    ):
        self.n_features, self.d_in, self.group = whole("n_features", n_features), whole("d_in", d_in), group or Group()
        if not 0 < active <= n_features:
            raise ValueError(f"active must be in (0, n_features={n_features}], got {active}")
        if not 0 <= broken <= 1:
            raise ValueError(f"broken must be in [0, 1], got {broken}")
        self.active, self.own_poses, self.noise = active, bool(own_poses), positive("noise", noise, or_zero=True)
        generator = seeded("orbits", seed)
        self.matrices = matrices_of(representation, self.group, d_in, generator)
        self.directions = F.normalize(torch.randn(n_features, d_in, generator=generator), dim=1)
        turned = torch.einsum("gij,nj->ngi", self.group.representation(self.matrices), self.directions)
        alone = F.normalize(torch.randn(turned.shape, generator=generator), dim=2)
        alone[:, 0] = self.directions
        self.turned = F.normalize((1 - broken) * turned + broken * alone, dim=2)

    def sample(self, n: int, seed: int = 0) -> tuple[Float[Tensor, "n group d_in"], Float[Tensor, "n n_features"]]:
        """The orbits of `n` inputs, and the coefficients that they are made of.

        Raises:
            ValueError: if `n` is below 1.
        """
        generator = seeded("samples of orbits", seed)
        size = whole("n", n), self.n_features
        fires = torch.rand(size, generator=generator) < self.active / self.n_features
        coefficients = fires * (0.5 + torch.rand(size, generator=generator))
        if self.own_poses:
            poses = torch.randint(self.group.size, size, generator=generator)
            orbits = sum(  # g_i v, of a feature in pose q, is g_i g_q v
                torch.einsum("nf,fgd->ngd", coefficients * (poses == q), self.turned[:, begun_at(self.group, q)])
                for q in range(self.group.size)
            )
        else:
            orbits = torch.einsum("nf,fgd->ngd", coefficients, self.turned)
        return orbits + self.noise / self.d_in**0.5 * torch.randn(orbits.shape, generator=generator), coefficients


def matrices_of(
    representation: str, group: Group, d_in: int, generator: torch.Generator
) -> Float[Tensor, "generators d_in d_in"]:
    """Of the generators, by the name of what they do."""
    if representation == "regular":
        return group.regular(d_in, generator)
    one = torch.eye(d_in)
    if representation == "trivial":
        return one.repeat(group.generators, 1, 1)
    if representation != "rotations":
        raise ValueError(f"representation must be one of {', '.join(REPRESENTATIONS)}, got {representation!r}")
    if d_in % 2:
        raise ValueError(f"d_in must be even for rotations, which turn planes, got {d_in}")
    angle = torch.tensor(2 * torch.pi / group.order, dtype=torch.float64)
    plane = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])]).float()
    planes = torch.stack([plane, torch.tensor([[1.0, 0.0], [0.0, -1.0]])])[: group.generators]
    basis = torch.linalg.qr(torch.randn(d_in, d_in, generator=generator)).Q
    return basis @ torch.stack([torch.block_diag(*[part] * (d_in // 2)) for part in planes]) @ basis.T


def begun_at(group: Group, pose: int) -> list[int]:
    """The numbers of ``g_0 g_q, g_1 g_q, ...``: where the orbit of ``g_q x`` stands in that of ``x``."""
    return [group.product(i, pose) for i in range(group.size)]


def stacks(orbits: Float[Tensor, "n group d"], group: Group) -> Float[Tensor, "n group group*d"]:
    """The orbit of every pose as one long row: number q is that of ``g_q x``, from ``g_q x`` itself on."""
    return torch.stack([orbits[:, begun_at(group, q)].flatten(1) for q in range(group.size)], 1)


class Orbits:
    """Endless batches of orbits that are held in memory, in a new random order in each epoch. Chapter `equivariant`.

    One set of orbits has three readings. They give the same inputs in the same order in the same steps:

    - ``orbit``: x is the stored pose, beside it the orbit, ``Batch(x (batch, d_in), orbit=(batch, group, d_in))``;
    - ``apart``: each pose is a row of its own, ``Batch(x (batch * group, d_in))``: data augmentation;
    - ``stacked``: the orbit is one row, ``Batch(x (batch, group * d_in))``, and begins at a pose drawn anew each time,
      as a user has inputs in any pose. A TopK SAE of such rows is the *group crosscoder* (Gorton 2024, arXiv
      2410.24184): one code, and an encoder and a decoder block for each pose.

    An epoch's last inputs, too few for a batch, are left out; they are others in each epoch.

    Args:
        orbits: to read.
        batch_size: inputs in a batch, from 1 to the number of orbits.
        reading: ``orbit``, ``apart`` or ``stacked``.
        truth: the coefficients of the features that each input is made of, where they are known.
        group: of the orbits; by default the turns, as many as there are poses.
        seed: of the order; `train(seed=)` may replace it.

    Attributes:
        d_in: width of x.

    Raises:
        ValueError: if an argument is out of its range, or the orbits are not those of the group.
    """

    def __init__(
        self,
        orbits: Float[Tensor, "n group d"],
        batch_size: int,
        reading: str = "orbit",
        truth: Float[Tensor, "n n_features"] | None = None,
        group: Group | None = None,
        seed: int = 0,
    ):
        if orbits.ndim != 3:
            raise ValueError(f"orbits must have shape (n, group, d_in), got {tuple(orbits.shape)}")
        if reading not in READINGS:
            raise ValueError(f"reading must be one of {', '.join(READINGS)}, got {reading!r}")
        if truth is not None and len(truth) != len(orbits):
            raise ValueError(f"truth must have a row for each of the {len(orbits)} orbits, got {len(truth)}")
        self.group = group or Group(orbits.shape[1])
        self.orbits, self.truth, self.reading, self.seed = self.group.checked(orbits), truth, reading, seed
        self.batch_size = whole("batch_size", batch_size, most=len(orbits), most_name="number of orbits")
        self.d_in = orbits.shape[2] * (self.group.size if reading == "stacked" else 1)
        self._iteration: _Epochs | None = None
        self._resume = 0

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the orbits. Streams of the same orbits have the same, whatever their reading and order."""
        return hashlib.sha256(self.orbits.contiguous().cpu().numpy().tobytes()).hexdigest()

    def __iter__(self) -> _Epochs:
        self._iteration, self._resume = _Epochs(self, self._resume), 0
        return self._iteration

    def state_dict(self) -> dict[str, Tensor]:
        """Where the latest iteration stands (else, the start), as tensors; see `Activations.state_dict`."""
        return (self._iteration or _Epochs(self, self._resume)).state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Let the next `iter()` go on where `state` was taken, with the same batches.

        Raises:
            ValueError: if the state comes from a stream of other orbits, another order or other batches.
        """
        if any(not torch.equal(state[name], own) for name, own in _Epochs(self, 0).described().items()):
            raise ValueError("state must be that of a stream of the same orbits, batch size and seed: pass these")
        self._iteration, self._resume = None, int(state["served"])


class _Epochs:
    """One iteration over a stream of orbits; `served` batches lie behind it."""

    def __init__(self, stream: Orbits, served: int):
        self.stream, self.seed, self.served = stream, stream.seed, served
        self.of_epoch = len(stream.orbits) // stream.batch_size
        self.epoch, self.order, self.poses = -1, torch.empty(0), torch.empty(0)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        epoch, place = divmod(self.served, self.of_epoch)
        self.served += 1
        stream, group, n = self.stream, self.stream.group, len(self.stream.orbits)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, torch.randperm(n, generator=seeded("order", self.seed, epoch))
            self.poses = torch.randint(group.size, (n,), generator=seeded("poses", self.seed, epoch))
        rows = self.order[place * stream.batch_size : (place + 1) * stream.batch_size]
        orbits = stream.orbits[rows]
        truth = None if stream.truth is None else stream.truth[rows]
        if stream.reading == "orbit":
            return Batch(orbits[:, 0], orbit=orbits, truth=truth)
        if stream.reading == "apart":
            return Batch(orbits.flatten(0, 1), truth=None if truth is None else truth.repeat_interleave(group.size, 0))
        return Batch(turned_stacks(orbits, self.poses[rows], group), truth=truth)

    def described(self) -> dict[str, Tensor]:
        """What a state must share with the stream that goes on from it."""
        return {
            "fingerprint": torch.tensor(list(bytes.fromhex(self.stream.fingerprint)), dtype=torch.uint8),
            "order": torch.tensor([self.seed, self.stream.batch_size]),
        }

    def state_dict(self) -> dict[str, Tensor]:
        """See `Orbits.state_dict`."""
        return self.described() | {"served": torch.tensor(self.served)}


def turned_stacks(
    orbits: Float[Tensor, "batch group d"], poses: Int[Tensor, " batch"], group: Group
) -> Float[Tensor, "batch group*d"]:
    """Each orbit as one row, from a pose of its own on; see `stacks`."""
    numbers = torch.tensor([begun_at(group, q) for q in range(group.size)])[poses].to(orbits.device)
    return orbits.gather(1, numbers[:, :, None].expand_as(orbits)).flatten(1)
