"""Descriptions of experiments: what they mean, and what is wrong with a wrong one."""

from pathlib import Path

import pytest
import yaml

from sae_lib import results
from sae_lib.experiments import described, experiments, rows
from sae_lib.results import ResultsError, sha256_of

WORLD = {"planted": {"n_features": 8, "d_in": 4, "active": 2}, "batch_size": 32, "held": 100}


def one(**changes) -> dict:
    """A description of one experiment with two SAEs at two settings."""
    return {
        "version": 1,
        "ground": "world",
        "settings": [{"target": 1, "d_sae": 8}, {"target": 2, "d_sae": 8}],
        "saes": {
            "TopK": {"variant": "topk", "k": "target"},
            "ReLU": {"variant": "relu", "l1_coeff": {"match": "target", "start": 0.3}},
        },
        "measures": ["reconstruction"],
        "scales": {"smoke": {"tokens": 100, "seeds": 1}, "pocket": {"tokens": 1000, "seeds": 5}},
    } | changes


def write(folder: Path, **changes) -> Path:
    path = folder / "experiments.yml"
    content = {"grounds": {"world": WORLD}, "chapter": {"name": one(**changes)}}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_settings_and_saes_are_multiplied_and_names_of_settings_replaced(tmp_path):
    (experiment,) = experiments("chapter", "pocket", write(tmp_path))
    arguments = [(sae.label, sae.configuration["arguments"]) for sae in experiment.saes]
    assert arguments == [
        ("TopK", {"d_sae": 8, "k": 1}),
        ("ReLU", {"d_sae": 8, "l1_coeff": {"match": 1, "start": 0.3}}),
        ("TopK", {"d_sae": 8, "k": 2}),
        ("ReLU", {"d_sae": 8, "l1_coeff": {"match": 2, "start": 0.3}}),
    ]
    assert (experiment.seeds, experiment.saes[0].tokens) == (5, 1000)


def test_a_scale_replaces_what_it_names_and_an_experiment_without_it_is_left_out(tmp_path):
    path = write(tmp_path, scales={"paper": {"tokens": 7, "seeds": 2, "settings": [{"target": 4, "d_sae": 99}]}})
    (experiment,) = experiments("chapter", "paper", path)
    assert [sae.setting for sae in experiment.saes] == [{"target": 4, "d_sae": 99}] * 2
    assert experiments("chapter", "pocket", path) == []


def test_what_is_costly_is_kept_to_a_part_of_the_grid(tmp_path):
    saes = {"TopK": {"variant": "topk", "k": "target"}, "one": {"variant": "topk", "k": 1, "only": {"target": 1}}}
    measures = ["reconstruction", {"recovery": {"target": 2}}]
    (experiment,) = experiments("chapter", "pocket", write(tmp_path, saes=saes, measures=measures))
    assert [(s.label, s.setting["target"], s.configuration["measures"]) for s in experiment.saes] == [
        ("TopK", 1, ["reconstruction"]),
        ("one", 1, ["reconstruction"]),
        ("TopK", 2, ["reconstruction", "recovery"]),
    ]


def test_a_ground_that_follows_a_setting_is_one_for_each_of_its_values(tmp_path):
    path = write(tmp_path, settings=[{"d_in": 4, "k": 1}, {"d_in": 4, "k": 2}, {"d_in": 5, "k": 1}])
    content = yaml.safe_load(path.read_text())
    content["grounds"]["world"]["planted"]["d_in"] = "d_in"
    content["chapter"]["name"]["saes"] = {"TopK": {"variant": "topk", "d_sae": 8, "k": "k"}}
    path.write_text(yaml.safe_dump(content))
    four, five = experiments("chapter", "pocket", path)
    assert [len(one.saes) for one in (four, five)] == [2, 1]
    assert [one.ground["planted"]["d_in"] for one in (four, five)] == [4, 5]
    assert {sae.configuration["ground"]["planted"]["d_in"] for sae in four.saes} == {4}
    assert four.name == five.name == "name"


