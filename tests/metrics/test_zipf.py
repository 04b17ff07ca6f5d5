"""Zipf's law is recognised, and told from what merely falls."""

import pytest
import torch

from sae_lib.metrics import zipf_fit, zipf_shift

RANKS = torch.arange(1, 201, dtype=torch.float64)


def shuffled(densities):
    return densities[torch.randperm(len(densities), generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.7])
def test_the_planted_exponent_is_found_whatever_the_order_and_the_dead(exponent):
    densities = torch.cat([shuffled(0.3 * RANKS**-exponent), torch.zeros(50)])
    fit = zipf_fit(densities)
    assert fit["zipf_exponent"] == pytest.approx(exponent)
    assert fit["zipf_r2"] == pytest.approx(1)
    assert fit["zipf_latents"] == 200


def test_the_shift_bends_the_head():
    densities = (RANKS + 6.8) ** -1.0
    assert zipf_fit(densities, shift=6.8) == pytest.approx(
        {"zipf_exponent": 1, "zipf_r2": 1, "lognormal_r2": zipf_fit(densities)["lognormal_r2"], "zipf_latents": 200}
    )
    assert zipf_fit(densities)["zipf_r2"] < 0.99


def test_the_fit_is_the_least_squares_line_in_logarithms():
    """Logarithms 0, 0, ... and -1 at the last of ten ranks: slope and R2 from the sums."""
    x = torch.arange(1, 11, dtype=torch.float64).log()
    y = torch.zeros(10, dtype=torch.float64)
    y[-1] = -1
    fit = zipf_fit(y.exp())
    covariance, variance = ((x - x.mean()) * (y + 0.1)).sum(), (x - x.mean()).square().sum()
    assert fit["zipf_exponent"] == pytest.approx(-(covariance / variance).item())
    assert fit["zipf_r2"] == pytest.approx((covariance**2 / variance / 0.9).item())  # 0.9: the variance of y, summed


def test_log_normal_densities_are_told_from_zipfs():
    normal = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(200) + 0.5) / 200)
    densities = 0.01 * normal.double().exp()
    fit = zipf_fit(shuffled(densities))
    assert fit["lognormal_r2"] == pytest.approx(1)
    assert fit["zipf_r2"] < 0.9
    assert zipf_fit(0.3 / RANKS)["lognormal_r2"] < 0.9


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(20) * 2,), r"in \[0, 1\], got shape \(20,\)"),
        ((torch.full((20,), torch.nan),), r"in \[0, 1\]"),
        ((torch.ones(2, 20),), r"vector of numbers in \[0, 1\], got shape \(2, 20\)"),
        ((torch.cat([torch.ones(9), torch.zeros(9)]),), "at least 10 latents must live for a fit, got 9"),
        ((torch.ones(20), -1), "shift must be a finite number of at least 0, got -1"),
    ],
)
def test_bad_input_is_refused_with_rule_value_and_remedy(arguments, message):
    with pytest.raises(ValueError, match=message):
        zipf_fit(*arguments)


@pytest.mark.parametrize(("exponent", "shift"), [(1.0, 6.8), (0.7, 0.0), (1.5, 200.0)])
def test_the_planted_shift_is_found_in_logarithms_and_in_densities(exponent, shift):
    densities = shuffled(0.5 * ((RANKS + shift) / (1 + shift)) ** -exponent)
    fit = zipf_shift(torch.cat([densities, torch.zeros(9)]), exponent)
    assert fit["zipf_shift"] == pytest.approx(shift, abs=0.01)
    assert fit["zipf_shift_linear"] == pytest.approx(shift, abs=0.01)
    assert (fit["zipf_r2"], fit["zipf_r2_linear"]) == pytest.approx((1, 1))
    assert fit["zipf_latents"] == 200
    assert fit["lognormal_r2"] == zipf_fit(densities)["lognormal_r2"]


def test_no_other_shift_explains_more():
    generator = torch.Generator().manual_seed(0)
    densities = ((RANKS + 20) ** -1.0 * (0.3 * torch.randn(200, generator=generator, dtype=torch.float64)).exp()).sort(
        descending=True
    )[0]
    fit = zipf_shift(densities)
    assert fit["zipf_shift"] != pytest.approx(fit["zipf_shift_linear"], rel=0.01)
    for shift in (0.0, 5.0, 15.0, 20.0, 25.0, 60.0):
        law = 1 / (RANKS + shift)
        away = (densities.log() - law.log()).var(correction=0) / densities.log().var(correction=0)
        assert fit["zipf_r2"] >= 1 - away
        c = (densities * law).sum() / (law * law).sum()
        away = (densities - c * law).square().sum() / (densities - densities.mean()).square().sum()
        assert fit["zipf_r2_linear"] >= 1 - away


@pytest.mark.parametrize("exponent", [0.0, -1.0, float("inf"), float("nan")])
def test_a_fitted_law_must_fall(exponent, as_a_user):
    with pytest.raises(ValueError, match="exponent must be a finite number above 0, got"):
        zipf_shift(0.1 / RANKS, exponent)
