"""The toy model's equation by hand, and the geometry that it is famous for."""

import itertools

import pytest
import torch

from sae_lib.metrics.polysemanticity import feature_dimensionality
from sae_lib.superposition import ToyModels


def test_the_output_is_the_equation_of_the_paper():
    models = ToyModels(3, 2, [0.0])
    models.W = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0]]])
    models.b = torch.tensor([[0.0, -1.0, 0.5]])
    h = torch.tensor([[[1.0, 0.5, 0.25]]])
    x = models.hidden(h)
    torch.testing.assert_close(x, torch.tensor([[[0.75, 1.0]]]))  # (1 - 0.25, 2 * 0.5)
    torch.testing.assert_close(models.output(x), torch.tensor([[[0.75, 1.0, 0.0]]]))  # ReLU(.75, 2 - 1, -.75 + .5)


def test_features_are_zero_with_the_probability_of_the_sparsity_and_else_uniform():
    batch = next(ToyModels(2, 1, [0.0, 0.9]).batches(1, 50_000))
    fires = batch.truth > 0
    assert fires.float().mean().item() == pytest.approx(0.1, abs=0.005)
    assert batch.truth[fires].mean().item() == pytest.approx(0.5, abs=0.01)
    assert batch.truth.min() == 0
    assert batch.truth.max() < 1
    assert fires.all(1).float().mean().item() == pytest.approx(0.01, abs=0.002)  # features fire independently


def test_batches_are_the_hidden_activations_of_their_features_and_follow_the_seed():
    models = ToyModels(5, 2, [0.0, 0.8])
    first, second = itertools.islice(models.batches(1, 16, seed=3), 2)
    torch.testing.assert_close(first.x, first.truth @ models.W[1])
    assert not torch.equal(first.x, second.x)
    assert torch.equal(first.x, next(models.batches(1, 16, seed=3)).x)
    assert not torch.equal(first.x, next(models.batches(1, 16, seed=4)).x)


def test_dense_features_leave_the_two_most_important_and_sparse_ones_a_pentagon():
    falling = 0.5 ** torch.arange(5.0)
    models = ToyModels(5, 2, [0.0, 0.95] * 3, torch.stack([falling, torch.ones(5)] * 3)).fit(steps=600)
    dense, sparse = models.W[models.best()]
    torch.testing.assert_close(dense.norm(dim=1), torch.tensor([1.0, 1, 0, 0, 0]), atol=0.15, rtol=0)
    assert abs(dense[0] @ dense[1]) < 0.1
    torch.testing.assert_close(feature_dimensionality(sparse), torch.full((5,), 2 / 5), atol=0.03, rtol=0)


def test_importance_decides_which_feature_survives():
    importance = torch.tensor([[1.0, 4.0], [4.0, 1.0]])
    models = ToyModels(2, 1, [0.0, 0.0], importance).fit(steps=400)
    norms = models.W.norm(dim=2)
    assert norms[0, 1] > 0.9 > 0.3 > norms[0, 0]
    assert norms[1, 0] > 0.9 > 0.3 > norms[1, 1]


def test_the_loss_is_weighted_squared_error_summed_over_features():
    models = ToyModels(2, 1, [0.0], importance=torch.tensor([1.0, 3.0])).fit(steps=30, learning_rate=1e-9)
    first = next(models.batches(0, 200_000))
    error = first.truth - models.output(models.hidden(first.truth[None]))[0]
    by_hand = (error.square() * torch.tensor([1.0, 3.0])).sum(1).mean()
    assert models.losses.item() == pytest.approx(by_hand.item(), rel=0.2)  # three steps of 256 samples against many


def test_best_takes_the_lowest_loss_of_each_sparsity():
    models = ToyModels(2, 1, [0.5, 0.0, 0.5, 0.0])
    models.losses = torch.tensor([3.0, 1.0, 2.0, 4.0])
    assert models.best() == [1, 2]


def test_a_model_trained_beside_others_is_the_model_trained_with_other_neighbours():
    one = ToyModels(4, 2, [0.5, 0.0], seed=7).fit(steps=20)
    other = ToyModels(4, 2, [0.5, 0.9], seed=7).fit(steps=20)
    torch.testing.assert_close(one.W[0], other.W[0])
    assert not torch.allclose(one.W[1], other.W[1])


def test_the_seed_decides_the_initial_weights():
    assert torch.equal(ToyModels(4, 2, [0.5], seed=7).W, ToyModels(4, 2, [0.5], seed=7).W)
    assert not torch.equal(ToyModels(4, 2, [0.5], seed=7).W, ToyModels(4, 2, [0.5], seed=8).W)


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 2, [0.5]), "n_features must be an integer of at least 1, got 0"),
        ((5, 0, [0.5]), "d_hidden must be an integer of at least 1, got 0"),
        ((5, 2, [1.0]), r"sparsity must be in \[0, 1\), got \[1.0\]"),
        ((5, 2, []), "sparsity must be a list of numbers"),
        ((5, 2, [0.5], torch.ones(4)), r"importance must be a number.*got \(4,\)"),
        ((5, 2, [0.5], -1.0), "importance must be at least 0, got -1.0"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ToyModels(*arguments)


@pytest.mark.usefixtures("as_a_user")
def test_bad_training_and_places_are_refused():
    models = ToyModels(5, 2, [0.5])
    with pytest.raises(ValueError, match="steps must be at least 10 and batch_size at least 1, got 9 and 256"):
        models.fit(steps=9)
    with pytest.raises(ValueError, match=r"place must be in \[0, 1\)"):
        next(models.batches(1, 8))
