"""Gradient SAE: numbers by hand."""

import pytest
import torch

from sae_lib import Batch, GradientSAE, TopKSAE, selection, train
from sae_lib.saes.gradient import MEMORY


def by_hand(k=1, **settings):
    """Latents are coordinates; the mean attribution is 0.5."""
    sae = GradientSAE(3, 3, k, **settings)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(3))
        sae.W_dec.copy_(torch.eye(3))
    sae.mean_size.fill_(0.5)
    return sae


X = torch.tensor([[3.0, 2.0, 1.0]])
G = torch.tensor([[0.0, 1.0, 0.0]])


def chosen(sae, x=X, grad=G, training=True):
    return sae.train(training).encode(x, grad).tolist()


def random_batches(n=30, size=64, d_in=24, c=1.0):
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(2, size, d_in, generator=generator) for _ in range(n)]
    return [Batch(3 + 5 * x, c * grad) for x, grad in draw]


# The choice -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        (0.2, [3, 0, 0]),  # scores 3, 2 (1 + 0.2 * 1 / 0.5) = 2.8, 1
        (0.3, [0, 2, 0]),  # scores 3, 2 (1 + 0.3 * 1 / 0.5) = 3.2, 1; the value is not the score
    ],
)
def test_activation_and_attribution_choose_and_activations_are_kept(beta, expected, training):
    assert chosen(by_hand(beta=beta), training=training) == [expected]


def test_read_literally_the_scores_are_kept():
    assert chosen(by_hand(k=2, beta=1.0, literal=True)) == [[3, 6, 0]]
    wide = GradientSAE(3, 48, 2, literal=True)  # by the sparse engine
    z, plain = wide.encode(X, G), GradientSAE(3, 48, 2).encode(X, G)
    weights = wide.weights(Batch(X, G))
    assert torch.allclose(z, plain * weights)
    assert not torch.allclose(z, plain)


def test_the_sign_of_the_attribution_does_not_matter_except_to_the_controls():
    assert chosen(by_hand()) == chosen(by_hand(), grad=-G) == [[0, 2, 0]]
    assert chosen(by_hand(attribution="signed")) == [[0, 2, 0]]  # weight 1 + 2
    assert chosen(by_hand(attribution="signed"), grad=-G) == [[3, 0, 0]]  # weight 1 - 2
    assert chosen(by_hand(attribution="reversed")) == [[3, 0, 0]]
    assert chosen(by_hand(attribution="reversed"), grad=-G) == [[0, 2, 0]]


def test_attribution_alone_chooses_without_the_1():
    sae = by_hand(k=2, attribution="alone", beta=0.1)
    assert chosen(sae) == [[0, 2, 0]]  # the others' scores are zero
    assert chosen(sae, grad=torch.tensor([[0.1, 1.0, 0.5]])) == [[0, 2, 1]]  # 0.3, 2 and 0.5


@pytest.mark.parametrize("attribution", ["absolute", "signed", "reversed", "alone"])
def test_a_negative_activation_never_lives(attribution):
    sae, x = by_hand(attribution=attribution), torch.tensor([[-5.0, 1.0, 0.5]])
    for sign in (1, -1):  # its weight, of -17 with one of the signs, would make its score the largest
        assert chosen(sae, x, sign * torch.tensor([[9.0, 0.1, 0.0]])) == [[0, 1, 0]]
    wide, (x, grad, *_) = GradientSAE(24, 480, 4, attribution=attribution), random_batches(1)[0]
    assert ((wide.encode(x, 9 * grad) > 0).sum(1) == 4).all()


