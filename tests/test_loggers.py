"""A history arrives whole, each row once, in whatever package reads it, however often the training was stopped."""

import csv
import struct
import sys
import types

import pytest
import torch

from sae_lib import PlantedDictionary, ReLUSAE, TopKSAE, train
from sae_lib.loggers import CSV, LOGGERS, TIMED, TensorBoard, WeightsAndBiases, of_step

SIZE, STEPS = 16, 50


def go(watch=None, checkpoint=None, saes=None):
    """50 steps, a checkpoint each 8; steps are handed over after each 8 and each 20."""
    saes = saes or [TopKSAE(6, 12, 3), ReLUSAE(6, 10, 0.05)]
    stream = PlantedDictionary(8, 6, active=2).batches(SIZE)
    return train(saes, stream, SIZE * STEPS, 3, watch, checkpoint=checkpoint, checkpoint_every=8 * SIZE)


def steps(history):
    """What a service should be given, step by step, of two SAEs."""
    pairs = zip(history[::2], history[1::2], strict=True)
    return [(first["step"], of_step([first, second])) for first, second in pairs]


def untimed(row):
    return {name: value for name, value in row.items() if name != TIMED}


@pytest.fixture
def services(monkeypatch):
    """Stand-ins for tensorboard and wandb, and what they were given; a step that TensorBoard hides is gone."""
    given = {"tensorboard": {}, "wandb": {}, "opened": []}

    class SummaryWriter:
        def __init__(self, log_dir, purge_step):
            given["opened"].append((log_dir, purge_step))
            for step in [step for step in given["tensorboard"] if step >= purge_step]:
                del given["tensorboard"][step]

        def add_scalar(self, name, value, step):
            assert name not in given["tensorboard"].setdefault(step, {}), "given twice"
            given["tensorboard"][step][name] = value

        def flush(self):
            pass

    def log(values, step):
        assert step not in given["wandb"], "given twice"
        given["wandb"][step] = values

    class Error(Exception):
        pass

    def init(**settings):
        if settings.get("project") == "forbidden":
            raise Error("no API key")
        given["opened"].append(settings)
        return types.SimpleNamespace(log=log)

    board = types.ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = SummaryWriter
    wandb = types.ModuleType("wandb")
    wandb.init, wandb.Error = init, Error
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setattr(torch.utils, "tensorboard", board, raising=False)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return given


def read_csv(path):
    with path.open(newline="") as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


def as_text(history):
    return [{name: str(value) for name, value in row.items()} for row in history]


def stopping(log, after=20):
    """A watch that hands over, then fails, behind the last checkpoint."""

    def watch(history):
        log(history)
        if len(history) == 2 * after:
            raise RuntimeError("stopped")

    return watch


# CSV ------------------------------------------------------------------------------------------------------------------


def test_the_file_is_the_history_and_what_a_variant_lacks_is_empty(tmp_path):
    run = go(CSV(tmp_path / "new"))
    assert read_csv(tmp_path / "new/history.csv") == as_text(run.history)
    assert len(run.history) == 2 * STEPS
    assert set(run.history[0]) != set(run.history[1])  # their losses have other terms


def test_a_row_is_there_once_after_a_stop_behind_a_checkpoint(tmp_path):
    unbroken = go().history
    with pytest.raises(RuntimeError, match="stopped"):
        go(stopping(CSV(tmp_path)), tmp_path / "checkpoint")
    assert len(read_csv(tmp_path / "history.csv")) == 2 * 20
    with (tmp_path / "history.csv").open("a") as file:
        file.write("20,336,0,to")  # killed while it wrote
    history = go(CSV(tmp_path), tmp_path / "checkpoint").history
    assert read_csv(tmp_path / "history.csv") == as_text(history)
    assert list(map(untimed, history)) == list(map(untimed, unbroken))
    go(CSV(tmp_path), tmp_path / "checkpoint")  # finished: it trains no more
    assert read_csv(tmp_path / "history.csv") == as_text(history)


def test_a_column_that_comes_later_is_a_column_of_all_rows(tmp_path):
    log, rows = CSV(tmp_path), [{"step": 0, "loss": 2.0}, {"step": 1, "loss": 1.0}, {"step": 2, "aux": 0.5}]
    log(rows[:1])
    log(rows[:2])
    log(rows)
    assert (tmp_path / "history.csv").read_text() == "step,loss,aux\n0,2.0,\n1,1.0,\n2,,0.5\n"


def test_another_trainings_file_is_left_alone(tmp_path):
    (tmp_path / "history.csv").write_text("step,loss\n0,7.0\n")
    with pytest.raises(ValueError, match="must be new or of this training, got another's first row: name another"):
        go(CSV(tmp_path))
    assert (tmp_path / "history.csv").read_text() == "step,loss\n0,7.0\n"


