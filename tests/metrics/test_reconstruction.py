"""Numbers by hand are in the doctests; here are the properties that the definitions promise."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lib.metrics import (
    Reconstruction,
    alive,
    cosine,
    dense,
    density,
    density_histogram,
    explained_variance,
    fvu,
    kl,
    l0,
    l2_ratio,
    loss_recovered,
    mse,
    relative_reconstruction_bias,
)

OF_PAIRS = (mse, fvu, explained_variance, cosine, l2_ratio, relative_reconstruction_bias)
OF_CODES = (l0, alive, dense)


def made_up(seed=0, tokens=50, d_in=6, d_sae=9, mean=2.0):
    """Activations with a mean, an imperfect reconstruction, and a code in which latent 0 is dead."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, d_in, generator=generator) + mean
    x_hat = 0.8 * x + 0.3 * torch.randn(tokens, d_in, generator=generator)
    z = torch.rand(tokens, d_sae, generator=generator) * (torch.rand(tokens, d_sae, generator=generator) < 0.1)
    z[:, 0] = 0
    return x, x_hat, z


@pytest.mark.parametrize("metric", OF_PAIRS)
def test_a_perfect_reconstruction_has_the_perfect_number(metric):
    x, _, _ = made_up()
    perfect = {mse: 0, fvu: 0, explained_variance: 1, cosine: 1, l2_ratio: 1, relative_reconstruction_bias: 1}
    assert metric(x, x) == pytest.approx(perfect[metric], abs=1e-12)


@pytest.mark.parametrize("metric", OF_PAIRS)
def test_the_order_of_tokens_does_not_matter(metric):
    x, x_hat, _ = made_up()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    assert metric(x[order], x_hat[order]) == pytest.approx(metric(x, x_hat), rel=1e-12)


@pytest.mark.parametrize("metric", OF_CODES)
def test_the_order_of_tokens_and_of_latents_does_not_matter(metric):
    _, _, z = made_up()
    tokens, latents = (torch.randperm(n, generator=torch.Generator().manual_seed(1)) for n in z.shape)
    assert metric(z[tokens][:, latents]) == pytest.approx(metric(z), rel=1e-12)


def test_a_rotation_of_the_space_changes_no_number():
    x, x_hat, _ = made_up()
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    for metric in OF_PAIRS:
        assert metric(x.double() @ rotation, x_hat.double() @ rotation) == pytest.approx(metric(x, x_hat), rel=1e-9)


def test_a_shift_of_data_and_reconstruction_leaves_the_centred_numbers_and_changes_the_others():
    x, x_hat, _ = made_up()
    shift = torch.tensor([100.0, -50, 3, 0, 0, 7])
    for metric in (mse, fvu, explained_variance):
        assert metric(x + shift, x_hat + shift) == pytest.approx(metric(x, x_hat), rel=1e-4)
    for metric in (cosine, l2_ratio, relative_reconstruction_bias):
        assert abs(metric(x + shift, x_hat + shift) - metric(x, x_hat)) > 0.01


def test_a_common_factor_changes_the_squared_error_alone():
    x, x_hat, _ = made_up()
    assert mse(2 * x, 2 * x_hat) == pytest.approx(4 * mse(x, x_hat), rel=1e-6)
    for metric in OF_PAIRS[1:]:
        assert metric(2 * x, 2 * x_hat) == pytest.approx(metric(x, x_hat), rel=1e-6)


def test_the_mean_as_reconstruction_explains_nothing():
    x, _, _ = made_up()
    assert explained_variance(x, x.double().mean(0).expand(x.shape)) == pytest.approx(0, abs=1e-12)


def test_a_constant_error_counts():
    x, _, _ = made_up()
    assert fvu(x, x + 1) > 0.5


