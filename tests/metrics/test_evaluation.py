"""Evaluation of one SAE on a held-out stream."""

import pytest
import torch
from torch.nn import functional as F

import sae_lib
from sae_lib import Activations, Batch, TopKSAE, evaluate, load_model
from sae_lib.metrics import fvu, l0
from tests.tiny_models import WORDS, tiny_gpt2

SITE = "blocks.1.hook_resid_post"
TEXTS = [" ".join(WORDS[i % 7 : i % 7 + 3 + i % 5]) for i in range(40)]


@pytest.fixture(scope="module")
def stream():
    return Activations(load_model(tiny_gpt2()), SITE, texts=TEXTS, batch_size=32, buffer_size=64)


class Identity(TopKSAE):
    def forward(self, x):
        return x


class Zero(TopKSAE):
    def forward(self, x):
        return torch.zeros_like(x)


def test_the_report_equals_the_metrics_on_all_rows_at_once():
    sae = TopKSAE(6, 12, 3)
    x = 2 + torch.randn(100, 6, generator=torch.Generator().manual_seed(0))
    report = evaluate(sae, [Batch(part) for part in x.split(13)], tokens=90)
    assert report["tokens"] == 90
    assert report["fvu"] == pytest.approx(fvu(x[:90], sae(x[:90])))
    assert report["l0"] == pytest.approx(l0(sae.encode(x[:90])))
    assert "loss_recovered" not in report


def test_a_perfect_reconstruction_loses_nothing_and_zero_loses_all(stream):
    perfect = evaluate(Identity(12, 8, 2), stream, tokens=1000)
    assert perfect["loss_recovered"] == perfect["loss_recovered_mean"] == 1
    assert perfect["kl"] == pytest.approx(0, abs=1e-6)
    nothing = evaluate(Zero(12, 8, 2), stream, tokens=1000)
    assert nothing["loss_recovered"] == 0
    assert nothing["loss_patched"] == nothing["loss_zero"] != nothing["loss_clean"]
    assert nothing["kl"] > 0


def test_the_clean_loss_is_that_of_transformers(stream):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny_gpt2()).eval(),
        AutoTokenizer.from_pretrained(tiny_gpt2()),
    )
    total, counted = 0.0, 0
    with torch.no_grad():
        for text in TEXTS:
            ids = tokenizer(text, return_tensors="pt").input_ids
            total += F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum").item()
            counted += ids.shape[1] - 1
    report = evaluate(TopKSAE(12, 8, 2), stream, tokens=10_000)
    assert report["model_tokens"] == report["tokens"] == counted
    assert report["loss_clean"] == pytest.approx(total / counted, abs=1e-5)


def test_a_list_of_saes_gets_the_reports_that_each_gets_alone(stream):
    saes = [TopKSAE(12, 8, 2), TopKSAE(12, 8, 3, seed=1)]
    together = evaluate(saes, stream, tokens=100)
    assert together == [evaluate(sae, stream, tokens=100) for sae in saes]
    assert together[0]["loss_clean"] == together[1]["loss_clean"]
    assert together[0]["loss_patched"] != together[1]["loss_patched"]


def test_few_tokens_are_a_sample_of_texts_of_all_lengths(stream):
    many = Activations(stream.model, SITE, texts=TEXTS, forward_tokens=64)
    lengths = {int(length) for length in next(many.sequences(by_length=False)).mask.sum(1)}
    assert len(lengths) > 2
    alike = {int(length) for length in next(many.sequences()).mask.sum(1)}
    assert len(alike) <= 2
    windows = [
        sorted(row[mask].tolist() for ids, m in many.sequences(flag) for row, mask in zip(ids, m, strict=True))
        for flag in (False, True)
    ]
    assert windows[0] == windows[1]


def test_no_saes_are_refused():
    with pytest.raises(ValueError, match="at least one, got none"):
        evaluate([], [torch.ones(4, 6)], tokens=4)


def test_the_training_texts_are_refused_and_other_texts_are_not(stream):
    sae = TopKSAE(12, 8, 2)
    sae_lib.train(sae, stream, tokens=64)
    with pytest.raises(ValueError, match="held out.*allow_train=True"):
        evaluate(sae, stream, tokens=64)
    assert evaluate(sae, stream, tokens=64, allow_train=True)["tokens"] == 64
    other = Activations(stream.model, SITE, texts=TEXTS[1:], batch_size=32, buffer_size=64)
    assert evaluate(sae, other, tokens=64)["tokens"] == 64


def test_evaluation_leaves_the_mode_as_it_was():
    sae = TopKSAE(6, 12, 3)
    for mode in (True, False):
        sae.train(mode)
        evaluate(sae, [torch.ones(4, 6)], tokens=4)
        assert sae.training is mode


def test_an_empty_stream_is_refused():
    with pytest.raises(ValueError, match="at least one row, got none"):
        evaluate(TopKSAE(6, 12, 3), [], tokens=4)
