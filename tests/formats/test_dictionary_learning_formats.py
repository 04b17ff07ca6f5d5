"""dictionary_learning reads our folders as we do, and we those of all its classes; `peers.dictionary_learning_formats`
recorded what it computed."""

import json

import pytest
import torch
from peers.folders import cases, unpacked
from peers.our_saes import EXPRESSES, TOLERANCE, apart, gone_there, made
from peers.parity import recorded

import sae_lib
from sae_lib.formats import save_as
from sae_lib.formats.dictionary_learning import CLASSES

FOUND, VERSIONS = recorded("dictionary_learning_formats")
THEIRS = cases(FOUND, "dictionary_learning.")


def test_the_record_is_complete():
    assert VERSIONS.keys() == {"dictionary-learning", "torch", "numpy", "sources"}
    assert {name.split(".")[1].split(",")[0] for name in THEIRS} == set(CLASSES)
    start = "ours.dictionary_learning."
    assert {name.removeprefix(start) for name in cases(FOUND, start)} == EXPRESSES["dictionary_learning"]


@pytest.mark.parametrize("name", THEIRS)
def test_a_folder_of_theirs_has_their_codes_and_reconstructions(name, tmp_path):
    assert max(apart(FOUND, name, tmp_path / "sae")) < TOLERANCE


@pytest.mark.parametrize("name", cases(FOUND, "ours."))
def test_a_folder_of_ours_has_our_codes_and_reconstructions_there(name, tmp_path):
    gone_there(FOUND, name, tmp_path / "sae")


@pytest.mark.parametrize("name", THEIRS)
def test_each_becomes_the_variant_of_its_class(name, tmp_path):
    sae = sae_lib.load(unpacked(FOUND, name, tmp_path / "sae"))
    assert sae.name == CLASSES[name.split(".")[1].split(",")[0]][0]
    assert sae.unit_rows == (name == "dictionary_learning.AutoEncoder, free rows" or "free" not in name)


def test_free_rows_of_relu_stay_free_there(tmp_path):
    for name, dict_class in (("relu", "AutoEncoder"), ("relu, free rows", "AutoEncoderNew")):
        path = save_as(made(name), tmp_path / name, "dictionary_learning")
        assert json.loads((path / "config.json").read_text())["trainer"]["dict_class"] == dict_class


@pytest.mark.parametrize("config", [{}, {"trainer": None}, {"trainer": {"dict_class": "IdentityDict"}}])
def test_a_class_that_we_do_not_know_is_refused(config, tmp_path):
    folder = unpacked(FOUND, "dictionary_learning.AutoEncoder", tmp_path / "sae")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="must name a trainer.dict_class"):
        sae_lib.load(folder)


class Mine:
    """Something that unpickling would make."""


@pytest.mark.parametrize(
    ("saved", "reason"),
    [
        (Mine(), "more than tensors"),
        ({"ae": {"bias": torch.ones(4)}, "step": 3}, "like a checkpoint"),
        ({"bias": torch.ones(4)}, "without decoder.weight"),
    ],
)
def test_a_file_that_holds_anything_else_is_refused_and_not_run(saved, reason, tmp_path):
    folder = unpacked(FOUND, "dictionary_learning.AutoEncoder", tmp_path / "sae")
    torch.save(saved, folder / "ae.pt")
    with pytest.raises(ValueError, match=reason):
        sae_lib.load(folder)


@pytest.mark.parametrize("content", [b"", b"PK no zip"])
def test_a_damaged_file_is_refused(content, tmp_path):
    folder = unpacked(FOUND, "dictionary_learning.AutoEncoder", tmp_path / "sae")
    (folder / "ae.pt").write_bytes(content)
    with pytest.raises(ValueError, match="must hold tensors and nothing else"):
        sae_lib.load(folder)
