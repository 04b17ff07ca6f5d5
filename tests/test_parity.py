"""The sparse engine takes the steps that dense arithmetic takes, for every variant."""

import copy

import pytest
import torch
from dense import LOSSES, given

import sae_lib
from sae_lib import VARIANTS, selection
from sae_lib.sparse import DenseCode
from sae_lib.train import adam, one_step

D_IN, D_SAE, BATCH = 24, 480, 96


def made(name, *, k=4, dead=0, seed=0, dtype=torch.float32, d_in=D_IN, d_sae=D_SAE):
    """A variant with weights as after some training, in which about k of its latents live on a token."""
    generator = torch.Generator().manual_seed(seed)
    settings = {
        "relu": {"l1_coeff": 0.1},
        "relu, norms": {"l1_coeff": 0.1, "norm_weighted": True},
        "relu, embedding": {"l1_coeff": 0.1, "embedding_coeff": 0.3},
        "topk, embedding": {"k": k, "embedding_coeff": 0.3},
        "gated": {"l1_coeff": 0.1},
        "jumprelu": {"target_l0": float(k)},
        "jumprelu, coeff": {"l0_coeff": 0.01},
        "gradient, others": {"k": k, "attribution": "of other tokens", "literal": True},
        "atm": {"l1_coeff": 0.1},
        "gba": {"adapt_every": 10},
        "equivariant": {"k": k, "group_order": 2},
        "equivariant, random pose": {"k": k, "group_order": 2, "mode": "invariant", "random_pose": True},
        "equivariant, invariant": {"k": k, "group_order": 2, "mode": "invariant", "equivariance_coeff": 0.5},
    }.get(name, {"k": k})
    sae = VARIANTS[name.split(",")[0]](d_in, d_sae, seed=seed, **settings).train().to(dtype)
    level = (2 * torch.tensor(d_sae / k).log()).sqrt() / d_in**0.5 * 0.75  # about the k-th largest of d_sae scores
    with torch.no_grad():
        if sae.name in ("relu", "atm"):
            sae.W_enc.mul_(10)
        for p in sae.parameters():
            p.add_(0.03 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype))
        if sae.unit_rows:
            sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
        if sae.name == "jumprelu":
            sae.threshold.copy_(0.9 * level + 0.02 * torch.rand(d_sae, generator=generator))
        if sae.name in ("relu", "atm"):
            sae.b_enc.sub_(level)
        if sae.name == "atm":
            sae.kept[::3] = 0
        if sae.name == "gba":
            sae.b_enc.sub_(level)
            sae.b_dec.fill_(0.02)
        if sae.name == "gated":
            sae.b_gate.sub_(level)
            sae.b_mag.sub_(0.5 * level)
        if name.endswith("embedding"):
            sae.embedding.average.copy_(torch.randn(d_sae, d_in, generator=generator))
            sae.embedding.seen[::2] = True
    sae.dead_window.fill_(1000)
    sae.tokens_since_fired[:dead] = 5000
    if sae.name == "equivariant":
        sae.equivariance.fill_(0.7)
    if name == "mutual_choice" and dead:
        sae.density.copy_(k / d_sae * torch.rand(d_sae, generator=generator) ** 2)  # some are dying
    if name == "feature_choice":
        sae.before_step(1.0)  # in its second phase
    return sae


def tokens(n=BATCH, dtype=torch.float32, seed=1, d_in=D_IN):
    return (
        torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype) / d_in**0.5
    )


def gradients(sae, terms):
    sae.zero_grad(set_to_none=True)
    torch.stack(list(terms.values())).sum().backward()
    return {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}


