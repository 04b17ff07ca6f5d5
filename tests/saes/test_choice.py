"""Mutual Choice and Feature Choice: numbers by hand."""

import copy

import pytest
import torch

from sae_lib import Batch, BatchTopKSAE, FeatureChoiceSAE, MutualChoiceSAE, PlantedDictionary, train
from sae_lib.sae import auxk
from sae_lib.saes.choice import DENSITY_MEMORY, nfm_inf_loss, nfm_loss, zipf_densities


def by_hand(kind=MutualChoiceSAE, **arguments):
    sae = kind(3, 3, k=1, **arguments).train()
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(3))
        sae.W_dec.copy_(torch.eye(3))
    return sae


def feature_choice(order=(0, 1, 2), **arguments):
    """In phase two, with latents ranked as `order` says; budgets are rounded down, as nothing is drawn."""
    sae = by_hand(FeatureChoiceSAE, **{"shift": 0.0} | arguments)
    sae.density[torch.tensor(order)] = torch.tensor([0.9, 0.5, 0.1])
    sae.before_step(0.9)
    sae.draws.zero_()
    return sae


# Zipf's law -----------------------------------------------------------------------------------------------------------


def test_budgets_fall_with_rank_and_add_up_to_k():
    assert zipf_densities(3, 1, 1.0, 0.0).tolist() == pytest.approx([6 / 11, 3 / 11, 2 / 11])
    assert zipf_densities(2, 6, 2.0, 1.0).tolist() == pytest.approx([6 * 9 / 13, 6 * 4 / 13])  # 1/4 and 1/9
    assert zipf_densities(4, 2, 0.0, 6.8).tolist() == [0.5] * 4


def test_the_floor_of_algorithm_1_starves_the_latents_that_were_computed_for_it():
    """The paper's batch of 1,536 tokens, its alpha and beta: share without a token, first and last budget."""
    for d_sae, k, starved, first, last in [(6144, 24, 0.110, 701, 0.89), (24576, 24, 0.816, 581, 0.18)]:
        budgets = 1536 * zipf_densities(d_sae, k, 1.0, 6.8)
        assert (budgets < 1).double().mean().item() == pytest.approx(starved, abs=1e-3)
        assert int(budgets[0]) == first
        assert budgets[-1].item() == pytest.approx(last, abs=5e-3)


# Mutual choice --------------------------------------------------------------------------------------------------------


def test_without_its_second_loss_a_training_run_is_batchtopks_to_the_bit():
    data = [torch.randn(96, 8, generator=torch.Generator().manual_seed(step)) for step in range(40)]
    mutual, other = MutualChoiceSAE(8, 256, 2, zipf_coeff=0.0, exponent=0.0), BatchTopKSAE(8, 256, 2)
    run = train([mutual, other], data, tokens=40 * 96)
    assert max(row["aux"] for row in run.history) > 0  # AuxK took part
    assert mutual.dying.any()
    for name, value in other.state_dict().items():
        assert torch.equal(mutual.state_dict()[name], value), name
    assert torch.equal(mutual.encode(data[0]), other.encode(data[0]))


def test_its_second_loss_changes_the_run():
    data = [torch.randn(96, 8, generator=torch.Generator().manual_seed(step)) for step in range(10)]
    with_it, without = (MutualChoiceSAE(8, 256, 2, zipf_coeff=c, exponent=0.0) for c in (1 / 32, 0.0))
    train([with_it, without], data, tokens=10 * 96)
    assert not torch.equal(with_it.W_dec, without.W_dec)


def eight(*densities):
    sae = MutualChoiceSAE(2, 8, k=1, exponent=1.0, shift=0.0).train()
    sae.density.copy_(torch.tensor(densities))
    return sae


EXPECTED = zipf_densities(8, 1, 1.0, 0.0)[6:].float()  # .0526 and .0460: of the last quarter, ranks 7 and 8


def test_a_latent_is_dying_in_the_last_quarter_below_three_fifths_of_its_expectation():
    a, b = (EXPECTED * 0.59).tolist()
    assert eight(1, 1, 1, a, 1, 1, b, 1).dying.nonzero().flatten().tolist() == [3, 6]
    a, b = (EXPECTED * 0.61).tolist()
    assert not eight(1, 1, 1, a, 1, 1, b, 1).dying.any()


def test_a_latent_is_not_dying_while_one_behind_it_is_not():
    a, b = 0.59 * EXPECTED[0], 0.61 * EXPECTED[1]
    assert b < a
    assert not eight(1, 1, 1, 1, 1, 1, a, b).dying.any()
    assert eight(1, 1, 1, 1, 1, 1, a, 0.59 * EXPECTED[1]).dying.tolist() == [False] * 6 + [True] * 2


def test_outside_of_the_last_quarter_nothing_is_dying_however_rare():
    assert eight(*[0.0] * 8).dying.sum() == 2


def test_nothing_is_dying_before_the_first_step():
    assert not MutualChoiceSAE(2, 8, k=1).dying.any()


