"""The whole command of scale paper, on tiny models with random weights: stopped once, then held against plain code.

A folder stands in for the Hub: it has a Gemma 2 and a GPT-2 under their names there, texts with splits, and labelled
texts. The experiments are those that are committed for chapter `gemma`, their sizes apart. Nothing comes near the
book's results.
"""

import ast
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib as mpl
import nbformat
import pytest
import torch
import yaml
from tiny_models import LETTERS, SPELLED, spellers
from torch.nn import functional as F
from typer.testing import CliRunner

import sae_lib
from sae_lib import experiments, reproduce, results
from sae_lib.__main__ import app
from sae_lib.grounds import ground
from sae_lib.measures import MEASURES
from sae_lib.metrics import FirstLetter

ROOT = Path(__file__).parent.parent
GEMMA, GPT2, SITE = "google/gemma-2-2b", "gpt2", "blocks.1.hook_resid_post"
TOKENS = 6000
FIXED = {"JumpReLU": {"variant": "jumprelu", "target_l0": "target"}, "GBA": {"variant": "gba", "htf": 0.15}}
"""Whose L0 so few tokens do not bring to the target."""


def stand_in_for_the_hub(folder: Path) -> None:
    """Models, texts and labelled texts, under the names that the experiments ask for."""
    for name, model in zip((GEMMA, GPT2), spellers(), strict=True):
        shutil.copytree(model, folder / name)
    dice = random.Random(0)

    def texts(many: int, words: list[str]) -> list[str]:
        return [" ".join(dice.choices(words, k=dice.randint(5, 40))) + " ." for _ in range(many)]

    half = len(SPELLED) // 2
    labelled = [
        {"text": text, "label": label} for label in (0, 1) for text in texts(40, SPELLED[half * label :][:half])
    ]
    files = {
        "monology/pile-uncopyrighted/train": [{"text": text} for text in texts(500, SPELLED)],
        "monology/pile-uncopyrighted/test": [{"text": text} for text in texts(60, SPELLED)],
        "fancyzhx/ag_news/train": labelled,
    }
    for name, lines in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "words.txt").write_text("\n".join(texts(120, SPELLED)))


