"""Records and planted dictionaries."""

import itertools
import json
import sys

import pytest
import torch

from sae_lib import TopKSAE
from sae_lib.data import PlantedDictionary, load_texts
from sae_lib.records import Record, Span

# Texts ----------------------------------------------------------------------------------------------------------------

COWS = Record("Anna saw the cows.", marked="⟨name|Anna⟩ ⟨verb see|saw⟩ the ⟨noun cow|cows⟩.")


def test_marks_become_spans_with_the_meant_value():
    assert COWS.spans == (Span(0, 4, "name", "Anna"), Span(5, 8, "verb", "see"), Span(13, 17, "noun", "cow"))
    assert Record("no marks").spans == ()


def test_each_token_gets_the_span_that_it_is_part_of():
    name, verb, noun = COWS.spans
    offsets = [(0, 0), (0, 2), (2, 4), (5, 8), (9, 12), (13, 17), (17, 18)]  # BOS, An, na, saw, the, cows, full stop
    assert COWS.align(offsets) == [None, name, name, verb, None, noun, None]
    touching = Record("CD", marked="⟨letter|C⟩⟨letter|D⟩")
    assert touching.align([(0, 1), (1, 2)]) == list(touching.spans)


def test_embedded_records_know_their_register_and_their_latent_variables():
    stories = load_texts("pocket", split="validation", register="story", limit=20)
    assert len(stories) == 20
    for story in stories:
        assert story.register == "story"
        assert story.language == "en"
        assert "⟨" not in story.text
        assert story.names[0] in story.text
        assert {"name", "noun", "verb"} <= {span.slot for span in story.spans}
    spanish = [record for record in load_texts("pocket", "validation", "foreign") if record.language == "es"]
    assert all(record.tense is None for record in spanish)
    assert spanish