def test_the_second_loss_is_auxk_of_the_dying_that_are_not_dead():
    sae = MutualChoiceSAE(4, 16, k=1, aux_coeff=0.5, zipf_coeff=0.25).train()
    sae.density[10:] = 0
    sae.tokens_since_fired[14:] = sae.dead_window
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    assert sae.dying.nonzero().flatten().tolist() == [12, 13, 14, 15]
    loss, scores = sae.loss(Batch(x)), sae.scores(x)
    residual = x - loss.x_hat
    chosen = torch.zeros(16, dtype=torch.bool).index_fill(0, torch.tensor([12, 13]), True)
    assert loss.terms["aux"] == 0.5 * auxk(sae, scores, residual, sae.dead)
    assert loss.terms["aux_zipf"] == 0.25 * auxk(sae, scores, residual, chosen)
    assert loss.terms["aux_zipf"] not in (0, 0.25 * auxk(sae, scores, residual, sae.dying))


def test_densities_are_bias_corrected_running_means():
    sae = by_hand()
    for x in (torch.tensor([[3.0, 2.0, 0.0], [0.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0], [0.0, 4.0, 0.0]])):
        sae.after_step(Batch(x), sae.loss(Batch(x)).code)
    first, second = DENSITY_MEMORY / (1 + DENSITY_MEMORY), 1 / (1 + DENSITY_MEMORY)
    expected = [0.5 * first, 0.5 * first + 1.0 * second, 0.0]
    assert sae.density.tolist() == pytest.approx(expected, rel=1e-5)


# Feature choice -------------------------------------------------------------------------------------------------------

X = torch.tensor([[3.0, 1.0, 2.0], [5.0, -2.0, 0.5], [4.0, 6.0, 0.1], [-1.0, -1.0, -1.0]])


def test_each_latent_keeps_its_budget_of_tokens():
    # 4 tokens times 6/11, 3/11, 2/11: 2.18, 1.09 and 0.73
    sae = feature_choice()
    assert sae.select(sae.scores(X), Batch(X)).dense().tolist() == [[0, 0, 0], [5, 0, 0], [4, 6, 0], [0, 0, 0]]
    sae.draws.fill_(0.28)  # 0.73 + 0.28 is above 1, and so is none of the others' rest
    assert sae.select(sae.scores(X), Batch(X)).dense().tolist() == [[0, 0, 2], [5, 0, 0], [4, 6, 0], [0, 0, 0]]


def test_budgets_follow_the_ranks_of_the_first_phase():
    assert feature_choice(order=(2, 1, 0)).counts(4).tolist() == [0, 1, 2]
    assert feature_choice(order=(1, 2, 0)).counts(11).tolist() == [2, 6, 3]


def test_equal_budgets():
    assert feature_choice(budgets="uniform").counts(6).tolist() == [2, 2, 2]


def test_what_is_not_positive_does_not_live_though_its_budget_would_allow_it():
    sae = feature_choice(budgets="uniform")
    sae.draws.fill_(0.99)  # 4/3 becomes 2 tokens for each latent
    x = torch.tensor([[1.0, -1.0, -1.0], [-1.0, -1.0, -2.0], [0.0, 2.0, -1.0], [0.0, 3.0, -4.0]])
    assert sae.select(sae.scores(x), Batch(x)).dense().tolist() == [[1, 0, 0], [0, 0, 0], [0, 2, 0], [0, 3, 0]]


def test_rounding_is_right_on_average_and_the_seed_decides_it():
    sae, twin = FeatureChoiceSAE(3, 40, 1), FeatureChoiceSAE(3, 40, 1)
    counts, last = [], None
    for _ in range(4000):
        sae.before_step(0.9)
        counts.append(sae.counts(10))
    for _ in range(4000):
        twin.before_step(0.9)
        last = twin.counts(10)
    budgets, counts = 10 * sae.budget(), torch.stack(counts)
    assert torch.equal(last, counts[-1])
    assert ((counts == budgets.floor()) | (counts == budgets.floor() + 1)).all()
    assert (counts.double().mean(0) - budgets).abs().max() < 4 * 0.5 / 4000**0.5
    assert budgets.min() < 0.2  # so that the floor would starve it
    assert (counts.sum(0) > 0).all()


def test_ranks_are_frozen_when_phase_two_begins():
    sae = feature_choice()
    sae.density.copy_(torch.tensor([0.1, 0.5, 0.9]))
    sae.before_step(0.95)
    assert sae.rank.tolist() == [0, 1, 2]
    sae.before_step(0.0)  # another run
    sae.before_step(0.8)
    assert sae.rank.tolist() == [2, 1, 0]


def test_phase_one_is_mutual_choice_to_the_bit():
    data = [torch.randn(64, 8, generator=torch.Generator().manual_seed(step)) for step in range(10)]
    feature, mutual = FeatureChoiceSAE(8, 64, 2), MutualChoiceSAE(8, 64, 2)
    for sae in (feature, mutual):
        train(sae, copy.deepcopy(data[:7]), tokens=640)  # the stream ends at 70% of the run
    assert feature.phase == 1
    for name, value in mutual.state_dict().items():
        assert torch.equal(feature.state_dict()[name], value.expand_as(feature.state_dict()[name])), name
    assert torch.equal(feature.encode(data[0]), mutual.encode(data[0]))
    train(feature, data[:9], tokens=640)
    assert feature.phase == 2


