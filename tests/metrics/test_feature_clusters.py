"""Readings of the same examples, agreement with labels and rare clusters, by hand and on a tiny model."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from tiny_models import tiny_gpt2

from sae_lib.data import load_texts
from sae_lib.metrics.feature_clusters import (
    LABELS,
    Reading,
    agreement,
    drawn,
    feature_clusters,
    measured,
    rare,
    token_labels,
)
from sae_lib.models import load_model
from sae_lib.neuron_embeddings import collect, cosine_distances, cut, embeddings, neurons, proxies, tree
from sae_lib.records import Record

WORDS = ["the cat sings", "a dog sleeps under the moon", "king", "old river", "blue stone , red sun .",
         "the moon sings", "a new king and a queen", "the cat runs over the river", "dog . dog"]  # fmt: skip
RECORDS = [Record(text, register="story" if number % 2 else "fact") for number, text in enumerate(WORDS)]


@pytest.fixture(scope="module")
def model():
    return load_model(tiny_gpt2(), device="cpu")


@pytest.fixture
def some():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(30, 6, generator=generator), torch.randn(8, 6, generator=generator)


# Readings


def distances(h, weights, unit=2):
    return cosine_distances(embeddings(h, weights[unit]))


def test_a_rotation_keeps_activations_and_distances_of_inputs_and_changes_those_of_embeddings(some):
    h, weights = some
    turned, of_turned = Reading(basis="rotated").of(h, weights, seed=1)
    assert torch.allclose(turned @ of_turned.T, h @ weights.T, atol=1e-5)
    assert np.abs(distances(turned, of_turned) - distances(h, weights)).max() > 0.1
    plain, ones = Reading("none").of(h, weights, seed=1)
    turned, of_turned = Reading("none", "rotated").of(h, weights, seed=1)
    assert (ones == 1).all()
    assert (of_turned == 1).all()
    assert distances(turned, of_turned) == pytest.approx(distances(plain, ones), abs=1e-5)


def test_other_weights_are_another_neurons_or_the_same_in_another_order(some):
    h, weights = some
    _, other = Reading("another neuron's").of(h, weights, seed=1)
    assert all(not torch.equal(mine, theirs) for mine, theirs in zip(weights, other, strict=True))
    assert sorted(map(tuple, other.tolist())) == sorted(map(tuple, weights.tolist()))
    _, permuted = Reading("permuted").of(h, weights, seed=1)
    assert torch.equal(permuted.sort(1).values, weights.sort(1).values)
    assert not torch.equal(permuted, weights)
    orders = {
        tuple(one.tolist().index(value) for value in row.tolist()) for one, row in zip(permuted, weights, strict=True)
    }
    assert len(orders) > 4, "each neuron has an order of its own"
    assert not torch.equal(Reading("permuted").of(h, weights, seed=2)[1], permuted)


def test_without_outliers_the_three_dimensions_of_largest_variance_are_gone(some):
    h, weights = some
    h = h * torch.tensor([1.0, 9.0, 1.0, 8.0, 7.0, 1.0])
    kept, of_kept = Reading(basis="no outliers").of(h, weights, seed=0)
    assert sorted(kept.var(0).tolist()) == sorted(h.var(0)[[0, 2, 5]].tolist())
    columns = [h[:, 0].tolist(), h[:, 2].tolist(), h[:, 5].tolist()]
    for mine, column in zip(of_kept.T, kept.T, strict=True):
        assert torch.equal(mine, weights[:, [0, 2, 5][columns.index(column.tolist())]])


def test_an_unknown_reading_is_refused():
    with pytest.raises(ValueError, match="weights must be one of own, none, another neuron's, permuted, got 'mine'"):
        Reading("mine")
    with pytest.raises(ValueError, match="basis must be one of own, rotated, no outliers, got 'none'"):
        Reading(basis="none")


# Labels


def test_labels_are_base_form_and_slot_or_the_token_and_of_the_text_topic_and_register():
    model = load_model("pocket", device="cpu")
    records = [
        record for record in load_texts("pocket", split="test", limit=300) if record.register in ("story", "fact")
    ][:2]
    tokens = model.encode([record.text for record in records])
    labels = token_labels(model, records, [tokens[0], tokens[1][:5]])
    assert [len(of_text) for of_text in labels] == [len(tokens[0]), 5]
    assert labels[0].shape[1] == len(LABELS) == 4
    assert len({*labels[0][:, 2]}) == len({*labels[0][:, 3]}) == 1
    ends = model.tokenizer(records[0].text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    spans = records[0].align(ends)
    named = {}
    for (start, end), span, numbers in zip(ends, spans, labels[0], strict=True):
        names = (span.value, span.slot) if span else (records[0].text[start:end].strip().lower(),) * 2
        for name, number in zip(names, numbers[:2].tolist(), strict=True):
            assert named.setdefault(number, name) == name
    assert len(set(named.values())) == len(named)
    assert any(span is None for span in spans)
    assert any(span is not None for span in spans)


def test_agreement_is_one_for_the_same_classes_and_unknown_where_labels_say_nothing():
    clusters = np.array([0, 0, 0, 1, 1, 1])
    labels = np.stack([np.array([5, 5, 5, 2, 2, 2]), np.array([1, 2, 1, 2, 1, 2]), np.ones(6, dtype=int)], 1)
    found = agreement(clusters, labels)
    assert found[0] == 1
    assert found[1] == pytest.approx(-1 / 9)  # 2 pairs agree, (6 * 6) / 15 = 2.4 by chance, 6 at most: -0.4 / 3.6
    assert math.isnan(found[2])
    assert np.isnan(agreement(clusters[1:5], labels[1:5])).all(), "four examples are too few"
    assert math.isnan(agreement(clusters, np.arange(6)[:, None])[0])


def test_agreement_is_that_of_scikit_learn():
    draws = np.random.default_rng(0)
    for _ in range(20):
        clusters, labels = draws.integers(4, size=30), draws.integers(1, 6, size=(30, 3))
        labels[:, 0] = clusters * (draws.random(30) < 0.8)
        expected = [adjusted_rand_score(label, clusters) for label in labels.T]
        assert agreement(clusters, labels) == pytest.approx(expected)


def test_a_rare_cluster_is_another_behaviour_if_its_most_frequent_label_is():
    clusters = np.array([0] * 38 + [1, 2])
    labels = np.array([7] * 38 + [7, 8])
    found = list(rare(clusters, labels, np.random.default_rng(0)))
    assert found == [(False, False), (True, False)]
    mixed = np.array([7] * 20 + [8] * 18 + [7, 8])
    chance = [pair[1] for seed in range(50) for pair in rare(clusters, mixed, np.random.default_rng(seed))]
    assert 0.3 < np.mean(chance) < 0.65
    assert not list(rare(clusters[:-3], labels[:-3], np.random.default_rng(0))), "one cluster has none beside it"
    assert not list(rare(np.array([0] * 9 + [1]), np.arange(10), np.random.default_rng(0))), "10% is not rare"


# All neurons


def test_one_example_a_distinct_token_takes_the_tokens_identity_away():
    e = torch.tensor([[1.0, 0.0]] * 4 + [[0.0, 1.0]] * 3 + [[1.0, 0.1], [1.0, 0.2], [0.1, 1.0]])
    ids = np.array([5, 5, 5, 5, 6, 6, 6, 7, 8, 9])
    labels = np.array([1, 1, 1, 1, 2, 2, 2, 2, 1, 2])[:, None].repeat(4, 1)
    d = cosine_distances(e)
    found = measured(d, tree(d), 3, labels, ids, np.random.default_rng(0))
    kept = [0, 4, 7, 8, 9]  # the first of each token
    assert found.agreement["_distinct"] == pytest.approx(agreement(np.array([0, 1, 0, 0, 1]), labels[kept]))
    assert found.agreement[""] == pytest.approx(agreement(np.array([0] * 4 + [1] * 3 + [0, 0, 1]), labels))
    assert found.agreement[""][0] > found.agreement["_distinct"][0]
    assert found.distances["clusters"] == 2
    assert found.agreement["_equal"] == pytest.approx(agreement(cut(tree(d), clusters=3), labels))


def test_all_neurons_of_all_layers_are_measured_by_each_reading(model):
    readings = [Reading(), Reading("none"), Reading("none", "rotated")]
    own, alone, turned = feature_clusters(model, RECORDS, readings, seed=3, tokens=1000)
    records, mixed, raw = drawn(model, RECORDS, 1000, 3), [], []
    for layer in range(3):
        units = neurons(model, layer)
        examples = collect(units, records)
        for unit in range(20):
            h = examples.of(unit)[3]
            if len(h) > 1:
                for found, e in ((mixed, embeddings(h, units.weights[unit])), (raw, h)):
                    d = cosine_distances(e)
                    found.append(proxies(d, cut(tree(d))))
    assert own["neurons"] == len(mixed) > 20
    for metrics, found in ((own, mixed), (alone, raw)):
        for name in ("intra_distance", "mean_distance", "clusters"):
            assert metrics[name] == pytest.approx(np.nanmedian(np.array([one[name] for one in found], dtype=float)))
        assert metrics["intra_distance_average"] == pytest.approx(np.nanmean([one["intra_distance"] for one in found]))
    assert own["inter_distance"] == pytest.approx(np.nanmedian([one["inter_distance"] for one in mixed]))
    assert math.isnan(alone["inter_distance"]), "inputs of a random model are alike: one cluster"
    assert turned["intra_distance"] == pytest.approx(alone["intra_distance"], abs=1e-5)
    assert own["intra_distance"] != alone["intra_distance"]
    assert own["rand_index"] == pytest.approx(np.nanmean([own[f"rand_index_{label}"] for label in LABELS]))


def test_the_equal_number_of_clusters_is_between_those_of_embeddings_and_inputs(model, monkeypatch):
    asked = []

    def seen(merges, threshold=0.5, clusters=None):
        asked.append((merges, clusters))
        return cut(merges, threshold, clusters)

    monkeypatch.setattr("sae_lib.metrics.feature_clusters.cut", seen)
    feature_clusters(model, RECORDS[:6], [Reading()], tokens=1000)
    checked = 0
    while asked:
        (own, _), (alone, _), _, (_, clusters), _ = (asked.pop(0) for _ in range(5))
        assert clusters == math.ceil((cut(own).max() + cut(alone).max()) / 2) + 1
        checked += 1
    assert checked > 20


def test_texts_are_drawn_in_an_order_of_the_seed_until_they_have_enough_tokens(model):
    some = drawn(model, RECORDS, 12, seed=0)
    sizes = [len(ids) for ids in model.encode([record.text for record in some])]
    assert sum(sizes) >= 12 > sum(sizes[:-1])
    assert drawn(model, RECORDS, 12, seed=1) != some
    assert len(drawn(model, RECORDS, 1000, seed=0)) == len(RECORDS)


def test_texts_without_two_examples_are_refused(model):
    with pytest.raises(ValueError, match="some neuron must have two examples, got none in 1 texts"):
        feature_clusters(model, RECORDS[:1], [Reading()])
