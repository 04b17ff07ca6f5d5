"""The numbers by hand are in the doctests; here is what makes them probabilities."""

import pytest
import torch

from sae_lib.metrics.ngrams import NGrams

ROWS = [[0, 1, 2, 1, 3], [0, 3, 3, 1]]  # 0 starts a text; 4 never occurs
COUNTED = NGrams(ROWS, vocab_size=5)


@pytest.mark.parametrize("before", range(5))
def test_probabilities_of_all_next_tokens_add_up_to_one(before):
    ids = torch.tensor([[before, after] for after in range(5)])
    assert COUNTED.bigram(ids).neg().exp().sum().item() == pytest.approx(1)
    assert COUNTED.unigram(ids).neg().exp().sum().item() == pytest.approx(1)


def test_a_token_that_never_had_a_follower_falls_back_on_the_unigram():
    ids = torch.tensor([[4, 1], [4, 4]])
    torch.testing.assert_close(COUNTED.bigram(ids), COUNTED.unigram(ids))


def test_a_context_with_many_followers_trusts_its_counts_less():
    steady = NGrams([[0, 1] * 5, [0, 2]], vocab_size=3)  # after 0: five times 1, once 2
    # c(0) = 6, T(0) = 2; p(1) = 6/13 of tokens 1, 0, 1, 0, 1, 0, 1, 0, 1, 2
    assert steady.bigram(torch.tensor([[0, 1]])).neg().exp().item() == pytest.approx((5 + 2 * 6 / 13) / 8)


def test_the_token_that_starts_a_text_is_context_and_never_predicted():
    # 7 predicted tokens: 1 2 1 3, 3 3 1; the two texts do not run into each other
    assert COUNTED.unigram(torch.tensor([[1, 0]])).exp().item() == pytest.approx(12 / 1)
    unseen = COUNTED.bigram(torch.tensor([[3, 0]])).neg().exp().item()
    assert unseen == pytest.approx(2 / 12 / 4)  # after 3: 3 and 1; only the unigram's share, T(3) p(0) / (c(3) + T(3))


def test_every_position_is_predicted_from_the_one_before():
    ids = torch.tensor([[0, 1, 2], [3, 3, 1]])
    one_by_one = [[COUNTED.bigram(ids[i : i + 1, t : t + 2]).item() for t in range(2)] for i in range(2)]
    torch.testing.assert_close(COUNTED.bigram(ids), torch.tensor(one_by_one))
    assert COUNTED.unigram(ids).shape == (2, 2)


def test_fitting_text_is_cheaper_than_other_text_and_the_bigram_beats_the_unigram_there():
    ids = torch.tensor(ROWS[:1])
    assert COUNTED.bigram(ids).mean() < COUNTED.unigram(ids).mean() < COUNTED.unigram(torch.tensor([[0, 4, 2]])).mean()


@pytest.mark.usefixtures("as_a_user")
def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="at least one text of two tokens, got 2 shorter ones"):
        NGrams([[0], []], vocab_size=3)
    with pytest.raises(ValueError, match=r"token ids must be in \[0, 3\), got 0 to 3"):
        NGrams([[0, 3]], vocab_size=3)
