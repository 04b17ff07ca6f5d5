"""Verdicts come from numbers alone: each kind of claim by hand, every verdict of the book from its results."""

import math
import re

import pytest
import yaml
from made_claims import PAPERS, VALUE, described, in_range, one, pairs, row

from sae_lib import experiments, results
from sae_lib.claims import KNOWN, PREDICTIONS, WORDS, checked, judge, p_value, read_claims, verdicts
from sae_lib.results import ResultsError

NUMBERS = {
    "atm": [*map(str, range(1, 11))],
    "choice": [*map(str, range(1, 12))],
    "gradient": [*map(str, range(1, 8)), "k1", "k2", "k3", "k4", "k5"],
    "equivariant": [*map(str, range(1, 10)), *(f"k{number}" for number in range(1, 8))],
    "neuron_embeddings": [*map(str, range(1, 11))],
    "gba": [*map(str, range(1, 10))],
    "baselines": [*map(str, range(1, 7))],
    "metrics": [*map(str, range(1, 6))],
}
"""The claims of each paper; one that is split has several entries."""


# Each kind by hand: three seeds that are 1 apart have an interval of 4.303 / sqrt(3) = 2.484 on either side ----------


@pytest.mark.parametrize(
    ("differences", "changes", "word"),
    [
        ((9, 10, 11), {}, "holds"),
        ((-9, -10, -11), {}, "fails"),
        ((1, 2, 3), {}, "inconclusive"),
        ((-9, -10, -11), {"prediction": "lower"}, "holds"),
        ((9, 10, 11), {"prediction": "lower"}, "fails"),
        ((9, 10, 11), {"margin": 7.5}, "holds"),
        ((9, 10, 11), {"margin": 7.6}, "inconclusive"),
        ((9, 10, 11), {"margin": 12.5}, "fails"),
        ((-9, -10, -11), {"prediction": "lower", "margin": 7.5}, "holds"),
        ((-1, 0, 1), {"kind": "non-inferiority", "margin": 2.5}, "holds"),
        ((-1, 0, 1), {"kind": "non-inferiority", "margin": 2.4}, "inconclusive"),
        ((-9, -10, -11), {"kind": "non-inferiority", "margin": 2.5}, "fails"),
        ((-1, 0, 1), {"kind": "non-inferiority", "margin": 2.5, "prediction": "lower"}, "holds"),
        ((9, 10, 11), {"kind": "non-inferiority", "margin": 2.5, "prediction": "lower"}, "fails"),
        ((9, 10, 11), in_range(7.5, 12.5), "holds"),
        ((9, 10, 11), in_range(7.6, 12.5), "inconclusive"),
        ((9, 10, 11), in_range(7.5, 12.4), "inconclusive"),
        ((9, 10, 11), in_range(0, 7.5), "fails"),
        ((9, 10, 11), in_range(12.5, None), "fails"),
        ((9, 10, 11), in_range(None, 12.5), "holds"),
    ],
)
def test_the_interval_decides_each_kind(differences, changes, word):
    assert one(pairs(*differences), **changes).word == word


def test_mean_interval_and_every_seed_are_kept():
    verdict = one(pairs(9, 10, 11))
    assert verdict.effects == {0: 9.0, 1: 10.0, 2: 11.0}
    assert verdict.mean == 10
    assert verdict.interval == pytest.approx((10 - 2.4841, 10 + 2.4841), abs=1e-4)
    assert verdict.alpha == 0.05


def test_the_smallest_detectable_effect_is_told():
    # t(0.975, 2) + t(0.8, 2) = 4.3027 + 1.0607, times 1 / sqrt(3)
    assert one(pairs(1, 2, 3)).detectable == pytest.approx(3.0965, abs=1e-3)


def test_identity_is_equality_to_the_last_bit():
    identity = {"kind": "identity", "prediction": "equal"}
    assert one(pairs(0, 0, 0), **identity).word == "holds"
    assert one(pairs(0, 0, 0, 1e-15), **identity).word == "fails"
    assert one(pairs(0, 1e-15), **identity).word == "fails"
    assert one(pairs(0, 0), **identity).word == "inconclusive"


def test_two_seeds_decide_nothing():
    verdict = one(pairs(10, 10.001))
    assert (verdict.word, verdict.interval) == ("inconclusive", None)
    assert "needs 3 seeds, there are 2" in verdict.reason


