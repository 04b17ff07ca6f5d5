"""The model's loss with reconstructions in the place of activations."""

import pytest
import torch

from sae_lib import Activations, TopKSAE, evaluate, load_model
from sae_lib.metrics import PatchedLoss
from tests.tiny_models import WORDS, tiny_gpt2

SITE = "blocks.1.hook_resid_post"
TEXTS = [" ".join(WORDS[i % 7 : i % 7 + 3 + i % 5]) for i in range(40)]


@pytest.fixture(scope="module")
def stream():
    return Activations(load_model(tiny_gpt2()), SITE, texts=TEXTS, batch_size=32, forward_tokens=64)


@pytest.fixture(scope="module")
def patched(stream):
    return PatchedLoss(stream, tokens=60)


def test_rows_are_the_texts_tokens_in_reading_order(stream, patched):
    read = torch.cat([stream.read(item)[0] for item in stream.sequences(by_length=False)])
    assert 60 <= len(patched.x) < len(read)
    assert torch.allclose(patched.x, read[: len(patched.x)], atol=1e-6)
    lengths = [len(row) for row in map(patched.model.encode, [[text] for text in TEXTS]) for row in row]
    assert set(torch.bincount(patched.text).tolist()) <= set(lengths)
    assert (patched.text.diff() >= 0).all()


def test_the_models_own_loss_stands_beside_each_row(patched):
    sequence, rows = next(patched.parts())
    loss, counted = patched.model.loss(sequence)
    assert torch.allclose(patched.loss[rows], loss[counted], atol=1e-5)  # these texts have no BOS within
    assert patched.loss.mean().item() == pytest.approx(patched.loss_clean, abs=1e-5)


def test_each_reconstruction_is_told_which_rows_it_gets(patched):
    seen = []

    def reconstruct(x, rows):
        seen.append(rows)
        assert torch.allclose(x, patched.x[rows], atol=1e-6)
        return x

    (found,) = patched([reconstruct])
    assert seen[0].start == 0
    assert seen[-1].stop == len(patched.x)
    assert found["loss_recovered"] == found["loss_recovered_mean"] == 1


def test_a_reconstruction_that_was_made_of_all_rows_at_once_is_the_same_as_one_a_part_at_a_time(patched):
    sae = TopKSAE(12, 24, 3)
    x_hat = sae(patched.x).detach()
    whole, parts = patched([lambda x, rows: x_hat[rows], lambda x, rows: sae(x)])
    assert whole["loss_patched"] == pytest.approx(parts["loss_patched"], abs=1e-5)
    assert whole["kl"] == pytest.approx(parts["kl"], abs=1e-5)
    assert whole["loss_recovered"] != 1


def test_evaluate_reports_these_numbers(stream, patched):
    sae = TopKSAE(12, 24, 3)
    report = evaluate(sae, stream, tokens=60)
    (found,) = patched([lambda x, rows: sae(x)])
    assert report["loss_patched"] == pytest.approx(found["loss_patched"], abs=1e-6)
    assert report["model_tokens"] == found["model_tokens"]


def test_shuffled_rows_recover_less(patched):
    order = torch.randperm(len(patched.x), generator=torch.Generator().manual_seed(0))
    shuffled, kept = patched([lambda x, rows: patched.x[order][rows], lambda x, rows: patched.x[rows]])
    assert shuffled["loss_patched"] != kept["loss_patched"]
    assert kept["loss_recovered"] == 1
