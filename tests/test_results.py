"""Results files: nothing is lost, nothing is read that was not measured."""

import json
import multiprocessing
import os
import signal
import time

import pytest

from sae_lib import results
from sae_lib.results import ResultsError


def row(seed=0, label="TopK", fvu=0.25, **settings) -> dict:
    setting = {"target": 16} | settings
    return {
        "experiment": "pocket",
        "version": 1,
        "sae": label,
        "seed": seed,
        "setting": setting,
        "metrics": {"fvu": fvu, "l0": 16.0},
        "noise": {"fvu": 0.01},
        "unmeasured": {},
        "found": {},
        "seconds": 1.5,
        "date": "2026-11-22",
        "configuration": {"sae": label, "variant": "topk"} | setting,
        "environment": {"commit": "c0ffee", "dirty": False, "device": "a processor"},
    }


def test_rows_come_back_flat_with_all_they_refer_to(tmp_path):
    results.append("topk", "pocket", [row()], tmp_path)
    (read,) = results.read("topk", "pocket", tmp_path)
    assert (read["chapter"], read["scale"], read["experiment"], read["sae"]) == ("topk", "pocket", "pocket", "TopK")
    assert (read["fvu"], read["target"], read["noise"], read["commit"]) == (0.25, 16, {"fvu": 0.01}, "c0ffee")
    assert read["configuration"]["variant"] == "topk"


def test_a_row_of_the_same_configuration_and_seed_replaces_another_is_added(tmp_path):
    for changed in (row(), row(fvu=0.5), row(seed=1), row(target=8)):
        results.append("topk", "pocket", [changed], tmp_path)
    assert [r["fvu"] for r in results.read("topk", "pocket", tmp_path)] == [0.5, 0.25, 0.25]


def test_what_is_shared_is_stored_once_and_a_row_is_a_line(tmp_path):
    results.append("topk", "pocket", [row(seed) for seed in range(5)], tmp_path)
    text = results.file_of("topk", "pocket", tmp_path).read_text()
    assert text.count("c0ffee") == text.count('"variant"') == 1
    assert sum('"seed"' in line for line in text.splitlines()) == 5


@pytest.mark.parametrize(
    ("old", "new"),
    [('"fvu": 0.25', '"fvu": 0.2'), ('"seed": 0', '"seed": 9'), ("c0ffee", "c0ffe3"), ('"topk"}', '"relu"}')],
)
def test_a_file_edited_by_hand_is_refused(tmp_path, old, new):
    results.append("topk", "pocket", [row()], tmp_path)
    path = results.file_of("topk", "pocket", tmp_path)
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ResultsError, match="were changed since"):
        results.read("topk", "pocket", tmp_path)


def test_a_file_that_was_cut_off_is_refused_and_stays(tmp_path):
    results.append("topk", "pocket", [row(seed) for seed in range(3)], tmp_path)
    path = results.file_of("topk", "pocket", tmp_path)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 3, 37):
        path.write_bytes(whole[:length])
        with pytest.raises(ResultsError, match="whole results file"):
            results.read("topk", "pocket", tmp_path)
        with pytest.raises(ResultsError, match="delete it and run the command"):
            results.append("topk", "pocket", [row()], tmp_path)
        assert path.read_bytes() == whole[:length]


def test_another_file_in_its_place_is_refused(tmp_path):
    for content in ("[]", '{"format": "something else", "format_version": 1}', '{"rows": [1]}', "null"):
        results.file_of("topk", "pocket", tmp_path).write_text(content)
        with pytest.raises(ResultsError, match="must be"):
            results.read("topk", "pocket", tmp_path)


def test_a_missing_file_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(ResultsError, match="python -m sae_lib reproduce topk --scale pocket"):
        results.read("topk", "pocket", tmp_path)


def test_numbers_that_are_not_finite_and_settings_named_like_metrics_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        results.append("topk", "pocket", [row(fvu=float("nan"))], tmp_path)
    with pytest.raises(ValueError, match="settings must not be called like metrics, got l0"):
        results.append("topk", "pocket", [row(l0=3)], tmp_path)
    assert not results.file_of("topk", "pocket", tmp_path).exists()


def add_many(folder, first):
    for seed in range(first, first + 10):
        results.append("topk", "pocket", [row(seed)], folder)


def test_several_processes_add_to_one_file_and_lose_nothing(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=add_many, args=(tmp_path, first)) for first in (0, 10, 20)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert {r["seed"] for r in results.read("topk", "pocket", tmp_path)} == set(range(30))


def add_for_ever(folder):
    for seed in range(10**6):
        results.append("topk", "pocket", [row(seed)], folder)


def test_a_process_killed_while_it_writes_leaves_a_whole_file_and_no_lock(tmp_path):
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=add_for_ever, args=(tmp_path,))
    process.start()
    path = results.file_of("topk", "pocket", tmp_path)
    while not path.exists() or len(json.loads(path.read_text())["rows"]) < 5:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    before = len(results.read("topk", "pocket", tmp_path))
    results.append("topk", "pocket", [row(10**6)], tmp_path)
    assert len(results.read("topk", "pocket", tmp_path)) == before + 1


def test_a_row_says_where_it_comes_from():
    made = results.environment()
    assert set(made) == {"commit", "dirty", "sae_lib_sha256", "device", "versions"}
    assert made["versions"]["torch"]
    assert len(made["sae_lib_sha256"]) == 64
