"""Who gets how many latents, and what other choices cost, on a small model; numbers by hand."""

import pytest
import torch
from scipy import stats

import sae_lib
from sae_lib import BatchTopKSAE, FeatureChoiceSAE, TopKSAE
from sae_lib.metrics.allocation import Allocation, BatchChoice, step_seconds
from sae_lib.metrics.patched import PatchedLoss

SITE = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def patched():
    texts = sae_lib.load_texts("pocket", "test", limit=12)
    return PatchedLoss(sae_lib.Activations(sae_lib.load_model("pocket"), SITE, texts=texts), tokens=200)


@pytest.fixture(scope="module")
def trained(patched):
    saes = [TopKSAE(128, 64, 4), BatchTopKSAE(128, 64, 4), FeatureChoiceSAE(128, 64, 4, phase_two=0.5)]
    sae_lib.train(saes, list(patched.x.split(100)) * 8, tokens=8 * len(patched.x))
    return saes


def test_l0_by_position_and_by_loss(patched, trained):
    sae = trained[1]
    found = Allocation(patched)(sae)
    l0 = [int((sae.encode(x[None]) != 0).sum()) for x in patched.x]
    texts = patched.text.tolist()
    firsts = {texts.index(text) for text in texts}
    rest = [n for place, n in enumerate(l0) if place not in firsts]
    mean = sum(rest) / len(rest)
    assert found["l0_first"] == pytest.approx(sum(l0[place] for place in firsts) / len(firsts))
    assert found["l0_rest"] == pytest.approx(mean)
    second, third = (sum((n - mean) ** power for n in rest) / len(rest) for power in (2, 3))
    assert found["l0_skewness"] == pytest.approx(third / second**1.5)
    assert found["l0_loss_correlation"] == pytest.approx(stats.spearmanr(l0, patched.loss.tolist()).statistic)


def test_where_all_tokens_have_as_many_latents_nothing_is_said_of_their_spread(patched, trained):
    found = Allocation(patched)(trained[0])
    assert (found["l0_first"], found["l0_rest"]) == (4, 4)
    assert torch.tensor([found["l0_skewness"], found["l0_loss_correlation"]]).isnan().all()


@pytest.mark.parametrize("place", [0, 1])
def test_half_of_a_code_is_its_largest_values(patched, trained, place):
    sae = trained[place]
    z = sae.encode(patched.x)
    for name, kept in (("half", 2), ("quarter", 1)):
        cut = torch.zeros_like(z)
        for row, values in enumerate(z):
            best = values.argsort(descending=True)[:kept]
            cut[row, best] = values[best]
        x_hat = sae.decode(cut).detach()
        (expected,) = patched([lambda x, rows, x_hat=x_hat: x_hat[rows]])
        assert Allocation(patched)(sae)[f"loss_recovered_{name}"] == pytest.approx(expected["loss_recovered"], abs=1e-5)


def test_an_sae_that_treats_each_token_alone_does_not_care_for_its_batch(patched, trained):
    found = BatchChoice(patched)(trained[0])
    (alone,) = patched([lambda x, rows: trained[0](x)])
    for name in ("batch", "batch_small", "batch_sequence"):
        assert found[f"loss_recovered_{name}"] == pytest.approx(alone["loss_recovered"], abs=1e-5)
    assert found["l0_batch"] == 4


def test_each_kind_of_batch_is_all_tokens_once(patched):
    batches = BatchChoice(patched, seed=3).batches
    for parts in batches.values():
        assert torch.equal(torch.cat(list(parts)).sort().values, torch.arange(len(patched.x)))
    assert {len(part) for part in batches["batch_small"][:-1]} == {64}
    for part in batches["batch_sequence"]:
        assert len(patched.text[part].unique()) == 1
    assert len(batches["batch_sequence"]) == len(patched.text.unique())


def test_feature_choice_gives_each_latent_its_budget_of_the_batch_and_is_left_as_it_is(patched, trained):
    sae = trained[2]
    before = sae.generator.get_state()
    first, again = BatchChoice(patched)(sae), BatchChoice(patched)(sae)
    assert first == again
    assert torch.equal(sae.generator.get_state(), before)
    assert not sae.training
    assert first["l0_batch"] == pytest.approx(4, rel=0.1)  # where positive scores are fewer, less than the budget
    assert len({first[f"loss_recovered_{name}"] for name in ("batch", "batch_small", "batch_sequence")}) == 3


def test_latents_that_live_are_counted_over_all_batches(patched, trained):
    sae = trained[1]
    task = BatchChoice(patched)
    x_hat, fired, pairs = task.chosen(sae, task.batches["batch_small"])
    sae.train()
    codes = [sae.encode(patched.x[rows]) for rows in task.batches["batch_small"]]
    sae.eval()
    assert torch.equal(fired, torch.cat(codes).any(0))
    assert pairs == sum(int((z > 0).sum()) for z in codes) == 4 * len(patched.x)
    rows = task.batches["batch_small"][1]
    assert torch.allclose(x_hat[rows], sae.decode(codes[1]), rtol=1e-4, atol=1e-3)


def test_steps_are_timed_on_copies(patched, trained):
    before = [value.clone() for sae in trained for value in sae.state_dict().values()]
    seconds = step_seconds(trained, patched.x[:50], rounds=3)
    assert all(0 < second < 60 for second in seconds)
    after = [value for sae in trained for value in sae.state_dict().values()]
    assert all(map(torch.equal, before, after))
