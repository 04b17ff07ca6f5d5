"""Numbers by hand are in the doctests; here are the properties that the definitions promise."""

import math
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lib.data import PlantedDictionary
from sae_lib.metrics import (
    cosines,
    latent_f1,
    mcc,
    mmcs,
    orbit_cosines,
    orbit_mcc,
    orbit_mmcs,
    recovery_rate,
    uniqueness,
)

OF_DIRECTIONS = (mcc, mmcs, recovery_rate, uniqueness)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("metric", OF_DIRECTIONS)
def test_the_true_dictionary_is_recovered_in_any_order_and_length(metric):
    directions = PlantedDictionary(12, 8).directions
    shuffled = directions[torch.randperm(12, generator=torch.Generator().manual_seed(1))]
    assert metric(shuffled * torch.linspace(0.1, 9, 12).unsqueeze(1), directions) == pytest.approx(1)


@pytest.mark.parametrize("metric", OF_DIRECTIONS)
def test_the_order_of_latents_and_of_features_does_not_matter(metric):
    W_dec, directions = draw(7, 4), draw(5, 4, seed=1)
    permuted = metric(W_dec[[3, 0, 6, 1, 5, 2, 4]], directions[[4, 2, 0, 1, 3]])
    assert permuted == pytest.approx(metric(W_dec, directions))


def test_signs_are_forgiven_by_mcc_and_uniqueness_and_not_by_mmcs_and_recovery_rate():
    directions = torch.eye(4)
    assert mcc(-directions, directions) == uniqueness(-directions, directions) == 1
    assert mmcs(-directions, directions) == recovery_rate(-directions, directions) == 0


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), n_latents=st.integers(1, 5), n_features=st.integers(1, 5))
def test_mcc_is_the_best_of_all_pairings(seed, n_latents, n_features):
    similarity = cosines(draw(n_latents, 3, seed=seed), draw(n_features, 3, seed=seed + 1)).abs()
    few, many = sorted((n_latents, n_features))
    by_pair = similarity if n_latents <= n_features else similarity.T
    best = max(by_pair[range(few), list(chosen)].mean().item() for chosen in permutations(range(many), few))
    assert mcc(draw(n_latents, 3, seed=seed), draw(n_features, 3, seed=seed + 1)) == pytest.approx(best)


def test_two_latents_on_one_feature_are_one_recovery_for_mcc_and_two_for_mmcs():
    one_for_two = torch.tensor([[1.0, 0, 0], [1.0, 0, 0]])
    directions = torch.tensor([[1.0, 0, 0], [0.8, 0.6, 0]])
    assert mcc(one_for_two, directions) == mmcs(one_for_two, directions) == pytest.approx(0.9)
    assert mcc(torch.tensor([[1.0, 0, 0], [0, 0, 1]]), directions) == pytest.approx(0.5)
    assert mmcs(torch.tensor([[1.0, 0, 0], [0, 0, 1]]), directions) == pytest.approx(0.9)
    assert uniqueness(one_for_two, directions) == 0.5


def test_recovery_rate_counts_features_at_or_above_the_threshold():
    directions = torch.eye(2)
    W_dec = torch.tensor([[3.0, 4.0], [5.0, 0.0]])  # largest cosines 1 and 0.8
    assert recovery_rate(W_dec, directions) == 0.5
    assert recovery_rate(W_dec, directions, threshold=0.8) == 1


def test_a_row_of_zeros_recovers_nothing():
    assert mcc(torch.zeros(2, 2), torch.eye(2)) == mmcs(torch.zeros(2, 2), torch.eye(2)) == 0


def test_the_true_code_detects_every_feature():
    dictionary = PlantedDictionary(6, 8, active=2)
    _, truth = dictionary.sample(200)
    perfect = {"precision": 1.0, "recall": 1.0, "f1": 1.0}
    assert latent_f1(dictionary.directions, dictionary.directions, truth, truth) == perfect
    order = [5, 3, 1, 0, 2, 4]  # the latents in another order, their code with them
    assert latent_f1(dictionary.directions[order], dictionary.directions, truth[:, order], truth) == perfect
    assert latent_f1(-dictionary.directions, dictionary.directions, 7 * truth, truth) == perfect