def small(content: dict) -> dict:
    """The descriptions, chapter `gemma` in sizes for tiny models: all variants in short, a few in the others."""
    on = content["grounds"]["gemma-2-2b"] | {"site": SITE, "batch_size": 256, "held": 1500}
    content["grounds"] |= {"gemma-2-2b": on, "in full": on | {"dtype": "float32"}}
    parts = content["gemma"]
    setting = parts["short"]["settings"][0] | {"d_sae": 48, "target": 4, "l1": 0.1}
    for sae in parts["short"]["saes"].values():
        sae |= {"only": {"target": 4}} if "only" in sae else {}
    measures = [{"latent_distances": {"target": 4}} if isinstance(m, dict) else m for m in parts["short"]["measures"]]
    short = {"ground": "in full", "settings": [setting], "measures": measures, "tokens": TOKENS, "repeats": 1}
    short["saes"] = parts["short"]["saes"] | FIXED
    two = {label: parts["wide"]["saes"][label] for label in ("TopK", "g-SAE")}
    wide = {"settings": [setting | {"d_sae": 64}], "saes": two, "tokens": 1500, "repeats": 1}
    long = wide | {"measures": ["reconstruction"]}
    sizes = {"short": short, "long": long, "wide": wide}
    return content | {
        "gemma": {name: parts[name] | own | {"scales": {"paper": {"seeds": 1}}} for name, own in sizes.items()}
    }


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The command, interrupted while it measures, and once more; then for another model."""
    folder, before = tmp_path_factory.mktemp("hub"), sorted(results.FOLDER.iterdir())
    stand_in_for_the_hub(folder)
    (folder / "experiments.yml").write_text(yaml.safe_dump(small(experiments.described()), sort_keys=False))
    (folder / "results").mkdir()
    for path in results.FOLDER.glob("*.pocket.json"):
        (folder / "results" / path.name).symlink_to(path)
    trained, measured = [], []

    def train(saes, *arguments, checkpoint, **options):
        if not any(path.name.endswith("-finished") for path in checkpoint.glob("*")):
            trained.append(sorted(type(sae).__name__ for sae in saes))
        return sae_lib.train(saes, *arguments, checkpoint=checkpoint, **options)

    def letters(*arguments):
        measured.append("first_letter")
        return first_letter(*arguments)

    def stop(*_):
        raise KeyboardInterrupt

    def run(*arguments):
        return CliRunner().invoke(app, ["reproduce", *map(str, arguments)])

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(experiments, "DESCRIPTIONS", folder / "experiments.yml")
        patch.setattr(results, "FOLDER", folder / "results")
        patch.setattr(reproduce, "WORK", folder / "work")
        patch.setattr(reproduce, "train", train)
        first_letter = MEASURES["first_letter"]
        patch.setitem(MEASURES, "first_letter", letters)
        with pytest.MonkeyPatch.context() as stopped:
            stopped.setitem(MEASURES, "sparse_probing", stop)
            first = run("gemma", "--scale", "paper")
            there = (folder / "results/gemma.paper.json").exists()
        again = len(trained)
        second = run("gemma", "--scale", "paper")
        book = (folder / "results/gemma.paper.json").read_bytes()
        own = ["gemma/wide", "--scale", "paper", "--model", GPT2, "--texts", "words.txt", "--held-texts", 20]
        own += ["--tokens", 800, "--d-sae", 40, "--target", 3]
        mixed, other = run(*own), run(*own, "--out", folder / "own")
        assert (folder / "results/gemma.paper.json").read_bytes() == book
        content = {"first": first, "second": second, "there": there, "mixed": mixed, "other": other}
        yield SimpleNamespace(
            **content,
            folder=folder,
            trained=(trained[:again], trained[again:]),
            measured=measured,
            rows={(row["experiment"], row["sae"]): row for row in results.read("gemma", "paper")},
            own=results.read("gemma", "paper", folder / "own"),
            ground=ground(experiments.experiments("gemma", "paper")[0].ground),
        )
    assert sorted(results.FOLDER.iterdir()) == before


def plain(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def second_block(model):
    return (model.model.layers if hasattr(model, "model") else model.transformer.h)[1]


# The command ----------------------------------------------------------------------------------------------------------


def test_one_screen_says_first_what_the_run_takes(ran):
    lines = ran.first.stdout.splitlines()[:8]
    assert [line[:10].strip() for line in lines] == "to do,model,texts,labels,memory,disk,hours,writes".split(",")
    assert lines[0].endswith("17 rows: short (13), long (2), wide (2); a row is an SAE and a seed")
    assert "cannot work" not in ran.first.output


def test_a_run_that_was_stopped_goes_on_and_repeats_nothing(ran):
    assert (ran.first.exit_code, ran.there) == (130, False)
    assert ran.second.exit_code == 0, ran.second.output
    assert "17 rows added" in ran.second.output
    assert ran.measured == ["first_letter"]
    names = "ReLU Gated TopK JumpReLU BatchTopK Matryoshka MutualChoice FeatureChoice ATM GBA TopK TopK".split()
    one_stream = sorted(f"{name}SAE" for name in names)  # the last two are controls
    assert ran.trained[0][0] == one_stream, "all but g-SAE, which needs gradients"
    assert ran.trained[0][1] == ["GradientSAE"]
    assert ran.trained[1][:2] == [["TopKSAE"], ["GradientSAE"]], "of the second experiment: the first one was done"


def test_all_variants_have_rows_at_the_l0_that_was_asked_for(ran):
    assert len(ran.rows) == 17
    for (_, label), row in ran.rows.items():
        assert abs(row["l0"] / 4 - 1) < 0.2 or label in FIXED, label
        assert row["unmeasured"] == {}, label
    assert all(
        row["mean_distance"] > 0 < row["probing_1"] <= 1 for (name, _), row in ran.rows.items() if name != "long"
    )
    assert all(abs(ran.rows["short", label]["l0"] / 4 - 1) <= 0.03 for label in ("ReLU", "Gated", "ATM"))


def test_another_model_has_a_folder_of_its_own_and_leaves_the_books_alone(ran):
    assert ran.mixed.exit_code == 1
    assert "must not be mixed with the book's rows, got other model, texts, held_texts" in ran.mixed.output
    assert ran.other.exit_code == 0, ran.other.output
    assert str(ran.folder / "own/gemma.paper.json") in ran.other.output
    assert [row["sae"] for row in ran.own] == ["TopK", "g-SAE"]
    for row in ran.own:
        asked = row["configuration"]["ground"]
        assert (asked["model"], asked["texts"], asked["held_texts"]) == (GPT2, "words.txt", 20)
        assert (row["d_sae"], row["configuration"]["tokens"], row["l0"]) == (40, 800, pytest.approx(3, abs=0.01))
    assert {row["seed"] for row in ran.own} == {0}


# Against plain code ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [GEMMA, GPT2])
def test_activations_and_gradients_are_those_of_plain_hooks(ran, name):
    described = ran.rows["short", "TopK"]["configuration"]["ground"] | {"model": str(ran.folder / name)}
    stream = ground(described).stream(0, "grad")
    tokens = next(stream.sequences())
    x, gradient = stream.read(tokens)

    model, seen = plain(ran.folder / name), []

    def keep(module, inputs, output):
        seen.append(output[0] if isinstance(output, tuple) else output)
        seen[0].retain_grad()

    second_block(model).register_forward_hook(keep)
    loss = F.cross_entropy(model(tokens.ids).logits[:, :-1].mT, tokens.ids[:, 1:], reduction="none")
    loss[tokens.mask[:, 1:]].sum().backward()
    counted = (tokens.ids != stream.model.bos) & tokens.mask
    counted[:, :-1] &= tokens.mask[:, 1:]
    counted[:, -1] = False
    for ours, theirs in ((x, seen[0]), (gradient, seen[0].grad)):
        assert ours.shape == theirs[counted].shape
        assert (ours - theirs[counted]).abs().max() <= 1e-5 * theirs[counted].abs().max()


@pytest.fixture(scope="module")
def topk(ran):
    """The SAE of the row, trained by `train` alone."""
    made = sae_lib.TopKSAE(32, 48, k=4, seed=0)
    sae_lib.train(made, ran.ground.stream(0), TOKENS, seed=0)
    return made


def test_a_row_is_what_plain_training_and_evaluation_give(ran, topk):
    report = sae_lib.evaluate(topk, ran.ground.held_out(0, 0), tokens=1500)
    for metric in ("fvu", "l0", "alive", "loss_patched", "kl"):
        assert ran.rows["short", "TopK"][metric] == pytest.approx(report[metric], rel=1e-6)


@torch.no_grad()
def test_the_patched_loss_is_that_of_a_plain_hook(ran, topk):
    model, sizes, losses = plain(ran.folder / GEMMA), [], []
    bos = ran.ground.model.bos

    def patch(module, inputs, output):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = torch.where(
            (tokens.mask & (tokens.ids != bos))[..., None], topk(hidden.flatten(0, 1)).view_as(hidden), hidden
        )
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    second_block(model).register_forward_hook(patch)
    for tokens in ran.ground.held_out(0, 0).sequences(by_length=False):
        loss = F.cross_entropy(model(tokens.ids).logits[:, :-1].mT, tokens.ids[:, 1:], reduction="none")
        losses.append(loss[tokens.mask[:, 1:]].sum().item())
        sizes.append(int(tokens.mask[:, 1:].sum()))
        if sum(sizes) >= 1500:
            break
    assert ran.rows["short", "TopK"]["loss_patched"] == pytest.approx(sum(losses) / sum(sizes), rel=1e-5)


def test_absorption_is_that_of_the_first_letter_task_on_the_vocabulary(ran, topk):
    task = FirstLetter(sae_lib.load_model(str(ran.folder / GEMMA)), SITE, seed=0)
    assert task.letters == list(LETTERS)
    report = task(topk)
    assert {"absorption_fraction", "absorption_full", "absorption_older"} <= set(report)
    for metric, value in report.items():
        assert ran.rows["short", "TopK"][metric] == pytest.approx(value, rel=1e-6), metric


def test_half_precision_is_the_models_alone(ran):
    (described,) = {json.dumps(r["configuration"]["ground"]) for (name, _), r in ran.rows.items() if name == "wide"}
    stand = ground(json.loads(described) | {"model": str(ran.folder / GEMMA)})
    assert stand.model.dtype == torch.bfloat16
    assert next(iter(stand.stream(0))).x.dtype == torch.float32


def test_a_seed_is_one_order_of_the_streamed_texts_and_a_stream_goes_on_where_it_stood(ran):
    first, same, other = (next(iter(ran.ground.stream(seed))).x for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    stream = iter(ran.ground.stream(0))
    for _ in range(3):
        next(stream)
    fresh = ground(ran.rows["short", "TopK"]["configuration"]["ground"])  # the texts are read from the Hub again
    later = fresh.stream(0)
    later.load_state_dict(stream.state_dict())
    assert torch.equal(next(iter(later)).x, next(stream).x)


# The chapter ----------------------------------------------------------------------------------------------------------


def test_the_chapter_shows_the_rows_of_a_run(ran, monkeypatch):
    monkeypatch.chdir(ROOT / "book")
    mpl.use("agg")
    cells = [cell.source for cell in nbformat.read("gemma.ipynb", as_version=4).cells if cell.cell_type == "code"]
    page = {}
    for source in cells:
        exec(compile(ast.parse(source), "gemma.ipynb", "exec"), page)
    assert page["missing"] == ""
    assert len(page["rows"]) == len(ran.rows)
    shown = page["found"].loc["short", 4, "TopK"]
    assert shown["fvu"] == f"{ran.rows['short', 'TopK']['fvu']:.4f}"
    gains = page["minus_topk"](page["at"].assign(place="gemma"), "absorption_older")
    ours = ran.rows["short", "ATM"]["absorption_older"] - ran.rows["short", "TopK"]["absorption_older"]
    assert gains["ATM"].tolist() == [pytest.approx(ours)]
    assert set(gains) == {label for _, label in ran.rows} - {"TopK"}
    assert os.environ["SAE_LIB_SCALE"] == "smoke"


def test_the_page_is_rendered_from_the_rows_of_a_run_in_a_folder_of_its_own(ran, tmp_path):
    for name in ("book", "sae_lib"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("_config.yml", "_toc.yml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copy(ran.folder / "experiments.yml", tmp_path / "book")
    shutil.copy(ran.folder / "results/gemma.paper.json", tmp_path / "book/results")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "SAE_LIB_SCALE": "smoke"}
    build = [sys.executable, "book/build.py", "--only", "gemma"]
    done = subprocess.run(build, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "_build/html/book/gemma.html").read_text(encoding="utf-8")
    assert f"{ran.rows['short', 'TopK']['fvu']:.4f}" in page
    assert "<strong>Nothing yet.</strong>" not in page
    assert f"{len(ran.rows)} rows of Gemma-2-2b are there" in page
    assert not (ROOT / "book/results/gemma.paper.json").exists()