def test_seeds_without_spread_decide_unless_they_lie_on_the_end():
    assert one(pairs(1, 1, 1)).word == "holds"
    assert one(pairs(0, 0, 0)).word == "inconclusive"


def test_a_verdict_changes_with_its_numbers():
    rows = pairs(9, 10, 11)
    assert one(rows).word == "holds"
    for changed in rows:
        changed["m"] = -changed["m"]
    assert one(rows).word == "fails"


# Many claims ---------------------------------------------------------------------------------------------------------


def test_levels_are_adjusted_within_a_paper_over_the_claims_that_have_results():
    far = {seed: effect for seed, effect in enumerate((90.0, 100.0, 110.0))}  # noqa: C416
    rows = [row("A", seed, clear=far[seed], weak=effect) for seed, effect in enumerate((4.0, 5.0, 6.0))]
    claims = [
        checked(described(id=f"{paper}-{i}", paper=paper, **in_range(0, None, metric=metric, **VALUE)), PAPERS)
        for paper, i, metric in [("topk", 1, "weak"), ("topk", 2, "clear"), ("topk", 3, "absent"), ("relu", 1, "weak")]
    ]
    weak, clear, absent, alone = judge(claims, lambda chapter, scale: rows)
    assert (absent.word, absent.alpha) == ("not run", None)
    # p = 2 P(t(2) > 10 sqrt 3) = 0.0033 and 2 P(t(2) > 5 sqrt 3) = 0.0131: the smaller gets 0.05 / 2, then 0.05 / 1
    assert (clear.alpha, weak.alpha, alone.alpha) == (0.025, 0.05, 0.05)
    assert {weak.word, clear.word, alone.word} == {"holds"}


def test_after_a_claim_that_is_not_decided_none_is():
    # p of 2 +- 1 and of 2.9 +- 1 is 0.074 and 0.037: alone the second would hold, beside the first it needs 0.025
    claims = [
        checked(described(id=f"topk-{i}", **in_range(0, None, metric=m, **VALUE)), PAPERS) for i, m in enumerate("ab")
    ]
    rows = [row("A", seed, a=2.0 + by, b=2.9 + by) for seed, by in enumerate((-1, 0, 1))]
    first, second = judge(claims, lambda chapter, scale: rows)
    assert p_value([1.9, 2.9, 3.9], (0.0, math.inf)) == pytest.approx(0.0374, abs=1e-4)
    assert (first.word, second.word) == ("inconclusive", "inconclusive")
    assert (first.alpha, second.alpha) == (0.025, 0.025)
    assert judge(claims[1:], lambda chapter, scale: rows)[0].word == "holds"


def test_the_nearest_end_decides_the_p_value_and_without_spread_it_is_certain():
    inf = math.inf
    assert p_value([9, 10, 11], (8, 100)) == p_value([9, 10, 11], (8, inf)) == pytest.approx(0.0742, abs=1e-4)
    assert p_value([9, 10, 11], (-90, 12)) == p_value([9, 10, 11], (-inf, 12)) == pytest.approx(0.0742, abs=1e-4)
    assert (p_value([1, 1, 1], (0, inf)), p_value([0, 0, 0], (0, inf))) == (0, 1)


# What is compared ----------------------------------------------------------------------------------------------------


def effects(rows, **test) -> dict[int, float]:
    return one(rows, **in_range(-1e9, 1e9, **test)).effects


def test_seeds_are_paired():
    rows = [row("A", 0, m=1.0), row("A", 1, m=2.0), row("B", 1, m=20.0), row("B", 0, m=10.0), row("B", 7, m=0.0)]
    assert effects(rows) == {0: -9.0, 1: -18.0}


def test_ratio_is_compared_with_one():
    rows = [r for s in range(3) for r in (row("A", s, m=3.0 + s / 1000), row("B", s, m=2.0))]
    assert effects(rows, statistic="ratio") == {0: 1.5, 1: 1.5005, 2: 1.501}
    assert one(rows, test={"statistic": "ratio"}).word == "holds"
    assert one(rows, test={"statistic": "ratio"}, margin=0.6).word == "fails"
    assert effects([row("A", 0, m=1.0), row("B", 0, m=0.0)], statistic="ratio") == {}


