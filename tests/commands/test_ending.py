"""Every command explains itself, and no mistake of a user's ends in a traceback."""

import re
import shlex
import sys

import pytest
import torch
import typer
from typer.testing import CliRunner

from sae_lib import SAE, TopKSAE
from sae_lib.__main__ import app
from sae_lib.commands.ending import Commands
from sae_lib.commands.train import described, options

COMMANDS = typer.main.get_command(app).commands
EXAMPLE = re.compile(r"^ *(?:torchrun .* -m|python -m) sae_lib (.+)$", flags=re.MULTILINE)


def run(*words: object, code: int) -> str:
    """What the command says, in one line; it must end by itself, not by an exception."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return " ".join(result.output.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_examples_that_the_command_understands(name):
    shown, examples = run(name, "--help", code=0), EXAMPLE.findall(COMMANDS[name].help)
    assert f"python -m sae_lib {name} " in shown
    assert examples
    for example in examples:
        assert f"sae_lib {example}" in shown
        first, *words = shlex.split(example)
        assert first == name
        with COMMANDS[name].make_context(name, words) as context:  # refuses options that there are not
            given = context.params
        if name == "train":
            texts = given["sae"] or [shlex.join([given["variant"], *options(list(given["settings"]))])]
            assert all(issubclass(variant, SAE) for variant, _ in map(described, texts))


@pytest.mark.parametrize("name", COMMANDS)
def test_an_option_that_there_is_not_is_refused_by_its_name(name):
    if name == "train":  # whose variants have options of their own
        assert "no_such_option=1" in run(*"train --variant topk --no-such-option 1 --out new".split(), code=1)
    else:
        assert "No such option: --no-such-option" in run(name, "--no-such-option", "1", code=2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train --variant topk --d-sae 8 --k 2 --device warp --out {new}", "device must be one that is here, .*'warp'"),
        ("train --variant topk --d-sae 8 --k 2 --log paper --out {new}", "log must be one of csv, .* got 'paper'"),
        ("train --variant topk --d-sae 8 --k 2 --log tensorboard --out {new}", "pip install tensorboard"),
        ("train --variant topk --d-sae 8 --k 2 --model {new} --out {new}", "name must be .* no such folder"),
        ("evaluate {new}", "path must be a folder"),
        ("evaluate {sae} --device warp", "device must be one that is here"),
        ("evaluate {sae} --against book --out {new}/mine.png", "the folder of the picture must exist"),
        ("evaluate {sae} --texts {new}", "texts must be"),
        ("reproduce nothing --scale smoke", "chapter must be one of"),
        ("reproduce comparison --scale smoke --tokens 10", "must not be mixed with the book's rows"),
        ("convert {new} --out {new}", "path must be a folder"),
        ("convert {sae} --to gemma --out {new}", "format must be one of"),
        ("explore --out {new}/page.html", "the folder of a page must exist"),
        ("explore --sae {new} --out {folder}/page.html", "path must be a folder"),
        ("plan --model gpt-5 --d-sae 10", "gpt-5"),
        ("plan --model pocket --d-sae 99 --gpu abacus", "device must be one of .* got 'abacus'"),
        ("vision --out {file}", "{file}"),
    ],
)
def test_a_mistake_is_one_line_and_status_1(as_a_user, monkeypatch, tmp_path, words, said):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    (tmp_path / "file").write_text("my own")
    places = {"new": tmp_path / "new", "file": tmp_path / "file", "folder": tmp_path}
    places["sae"] = TopKSAE(12, 20, 3).save(tmp_path / "sae")
    output = run(*shlex.split(words.format(**places)), code=1)
    assert output.startswith("error: ")
    assert re.search(said.format(**places), output), output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "sae"]


def test_reproduce_trains_nothing_for_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("my own")
    assert "Invalid value for '--out'" in run(
        "reproduce", "comparison", "--scale", "smoke", "--out", tmp_path / "file", code=2
    )


def test_pocket_says_that_its_folder_is_a_file(as_a_user, monkeypatch, tmp_path):
    monkeypatch.setattr("sae_lib.pocket.build.restart_with_fast_memory", lambda: None)
    (tmp_path / "file").write_text("my own")
    assert run("pocket", "--out", tmp_path / "file", code=1).startswith("error: ")
    assert (tmp_path / "file").read_text() == "my own"


# The end itself -------------------------------------------------------------------------------------------------------


def ends(error: BaseException):
    """A command of the same group that raises this."""
    fails = typer.Typer(cls=Commands, pretty_exceptions_enable=False)
    fails.callback()(lambda: None)

    @fails.command()
    def fail() -> None:
        raise error

    return CliRunner().invoke(fails, ["fail"])


@pytest.mark.parametrize("kind", [ValueError, OSError, torch.OutOfMemoryError])
def test_a_mistake_keeps_its_notes(kind):
    error = kind("k must be small")
    error.add_note("it was large")
    result = ends(error)
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "error: k must be small\nit was large\n")


def test_a_mistake_without_words_is_named():
    assert ends(MemoryError()).stderr == "error: MemoryError\n"


def test_ctrl_c_says_what_remains(monkeypatch):
    result = ends(KeyboardInterrupt())
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr == "stopped; what was written is whole, and the same command goes on\n"
    assert ends(KeyboardInterrupt("stopped after 3 tokens")).stderr == "stopped after 3 tokens\n"
    monkeypatch.setenv("RANK", "1")
    assert ends(KeyboardInterrupt()).output == ""


def test_a_mistake_of_ours_keeps_its_traceback_and_an_exit_its_status():
    assert isinstance(ends(RuntimeError("bug")).exception, RuntimeError)
    assert ends(typer.Exit(3)).exit_code == 3


def test_a_reader_that_went_away_is_told_nothing():
    assert "error" not in ends(BrokenPipeError(32, "Broken pipe")).output
