"""Numbers by hand are in the doctests; here are known shapes, known mixtures, and what must not matter."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lib.metrics.polysemanticity import (
    effective_features,
    feature_correlations,
    feature_dimensionality,
    mixedness,
    top_examples,
)


def polygon(n):
    angle = 2 * math.pi * torch.arange(n) / n
    return torch.stack([angle.cos(), angle.sin()], 1)


@pytest.mark.parametrize(("n", "share"), [(3, 2 / 3), (4, 1 / 2), (5, 2 / 5)])
def test_a_regular_polygon_shares_its_plane_equally(n, share):
    torch.testing.assert_close(feature_dimensionality(polygon(n) * 1.7), torch.full((n,), share))


def test_dimensionalities_of_unequal_lengths_by_hand():
    # 3 along x, and 1 along -x: 9 / (9 + 1) and 1 / (9 + 1)
    torch.testing.assert_close(feature_dimensionality(torch.tensor([[3.0, 0], [-1, 0]])), torch.tensor([0.9, 0.1]))


def test_a_feature_without_weights_has_no_dimension():
    assert feature_dimensionality(torch.tensor([[1.0, 0], [0, 0]])).tolist() == [1, 0]


def test_effective_features_do_not_depend_on_signs_and_length():
    weights = torch.tensor([[1.0, -2, 3]])
    torch.testing.assert_close(effective_features(weights), torch.tensor([14**2 / 98]))
    torch.testing.assert_close(effective_features(-5 * weights), effective_features(weights))


def test_correlations_ignore_shifts_and_scales_and_see_signs():
    truth = torch.tensor([[0.0, 1], [1, 1], [0, 0], [1, 0]])
    z = torch.stack([3 * truth[:, 0] + 7, -truth[:, 1], truth.sum(1)], 1)
    expected = torch.tensor(
        [[1.0, 0], [0, -1], [0.5**0.5, 0.5**0.5]]
    )  # the features are independent, a sum has half of each
    torch.testing.assert_close(feature_correlations(z, truth), expected)


def test_each_document_gives_its_most_active_token():
    activations = torch.tensor([[1.0, 9], [8, 1], [3, 10], [7, 2], [0, 8]])
    found = top_examples(activations, torch.tensor([4, 4, 4, 2, 2]), threshold=0.75, most=5)
    assert found.tolist() == [[1, 3, -1, -1, -1], [2, 4, -1, -1, -1]]


def test_threshold_is_a_share_of_the_largest_activation_and_most_keeps_the_best():
    activations, documents = torch.tensor([[1.0], [2], [3], [4]]), torch.arange(4)
    assert top_examples(activations, documents, threshold=0.75, most=4).tolist() == [[3, 2, -1, -1]]
    assert top_examples(activations, documents, threshold=0.76, most=4).tolist() == [[3, -1, -1, -1]]
    assert top_examples(activations, documents, threshold=0, most=3).tolist() == [[3, 2, 1]]
    assert top_examples(activations, documents, threshold=0, most=5).tolist() == [[3, 2, 1, 0, -1]]


def test_a_unit_that_is_never_positive_has_no_examples():
    assert top_examples(torch.tensor([[0.0], [-1]]), torch.arange(2), threshold=0, most=2).tolist() == [[-1, -1]]


def test_mixedness_of_two_meanings_by_hand():
    # three of one kind, two of another: 6 + 2 of 20 ordered pairs are alike
    assert mixedness(torch.tensor([[0, 1, 2, 3, 4, -1]]), torch.tensor([5, 5, 5, 9, 9, 7])).item() == pytest.approx(0.6)


def test_mixedness_is_zero_for_one_kind_and_one_for_all_different():
    examples = torch.tensor([[0, 1, 2], [3, 4, 5]])
    assert mixedness(examples, torch.tensor([1, 1, 1, 0, 1, 2])).tolist() == [0, 1]


def test_fewer_than_two_examples_give_nan():
    assert mixedness(torch.tensor([[0, -1], [-1, -1]]), torch.tensor([0])).isnan().all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), n=st.integers(2, 12), kinds=st.integers(1, 5))
def test_mixedness_is_the_share_of_unlike_pairs_in_any_order_with_any_padding(seed, n, kinds):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(kinds, (n,), generator=generator)
    pairs = [labels[i] != labels[j] for i in range(n) for j in range(i)]
    shuffled = torch.cat([torch.full((3,), -1), torch.randperm(n, generator=generator)])[None]
    assert mixedness(shuffled, labels).item() == pytest.approx(sum(map(float, pairs)) / len(pairs), abs=1e-6)


def test_mixedness_does_not_grow_with_the_number_of_examples():
    """Drawn with replacement, few examples would look purer: 1 - 1/n of the truth."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(1000) % 2
    few, many = (torch.rand(2000, 1000, generator=generator).argsort(1)[:, :n] for n in (3, 30))
    assert mixedness(few, labels).mean().item() == pytest.approx(0.5, abs=0.02)
    assert mixedness(many, labels).mean().item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.usefixtures("as_a_user")
def test_bad_input_is_refused():
    activations, documents = torch.ones(4, 1), torch.tensor([0, 0, 1, 1])
    with pytest.raises(ValueError, match="truth must have the 4 tokens of z, got 3"):
        feature_correlations(activations, torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"threshold must be a share of the maximum, in \[0, 1\], got 75"):
        top_examples(activations, documents, threshold=75)
    with pytest.raises(ValueError, match="most must be at least 1, got 0"):
        top_examples(activations, documents, most=0)
    with pytest.raises(ValueError, match="must number each of the 4 tokens"):
        top_examples(activations, documents[:3])
    with pytest.raises(ValueError, match="in several pieces; sort by document"):
        top_examples(activations, torch.tensor([0, 1, 0, 1]))
    with pytest.raises(ValueError, match="labels must number the kind of every token"):
        mixedness(torch.tensor([[0, 3]]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="labels must number the kind of every token"):
        mixedness(torch.tensor([[0, 1]]), torch.tensor([0, -1]))
