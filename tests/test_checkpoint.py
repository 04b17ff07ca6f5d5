"""Nothing is lost: runs that are stopped, killed, short of room or damaged, and what they go on from.

`make stress` repeats the last two tests more often. As a script, this file is the process that is killed.
"""

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from dense import given
from safetensors.torch import load_file
from test_contract import CASES, D_IN, make

import sae_lib.checkpoint
from sae_lib import Activations, PlantedDictionary, ReLUSAE, TopKSAE, train
from sae_lib.checkpoint import RUN, STATE, SUMS, CheckpointError, sums
from sae_lib.sae import Loss

STRESS = bool(os.environ.get("SAE_LIB_STRESS"))
KILLS, DAMAGES = (20, 200) if STRESS else (3, 20)
SIZE, STEPS = 32, 50
TOKENS, EVERY = SIZE * STEPS, SIZE * 8
PLANTED = PlantedDictionary(8, D_IN, active=2)


def go(folder=None, saes=None, seed=3, tokens=TOKENS, stream=None, every=EVERY, watch=None):
    saes = [make(*case) for case in CASES] if saes is None else saes
    stream = stream or PLANTED.batches(SIZE)
    with pytest.MonkeyPatch.context() as patch:
        for iteration in (sae_lib.data._Samples, sae_lib.activations._Iteration):  # for variants that need a gradient
            plain = iteration.__next__
            patch.setattr(iteration, "__next__", lambda self, plain=plain: given(plain(self).x))
        return train(saes, stream, tokens, seed, watch, checkpoint=folder, checkpoint_every=every)


def activations(n, batch_size=SIZE, buffer_size=300):
    """Of one layer on `n` random inputs, in an order that a small buffer shuffles."""
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(5, D_IN)
    torch.nn.init.normal_(layer.weight, generator=generator)
    torch.nn.init.zeros_(layer.bias)
    inputs = torch.randn(n, 5, generator=generator)
    return Activations(torch.nn.Sequential(layer), "0", inputs=inputs, batch_size=batch_size, buffer_size=buffer_size)


def topk(k=3, d_sae=12, **settings):
    sae = TopKSAE(D_IN, d_sae, k)
    for name, value in settings.items():
        setattr(sae, name, value)
    return sae


@pytest.fixture
def send(monkeypatch):
    """A function that lets a signal arrive while a certain batch, counted from 1, is drawn."""
    sample = PlantedDictionary.sample

    def at(batch, number=signal.SIGINT):
        drawn = iter(range(1, 10**6))

        def and_signal(self, n, seed):
            if next(drawn) == batch:
                os.kill(os.getpid(), number)
            return sample(self, n, seed)

        monkeypatch.setattr(PlantedDictionary, "sample", and_signal)

    return at


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def newest(folder):
    return folder / names(folder)[-1]


def history(rows):
    """What of the history does not depend on the clock."""
    return [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in rows]


