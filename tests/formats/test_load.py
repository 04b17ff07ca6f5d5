"""`load` tells formats by their files; `save_as` writes whole folders or nothing."""

import pytest
import torch
from peers.our_saes import EXPRESSES, SETTINGS, made

import sae_lib
from sae_lib.formats import FORMATS, save_as

X = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("by", ["the folder", "text", "a file in it"])
def test_the_format_is_told_by_its_files(format, by, tmp_path):
    path = save_as(made("jumprelu" if format != "sparsify" else "topk"), tmp_path / "sae", format)
    assert {part.name for part in path.iterdir()} == set(FORMATS[format].FILES)
    given = {"the folder": path, "text": str(path), "a file in it": path / FORMATS[format].FILES[-1]}[by]
    sae = sae_lib.load(given)
    assert not sae.training
    same = made(sae.name)
    assert torch.equal(sae.encode(X), same.encode(X))


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_written_can_be_read_by_others(format, tmp_path):
    path = save_as(made("jumprelu" if format != "sparsify" else "topk"), tmp_path / "sae", format)
    assert {oct(part.stat().st_mode & 0o777) for part in path.iterdir()} == {"0o644"}


def test_no_two_formats_have_the_same_files():
    sets = [set(part.FILES) for part in FORMATS.values()]
    assert not any(a <= b for a in sets for b in sets if a is not b)


def test_a_folder_without_the_files_says_what_lies_in_it(tmp_path):
    save_as(made("topk"), tmp_path / "runs/one", "sparsify")
    with pytest.raises(ValueError, match=r"sparsify: cfg.json and sae.safetensors.*in it lie one"):
        sae_lib.load(tmp_path / "runs")


def test_what_is_there_is_not_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="path must be new"):
        save_as(made("topk"), tmp_path, "sae_lens")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("sae_lib.formats.sae_lens.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        save_as(made("topk"), tmp_path / "sae", "sae_lens")
    assert not list(tmp_path.iterdir())


def test_an_unknown_format_lists_those_that_are_known(tmp_path):
    with pytest.raises(ValueError, match="one of sae_lib, sae_lens, dictionary_learning, sparsify, gemma_scope"):
        save_as(made("topk"), tmp_path / "sae", "saelens")


@pytest.mark.parametrize("format", EXPRESSES)
def test_variants_that_only_we_have_are_refused_with_the_reason(format, tmp_path):
    for sae, reason in (
        (sae_lib.GBASAE(4, 12), "each token's norm"),
        (sae_lib.EquivariantSAE(4, 12, 3), "another pose"),
    ):
        with pytest.raises(ValueError, match=reason):
            save_as(sae, tmp_path / "sae", format)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("first", EXPRESSES)
@pytest.mark.parametrize("second", EXPRESSES)
def test_from_format_to_format_codes_stay(first, second, tmp_path):
    for name in sorted(EXPRESSES[first] & EXPRESSES[second]):
        sae = made(name)
        there = sae_lib.load(save_as(sae, tmp_path / name, first))
        back = sae_lib.load(save_as(there, tmp_path / f"{name} again", second))
        assert torch.allclose(back.encode(X), sae.encode(X), atol=1e-6)
        assert torch.allclose(back(X), sae(X), atol=1e-6)


def test_names_of_the_examples_begin_with_their_variants():
    assert {name.split(",")[0] for name in SETTINGS} <= set(sae_lib.VARIANTS)
