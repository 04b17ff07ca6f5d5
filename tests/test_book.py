"""The book's own rules: every chapter opens in Colab, runs at any scale, is stored without outputs, stays readable."""

import ast
import os
import re
import subprocess
import sys
import types
from importlib.metadata import version
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat import NotebookNode
from sphinx_external_toc.parsing import parse_toc_yaml

import sae_lib

ROOT = Path(__file__).parent.parent
BOOK = ROOT / "book"
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text())
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text())
REPOSITORY = CONFIG["repository"]["url"]

SET_UP = f'''\
# @title Set-up: in Colab, fetches the book and installs its library; elsewhere, does nothing
import os
import sys

if "google.colab" in sys.modules:
    folder = "/content/sae-put-to-the-test"
    if not os.path.isdir(folder):
        from importlib.metadata import version
        from subprocess import check_call

        check_call(["git", "clone", "--depth", "1", "{REPOSITORY}", folder])
        torch_as_it_is = f"torch=={{version('torch')}}"
        needed = ["--editable", f"{{folder}}[lm]", "seaborn", "ipywidgets", torch_as_it_is]
        check_call([sys.executable, "-m", "pip", "install", "--quiet", *needed])
    sys.path.insert(0, folder)
    os.chdir(f"{{folder}}/book")'''
PARAMETERS = 'SCALE = os.environ.get("SAE_LIB_SCALE", "reader")  # smoke, reader, pocket or paper'
BADGE = "[![Open in Colab](_static/colab-badge.svg)]({colab}/github/{repository}/blob/{branch}/book/{name}.ipynb)"

PAGES = sorted([*BOOK.glob("*.md"), *BOOK.glob("*.ipynb")])
CHAPTERS = [path for path in PAGES if path.suffix == ".ipynb"]
NUMBERED = {Path(c["file"]).name for part in TOC["parts"] if part.get("numbered") for c in part["chapters"]}
each_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
each_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tagged(notebook: NotebookNode, tag: str) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def prose(path: Path) -> str:
    """A page's Markdown, captions of figures included."""
    if path.suffix == ".md":
        return path.read_text()
    cells = read(path).cells
    captions = [cell.metadata.get("mystnb", {}).get("figure", {}).get("caption", "") for cell in cells]
    return "\n\n".join([cell.source for cell in cells if cell.cell_type == "markdown"] + captions)


def test_toc_and_folder_name_the_same_pages():
    in_toc = {Path(page) for page in parse_toc_yaml(ROOT / "_toc.yml")}
    assert {path.relative_to(ROOT).with_suffix("") for path in PAGES} == in_toc
    assert len({path.stem for path in PAGES}) == len(PAGES)


@each_chapter
def test_title_badge_and_question_come_first(path):
    first = read(path).cells[0]
    repository = REPOSITORY.removeprefix("https://github.com/")
    colab, branch = CONFIG["launch_buttons"]["colab_url"], CONFIG["repository"]["branch"]
    badge = BADGE.format(colab=colab, repository=repository, branch=branch, name=path.stem)
    assert first.cell_type == "markdown"
    title, *rest = (line for line in first.source.splitlines() if line.strip())
    assert re.match(r"# [^\d\s]", title)
    assert rest[0] == badge
    assert rest[1].startswith("*")


@each_chapter
def test_set_up_cell_is_the_same_everywhere_and_hidden(path):
    set_up = read(path).cells[1]
    assert set_up.source == SET_UP
    assert set_up.metadata["tags"] == ["remove-cell"]
    assert set_up.metadata["cellView"] == "form"


@each_chapter
def test_scale_alone_is_the_parameter(path):
    parameters = tagged(read(path), "parameters")
    if path.stem in NUMBERED or parameters:
        assert [cell.source for cell in parameters] == [PARAMETERS]


@each_chapter
def test_nothing_is_stored_but_the_source(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code(notebook))
    assert notebook.metadata.kernelspec.name == "python3"
    assert "widgets" not in notebook.metadata
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)


