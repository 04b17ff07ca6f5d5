"""E-SAE: one latent for a feature in all poses, and one matrix that turns activations.

Erdogan, Lucic 2025, "Equivariant Sparse Autoencoders", arXiv 2511.09432. For inputs that a finite group acts on, such
as images under quarter turns, ``a_p = a(g_p x)`` are the activations of an input in its poses:

    a_p   ~ rho(g_p) a_0                     rho(r^p) = M^p: one matrix for one turn (one more for the mirror)
    z_p   = TopK(ReLU((a_p - b_dec) W_enc + b_enc))          the code, meant to be the same for all p
    r_p   = z_p W_dec + b_dec                                the activation in the canonical pose, rows of norm 1
    L_inv = mean_p |a_0 - r_p|^2             all poses of an input have one reconstruction
    L_eq  = mean_p |a_p - rho(g_p) r_p|^2    which the matrices turn back to its pose
    L_M   = mean   |a(g x) - M a(x)|^2       over all pairs that a generator g makes
    L     = w (L_inv + coeff L_eq) + (1 - w) mean_p |a_p - r_p|^2 + L_M + aux_coeff AuxK

How known: from the abstract, the beginning of the introduction and quotations by others: a TopK SAE that is invariant,
one matrix and its powers, and two losses, of which one asks for consistent reconstructions across the group and the
other fits the matrices; "adaptively equivariant". The formulae, the weights and all that follows are inferred. M is
fitted to activations alone, by L_M, so that the SAE cannot bend it. The weight w is how equivariant the model is: R2 of
the best matrices, measured in training (`adaptive`; 1 without it). Where no matrix explains the poses, w is 0 and what
is left is TopK on all poses.

That reading is the mode ``invariant``. Its encoder is linear up to ReLU, so that it can tell apart features by what
the group leaves fixed in them alone. The mode ``search``, which is not in what we could read of the paper, first turns
the activation back by every element, encodes each, and keeps the one that is reconstructed best:

    q     = argmin_q |a - rho(g_q) r(rho(g_q)^-1 a)|^2,    z = z(rho(g_q)^-1 a),    L = |a - rho(g_q) r|^2 + L_M + AuxK

Its code is invariant wherever rho is exact, whatever the encoder, and the pose comes with it. It costs one product of
the encoder for each element. One of the elements is none: nothing is lost where no matrix fits.

``rho(g)^-1`` is the matrix of the inverse element, here ``M^(n - p)``: a fitted M shrinks what it cannot predict, and
its inverse would blow that up. In evaluation the pose is not told: in both modes it is the one that fits best.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae_lib.data import Batch
from sae_lib.distributed import count, mine, total
from sae_lib.groups import Group, Moments, explained, least_squares
from sae_lib.sae import SAE, Loss, auxk, column_major, geometric_median, positive, squared_error, unit_dictionary, whole
from sae_lib.selection import top_of_rows
from sae_lib.sparse import Code, Scores

MODES = ("invariant", "search")
MATRICES = ("learned", "fitted", "frozen", "random", "identity")
ENOUGH = 200
"""The model is read for its symmetry until the run has seen so many activations for each dimension."""


class EquivariantSAE(SAE):
    """A TopK SAE whose code does not depend on the pose of the input. Chapter `equivariant`.

    It is trained on batches with orbits: ``orbit (batch, group, d_in)``, of which ``orbit[:, 0]`` is x. A trained one
    takes activations in any pose: `encode` gives the code, `pose` the element of the group that they are in, `forward`
    the reconstruction in that pose, and `decode` that in the canonical pose.

    Args:
        d_in: width of the activations.
        d_sae: number of latents.
        k: living latents an activation, in [1, d_sae].
        group_order: of the turn, at least 2.
        reflections: whether the mirror belongs to the group.
        mode: ``invariant``, an encoder meant to be blind to the pose; or ``search``, which tries all poses. The latter
            is the default because it gives nothing up: it reconstructs as TopK does, also where no matrix fits, and
            single latents detect more of what is planted. The former serves probes a little better, and reconstructs
            worse (chapter `equivariant`), as others say of the paper's.
        matrix: ``learned`` by L_M from a least-squares fit of the first batch; ``fitted``, by least squares over the
            first 200 d_in activations; ``frozen``, the fit of the first batch; or a control: ``random``, orthogonal
            matrices of the same group in a random basis, and ``identity``. Matrices that are known can be copied into
            `matrices` of a control before training.
        adaptive: in the mode ``invariant``, weigh the losses by how equivariant the model is.
        random_pose: in the mode ``invariant``, draw the canonical pose of each orbit in each batch, instead of the
            stored one.
        equivariance_coeff: weight of L_eq in the mode ``invariant``, at least 0.
        aux_coeff: weight of AuxK, at least 0.
        seed: of the initial weights and the drawn poses.

    Attributes:
        group: the `Group`.
        matrices: (generators, d_in, d_in), M of each generator.
        equivariance: R2 of the best matrices on the activations seen so far, in [0, 1].

    Raises:
        ValueError: if an argument is out of its range; in training, if an orbit has another size than the group, or a
            matrix that was copied in has no inverse.
    """

    name = "equivariant"
    needs = frozenset({"orbit"})

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: int,
        group_order: int = 4,
        reflections: bool = False,
        mode: str = "search",
        matrix: str = "learned",
        adaptive: bool = True,
        random_pose: bool = False,
        equivariance_coeff: float = 1.0,
        aux_coeff: float = 1 / 32,
        seed: int = 0,
    ):
        super().__init__(d_in, d_sae, seed)
        self.k = whole("k", k, most=d_sae, most_name="d_sae")
        self.group_order, self.reflections = group_order, reflections
        self.group = Group(group_order, reflections)
        for name, value, known in (("mode", mode, MODES), ("matrix", matrix, MATRICES)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        self.mode, self.matrix, self.adaptive, self.random_pose = mode, matrix, adaptive, random_pose
        self.equivariance_coeff = positive("equivariance_coeff", equivariance_coeff, or_zero=True)
        self.aux_coeff = positive("aux_coeff", aux_coeff, or_zero=True)
        directions = unit_dictionary(d_in, d_sae, self.generator)
        self.W_enc = nn.Parameter(column_major(directions.T))  # (d_in, d_sae)
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(directions.clone())  # (d_sae, d_in)
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        start = torch.eye(d_in).repeat(self.group.generators, 1, 1)
        if matrix == "random":
            start = self.group.regular(d_in, self.generator)
        self.matrices = nn.Parameter(start, requires_grad=matrix == "learned")
        self.register_buffer("equivariance", torch.tensor(1.0))
        self.register_buffer("seen", torch.tensor(0.0, dtype=torch.float64))
        self.register_buffer("seen_total", torch.zeros(d_in, dtype=torch.float64))
        self.register_buffer("seen_products", torch.zeros(d_in, d_in, dtype=torch.float64))
        self.register_buffer("seen_turned", torch.zeros(self.group.generators, d_in, d_in, dtype=torch.float64))
        self.drawn = 0  # seed of the poses of this step

    def representation(self) -> Float[Tensor, "group d_in d_in"]:
        """rho: the matrix of every element of the group."""
        return self.group.representation(self.matrices)

    # One activation, whose pose is not known --------------------------------------------------------------------------

    def scores(self, x: Float[Tensor, "batch d_in"]) -> Scores:
        """Of x, or, in the mode ``search``, of x turned back."""
        return super().scores(self.turned_back(x)[0] if self.mode == "search" else x)

    def select(self, scores: Scores, batch: Batch) -> Code:
        return top_of_rows(scores, self.k)

    def forward(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        """The reconstruction of `x` in the pose that fits it best, in the units of `x`."""
        r, pose = self.read(self.checked(x))
        return turn(self.representation(), pose, r)

    @torch.no_grad()
    def pose(self, x: Float[Tensor, "batch d_in"]) -> Int[Tensor, " batch"]:
        """The number of the element that leads from the canonical pose to that of `x`, as far as it can be told: by
        the least squared error of the reconstruction."""
        return self.read(self.checked(x))[1]

    def read(self, x: Float[Tensor, "batch d_in"]) -> tuple[Float[Tensor, "batch d_in"], Int[Tensor, " batch"]]:
        """The reconstruction in the canonical pose, and the pose of x: found before encoding, or after it."""
        back, pose = self.turned_back(x) if self.mode == "search" else (x, None)
        r = self.decode(self.select(super().scores(back), Batch(back)))
        return r, self.nearest(x, r.expand(self.group.size, -1, -1)) if pose is None else pose

    @torch.no_grad()
    def turned_back(self, x: Float[Tensor, "batch d_in"]) -> tuple[Float[Tensor, "batch d_in"], Int[Tensor, " batch"]]:
        """x in the canonical pose that is reconstructed best, and the pose that it was in."""
        back = self.representation()[self.group.inverse]
        candidates = torch.einsum("gij,nj->gni", back, x)
        r = torch.stack([self.decode(self.select(super(EquivariantSAE, self).scores(c), Batch(c))) for c in candidates])
        pose = self.nearest(x, r)
        return candidates[pose, torch.arange(len(x), device=x.device)], pose

    @torch.no_grad()
    def nearest(self, x: Float[Tensor, "batch d_in"], r: Float[Tensor, "group batch d_in"]) -> Int[Tensor, " batch"]:
        """The pose whose reconstruction, turned, is nearest to x."""
        posed = torch.einsum("gij,gnj->gni", self.representation(), r)
        return (x - posed).square().sum(2).argmin(0)

    # Training ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def start(self, batch: Batch, tokens: int) -> None:
        super().start(batch, tokens)
        if not self.tokens_trained:
            self.b_dec.copy_(geometric_median(batch.x))
        for sums in self.moments:
            sums.zero_()
        first = self.summed(batch)
        self.equivariance.copy_(explained(first, least_squares(first)).clamp(0, 1))
        if not self.tokens_trained and self.matrix in ("learned", "fitted", "frozen"):
            self.matrices.copy_(least_squares(first))
        elif not self.tokens_trained:  # somebody may have put in their own
            self.group.checked_matrices(self.matrices)

    def before_step(self, progress: float) -> None:
        if self.random_pose:
            self.drawn = int(torch.randint(2**31, (), generator=self.generator))

    def loss(self, batch: Batch) -> Loss:
        orbits = self.group.checked(batch.orbit)
        terms, code, x_hat, scores, residual = (self.search if self.mode == "search" else self.invariant)(orbits)
        if self.matrix == "learned":
            pairs = zip(self.matrices, self.group.targets, strict=True)
            errors = [squared_error(rows(orbits[:, targets]), rows(orbits) @ M.T) for M, targets in pairs]
            terms["matrix"] = torch.stack(errors).mean()
        terms["aux"] = self.aux_coeff * auxk(self, scores, residual)
        return Loss(terms, code, x_hat.view_as(orbits)[:, 0])

    def invariant(self, orbits: Float[Tensor, "batch group d_in"]) -> tuple[dict, Code, Tensor, Scores, Tensor]:
        """L_inv and L_eq."""
        if self.random_pose:
            orbits = self.from_another_pose(orbits)
        canonical, rho = orbits[:, :1], self.representation().detach()
        scores = super().scores(rows(orbits))
        code = self.select(scores, Batch(rows(orbits)))
        r = self.decode(code).view_as(orbits)
        posed = torch.einsum("gij,ngj->ngi", rho, r)
        w = self.equivariance.to(r.dtype) if self.adaptive else 1.0
        alike, in_pose, as_it_is = (
            squared_error(rows(aim.expand_as(r)), rows(made))
            for aim, made in ((canonical, r), (orbits, posed), (orbits, r))
        )
        terms = {"invariance": w * alike, "reconstruction": w * self.equivariance_coeff * in_pose + (1 - w) * as_it_is}
        return terms, code, posed, scores, rows(w * canonical + (1 - w) * orbits - r)

    def search(self, orbits: Float[Tensor, "batch group d_in"]) -> tuple[dict, Code, Tensor, Scores, Tensor]:
        """The reconstruction of every activation by itself, as in evaluation."""
        x = rows(orbits)
        back, pose = self.turned_back(x)
        scores = super().scores(back)
        code = self.select(scores, Batch(back))
        r = self.decode(code)
        posed = turn(self.representation().detach(), pose, r)
        return {"reconstruction": squared_error(x, posed)}, code, posed, scores, back - r

    def from_another_pose(self, orbits: Float[Tensor, "batch group d_in"]) -> Float[Tensor, "batch group d_in"]:
        """Each orbit told from a pose drawn by chance: element i of the orbit of ``g_c x`` is ``g_i g_c x``."""
        generator = torch.Generator().manual_seed(self.drawn)
        size = self.group.size
        poses = mine(Batch(torch.randint(size, (count(len(orbits)), 1), generator=generator))).x[:, 0]
        table = torch.tensor([[self.group.product(i, c) for i in range(size)] for c in range(size)])
        places = table[poses].to(orbits.device)
        return orbits.gather(1, places[:, :, None].expand_as(orbits))

    @torch.no_grad()
    def after_step(self, batch: Batch, code: Code) -> None:
        super().after_step(batch, code)
        if self.seen < ENOUGH * self.d_in:
            for so_far, here in zip(self.moments, self.summed(batch), strict=True):
                so_far.add_(here)
            best = least_squares(self.moments)
            self.equivariance.copy_(explained(self.moments, best).clamp(0, 1))
            if self.matrix == "fitted":
                self.matrices.copy_(best)

    def summed(self, batch: Batch) -> Moments:
        """Of the whole batch, of which this process may have a slice (64 bits)."""
        return Moments(*map(total, self.group.moments(batch.orbit.double())))

    @property
    def moments(self) -> Moments:
        """Sums over the activations of this run."""
        return Moments(self.seen, self.seen_total, self.seen_products, self.seen_turned)


def rows(orbits: Float[Tensor, "batch group d_in"]) -> Float[Tensor, "rows d_in"]:
    """All poses of the first input, then of the second."""
    return orbits.flatten(0, 1)


def turn(
    rho: Float[Tensor, "group d_in d_in"], pose: Int[Tensor, " batch"], r: Float[Tensor, "batch d_in"]
) -> Float[Tensor, "batch d_in"]:
    """Each r by the matrix of its own pose."""
    everywhere = torch.einsum("gij,nj->gni", rho, r)
    return everywhere[pose, torch.arange(len(r), device=r.device)]
