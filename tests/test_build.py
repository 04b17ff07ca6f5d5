"""The build executes what changed, keeps what worked, and reports what failed."""

import importlib.util
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_notebook

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("build", ROOT / "book/build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)

KERNEL = {"name": "python3", "display_name": "Python 3"}


@pytest.fixture
def root(tmp_path: Path, monkeypatch) -> Path:
    """A small repository with one chapter that works and one that fails."""
    monkeypatch.setenv("SAE_LIB_STATIC", "")  # which the build sets, and no other test shall find
    for folder in ("sae_lib/saes", "book/results"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "sae_lib/saes/topk.py").write_text("k = 1")
    (tmp_path / "book/results/topk.pocket.json").write_text("[]")
    (tmp_path / "book/requirements.txt").write_text("torch==2.13.0")
    toc = {"format": "jb-book", "root": "book/works", "chapters": [{"file": "book/fails"}, {"file": "book/text"}]}
    (tmp_path / "_toc.yml").write_text(yaml.safe_dump(toc))
    (tmp_path / "book/text.md").write_text("# Text")
    for name, source in (("works", "print(6 * 7)"), ("fails", "raise ValueError('k must be in [1, 8]')")):
        notebook = new_notebook(cells=[new_code_cell(source, id="only")], metadata={"kernelspec": KERNEL})
        nbformat.write(notebook, tmp_path / f"book/{name}.ipynb")
    return tmp_path


def test_a_failing_chapter_is_reported_and_not_cached_while_others_are(root, capsys):
    chapters = build.chapters(root, root / "_toc.yml")
    assert [chapter.stem for chapter in chapters] == ["works", "fails"]
    cache = build.open_cache(root)
    for executed, unchanged in ((2, 0), (1, 1)):
        ((failed, traceback),) = build.execute_all(chapters, cache, timeout=60)
        assert failed.stem == "fails"
        assert "k must be in [1, 8]" in traceback
        assert [build.is_cached(chapter, cache) for chapter in chapters] == [True, False]
        assert f"{executed} chapters to execute, {unchanged} unchanged" in capsys.readouterr().out
    record, notebook = cache.merge_match_into_notebook(nbformat.read(chapters[0], as_version=4))
    assert notebook.cells[0].outputs[0].text == "42\n"
    assert cache.get_cache_record(record).data["execution_seconds"] > 0


def test_a_failing_chapter_fails_the_build_before_anything_is_rendered(root, monkeypatch, capfd):
    (root / "_config.yml").write_text("execute: {timeout: 60}")
    monkeypatch.setattr(build, "ROOT", root)
    monkeypatch.setattr("sys.argv", ["build.py", "--only", "fails", "text"])
    with pytest.raises(SystemExit, match="No page was rendered, because of fails"):
        build.main()
    assert "book/fails.ipynb failed:" in capfd.readouterr().err
    assert not (root / "_build/html").exists()


def test_chapters_print_no_progress_bars(root, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    source = "from tqdm.auto import tqdm\nfor _ in tqdm(range(3)):\n    pass"
    chapter = root / "book/bars.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell(source, id="only")], metadata={"kernelspec": KERNEL}), chapter)
    result = build.execute(chapter, timeout=60)
    assert result.err is None
    assert result.nb.cells[0].outputs == []


def test_files_that_chapters_make_are_kept_as_long_as_what_they_print_and_served(root, monkeypatch):
    (root / "_config.yml").write_text("execute: {timeout: 60}")
    source = "import os, pathlib\npathlib.Path(os.environ['SAE_LIB_STATIC'], 'made.html').write_text('made')"
    notebook = new_notebook(cells=[new_code_cell(source, id="only")], metadata={"kernelspec": KERNEL})
    nbformat.write(notebook, root / "book/works.ipynb")
    monkeypatch.setattr(build, "ROOT", root)
    monkeypatch.setattr("sys.argv", ["build.py", "--only", "works"])
    monkeypatch.setattr(build.subprocess, "run", lambda *_: build.subprocess.CompletedProcess([], 0))
    build.main()
    made = root / build.STATIC / "made.html"
    assert made.read_text() == "made"
    build.open_cache(root)
    assert made.exists()
    (root / "sae_lib/saes/topk.py").write_text("changed")
    build.open_cache(root)
    assert made.parent.is_dir()
    assert not made.exists()
    served = yaml.safe_load((ROOT / "_config.yml").read_text())["sphinx"]["config"]["html_static_path"]
    assert build.STATIC in served


@pytest.mark.parametrize(
    "path", ["sae_lib/saes/topk.py", "sae_lib/new.bin", "book/results/topk.pocket.json", "book/requirements.txt"]
)
def test_cache_is_emptied_when_what_a_chapter_reads_changes(root, path):
    build.open_cache(root)
    marker = root / "_build/.jupyter_cache/marker"
    marker.touch()
    build.open_cache(root)
    assert marker.exists()
    (root / path).write_text("changed")
    build.open_cache(root)
    assert not marker.exists()


def test_cache_is_emptied_when_the_scale_changes(root, monkeypatch):
    monkeypatch.setenv("SAE_LIB_SCALE", "reader")
    before = build.fingerprint(root)
    monkeypatch.setenv("SAE_LIB_SCALE", "pocket")
    assert build.fingerprint(root) != before


def test_what_does_not_matter_keeps_the_cache(root):
    before = build.fingerprint(root)
    (root / "sae_lib/__pycache__").mkdir()
    (root / "sae_lib/__pycache__/topk.pyc").write_text("compiled")
    (root / "book/text.md").write_text("# Other text")
    assert build.fingerprint(root) == before
