"""The embedding loss: numbers by hand, what it teaches, and what it can do without teaching anything."""

import math

import pytest
import torch

from sae_lib import Batch, PlantedDictionary, ReLUSAE, TopKSAE, train
from sae_lib.embedding_loss import EmbeddingLoss, embedding_cosines
from sae_lib.sae import SAE
from sae_lib.sparse import Code, Pairs

# Three tokens and two latents: latent 0 lives on all tokens, latent 1 on the last.
X = torch.tensor([[1.0, 3.0], [2.0, 0.0], [0.0, 5.0]])
Z = torch.tensor([[1.0, 0.0], [0.5, 0.0], [7.0, 2.0]])
W_ENC = torch.tensor([[1.0, 4.0], [2.0, 0.0]])  # rows w_0 = (1, 2), w_1 = (4, 0)
AVERAGE = torch.tensor([[3.0, 1.0], [1.0, 1.0]])
# a_0 o w_0 = (3, 2); x o w_0 = (1, 6), (2, 0), (0, 10); a_1 o w_1 = (4, 0), x_2 o w_1 = (0, 0)
COSINES = [15 / math.sqrt(13 * 37), 3 / math.sqrt(13), 2 / math.sqrt(13)]


def sparse(z=Z):
    rows, cols = z.nonzero(as_tuple=True)
    return Code(rows, cols, z[rows, cols], tuple(z.shape))


def by_hand(seen=(True, True), coeff=0.5):
    loss = EmbeddingLoss(2, 2, coeff)
    loss.average.copy_(AVERAGE)
    loss.seen.copy_(torch.tensor(seen))
    return loss


# Equations ------------------------------------------------------------------------------------------------------------


def test_a_cosine_is_that_of_the_average_and_the_input_both_weighted_by_the_row():
    cosines = embedding_cosines(X, AVERAGE, W_ENC, sparse().pairs)
    assert cosines.tolist() == pytest.approx([*COSINES, 0.0])  # the last embedding is zero


@pytest.mark.parametrize("code", [sparse(), Code.from_dense(Z)], ids=["sparse", "dense"])
def test_the_loss_is_the_sum_over_living_pairs_divided_by_tokens(code):
    (term,) = by_hand()(X, code, W_ENC).values()
    assert term.item() == pytest.approx(0.5 * (3 - sum(COSINES) + 1) / 3)


def test_latents_that_never_lived_before_do_not_count():
    (term,) = by_hand(seen=(True, False))(X, sparse(), W_ENC).values()
    assert term.item() == pytest.approx(0.5 * (3 - sum(COSINES)) / 3)
    (term,) = by_hand(seen=(False, False))(X, sparse(), W_ENC).values()
    assert term.item() == 0


@pytest.mark.parametrize("code", [sparse(), Code.from_dense(Z)], ids=["sparse", "dense"])
def test_averages_start_at_the_first_mean_and_then_move_by_a_tenth(code):
    loss = by_hand(seen=(True, False))
    loss.after_step(X, code)
    assert loss.average[0].tolist() == pytest.approx([0.9 * 3 + 0.1 * 1, 0.9 * 1 + 0.1 * 8 / 3])
    assert loss.average[1].tolist() == [0, 5]
    assert loss.seen.tolist() == [True, True]


def test_averages_of_latents_that_do_not_live_stay():
    loss = by_hand(seen=(True, False))
    loss.after_step(X[:2], sparse(Z[:2]))
    assert loss.average[1].tolist() == [1, 1]
    assert loss.seen.tolist() == [True, False]


def test_the_gradient_is_the_derivative():
    generator = torch.Generator().manual_seed(0)
    x, average, W_enc = (torch.randn(shape, generator=generator).double() for shape in ((5, 4), (6, 4), (4, 6)))
    rows, cols = (torch.rand(5, 6, generator=generator) < 0.5).nonzero(as_tuple=True)
    pairs = Pairs(rows, cols, (5, 6))
    assert torch.autograd.gradcheck(lambda w: embedding_cosines(x, average, w, pairs), W_enc.requires_grad_())


@pytest.mark.parametrize("sae", [ReLUSAE(2, 3, 0.1, embedding_coeff=1.0), TopKSAE(2, 3, 2, embedding_coeff=1.0)])
def test_the_gradient_reaches_the_weights_of_the_encoder_alone(sae):
    sae.embedding.average.copy_(torch.rand(3, 2))
    sae.embedding.seen.fill_(True)
    with torch.no_grad():
        sae.W_enc.abs_()
    sae.loss(Batch(X)).terms["embedding"].backward()
    assert sae.W_enc.grad.abs().sum() > 0
    assert [p.grad for p in (sae.b_enc, sae.W_dec, sae.b_dec)] == [None] * 3


