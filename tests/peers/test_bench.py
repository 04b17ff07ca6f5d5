"""The benchmark measures what it says: its protocol and its rows, with this library's worker at a tiny size.

The other libraries' workers need their own environments; `make bench` runs them.
"""

import io
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tqdm import tqdm

from peers import bench, ours, worker
from peers.rows import KEY, ROOT, read, targets, write
from peers.worker import Meter, Work, kth_largest, weights

X = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)) / 4
TINY = Work("topk", d_in=16, d_sae=256, k=4, batch=64)


@pytest.fixture
def activations(tmp_path):
    np.save(tmp_path / "x.npy", X.repeat(2, 1).numpy())
    return tmp_path / "x.npy"


def test_a_worker_answers_line_by_line_and_ends_with_its_input(activations):
    command = [sys.executable, "-m", "peers.worker", "ours", json.dumps(vars(TINY)), str(activations)]
    commands = "step 2\nreport\npeak 1\n"
    ran = subprocess.run(command, cwd=ROOT / "tests", input=commands, capture_output=True, text=True, check=True)
    ready, two, report, peak = (json.loads(line) for line in ran.stdout.splitlines())
    assert ready["torch"] == torch.__version__
    assert [len(two["cpu"]), len(two["wall"]), len(peak)] == [2, 2, 1]
    assert min(two["cpu"]) > 0
    assert report["l0"] == 4
    parameters = 2 * 16 * 256 + 256 + 16
    assert report["weights"] >= 4 * 4 * parameters  # weights, gradients, two moments, in 32 bits
    assert report["weights"] <= 4 * 4 * parameters + 100  # and the optimiser's counters


def test_a_step_lasts_from_one_request_to_the_next(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(worker, "time", SimpleNamespace(process_time=lambda: clock.now, perf_counter=lambda: 0.0))
    monkeypatch.setattr(sys, "stdin", io.StringIO("step 2\n"))
    channel = io.StringIO()

    def batches():
        for _ in range(2):
            clock.now += 0.25  # to make a batch
            yield X

    def train(meter):
        for seconds, _ in zip([3.0, 1.5, 0.0], meter, strict=True):
            clock.now += seconds  # to train on it

    with pytest.raises(SystemExit):  # the end of the input ends the process, whatever loop it is in
        train(Meter(batches(), lambda x: x, channel, base=0))
    assert json.loads(channel.getvalue())["cpu"] == [3.25, 1.75]


def test_peak_counts_what_a_step_held_and_gave_back(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("peak 1\npeak 1\n"))
    channel = io.StringIO()
    worker.forget()
    meter = iter(Meter(iter([X, X]), lambda x: x, channel, base=worker.memory("VmRSS")))
    next(meter)
    block = torch.ones(2**26 + 2**22)  # 272 MiB, held within the first step only: what was there before may go back
    del block
    next(meter)
    with pytest.raises(SystemExit):
        next(meter)
    first, second = (json.loads(line)["peak"] for line in channel.getvalue().splitlines())
    assert first > 2**28
    assert second < 2**27


def test_threshold_leaves_k_scores_a_row_on_average():
    scores = torch.tensor([[5.0, 1, 2], [4, 0, 3]])
    assert kth_largest(scores, k=1) == 3.0
    assert (scores > 3.0).sum() == 2


def test_weights_are_counted_with_gradients_and_moments(monkeypatch):
    things = [torch.ones(99), "text"]
    monkeypatch.setattr(worker, "gc", SimpleNamespace(get_objects=lambda: things))
    assert weights() == 0
    things.append(torch.nn.Parameter(torch.zeros(10)))
    assert weights() == 2 * 40
    things.append(torch.optim.Adam([things[-1]]))
    things[2].grad = torch.ones(10)
    things[3].step()
    assert weights() == 4 * 40 + 4  # and one counter


@pytest.mark.parametrize("variant", ["topk", "batchtopk", "jumprelu", "relu", "gated"])
def test_our_variants_have_the_same_l0_before_and_after_steps(variant):
    train, encode = ours.build(Work(variant, 16, 256, 4, 64), X)
    for steps in (0, 3):
        train([X] * steps)
        assert 3.5 <= float((encode(X) > 0).sum(1).float().mean()) <= 4.5


def test_a_tenth_of_the_latents_is_dead_and_auxk_uses_it(monkeypatch):
    seen = []
    monkeypatch.setattr(
        ours,
        "one_step",
        lambda sae, optimiser, batch, rate, progress: seen.append((sae.dead.sum(), losses(sae, batch))),
    )

    def losses(sae, batch):
        return sae.loss(batch).terms["aux"].item()

    for condition, dead in (("topk", 0), ("topk, 10% dead", 26)):
        train, encode = ours.build(Work(condition, 16, 256, 4, 64), X)
        train([X])
        n_dead, aux = seen.pop()
        assert n_dead == dead
        assert (aux > 0) == (dead > 0)
    assert not (encode(X)[:, :26] > 0).any()  # what counts as dead never lives


def test_every_variant_of_ours_is_measured_beside_the_bare_product():
    for work in bench.works(["sae_lib"], [(16, 256)], rounds=1, k=4, batch=64):
        if work.name in bench.VARIANTS:
            assert work.jobs[0].variant == bench.UNIT
        assert len(set(work.keys())) == len(work.jobs)
    assert {job.d_sae for job in bench.scaling(bench.Job("sae_lib", "topk", 16, 256, 4, 64))} == {128, 256, 512}


def test_rows_hold_ratios_within_rounds_and_say_where_they_come_from(tmp_path, monkeypatch):
    output = tmp_path / "speed.json"
    options = ["--smoke", "--libraries", "sae_lib", "--works", "dead", "--output", str(output)]
    monkeypatch.setattr(bench, "PEERS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench.py", *options])
    bench.main()
    unit, alive, dead = read(output)
    assert [row["variant"] for row in (unit, alive, dead)] == [bench.UNIT, "topk", "topk, 10% dead"]
    assert unit["gemm_ratio"] == 1
    for row in (alive, dead):
        assert row["cpu_ms_min"] <= row["cpu_ms"] <= row["cpu_ms_max"]
        assert row["gemm_ratio"] == pytest.approx(row["cpu_ms"] / unit["cpu_ms"], rel=0.01)  # of the only round
        assert row["l0"] == 4
        assert row["scores_mb"] == 0.1
        assert not any(isinstance(value, dict | list) for value in row.values())
    assert {"commit", "dirty", "sae_lib_sha256", "device", "version", "torch", "seconds", "date"} <= dead.keys()

    measured = []
    monkeypatch.setattr(bench, "measure", lambda work, *rest: measured.append(work) or ([], []))
    monkeypatch.setattr(sys, "argv", ["bench.py", *options, "--resume"])
    bench.main()
    assert measured == []  # all of it is there


