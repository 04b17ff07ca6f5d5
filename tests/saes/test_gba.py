"""Group bias adaptation: numbers by hand."""

import pytest
import torch

from sae_lib import GBASAE, Batch, PlantedDictionary, train


def by_hand(**arguments):
    """Three latents along the axes, in training."""
    sae = GBASAE(3, 3, **{"htf": 0.5, "ltf": 0.5, "groups": 1, "adapt_every": 1, "bias_step": 0.5} | arguments).train()
    with torch.no_grad():
        sae.W_dec.copy_(torch.eye(3))
    return sae


X = torch.tensor([[3.0, 4.0, 0.0], [0.0, -2.0, 0.0]])  # cosines .6, .8, 0 and 0, -1, 0; norms 5 and 2


def stepped(sae, x=X):
    """The same SAE after a step without a gradient."""
    batch = Batch(x)
    sae.after_step(batch, sae.loss(batch).code)
    return sae


def test_a_latent_fires_where_its_cosine_with_the_token_exceeds_its_bias():
    sae = by_hand()
    sae.b_enc.copy_(torch.tensor([-0.5, -0.9, 0.0]))
    assert torch.allclose(sae.encode(X), torch.tensor([[5 * (0.6 - 0.5), 0, 0], [0, 0, 0]]))
    sae.b_enc.copy_(torch.tensor([-0.6001, -0.7, 0.0]))
    assert torch.allclose(sae.encode(X), torch.tensor([[0, 5 * (0.8 - 0.7), 0], [0, 0, 0]]))


def test_the_offset_is_taken_off_before_the_norm_is_taken_and_comes_back():
    sae = by_hand()
    sae.b_enc.fill_(-0.5)
    sae.b_dec.copy_(torch.tensor([1.0, 2.0, 3.0]))
    assert torch.allclose(sae.encode(X + sae.b_dec), torch.tensor([[0.5, 1.5, 0], [0, 0, 0]]), atol=1e-6)
    assert torch.allclose(sae(X + sae.b_dec)[1], sae.b_dec)


def test_the_offset_is_the_median_of_the_first_batch_or_nothing():
    for center, offset in ((True, X[0].tolist()), (False, [0, 0, 0])):
        sae = by_hand(center=center)
        sae.start(Batch(X[:1].expand(4, 3)), 100)
        assert sae.b_dec.tolist() == pytest.approx(offset)


def test_the_output_scale_multiplies_the_code_and_does_not_decide_who_lives():
    sae = by_hand()
    sae.b_enc.fill_(-0.7)
    with torch.no_grad():
        sae.output_scale.copy_(torch.tensor([100.0, 3.0, 1.0]))
    assert torch.allclose(sae.encode(X), torch.tensor([[0, 3 * 5 * 0.1, 0], [0, 0, 0]]))


def test_the_loss_is_the_squared_error_of_tokens_of_norm_one_alone():
    sae = by_hand()
    sae.b_enc.fill_(-0.5)  # x_hat is .1 and .3 of the first token's .6 and .8, and nothing of the second's -1
    terms = sae.loss(Batch(X)).terms
    assert list(terms) == ["reconstruction"]
    assert terms["reconstruction"].item() == pytest.approx((0.5**2 + 0.5**2 + 1) / 2)


def test_encoder_and_decoder_are_one_weight_and_bias_and_offset_have_no_gradient():
    sae = by_hand()
    assert sae.W_enc.data_ptr() == sae.W_dec.data_ptr()
    assert {name for name, _ in sae.named_parameters()} == {"W_dec", "output_scale"}


def test_targets_fall_from_the_first_group_to_the_last_in_equal_ratios():
    target = GBASAE(2, 8, htf=0.4, ltf=0.05, groups=4).target
    assert target.tolist() == pytest.approx([0.4, 0.4, 0.2, 0.2, 0.1, 0.1, 0.05, 0.05])
    assert GBASAE(2, 3, htf=0.4, ltf=0.05, groups=1).target.tolist() == pytest.approx([0.4] * 3)
    sizes = torch.bincount(GBASAE(2, 10, groups=3).group)
    assert sizes.tolist() == [4, 3, 3]


def test_a_bias_falls_by_a_share_of_the_largest_activation_where_the_latent_fires_too_often():
    sae = stepped(by_hand(htf=0.4, ltf=0.4), torch.tensor([[3.0, 4.0, 0.0], [0.0, 1.0, 0.0]]))
    # shares 1/2, 1, 0 of the tokens; largest .6, 1, 0; mean of those that fired .8
    assert sae.b_enc.tolist() == pytest.approx([-0.5 * 0.6, -0.5 * 1.0, 0.0])
    exactly = stepped(by_hand(htf=0.5, ltf=0.5), torch.tensor([[3.0, 4.0, 0.0], [0.0, 1.0, 0.0]]))
    assert exactly.b_enc.tolist() == pytest.approx([0, -0.5, 0])  # at its target, the first one stays


