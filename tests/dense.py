"""Every variant's loss, written densely: five products a step, no engine. What the engine must agree with.

Each function takes an SAE and a batch and returns the loss's named terms and the code, by plain autograd over whole
matrices.
"""

import torch

from sae_lib import Batch
from sae_lib.sae import SAE


def given(x):
    """A batch for any variant: with a gradient, made of x, and an orbit of two, for those that need one."""
    return Batch(x, x.detach().flip(1), torch.stack([x, x.flip(1)], 1))


def scores(sae: SAE, x):
    centre = 0.0 if sae.name == "jumprelu" else sae.b_dec
    return (x - centre) @ sae.W_enc + (0.0 if sae.name == "gated" else sae.b_enc)


def top(s, k):
    """The k largest of each row, if positive."""
    values, places = s.topk(k, dim=1)
    return torch.zeros_like(s).scatter(1, places, values.relu())


def top_of_all(s, count):
    values, places = s.flatten().topk(count)
    return torch.zeros_like(s).flatten().scatter(0, places, values.relu()).view_as(s)


def squared(x, x_hat):
    return (x - x_hat).pow(2).sum(1).mean()


def auxk(sae, s, residual, dead=None):
    dead = sae.dead if dead is None else dead
    if not dead.any():
        return s.new_zeros(())
    residual = residual.detach()
    z = top(s.masked_fill(~dead, -torch.inf), min(max(sae.d_in // 2, 1), int(dead.sum())))
    size = (residual - residual.mean(0)).pow(2).sum()
    return (residual - z @ sae.W_dec).pow(2).sum() / size if size > 0 else s.new_zeros(())


def embedding(sae, x, z):
    if not sae.embedding_coeff:
        return {}
    averages, x, weights = sae.embedding.average * sae.W_enc.T, x.detach(), sae.W_enc.T
    cosines = torch.nn.functional.cosine_similarity(averages, x[:, None] * weights, dim=2)
    counts = (z > 0) & sae.embedding.seen & sae.embedding.on
    return {"embedding": sae.embedding_coeff * ((1 - cosines) * counts).sum(1).mean()}


def topk(sae, x, z=None):
    s = scores(sae, x)
    z = top(s, sae.k) if z is None else s * z
    x_hat = z @ sae.W_dec + sae.b_dec
    terms = {"reconstruction": squared(x, x_hat), "aux": sae.aux_coeff * auxk(sae, s, x - x_hat)}
    return terms | embedding(sae, x, z), z


def batchtopk(sae, x, z=None):
    s = scores(sae, x)
    z = top_of_all(s, sae.k * len(x)) if z is None else s * z
    x_hat = z @ sae.W_dec + sae.b_dec
    return {"reconstruction": squared(x, x_hat), "aux": sae.aux_coeff * auxk(sae, s, x - x_hat)}, z


def matryoshka(sae, x, z=None):
    s = scores(sae, x)
    z = top_of_all(s, sae.k * len(x)) if z is None else s * z
    ends = torch.tensor(sae.group_sizes).cumsum(0).tolist()
    x_hats = [z[:, :end] @ sae.W_dec[:end] + sae.b_dec for end in ends]
    errors = torch.stack([squared(x, x_hat) for x_hat in x_hats])
    return {"reconstruction": errors.mean(), "aux": sae.aux_coeff * auxk(sae, s, x - x_hats[-1])}, z


def mutual_choice(sae, x, z=None):
    terms, z = batchtopk(sae, x, z)
    law = (torch.arange(1, sae.d_sae + 1) + sae.shift) ** -sae.exponent
    dying, expected = torch.zeros_like(sae.dead), sae.k * law / law.sum()
    for place, latent in reversed(list(enumerate(sae.density.argsort(descending=True, stable=True).tolist()))):
        if place < 3 * sae.d_sae // 4 or sae.density[latent] >= 0.6 * expected[place]:
            break
        dying[latent] = True
    residual = x - z @ sae.W_dec - sae.b_dec
    return terms | {"aux_zipf": sae.zipf_coeff * auxk(sae, scores(sae, x), residual, dying & ~sae.dead)}, z


def feature_choice(sae, x, z=None):
    if sae.phase == 1:
        return mutual_choice(sae, x, z)
    s = scores(sae, x)
    law = (sae.rank + 1 + sae.shift).double() ** -sae.exponent
    budgets = (len(x) * sae.k * law / law.sum() + sae.draws).int()
    z = torch.zeros_like(s)
    for latent, budget in enumerate(budgets.tolist()):
        values, places = s[:, latent].topk(budget)
        z[places, latent] = values.relu()
    return {"reconstruction": squared(x, z @ sae.W_dec + sae.b_dec)}, z


def gradient(sae, x, z=None):
    g = given(x).grad.roll(1, 0) if sae.attribution == "of other tokens" else given(x).grad
    s, weight = scores(sae, x), 1 + sae.beta * (g @ sae.W_dec.detach().T).abs() / sae.mean_size
    lives = top(s * weight, sae.k) > 0 if z is None else z
    z = s * lives * (weight if sae.literal else 1)
    x_hat = z @ sae.W_dec + sae.b_dec
    return {"reconstruction": squared(x, x_hat), "aux": sae.aux_coeff * auxk(sae, s, x - x_hat)}, z


def relu(sae, x, z=None):
    z = scores(sae, x).relu()
    norms = sae.W_dec.norm(dim=1) if sae.norm_weighted else 1.0
    penalty = sae.l1_coeff * sae.warm * (z * norms).sum(1).mean()
    terms = {"reconstruction": squared(x, z @ sae.W_dec + sae.b_dec), "sparsity": penalty}
    return terms | embedding(sae, x, z), z


def atm(sae, x, z=None):
    f = scores(sae, x).relu()
    masked = f * sae.kept
    penalty = sae.l1_coeff * sae.warm * masked.sum(1).mean()
    return {"reconstruction": squared(x, masked @ sae.W_dec + sae.b_dec), "sparsity": penalty}, f


def gated(sae, x, z=None):
    p = scores(sae, x)
    gate = p + sae.b_gate
    z = (sae.r_mag.exp() * p + sae.b_mag).relu() * (gate > 0)
    with_gate = gate.relu() @ sae.W_dec.detach() + sae.b_dec.detach()
    return {
        "reconstruction": squared(x, z @ sae.W_dec + sae.b_dec),
        "sparsity": sae.l1_coeff * sae.warm * gate.relu().sum(1).mean(),
        "aux": squared(x, with_gate),
    }, z


def jumprelu(sae, x, z=None):
    s = scores(sae, x)
    distance = s - sae.threshold
    lives = (distance > 0).to(s.dtype)
    window = (distance.abs() < sae.bandwidth / 2).to(s.dtype) / sae.bandwidth

    def learned_by_threshold(value, slope):
        """`value`, with gradient `slope` towards the threshold."""
        path = slope.detach() * sae.threshold
        return value + path - path.detach()

    z = learned_by_threshold(s * lives, -sae.threshold * window)
    l0 = learned_by_threshold(lives, -window).sum(1).mean()
    sparsity = sae.l0_coeff * l0 if sae.target_l0 is None else (l0 / sae.target_l0 - 1).pow(2)
    return {"reconstruction": squared(x, z @ sae.W_dec + sae.b_dec), "sparsity": sae.warm * sparsity}, z


def gba(sae, x, z=None):
    norms = (x - sae.b_dec).norm(dim=1, keepdim=True)
    y = (x - sae.b_dec) / norms.clamp(min=1e-30) @ sae.W_dec.T + sae.b_enc
    z = norms * sae.output_scale * y.relu()
    errors = ((x - z @ sae.W_dec - sae.b_dec) / norms.clamp(min=1e-30)).pow(2).sum(1)
    return {"reconstruction": errors.mean()}, z


def equivariant(sae, x, z=None):
    """For the group of two elements that `given` has orbits of."""
    a, (M,) = given(x).orbit.flatten(0, 1), sae.matrices
    rho = torch.stack([torch.eye(len(M)).to(M), M]).detach()

    def reconstructed(a):
        z = top(scores(sae, a), sae.k)
        return z, z @ sae.W_dec + sae.b_dec

    def turned(r, pose):
        return torch.stack([rho[q] @ row for q, row in zip(pose, r, strict=True)])

    if sae.mode == "search":
        with torch.no_grad():  # each of the two undoes itself
            options = [a @ turn.T for turn in rho]
            errors = [
                (a - reconstructed(option)[1] @ turn.T).pow(2).sum(1) for option, turn in zip(options, rho, strict=True)
            ]
            pose = torch.stack(errors).argmin(0).tolist()
            a_back = torch.stack([options[q][i] for i, q in enumerate(pose)])
        z, r = reconstructed(a_back)
        terms = {"reconstruction": squared(a, turned(r, pose))}
        back, residual = a_back, a_back - r
    else:
        (z, r), w = reconstructed(a), sae.equivariance
        canonical, pose = given(x).orbit[:, :1].expand(-1, 2, -1).flatten(0, 1), [0, 1] * len(x)
        in_pose, as_it_is = squared(a, turned(r, pose)), squared(a, r)
        terms = {
            "invariance": w * squared(canonical, r),
            "reconstruction": w * sae.equivariance_coeff * in_pose + (1 - w) * as_it_is,
        }
        back, residual = a, w * canonical + (1 - w) * a - r
    terms["matrix"] = squared(given(x).orbit.flip(1).flatten(0, 1), a @ M.T)
    terms["aux"] = sae.aux_coeff * auxk(sae, scores(sae, back), residual)
    return terms, z


LOSSES = {
    loss.__name__: loss
    for loss in (
        *(topk, batchtopk, matryoshka, mutual_choice, feature_choice, gradient, relu, gated, jumprelu, atm, gba),
        equivariant,
    )
}