def test_a_side_may_have_its_own_metric_and_settings():
    rows = [row("A", 0, m=1.0, n=2.0, width=8), row("A", 0, m=4.0, n=8.0, width=16)]
    assert effects(rows, a={"sae": "A", "width": 16}, b={"sae": "A", "width": 8}) == {0: 3.0}
    assert effects(rows, where={"width": 8}, a={"sae": "A", "metric": "n"}, b={"sae": "A"}) == {0: 1.0}


def test_beyond_subtracts_the_same_elsewhere():
    rows = pairs(5, width=8) + pairs(2, width=16)
    assert effects(rows, where={"width": 8}, beyond={"width": 16}) == {0: 3.0}


def test_spread_is_the_distance_from_the_median_over_seeds():
    rows = [row(*r[:2], m=r[2]) for r in (("A", 0, 1.0), ("A", 1, 5.0), ("A", 2, 6.0))]
    rows += [row("B", seed, m=float(seed)) for seed in range(3)]
    assert effects(rows, statistic="spread") == {0: 3.0, 1: 0.0, 2: 0.0}


def test_curves_are_read_off_in_log_l0_and_not_beyond_their_ends():
    rows = [row("A", 0, m=0.5, l0=8.0), row("A", 0, m=0.9, l0=32.0), row("B", 0, m=0.1, l0=16.0)]
    assert effects(rows, statistic="at_equal_l0", l0=16) == {0: pytest.approx(0.6)}
    assert effects(rows, statistic="at_equal_l0", l0=20) == {}
    rows += [row("A", 1, m=0.5, l0=16.0), row("B", 1, m=0.1, l0=16.0)]  # a curve of one point, where seed 0 has two
    assert list(effects(rows, statistic="at_equal_l0", l0=16)) == [0]
    assert "undefined in every seed" in one(rows, test={"statistic": "at_equal_l0", "l0": 20}).reason


def test_rank_correlation_is_over_saes_and_settings():
    rows = [
        row(sae, 0, m=m, n=n) for sae, m, n in (("A", 1.0, 3.0), ("B", 2.0, 2.0), ("C", 9.0, 1.0), ("D", 10.0, 8.0))
    ]
    asked = {"metric": ["m", "n"], "statistic": "rank_correlation", "a": None, "b": None}
    assert effects(rows, **asked) == {0: pytest.approx(0.2)}  # 1 - 6 * (4 + 0 + 4 + 0) / (4 * 15)
    assert effects(rows, **asked, saes=["A", "B", "C"]) == {0: pytest.approx(-1)}
    assert effects(rows[:2], **asked) == {}


def test_a_seed_that_lacks_one_of_the_saes_is_left_out():
    rows = [row(sae, seed, m=float(ord(sae)), n=1.0 + seed * ord(sae)) for seed in (1, 2) for sae in "ABCD"]
    asked = {"metric": ["m", "n"], "statistic": "rank_correlation", "a": None, "b": None}
    assert effects(rows[1:], **asked) == {2: pytest.approx(1)}
    assert effects(rows[1:], **asked, saes=["B", "C", "D"]) == {1: pytest.approx(1), 2: pytest.approx(1)}


def test_reliability_is_the_share_of_variance_that_is_not_noise():
    rows = [row("A", 0, noise=1.0, m=2.0), row("B", 0, noise=1.0, m=6.0)]  # variance 8, noise 1
    assert effects(rows, statistic="reliability", a=None, b=None) == {0: 1 - 1 / 8}


def test_undefined_numbers_leave_their_seed_out():
    rows = pairs(1, 2, 3, 4)
    rows[0]["m"] = None
    assert effects(rows) == {1: 2.0, 2: 3.0, 3: 4.0}


def test_at_unequal_l0_nothing_is_decided():
    rows = pairs(9, 10, 11)
    for changed in rows[:3]:
        changed["l0"] = 16.4
    assert one(rows, test={"equal": ["l0"]}).word == "holds"
    for changed in rows[:3]:
        changed["l0"] = 16.6
    verdict = one(rows, test={"equal": ["l0"]})
    assert (verdict.word, verdict.effects) == ("inconclusive", {})
    assert verdict.reason == "l0 must be equal within 3% and is not: 16.6 against 16"


@pytest.mark.parametrize(
    ("test", "reason"),
    [
        ({"a": {"sae": "C"}}, "no rows of sae C"),
        ({"where": {"width": 8}}, "no rows of width 8, sae A"),
        ({"metric": "absent"}, "absent was not measured"),
        ({"experiment": "topk/other"}, "topk/other has no rows at this scale"),
        ({"equal": ["absent"]}, "absent was not measured"),
    ],
)
def test_what_is_missing_was_not_run_and_is_named(test, reason):
    verdict = one(pairs(9, 10, 11), test=test)
    assert verdict.word == "not run"
    assert reason in verdict.reason
    assert verdict.claim.command == "python -m sae_lib reproduce topk --scale pocket"


