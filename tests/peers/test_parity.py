"""The comparison with other libraries sees differences, and is complete for each library that it names."""

import pytest
import torch

from peers.parity import KEPT, LIBRARIES, ROOT, differences, file_of_tests, recorded

MAKEFILE = (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("library", LIBRARIES)
def test_each_library_has_a_file_a_record_tests_and_an_environment(library):
    assert (ROOT / f"tests/peers/{library}.py").exists()
    assert file_of_tests(library).exists()
    found, versions = recorded(library, KEPT)
    assert found
    assert LIBRARIES[library] in versions
    (line,) = (line for line in MAKEFILE.splitlines() if line.startswith("PARITY := "))
    assert LIBRARIES[library] in line.split()


def test_records_stay_small():
    assert sum(path.stat().st_size for path in KEPT.iterdir()) < 500_000


def test_differences_are_named():
    kept = {"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(2), "p.trained.W": torch.ones(2)}
    new = {"a": torch.ones(2) + 1e-5, "b": torch.ones(3), "d": torch.ones(2), "p.trained.W": torch.ones(2) + 1e-5}
    assert differences(kept, kept) == []
    assert differences(kept, new) == [
        "a differs by up to 1e-05",
        "b had shape (2,), now has (3,)",
        "c is only in one of the two",
        "d is only in one of the two",
    ]


def test_undefined_numbers_are_equal():
    assert differences({"a": torch.tensor([torch.nan])}, {"a": torch.tensor([torch.nan])}) == []
    assert len(differences({"a": torch.tensor([torch.nan])}, {"a": torch.ones(1)})) == 1