def test_the_largest_activation_is_that_of_the_unit_token_before_the_output_scale():
    sae = by_hand(htf=0.1, ltf=0.1)
    with torch.no_grad():
        sae.output_scale.copy_(torch.tensor([7.0, 0.2, 1.0]))
    sae.b_enc.copy_(torch.tensor([-0.1, -0.2, -0.3]))
    assert stepped(sae).b_enc[:2].tolist() == pytest.approx([-0.1 - 0.5 * 0.5, -0.2 - 0.5 * 0.6])


def test_a_latent_that_never_fired_rises_by_the_mean_of_its_own_group_that_fired():
    sae = GBASAE(4, 6, htf=1.0, ltf=1.0, groups=2, adapt_every=1, bias_step=0.5).train()
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([torch.eye(4), -torch.eye(4)[:2]]))
    sae.b_enc.copy_(torch.tensor([-0.1, -0.2, -0.9, -0.9, -0.9, -0.9]))
    stepped(sae, torch.tensor([[3.0, 4.0, 0.0, 0.0]]))  # the first group's y: .5, .6, none; of the second none fires
    assert sae.b_enc.tolist() == pytest.approx([-0.1, -0.2, -0.9 + 0.5 * 0.55, -0.9, -0.9, -0.9])


def test_biases_stay_between_minus_one_and_zero():
    low = by_hand(htf=0.1, ltf=0.1, bias_step=50.0)
    assert stepped(low).b_enc.tolist() == [-1, -1, 0]
    low.b_enc.copy_(torch.tensor([-0.1, -0.1, -0.1]))
    high = by_hand(htf=1.0, ltf=1.0, bias_step=50.0)
    high.b_enc.copy_(torch.tensor([-0.1, -0.1, -0.1]))
    assert stepped(high).b_enc.tolist() == pytest.approx([-0.1, -0.1, 0.0])


def test_biases_move_every_so_many_steps_and_judge_all_tokens_since():
    sae = by_hand(htf=0.3, ltf=0.3, adapt_every=3)
    stepped(stepped(sae))
    assert sae.b_enc.tolist() == [0, 0, 0]
    assert (sae.tokens_counted, sae.steps_counted) == (4, 2)
    assert sae.fired.tolist() == [2, 2, 0]
    stepped(sae, torch.tensor([[5.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]]))
    # shares 3/7 and 2/7; largest 1 and .8
    assert sae.b_enc.tolist() == pytest.approx([-0.5 * 1.0, 0.0, 0.0])
    assert (sae.tokens_counted, sae.steps_counted, sae.fired.sum(), sae.largest.sum()) == (0, 0, 0, 0)


def test_an_output_scale_below_zero_is_put_back_to_zero():
    sae = by_hand()
    with torch.no_grad():
        sae.output_scale.fill_(-1)
    assert stepped(sae).output_scale.tolist() == [0, 0, 0]


def test_no_latent_fires_much_more_often_than_its_target_after_training_and_none_is_dead():
    world = PlantedDictionary(24, 12, active=6)  # nearly no sample is empty: those would be one direction for all
    sae = GBASAE(12, 40, htf=0.2, ltf=0.05, groups=2, adapt_every=1, bias_step=0.05)
    train(sae, world.batches(256), tokens=256 * 120)
    share = (sae.encode(world.sample(8000, seed=1)[0]) > 0).float().mean(0)
    assert (share < 1.5 * sae.target).all()
    assert (share > 0).all()
    assert share[:20].mean() > 2 * share[20:].mean()


def test_a_batch_smaller_than_the_number_of_groups_is_refused_before_anything_is_learnt():
    sae, x = GBASAE(4, 8, groups=5), torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    before = sae.W_dec.detach().clone()
    with pytest.raises(ValueError, match="as many tokens as there are groups.*got 4 for groups=5; enlarge the batch"):
        train(sae, [Batch(x[:4])] * 3, tokens=12)
    assert torch.equal(sae.W_dec, before)
    train(sae, [Batch(x)] * 3, tokens=15)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"htf": 1.5}, r"0 < ltf <= htf <= 1, got ltf=0\.001 and htf=1\.5"),
        ({"htf": 0.1, "ltf": 0.2}, r"0 < ltf <= htf <= 1, got ltf=0\.2 and htf=0\.1"),
        ({"ltf": 0.0}, "ltf must be a finite number above 0, got 0.0"),
        ({"htf": float("nan")}, "htf must be a finite number above 0, got nan"),
        ({"groups": 9}, r"groups must be an integer in \[1, d_sae=8\], got 9"),
        ({"groups": 0}, r"groups must be an integer in \[1, d_sae=8\], got 0"),
        ({"adapt_every": 0}, "adapt_every must be an integer at least 1, got 0"),
        ({"bias_step": -0.1}, "bias_step must be a finite number above 0, got -0.1"),
    ],
)
def test_bad_arguments_are_refused_with_rule_and_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        GBASAE(4, 8, **{"groups": 2} | arguments)