def test_what_could_not_be_measured_says_why():
    rows = pairs(9, 10, 11)
    for changed in rows[:3]:
        del changed["m"]
        changed["unmeasured"] = {"probes": "no letter is represented"}
    verdict = one(rows)
    assert (verdict.word, verdict.reason) == ("inconclusive", "A has no m: no letter is represented")


def test_rows_of_several_settings_are_not_mixed():
    verdict = one(pairs(1, 2, 3, width=8) + pairs(1, 2, 3, width=16))
    assert (verdict.word, "its settings vary" in verdict.reason) == ("not run", True)


# The book's own claims -----------------------------------------------------------------------------------------------


def test_claims_are_well_formed_and_every_claim_of_every_paper_is_there():
    papers, claims = read_claims()
    assert list(papers) == list(NUMBERS)
    numbers = {
        paper: list(dict.fromkeys(re.match(rf"{paper}-(\w+)", claim.id)[1] for claim in claims if claim.paper == paper))
        for paper in papers
    }
    assert {paper: sorted(found) for paper, found in numbers.items()} == {p: sorted(n) for p, n in NUMBERS.items()}
    assert len({claim.statement for claim in claims}) == len(claims)


def test_what_others_report_says_how_it_is_known_and_at_which_l0():
    reported = yaml.safe_load((results.ROOT / "book/reported.yml").read_text())["rows"]
    papers, _ = read_claims()
    for each in reported:
        assert each["paper"] in papers and each["where"]
        assert each["known"] in KNOWN
        assert (each["l0"] is None) == (each["l0_known"] is None)
        assert each["l0_known"] in (None, *KNOWN)
        low, high = each["metrics"].get("absorption", [0, 0])
        assert 0 <= low <= high <= 1
    kinds = [(each["sae"], each["run"]) for each in reported]
    assert len(set(kinds)) == len(kinds)


def test_a_claim_names_a_page_of_the_book():
    later = "atm choice gradient equivariant gba neuron_embeddings evaluation jumprelu gated batchtopk matryoshka"
    pages = {path.stem for path in (results.ROOT / "book").glob("*.ipynb")} | set(later.split())
    _, claims = read_claims()
    assert {claim.chapter for claim in claims} <= pages
    assert {claim.test["experiment"].split("/")[0] for claim in claims} <= pages


def test_a_claim_asks_for_saes_and_settings_that_its_experiment_has():
    chapters = experiments.described()
    for claim in read_claims()[1]:
        chapter, name = claim.test["experiment"].split("/")
        of_chapter = experiments.experiments(chapter, claim.scale) if chapter in chapters else []
        if planned := [sae for each in of_chapter if each.name == name for sae in each.saes]:
            asked = [claim.test[which] for which in "ab" if which in claim.test]
            asked += [{"sae": label} for label in claim.test.get("saes", [])]
            for arm in asked:
                own = {name: value for name, value in arm.items() if name not in ("sae", "metric")}
                settings = [one.setting for one in planned if one.label == arm["sae"]]
                wanted = (claim.test.get("where", {}) | own).items()
                assert any(wanted <= setting.items() for setting in settings), (claim.id, arm)


def rows_for(claim) -> list[dict]:
    chapter = claim.test["experiment"].split("/")[0]
    return experiments.rows(chapter, claim.scale)


def test_every_verdict_is_recomputed_from_the_results_files():
    found = verdicts()
    decided = [verdict for verdict in found if verdict.effects]
    for verdict in found:
        chapter, scale = verdict.claim.test["experiment"].split("/")[0], verdict.claim.scale
        if results.file_of(chapter, scale).exists():
            results.read(chapter, scale)  # a damaged file is an error here, and no mere "not run"
    for paper in {verdict.claim.paper for verdict in decided}:
        family = [verdict for verdict in decided if verdict.claim.paper == paper]
        again = judge([verdict.claim for verdict in family], lambda chapter, scale: experiments.rows(chapter, scale))
        assert again == family


