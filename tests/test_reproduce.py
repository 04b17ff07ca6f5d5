"""The runner: rows are what a plain training and measurement give; a kill at any point loses and repeats nothing."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scipy import stats
from tiny_models import WORDS, tiny_gpt2

import sae_lib
from sae_lib import reproduce, results
from sae_lib.experiments import Planned, described, experiments, rows
from sae_lib.grounds import ground
from sae_lib.measures import MEASURES
from sae_lib.metrics.equivariance import OneMatrix
from sae_lib.metrics.feature_clusters import Reading

DESCRIPTION = {
    "grounds": {"world": {"planted": {"n_features": 16, "d_in": 8, "active": 2}, "batch_size": 64, "held": 500}},
    "chapter": {
        "name": {
            "version": 1,
            "ground": "world",
            "settings": [{"target": 2, "d_sae": 16}],
            "saes": {
                "TopK": {"variant": "topk", "k": "target"},
                "twice": {"variant": "topk", "k": "target", "tokens": 4000},
                "ReLU": {"variant": "relu", "l1_coeff": {"match": "target", "start": 0.2}},
                "PCA": {"variant": "pca", "rank": "target"},
                "untrained": {"variant": "topk", "k": "target", "control": "untrained"},
            },
            "measures": ["reconstruction", "sparsity", "recovery"],
            "repeats": 2,
            "scales": {"smoke": {"tokens": 2000, "seeds": 2}},
        }
    },
}
LABELS = ["TopK", "twice", "ReLU", "PCA", "untrained"]
SAME = ("experiment", "version", "sae", "seed", "setting", "metrics", "noise", "found", "configuration")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder with all rows of the description above."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reproduce, "WORK", folder / "work")
        assert reproduce.reproduce(**prepared(folder)) == (10, [])
    return folder


def rows_of(folder: Path, seed: int = 0) -> dict[str, dict]:
    return {row["sae"]: row for row in results.read("chapter", "smoke", folder) if row["seed"] == seed}


@pytest.fixture
def asked(tmp_path, monkeypatch) -> dict:
    """Arguments of `reproduce` for the description above, in a folder of its own."""
    monkeypatch.setattr(reproduce, "WORK", tmp_path / "work")
    return prepared(tmp_path)


def prepared(folder: Path) -> dict:
    path = folder / "experiments.yml"
    path.write_text(yaml.safe_dump(DESCRIPTION, sort_keys=False))
    return {"chapter": "chapter", "scale": "smoke", "folder": folder, "path": path}


def stored(folder: Path) -> list[dict]:
    content = json.loads(results.file_of("chapter", "smoke", folder).read_text())
    order = sorted(content["rows"], key=lambda row: (row["seed"], LABELS.index(row["sae"])))
    return [{name: row[name] for name in SAME} for row in order]


def test_rows_are_what_plain_training_and_evaluation_give(whole):
    planted = sae_lib.PlantedDictionary(16, 8, active=2, seed=0)
    sae = sae_lib.TopKSAE(8, 16, k=2, seed=0)
    sae_lib.train(sae, planted.batches(64, seed=0), tokens=2000, seed=0)
    reports = [sae_lib.evaluate(sae, planted.batches(500, seed=1000 + repeat), tokens=500) for repeat in (0, 1)]
    row = rows_of(whole)["TopK"]
    fvu = torch.tensor([report["fvu"] for report in reports], dtype=torch.float64)
    assert row["fvu"] == pytest.approx(fvu.mean().item(), rel=1e-12)
    assert row["noise"]["fvu"] == pytest.approx(fvu.std().item(), rel=1e-9)
    assert row["mcc"] == pytest.approx(sae_lib.metrics.mcc(sae.W_dec, planted.directions))
    assert row["l0_ratio"] == row["l0_train"] / 2 == 1
    assert row["l0_sd"] == 0


def test_searched_l0_meets_the_target_and_the_coefficient_is_kept(whole):
    rows = rows_of(whole)
    assert abs(rows["ReLU"]["l0"] / 2 - 1) <= 0.03
    assert set(rows["ReLU"]["found"]) == {"l1_coeff"}
    assert rows["TopK"]["found"] == {}


def test_an_sae_that_trains_longer_does_and_does_better(whole):
    rows = rows_of(whole)
    assert rows["twice"]["configuration"]["tokens"] == 4000
    assert rows["twice"]["fvu"] < rows["TopK"]["fvu"] < rows["untrained"]["fvu"]


def test_what_is_there_is_not_run_again_and_more_seeds_are_added_with_the_same_bits(
    asked, whole, monkeypatch, tmp_path
):
    assert [reproduce.reproduce(**asked, seeds=seeds)[0] for seeds in (1, 2)] == [5, 5]
    assert stored(tmp_path) == stored(whole)
    monkeypatch.setattr(reproduce, "train", None)
    assert reproduce.reproduce(**asked) == (0, [])
    assert [path.suffix for path in (tmp_path / "work").iterdir()] == [".lock"] * 2


def test_parts_of_the_work_add_up_to_the_whole_with_the_same_bits(asked, whole, tmp_path):
    assert [reproduce.reproduce(**asked, job=(part, 3))[0] for part in (3, 2, 1)] == [0, 5, 5]
    assert stored(tmp_path) == stored(whole)
    with pytest.raises(ValueError, match="jobs must be i/n with i from 1 to n, got 4/3"):
        reproduce.reproduce(**asked, job=(4, 3))


def test_what_another_process_is_at_is_left_alone(asked, whole, monkeypatch, tmp_path):
    train, met = reproduce.train, []

    def train_while_another_starts(*arguments, **options):
        if not met:
            met.append(True)
            met.append(reproduce.reproduce(**asked, seeds=1))
        return train(*arguments, **options)

    monkeypatch.setattr(reproduce, "train", train_while_another_starts)
    assert reproduce.reproduce(**asked, seeds=1) == (5, [])
    assert met == [True, (0, [])]
    assert stored(tmp_path) == stored(whole)[:5]


def test_an_l0_out_of_reach_leaves_its_row_out_and_says_so(asked, tmp_path):
    description = yaml.safe_load(asked["path"].read_text())
    description["chapter"]["name"]["settings"] = [{"target": 40, "d_sae": 16}]
    description["chapter"]["name"]["saes"] = {
        "ReLU": {"variant": "relu", "l1_coeff": {"match": "target", "start": 0.2}},
        "untrained": {"variant": "topk", "k": 2, "control": "untrained"},
    }
    asked["path"].write_text(yaml.safe_dump(description))
    added, missed = reproduce.reproduce(**asked, seeds=1)
    assert added == 1
    assert missed[0].startswith("ReLU, {'d_sae': 16, 'target': 40}, seed 0: L0 must come within 3% of 40")


def test_a_search_that_leaves_the_arguments_range_leaves_its_row_out_and_keeps_the_others(asked, tmp_path):
    description = yaml.safe_load(asked["path"].read_text())
    description["chapter"]["name"]["saes"] = {
        "GBA": {"variant": "gba", "ltf": 0.2, "htf": {"match": 0.5, "start": 0.3}},
        "untrained": {"variant": "topk", "k": 2, "control": "untrained"},
    }
    description["chapter"]["name"]["settings"] = [{"target": 0.5, "d_sae": 16}]
    asked["path"].write_text(yaml.safe_dump(description))
    added, missed = reproduce.reproduce(**asked, seeds=1)
    assert (added, len(missed)) == (1, 1)
    assert "target frequencies must have 0 < ltf <= htf <= 1" in missed[0]


def test_one_experiment_of_a_chapter_can_be_asked_for_and_changes_need_a_folder_of_their_own(asked, tmp_path):
    of_name = reproduce.unfinished(**asked | {"chapter": "chapter/name"})
    assert of_name == reproduce.unfinished(**asked)
    assert len(of_name) == 2
    with pytest.raises(ValueError, match="experiment of chapter at scale smoke must be one of name, got 'nam'"):
        reproduce.unfinished(**asked | {"chapter": "chapter/nam"})
    for folder in (None, results.FOLDER):
        with pytest.raises(ValueError, match="must not be mixed with the book's rows, got other tokens"):
            reproduce.reproduce(**asked | {"folder": folder}, changes={"tokens": 5})


def test_an_experiment_may_train_nothing(asked):
    description = yaml.safe_load(asked["path"].read_text())
    parts = description["chapter"]["name"]
    parts["saes"] = {"PCA": parts["saes"]["PCA"]}
    asked["path"].write_text(yaml.safe_dump(description))
    assert reproduce.reproduce(**asked) == (2, [])


def test_ways_to_embed_neurons_are_measured_together_in_place_of_saes(asked, tmp_path, monkeypatch):
    description = yaml.safe_load(asked["path"].read_text())
    saes = {"own": {"variant": "neurons"}, "none": {"variant": "neurons", "weights": "none", "basis": "rotated"}}
    description["chapter"]["name"] |= {"saes": saes, "measures": ["neurons"], "repeats": 1}
    asked["path"].write_text(yaml.safe_dump(description))
    seen = []

    def neurons(readings, ground, seed, repeat):
        seen.append((readings, seed))
        return [{"intra_distance": float(place)} for place, _ in enumerate(readings)]

    monkeypatch.setattr(reproduce, "MEASURES", {"neurons": neurons})
    assert reproduce.reproduce(**asked) == (4, [])
    assert seen == [([Reading("none", "rotated"), Reading()], seed) for seed in (0, 1)]
    assert [rows_of(tmp_path)[label]["intra_distance"] for label in ("none", "own")] == [0, 1]


def test_a_metric_that_is_no_number_is_stored_as_unknown(asked, monkeypatch, tmp_path):
    broken = {"reconstruction": lambda saes, *_: [{"fvu": float("nan"), "l0": 1.0}] * len(saes)}
    monkeypatch.setattr(reproduce, "MEASURES", MEASURES | broken)
    reproduce.reproduce(**asked, seeds=1)
    for row in results.read("chapter", "smoke", tmp_path):
        assert (row["fvu"], row["noise"]["fvu"], row["l0"], row["noise"]["l0"]) == (None, None, 1.0, 0.0)


# Killed ---------------------------------------------------------------------------------------------------------------


def die(*_args, **_kwargs) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_and_die(folder: Path, point: str) -> None:
    """Run the description and be killed at a named point; write down what was begun."""
    torch.set_num_threads(1)
    reproduce.WORK = folder / "work"
    train, measure, append = reproduce.train, MEASURES["recovery"], reproduce.append

    def noted_train(saes, stream, tokens, seed, checkpoint, checkpoint_every):
        def watch(history):
            if point == "training" and history[-1]["tokens"] > 1300:
                die()

        with (folder / "log").open("a") as log:
            finished = any(path.name.endswith("-finished") for path in checkpoint.glob("*"))
            log.write("" if finished else f"train {tokens} {len(saes)}\n")
        return train(saes, stream, tokens, seed, watch, checkpoint, checkpoint_every)

    def noted_measure(saes, ground, seed, repeat):
        if point == "measuring" and repeat == 1:
            die()
        with (folder / "log").open("a") as log:
            log.write(f"recovery {seed} {repeat}\n")
        return measure(saes, ground, seed, repeat)

    def noted_append(*arguments):
        if point == "before the rows are written":
            die()
        append(*arguments)
        if point == "after the rows are written":
            die()

    reproduce.train, MEASURES["recovery"], reproduce.append = noted_train, noted_measure, noted_append
    reproduce.reproduce(**prepared(folder), seeds=1)


POINTS = ["training", "measuring", "before the rows are written", "after the rows are written"]


def test_a_run_killed_at_every_point_ends_with_the_same_bits_and_repeats_nothing(whole, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sae_lib.reproduce"])
    ended = []
    for point in [*POINTS, "nowhere"]:
        process = context.Process(target=run_and_die, args=(tmp_path, point))
        process.start()
        process.join()
        ended.append(process.exitcode)
    assert ended == [-signal.SIGKILL] * 4 + [0]
    assert stored(tmp_path) == stored(whole)[:5]
    log = (tmp_path / "log").read_text().splitlines()
    assert log.count("recovery 0 0") == log.count("recovery 0 1") == 1
    assert log.count("train 2000 3") == 2  # begun, killed, gone on
    assert log.count("train 4000 1") == 1


@pytest.mark.parametrize("grad", [False, True])
def test_who_needs_no_gradient_is_trained_without_one_unless_the_ground_gives_it_to_all(grad, tmp_path):
    texts = [" ".join(WORDS[(7 * i * j) % 20] for j in range(1, 3 + i % 9)) for i in range(1, 61)]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    place = {"model": str(tiny_gpt2()), "site": "blocks.1.hook_resid_post", "texts": str(tmp_path / "texts.txt")}
    stand = ground(place | {"batch_size": 32, "held": 100, "grad": grad})
    shared = {"variant": "topk", "control": None, "tokens": 200, "arguments": {"d_sae": 24, "k": 2}}
    saes = [Planned(name, {}, shared | {"variant": name}) for name in ("topk", "gradient")]
    (topk, _), (gradient, _) = reproduce.train_once(saes, [{}, {}], 3, stand, tmp_path / "work")

    for sae, reading in ((topk, "grad" if grad else ""), (gradient, "grad")):
        alone = type(sae)(12, 24, k=2, seed=3)
        sae_lib.train(alone, stand.stream(3, reading), 200, 3)
        assert all(torch.equal(a, b) for a, b in zip(sae.parameters(), alone.parameters(), strict=True))
        other = type(sae)(12, 24, k=2, seed=3)
        if sae is topk and not grad:
            sae_lib.train(other, stand.stream(3, "grad"), 200, 3)
            assert not torch.equal(other.W_dec, topk.W_dec)  # the rows are others


def test_saes_that_read_orbits_see_the_same_inputs_in_as_many_steps(tmp_path):
    orbits = {"orbits": {"n_features": 6, "d_in": 8, "active": 2}, "inputs": 40, "batch_size": 4, "held": 10}
    stand = ground(orbits)
    plain = {"control": None, "tokens": 320, "arguments": {"d_sae": 8, "k": 2}}
    asked = {"topk": {}, "equivariant": {}, "matrix": {"arguments": {}}, "stacked": {"reading": "stacked"}}
    saes = [Planned(name, {}, plain | {"variant": name} | own) for name, own in asked.items()]
    saes[3].configuration["variant"] = "topk"
    topk, equivariant, matrix, stacked = (
        made for made, _ in reproduce.train_once(saes, [{}] * 4, 3, stand, tmp_path / "work")
    )
    assert matrix == OneMatrix()
    assert (topk.d_in, equivariant.d_in, stacked.d_in) == (8, 8, 32)
    assert [int(sae.tokens_trained) for sae in (topk, equivariant, stacked)] == [320, 80, 80]
    for sae, reading, tokens in ((topk, "", 320), (equivariant, "orbit", 80), (stacked, "stacked", 80)):
        alone = type(sae)(sae.d_in, 8, k=2, seed=3)
        assert sae_lib.train(alone, stand.stream(3, reading), tokens, 3).steps == 20
        assert all(torch.equal(a, b) for a, b in zip(sae.parameters(), alone.parameters(), strict=True))


def test_every_committed_experiment_names_measures_that_fit_its_ground():
    for chapter in set(described()) - {"grounds"}:
        for experiment in experiments(chapter, "pocket"):
            asked = {measure for sae in experiment.saes for measure in sae.configuration["measures"]}
            planted = "planted" in experiment.ground
            assert ("orbit_probing" in asked) <= ("autoencoder" in experiment.ground)
            assert ("orbit_recovery" in asked) == ("orbits" in experiment.ground)
            assert not asked & ({"first_letter", "sparse_probing", "steering"} if planted else {"recovery"})


# What is committed ----------------------------------------------------------------------------------------------------

CHEAP = [
    ("gated/shrinkage", "Gated", {"l1": 0.45}),
    ("batchtopk/curves", "BatchTopK", {"target": 3}),
    ("evaluation/world", "TopK", {"target": 4}),
]


@pytest.mark.parametrize(("name", "label", "setting"), CHEAP, ids=[name for name, *_ in CHEAP])
def test_a_committed_row_comes_out_again(name, label, setting, tmp_path):
    """Trained anew with its seed, each number lies within the interval that the seeds' spread gives it."""
    chapter, name = name.split("/")
    (one,) = (each for each in experiments(chapter, "pocket") if each.name == name)
    (sae,) = (each for each in one.saes if each.label == label and each.setting == setting)
    configuration = results.sha256_of(sae.configuration)
    committed = [row for row in rows(chapter, "pocket") if row["configuration_sha256"] == configuration]
    assert len(committed) == one.seeds
    ((again,), missed) = reproduce.run(one, 0, [sae], ground(one.ground), tmp_path)
    assert missed == []
    (first,) = (row for row in committed if row["seed"] == 0)
    for metric in ("fvu", "l0", "l2_ratio", "alive", "mcc", "f1"):
        values = np.array([row[metric] for row in committed])
        half = stats.t.ppf(0.995, len(values) - 1) * values.std(ddof=1)
        assert abs(again["metrics"][metric] - first[metric]) <= half + 1e-9, metric
