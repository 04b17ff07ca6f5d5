"""`evaluate`, `convert` and `reproduce` on the command line: what the library gives, one line for a mistake."""

import json
import random

import pytest
import torch
import yaml
from tiny_models import WORDS, tiny_gpt2
from typer.testing import CliRunner

import sae_lib
from sae_lib import experiments, reproduce, results
from sae_lib.__main__ import app

SITE = "blocks.1.hook_resid_post"


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    return result.output


# evaluate -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def texts(tmp_path):
    """A file of 60 lines of 10 words."""
    dice = random.Random(1)
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(" ".join(dice.choices(WORDS[:-2], k=10)) for _ in range(60)))
    return path


@pytest.fixture
def saved(tmp_path):
    """Two untrained SAEs of the tiny model's width."""
    return [sae_lib.TopKSAE(12, 20, k, seed=k).save(tmp_path / f"k{k}") for k in (3, 5)]


def book(label: str, target: int, seed: int) -> dict:
    ground = {"model": str(tiny_gpt2()), "site": SITE}
    row = {"experiment": "pocket", "sae": label, "target": target, "seed": seed, "d_sae": 64}
    row |= {"configuration": {"ground": ground}}
    return row | {"l0": float(target), "fvu": 1 / target, "kl": 0.5 / target, "alive": 0.9}


def test_evaluate_prints_what_the_library_measures(saved, texts):
    said = run("evaluate", saved[0], "--model", tiny_gpt2(), "--site", SITE, "--texts", texts, "--tokens", 300)
    model = sae_lib.load_model(str(tiny_gpt2()))
    held = sae_lib.Activations(model, SITE, texts=sae_lib.load_texts(texts))
    report = sae_lib.evaluate(sae_lib.load(saved[0]), held, 300)
    assert said.splitlines()[0] == "k3"
    assert said.splitlines()[1:] == [f"  {metric} {value:.6g}" for metric, value in report.items()]


def test_against_the_book_gives_each_variant_at_the_same_l0_and_a_picture(saved, texts, tmp_path, monkeypatch):
    rows = [book("TopK", target, seed) for target in (2, 8) for seed in (0, 1)]
    monkeypatch.setattr(experiments, "rows", lambda *_: rows)
    where = ["--model", tiny_gpt2(), "--site", SITE, "--texts", texts, "--tokens", 300]
    said = run("evaluate", *saved, *where, "--against", "book", "--out", tmp_path / "mine.png")
    assert "k3, fvu at its L0 of 3.0: " in said
    assert "  TopK 0.3903 ± 0.0000" in said  # .5 - (.5 - .125) * log(3 / 2) / log(8 / 2)
    assert "drawn on the curves of 2 seeds" in said
    assert (tmp_path / "mine.png").read_bytes().startswith(b"\x89PNG")


def test_a_site_without_curves_is_one_line(saved, texts, monkeypatch, as_a_user):
    monkeypatch.setattr(experiments, "rows", lambda *_: [book("TopK", 2, 0)])
    where = ["--model", tiny_gpt2(), "--site", SITE, "--texts", texts, "--tokens", 300]
    said = run("evaluate", saved[0], *where, "--against", "book", code=1)
    assert "error: the book's comparison must have a curve at" in said
    assert "Traceback" not in said
    assert "against must be book, got 'moon'" in run("evaluate", saved[0], *where, "--against", "moon", code=1)


# convert --------------------------------------------------------------------------------------------------------------


