"""What two runs share is counted both ways, among the living."""

import math

import pytest
import torch

from sae_lib.metrics import mmcs, recovery_rate, shared_latents, strongest_shared


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_run_shares_everything_with_itself_in_any_order_and_length():
    W_dec = draw(9, 5)
    again = W_dec[[3, 1, 8, 0, 2, 7, 5, 4, 6]] * torch.linspace(0.1, 9, 9).unsqueeze(1)
    assert shared_latents([W_dec, again]) == pytest.approx(
        {"consistency": 1, "consistency_mmcs": 1, "consistency_pairs": 1}
    )


def test_an_opposite_direction_is_not_the_same_latent():
    assert shared_latents([torch.eye(3), -torch.eye(3)])["consistency_mmcs"] == 0


def test_both_directions_count_where_a_small_dictionary_lies_within_a_large_one():
    shared = shared_latents([torch.eye(4)[:1], torch.eye(4)])
    assert shared == {"consistency": (1 + 1 / 4) / 2, "consistency_mmcs": (1 + 1 / 4) / 2, "consistency_pairs": 1}


def test_all_pairs_count_alike_and_each_as_the_recovery_of_one_run_by_another():
    runs = [draw(number, 3, seed=number) for number in (4, 7, 5)]
    ordered = [(one, other) for one in runs for other in runs if one is not other]
    shared = shared_latents(runs, threshold=0.7)
    assert shared["consistency_pairs"] == 3
    assert shared["consistency"] == pytest.approx(sum(recovery_rate(a, b, 0.7) for a, b in ordered) / 6)
    assert shared["consistency_mmcs"] == pytest.approx(sum(mmcs(a, b) for a, b in ordered) / 6)
    assert 0 < shared["consistency"] < 1


def test_the_dead_neither_look_for_a_partner_nor_are_one():
    runs = [torch.eye(3), torch.eye(3)]
    alive = [torch.tensor([True, True, False]), torch.tensor([True, False, True])]
    assert shared_latents(runs, alive)["consistency"] == 0.5  # only the first is alive in both


def test_a_cosine_at_the_threshold_counts():
    runs = [torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 4.0]])]
    assert shared_latents(runs, threshold=0.6)["consistency"] == 1
    assert shared_latents(runs, threshold=0.61)["consistency"] == 0


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([torch.eye(2)],), "at least two runs, got 1"),
        (([torch.eye(2)] * 2, None, 90), r"threshold must be a cosine, in \[-1, 1\], got 90"),
        (([torch.eye(2), torch.eye(3)],), "width of W_dec, d_in=2, got 3"),
        (([torch.eye(2), math.nan * torch.eye(2)],), "must be finite, got NaN"),
        (([torch.eye(2)] * 2, [torch.ones(2) > 0]), r"each run, of shapes \[\(2,\), \(2,\)\], got \[\(2,\)\]"),
        (([torch.eye(2)] * 2, [torch.ones(2) > 0, torch.zeros(2) > 0]), "living latents, got none in run 1"),
    ],
)
def test_bad_input_is_refused_with_rule_value_and_remedy(arguments, message):
    with pytest.raises(ValueError, match=message):
        shared_latents(*arguments)


# The strongest -------------------------------------------------------------------------------------------------------


def test_only_the_strongest_are_looked_for_but_among_all_living_latents():
    runs = [torch.eye(4), torch.eye(4)[[3, 2, 0]]]  # the second run lacks the second direction
    first, second = torch.tensor([9.0, 8.0, 1.0, 1.0]), torch.tensor([1.0, 2.0, 3.0])
    assert strongest_shared(runs, [first, second], share=0.25) == 1  # its strongest is the other's third
    assert strongest_shared(runs, [first, second], share=0.5) == (1 / 2 + 1) / 2
    assert strongest_shared(runs, [first, second], share=1.0) == (3 / 4 + 1) / 2


def test_dead_latents_are_neither_looked_for_nor_found():
    runs = [torch.eye(3), torch.eye(3)]
    strengths = [torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 1.0])]
    assert strongest_shared(runs, strengths, share=1.0) == 0
    with pytest.raises(ValueError, match="living latents, got none in run 1"):
        strongest_shared(runs, [strengths[0], torch.zeros(3)])


def test_all_of_them_are_those_that_runs_share():
    runs = [draw(6, 3, seed=6), draw(6, 3, seed=9)]
    everything = strongest_shared(runs, [torch.ones(6)] * 2, share=1.0, threshold=0.7)
    assert everything == pytest.approx(shared_latents(runs, threshold=0.7)["consistency"])


def test_strengths_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"at least two runs, got 1"):
        strongest_shared([torch.eye(2)], [torch.ones(2)])
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\], got 0"):
        strongest_shared([torch.eye(2)] * 2, [torch.ones(2)] * 2, share=0.0)
    with pytest.raises(ValueError, match=r"strengths must be one for each latent of each run.*got \[\(2,\), \(3,\)\]"):
        strongest_shared([torch.eye(2)] * 2, [torch.ones(2), torch.ones(3)])
