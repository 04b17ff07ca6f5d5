"""What the repository says about itself in several places is the same everywhere."""

import ast
import importlib.metadata
import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import jaxtyping
import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import sae_lib

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text())
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
GENERATED = {"_build", "runs", "dist", "wandb", "__pycache__"}

# A file imports only from files above it in this list.
ORDER = [
    "records",
    "data",
    "distributed",
    "pocket",
    "groups",
    "vision",
    "shapes",
    "autoencoders",
    "models",
    "modules",
    "shards",
    "cached",
    "cache",
    "activations",
    "kernels",
    "sparse",
    "selection",
    "hub",
    "sae",
    "embedding_loss",
    "saes",
    "orbits",
    "superposition",
    "neuron_embeddings",
    "neuron_clusters",
    "interruption",
    "state",
    "checkpoint",
    "train",
    "loggers",
    "metrics",
    "matching",
    "results",
    "orbit_worlds",
    "grounds",
    "measures",
    "experiments",
    "reproduce",
    "contrasts",
    "claims",
    "formats",
    "plan",
    "preflight",
    "figures",
    "against",
    "components",
    "turning",
    "ledger",
    "explorer",
    "commands",
]


def files() -> list[Path]:
    """Every file of the repository, without what is generated or installed."""
    hidden = {".ci", ".github", ".gitignore", ".pre-commit-config.yaml"}
    found = []
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        if not any(part in GENERATED or (part.startswith(".") and part not in hidden) for part in parts):
            found.append(path)
    return [path for path in found if path.is_file()]