def test_claims_are_older_than_their_results():
    for verdict in verdicts():
        if verdict.effects:
            first = min(each["date"] for each in rows_for(verdict.claim))
            assert str(verdict.claim.date) <= first[:10], verdict.claim.id


def test_without_results_everything_is_not_run(tmp_path):
    assert {verdict.word for verdict in verdicts(tmp_path)} == {"not run"}


def test_a_damaged_file_is_named_and_decides_nothing(tmp_path):
    path = results.file_of("comparison", "pocket", tmp_path)
    path.write_text('{"format": "sae_lib results", "rows": [')
    (verdict, *_) = [v for v in verdicts(tmp_path) if v.claim.test["experiment"] == "comparison/pocket"]
    assert verdict.word == "not run"
    assert "must be a whole results file" in verdict.reason


def test_rows_of_another_version_decide_nothing(tmp_path):
    stored = row("TopK", 0) | {"version": 0, "setting": {"target": 16}, "metrics": {"fvu": 0.2}, "found": {}}
    stored |= {"seconds": 1.0, "date": "2026-11-22", "configuration": {}, "environment": {"commit": "c0ffee"}}
    results.append("comparison", "pocket", [stored | {"experiment": "pocket"}], tmp_path)
    (verdict, *_) = [v for v in verdicts(tmp_path) if v.claim.test["experiment"] == "comparison/pocket"]
    assert verdict.word == "not run"
    assert "must be of the configurations that experiments.yml asks for" in verdict.reason


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"extra": 1}, "fields must be"),
        ({"paper": "nobody"}, "paper must be one of topk, relu"),
        ({"id": "1"}, "id must be topk-<number>"),
        ({"statement": ""}, "statement must be a text"),
        ({"source": "somewhere"}, "source must be a mapping"),
        ({"source": {"where": "somewhere"}}, "source must have where and known"),
        ({"source": {"where": "somewhere", "known": "rumour"}}, "known must be one of paper's body"),
        ({"kind": "hunch"}, "kind must be one of difference"),
        ({"prediction": "within"}, "the prediction of a difference must be higher, lower, got 'within'"),
        ({"margin": -1}, "margin must be a number from 0"),
        (in_range(2, 1), "margin must be [low, high]"),
        (in_range(None, None), "margin must be [low, high]"),
        ({"scale": "reader"}, "scale must be one of"),
        ({"date": "soon"}, "date must be year-month-day"),
        ({"test": {"experiment": "topk"}}, "experiment must be <chapter>/<experiment>, got 'topk'"),
        ({"test": {"statistic": "guess"}}, "statistic must be one of"),
        ({"test": {"maybe": 1}}, "a test has experiment"),
        ({"test": {"b": None}}, "difference takes a and b"),
        ({"test": {"a": {}}}, "a must name its sae"),
        ({"test": {"metric": None}}, "a must have a metric"),
        ({"test": {"metric": ["m", "n"]}}, "metric must be one name, or two for a rank correlation"),
        ({"test": {"l0": 16}}, "l0 belongs to at_equal_l0"),
        ({"test": {"saes": ["A"]}}, "saes belongs to"),
        ({"test": VALUE}, "value has no neutral value: kind must be range"),
        (in_range(0, 1, **VALUE, equal=["l0"]), "equal needs a and b"),
        ({"kind": "identity", "prediction": "equal", "test": {"statistic": "ratio"}}, "an identity compares values"),
    ],
)
def test_a_claim_that_cannot_be_tested_is_refused(changes, said):
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        checked(described(**changes), PAPERS)
    assert str(error.value).startswith(changes.get("id", "topk-1") + ": ")


def test_an_id_is_given_once(tmp_path):
    text = experiments.ROOT.joinpath("book/claims.yml").read_text()
    path = tmp_path / "claims.yml"
    path.write_text(text.replace("- id: atm-2-direction", "- id: atm-1"))
    with pytest.raises(ValueError, match="ids must differ, got atm-1"):
        read_claims(path)


def test_words_and_kinds_are_the_ones_of_the_book():
    assert WORDS == ("holds", "fails", "inconclusive", "not run")
    assert list(PREDICTIONS) == ["difference", "non-inferiority", "range", "identity"]


def test_results_that_cannot_be_had_are_no_error():
    def rows_of(chapter, scale):
        raise ResultsError("there are no results; to make them: a command")

    (verdict,) = judge([checked(described(), PAPERS)], rows_of)
    assert (verdict.word, verdict.reason) == ("not run", "there are no results")