def test_phase_two_has_no_auxiliary_loss():
    sae = feature_choice()
    sae.tokens_since_fired[2] = sae.dead_window
    loss = sae.loss(Batch(X))
    assert loss.terms.keys() == {"reconstruction"}
    assert loss.total.item() == pytest.approx((9 + 1 + 4 + 4 + 0.25 + 0.01 + 3) / 4)


def test_single_tokens_are_compared_with_a_threshold_for_each_latent():
    sae = feature_choice().eval()
    sae.threshold.copy_(torch.tensor([3.5, 0.5, 3.0]))
    expected = [[0, 1, 0], [5, 0, 0], [4, 6, 0], [0, 0, 0]]
    assert sae.encode(X).tolist() == expected
    assert [sae.encode(x).tolist()[0] for x in X.split(1)] == expected


def test_a_threshold_rises_where_all_kept_values_are_above_it_and_falls_where_they_are_not():
    sae = feature_choice(budgets="uniform")
    sae.threshold.fill_(4.5)
    sae.after_step(Batch(X[:3]), sae.loss(Batch(X[:3])).code)  # a budget of one token: 5, 6 and 2 are kept
    likely = 1 - torch.tensor(-1.0).exp().item()  # P(N >= 1), N Poisson's with mean 1
    up, down = 4.5 * (1 + 0.3 * (1 - likely)), 4.5 * (1 - 0.3 * likely)
    assert sae.threshold.tolist() == pytest.approx([up, up, down], rel=1e-5)
    for _ in range(20):  # the steps become smaller, down to .02
        before = sae.threshold.clone()
        sae.after_step(Batch(X[:3]), sae.loss(Batch(X[:3])).code)
    assert (sae.threshold / before)[1].item() == pytest.approx(1 + 0.02 * (1 - likely), rel=1e-4)


def test_a_latent_that_keeps_nothing_leaves_its_threshold():
    sae = feature_choice()
    sae.threshold.fill_(1.0)
    sae.after_step(Batch(X), sae.loss(Batch(X)).code)
    assert sae.threshold[2] == 1
    assert (sae.threshold[:2] != 1).all()


@pytest.mark.parametrize("budgets", ["zipf", "uniform"])
def test_in_evaluation_each_latent_lives_about_as_often_as_it_may_and_a_token_has_about_k(budgets):
    planted = PlantedDictionary(16, 8, active=2, zipf=0.5)
    sae = FeatureChoiceSAE(8, 32, 2, budgets=budgets)
    train(sae, planted.batches(256, seed=0), tokens=80_000)
    density = (sae.encode(planted.sample(8000, seed=1)[0]) > 0).double().mean(0)
    assert density.sum().item() == pytest.approx(2, rel=0.1)
    positive = density > 0
    ratio = density[positive] / sae.budget()[positive]
    assert ratio.log().abs().median() < 0.25
    if budgets == "zipf":
        assert torch.corrcoef(torch.stack([density, sae.budget()]))[0, 1] > 0.9


# The directions' spread -----------------------------------------------------------------------------------------------


def test_spread_losses_by_hand():
    W = torch.tensor([[2.0, 0.0], [0.0, 3.0], [3.0, 4.0]])  # cosines: 0, .6 and .8
    assert nfm_loss(W).item() == pytest.approx((3 + 2 * (0.36 + 0.64)) ** 0.5)
    assert nfm_inf_loss(W).item() == pytest.approx((0.6 + 0.8 + 0.8) / 3)


@pytest.mark.parametrize("loss", [nfm_loss, nfm_inf_loss])
def test_spread_losses_push_directions_apart(loss):
    W = torch.randn(12, 6, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    assert torch.autograd.gradcheck(loss, W)
    loss(W).backward()
    assert loss(W - 0.01 * W.grad / W.grad.norm()) < loss(W)


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, r"k must be an integer in \[1, d_sae=64\], got 0"),
        ({"zipf_coeff": -1.0}, "zipf_coeff must be a finite number of at least 0, got -1.0"),
        ({"exponent": float("nan")}, "exponent must be a finite number of at least 0, got nan"),
        ({"shift": -1.0}, "shift must be a finite number of at least 0, got -1.0"),
        ({"budgets": "equal"}, "budgets must be zipf or uniform, got 'equal'"),
        ({"phase_two": 0.0}, "phase_two must be a finite number above 0, got 0.0"),
        ({"phase_two": 1.0}, "phase_two must be below 1, got 1.0"),
        ({"k": 8, "shift": 0.0}, r"budgets must not exceed the batch, got 1\.69 of it .* lower k=8 or .* raise shift"),
    ],
)
def test_bad_arguments_are_refused_with_rule_and_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        FeatureChoiceSAE(**{"d_in": 4, "d_sae": 64, "k": 2} | arguments)