def test_strings_and_files_are_plain_records(tmp_path):
    assert load_texts(iter(["one", "two", "three"]), limit=2) == [Record("one"), Record("two")]
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "one\ntwo", "more": 1}) + "\n")
    assert load_texts(tmp_path / "a.txt") == [Record("one"), Record("two")]
    assert load_texts(str(tmp_path / "a.jsonl")) == [Record("one\ntwo")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "pockte"}, r"org/name, got 'pockte'; nearest: pocket"),
        ({"source": "folder/a.txt"}, r"org/name, got 'folder/a.txt'"),
        ({"split": "dev"}, "split must be one of train, validation, test, got 'dev'"),
        ({"split": "test", "register": "poem"}, "register must be one of code, fact, foreign, prose, .*, got 'poem'"),
        ({"source": []}, "texts must not be empty, got 0"),
        ({"source": ["", " "]}, "texts must not be empty, got 2"),
        ({"source": "org/name"}, "limit must be given for a data set of the Hub such as 'org/name'"),
    ],
)
def test_texts_that_cannot_be_are_refused_with_rule_value_and_remedy(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_texts(**arguments)


def test_a_missing_file_is_refused_with_those_that_are_there(tmp_path):
    (tmp_path / "stories.txt").write_text("one")
    with pytest.raises(ValueError, match=r"nearest: stories.txt"):
        load_texts(tmp_path / "storys.txt")
    (tmp_path / "bad.jsonl").write_text('{"texts": 1}')
    with pytest.raises(ValueError, match="must be a JSON object with the key 'text'"):
        load_texts(tmp_path / "bad.jsonl")
    (tmp_path / "latin.txt").write_bytes("né".encode("latin-1"))
    with pytest.raises(ValueError, match="texts must be in UTF-8, got .*latin.txt"):
        load_texts(tmp_path / "latin.txt")


def test_a_hub_name_streams_the_asked_number_of_texts(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, split, streaming):
        asked.append((name, split, streaming))
        return datasets.IterableDataset.from_generator(lambda: ({"text": str(number)} for number in itertools.count()))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_texts("org/name", split="train", limit=3) == [Record("0"), Record("1"), Record("2")]
    assert asked == [("org/name", "train", True)]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        load_texts("org/name", limit=3)


def test_a_folder_that_stands_in_for_the_hub_has_its_splits_without_empty_texts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/name").mkdir(parents=True)
    for split in ("train", "test"):
        lines = [json.dumps({"text": text, "meta": 1}) + "\n" for text in (f"{split} 0", "", " ", f"{split} 3", "more")]
        (tmp_path / "org/name" / f"{split}.jsonl").write_text("".join(lines))
    for split in ("train", "test"):
        assert load_texts("org/name", split, limit=2) == [Record(f"{split} 0"), Record(f"{split} 3")]
    with pytest.raises(ValueError, match="Bad split: validation"):
        load_texts("org/name", "validation", limit=2)
    (tmp_path / "org/other").mkdir()
    (tmp_path / "org/other/train.jsonl").write_text(json.dumps({"content": "one"}) + "\n")
    with pytest.raises(ValueError, match="'org/other' must have a column 'text' of strings, got content"):
        load_texts("org/other", limit=2)


# Planted dictionaries -------------------------------------------------------------------------------------------------


def take(stream, n):
    return list(itertools.islice(stream, n))


@pytest.mark.parametrize("n_features", [1, 8, 20, 32])
def test_directions_are_orthonormal_where_they_fit(n_features):
    directions = PlantedDictionary(n_features, 32, active=1.0).directions
    assert torch.allclose(directions @ directions.T, torch.eye(n_features), atol=1e-5)


@pytest.mark.parametrize(("n_features", "d_in", "largest"), [(64, 32, 0.19), (512, 64, 0.25), (3, 2, 0.51)])
def test_directions_are_unit_and_nearly_as_even_as_possible_where_they_do_not_fit(n_features, d_in, largest):
    directions = PlantedDictionary(n_features, d_in).directions
    assert torch.allclose(directions.norm(dim=1), torch.ones(n_features))
    cosines = (directions @ directions.T).fill_diagonal_(0).abs()
    assert ((n_features - d_in) / (d_in * (n_features - 1))) ** 0.5 < cosines.max() < largest  # Welch's bound, and ours


DICTIONARIES = {
    "plain": {},
    "zipf": {"zipf": 0.5},
    "exclusive children": {"zipf": 0.5, "hierarchy": (3,)},
    "independent grandchildren": {"hierarchy": (2, 2), "exclusive": False},
    "correlated": {"zipf": 0.5, "correlation": 0.6},
    "all at once": {"zipf": 0.5, "hierarchy": (3, 2), "correlation": 0.3, "noise": 0.1},
}
each_dictionary = pytest.mark.parametrize("arguments", DICTIONARIES.values(), ids=DICTIONARIES)


@each_dictionary
def test_features_fire_as_often_as_said(arguments):
    dictionary = PlantedDictionary(40, 16, active=3.0, **arguments)
    assert dictionary.frequencies.sum().item() == pytest.approx(3, rel=1e-5)
    assert (dictionary.frequencies.diff() <= 1e-6).all()  # the most frequent first
    n = 40_000
    _, coefficients = dictionary.sample(n)
    expected = dictionary.frequencies
    error = (coefficients != 0).float().mean(0) - expected
    assert (error.abs() < 4.5 * (expected * (1 - expected) / n).sqrt()).all()


@each_dictionary
def test_activations_are_the_coefficients_times_the_directions_plus_noise(arguments):
    dictionary = PlantedDictionary(40, 16, **arguments)
    x, coefficients = dictionary.sample(20_000)
    noise = x - coefficients @ dictionary.directions
    assert noise.square().sum(1).mean().sqrt().item() == pytest.approx(arguments.get("noise", 0), abs=1e-3)
    assert (coefficients >= 0).all()


def test_zipf_by_hand():
    frequencies = PlantedDictionary(3, 3, active=1.1, zipf=1.0).frequencies  # 1 : 1/2 : 1/3 = 6 : 3 : 2 of 11
    assert frequencies.tolist() == pytest.approx([0.6, 0.3, 0.2])


def test_hierarchy_by_hand():
    dictionary = PlantedDictionary(8, 8, active=1.5, hierarchy=(2,))  # two trees of three features, two roots without
    assert dictionary.parents.tolist() == [-1, -1, -1, -1, 0, 0, 1, 1]
    frequencies = [0.28125] * 4 + [0.09375] * 4  # a child a third as often as its parent, 1.5 = 4p + 4p/3
    assert dictionary.frequencies.tolist() == pytest.approx(frequencies)
    deeper = PlantedDictionary(9, 9, active=1.0, hierarchy=(1, 2))
    assert deeper.parents.tolist() == [-1, -1, -1, 0, 1, 3, 3, 4, 4]
    p = deeper.frequencies
    assert (p[3] / p[0]).item() == pytest.approx(1 / 2)
    assert (p[5] / p[3]).item() == pytest.approx(1 / 3)


@pytest.mark.parametrize("exclusive", [True, False])
def test_a_child_fires_only_if_its_parent_does_and_siblings_exclude_each_other_or_are_independent(exclusive):
    dictionary = PlantedDictionary(21, 21, active=6.0, hierarchy=(2, 3), exclusive=exclusive)
    fires = dictionary.sample(20_000)[1] != 0
    children = (dictionary.parents >= 0).nonzero().squeeze(1)
    assert (fires[:, children] <= fires[:, dictionary.parents[children]]).all()
    for parent in dictionary.parents[children].unique():
        siblings = fires[fires[:, parent]][:, dictionary.parents == parent].float()
        together, expected = (siblings[:, 0] * siblings[:, 1]).mean(), siblings[:, 0].mean() * siblings[:, 1].mean()
        assert together == 0 if exclusive else abs(together - expected) < 0.02


def test_samples_of_several_levels_draw_one_each_and_all_frequencies_follow_it():
    mixed = PlantedDictionary(40, 16, active=(2, 10), zipf=0.3)
    assert mixed.frequencies.sum().item() == pytest.approx(6, rel=1e-5)
    fires = mixed.sample(40_000)[1] != 0
    assert ((fires.float().mean(0) - mixed.frequencies).abs() < 0.012).all()
    counts = torch.cat([PlantedDictionary(40, 16, active=a, zipf=0.3).sample(20_000)[1] != 0 for a in (2, 10)]).sum(1)
    assert fires.sum(1).float().std().item() == pytest.approx(counts.float().std().item(), rel=0.02)
    correlated = PlantedDictionary(40, 16, active=(2, 10), correlation=0.5).sample(20_000)[1] != 0
    assert correlated.sum(1).float().mean().item() == pytest.approx(6, abs=0.2)


def test_random_directions_are_the_same_before_they_are_spread_and_have_a_stream_of_their_own():
    random, even = (PlantedDictionary(64, 32, even=even) for even in (False, True))
    assert torch.allclose(random.directions.norm(dim=1), torch.ones(64))
    largest = [(one.directions @ one.directions.T).fill_diagonal_(0).abs().max() for one in (random, even)]
    assert largest[0] > 0.5 > 0.2 > largest[1]
    assert random.batches(8).fingerprint != even.batches(8).fingerprint


def test_unit_samples_are_the_same_samples_over_their_norms_and_empty_ones_stay_empty():
    arguments = {"n_features": 12, "d_in": 8, "active": 1.5, "even": False}
    (x, truth), (x_unit, truth_unit) = (PlantedDictionary(**arguments, unit=unit).sample(500) for unit in (False, True))
    norms = x.norm(dim=1)
    assert (norms == 0).any()
    assert torch.equal(x_unit[norms == 0], x[norms == 0])
    assert torch.allclose(x_unit[norms > 0].norm(dim=1), torch.tensor(1.0))
    assert torch.allclose(x_unit * norms[:, None], x, atol=1e-6)
    assert torch.allclose(truth_unit @ PlantedDictionary(**arguments).directions, x_unit, atol=1e-6)
    assert torch.equal(truth_unit > 0, truth > 0)
    fingerprints = {PlantedDictionary(**arguments, unit=unit).batches(8).fingerprint for unit in (False, True)}
    assert len(fingerprints) == 2


def test_correlation_ties_the_roots_and_nothing_else_does():
    def largest_correlation(**arguments):
        fires = (PlantedDictionary(20, 20, active=6.0, **arguments).sample(20_000)[1] != 0).float()
        return torch.corrcoef(fires.T).fill_diagonal_(0).abs().max()

    assert largest_correlation() < 0.04
    assert largest_correlation(zipf=0.3) < 0.04
    assert largest_correlation(correlation=0.9) > 0.3


def test_magnitudes_have_mean_one_and_the_spread_asked_for():
    for spread in (0.0, 0.25):
        _, coefficients = PlantedDictionary(10, 10, active=5.0, spread=spread).sample(10_000)
        magnitudes = coefficients[coefficients != 0]
        assert magnitudes.mean().item() == pytest.approx(1, abs=0.01)
        assert magnitudes.std().item() == pytest.approx(spread, abs=0.01)


def test_the_same_seed_gives_the_same_dictionary_and_samples_and_another_one_others():
    same, again, other = (PlantedDictionary(12, 8, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(same.directions, again.directions)
    assert not torch.equal(same.directions, other.directions)
    assert torch.equal(same.sample(5)[0], again.sample(5)[0])
    assert not torch.equal(same.sample(50, seed=0)[0], same.sample(50, seed=1)[0])


def test_a_seed_shared_with_an_sae_does_not_give_away_the_directions():
    directions = PlantedDictionary(32, 32, seed=0).directions
    start = TopKSAE(32, 32, k=3, seed=0).W_dec.detach()
    assert (directions * start).sum(1).abs().max() < 0.7  # of unrelated unit vectors in 32 dimensions


def test_a_stream_starts_anew_each_time_and_goes_on_without_repeating_itself():
    dictionary = PlantedDictionary(12, 8)
    stream = dictionary.batches(32, seed=5)
    first, second = take(stream, 3), take(stream, 3)
    for batch, again in zip(first, second, strict=True):
        assert torch.equal(batch.x, again.x)
        assert torch.equal(batch.truth, again.truth)
    assert not torch.equal(first[0].x, first[1].x)
    assert torch.equal(first[0].x, dictionary.sample(32, seed=5)[0])
    assert (stream.d_in, stream.batch_size, first[0].x.shape, first[0].truth.shape) == (8, 32, (32, 8), (32, 12))


def test_fingerprints_tell_streams_of_different_samples_apart():
    dictionary = PlantedDictionary(12, 8)
    assert dictionary.batches(32).fingerprint == PlantedDictionary(12, 8).batches(64).fingerprint
    streams = [
        dictionary.batches(32),
        dictionary.batches(32, seed=1),
        PlantedDictionary(12, 8, seed=1).batches(32),
        PlantedDictionary(12, 8, zipf=0.1).batches(32),
    ]
    assert len({stream.fingerprint for stream in streams}) == 4
    streams[0].seed = 1  # as train(seed=1) does
    assert streams[0].fingerprint == streams[1].fingerprint


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_features": 0}, "n_features must consist of integers of at least 1, got 0"),
        ({"d_in": 2.5}, "d_in must consist of integers of at least 1, got 2.5"),
        ({"hierarchy": (3, 0)}, "hierarchy must consist of integers of at least 1, got 3, 0"),
        ({"hierarchy": 3}, r"hierarchy must be a tuple of integers, such as \(4,\), got 3"),
        ({"hierarchy": (3, 3)}, r"n_features must be at least 13, a tree of hierarchy=\(3, 3\), got 12"),
        ({"active": 0}, r"active must be in \(0, n_features=12\], got 0"),
        ({"active": 13}, r"active must be in \(0, n_features=12\], got 13"),
        ({"active": (3, 13)}, r"active must be in \(0, n_features=12\], got \(3, 13\)"),
        ({"active": ()}, r"active must be in \(0, n_features=12\], got \(\)"),
        ({"active": float("nan")}, r"active must be in \(0, n_features=12\], got nan"),
        ({"active": 6.0, "zipf": 1.0}, "feature 0 would fire with probability 1.93; lower active, zipf"),
        ({"zipf": -1}, "zipf must be a finite number of at least 0, got -1"),
        ({"noise": float("inf")}, "noise must be a finite number of at least 0, got inf"),
        ({"spread": -0.1}, "spread must be a finite number of at least 0, got -0.1"),
        ({"correlation": 1.0}, r"correlation must be in \[0, 1\), got 1.0"),
    ],
)
def test_a_dictionary_that_cannot_be_is_refused_with_rule_value_and_remedy(arguments, message):
    with pytest.raises(ValueError, match=message):
        PlantedDictionary(**({"n_features": 12, "d_in": 8} | arguments))


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize("batches", [0, 1, 5])
def test_a_stream_goes_on_where_another_stood(batches):
    dictionary = PlantedDictionary(12, 8, active=2, noise=0.1, correlation=0.3)
    stream, other = dictionary.batches(32, seed=5), dictionary.batches(32, seed=5)
    iterator = iter(stream)
    for _ in range(batches):
        next(iterator)
    state = {name: value.clone() for name, value in stream.state_dict().items()}
    expected = take(iterator, 3)
    take(other, 2)
    other.load_state_dict(state)
    assert torch.equal(other.state_dict()["generator"], state["generator"]), "loaded, and not yet iterated over"
    for mine, theirs in zip(take(other, 3), expected, strict=True):
        assert torch.equal(mine.x, theirs.x) and torch.equal(mine.truth, theirs.truth)
    assert torch.equal(take(other, 1)[0].x, take(stream, 1)[0].x), "the next one starts anew"


def test_a_stream_refuses_the_state_of_other_samples():
    dictionary = PlantedDictionary(12, 8, active=2)
    with pytest.raises(ValueError, match="same dictionary and seed"):
        dictionary.batches(32, seed=1).load_state_dict(dictionary.batches(32, seed=2).state_dict())


def test_samples_and_batches_of_nothing_are_refused():
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        PlantedDictionary(12, 8).sample(0)
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, got 0"):
        PlantedDictionary(12, 8).batches(0)