# TopK -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("k", [4, 100])
def test_without_weight_on_the_gradient_training_gives_topk_to_the_bit(k, bf16, monkeypatch):
    monkeypatch.setattr(selection, "fast_bf16", lambda: bf16)
    monkeypatch.setattr(selection, "WORTH_ROUNDING", 0)
    saes = [TopKSAE(24, 480, k), GradientSAE(24, 480, k, beta=0.0), GradientSAE(24, 480, k)]
    train(saes, random_batches(), tokens=30 * 64)
    first = list(saes[0].parameters())
    same, other = ([torch.equal(*pair) for pair in zip(first, sae.parameters(), strict=True)] for sae in saes[1:])
    assert all(same)
    assert not any(other)


def test_without_weight_on_the_gradient_equal_scores_are_added_up_in_topks_order():
    saes = [TopKSAE(24, 480, 5), GradientSAE(24, 480, 5, beta=0.0)]
    for sae in saes:
        with torch.no_grad():  # each latent has a twin with the same scores
            sae.W_enc[:, 1::2] = sae.W_enc[:, ::2]
    codes = [sae.train().loss(batch).code for batch in random_batches(1) for sae in saes]
    assert torch.equal(codes[0].cols, codes[1].cols)


def test_evaluation_without_a_gradient_is_topk():
    topk, sae = TopKSAE(24, 480, 4).eval(), GradientSAE(24, 480, 4, beta=5.0).eval()
    x, grad, *_ = random_batches(1)[0]
    assert torch.equal(sae.encode(x), topk.encode(x))
    assert torch.equal(sae(x), topk(x))
    assert not torch.equal(sae.encode(x, grad), topk.encode(x))


@pytest.mark.parametrize("training", [True, False])
def test_each_token_keeps_k_latents_and_its_own_gradient(training):
    sae = GradientSAE(24, 480, 4).train(training)
    x, grad, *_ = random_batches(1)[0]
    z = sae.encode(x, grad)
    assert ((z > 0).sum(1) == 4).all()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sae.encode(x[order], grad[order]), z[order])


# The scale of the gradient --------------------------------------------------------------------------------------------


def test_the_mean_attribution_starts_at_the_first_batch_and_follows_the_others():
    sae = by_hand().train()
    sae.start(Batch(X, torch.tensor([[3.0, -6.0, 0.0]])), 100)
    assert sae.mean_size == 3
    batch = Batch(X.expand(2, -1), torch.tensor([[1.0, 1.0, 1.0], [-3.0, 0.0, 0.0]]))
    sae.after_step(batch, sae.loss(batch).code)
    assert sae.mean_size.item() == pytest.approx(MEMORY * 3 + (1 - MEMORY) * 1)


def test_a_loss_in_other_units_changes_nothing():
    nats, other = GradientSAE(24, 480, 4), GradientSAE(24, 480, 4)
    train(nats, random_batches(), tokens=30 * 64)
    train(other, random_batches(c=1024.0), tokens=30 * 64)
    assert all(torch.equal(a, b) for a, b in zip(nats.parameters(), other.parameters(), strict=True))
    assert other.mean_size == 1024 * nats.mean_size


def test_activations_in_other_units_change_nothing():
    sae = GradientSAE(24, 480, 4)
    train(sae, random_batches(), tokens=30 * 64)
    x, grad, *_ = random_batches(1)[0]
    z, scale = sae.encode(x, grad), sae.scale.item()
    sae.fold(2 * scale)
    assert torch.allclose(sae.encode(2 * x, grad / 2), 2 * z, rtol=1e-5)
    sae.fold(scale)
    assert torch.allclose(sae.encode(x, grad), z, rtol=1e-5)


def test_a_gradient_of_zero_leaves_the_choice_to_the_activation():
    sae = by_hand()
    sae.mean_size.fill_(0.0)
    assert chosen(sae, grad=0 * G) == [[3, 0, 0]]


# What is learned ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("literal", [False, True])
def test_the_score_is_constant_to_learning(literal):
    sae, batch = GradientSAE(24, 480, 4, literal=literal).train(), random_batches(1)[0]
    grad = batch.grad.clone().requires_grad_()
    sae.select(sae.scores(batch.x), Batch(batch.x, grad)).values.sum().backward()
    assert sae.W_dec.grad is None
    assert grad.grad is None
    assert sae.W_enc.grad.abs().sum() > 0


