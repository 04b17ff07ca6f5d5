"""The Hub, with local folders in its place: the cache that a download leaves, and what an upload is given."""

import shutil
from types import SimpleNamespace

import huggingface_hub
import huggingface_hub.constants
import pytest
import torch
import yaml

import sae_lib
from sae_lib.formats import save_as
from sae_lib.hub import card

COMMIT = "0" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The local cache, and how a repository gets into it."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def hold(name, path, inside="."):
        repository = folder / f"models--{name.replace('/', '--')}"
        shutil.copytree(path, repository / "snapshots" / COMMIT / inside, dirs_exist_ok=True)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs/main").write_text(COMMIT)

    return hold


@pytest.fixture
def hub(cache, monkeypatch):
    """A Hub whose repositories are in the cache at once; it keeps what it was asked for."""
    asked = []

    class Api:
        def create_repo(self, name, private, exist_ok):
            asked.append((name, private, exist_ok))
            return f"https://huggingface.co/{name}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            asked.append(sorted(path.name for path in folder_path.iterdir()))
            asked.append((folder_path / "README.md").read_text())
            cache(repo_id, folder_path)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return asked


def made():
    sae = sae_lib.TopKSAE(6, 24, 3)
    sae_lib.train(sae, torch.randn(10, 40, 6, generator=torch.Generator().manual_seed(0)).unbind(), tokens=400)
    return sae


def test_what_is_pushed_is_loaded_with_the_same_bits(hub):
    sae = made()
    assert sae.push_to_hub("me/topk") == "https://huggingface.co/me/topk"
    again = sae_lib.load("hf:me/topk")
    assert again.name == "topk"
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in sae.state_dict().items())
    assert hub[:2] == [("me/topk", False, True), ["README.md", "config.json", "weights.safetensors"]]


def test_the_card_has_metrics_and_provenance(hub):
    sae = made()
    sae.trained_on = ["ab12"]
    sae.push_to_hub("me/topk", {"fvu": 0.25, "l0": 3}, model="google/gemma-2-2b", site="blocks.12.hook_resid_post")
    card = hub[2]
    about = yaml.safe_load(card.split("---")[1])
    assert about["base_model"] == "google/gemma-2-2b"
    assert about["library_name"] == "sae-put-to-the-test"
    for line in (
        "| fvu | 0.25 |",
        "| l0 | 3 |",
        "| k | 3 |",
        "| model | google/gemma-2-2b |",
        "| site | blocks.12.hook_resid_post |",
        "| tokens trained on | 400 |",
        "| texts, by their hashes | ab12 |",
        'sae = sae_lib.load("hf:me/topk")',
    ):
        assert line in card.splitlines()
    assert f"torch {torch.__version__}" in card
    assert "sha256 of the weights" in card


def test_a_card_says_nothing_that_is_not_known(hub):
    sae = sae_lib.TopKSAE(6, 24, 3)
    sae.push_to_hub("me/new")
    assert "Nothing yet." in hub[2]
    for unknown in ("base_model", "| model", "| site", "tokens trained on", "| texts"):
        assert unknown not in hub[2]


def test_a_local_model_is_no_base_model():
    config = {"variant": "topk", "config": {"d_in": 6, "d_sae": 24}}
    for model in ("pocket", "./models/mine", "/models/mine"):
        assert "base_model" not in card("me/topk", config, {"model": model}, {})


def test_a_folder_of_a_repository_in_another_librarys_format(cache, tmp_path):
    sae = made()
    cache("them/many", save_as(sae, tmp_path / "lens", "sae_lens"), "layer_12/topk")
    again = sae_lib.load("hf:them/many/layer_12/topk")
    x = torch.randn(5, 6)
    assert torch.equal(again.encode(x), sae.encode(x))
    with pytest.raises(ValueError, match="name one: hf:org/name/folder"):
        sae_lib.load("hf:them/many")


@pytest.mark.parametrize("name", ["hf:", "hf:org", "hf:org/"])
def test_a_name_of_another_form_is_refused(name):
    with pytest.raises(ValueError, match="must be hf:org/name"):
        sae_lib.load(name)


@pytest.mark.parametrize("name", ["hf:nobody/nothing", "hf:no body/no thing"])
def test_what_is_not_to_be_had_is_one_message(cache, name):
    with pytest.raises(ValueError, match="must be on the Hub"):
        sae_lib.load(name)


def test_a_hub_that_refuses_is_one_message(monkeypatch):
    def refuse(*_, **__):
        raise huggingface_hub.errors.LocalTokenNotFoundError("Token is required")

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(create_repo=refuse))
    with pytest.raises(ValueError, match="Token is required; log in"):
        sae_lib.TopKSAE(6, 24, 3).push_to_hub("me/topk")
