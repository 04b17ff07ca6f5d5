"""Build the book: execute its chapters side by side, keep their outputs in a cache, render all pages to _build/html.

    python book/build.py [-W] [-n] [--keep-going] [--only CHAPTER ...]

Chapters are independent, so as many run at a time as there are cores, each on one thread. What they print goes into
the cache that the renderer reads, which therefore finds every chapter executed; files that they write into the folder
SAE_LIB_STATIC become files of the book. The cache knows the chapters' sources
but not what they import: it is emptied when the library, the committed results, the lock or the scale changed.
A chapter that fails is not cached, and fails the build.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import nbformat
import yaml
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn, JupyterCacheAbstract
from jupyter_cache.executors.utils import ExecutionResult, single_nb_execution
from sphinx_external_toc.parsing import parse_toc_yaml
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {  # of the chapters' kernels; what is already set wins
    "OMP_NUM_THREADS": "1",  # tiny matrices want few threads, and another chapter has the other core
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",  # a page shows results, not how long they took to come ...
}
STATIC = "_build/.jupyter_cache/static"  # for files that chapters make: kept as long as what they print
PLAIN_BARS = "import tqdm.auto, tqdm.std; tqdm.auto.tqdm = tqdm.std.tqdm"  # ... which the bars made of widgets ignore


def chapters(root: Path, toc: Path) -> list[Path]:
    """The executed pages that a table of contents names."""
    pages = (root / f"{page}.ipynb" for page in parse_toc_yaml(toc))
    return [page for page in pages if page.exists()]


def fingerprint(root: Path) -> str:
    """One hash over everything that decides what a chapter prints, its own source aside."""
    digest = hashlib.sha256(f"{sys.version_info[:2]} {os.environ.get('SAE_LIB_SCALE', '')}".encode())
    for folder in ("sae_lib", "book/results", "book/claims.yml", "book/experiments.yml", "book/requirements.txt"):
        path = root / folder
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def open_cache(root: Path) -> JupyterCacheAbstract:
    """The cache of executed chapters, emptied first if they would print something else now."""
    folder, key = root / "_build/.jupyter_cache", root / "_build/.jupyter_cache_key"
    now = fingerprint(root)
    if not key.exists() or key.read_text() != now:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        key.write_text(now)
    (root / STATIC).mkdir(exist_ok=True)
    return get_cache(folder)


def execute(chapter: Path, timeout: int) -> ExecutionResult:
    """Run a chapter from its first cell to its last, or to the first that fails."""
    notebook = nbformat.read(chapter, as_version=4)
    kernel = ["--IPKernelApp.log_level=ERROR", f"--IPKernelApp.exec_lines={PLAIN_BARS}"]
    folder = str(chapter.parent)
    return single_nb_execution(notebook, cwd=folder, timeout=timeout, allow_errors=False, extra_arguments=kernel)


def is_cached(chapter: Path, cache: JupyterCacheAbstract) -> bool:
    try:
        cache.match_cache_notebook(nbformat.read(chapter, as_version=4))
    except KeyError:
        return False
    return True


def execute_all(chapters: list[Path], cache: JupyterCacheAbstract, timeout: int) -> Iterator[tuple[Path, str]]:
    """Execute what is not cached yet, as many chapters at a time as there are cores; yields what failed, and why."""
    todo = [chapter for chapter in chapters if not is_cached(chapter, cache)]
    print(f"{len(todo)} chapters to execute, {len(chapters) - len(todo)} unchanged", flush=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=len(todo), unit="chapter", disable=None) as progress:
        running = {pool.submit(execute, chapter, timeout): chapter for chapter in todo}
        try:
            for future in as_completed(running):
                chapter, result = running[future], future.result()
                if result.err is None:
                    bundle = CacheBundleIn(result.nb, str(chapter), data={"execution_seconds": result.time})
                    cache.cache_notebook_bundle(bundle, check_validity=False)
                else:
                    yield chapter, result.exc_string
                progress.write(f"{result.time:7.1f} s  {chapter.stem}{'' if result.err is None else '  FAILED'}")
                progress.update()
        finally:
            pool.shutdown(cancel_futures=True)  # after Ctrl-C, chapters that have not begun do not begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="CHAPTER", help="execute and render these pages alone")
    arguments, renderer_flags = parser.parse_known_args()  # -W -n --keep-going
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ["SAE_LIB_STATIC"] = str(ROOT / STATIC)

    cache = open_cache(ROOT)
    toc = ROOT / "_toc.yml"
    if arguments.only:
        first, *others = (f"book/{page}" for page in arguments.only)
        toc = ROOT / "_build/only.yml"
        pages = {"chapters": [{"file": other} for other in others]} if others else {}
        toc.write_text(yaml.safe_dump({"format": "jb-book", "root": first} | pages))

    timeout = yaml.safe_load((ROOT / "_config.yml").read_text())["execute"]["timeout"]
    failures = list(execute_all(chapters(ROOT, toc), cache, timeout))
    for chapter, traceback in failures:
        print(f"\n{chapter.relative_to(ROOT)} failed:\n{traceback}", file=sys.stderr)
    if failures:
        sys.exit(f"No page was rendered, because of {', '.join(chapter.stem for chapter, _ in failures)}")

    print(f"Rendering {len(parse_toc_yaml(toc))} pages", flush=True)
    jupyter_book = Path(sys.executable).with_name("jupyter-book")
    rendered = subprocess.run([jupyter_book, "build", ROOT, "--toc", toc, "--all", "--quiet", *renderer_flags])
    if rendered.returncode:
        sys.exit(rendered.returncode)
    print(f"Open {ROOT / '_build/html/index.html'}")


if __name__ == "__main__":
    main()
