"""The loop: order, units, schedules, and what it refuses."""

import os
import subprocess
import sys

import pytest
import torch

import sae_lib
from sae_lib import Batch, BatchTopKSAE, PlantedDictionary, ReLUSAE, TopKSAE, train
from sae_lib.metrics import mcc
from sae_lib.train import default_learning_rate, rms_norm, schedule


def data(n=20, size=32, d_in=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [4 * torch.randn(size, d_in, generator=generator) + 1 for _ in range(n)]


def state(sae):
    return [value.clone() for value in sae.state_dict().values()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_training_beside_others_gives_the_same_bits_as_alone():
    alone, beside = TopKSAE(6, 12, 3), TopKSAE(6, 12, 3)
    train(alone, data(), tokens=640)
    train([ReLUSAE(6, 12, 0.1), beside, BatchTopKSAE(6, 16, 2)], data(), tokens=640)
    assert same(state(alone), state(beside))


def test_history_has_a_row_a_step_and_sae_whose_terms_add_up():
    run = train([TopKSAE(6, 12, 3), ReLUSAE(6, 12, 0.1)], data(), tokens=640)
    assert len(run.history) == 2 * 20
    assert [(row["step"], row["sae"], row["tokens"]) for row in run.history[:3]] == [(0, 0, 32), (0, 1, 32), (1, 0, 64)]
    for row in run.history:
        terms = [row[name] for name in ("reconstruction", "sparsity", "aux") if name in row]
        assert row["loss"] == pytest.approx(sum(terms), rel=1e-5)
        assert {"variant", "l0", "fvu", "dead", "learning_rate", "tokens_per_second"} <= row.keys()
    assert run.history[0]["l0"] <= 3


def test_the_last_batch_is_cut_so_that_exactly_the_tokens_asked_for_are_used():
    run = train(TopKSAE(6, 12, 3), data(), tokens=100)
    assert run.tokens == 100
    assert len(run.history) == 4


def test_a_stream_that_ends_early_trains_on_what_it_had_and_says_how_many(capsys):
    run = train(TopKSAE(6, 12, 3), data(n=2), tokens=1000)
    assert run.tokens == 64
    assert "64 of 1,000" in capsys.readouterr().err


def test_the_scale_makes_the_mean_squared_norm_one_and_ends_in_the_weights():
    batches = [torch.full((3, 4), 2.0), torch.full((1, 4), 6.0)]
    assert rms_norm([Batch(x) for x in batches]) == pytest.approx(48**0.5)  # (3 * 16 + 1 * 144) / 4
    small, large = TopKSAE(6, 12, 3), TopKSAE(6, 12, 3)
    train(small, data(), tokens=640)
    train(large, [1000 * x for x in data()], tokens=640)
    x = data(seed=1)[0]
    assert large.scale.item() == pytest.approx(1000 * small.scale.item(), rel=1e-5)
    assert torch.allclose(large.encode(1000 * x), 1000 * small.encode(x), rtol=1e-2, atol=1e-1)


def test_training_on_goes_on_in_the_trainings_units():
    sae = TopKSAE(6, 12, 3)
    train(sae, data(), tokens=640)
    fvu = lambda: (torch.cat(data(seed=2)) - sae(torch.cat(data(seed=2)))).square().sum()  # noqa: E731
    before = fvu()
    train(sae, data(n=60, seed=3), tokens=60 * 32)
    assert fvu() < before


def test_the_learning_rate_warms_up_and_decays():
    rates = [schedule(step, 1, 100) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert set(rates[5:80]) == {1.0}
    assert rates[-1] == pytest.approx(1 / 20)
    assert schedule(0, 1, 1) > 0
    assert schedule(999, 1, 1_000_000) == 1  # never more than 1,000 steps of warm-up


def test_the_schedule_follows_tokens_when_batches_differ_in_size():
    run = train(TopKSAE(6, 12, 3), [*data(n=1, size=512), *data(n=100, size=16)], tokens=512 + 1600)
    rates = [row["learning_rate"] for row in run.history]
    assert rates[50] == max(rates)
    assert 0 < rates[-1] < 0.1 * max(rates)


def test_training_on_starts_from_what_was_learned():
    sae, x = TopKSAE(6, 12, 3), data(seed=4)[0]
    train(sae, data(), tokens=640)
    offset, x_hat = sae.b_dec.clone(), sae(x)
    sae.learning_rate = 0.0
    train(sae, [3 * x + 50 for x in data()], tokens=640)
    assert torch.allclose(sae.b_dec, offset, rtol=1e-4)
    assert torch.allclose(sae(x), x_hat, rtol=1e-3, atol=1e-3)


def test_an_interrupted_run_leaves_saes_in_the_units_of_x():
    def interrupted():
        yield from data(n=5)
        raise KeyboardInterrupt

    sae = TopKSAE(6, 12, 3)
    with pytest.raises(KeyboardInterrupt):
        train(sae, interrupted(), tokens=640)
    assert sae.scale > 5
    assert not sae.training


def test_a_data_loader_is_a_stream():
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.cat(data())), batch_size=32)
    assert train(TopKSAE(6, 12, 3), loader, tokens=640).tokens == 640


def test_64_features_in_32_dimensions_are_recovered_within_three_million_tokens():
    planted = PlantedDictionary(64, 32, active=3)
    topk, batchtopk = TopKSAE(32, 64, 3), BatchTopKSAE(32, 64, 3)
    train([topk, batchtopk], planted.batches(2048, seed=0), tokens=3_000_000)
    assert mcc(topk.W_dec.detach(), planted.directions) > 0.85
    assert mcc(batchtopk.W_dec.detach(), planted.directions) > 0.80


def test_the_default_learning_rate_serves_widths_and_lengths_of_runs():
    assert default_learning_rate(2**14, 100_000) == pytest.approx(2e-4)
    assert default_learning_rate(2**10, 100_000) == pytest.approx(8e-4)
    assert default_learning_rate(2**14, 2_500) == pytest.approx(4e-4)  # a quarter of 10,000 steps: twice as large
    assert default_learning_rate(2**6, 100) == 5e-3


def test_the_seed_orders_the_stream_and_none_leaves_it():
    planted = PlantedDictionary(8, 6, active=2)
    runs = []
    for seed in (None, 3, 3, 4):
        sae = TopKSAE(6, 8, 2)
        train(sae, planted.batches(32, seed=3), tokens=320, seed=seed)
        runs.append(state(sae))
    assert same(runs[0], runs[1])
    assert same(runs[1], runs[2])
    assert not same(runs[2], runs[3])


def test_watch_sees_the_history_grow():
    lengths = []
    train(TopKSAE(6, 12, 3), data(n=50), tokens=1600, watch=lambda history: lengths.append(len(history)))
    assert lengths == [20, 40, 50]


def test_a_planted_dictionary_is_recovered():
    planted = PlantedDictionary(16, 12, active=1.5, seed=1)
    sae = TopKSAE(12, 16, 2)
    before = mcc(sae.W_dec.detach(), planted.directions)
    train(sae, planted.batches(512, seed=0), tokens=150_000)
    assert mcc(sae.W_dec.detach(), planted.directions) > max(0.9, before)


def spoilt(position, value):
    batches = data()
    batches[position][3, 2] = value
    return batches


@pytest.mark.parametrize(
    ("saes", "stream", "message"),
    [
        ([], data(), "at least one"),
        (TopKSAE(6, 12, 3), [], "at least one batch, got none"),
        (TopKSAE(5, 12, 3), data(), r"d_in=5.*\(32, 6\)"),
        (TopKSAE(6, 12, 3), torch.zeros(8, 6), r"x\.split"),
        (TopKSAE(6, 12, 3), ["text"], "must yield Batch or tensors.*got str"),
        (TopKSAE(6, 12, 3), [torch.zeros(8, 6, dtype=torch.int32)], r"floating, got torch\.int32"),
        (TopKSAE(6, 12, 3), spoilt(7, float("nan")), "0.52% NaN or infinite entries at step 7"),
        (TopKSAE(6, 12, 3), spoilt(2, float("inf")), "at step 2"),
    ],
)
def test_bad_input_is_refused_with_rule_and_value(saes, stream, message, as_a_user):
    with pytest.raises(ValueError, match=message):
        train(saes, stream, tokens=640)


@pytest.mark.parametrize("tokens", [0, -1, 1.5])
def test_tokens_must_be_a_positive_integer(tokens, as_a_user):
    with pytest.raises(ValueError, match="tokens must be an integer at least 1"):
        train(TopKSAE(6, 12, 3), data(), tokens=tokens)


def test_a_variant_that_needs_gradients_says_how_to_get_them():
    class Needy(TopKSAE):
        needs = frozenset({"grad"})

    with pytest.raises(ValueError, match=r"topk needs grad.*Activations\(\.\.\., grad=True\)"):
        train(Needy(6, 12, 3), data(), tokens=64)


def test_the_public_names_are_there():
    assert {"train", "evaluate", "load", "load_model", "load_texts", "Activations", "VARIANTS", "metrics"} <= set(
        dir(sae_lib)
    )


def test_the_environment_may_switch_the_bar_off():
    script = "from sae_lib.train import progress_bar; print(progress_bar(10, 0).disable)"
    command = [sys.executable, "-c", script]
    for value, expected in (("1", "True"), ("", "False")):
        ran = subprocess.run(
            command, env=os.environ | {"TQDM_DISABLE": value}, capture_output=True, text=True, check=True
        )
        assert ran.stdout.strip() == expected