@each_chapter
def test_a_chapter_is_short_and_defines_next_to_nothing(path):
    notebook = read(path)
    cells = [cell for cell in code(notebook) if cell.source != SET_UP]
    lines = [line for cell in cells for line in cell.source.splitlines() if line.strip() and line.strip()[0] != "#"]
    nodes = [node for cell in cells for node in ast.walk(ast.parse(cell.source))]
    defined = [node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    assert len(notebook.cells) <= 48
    assert len(lines) <= 150
    assert len(defined) <= 3, defined
    assert len(prose(path).split()) <= 2500


@each_chapter
def test_a_numbered_chapter_ends_with_exercises_and_what_was_learned(path):
    headings = re.findall(r"^## (.+)$", prose(path), flags=re.MULTILINE)
    if path.stem in NUMBERED:
        differences = "Where this differs from the papers?"
        of_a_paper = (ROOT / "sae_lib/saes" / f"{path.stem}.py").exists()
        ends = f"Exercises\nWhat we learned(\n{differences}){'' if of_a_paper else '?'}$"
        assert re.search(ends, "\n".join(headings)), headings


@each_page
def test_every_exercise_has_a_folded_solution(path):
    exercises = re.findall(r"\{exercise(?:-start)?\}[^\n]*\n+:label: (\S+)", prose(path))
    solutions = re.findall(r"\{solution(?:-start)?\} (\S+)\n+:class: dropdown", prose(path))
    assert sorted(exercises) == sorted(solutions)
    assert len(set(exercises)) == len(exercises)
    assert exercises or path.stem not in NUMBERED


@each_page
def test_every_citation_is_in_the_references(path):
    cited = {key.strip() for keys in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", prose(path)) for key in keys.split(",")}
    known = re.findall(r"^@\w+\{([^,\s]+),", (BOOK / "references.bib").read_text(), flags=re.MULTILINE)
    assert cited <= set(known)
    assert len(set(known)) == len(known)


def test_the_library_page_describes_every_public_name():
    described = set(re.findall(r"auto(?:class|function):: sae_lib\.(?:\w+\.)*(\w+)", (BOOK / "api.md").read_text()))
    values = vars(sae_lib) | vars(sae_lib.metrics)
    public = {name for name, value in values.items() if callable(value) and not name.startswith("_")}
    assert {"train", "TopKSAE", "fvu"} <= public
    assert public <= described


@each_page
def test_no_picture_or_script_comes_from_the_network(path):
    text = path.read_text() if path.suffix == ".md" else "\n".join(cell.source for cell in read(path).cells)
    remote = r"!\[[^\]]*\]\(\s*(?:https?:)?//|(?:src|data|srcset)\s*=\s*\W{0,2}(?:https?:)?//|@import"
    assert re.findall(remote, text) == []


@each_page
def test_only_notebooks_are_executed(path):
    assert path.suffix == ".ipynb" or "{code-cell}" not in path.read_text()


def run_set_up(monkeypatch, in_colab: bool, already_there: bool) -> list[list[str]]:
    """Run the set-up cell with everything it would change replaced; returns the programs that it called."""
    called, folders = [], []
    monkeypatch.setattr(subprocess, "check_call", called.append)
    monkeypatch.setattr(os, "chdir", folders.append)
    monkeypatch.setattr(os.path, "isdir", lambda folder: already_there)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    if in_colab:
        monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    exec(SET_UP, {})
    assert folders == (["/content/sae-put-to-the-test/book"] if in_colab else [])
    assert (sys.path[0] == "/content/sae-put-to-the-test") == in_colab
    return called


def test_set_up_clones_and_installs_in_colab_and_leaves_torch_alone(monkeypatch):
    clone, install = run_set_up(monkeypatch, in_colab=True, already_there=False)
    assert clone == ["git", "clone", "--depth", "1", REPOSITORY, "/content/sae-put-to-the-test"]
    assert install[:5] == [sys.executable, "-m", "pip", "install", "--quiet"]
    assert install[5:7] == ["--editable", "/content/sae-put-to-the-test[lm]"]
    assert f"torch=={version('torch')}" in install


def test_set_up_fetches_once(monkeypatch):
    assert run_set_up(monkeypatch, in_colab=True, already_there=True) == []


def test_set_up_does_nothing_elsewhere(monkeypatch):
    assert run_set_up(monkeypatch, in_colab=False, already_there=False) == []


def test_every_file_that_config_names_is_served():
    static = BOOK / "_static"
    sphinx = CONFIG["sphinx"]["config"]
    served = [sphinx["mathjax_path"], *sphinx["html_css_files"], *sphinx["nb_ipywidgets_js"]]
    assert [name for name in served if not (static / name).is_file()] == []
    assert len(list((static / "mathjax/output/chtml/fonts/woff-v2").glob("*.woff"))) == 23
    assert (static / "mathjax/LICENSE").is_file()
    assert (static / "widgets/LICENSE").is_file()
    # the fonts of the widgets' icons are looked up beside the script, under the names it knows
    script = (static / "widgets/embed-amd.js").read_text()
    fonts = [font.name for font in (static / "widgets").glob("*.woff2")]
    assert len(fonts) == 2
    assert all(font in script for font in fonts)