def test_dividing_by_the_bias_leaves_the_least_error():
    x, x_hat, _ = made_up()
    best = x_hat / relative_reconstruction_bias(x, x_hat)
    assert relative_reconstruction_bias(x, best) == pytest.approx(1, rel=1e-6)
    assert mse(x, best) < min(mse(x, 0.98 * best), mse(x, 1.02 * best), mse(x, x_hat))


def test_undefined_numbers_are_nan():
    constant = torch.full((10, 3), 0.1, dtype=torch.float64)  # its mean is not quite 0.1
    assert math.isnan(fvu(constant, constant + 1))
    assert math.isnan(explained_variance(constant, constant))
    assert math.isnan(cosine(torch.zeros(2, 3), torch.ones(2, 3)))
    assert math.isnan(l2_ratio(torch.zeros(2, 3), torch.ones(2, 3)))
    assert math.isnan(relative_reconstruction_bias(torch.ones(2, 3), torch.zeros(2, 3)))
    assert math.isnan(loss_recovered(2.0, 2.0, 2.0))


def test_a_reconstruction_of_zero_has_cosine_zero_and_a_token_of_zero_is_left_out():
    assert cosine(torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([[2.0, 0], [0, 0]])) == 0.5
    assert cosine(torch.tensor([[1.0, 0], [0, 0]]), torch.tensor([[2.0, 0], [0, 1]])) == 1


def test_dense_counts_latents_above_the_threshold_and_not_at_it():
    z = torch.zeros(10, 3)
    z[:1, 0], z[:2, 1] = 1, 1  # densities 0.1, 0.2, 0
    assert dense(z) == dense(z, threshold=0.1) == pytest.approx(1 / 3)
    assert dense(z, threshold=0.05) == pytest.approx(2 / 3)


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(1, 49), max_size=6, unique=True), mean=st.sampled_from([0.0, 1.0, 1e3]))
def test_a_stream_has_the_numbers_of_all_its_tokens_at_once_whatever_the_batches(cuts, mean):
    x, x_hat, z = made_up(mean=mean)
    x[7], x_hat[9] = 0, 0
    accumulator = Reconstruction()
    for part in torch.tensor_split(torch.arange(50), sorted(cuts)):
        accumulator.update(x[part], x_hat[part], z[part])
    report = accumulator.compute()
    assert report.pop("tokens") == 50
    expected = {metric.__name__: metric(x, x_hat) for metric in OF_PAIRS} | {m.__name__: m(z) for m in OF_CODES}
    assert report == pytest.approx(expected, rel=1e-9)
    assert accumulator.density.tolist() == density(z).tolist()


def test_a_stream_has_nan_where_its_tokens_at_once_have():
    constant = torch.full((5, 3), 0.1, dtype=torch.float64)
    accumulator = Reconstruction()
    for part in (slice(0, 2), slice(2, 5)):
        accumulator.update(constant[part], torch.zeros(5, 3)[part], torch.ones(5, 2)[part])
    report = accumulator.compute()
    assert {name for name, value in report.items() if math.isnan(value)} == {
        "fvu",
        "explained_variance",
        "relative_reconstruction_bias",
    }


def test_the_histogram_holds_every_living_latent_once():
    counts, edges = density_histogram(torch.tensor([0, 1e-9, 1e-6, 0.003, 0.03, 0.03, 1.0]), decades=3, bins_a_decade=1)
    assert counts.tolist() == [3, 2, 1]  # the lowest bin holds the rarest ones too
    assert edges.tolist() == pytest.approx([1e-3, 1e-2, 1e-1, 1])
    assert density_histogram(edges, decades=3, bins_a_decade=1)[0].tolist() == [2, 1, 1]  # a bin holds its upper edge
    _, _, z = made_up()
    assert density_histogram(density(z))[0].sum() == 8  # of nine latents, one is dead


def test_loss_recovered_is_one_for_no_loss_zero_for_the_ablation_and_has_no_limits():
    assert loss_recovered(2.0, 2.0, 5.0) == 1
    assert loss_recovered(2.0, 5.0, 5.0) == 0
    assert loss_recovered(2.0, 8.0, 5.0) == -1
    assert loss_recovered(2.0, 1.0, 3.0) == 2