def test_the_searched_argument_is_filled_in_when_the_sae_is_made(tmp_path):
    (experiment,) = experiments("chapter", "pocket", write(tmp_path))
    name, search = experiment.saes[1].search
    assert (name, search.target, search.guess, search.slope) == ("l1_coeff", 1, 0.3, -1.5)
    assert experiment.saes[1].make(4, 3, {"l1_coeff": 0.7}).l1_coeff == 0.7
    assert experiment.saes[0].search is None


def test_controls_are_made(tmp_path):
    saes = {
        "frozen": {"variant": "topk", "k": "target", "control": "frozen decoder"},
        "untrained": {"variant": "topk", "k": "target", "control": "untrained"},
    }
    (experiment,) = experiments("chapter", "pocket", write(tmp_path, saes=saes))
    frozen, untrained = (sae.make(4, 0, {}) for sae in experiment.saes[:2])
    assert not frozen.W_dec.requires_grad
    assert untrained.learning_rate == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ground": "moon"}, "ground must be one of world, got 'moon'"),
        ({"measures": ["reconstruction", "beauty"]}, "measures must be among .* got beauty"),
        ({"saes": {"A": {"variant": "tapk", "k": 1}}}, "variant of A must be one of relu, .* got 'tapk'"),
        ({"saes": {"A": {"variant": "topk", "k": 1, "l1_coeff": 2}}}, "A takes .* got l1_coeff"),
        ({"saes": {"A": {"variant": "topk", "k": 1, "control": "asleep"}}}, "control of A must be one of .* 'asleep'"),
        ({"saes": {"A": {"variant": "relu", "l1_coeff": {"match": 3}}}}, "match: L0, start: guess"),
        ({"scales": {"pocket": {"seeds": 1}}}, "got none of tokens"),
        ({"colour": "red"}, "got colour"),
        ({"settings": 3}, "not iterable"),
    ],
)
def test_a_wrong_description_is_named_with_its_rule(tmp_path, changes, message):
    with pytest.raises(ValueError, match=f"chapter/name at scale pocket: .*{message}"):
        experiments("chapter", "pocket", write(tmp_path, **changes))


def test_unknown_chapters_and_scales_are_named_with_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="chapter must be one of chapter, got 'chaptr'; nearest: chapter"):
        experiments("chaptr", "pocket", write(tmp_path))
    with pytest.raises(ValueError, match="scale must be one of smoke, pocket, paper, got 'reader'"):
        experiments("chapter", "reader", write(tmp_path))


def test_every_committed_description_can_be_planned():
    for chapter in described():
        if chapter != "grounds":
            for scale in ("smoke", "pocket", "paper"):
                for experiment in experiments(chapter, scale):
                    configurations = [sha256_of(sae.configuration) for sae in experiment.saes]
                    assert len(set(configurations)) == len(configurations), "two SAEs are the same"
                    if scale == "pocket":
                        assert experiment.seeds >= (10 if "planted" in experiment.ground else 5)


def test_rows_of_another_configuration_are_not_read(tmp_path):
    path = write(tmp_path)
    (experiment,) = experiments("chapter", "pocket", path)
    row = {
        "version": 1,
        "seed": 0,
        "metrics": {"fvu": 0.5},
        "noise": {},
        "unmeasured": {},
        "found": {},
        "seconds": 1,
        "date": "today",
    }
    for sae in experiment.saes[:2]:
        made = {"experiment": "name", "sae": sae.label, "setting": sae.setting, "configuration": sae.configuration}
        results.append("chapter", "pocket", [row | made | {"environment": {}}], tmp_path)
    assert [r["sae"] for r in rows("chapter", "pocket", tmp_path, path)] == ["TopK", "ReLU"]
    changed = {"TopK": {"variant": "topk", "k": "target"}, "ReLU": {"variant": "relu", "l1_coeff": 0.4}}
    assert [r["sae"] for r in rows("chapter", "pocket", tmp_path, write(tmp_path, saes=changed))] == ["TopK"]
    with pytest.raises(ResultsError, match="got 2 rows of others; to make them: python -m sae_lib reproduce"):
        rows("chapter", "pocket", tmp_path, write(tmp_path, version=2))


