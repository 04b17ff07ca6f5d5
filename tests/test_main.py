"""The command line is a thin layer: the same results as the library, the same errors, and an end that can go on."""

import json
import os
import random
import re
import signal

import pytest
import torch
from tiny_models import WORDS, tiny_gpt2
from typer.testing import CliRunner

import sae_lib
from sae_lib.__main__ import app
from sae_lib.commands.train import described, options

SITE = "blocks.1.hook_resid_post"


@pytest.fixture
def texts(tmp_path):
    """A file of 120 lines of 10 words."""
    dice = random.Random(0)
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(" ".join(dice.choices(WORDS[:-2], k=10)) for _ in range(120)))
    return path


@pytest.fixture
def train(tmp_path, texts):
    """The command, on a tiny model; 400 tokens in batches of 40."""

    def run(*arguments, out="out", code=0):
        fixed = f"train --model {tiny_gpt2()} --site {SITE} --texts {texts} --tokens 400 --batch-size 40 --device cpu"
        result = CliRunner().invoke(app, [*fixed.split(), "--out", str(tmp_path / out), *arguments])
        assert result.exit_code == code, result.output
        return result

    return run


def same(sae, other):
    return all(torch.equal(a, b) for a, b in zip(sae.state_dict().values(), other.state_dict().values(), strict=True))


def test_the_command_trains_what_the_library_trains(train, tmp_path, texts):
    train("--sae", "topk d_sae=20 k=3", "--sae", "relu d_sae=16 l1_coeff=0.05 seed=7", "--seed", "5")
    model = sae_lib.load_model(str(tiny_gpt2()), "cpu")
    stream = sae_lib.Activations(model, SITE, texts=sae_lib.load_texts(texts), batch_size=40)
    saes = [sae_lib.TopKSAE(12, 20, 3, seed=5), sae_lib.ReLUSAE(12, 16, 0.05, seed=7)]
    run = sae_lib.train(saes, stream, tokens=400, seed=5)
    for name, sae in zip(["0-topk", "1-relu"], saes, strict=True):
        assert same(sae_lib.load(tmp_path / "out" / name), sae)
    rows = [json.loads(line) for line in (tmp_path / "out/history.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == [row["loss"] for row in run.history]


def test_flags_say_the_same_as_one_text(train, tmp_path):
    train("--variant", "topk", "--d-sae", "20", "--k=3", "--aux-coeff", "0.5", out="flags")
    train("--sae", "topk d_sae=20 k=3 aux_coeff=0.5", out="text")
    flags, text = (sae_lib.load(tmp_path / out / "0-topk") for out in ("flags", "text"))
    asked = {"d_in": 12, "d_sae": 20, "k": 3, "aux_coeff": 0.5}
    assert flags.config() == text.config() == asked | {"embedding_coeff": 0.0, "seed": 0}
    assert same(flags, text)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_the_same_command_goes_on_where_it_was_stopped(train, tmp_path, monkeypatch, number, code):
    arguments, steps = ("--variant", "topk", "--d-sae", "20", "--k", "3"), iter(range(1, 100))
    train(*arguments, out="unbroken")
    with monkeypatch.context() as patch:
        stop = lambda *_: next(steps) == 6 and os.kill(os.getpid(), number)  # noqa: E731
        patch.setattr(sae_lib.TopKSAE, "before_step", stop)
        assert "after 240 tokens; the same call goes on" in train(*arguments, code=code).output
    assert not (tmp_path / "out/0-topk").exists()
    train(*arguments)
    assert same(sae_lib.load(tmp_path / "out/0-topk"), sae_lib.load(tmp_path / "unbroken/0-topk"))
    again = train(*arguments).output  # finished: it trains no more
    assert "out/0-topk  fvu" in again


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "give --variant with its options, or --sae, got neither"),
        ("--k 3", "give --variant with its options, or --sae, got --k 3"),
        ("--variant tokp --k 3", "variant must be one of relu,.* got 'tokp'; nearest: topk"),
        ("--variant topk --d-sae 20", "topk needs k, got 'topk d_sae=20'"),
        (
            "--variant topk --d-sae 20 --k 3 --kk 3",
            "topk takes d_sae, k, aux_coeff, embedding_coeff, seed as name=value, got 'kk=3'",
        ),
        ("--sae 'topk", "quotation marks must be closed, got 'topk"),
        ("--variant topk --d-sae --k 3", "options of a variant must be --name value, got --d-sae --k 3"),
        ("--variant topk --d-sae 20 --k", "options of a variant must be --name value"),
        ("--variant topk --d-sae 20 --k 30", r"k must be an integer in \[1, d_sae=20\], got 30"),
        ("--variant topk --d-sae 20 --k three", "k must be an integer .* got 'three'"),
        ("--variant topk --d-sae 20 --k 3 --site nowhere", "site must be one of .* got 'nowhere'"),
        ("--variant topk --d-sae 20 --k 3 --tokens 0", "tokens must be an integer at least 1, got 0"),
        ("--variant topk --d-sae 20 --k 3 --texts no.txt", "texts must be .* got 'no.txt'"),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_do(train, as_a_user, arguments, message):
    output = " ".join(train(*arguments.split(), code=1).output.split())
    assert output.startswith("error: ")
    assert re.search(message, output), output


def test_another_run_in_the_folder_is_an_error_that_says_what_differs(train):
    train("--variant", "topk", "--d-sae", "20", "--k", "3")
    output = " ".join(train("--variant", "topk", "--d-sae", "20", "--k", "4", code=1).output.split())
    assert "saes.0.config.k is 3 there and 4 here" in output


def test_values_are_read_as_python_reads_them():
    _, arguments = described("matryoshka d_sae=1_000 k=3 group_sizes=[400,600] aux_coeff=1e-2")
    assert arguments == {"d_sae": 1000, "k": 3, "group_sizes": [400, 600], "aux_coeff": 0.01}
    assert described("relu d_sae=4 l1_coeff=1 norm_weighted=True")[1]["norm_weighted"] is True
    assert options(["--d-sae", "3", "--aux-coeff=-1"]) == ["d_sae=3", "aux_coeff=-1"]


def test_help_lists_what_each_variant_takes():
    output = CliRunner().invoke(app, ["train", "--help"]).output
    for variant in sae_lib.VARIANTS:
        assert f"{variant}: d_sae" in output