def test_loss_recovered_forgets_the_unit_and_the_zero_of_the_loss():
    clean, patched = torch.tensor([1.0, 2, 3]), torch.tensor([2.0, 2, 4])
    ablated = torch.tensor([9.0, 3, 7])
    recovered = loss_recovered(clean, patched, ablated)
    assert loss_recovered(2 * clean + 5, 2 * patched + 5, 2 * ablated + 5) == pytest.approx(recovered)
    assert loss_recovered(clean.flip(0), patched, ablated.mean().item()) == pytest.approx(recovered)


def test_kl_is_zero_between_equal_predictions_positive_otherwise_and_not_symmetric():
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 3, 4, 11, generator=generator)
    assert kl(p, p + 5).abs().max() < 1e-6
    assert kl(p, q).shape == (3, 4)
    assert (kl(p, q) > 0).all()
    assert not torch.allclose(kl(p, q), kl(q, p))
    expected = torch.nn.functional.kl_div(q.log_softmax(-1), p.softmax(-1), reduction="none").sum(-1)
    assert torch.allclose(kl(p, q), expected, atol=1e-6)


ONES = torch.ones(2, 3)


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mse(ONES, torch.ones(2, 4)), r"x_hat must have the shape of x, \(2, 3\), got \(2, 4\)"),
        (
            lambda: fvu(torch.ones(0, 3), torch.ones(0, 3)),
            r"x must be a matrix with at least one row, got shape \(0, 3\)",
        ),
        (lambda: cosine(ONES, ONES / 0), "x_hat must be finite, got NaN or infinite entries in 2 of 2 rows"),
        (lambda: l0(torch.tensor([[1.0], [math.nan]])), "z must be finite, got NaN or infinite entries in 1 of 2 rows"),
        (lambda: l0(torch.ones(3)), r"z must be a matrix with at least one row, got shape \(3,\)"),
        (
            lambda: l0(torch.ones(3, 2, dtype=torch.int64)),
            r"z must be floating, got torch.int64; convert it with z.float",
        ),
        (lambda: dense(ONES, threshold=1.0), r"threshold must be in \[0, 1\), got 1.0"),
        (lambda: density_histogram(torch.tensor([2.0])), r"densities must be a vector of numbers in \[0, 1\]"),
        (lambda: density_histogram(torch.tensor([0.5]), decades=0), "decades and bins_a_decade must be at least 1"),
        (lambda: loss_recovered(math.nan, 1.0, 2.0), "clean must be finite losses"),
        (lambda: loss_recovered(1.0, 1.0, torch.tensor([])), "ablated must be finite losses"),
        (lambda: kl(ONES, torch.ones(2, 4)), r"must have the same shape .* got \(2, 3\) and \(2, 4\)"),
        (lambda: kl(ONES, ONES / 0), "logits must be finite"),
        (lambda: Reconstruction().compute(), "there must be at least one token, got none; call update first"),
        (lambda: Reconstruction().update(ONES, ONES, torch.ones(3, 4)), "a row for each of the 2 tokens of x, got 3"),
    ],
)
def test_bad_input_is_refused_with_rule_value_and_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_finite_numbers_whose_sum_is_not_are_accepted():
    assert l0(torch.full((2, 3), 6e4, dtype=torch.float16)) == 3


@pytest.mark.parametrize(("d_in", "d_sae"), [(4, 4), (3, 5)])
def test_a_stream_that_changes_its_width_is_refused(d_in, d_sae):
    accumulator = Reconstruction()
    accumulator.update(ONES, ONES, torch.ones(2, 4))
    with pytest.raises(ValueError, match=f"d_in=3 and d_sae=4, got {d_in} and {d_sae}"):
        accumulator.update(torch.ones(2, d_in), torch.ones(2, d_in), torch.ones(2, d_sae))