def assert_same_end(folder, other):
    """Weights, buffers, optimisers, generators and histories of two finished runs, to the bit."""
    assert newest(folder).name == newest(other).name == f"{json.loads((newest(other) / RUN).read_text())['name']}"
    assert newest(folder).name.endswith("-finished")
    assert (newest(folder) / STATE).read_bytes() == (newest(other) / STATE).read_bytes()
    ran, expected = (json.loads((newest(path) / RUN).read_text())["counters"] for path in (folder, other))
    assert history(ran.pop("history")) == history(expected.pop("history"))
    assert ran.pop("seconds") > 0 and expected.pop("seconds") > 0
    assert ran == expected


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A finished run of every variant, and its folder."""
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, go(folder)


@pytest.fixture
def stopped(tmp_path, send):
    """The folder of a run of one SAE that was stopped half-way, with its two checkpoints."""
    send(30)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "stopped", topk())
    send(0)
    return tmp_path / "stopped"


# Stopping and going on ------------------------------------------------------------------------------------------------


def test_writing_checkpoints_changes_nothing(unbroken):
    with_none = go()
    for sae, other in zip(with_none.saes, unbroken[1].saes, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(sae.parameters(), other.parameters(), strict=True))
    assert history(with_none.history) == history(unbroken[1].history)


@pytest.mark.parametrize("batches", [[5], [30], [9, 3, 12], [STEPS]], ids=str)
def test_a_run_that_is_stopped_and_goes_on_ends_with_the_same_bits(unbroken, tmp_path, send, batches):
    for batch in batches:
        send(batch)
        with pytest.raises(KeyboardInterrupt, match=r"stopped.*still holds a whole checkpoint.*the same call goes on"):
            go(tmp_path)
    send(0)
    run = go(tmp_path)
    assert_same_end(tmp_path, unbroken[0])
    assert run.tokens == TOKENS and run.scale == unbroken[1].scale
    for sae, other in zip(run.saes, unbroken[1].saes, strict=True):
        assert not sae.training
        assert sae.trained_on == other.trained_on
        for name, value in sae.state_dict().items():
            assert torch.equal(value, other.state_dict()[name])
            assert value.stride() == other.state_dict()[name].stride()


def test_an_encoder_goes_on_with_its_columns_contiguous(stopped):
    run = go(stopped, topk())
    assert run.saes[0].W_enc.stride() == (1, D_IN)


def test_checkpoints_come_every_so_many_tokens_and_two_stay(tmp_path):
    seen = []
    go(tmp_path, topk(), watch=lambda _: seen.append(names(tmp_path)))
    assert sorted({name for known in seen for name in known}) == [f"{n * EVERY:015d}" for n in range(1, 7)]
    assert names(tmp_path) == [f"{6 * EVERY:015d}", f"{TOKENS:015d}-finished"]
    assert max(len(known) for known in seen) == 2


def test_by_default_a_tenth_of_the_run_passes_between_checkpoints(tmp_path):
    go(tmp_path, topk(), every=None)
    assert names(tmp_path)[0] == f"{TOKENS * 9 // 10:015d}"


def test_a_finished_run_returns_what_it_made_without_reading_the_stream(unbroken, send):
    folder, expected = unbroken
    before = (newest(folder) / RUN).stat().st_mtime_ns
    send(1)  # it would be interrupted
    run = go(folder)
    assert run.history == expected.history
    assert all(
        torch.equal(a, b)
        for sae, other in zip(run.saes, expected.saes, strict=True)
        for a, b in zip(sae.state_dict().values(), other.state_dict().values(), strict=True)
    )
    assert (newest(folder) / RUN).stat().st_mtime_ns == before
    assert not any(name.startswith("stream.") for name in load_file(newest(folder) / STATE))  # it may be large


def test_what_was_stopped_goes_on_with_the_very_objects_that_were_trained(tmp_path, send):
    go(tmp_path / "unbroken", topk())
    sae, stream = topk(), PLANTED.batches(SIZE)
    send(20)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "stopped", sae, stream=stream)
    assert sae.scale != 1  # folded, so that it can be used as it is
    send(0)
    go(tmp_path / "stopped", sae, stream=stream)
    assert_same_end(tmp_path / "stopped", tmp_path / "unbroken")


@pytest.mark.parametrize("standing_at", ["two thirds", "its very end"])
def test_a_stream_that_ends_early_finishes_the_run_wherever_it_goes_on(tmp_path, standing_at):
    every = {"two thirds": 8, "its very end": 12}[standing_at] * SIZE
    assert go(tmp_path, topk(), stream=activations(12 * SIZE), every=every).tokens == 12 * SIZE
    finished = newest(tmp_path)
    expected = (finished / STATE).read_bytes()
    shutil.rmtree(finished)
    assert names(tmp_path) == [f"{every:015d}"]
    assert go(tmp_path, topk(), stream=activations(12 * SIZE), every=every).tokens == 12 * SIZE
    assert (finished / STATE).read_bytes() == expected


def test_activations_go_on_in_the_middle_of_their_buffer(tmp_path):
    def stop(rows):
        if rows[-1]["step"] > 30:
            os.kill(os.getpid(), signal.SIGINT)

    go(tmp_path / "unbroken", topk(), stream=activations(2000))
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "stopped", topk(), stream=activations(2000), watch=stop)
    assert load_file(newest(tmp_path / "stopped") / STATE)["stream.x"].shape[0] > SIZE
    go(tmp_path / "stopped", topk(), stream=activations(2000))
    assert_same_end(tmp_path / "stopped", tmp_path / "unbroken")


class Impatient(TopKSAE):
    """Asks to stop right after a certain step, as often as it is told."""

    def __init__(self, step, times):
        super().__init__(D_IN, 12, 3)
        self.step, self.times = step, times

    def config(self):
        return {}

    def after_step(self, batch, code):
        super().after_step(batch, code)
        for _ in range(self.times if self.tokens_trained == self.step * SIZE else 0):
            os.kill(os.getpid(), signal.SIGINT)


class Noisy(TopKSAE):
    """Its loss draws from its generator."""

    def loss(self, batch):
        noise = torch.randn(batch.x.shape, generator=self.generator)
        return super().loss(batch._replace(x=batch.x + 0.1 * noise))


def test_what_an_sae_draws_goes_on_too(tmp_path, send):
    go(tmp_path / "unbroken", Noisy(D_IN, 12, 3))
    send(30)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "stopped", Noisy(D_IN, 12, 3))
    send(0)
    go(tmp_path / "stopped", Noisy(D_IN, 12, 3))
    assert_same_end(tmp_path / "stopped", tmp_path / "unbroken")


def rewrite(path, change):
    """Change what ``run.json`` says, as if it had been written so."""
    run = json.loads((path / RUN).read_text())
    change(run)
    (path / RUN).write_text(json.dumps(run))
    (path / SUMS).write_text(sums(path))


def test_seconds_and_steps_are_those_of_all_parts(stopped):
    rewrite(newest(stopped), lambda run: run["counters"].update(seconds=1000.0))
    run = go(stopped, topk())
    assert 1000 < run.seconds < 1100
    assert run.history[-1]["tokens_per_second"] == pytest.approx(TOKENS / run.seconds, rel=1e-3)
    assert [row["step"] for row in run.history] == list(range(STEPS))


def test_files_are_on_the_disk_before_the_checkpoint_has_its_name(tmp_path, monkeypatch):
    flushed = []
    flush = sae_lib.checkpoint.flush
    monkeypatch.setattr(
        sae_lib.checkpoint, "flush", lambda path: flushed.append((path, names(tmp_path))) or flush(path)
    )
    go(tmp_path, topk(), every=TOKENS)
    *parts, (folder, after) = flushed
    assert [path.name for path, _ in parts[:3]] == [STATE, RUN, SUMS]
    assert all(known == [parts[-1][0].name] and known[0].startswith(".") for _, known in parts)
    assert (folder, after) == (tmp_path, [f"{TOKENS:015d}-finished"])


def test_a_signal_waits_until_the_batches_read_ahead_are_trained_on(tmp_path):
    go(tmp_path / "unbroken", Impatient(2, 0))
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "stopped", Impatient(2, 1))
    assert names(tmp_path / "stopped") == [f"{4 * SIZE:015d}"]
    go(tmp_path / "stopped", Impatient(2, 0))
    assert_same_end(tmp_path / "stopped", tmp_path / "unbroken")


def test_sigterm_ends_the_process_with_its_status_and_says_how_to_go_on(tmp_path, send, capsys):
    send(10, signal.SIGTERM)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        go(tmp_path, topk())
    assert stop.value.code == 143
    assert f"{tmp_path} still holds a whole checkpoint, after {10 * SIZE} tokens; the same" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_signal_interrupts_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, Impatient(10, 2))
    assert names(tmp_path) == [f"{EVERY:015d}"]  # and none after 10 steps


def test_a_run_in_another_thread_writes_checkpoints_and_takes_no_signals(tmp_path):
    handlers = []
    thread = threading.Thread(
        target=lambda: go(tmp_path, topk(), watch=lambda _: handlers.append(signal.getsignal(signal.SIGINT)))
    )
    thread.start()
    thread.join()
    assert set(handlers) == {signal.getsignal(signal.SIGINT)}
    assert len(names(tmp_path)) == 2


def test_a_stream_that_cannot_go_on_is_refused_with_the_remedy(tmp_path):
    batches = [torch.randn(SIZE, D_IN) for _ in range(3)]
    with pytest.raises(ValueError, match=r"got list without state_dict.*use sae_lib\.Activations.*leave checkpoint="):
        go(tmp_path / "runs", topk(), stream=batches)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("every", [0, -1, 1.5])
def test_checkpoint_every_must_be_a_positive_integer(tmp_path, every, as_a_user):
    with pytest.raises(ValueError, match="checkpoint_every must be an integer at least 1"):
        go(tmp_path, topk(), every=every)


def test_the_bar_starts_where_the_run_goes_on(stopped, capsys):
    go(stopped, topk())
    bars = capsys.readouterr().err.split("\r")
    assert any(f"{30 * SIZE}/{TOKENS / 1000:.2f}k" in bar for bar in bars), bars


# Another run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"saes": topk(k=4)}, "saes.0.config.k is 3 there and 4 here"),
        ({"saes": topk(d_sae=24)}, "saes.0.config.d_sae is 12 there and 24 here"),
        ({"saes": ReLUSAE(D_IN, 12, 0.1)}, "saes.0.variant is topk there and relu here"),
        ({"saes": [topk(), topk()]}, "saes.1.variant is missing there and topk here"),
        ({"saes": topk(clip=2.0)}, "saes.0.clip is 1.0 there and 2.0 here"),
        ({"saes": topk(betas=(0.0, 0.999))}, "saes.0.betas is [0.9, 0.999] there and [0.0, 0.999] here"),
        ({"tokens": TOKENS + 1}, f"tokens is {TOKENS} there and {TOKENS + 1} here"),
        ({"seed": 4}, "stream.seed is 3 there and 4 here"),
        ({"stream": PLANTED.batches(16)}, "stream.batch_size is 32 there and 16 here"),
        ({"stream": PlantedDictionary(9, D_IN).batches(SIZE)}, "stream.fingerprint is"),
    ],
    ids=lambda value: value.split(" ")[0] if isinstance(value, str) else "",
)
def test_the_checkpoint_of_another_run_is_refused_with_what_differs(stopped, changes, difference):
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError) as error:
        go(stopped, **{"saes": topk()} | changes)
    assert str(newest(stopped)) in str(error.value)
    assert difference in str(error.value)
    assert "pass checkpoint= another folder" in str(error.value)
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


def test_a_decoder_that_is_frozen_since_is_another_run(stopped):
    sae = topk()
    sae.W_dec.requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"saes\.0\.frozen is \[\] there and \['W_dec'\] here"):
        go(stopped, sae)


def test_another_version_of_torch_is_another_run(stopped):
    rewrite(newest(stopped), lambda run: run["identity"]["versions"].update(torch="1.0"))
    with pytest.raises(CheckpointError, match=r"versions\.torch is 1\.0\S* there and"):
        go(stopped, topk())


def test_an_unfinished_run_goes_on_with_another_learning_rate_and_says_so(stopped, capsys):
    run = go(stopped, topk(learning_rate=1e-4))
    assert "although saes.0.learning_rate is None there and 0.0001 here" in capsys.readouterr().err
    assert max(row["learning_rate"] for row in run.history[30:]) <= 1e-4 < run.history[29]["learning_rate"]
    with pytest.raises(CheckpointError, match=r"saes\.0\.learning_rate is 0\.0001 there and 0\.001 here"):
        go(stopped, topk(learning_rate=1e-3))


def test_tensors_that_are_not_those_of_the_saes_are_refused_before_one_is_touched(stopped):
    sae = topk(d_sae=24)
    rewrite(newest(stopped), lambda run: run["identity"]["saes"][0].update(config=sae.config()))
    before = [value.clone() for value in sae.parameters()]
    with pytest.raises(CheckpointError, match=r"tensors must be those of these SAEs, got other .* sae\.0\.W_dec"):
        go(stopped, sae)
    assert all(torch.equal(a, b) for a, b in zip(sae.parameters(), before, strict=True))


def test_what_is_no_checkpoint_of_this_version_is_refused(stopped):
    rewrite(newest(stopped), lambda run: run.update(format_version=2))
    with pytest.raises(
        CheckpointError, match=r"run\.json must say .*'format_version': 1.*use the version that wrote it"
    ):
        go(stopped, topk())


# What goes wrong ------------------------------------------------------------------------------------------------------


class Breaks(TopKSAE):
    """Its loss is NaN from batch 20 on."""

    def loss(self, batch):
        loss = super().loss(batch)
        broken = self.training and self.tokens_trained >= 19 * SIZE
        return Loss({**loss.terms, "aux": loss.terms["aux"] * float("nan")}, loss.code, loss.x_hat) if broken else loss


def test_nan_in_the_loss_names_the_last_good_checkpoint_which_survives(tmp_path):
    with pytest.raises(ValueError, match="loss must stay finite, got nan") as error:
        go(tmp_path, Breaks(D_IN, 12, 3))
    (note,) = error.value.__notes__
    assert f"{tmp_path} still holds a whole checkpoint, after {2 * EVERY} tokens; the same call goes on" in note
    assert names(tmp_path) == [f"{EVERY:015d}", f"{2 * EVERY:015d}"]
    assert all(value.isfinite().all() for value in load_file(newest(tmp_path) / STATE).values())


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    class Overflows(TopKSAE):
        def after_step(self, batch, code):
            super().after_step(batch, code)
            if self.tokens_trained == 3 * EVERY:
                self.b_dec.data[0] = float("inf")

    with pytest.raises(CheckpointError, match=f"weights must stay finite.* after {3 * EVERY} tokens; .* still holds"):
        go(tmp_path, Overflows(D_IN, 12, 3))
    assert names(tmp_path) == [f"{EVERY:015d}", f"{2 * EVERY:015d}"]


@pytest.mark.parametrize("full", ["by the system's limit", "in the middle of a file"])
def test_a_full_disk_leaves_the_last_checkpoint_and_the_run_goes_on_once_there_is_room(tmp_path, monkeypatch, full):
    def half(tensors, path):
        Path(path).write_bytes(bytes(1000))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill(rows):
        if rows[-1]["step"] >= 20:
            if full == "in the middle of a file":
                monkeypatch.setattr(sae_lib.checkpoint, "save_file", half)
            else:
                resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limit[1]))

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    go(tmp_path / "unbroken", topk())
    try:
        with pytest.raises(CheckpointError) as error:
            go(tmp_path / "full", topk(), watch=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    cause = "No space left on device" if full == "in the middle of a file" else "File too large"
    for part in (
        f"full/{3 * EVERY:015d}",
        cause,
        f"after {2 * EVERY} tokens",
        "once it can be written, the same call goes on",
    ):
        assert part in str(error.value)
    assert names(tmp_path / "full") == [f"{EVERY:015d}", f"{2 * EVERY:015d}"]
    monkeypatch.undo()
    go(tmp_path / "full", topk())
    assert_same_end(tmp_path / "full", tmp_path / "unbroken")


def unwritable(tmp_path):
    """A folder in which nobody, the superuser included, may write."""
    (tmp_path / "file").touch()
    yield tmp_path / "file"
    yield tmp_path / "file" / "runs"
    if Path("/proc/self").exists():
        yield Path("/proc/self/fdinfo")
    if os.geteuid():
        (tmp_path / "folder").mkdir(mode=0o500)
        yield tmp_path / "folder"


def test_a_folder_that_cannot_be_written_to_is_refused_before_training(tmp_path):
    for folder in unwritable(tmp_path):
        with pytest.raises(CheckpointError, match=rf"must be a folder that can be written to, got {folder} \(\w+"):
            go(folder, topk())


def test_a_folder_that_turns_read_only_keeps_its_last_checkpoint(stopped, monkeypatch):
    def refuse(**_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(sae_lib.checkpoint.tempfile, "mkdtemp", refuse)
    with pytest.raises(CheckpointError, match=r"Read-only file system.* still holds a whole checkpoint, after 960 tok"):
        go(stopped, topk())
    monkeypatch.undo()
    assert go(stopped, topk()).tokens == TOKENS


def test_what_a_killed_process_left_is_removed_and_nothing_else(stopped):
    (stopped / f".{TOKENS:015d}.abc").mkdir()
    (stopped / f".{TOKENS:015d}.abc" / STATE).write_bytes(bytes(10))
    (stopped / ".notes").touch()
    (stopped / "notes.txt").touch()
    go(stopped, topk())
    assert {".notes", "notes.txt"} < set(names(stopped)) and len(names(stopped)) == 4


def test_a_damaged_checkpoint_names_the_file_and_the_older_one_that_is_whole(stopped, tmp_path):
    go(tmp_path / "unbroken", topk())
    *_, older, damaged = (stopped / name for name in names(stopped))
    (damaged / STATE).write_bytes((damaged / STATE).read_bytes()[:-1])
    with pytest.raises(CheckpointError) as error:
        go(stopped, topk())
    assert f"{damaged / STATE} is damaged" in str(error.value)
    assert f"{older} is whole: remove {damaged}, and the same call goes on from there" in str(error.value)
    shutil.rmtree(damaged)
    go(stopped, topk())
    assert_same_end(stopped, tmp_path / "unbroken")


def test_where_no_checkpoint_is_whole_the_error_says_so(stopped):
    for name in names(stopped):
        (stopped / name / RUN).unlink()
    with pytest.raises(CheckpointError, match=r"run\.json cannot be read \(No such file.*no other checkpoint .* whole"):
        go(stopped, topk())


def test_the_sums_can_be_checked_by_hand(stopped):
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=newest(stopped), check=True, capture_output=True)


# Counted in tens ------------------------------------------------------------------------------------------------------


def damage(folder, dice):
    """Damage the newest checkpoint in one way; say how."""
    older, target = (folder / name for name in names(folder))
    path = target / dice.choice([STATE, RUN, SUMS])
    contents = path.read_bytes()
    place = dice.randrange(len(contents))
    ways = "flip cut lengthen delete empty folder zeros swap older rename finish"
    way = dice.choice(ways.split())
    if way == "flip":
        path.write_bytes(contents[:place] + bytes([contents[place] ^ dice.randrange(1, 256)]) + contents[place + 1 :])
    elif way == "cut":
        path.write_bytes(contents[:place])
    elif way == "lengthen":
        path.write_bytes(contents + dice.randbytes(dice.randrange(1, 100)))
    elif way == "zeros":
        path.write_bytes(contents[:place] + bytes(len(contents) - place - 1) + b"\1")
    elif way in ("delete", "empty", "folder"):
        path.unlink()
        if way != "delete":
            path.touch() if way == "empty" else path.mkdir()
    elif way == "swap":
        other = target / dice.choice([name for name in (STATE, RUN, SUMS) if name != path.name])
        path.write_bytes(other.read_bytes())
        other.write_bytes(contents)
    elif way == "older":
        path.write_bytes((older / path.name).read_bytes())
    else:
        target.rename(f"{target}-finished" if way == "finish" else folder / f"{10**6 + place:015d}")
    return way


def test_each_of_many_damaged_checkpoints_is_refused(stopped, tmp_path):
    dice, ways, began = random.Random(0), Counter(), time.monotonic()
    for number in range(DAMAGES):
        copy = shutil.copytree(stopped, tmp_path / str(number))
        way = damage(copy, dice)
        sae = topk()
        with pytest.raises(CheckpointError, match=rf"{copy}.* is whole: remove .*, and the same call goes on"):
            go(copy, sae)
        assert all(torch.equal(a, b) for a, b in zip(sae.parameters(), topk().parameters(), strict=True)), way
        ways[way] += 1
        shutil.rmtree(copy)
    print(f"\n{DAMAGES} damaged checkpoints, each refused ({dict(ways)}), in {time.monotonic() - began:.0f} s")


@pytest.mark.parametrize("kind", ["activations", "planted", "cached"])
def test_others_may_look_at_the_stream_while_it_is_trained_on(kind, tmp_path):
    def stream():
        if kind == "planted":
            return PLANTED.batches(SIZE)
        made = activations(TOKENS)
        return made.cache(tmp_path / "cache") if kind == "cached" else made

    def looked_at(name, stop=None):
        data, steps = stream(), iter(range(1, 100))

        def look(rows):
            next(iter(data))
            if next(steps) == stop:
                os.kill(os.getpid(), signal.SIGINT)

        return go(tmp_path / name, [topk()], stream=data, watch=look)

    looked_at("unbroken")
    with pytest.raises(KeyboardInterrupt):
        looked_at("stopped", stop=1)
    looked_at("stopped")
    assert_same_end(tmp_path / "stopped", tmp_path / "unbroken")


def test_a_run_on_other_data_or_another_model_is_another_run(tmp_path):
    def cached(seed):
        layer = torch.nn.Linear(5, D_IN)
        torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(seed))
        inputs = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
        stream = Activations(torch.nn.Sequential(layer), "0", inputs=inputs, batch_size=SIZE, buffer_size=64)
        return stream, stream.cache(tmp_path / f"cache-{seed}")

    one, other = cached(0), cached(1)
    for place in (0, 1):
        go(tmp_path / str(place), [topk()], tokens=160, stream=one[place])
        with pytest.raises(CheckpointError, match="must be a checkpoint of this run, but stream."):
            go(tmp_path / str(place), [topk()], tokens=160, stream=other[place])
    go(tmp_path / "inputs", [topk()], tokens=160, stream=activations(6000))
    with pytest.raises(CheckpointError, match=r"stream.items is \d+ there and \d+ here"):
        go(tmp_path / "inputs", [topk()], tokens=160, stream=activations(7000))


def test_another_loss_is_another_run(tmp_path):
    class OtherTopK(TopKSAE):
        pass

    go(tmp_path / "run", [topk()])
    with pytest.raises(CheckpointError, match="OtherTopK"):
        go(tmp_path / "run", [OtherTopK(D_IN, 12, 3)])


def test_a_signal_that_comes_while_processes_agree_is_not_lost(tmp_path, monkeypatch):
    greatest, calls = sae_lib.checkpoint.greatest, iter(range(1, 10**6))

    def interrupted(here):
        found = greatest(here)
        if next(calls) == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return found

    monkeypatch.setattr(sae_lib.checkpoint, "greatest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "run", [topk()])


def test_an_old_checkpoint_that_cannot_be_removed_does_no_harm(tmp_path, monkeypatch):
    def refused(self, target):
        if target.name.endswith(".old"):
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(self, target)

    rename = Path.rename
    monkeypatch.setattr(Path, "rename", refused)
    go(tmp_path / "run", [topk()])
    assert len(names(tmp_path / "run")) > 2


def test_going_on_and_being_finished_are_said(tmp_path, capsys):
    go(tmp_path / "run", [topk()])
    assert "holds this run" not in capsys.readouterr().err
    go(tmp_path / "run", [topk()])
    assert "it is finished: returned is what was saved" in capsys.readouterr().err


def work(folder):
    """What is killed: a run of all variants on activations, with a checkpoint every four steps."""
    go(folder, tokens=100 * 64, stream=activations(8000, 64, 4096), every=256)


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(tmp_path):
    def start(folder):
        process = subprocess.Popen(
            [sys.executable, __file__, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        return process

    def ended(process):
        _, error = process.communicate(timeout=120)
        assert process.returncode in (0, -signal.SIGKILL), error
        return process.returncode == 0

    def writes(folder):
        return any(not path.name.endswith(".old") for path in folder.glob(".*"))

    def stop_while_it_writes(process, folder):
        while process.poll() is None:
            if writes(folder):
                time.sleep(dice.uniform(0, 0.004))
                process.send_signal(signal.SIGSTOP)
                os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
                if writes(folder):
                    return
                process.send_signal(signal.SIGCONT)

    began = time.monotonic()
    work(tmp_path / "unbroken")
    whole_run = time.monotonic() - began
    dice, runs, kills, in_writing = random.Random(0), 1, 0, 0
    folder = tmp_path / "killed"
    while kills < KILLS:
        process = start(folder)
        time.sleep(dice.uniform(0, whole_run / 5))
        if kills % 2 == 0:
            stop_while_it_writes(process, folder)
        process.kill()
        if ended(process):
            assert_same_end(folder, tmp_path / "unbroken")
            runs, folder = runs + 1, tmp_path / f"killed-{runs}"
        else:
            kills += 1
            in_writing += writes(folder)
    assert ended(start(folder))
    assert_same_end(folder, tmp_path / "unbroken")
    assert in_writing >= KILLS // 2
    seconds = time.monotonic() - began
    print(
        f"\n{kills} kills in {runs} run{'s' * (runs > 1)}, {in_writing} while a checkpoint was written: "
        f"the same bits in the end, in {seconds:.0f} s"
    )


if __name__ == "__main__":
    print("ready", flush=True)
    work(Path(sys.argv[1]))