# TensorBoard, Weights & Biases ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("log", [TensorBoard, WeightsAndBiases])
def test_a_service_gets_each_step_once_with_a_name_for_each_sae(services, tmp_path, log):
    history = go(log(tmp_path)).history
    given = services[log.package]
    assert list(given.items()) == steps(history)
    assert {"tokens", TIMED, "0-topk/loss", "1-relu/loss", "1-relu/l0"} <= set(given[0])


@pytest.mark.parametrize("log", [TensorBoard, WeightsAndBiases])
def test_a_service_gets_no_step_again_after_a_stop_behind_a_checkpoint(services, tmp_path, log):
    with pytest.raises(RuntimeError, match="stopped"):
        go(stopping(log(tmp_path)), tmp_path / "checkpoint")
    assert list(services[log.package]) == list(range(20))
    history = go(log(tmp_path), tmp_path / "checkpoint").history
    expected = [(step, untimed(values)) for step, values in steps(history)]
    assert [(step, untimed(values)) for step, values in services[log.package].items()] == expected
    go(log(tmp_path), tmp_path / "checkpoint")  # finished
    first, second = services["opened"]
    if log is TensorBoard:
        assert (first, second) == ((tmp_path / "tensorboard", 0), (tmp_path / "tensorboard", 20))
    else:
        assert first == second
        assert (first["dir"], first["name"], first["resume"]) == (tmp_path, tmp_path.name, "allow")


def test_steps_that_a_killed_run_began_to_write_are_hidden_by_tensorboard(services, tmp_path):
    rows = [{"step": step, "sae": 0, "variant": "topk", "loss": 1.0} for step in range(3)]
    TensorBoard(tmp_path)(rows[:1])
    services["tensorboard"][1] = {"0-topk/loss": 1.0}  # written, and killed before the file said so
    TensorBoard(tmp_path)(rows)
    assert list(services["tensorboard"]) == [0, 1, 2]


@pytest.mark.parametrize("log", [TensorBoard, WeightsAndBiases])
def test_another_trainings_folder_is_left_alone(services, tmp_path, log):
    go(log(tmp_path))
    before = dict(services[log.package])
    with pytest.raises(ValueError, match="got another's first row"):
        go(log(tmp_path), saes=[TopKSAE(6, 12, 2)])
    assert services[log.package] == before


def test_settings_go_to_wandb_and_its_refusal_comes_back_with_the_remedy(services, tmp_path):
    row = {"step": 0, "sae": 0, "variant": "topk", "loss": 1.0}
    WeightsAndBiases(tmp_path / "a", project="mine", name="first")([row])
    assert {"project": "mine", "name": "first"}.items() <= services["opened"][0].items()
    with pytest.raises(ValueError, match="got: no API key; try wandb login, or WANDB_MODE=offline"):
        WeightsAndBiases(tmp_path / "b", project="forbidden")([row])


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_package_that_is_missing_is_named_before_anything_is_done(monkeypatch, tmp_path, name):
    monkeypatch.setitem(sys.modules, LOGGERS[name].module, None)
    with pytest.raises(ValueError, match=f"needs the package {name}, which is not installed: pip install {name}"):
        LOGGERS[name](tmp_path)
    assert not list(tmp_path.iterdir())


# The packages themselves, where they are installed --------------------------------------------------------------------


def test_wandb_itself_keeps_the_history_offline(monkeypatch, tmp_path):
    wandb = pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log = WeightsAndBiases(tmp_path)
    log([{"step": s, "sae": i, "variant": "topk", "loss": s + i} for s in range(6) for i in range(2)])
    log.run.finish()
    wandb.teardown()  # its process writes the file and ends
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content, place, found = path.read_bytes(), 7, []  # after its header, records: checksum, length, type, content
    while place < len(content):
        record, (length,) = Record(), struct.unpack_from("<H", content, place + 4)
        record.ParseFromString(content[place + 7 : place + 7 + length])
        place += 7 + length
        found += [{(i.key or i.nested_key[0]): float(i.value_json) for i in record.history.item}]
    found = [row for row in found if row]
    assert [(row["_step"], row["0-topk/loss"], row["1-topk/loss"]) for row in found] == [
        (s, s, s + 1) for s in range(6)
    ]


def test_tensorboard_itself_reads_each_step_once(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with pytest.raises(RuntimeError, match="stopped"):
        go(stopping(TensorBoard(tmp_path)), tmp_path / "checkpoint")
    history = go(TensorBoard(tmp_path), tmp_path / "checkpoint").history
    curves = reader.EventAccumulator(str(tmp_path / "tensorboard"), {"scalars": 0}).Reload()
    assert [(at.step, at.value) for at in curves.Scalars("0-topk/loss")] == [
        (row["step"], pytest.approx(row["loss"])) for row in history if row["sae"] == 0
    ]
