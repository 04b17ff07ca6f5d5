"""Before a run of hours: what can be had is told from what cannot, sizes are the plan's, the impossible is refused."""

import json
from pathlib import Path
from types import SimpleNamespace

import httpx
import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import errors
from tiny_models import WORDS, tiny_gpt2

from sae_lib import preflight
from sae_lib.plan import DEVICES, Device, plan
from sae_lib.preflight import model_access, resources, table, texts_access, this_device, unit
from sae_lib.reproduce import unfinished

SITE = "blocks.1.hook_resid_post"
SAES = {
    "TopK": {"variant": "topk", "k": "target"},
    "ReLU": {"variant": "relu", "l1_coeff": {"match": "target", "start": 0.2}},
    "g-SAE": {"variant": "gradient", "k": "target"},
    "PCA": {"variant": "pca", "rank": "target"},
}
SLOW = Device(fp32=1e-6, tf32=1e-6, bf16=2e-6, memory=0, bandwidth=1e9)  # a million products a second


@pytest.fixture
def asked(tmp_path):
    """Experiments on a tiny model and 30 texts, with the SAEs of these labels."""
    (tmp_path / "texts.txt").write_text("\n".join(" ".join(WORDS[i % 7 : i % 7 + 9]) for i in range(30)))
    ground = {"model": str(tiny_gpt2()), "site": SITE, "texts": str(tmp_path / "texts.txt"), "held_texts": 5}
    ground |= {"batch_size": 32, "held": 100}

    def todo(*labels, **more):
        part = {"version": 1, "ground": "words", "settings": [{"target": 2, "d_sae": 24}], "tokens": 320}
        part |= {"saes": {label: SAES[label] for label in labels}, "measures": ["reconstruction"]} | more
        path = tmp_path / "experiments.yml"
        content = {"grounds": {"words": ground}, "chapter": {"name": part | {"scales": {"paper": {"seeds": 2}}}}}
        path.write_text(yaml.safe_dump(content))
        return unfinished("chapter", "paper", folder=tmp_path, path=path)

    return todo


def one(todo):
    experiment, _, saes = todo[0]
    return unit(experiment.ground, Path(experiment.ground["model"]), saes)


# What is read ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """A Hub that gives one file, or raises one error; and what is in the cache."""
    state = SimpleNamespace(answer=None, cached=False, asked=[])

    def download(name, file):
        state.asked.append(file)
        if isinstance(state.answer, Exception):
            raise state.answer
        return str(state.answer)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: "here" if state.cached else None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return state


def refused(kind):
    request = httpx.Request("GET", "https://huggingface.co")
    return kind("no", response=httpx.Response(403, request=request))


@pytest.mark.parametrize(
    ("error", "said", "remedy"),
    [
        (
            refused(errors.GatedRepoError),
            "gated, and not open to you",
            "accept its terms at https://huggingface.co/org/m",
        ),
        (refused(errors.RepositoryNotFoundError), "not on the Hub", "check the name"),
        (errors.LocalEntryNotFoundError("no"), "the Hub cannot be reached", "--model FOLDER --out FOLDER"),
    ],
)
def test_a_model_that_cannot_be_opened_says_why_and_what_to_do(hub, error, said, remedy):
    hub.answer = error
    check, config = model_access("org/m")
    assert said in check.said and remedy in check.remedy and config is None
    assert hub.asked == ["config.json"]


def test_offline_is_called_by_its_name(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.answer = errors.LocalEntryNotFoundError("no")
    assert "HF_HUB_OFFLINE is set" in model_access("org/m")[0].said
    hub.answer = tiny_gpt2() / "config.json"
    assert model_access("org/m")[0].remedy == "unset HF_HUB_OFFLINE", "the weights are not in the cache"
    hub.cached = True
    assert not model_access("org/m")[0].remedy


def test_of_an_open_model_only_the_configuration_is_fetched_and_the_weights_are_counted(hub):
    from transformers import AutoModelForCausalLM

    hub.answer = tiny_gpt2() / "config.json"
    check, config = model_access("org/m")
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_gpt2()).parameters())
    assert config == tiny_gpt2() and not check.remedy
    assert f"to be downloaded, at most {4 * parameters / 1e9:.1f} GB" in check.said
    assert preflight.weights("org/m", config) == (False, 4 * parameters)
    assert hub.asked == ["config.json"]
    hub.cached = True
    assert "weights in the cache" in model_access("org/m")[0].said
    assert preflight.weights("org/m", config) == (True, 0)


def test_a_folder_and_the_embedded_model_are_here(hub):
    for name in (str(tiny_gpt2()), "pocket"):
        check, folder = model_access(name)
        assert check.said == f"{name}: here" and not check.remedy
        assert json.loads((folder / "config.json").read_text())
    assert hub.asked == []