def test_convert_writes_another_librarys_folder_and_back(saved, tmp_path):
    there, back = tmp_path / "there", tmp_path / "back"
    assert run("convert", saved[0], "--to", "sae_lens", "--out", there, "--model", "gpt2", "--site", SITE) == (
        f"{there}  topk with 20 latents, as sae_lens: cfg.json, sae_weights.safetensors\n"
    )
    assert json.loads((there / "cfg.json").read_text())["metadata"]["hook_name"] == SITE
    assert run("convert", there, "--out", back).startswith(f"{back}  topk with 20 latents, as sae_lib")
    x = torch.randn(5, 12)
    assert torch.equal(sae_lib.load(back).encode(x), sae_lib.load(saved[0]).encode(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{sae}", "--to", "saelens", "--out", "{new}"), "format must be one of"),
        (("{sae}", "--to", "gemma_scope", "--out", "{new}"), "must be decided by thresholds"),
        (("{sae}", "--to", "sae_lens", "--out", "{sae}"), "path must be new"),
        (("{new}", "--to", "sae_lens", "--out", "{new}"), "path must be a folder"),
        (("hf:org", "--to", "sae_lens", "--out", "{new}"), "must be hf:org/name"),
    ],
)
def test_convert_says_in_one_line_why_it_wrote_nothing(saved, tmp_path, as_a_user, arguments, message):
    places = {"sae": saved[0], "new": tmp_path / "new"}
    output = run("convert", *(argument.format(**places) for argument in arguments), code=1)
    assert output.startswith("error: ")
    assert message in output
    assert output.count("\n") == 1
    assert not (tmp_path / "new").exists()
    sae_lib.load(saved[0])


# reproduce ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def described(tmp_path, monkeypatch):
    """A chapter of one SAE, and folders of its own."""
    world = {"planted": {"n_features": 8, "d_in": 4, "active": 2}, "batch_size": 32, "held": 100}
    name = {
        "version": 1,
        "ground": "world",
        "saes": {"TopK": {"variant": "topk", "d_sae": 8, "k": 2}},
        "measures": ["recovery"],
        "scales": {"smoke": {"tokens": 100, "seeds": 2}},
    }
    path = tmp_path / "experiments.yml"
    path.write_text(yaml.safe_dump({"grounds": {"world": world}, "chapter": {"name": name}}))
    monkeypatch.setattr(experiments, "DESCRIPTIONS", path)
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(reproduce, "WORK", tmp_path / "work")
    return tmp_path


def test_reproduce_says_what_it_wrote_and_does_nothing_twice(described):
    assert f"{described / 'chapter.smoke.json'}  1 rows added" in run(
        "reproduce", "chapter", "--scale", "smoke", "--seeds", 1
    )
    assert "1 rows added" in run("reproduce", "all", "--scale", "smoke", "--jobs", "2/2")
    assert "0 rows added" in run("reproduce", "chapter", "--scale", "smoke")
    assert len(results.read("chapter", "smoke", described)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chaptr", "--scale", "smoke"], "nearest: chapter"),
        (["chapter", "--scale", "reader"], "scale must be one of smoke, pocket, paper, got 'reader'"),
        (["chapter", "--scale", "smoke", "--jobs", "half"], "jobs must be I/N, such as 1/2, got 'half'"),
        (["chapter", "--scale", "smoke", "--jobs", "3/2"], "got 3/2"),
    ],
)
def test_a_mistake_is_one_line(described, as_a_user, arguments, message):
    said = run("reproduce", *arguments, code=1)
    assert "error: " in said and message in said
    assert "Traceback" not in said


def test_a_damaged_results_file_is_named_and_left_alone(described):
    run("reproduce", "chapter", "--scale", "smoke", "--seeds", 1)
    path = described / "chapter.smoke.json"
    path.write_text(path.read_text()[:-50])
    assert "whole results file" in run("reproduce", "chapter", "--scale", "smoke", code=1)


def test_an_sae_that_missed_its_l0_makes_the_command_fail(described):
    content = yaml.safe_load(experiments.DESCRIPTIONS.read_text())
    relu = {"variant": "relu", "d_sae": 8, "l1_coeff": {"match": 100, "start": 0.1}}
    content["chapter"]["name"]["saes"]["ReLU"] = relu
    experiments.DESCRIPTIONS.write_text(yaml.safe_dump(content))
    said = run("reproduce", "chapter", "--scale", "smoke", "--seeds", 1, code=1)
    assert "1 rows added" in said
    assert "no row: ReLU, {}, seed 0: L0 must come within 3% of 100" in said
