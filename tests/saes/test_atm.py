"""Adaptive Temporal Masking: numbers by hand."""

import math

import pytest
import torch

from sae_lib import ATMSAE, Batch, PlantedDictionary, ReLUSAE, train
from sae_lib.saes.atm import MEMORY


def by_hand(**arguments):
    """Encoder and decoder: identity, so that f = ReLU(x) and f_i = x_i."""
    sae = ATMSAE(3, 3, **{"l1_coeff": 0.5} | arguments).train()
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(3))
        sae.W_dec.copy_(torch.eye(3))
    return sae


def with_averages(magnitude, frequency, contribution, **arguments):
    sae = by_hand(**arguments)
    for name, values in (("magnitude", magnitude), ("frequency", frequency), ("contribution", contribution)):
        getattr(sae, name).copy_(torch.tensor(values))
    return sae


X = torch.tensor([[3.0, 1.0, -2.0], [1.0, -1.0, 0.0]])

# averages a = (4, 2, 0), q = (1, 1, 1), g = (0, 6, 0): divided by their means (2, 1, 0), (1, 1, 1), (0, 3, 0)
AVERAGES = [4.0, 2.0, 0.0], [1.0, 1.0, 1.0], [0.0, 6.0, 0.0]


# Importance, threshold, probability -----------------------------------------------------------------------------------


def test_importance_is_the_mean_of_the_three_averages_each_divided_by_its_mean():
    assert with_averages(*AVERAGES).importance.tolist() == pytest.approx([1, 5 / 3, 1 / 3])


def test_weights_say_which_averages_count_and_their_sum_does_not_matter():
    for weights, expected in [
        ((1, 0, 0), [2, 1, 0]),
        ((0, 5, 0), [1, 1, 1]),
        ((0, 0, 1), [0, 3, 0]),
        ((2, 2, 0), [1.5, 1, 0.5]),
    ]:
        assert with_averages(*AVERAGES, weights=weights).importance.tolist() == pytest.approx(expected)


def test_the_threshold_lies_some_standard_deviations_above_the_mean_importance():
    sd = math.sqrt((0 + 4 / 9 + 4 / 9) / 3)  # of (1, 5/3, 1/3), whose mean is 1
    for deviations in (-1.0, 0.0, 0.5, 2.0):
        sae = with_averages(*AVERAGES, deviations=deviations)
        assert sae.threshold.item() == pytest.approx(1 + deviations * sd)


def test_the_probability_rises_from_the_threshold_down():
    sae = with_averages(*AVERAGES, deviations=0, weights=(1, 0, 0), rate=2.0)  # importance (2, 1, 0), threshold 1
    assert sae.mask_probability.tolist() == pytest.approx([0, 0, 1 - math.exp(-2)])
    sae = with_averages([1.0, 3.0, 4.0], [1.0] * 3, [1.0] * 3, deviations=0, weights=(3, 0, 0), rate=2.0)
    assert sae.mask_probability.tolist() == pytest.approx([1 - math.exp(-2 * (8 / 3 - 1) / (8 / 3)), 0, 0])
    sae = with_averages(*AVERAGES, deviations=1, weights=(1, 0, 0), rate=2.0)  # the same importance
    threshold = 1 + math.sqrt(2 / 3)
    expected = [0, 1 - math.exp(-2 * (threshold - 1) / threshold), 1 - math.exp(-2)]
    assert sae.mask_probability.tolist() == pytest.approx(expected)


def test_without_a_rate_nothing_is_masked_and_with_a_very_large_one_all_below_is():
    assert with_averages(*AVERAGES, rate=0).mask_probability.tolist() == [0, 0, 0]
    assert with_averages(*AVERAGES, deviations=0, rate=1e6).mask_probability[[1, 2]].tolist() == [0, 1]


def test_a_threshold_that_is_not_positive_masks_nothing():
    sae = with_averages(*AVERAGES, deviations=-5.0)
    assert sae.threshold < 0
    assert sae.mask_probability.tolist() == [0, 0, 0]
    assert by_hand().mask_probability.tolist() == [0, 0, 0]  # before anything was seen


# The running averages -------------------------------------------------------------------------------------------------


def after_one_step(x=X, **arguments):
    sae = by_hand(**arguments)
    sae.decay.fill_(0.75)
    sae.after_step(Batch(x), sae.loss(Batch(x)).code)
    return sae


def test_magnitude_and_frequency_are_means_over_tokens_of_the_code():
    sae = after_one_step()  # f = (3, 1, 0), (1, 0, 0); a quarter of the new enters the averages
    assert sae.magnitude.tolist() == [0.25 * 2, 0.25 * 0.5, 0]
    assert sae.frequency.tolist() == [0.25 * 1, 0.25 * 0.5, 0]