def assert_same_step(sae, x, tolerance, z=None):
    """Loss and every gradient of the engine and of the dense reference agree, relative to the gradient's norm."""
    x = x.clone().requires_grad_()
    loss = sae.loss(given(x))
    ours = gradients(sae, loss.terms) | {"x": x.grad}
    x = x.detach().requires_grad_()
    terms, code = LOSSES[sae.name](sae, x, z)
    theirs = gradients(sae, terms) | {"x": x.grad}
    assert loss.terms.keys() == terms.keys()
    assert torch.allclose(loss.code.dense(), code, atol=1e-5)
    for name, term in terms.items():
        assert loss.terms[name].item() == pytest.approx(term.item(), rel=tolerance, abs=tolerance * 1e-3), name
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        distance = (ours[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert distance < tolerance, f"{name}: {distance:.1e}"
    return loss


NAMES = ["relu", "relu, norms", "gated", "topk", "jumprelu", "jumprelu, coeff", "batchtopk", "matryoshka"]
NAMES += ["gradient", "gradient, others", "mutual_choice", "feature_choice", "atm", "gba"]
NAMES += ["relu, embedding", "topk, embedding", "equivariant", "equivariant, invariant"]
WITH_K = ["topk", "batchtopk", "matryoshka", "mutual_choice", "gradient"]
WITH_AUXK = [*WITH_K, "equivariant", "equivariant, invariant"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bf16", [False, True])
def test_one_step_is_that_of_dense_arithmetic(name, bf16, monkeypatch):
    monkeypatch.setattr(selection, "fast_bf16", lambda: bf16)
    monkeypatch.setattr(selection, "WORTH_ROUNDING", 0)
    loss = assert_same_step(made(name), tokens(), 1e-5)

    assert not isinstance(loss.code, DenseCode)  # else nothing was compared
    assert 1 < loss.code.l0() < 12


@pytest.mark.parametrize("name", NAMES)
def test_the_dense_path_is_that_of_dense_arithmetic(name, monkeypatch):
    monkeypatch.setattr(selection, "DENSITY", 0.0)
    loss = assert_same_step(made(name), tokens(), 1e-5)
    assert isinstance(loss.code, DenseCode)


@pytest.mark.parametrize("name", WITH_AUXK)
@pytest.mark.parametrize("dead", [1, 7, 100, D_SAE])
def test_the_loss_that_revives_dead_latents_is_that_of_dense_arithmetic(name, dead):
    loss = assert_same_step(made(name, dead=dead), tokens(), 1e-5)
    assert loss.terms["aux"] > 0


@pytest.mark.parametrize("name", WITH_K)
@pytest.mark.parametrize("k", [1, 20, D_SAE])
def test_every_k_up_to_the_width(name, k):
    assert_same_step(made(name, k=k), tokens(), 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_one(name):
    assert_same_step(made(name), tokens(1), 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_odd_widths(name):
    assert_same_step(made(name, d_in=7, d_sae=331), tokens(53, d_in=7), 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_rows_with_nothing_alive(name):
    sae, x = made(name), tokens()
    with torch.no_grad():
        sae.b_enc.sub_(100)
    loss = sae.loss(given(x))
    assert loss.code.l0() == 0
    if sae.name != "equivariant":  # which turns it
        assert torch.equal(loss.x_hat, sae.b_dec.expand_as(x))
    assert_same_step(sae, x, 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_token_of_which_nothing_is_known_leaves_the_others_as_they_are(name):
    sae, x = made(name), tokens()
    x[5] = sae.b_dec.detach() if name != "jumprelu" else 0
    assert_same_step(sae, x, 1e-5)


@pytest.mark.parametrize("name", WITH_K)
def test_ties_are_broken_somehow_and_the_step_is_that_of_the_pairs_chosen(name):
    sae, x = made(name), tokens()
    with torch.no_grad():  # every latent has a twin with the same score, and some tokens are the same
        sae.W_enc[:, 1::2] = sae.W_enc[:, ::2]
        sae.b_enc[1::2] = sae.b_enc[::2]
        x[1::2] = x[::2]
    sae.k = 3  # odd: a pair of twins stands at the border
    chosen = (sae.loss(given(x)).code.dense() > 0).to(x.dtype)
    assert chosen.sum() == 3 * len(x)
    s = sae.scores(x).dense().detach()
    s = s * sae.weights(given(x)) if name == "gradient" else s
    lowest, best_of_others = s.masked_fill(chosen == 0, 9).amin(1), s.masked_fill(chosen > 0, -9).amax(1)
    if name in ("topk", "gradient"):
        assert (chosen.sum(1) == 3).all()
    else:
        lowest, best_of_others = lowest.min(), best_of_others.max()
    assert (lowest >= best_of_others - 1e-6).all()
    assert_same_step(sae, x, 1e-5, z=chosen)


@pytest.mark.parametrize("name", NAMES)
def test_fifty_steps_of_training_in_64_bits_are_those_of_dense_arithmetic(name):
    sae = made(name, dtype=torch.float64, dead=20)
    reference = copy.deepcopy(sae)
    reference.W_enc.data = reference.W_enc.data.contiguous()

    def loss(batch):
        terms, z = LOSSES[reference.name](reference, batch.x)
        return sae_lib.sae.Loss(terms, DenseCode(z), batch.x)

    reference.loss = loss
    ours = adam(sae, 10_000)
    theirs = torch.optim.Adam(reference.parameters(), lr=ours.param_groups[0]["lr"], betas=sae.betas)
    theirs.param_groups[0]["initial_lr"] = ours.param_groups[0]["initial_lr"]
    for step in range(50):
        batch = given(tokens(dtype=torch.float64, seed=step))
        one_step(sae, ours, batch, 1.0, step / 50)
        one_step(reference, theirs, batch, 1.0, step / 50)
    start = made(name, dtype=torch.float64, dead=20).state_dict()
    for key, value in reference.state_dict().items():
        if value.is_floating_point():
            assert (sae.state_dict()[key] - value).norm() <= 1e-9 * value.norm(), key
    assert (sae.W_dec - start["W_dec"]).norm() > 1e-3


# The threshold's slope and the weights that a term holds constant are no derivatives, by definition.
TRUE_DERIVATIVES = {
    "gated": ["W_enc", "b_gate", "b_mag", "r_mag"],
    "jumprelu": ["W_enc", "b_enc", "W_dec", "b_dec"],
    "gba": ["W_dec", "output_scale"],
}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("jumprelu, coeff", "gradient, others")])
def test_gradients_are_derivatives(name):
    sae = made(name, k=2, dtype=torch.float64, d_in=5, d_sae=64)
    x = tokens(6, torch.float64, d_in=5)
    names = TRUE_DERIVATIVES.get(sae.name, ["W_enc", "b_enc", "W_dec", "b_dec"])

    def total(*weights):
        for key, weight in zip(names, weights, strict=True):
            vars(sae)[key] = weight
        try:
            return sae.loss(given(x)).total
        finally:
            for key in names:
                vars(sae).pop(key)

    parameters = {key: sae._parameters.pop(key) for key in names}
    try:
        weights = [p.detach().clone().requires_grad_() for p in parameters.values()]
        assert torch.autograd.gradcheck(total, weights, eps=1e-7, atol=1e-5)
    finally:
        sae._parameters.update(parameters)