# The trivial minimum --------------------------------------------------------------------------------------------------


def distances(x, row):
    """Of eq. 4, for one latent that lives on all of x, with the mean as its average."""
    pairs = Pairs(torch.arange(len(x)), torch.zeros(len(x), dtype=torch.int64), (len(x), 1))
    return 1 - embedding_cosines(x, x.mean(0, keepdim=True), row[:, None], pairs)


def test_a_row_with_one_weight_makes_every_distance_zero_however_different_the_inputs_are():
    x = torch.rand(50, 8, generator=torch.Generator().manual_seed(0)) + 0.01
    one, all_alike = torch.eye(8)[3], torch.ones(8)
    assert distances(x, one).abs().max() < 1e-6
    assert distances(x, all_alike).mean() > 0.05


def test_inputs_of_both_signs_have_no_such_minimum():
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    assert distances(x, torch.eye(8)[3]).max() == pytest.approx(2)


# In training ----------------------------------------------------------------------------------------------------------


def makers(**arguments):
    return [lambda: ReLUSAE(8, 64, 0.2, **arguments), lambda: TopKSAE(8, 64, 2, **arguments)]


def run_of(make, tokens=30 * 64):
    return train(make(), PlantedDictionary(16, 8, active=2).batches(64, seed=0), tokens)


def trained(make, tokens=30 * 64):
    return run_of(make, tokens).saes[0]


class PlainReLU(ReLUSAE):
    """As if there were no embedding loss."""

    after_step = SAE.after_step

    def loss(self, batch):
        loss = super().loss(batch)
        return loss._replace(terms={name: loss.terms[name] for name in ("reconstruction", "sparsity")})


class PlainTopK(TopKSAE):
    """As if there were no embedding loss."""

    after_step = SAE.after_step

    def loss(self, batch):
        loss = super().loss(batch)
        return loss._replace(terms={name: loss.terms[name] for name in ("reconstruction", "aux")})


@pytest.mark.parametrize("plain", [lambda: PlainReLU(8, 64, 0.2), lambda: PlainTopK(8, 64, 2)])
def test_with_a_coefficient_of_zero_the_training_is_the_one_without_to_the_bit(plain):
    without = trained(plain).state_dict()
    for make in makers(embedding_coeff=0.0):
        if make().name == plain().name:
            state = trained(make).state_dict()
            assert state.keys() == without.keys()
            assert not any("embedding" in name for name in state)
            assert all(torch.equal(value, without[name]) for name, value in state.items())


@pytest.mark.parametrize("place", [0, 1])
def test_the_loss_is_off_for_the_first_two_fifths_of_a_run(place):
    without, with_it = (run_of(makers(embedding_coeff=coeff)[place]).history for coeff in (0.0, 0.5))
    errors = [[row["reconstruction"] for row in history] for history in (without, with_it)]
    assert errors[0][:13] == errors[1][:13]  # step 12 of 30 is the first with the loss, step 13 the first after it
    assert all(a != b for a, b in zip(errors[0][13:], errors[1][13:], strict=True))
    assert [row["embedding"] > 0 for row in with_it] == [False] * 12 + [True] * 18


@pytest.mark.parametrize("place", [0, 1])
def test_it_draws_the_examples_of_a_latent_together(place):
    x = PlantedDictionary(16, 8, active=2).sample(500, seed=9)[0]
    means = []
    for coeff in (0.0, 2.0):
        sae = trained(makers(embedding_coeff=coeff)[place], tokens=60 * 64)
        codes = [sae.encode(x)[:, latent] > 0 for latent in range(64)]
        rows = sae.W_enc.detach().T
        embeddings = [torch.nn.functional.normalize(x[own] * row, dim=1) for own, row in zip(codes, rows, strict=True)]
        means.append(torch.tensor([1 - float(e.mean(0).square().sum()) for e in embeddings if len(e) > 4]).median())
    assert means[1] < 0.8 * means[0]


@pytest.mark.parametrize("place", [0, 1])
def test_the_averages_are_in_the_units_of_the_activations(place):
    sae = makers(embedding_coeff=0.5)[place]()
    sae.embedding.average.fill_(1.0)
    sae.fold(3.0)
    assert (sae.embedding.average == 3).all()
    sae.fold(1.0)
    assert (sae.embedding.average == 1).all()


@pytest.mark.parametrize("coeff", [-1.0, float("nan"), float("inf"), "much"])
def test_the_coefficient_must_be_a_finite_number_of_at_least_zero(coeff, as_a_user):
    for make in makers(embedding_coeff=coeff):
        with pytest.raises(ValueError, match="embedding_coeff must be a finite number of at least 0, got"):
            make()