def test_loss_by_hand():
    loss = by_hand().train().loss(Batch(X, G))
    assert loss.terms["reconstruction"].item() == 9 + 0 + 1  # latent 1 keeps its 2
    assert loss.terms["aux"] == 0


def test_dead_latents_are_revived_by_activation_alone():
    sae = by_hand().train()
    sae.tokens_since_fired[::2] = 10**9  # latents 0 and 2
    x = torch.tensor([[3.0, 2.0, 1.0], [-1.0, 2.0, 0.0]])
    aux = sae.loss(Batch(x, G.expand(2, -1))).terms["aux"]
    residual = torch.tensor([[3.0, 0.0, 1.0], [-1.0, 0.0, 0.0]])  # one latent revives, d_in // 2: 3 of the first token
    spread = (residual - residual.mean(0)).square().sum()
    assert aux.item() == pytest.approx((1 / 32 * (1 + 1) / spread).item())


# Controls -------------------------------------------------------------------------------------------------------------


def test_the_gradient_of_another_token_chooses_in_training_only():
    sae, x = by_hand(attribution="of other tokens"), X.expand(2, -1)
    grad = torch.cat([G, 0 * G])
    assert chosen(sae, x, grad) == [[3, 0, 0], [0, 2, 0]]
    assert chosen(sae, x, grad, training=False) == [[0, 2, 0], [3, 0, 0]]


def test_attributions_are_dealt_out_to_latents_anew_in_each_step_of_training():
    sae, own = (GradientSAE(24, 480, 4, attribution=name, seed=3) for name in ("of other latents", "absolute"))
    batch, seen = random_batches(1)[0], []
    for _ in range(3):
        sae.before_step(0.5)
        seen.append(sae.weights(batch))
        assert torch.equal(seen[-1], sae.weights(batch))
        assert torch.equal(seen[-1].sort(1).values, own.weights(batch).sort(1).values)  # the same distribution
    assert not torch.equal(seen[0], own.weights(batch))
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(sae.eval().weights(batch), own.weights(batch))


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attribution", ["absolute", "of other tokens"])
def test_training_without_gradients_says_how_to_stream_them(attribution, as_a_user):
    with pytest.raises(ValueError, match=r"got none; stream them with Activations\(..., grad=True\)"):
        by_hand(attribution=attribution).train().loss(Batch(X))
    with pytest.raises(ValueError, match=r"gradient needs grad from the stream; use Activations\(..., grad=True\)"):
        train(GradientSAE(3, 12, 2), [X, X], tokens=2)


@pytest.mark.parametrize("beta", [-0.5, float("nan"), float("inf"), "much"])
def test_beta_must_be_a_number_of_at_least_zero(beta, as_a_user):
    with pytest.raises(ValueError, match=f"beta must be a finite number of at least 0, got {beta!r}"):
        GradientSAE(3, 24, 2, beta=beta)


def test_other_settings_out_of_range_are_refused(as_a_user):
    with pytest.raises(ValueError, match=r"k must be an integer in \[1, d_sae=24\], got 25"):
        GradientSAE(3, 24, 25)
    with pytest.raises(ValueError, match="attribution must be one of absolute, signed, .*, got 'none'"):
        GradientSAE(3, 24, 2, attribution="none")
    with pytest.raises(ValueError, match="aux_coeff must be a finite number of at least 0, got -1"):
        GradientSAE(3, 24, 2, aux_coeff=-1.0)


def test_a_gradient_of_another_shape_is_refused(as_a_user):
    with pytest.raises(ValueError, match=r"grad must have the shape of x, \(1, 3\), got \(2, 3\)"):
        by_hand().encode(X, torch.zeros(2, 3))
