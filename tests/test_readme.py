"""What the README shows works as printed."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from sae_lib import load, loggers
from sae_lib.__main__ import app

README = (Path(__file__).parent.parent / "README.md").read_text()
COMMANDS = typer.main.get_command(app).commands
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
LINES = re.findall(r"^(?:python|torchrun .*) -m sae_lib (\w+) ([^#\n]*)", README, flags=re.MULTILINE)


def test_the_table_has_each_command_with_the_first_line_of_its_help():
    table = re.findall(r"^\| `(\w+)` \| (.+) \|$", README, flags=re.MULTILINE)
    assert table == [(name, command.help.split("\n\n")[0]) for name, command in COMMANDS.items()]


def test_every_command_of_the_project_is_one_file():
    folder = Path(__file__).parent.parent / "sae_lib/commands"
    assert {path.stem for path in folder.glob("*.py")} - {"__init__", "ending", "options"} == set(COMMANDS)


@pytest.mark.parametrize(("name", "words"), LINES, ids=lambda text: text[:40])
def test_a_command_has_the_options_that_it_is_shown_with(name, words):
    COMMANDS[name].make_context(name, shlex.split(words))


def test_the_python_runs_with_fewer_tokens(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train, measure = PYTHON
    assert len([line for line in train.splitlines() if line]) == 5
    for number, fewer in (("1_000_000", "4_096"), ("100_000", "2_048")):
        assert number in train + measure
        train, measure = (text.replace(number, fewer) for text in (train, measure))
    names = {}
    exec(train, names)
    exec(measure, names)
    assert load(tmp_path / "runs/first").d_sae == 1024
    assert names["sae"].tokens_trained == 4096


def test_the_loggers_are_called_as_they_are():
    named = re.findall(r"`(?:train\(.*loggers\.)?(CSV|TensorBoard|WeightsAndBiases)\b", README)
    assert [getattr(loggers, name) for name in named] == list(loggers.LOGGERS.values())