def test_contribution_is_the_rise_of_the_squared_error_without_the_latent():
    sae = ATMSAE(3, 4, l1_coeff=0.5, seed=3).train()  # directions at any angle
    sae.decay.fill_(0.0)
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.W_enc.mul_(10)
        code = sae.loss(Batch(x)).code
        sae.after_step(Batch(x), code)
        error = (x - sae.decode(code)).square().sum(1).mean()
        for latent in range(4):
            without = code.dense().clone()
            without[:, latent] = 0
            rise = (x - sae.decode(without)).square().sum(1).mean() - error
            assert sae.contribution[latent].item() == pytest.approx(max(rise.item(), 0), rel=1e-4, abs=1e-6)
    assert (sae.contribution > 0).any()


def test_a_latent_that_does_harm_contributes_nothing_rather_than_less():
    sae = by_hand()
    sae.decay.fill_(0.0)
    with torch.no_grad():
        sae.b_enc.copy_(torch.tensor([10.0, 0.0, 0.0]))  # f_0 = 13 where x_0 = 3: far too much
    sae.after_step(Batch(X[:1]), sae.loss(Batch(X[:1])).code)
    assert sae.contribution.tolist() == [0, 1, 0]


def test_the_averages_forget_at_the_decay():
    sae = after_one_step()
    sae.after_step(Batch(X), sae.loss(Batch(X)).code)
    assert sae.magnitude.tolist() == pytest.approx([2 * (1 - 0.75**2), 0.5 * (1 - 0.75**2), 0])


def test_that_the_averages_start_at_zero_cancels_in_the_importance():
    one = after_one_step()
    one.decay.fill_(0.0)
    other = by_hand()
    other.decay.fill_(0.0)
    for sae in (one, other):
        sae.after_step(Batch(X), sae.loss(Batch(X)).code)
    assert torch.allclose(after_one_step().importance, other.importance)


def test_the_averages_are_of_the_code_without_the_mask():
    sae = by_hand()
    sae.kept.copy_(torch.tensor([0.0, 1.0, 1.0]))
    sae.decay.fill_(0.75)
    sae.after_step(Batch(X), sae.loss(Batch(X)).code)
    free = after_one_step()
    for name in ("magnitude", "frequency", "contribution"):
        assert torch.equal(getattr(sae, name), getattr(free, name))
    assert not sae.tokens_since_fired[0]


def test_the_averages_remember_a_share_of_the_run():
    sae = by_hand()
    sae.start(Batch(torch.zeros(10, 3)), tokens=10_000)  # 1,000 steps
    assert sae.decay.item() == pytest.approx(1 - 1 / (1000 * MEMORY))
    sae.start(Batch(torch.zeros(10, 3)), tokens=20)
    assert sae.decay == 0  # at least the last batch


# The mask in the loss -------------------------------------------------------------------------------------------------


def test_loss_by_hand_is_that_of_the_masked_code():
    sae = by_hand()
    sae.kept.copy_(torch.tensor([0.0, 1.0, 1.0]))
    loss = sae.loss(Batch(X))
    assert loss.code.dense().tolist() == [[3, 1, 0], [1, 0, 0]]
    assert loss.x_hat.tolist() == [[0, 1, 0], [0, 0, 0]]
    assert loss.terms["reconstruction"].item() == pytest.approx((9 + 4 + 1 + 1) / 2)
    assert loss.terms["sparsity"].item() == pytest.approx(0.5 * 1 / 2)


def test_a_masked_latent_learns_nothing_in_that_step():
    sae = by_hand()
    sae.kept.copy_(torch.tensor([0.0, 1.0, 1.0]))
    sae.loss(Batch(X)).total.backward()
    assert sae.W_enc.grad[:, 0].abs().sum() == sae.W_dec.grad[0].abs().sum() == sae.b_enc.grad[0] == 0
    assert sae.W_enc.grad[:, 1].abs().sum() > 0


def test_without_a_mask_it_is_the_relu_sae():
    planted = PlantedDictionary(16, 8, active=2)
    relu, atm = ReLUSAE(8, 16, 0.2), ATMSAE(8, 16, 0.2, rate=0)
    train([relu, atm], planted.batches(256, seed=0), tokens=20_000)
    x = planted.sample(1000, seed=1)[0]
    assert torch.equal(relu.encode(x), atm.encode(x))
    assert torch.equal(relu(x), atm(x))


# The draw -------------------------------------------------------------------------------------------------------------


def masks(sae, n, progress=0.5):
    kept = []
    for _ in range(n):
        sae.before_step(progress)
        kept.append(sae.kept.clone())
    return torch.stack(kept)


