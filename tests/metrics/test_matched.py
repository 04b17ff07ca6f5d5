"""Means over latents that fire alike."""

import math

import pytest
import torch

from sae_lib.metrics import matched_mean
from sae_lib.metrics.matched import LIMITS

FREQUENCIES = torch.tensor([0.002, 0.003, 0.01, 0.05])
VALUES = torch.tensor([1.0, 3.0, 5.0, 8.0])


def test_each_class_counts_the_same_whatever_its_number_of_latents():
    assert matched_mean(VALUES, FREQUENCIES) == pytest.approx((2 + 5 + 8) / 3)
    more = torch.cat([VALUES, torch.full((90,), 5.0)]), torch.cat([FREQUENCIES, torch.full((90,), 0.008)])
    assert matched_mean(*more) == pytest.approx((2 + 5 + 8) / 3)


def test_two_saes_whose_values_depend_on_frequency_alone_differ_in_the_mean_and_are_equal_matched():
    generator = torch.Generator().manual_seed(0)
    rare, frequent = (2 ** (torch.randn(4000, generator=generator) - mean) for mean in (8, 6))
    one, other = ((-f.clamp(LIMITS[0], LIMITS[-1]).log2()).floor() // 2 for f in (rare, frequent))
    assert one.mean() - other.mean() > 0.5
    assert matched_mean(one, rare) == pytest.approx(matched_mean(other, frequent), abs=0.02)


def test_what_fires_more_or_less_often_than_the_classes_is_left_out():
    outside = torch.tensor([0.0, LIMITS[0], 0.2, 1.0])  # a class has its upper limit, not its lower one
    more = torch.cat([VALUES, torch.full((4,), 1e6)]), torch.cat([FREQUENCIES, outside])
    assert matched_mean(*more) == matched_mean(VALUES, FREQUENCIES)
    at_the_limit = torch.cat([FREQUENCIES, torch.tensor([LIMITS[-1]])])
    assert matched_mean(torch.cat([VALUES, torch.tensor([10.0])]), at_the_limit) == pytest.approx((2 + 5 + 9) / 3)


def test_an_empty_class_leaves_nothing_to_match():
    assert math.isnan(matched_mean(VALUES[:3], FREQUENCIES[:3]))
