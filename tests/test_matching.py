"""Matched sparsity: the search finds what it can find and says what it cannot; curves are read at one L0."""

import math

import pytest
import torch

import sae_lib
from sae_lib.matching import Search, at_equal_l0, match_l0, measured_l0


@pytest.mark.parametrize("slope", [-3.0, -1.5, -0.7, 0.8, 1.2])
@pytest.mark.parametrize("start", [0.01, 0.3, 20.0])
def test_a_power_law_is_met_within_a_few_trainings(slope, start):
    search = searched(Search(16, start, slope=math.copysign(1.0, slope)), lambda c: 5 * c**slope)
    assert abs(5 * search.guess**slope / 16 - 1) <= 0.03
    assert len(search.tried) <= 8


def test_a_curve_with_a_cliff_is_met_by_halving_what_brackets_it():
    def l0(coefficient):  # all latents die at once just above .52
        return 20 / (1 + coefficient) if coefficient < 0.52 else 0.0

    assert searched(Search(13.3, 4.0, slope=-1.5), l0).guess < 0.52


def searched(search: Search, l0) -> Search:
    while not search.met:
        search.tell(l0(search.guess))
    return search


def test_a_target_out_of_reach_names_what_was_tried():
    with pytest.raises(ValueError, match=r"within 3% of 16 in at most 10 trainings, got: 1 gives 4.00, 0.25 gives"):
        searched(Search(16, 1.0), lambda coefficient: 4.0)


def test_a_search_that_has_nothing_new_to_try_stops():
    search = Search(3, 3.0, slope=1.0)
    with pytest.raises(ValueError, match="a reachable target"):
        searched(search, lambda coefficient: 9 - coefficient)  # falls where it should rise, and never comes near 3
    assert len(search.tried) < 10


@pytest.mark.parametrize("bad", [{"target": 0, "guess": 1.0}, {"target": 3, "guess": -1.0}])
def test_targets_and_coefficients_are_above_zero(bad):
    with pytest.raises(ValueError, match="above 0"):
        Search(**bad)


def test_match_l0_trains_until_the_held_out_l0_is_met():
    planted = sae_lib.PlantedDictionary(16, 8, active=2)
    held, _ = planted.sample(2000, seed=77)
    sae, coefficient = match_l0(
        lambda c: sae_lib.ReLUSAE(8, 16, l1_coeff=c), planted.batches(128), held, target=2.5, start=0.1, tokens=20_000
    )
    assert abs(measured_l0(sae, held) / 2.5 - 1) <= 0.03
    assert coefficient != 0.1
    assert sae.l1_coeff == coefficient


def test_measured_l0_counts_living_latents_of_all_rows():
    sae = sae_lib.TopKSAE(8, 16, k=3)
    sae.W_enc.data.abs_()
    assert measured_l0(sae, torch.ones(5000, 8)) == 3


def test_a_curve_is_linear_in_log_l0():
    assert at_equal_l0([32, 8], [0.1, 0.3], at=16) == pytest.approx(0.2)
    assert at_equal_l0([8, 32], [0.3, 0.1], at=32.5) == 0.1  # within 3% of its end


def test_a_curve_that_does_not_reach_is_refused():
    with pytest.raises(ValueError, match="between the L0s of the curve, 8.00 and 32.00, got 64"):
        at_equal_l0([8, 32], [0.3, 0.1], at=64)
    with pytest.raises(ValueError, match="all different and above 0"):
        at_equal_l0([8, 8], [0.3, 0.1], at=8)