def test_new_rows_replace_those_of_the_same_key(tmp_path):
    key = dict.fromkeys(KEY, "a")
    write(tmp_path / "rows.json", [key | {"cpu_ms": 1.0}, key | {"k": 32, "cpu_ms": 2.0}])
    write(tmp_path / "rows.json", [key | {"cpu_ms": 3.0}])
    assert [row["cpu_ms"] for row in read(tmp_path / "rows.json")] == [3.0, 2.0]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


def test_verdicts_follow_from_the_rows():
    size = {"d_in": 256, "d_sae": 4096, "k": 32, "batch": 4096, "threads": 2, "scores_mb": 67.1}
    ratios = {
        ("topk", "sae_lib", "topk"): 1.5,
        ("topk", "sae_lib", "topk, no bf16"): 2.5,
        ("topk", "SAELens", "topk"): 12.0,
        ("topk", "SAELens", "topk_sparse"): 6.0,
        ("topk", "sparsify", "topk"): 3.0,
        ("topk", "sparsify", "groupmax"): 0.1,  # selects otherwise, and does not count
        ("dead", "sae_lib", "topk"): 1.5,
        ("dead", "sae_lib", "topk, 10% dead"): 1.8,
    }
    found = [
        {"work": work, "library": library, "variant": variant, "gemm_ratio": ratio, "peak_above_mb": 134.2} | size
        for (work, library, variant), ratio in ratios.items()
    ]
    parts = {"train": 31.0, "forward": 10.0, "steps": 20.0}
    found += [size | {"work": "pocket", "library": "sae_lib", "variant": n, "cpu_ms": ms} for n, ms in parts.items()]
    asked = {row["variant"]: (row["measured"], row["bound"], row["target"], row["verdict"]) for row in targets(found)}
    assert asked == {
        "topk: the fastest peer's time / ours": (2.0, "at least", 2.3, "missed"),
        "topk: SAELens's time / ours": (8.0, "at least", 7, "met"),
        "topk: our time / the scores' product": (1.5, "at most", 1.6, "met"),
        "topk, no bf16: our time / the scores' product": (2.5, "at most", 2.0, "missed"),
        "AuxK, 10% dead / none dead": (1.2, "at most", 1.4, "met"),
        "topk: memory of a step / the scores'": (2.0, "at most", 1.5, "missed"),
        "8 SAEs, one stream: (total - forward) / steps": (1.05, "at most", 1.05, "met"),
    }


def test_a_worker_that_fails_is_left_out_and_named(activations):
    good, bad = (bench.Job("sae_lib", variant, 16, 256, 4, 64) for variant in (bench.UNIT, "nonsense"))
    with tqdm(disable=True) as bar:
        rows, failures = bench.measure(bench.Work("topk", [good, bad], rounds=1), {16: activations}, bar)
    assert [row["variant"] for row in rows] == [bench.UNIT]
    (failure,) = failures
    assert failure.startswith("sae_lib, nonsense ended:")
    assert "KeyError: 'nonsense'" in failure