def test_a_reading_is_that_of_the_variant_or_what_is_asked_for_and_stands_in_no_other_configuration(tmp_path):
    saes = {
        "TopK": {"variant": "topk", "k": 1},
        "g-SAE": {"variant": "gradient", "k": 1},
        "E-SAE": {"variant": "equivariant", "k": 1, "mode": "search"},
        "crosscoder": {"variant": "topk", "k": 1, "reading": "stacked"},
        "matrix": {"variant": "matrix", "pairs": "shuffled"},
    }
    path = write(tmp_path, settings=[{"d_sae": 8}], saes=saes)
    (experiment,) = experiments("chapter", "pocket", path)
    assert [sae.reading for sae in experiment.saes] == ["", "grad", "orbit", "stacked", ""]
    assert [sae.label for sae in experiment.saes if "reading" in sae.configuration] == ["crosscoder"]
    assert experiment.saes[4].configuration["arguments"] == {"pairs": "shuffled"}
    with pytest.raises(ValueError, match="matrix takes network, pairs, got k"):
        experiments("chapter", "pocket", write(tmp_path, saes={"matrix": {"variant": "matrix", "k": 1}}))


# Another model, other sizes -------------------------------------------------------------------------------------------

WORDS = {"model": "pocket", "site": "blocks.1.hook_resid_post", "texts": "pocket", "limit": 9}
WORDS |= {"batch_size": 32, "held": 100}


def of_words(folder: Path, **changes):
    """The experiments that such changes make of one on a language model, in which one SAE trains longer."""
    saes = one()["saes"] | {"longer": {"variant": "topk", "k": "target", "tokens": 3000, "only": {"target": 1}}}
    content = {"grounds": {"world": WORLD, "words": WORDS}, "chapter": {"on a world": one()}}
    content["chapter"]["on words"] = one(ground="words", saes=saes)
    path = folder / "experiments.yml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return experiments("chapter", "pocket", path, changes)


def test_changes_are_of_language_models_and_reach_grid_ground_and_every_length(tmp_path):
    assert [experiment.name for experiment in of_words(tmp_path)] == ["on a world", "on words"]
    (experiment,) = of_words(tmp_path, model="gpt2", site="blocks.0.hook_resid_post", tokens=500, d_sae=40, target=3)
    assert experiment.ground == WORDS | {"model": "gpt2", "site": "blocks.0.hook_resid_post"}
    assert [(sae.label, sae.tokens) for sae in experiment.saes] == [("TopK", 500), ("ReLU", 500), ("longer", 1500)]
    arguments = {"d_sae": 40, "k": 3}
    assert [sae.configuration["arguments"] for sae in experiment.saes[::2]] == [arguments, arguments]
    assert experiment.saes[1].search[1].target == 3


def test_of_other_texts_the_first_are_held_out(tmp_path):
    (experiment,) = of_words(tmp_path, texts="org/texts", limit=50_000)
    assert experiment.ground == WORDS | {"texts": "org/texts", "limit": 50_000, "held_texts": 1000}
    assert of_words(tmp_path, texts="a.txt", held_texts=7)[0].ground["held_texts"] == 7
    assert set(of_words(tmp_path, texts="pocket")[0].ground) == set(WORDS) - {"limit"}


def test_what_cannot_be_changed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="changes must be among model, site, .* got colour"):
        of_words(tmp_path, colour="red")
    with pytest.raises(ValueError, match="tokens can be changed of a language model, got chapter at scale pocket"):
        experiments("chapter", "pocket", write(tmp_path), {"tokens": 5})