def test_each_step_draws_each_latent_with_its_probability():
    sae = with_averages(*AVERAGES, deviations=1.0, rate=1.0)
    kept = masks(sae, 1000)
    assert torch.allclose(1 - kept.mean(0), sae.mask_probability, atol=0.05)
    assert torch.equal(sae.times_masked, (kept == 0).sum(0))
    assert sae.draws == 1000


def test_nothing_is_masked_in_the_first_tenth_of_a_run():
    sae = with_averages(*AVERAGES, deviations=1.0, rate=1e6)
    assert masks(sae, 1, progress=0.1)[0].tolist() == [0, 1, 0]
    assert masks(sae, 5, progress=0.099).all()
    assert sae.draws == 1


def test_the_seed_decides_the_masks_and_the_global_generator_does_not():
    one, two, other = (with_averages(*AVERAGES, deviations=1.0, seed=seed) for seed in (0, 0, 1))
    torch.manual_seed(5)
    drawn = masks(one, 20)
    assert torch.equal(drawn, masks(two, 20))
    assert not torch.equal(drawn, masks(other, 20))


def test_the_penalty_grows_over_the_first_twentieth_of_the_run():
    sae = by_hand(rate=0)
    full = sae.loss(Batch(X)).terms["sparsity"]
    for progress, share in [(0.0, 0.0), (0.025, 0.5), (0.05, 1.0), (0.9, 1.0)]:
        sae.before_step(progress)
        assert torch.isclose(sae.loss(Batch(X)).terms["sparsity"], share * full)


# Evaluation -----------------------------------------------------------------------------------------------------------


def test_evaluation_has_no_mask_a_hard_one_or_the_expected_one():
    arguments = {"deviations": 0, "weights": (1, 0, 0), "rate": 2.0}  # importance (2, 1, 0), threshold 1
    x = torch.tensor([[5.0, 6.0, 7.0]])
    for eval_mask, expected in [("none", [5, 6, 7]), ("hard", [5, 6, 0]), ("expected", [5, 6, 7 * math.exp(-2)])]:
        sae = with_averages(*AVERAGES, **arguments, eval_mask=eval_mask).eval()
        sae.kept.zero_()  # the last draw of training
        assert sae.encode(x)[0].tolist() == pytest.approx(expected)
        assert sae.loss(Batch(x)).x_hat[0].tolist() == pytest.approx(expected)
        assert sae.train().encode(x)[0].tolist() == [5, 6, 7]


def test_folding_changes_the_units_of_the_averages_and_not_the_mask():
    sae = with_averages(*AVERAGES)
    importance = sae.importance
    sae.fold(3.0)
    assert (sae.magnitude.tolist(), sae.frequency.tolist()) == ([12, 6, 0], [1, 1, 1])
    assert sae.contribution.tolist() == [0, 54, 0]
    assert torch.allclose(sae.importance, importance)


def test_masking_in_training_makes_the_code_sparser_at_the_same_penalty():
    planted = PlantedDictionary(32, 16, active=3)
    saes = [ATMSAE(16, 64, 0.2, rate=rate) for rate in (0.0, 2.0)]
    train(saes, planted.batches(256, seed=0), tokens=50_000)
    x = planted.sample(2000, seed=1)[0]
    without, masked = ((sae.encode(x) > 0).sum(1).float().mean().item() for sae in saes)
    assert saes[0].times_masked.sum() == 0 < saes[1].times_masked.sum()
    assert masked != pytest.approx(without, rel=0.02)


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"l1_coeff": 0}, "l1_coeff must be a finite number above 0, got 0"),
        ({"deviations": float("nan")}, "deviations must be a finite number, got nan"),
        ({"deviations": "some"}, "deviations must be a finite number, got 'some'"),
        ({"rate": -1.0}, "rate must be a finite number of at least 0, got -1.0"),
        ({"rate": float("inf")}, "rate must be a finite number of at least 0, got inf"),
        ({"weights": (1, 1)}, "weights must be of magnitude, frequency and contribution, got \\(1, 1\\)"),
        ({"weights": 3}, "weights must be of magnitude, frequency and contribution, got 3"),
        ({"weights": (1, -1, 1)}, "a weight must be a finite number of at least 0, got -1"),
        ({"weights": (0, 0, 0)}, "weights must not all be 0.*rate=0"),
        ({"eval_mask": "soft"}, "eval_mask must be one of none, hard, expected, got 'soft'"),
    ],
)
def test_bad_arguments_are_refused_with_rule_and_value(arguments, message, as_a_user):
    with pytest.raises(ValueError, match=message):
        by_hand(**arguments)
