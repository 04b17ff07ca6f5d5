"""A user's SAE among the book's: read off at its own L0, never beyond what was measured."""

import numpy as np
import pytest

from sae_lib import against, experiments
from sae_lib.against import MEASURES, beside, book_rows, curves, draw
from sae_lib.results import ResultsError

GROUND = {"model": "pocket", "site": "blocks.1.hook_resid_post"}


def row(label, target, seed, fvu, d_sae=1024) -> dict:
    made = {"sae": label, "target": target, "seed": seed, "l0": float(target), "d_sae": d_sae}
    return made | {"fvu": fvu, "kl": fvu / 2, "alive": 1.0, "configuration": {"ground": GROUND}}


ROWS = [row("TopK", target, seed, 0.4 / target + 0.01 * seed) for target in (4, 16) for seed in (0, 2)]
ROWS += [row("PCA", 16, 0, 0.9), row("ReLU", 4, 0, 0.5), row("ReLU", 16, 0, 0.3), row("ReLU", 16, 1, 0.1)]


def test_curves_are_of_what_was_measured_at_several_targets_with_seeds_that_have_all():
    found = curves(ROWS, "fvu")
    assert list(found) == ["TopK", "ReLU"]
    np.testing.assert_allclose(found["TopK"][0], [[4, 4], [16, 16]])
    np.testing.assert_allclose(found["TopK"][1], [[0.1, 0.12], [0.025, 0.045]])
    np.testing.assert_allclose(found["ReLU"][1], [[0.5], [0.3]])  # seed 1 has one target only


def test_a_curve_is_read_at_the_l0_of_the_sae_seed_by_seed():
    mean, half = beside({"l0": 8.0}, ROWS)["TopK"]
    assert mean == pytest.approx(0.0725)  # half way in log L0: .0625 and .0825
    assert half == pytest.approx(12.706 * 0.01, rel=1e-4)  # t of one degree of freedom times s / sqrt(2)


def test_beyond_its_ends_a_curve_says_nothing():
    assert beside({"l0": 30.0}, ROWS) == {"TopK": None, "ReLU": None}


def test_no_curve_is_an_error():
    with pytest.raises(ValueError, match="two or more targets with fvu, got 1 rows"):
        curves([ROWS[0]], "fvu")


def test_book_rows_are_those_of_the_site_and_of_the_width_with_a_curve(monkeypatch):
    wide = [row("TopK", 16, 0, 0.1, d_sae=4096)]
    planted = [row("TopK", 3, 0, 0.1) | {"configuration": {"ground": {"planted": {}}}}]
    rows_of = {"comparison": [*planted, *wide, *ROWS]}
    monkeypatch.setattr(experiments, "rows", lambda chapter, scale: rows_of[chapter] if chapter in rows_of else none())
    assert book_rows("pocket", GROUND["site"]) == ROWS
    with pytest.raises(ValueError, match=r"a curve at blocks.0.hook_out of pocket, it has a planted world, blocks.1"):
        book_rows("pocket", "blocks.0.hook_out")


def none():
    raise ResultsError("there are no results")


def test_the_papers_variants_come_from_the_curves_of_their_chapters(monkeypatch):
    of_atm = [row(label, 16, 0, 0.2) | {"experiment": "pocket"} for label in ("ATM", "TopK")]
    of_atm += [row("ATM", 16, 0, 0.2) | {"experiment": "ablations"}]
    rows_of = {"comparison": ROWS, "atm": of_atm}
    monkeypatch.setattr(
        experiments, "rows", lambda chapter, scale: [*rows_of[chapter]] if chapter in rows_of else none()
    )
    assert book_rows("pocket", GROUND["site"]) == [*ROWS, of_atm[0]]


def test_the_picture_has_a_star_for_each_sae_on_every_measure():
    reports = {
        "mine": {"l0": 8.0, "fvu": 0.07, "kl": 0.03, "alive": 0.5},
        "yours": {"l0": 9.0, "fvu": 0.2, "kl": 0.1, "alive": 1.0},
    }
    figure = draw(reports, ROWS)
    assert [ax.get_ylabel() for ax in figure.axes] == list(MEASURES.values())
    for ax in figure.axes:
        stars = [line for line in ax.lines if line.get_marker() == "*"]
        assert [line.get_xdata()[0] for line in stars] == [8.0, 9.0]
        assert {text.get_text() for text in ax.texts} >= {"mine", "yours"}
    against.plt.close(figure)