def test_texts_are_tried_by_reading_one(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    assert not texts_access(str(tmp_path / "a.txt"), None).remedy
    assert "Couldn't reach" in texts_access("org/texts", 10).said
    assert "--texts SOURCE --out FOLDER" in texts_access("org/texts", 10).remedy


# What it takes --------------------------------------------------------------------------------------------------------


def test_sizes_and_hours_are_those_of_the_plan_and_a_search_may_take_ten_rounds(asked):
    alone = plan(tiny_gpt2(), 24, 2, SITE, 320, 1, 32, context=16)
    reading = alone.hours(SLOW, "fp32", 0.4)["model"]
    step = {kind: alone.hours(SLOW, "fp32", 0.4, kind)["saes"] for kind in ("sparse step", "dense step")}
    assert step["dense step"] > 2 * step["sparse step"]

    assert one(asked("TopK")).hours(SLOW) == pytest.approx([reading + step["sparse step"]] * 2)
    low, high = one(asked("TopK", "ReLU", "PCA")).hours(SLOW)
    assert low == pytest.approx(reading + step["sparse step"] + step["dense step"])
    assert high == pytest.approx(10 * reading + step["sparse step"] + 10 * step["dense step"])

    both, single = one(asked("TopK", "ReLU")), one(asked("TopK"))
    weights = 16 * alone.parameters["each SAE"]
    assert both.memory - single.memory == weights
    checkpoint = 12 * alone.parameters["each SAE"] + 8 * 24
    buffer = alone.memory["buffer of activations"]
    assert single.disk == (3 * (checkpoint + buffer),) * 2
    assert both.disk == (3 * (2 * checkpoint + buffer), 3 * (2 * checkpoint + buffer) + 2 * 9 * (checkpoint + buffer))


def test_gradients_need_a_stream_of_their_own_through_the_whole_model(asked):
    one_stream, two = one(asked("TopK")).streams, one(asked("TopK", "g-SAE")).streams
    assert one_stream == (1, 1)
    assert two[0] > 3, "there and back, and the unembedding"


def test_a_twin_is_trained_too(asked):
    once, _ = one(asked("TopK")).hours(SLOW)
    assert one(asked("TopK", measures=["consistency"])).hours(SLOW) == pytest.approx((2 * once, 2 * once))


def test_half_the_bits_of_the_model_halve_its_hours_and_its_memory(asked):
    todo = asked("TopK")
    (experiment, _, saes), model = todo[0], Path(tiny_gpt2())
    full, half = (unit(experiment.ground | {"dtype": dtype}, model, saes) for dtype in ("float32", "bfloat16"))
    parts = [each.plans[0][0].memory["model"] for each in (full, half)]
    assert parts[0] == 2 * parts[1]
    assert half.hours(SLOW)[0] < full.hours(SLOW)[0]


@pytest.mark.parametrize("short", ["memory", "disk", "hours", "nothing"])
def test_what_cannot_work_is_refused_with_a_remedy(short, asked, monkeypatch):
    units = [one(asked("TopK", "ReLU"))]
    monkeypatch.setattr(preflight, "free_memory", lambda: (1000 if short == "memory" else 10**12, "a GPU"))
    free = SimpleNamespace(free=1000 if short == "disk" else 10**12)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: free)
    crawling = SLOW._replace(fp32=1e-12, bandwidth=1e-6)
    monkeypatch.setattr(
        preflight, "this_device", lambda: (crawling if short == "hours" else DEVICES["h100"], "a sheet")
    )
    checks = resources(units, 0)
    assert [check.name for check in checks if check.remedy] == ([] if short == "nothing" else [short])
    assert table(checks).count("cannot work: ") == (short != "nothing")


def test_speed_is_the_data_sheets_or_timed_here(monkeypatch):
    device, said = this_device()
    if not torch.cuda.is_available():
        assert 1e-4 < device.fp32 < 1e3 and "on this CPU" in said
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, gpu in {"h100": "NVIDIA H100 80GB HBM3", "l40s": "NVIDIA L40S", "l4": "NVIDIA L4"}.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu=gpu: gpu)
        assert this_device()[0] == DEVICES[name]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA GeForce RTX 4090")
    assert this_device()[0] == DEVICES["rtx-4090"]


def test_the_whole_screen_fits_and_counts_what_is_left(asked, tmp_path):
    checks = preflight.preflight(asked("TopK", "PCA"), tmp_path / "chapter.paper.json")
    assert [check.name for check in checks] == ["to do", "model", "texts", "memory", "disk", "hours", "writes"]
    assert not any(check.remedy for check in checks)
    assert checks[0].said.startswith("4 rows: name (2)")
    assert str(tmp_path / "chapter.paper.json") in table(checks)
    assert preflight.preflight([], tmp_path / "x.json")[0].said == "nothing, all rows are there"


def test_after_a_refusal_nothing_further_is_asked_of_the_network(asked, monkeypatch, tmp_path):
    gone = preflight.Check("model", "m: gone", "look elsewhere"), None
    monkeypatch.setattr(preflight, "model_access", lambda name: gone)
    monkeypatch.setattr(preflight, "texts_access", None)
    checks = preflight.preflight(asked("TopK"), tmp_path / "x.json")
    assert [check.name for check in checks] == ["to do", "model", "writes"]