def test_detection_counts_over_tokens_in_any_order_and_whatever_their_magnitude():
    W_dec, directions = draw(4, 3), draw(5, 3, seed=1)
    z, truth = draw(40, 4, seed=2).relu(), draw(40, 5, seed=3).relu()
    by_hand = {"precision": 0.0, "recall": 0.0, "f1": 0.0}
    for latent in range(4):
        feature = cosines(W_dec, directions)[latent].abs().argmax()
        predicted, true = set(z[:, latent].nonzero()[:, 0].tolist()), set(truth[:, feature].nonzero()[:, 0].tolist())
        precision, recall = len(predicted & true) / len(predicted), len(predicted & true) / len(true)
        by_hand["precision"] += precision / 4
        by_hand["recall"] += recall / 4
        by_hand["f1"] += 2 * precision * recall / (precision + recall) / 4
    assert latent_f1(W_dec, directions, z, truth) == pytest.approx(by_hand)
    assert latent_f1(W_dec, directions, z.flip(0) * 9, truth.flip(0) * 0.1) == pytest.approx(by_hand)


def test_a_dead_latent_pulls_detection_down():
    truth = torch.eye(2)
    assert latent_f1(torch.eye(2), torch.eye(2), truth * torch.tensor([1.0, 0.0]), truth)["f1"] == 0.5


def turned(directions):
    """Orbits under turns by 90° in the plane of the first two and in that of the last two coordinates."""
    quarter = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    turn = torch.block_diag(quarter, quarter)
    return torch.stack([directions @ torch.linalg.matrix_power(turn, p) for p in range(4)], 1)


def test_any_copy_of_a_feature_will_do_but_one_feature_for_all_will_not():
    directions = PlantedDictionary(3, 4).directions
    orbits = turned(directions)
    for copies in torch.cartesian_prod(*[torch.arange(4)] * 3):
        assert orbit_mcc(orbits[range(3), copies], orbits) == pytest.approx(1)
        assert orbit_mmcs(orbits[range(3), copies], orbits) == pytest.approx(1)
    assert mcc(orbits[:, 1], directions) < 0.9
    assert orbit_mcc(orbits[0], orbits) < 0.9  # four latents, all copies of the first feature
    assert orbit_mmcs(orbits[0], orbits) < 0.9


def test_a_latent_for_each_copy_is_as_good_as_one_an_orbit():
    orbits = turned(PlantedDictionary(3, 4).directions)
    assert orbit_mcc(orbits.flatten(0, 1), orbits) == orbit_mcc(orbits[:, 2], orbits) == pytest.approx(1)


def test_orbits_of_one_element_are_plain_features():
    W_dec, directions = draw(7, 4), draw(5, 4, seed=1)
    torch.testing.assert_close(orbit_cosines(W_dec, directions.unsqueeze(1)), cosines(W_dec, directions))
    assert orbit_mcc(W_dec, directions.unsqueeze(1)) == pytest.approx(mcc(W_dec, directions))
    assert orbit_mmcs(W_dec, directions.unsqueeze(1)) == pytest.approx(mmcs(W_dec, directions))


def test_a_sign_is_forgiven_by_orbit_mcc_even_if_the_orbit_does_not_hold_it():
    orbits = torch.eye(4).view(2, 2, 4)
    W_dec = -torch.eye(4)[[0, 2]]
    assert (orbit_mcc(W_dec, orbits), orbit_mmcs(W_dec, orbits)) == (1, 0)


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mcc(torch.ones(2, 3), torch.ones(2, 4)), "directions must have the width of W_dec, d_in=3, got 4"),
        (
            lambda: mmcs(torch.ones(2), torch.ones(2, 2)),
            r"W_dec must be a matrix with at least one row, got shape \(2,\)",
        ),
        (lambda: uniqueness(torch.ones(2, 2), torch.ones(0, 2)), r"directions must be a matrix with at least one row"),
        (lambda: mcc(torch.full((2, 2), math.nan), torch.eye(2)), "W_dec must be finite, got NaN or infinite entries"),
        (
            lambda: orbit_mcc(torch.eye(2), torch.eye(2)),
            r"orbits must have shape \(n_features, group, d_in\), got \(2, 2\)",
        ),
        (
            lambda: recovery_rate(torch.eye(2), torch.eye(2), threshold=90),
            r"threshold must be a cosine, in \[-1, 1\], got 90",
        ),
        (
            lambda: latent_f1(torch.eye(2), torch.eye(2), torch.ones(5, 2), torch.ones(5, 3)),
            r"truth \(tokens, n_features=2\), of the same tokens, got \(5, 2\) and \(5, 3\)",
        ),
        (
            lambda: latent_f1(torch.eye(2), torch.eye(2), torch.ones(5, 2), torch.ones(4, 2)),
            r"of the same tokens, got \(5, 2\) and \(4, 2\)",
        ),
    ],
)
def test_bad_input_is_refused_with_rule_value_and_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call()