def pins() -> dict[str, Version]:
    lines = (ROOT / "book/requirements.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    found = {}
    for requirement in requirements:
        if requirement.marker and not requirement.marker.evaluate():
            continue
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", requirement
        found[canonicalize_name(requirement.name)] = Version(specifier.version)
    return found


def requirements(extras: list[str]) -> list[Requirement]:
    optional = PROJECT["optional-dependencies"]
    lines = PROJECT["dependencies"] + [line for extra in extras for line in optional[extra]]
    return [r for r in map(Requirement, lines) if not r.marker or r.marker.evaluate()]


def closure(start: list[Requirement]) -> set[str]:
    """The distributions that are installed when the given requirements are, by the metadata of those installed here."""
    found, todo = set(), [(r, extra) for r in start for extra in ["", *r.extras]]
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        if name in found and not requirement.extras:
            continue
        found.add(name)
        for line in importlib.metadata.requires(name) or []:
            todo += [(Requirement(line), own) for own in ["", *requirement.extras]]
    return found


EXTRAS = list(PROJECT["optional-dependencies"])


@pytest.mark.parametrize("requirement", requirements(EXTRAS), ids=str)
def test_lock_satisfies_pyproject(requirement):
    assert pins()[canonicalize_name(requirement.name)] in requirement.specifier


def test_what_is_installed_is_the_lock():
    installed = {name: Version(importlib.metadata.version(name)).public for name in pins()}
    assert installed == {name: str(version) for name, version in pins().items()}


def test_lock_is_complete():
    brought_by_torch_for_cuda = re.compile("nvidia-.*|cuda-.*|triton")
    missing = {n for n in closure(requirements(EXTRAS)) - set(pins()) if not brought_by_torch_for_cuda.fullmatch(n)}
    assert not missing


def test_core_is_at_most_30_distributions():
    without_cuda = {n for n in closure(requirements([])) if not re.fullmatch("nvidia-.*|cuda-.*|triton", n)}
    assert "torch" in without_cuda
    assert len(without_cuda) + 1 <= 30, sorted(without_cuda)  # and the project itself


def test_torch_is_pinned_for_every_platform_and_no_torchvision_comes_beside_it():
    assert pins()["torch"] == Version("2.13.0")
    assert pins()["torch"].local is None
    assert "torchvision" not in closure(requirements(EXTRAS)) | set(pins())


def test_conda_users_get_the_same_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == PROJECT["name"]
    assert environment["channels"] == ["conda-forge"]
    python, pip, from_pip = environment["dependencies"]
    assert pip == "pip"
    assert python.startswith("python=")
    assert python.removeprefix("python=") in Requirement(f"python{PROJECT['requires-python']}").specifier
    assert from_pip == {"pip": ["-r book/requirements.txt", "-e ."]}


def test_import_brings_torch_and_nothing_heavier():
    heavy = "transformer_lens transformers datasets pandas matplotlib seaborn IPython typer triton".split()
    code = f"import sys, sae_lib; print([name for name in {heavy} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_shapes_are_checked_in_tests():
    with pytest.raises(jaxtyping.TypeCheckError, match="d_in"):
        sae_lib.metrics.fvu(torch.ones(3), torch.ones(3))


def imports_of(path: Path) -> set[str]:
    """The modules of ``sae_lib`` that a file imports, at its top or inside a function, as dotted names below it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively, in line {node.lineno}"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("sae_lib.") for name in found if name.split(".")[0] == "sae_lib"}


LIBRARY = [path for path in sorted((ROOT / "sae_lib").rglob("*.py")) if path.parent.name != "__pycache__"]
MODULES = [p for p in LIBRARY if p.relative_to(ROOT / "sae_lib").as_posix() not in ("__init__.py", "__main__.py")]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_imports_only_from_files_above_it(path):
    own = path.relative_to(ROOT / "sae_lib").parts[0].removesuffix(".py")
    assert own in ORDER, f"{own} needs a place in ORDER"
    for name in imports_of(path):
        other = name.split(".")[0]
        assert other in ORDER, f"imports sae_lib.{other}, which is no file: public names are for users"
        assert ORDER.index(other) <= ORDER.index(own), f"imports {other}, which stands below it"


VARIANTS = {path.stem for path in (ROOT / "sae_lib/saes").glob("*.py")} - {"__init__", "controls"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_variant_is_named_by_its_file_and_by_what_measures_it_alone(path):
    named = {name.split(".")[1] for name in imports_of(path) if name.startswith("saes.")} & VARIANTS - {path.stem}
    if path.stem == "measures" or path.parent.name == "metrics":
        return  # a paper's claims ask for numbers that only its variant has
    if path.parent.name != "saes":
        assert not named
    elif path.name != "__init__.py":
        assert len(named) <= 1, "a variant builds on at most the one of its paper"


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_is_one_idea_long(path):
    assert len(path.read_text().splitlines()) <= 400


def test_repository_address_is_the_one_of_config():
    address = CONFIG["repository"]["url"]
    owner, name = address.removeprefix("https://github.com/").split("/")
    found = set()
    for path in files():
        text = path.read_text(encoding="utf-8", errors="ignore")
        owners = re.findall(rf"github(?:\.com)?/([\w.-]+)/{name}", text)
        found |= {(path.relative_to(ROOT), owner) for owner in owners}
    assert {place for place, other in found if other != owner} == set()
    assert {str(place) for place, _ in found} >= {"_config.yml", "pyproject.toml", "CITATION.cff"}
    assert name == PROJECT["name"]


def commands(workflow: Path) -> list[str]:
    jobs = yaml.safe_load(workflow.read_text())["jobs"].values()
    return [line for job in jobs for step in job["steps"] for line in step.get("run", "").splitlines()]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_each_command_of_a_workflow_exists(workflow):
    for command in commands(workflow):
        program, *arguments = shlex.split(command)
        if program == "make":
            targets = {argument for argument in arguments if "=" not in argument}
            phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[1]
            assert targets
            assert targets <= set(phony.split())
            subprocess.run(["make", "--dry-run", *targets], cwd=ROOT, check=True, capture_output=True)
        else:
            folder, script = Path(program).parent, Path(program).name
            assert folder == Path(".venv/bin"), f"{program} is not installed by make"
            scripts = {entry.name for entry in importlib.metadata.entry_points(group="console_scripts")}
            assert script in scripts | {"python"}
        for argument in arguments:
            if re.fullmatch(r"[\w./]+", argument) and "/" in argument:
                assert (ROOT / argument).exists(), argument


def test_workflows_are_the_three_of_the_project():
    assert [path.stem for path in WORKFLOWS] == ["book", "gpu", "tests"]
    for path in WORKFLOWS:
        workflow = yaml.safe_load(path.read_text())
        triggers = workflow[True]  # YAML reads the key "on" as a truth value
        assert triggers
        assert workflow["permissions"] == {"contents": "read"}
        runners = {job["runs-on"] for job in workflow["jobs"].values()}
        assert runners == ({"${{ vars.GPU_RUNNER }}"} if path.stem == "gpu" else {"ubuntu-latest"})


def test_ci_runs_the_commands_of_the_readme():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci/run").read_text()
    for command in ("make test", "make book"):
        assert f"\n{command}  #" in readme
        assert f'step "{command}" {command}' in ci
    assert 'make book BOOKFLAGS="-W -n --keep-going"' in ci


def test_wheel_contains_the_library_with_its_assets(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.iterdir()
    library = {path.relative_to(ROOT).as_posix() for path in files() if path.relative_to(ROOT).parts[0] == "sae_lib"}
    contents = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert contents == library


def test_citation_agrees_with_pyproject():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    assert citation["repository-code"] == PROJECT["urls"]["Repository"] == CONFIG["repository"]["url"]
    assert citation["title"] == CONFIG["title"]
    assert [author["name"] for author in citation["authors"]] == [a["name"] for a in PROJECT["authors"]]


def test_pre_commit_lints_with_the_locked_ruff():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (ruff,) = (hook for hook in hooks if hook["repo"].endswith("ruff-pre-commit"))
    assert Version(ruff["rev"]) == pins()["ruff"]


def test_no_file_is_larger_than_4_mib():
    assert [path for path in files() if path.stat().st_size >= 4 * 2**20] == []
