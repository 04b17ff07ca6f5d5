"""`explore` on the command line: a page of what was asked for, nothing of others replaced, one line for a mistake."""

import json
import re

import pytest
from tiny_models import tiny_gpt2
from typer.testing import CliRunner

import sae_lib
from sae_lib.__main__ import app
from sae_lib.explorer import render
from sae_lib.neuron_embeddings import neurons

LINES = [
    "the cat sings",
    "a dog sleeps under the moon",
    "king",
    "old river",
    "blue stone , red sun .",
    "the queen runs",
]


@pytest.fixture
def explore(tmp_path):
    """The command on a tiny model and six lines; what it says."""
    (tmp_path / "lines.txt").write_text("\n".join(LINES))

    def run(*arguments: object, out: str = "page.html", code: int = 0) -> str:
        fixed = ["explore", "--model", tiny_gpt2(), "--texts", tmp_path / "lines.txt", "--out", tmp_path / out]
        result = CliRunner().invoke(app, list(map(str, [*fixed, *arguments])))
        assert result.exit_code == code, result.output
        return result.output

    return run


@pytest.fixture
def saved(tmp_path):
    """Two untrained SAEs of the tiny model's width."""
    return [sae_lib.TopKSAE(12, 20, k, seed=k).save(tmp_path / f"k{k}") for k in (3, 5)]


def sets(path) -> list[dict]:
    (index,) = re.findall(r'id="explorer-index">(.*?)</script>', path.read_text())
    return json.loads(index)["sets"]


def test_without_a_layer_the_middle_one_is_shown_as_the_library_shows_it(explore, tmp_path):
    said = explore()
    page = tmp_path / "page.html"
    model = sae_lib.load_model(str(tiny_gpt2()), "cpu")
    assert page.read_text() == render(neurons(model, 1), LINES, source="texts of lines.txt")
    assert said.startswith(f"{page}  20 of blocks.1.mlp neurons\n  0.")
    assert re.search(r"\d MB: index 0\.\d\d MB, texts 0\.00 MB, units 0\.\d\d MB, the page itself 0\.\d\d MB\n$", said)


def test_an_sae_stands_alone_beside_another_or_beside_a_layer(explore, saved, tmp_path):
    site = ["--site", "blocks.1.hook_resid_post"]
    explore("--sae", saved[0], *site)
    assert [entry["kind"] for entry in sets(tmp_path / "page.html")] == ["latents"]
    explore("--sae", saved[0], "--sae", saved[1], *site)
    names = [entry["name"] for entry in sets(tmp_path / "page.html")]
    assert names == [f"k{k}: TopKSAE, 20 latents, at blocks.1.hook_resid_post" for k in (3, 5)]
    said = explore("--sae", saved[0], "--layer", 2, "--examples", 2, *site)
    assert [entry["key"] for entry in sets(tmp_path / "page.html")] == ["neurons-2", "latents"]
    assert max(max(entry["summary"]["examples"]) for entry in sets(tmp_path / "page.html")) == 2
    assert "20 of blocks.2.mlp neurons and 20 of k3: TopKSAE" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", 7], "site must be one of .* got 'blocks.7.mlp.hook_in'"),
        (["--sae", "nowhere"], "path must be a folder with the files of a format"),
        (["--site", "blocks.0.hook_resid_pre", "--sae", "{wide}"], "which is 12 wide, got d_in=7"),
        (["--sae", "{good}", "--sae", "{good}", "--layer", 1], "two side by side, got 3"),
        (["--split", "train", "--texts", "no.txt"], "texts must be .* got 'no.txt'"),
    ],
)
def test_a_mistake_is_one_line(explore, saved, as_a_user, tmp_path, arguments, message):
    wide = sae_lib.TopKSAE(7, 8, 2).save(tmp_path / "wide")
    said = explore(*(str(word).format(wide=wide, good=saved[0]) for word in arguments), code=1)
    assert said.startswith("error: ")
    assert re.search(message, " ".join(said.split()))
    assert not (tmp_path / "page.html").exists()


def test_what_is_no_page_is_not_replaced_and_nothing_is_computed_first(explore, tmp_path, monkeypatch):
    (tmp_path / "page.html").write_text("my own")
    monkeypatch.setattr("sae_lib.commands.explore.load_model", lambda *_: pytest.fail("computed first"))
    assert "path must be new or an explorer's page" in " ".join(explore(code=1).split())
    assert (tmp_path / "page.html").read_text() == "my own"
    assert "the folder of a page must exist" in " ".join(explore(out="nowhere/page.html", code=1).split())


def test_ctrl_c_leaves_nothing_behind(explore, tmp_path, monkeypatch):
    def stop(*_, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("sae_lib.explorer.contents", stop)
    assert "stopped; what was written is whole" in explore(code=130)
    assert [path.name for path in tmp_path.iterdir()] == ["lines.txt"]
