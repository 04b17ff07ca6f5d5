"""Units and their examples, against one text at a time; distances, clusters and proxies, by hand."""

import math

import numpy as np
import pytest
import torch
from tiny_models import tiny_gemma2, tiny_gpt2

from sae_lib import ReLUSAE, TopKSAE, load_texts
from sae_lib.models import load_model
from sae_lib.neuron_embeddings import (
    central,
    collect,
    cosine_distances,
    cut,
    embeddings,
    importance,
    latents,
    neurons,
    proxies,
    similar_clusters,
    tree,
)

TEXTS = [
    "the cat sings", "a dog sleeps under the moon and the queen runs", "king", "old river", "blue stone , red sun .",
    "the moon sings", "a new king and a queen", "the cat runs over the river", "dog . dog . dog", "queen under the sun",
]  # fmt: skip
SITE = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def gpt2():
    return load_model(tiny_gpt2(), device="cpu")


@pytest.fixture(scope="module")
def gemma2():
    return load_model(tiny_gemma2(), device="cpu")


# Units


def test_an_embedding_sums_to_what_a_neuron_of_the_embedded_model_puts_through_its_nonlinearity():
    model = load_model("pocket", device="cpu")
    tokens = model.tokenize([record.text for record in load_texts("pocket", split="test")[:3]])
    units = neurons(model, 2)
    h, a = units.activations(tokens)
    before = model.activations(tokens, "blocks.2.mlp.in.hook_out")
    bias = model.bridge.original_model.transformer.h[2].mlp.c_fc.bias
    for unit in (0, 7, 511):
        e = embeddings(h.flatten(0, 1), units.weights[unit])
        assert torch.allclose(e.sum(1) + bias[unit], before[..., unit].flatten(), atol=1e-4)
    assert torch.allclose(torch.nn.functional.gelu(before, approximate="tanh"), a, atol=1e-5)
    assert len(units) == 512


def test_gate_and_up_weights_of_a_gated_mlp_give_the_neurons_value(gemma2):
    tokens = gemma2.tokenize(TEXTS)
    gate, up = neurons(gemma2, 1), neurons(gemma2, 1, part="up")
    h, a = gate.activations(tokens)
    product = torch.nn.functional.gelu(h @ gate.weights.T, approximate="tanh") * (h @ up.weights.T)
    assert torch.allclose(product, a, atol=1e-5)
    assert a.abs().max() > 0.1
    assert gate.name == "blocks.1.mlp neurons, gate weights"
    assert up.name == "blocks.1.mlp neurons, up weights"
    assert torch.equal(up.activations(tokens)[1], a)


def test_latents_are_read_in_evaluation_and_an_embedding_sums_to_the_score_but_for_the_biases(gpt2):
    sae = TopKSAE(d_in=12, d_sae=20, k=3, seed=1)
    for seed, weights in enumerate((sae.W_enc, sae.b_enc, sae.b_dec)):  # untrained, encoder and decoder are the same
        weights.data.normal_(generator=torch.Generator().manual_seed(seed))
    units, tokens = latents(gpt2, SITE, sae.train()), gpt2.tokenize(TEXTS)
    h, a = units.activations(tokens)
    assert sae.training
    assert torch.equal(h, gpt2.activations(tokens, SITE))
    assert torch.equal(a.flatten(0, 1), sae.eval().encode(h.flatten(0, 1)))
    e = embeddings(h[1], units.weights[4])
    scores = sae.scores(h[1]).dense()[:, 4]
    assert torch.allclose(e.sum(1) - sae.b_dec @ units.weights[4] + sae.b_enc[4], scores, atol=1e-5)
    assert units.name == "TopKSAE, 20 latents, at blocks.1.hook_resid_post"


# Examples


def one_by_one(units, texts, threshold, most):
    """The definition, a text at a time: places and activations of each unit's examples, and frequencies."""
    model, best, active, tokens = units.model, [], 0, 0
    for text in texts:
        a = units.activations(model.tokenize(text))[1][0, 1:]
        best.append(a.max(0))
        active, tokens = active + (a > 0).sum(0), tokens + len(a)
    values = torch.stack([one.values for one in best])
    maximum = values.amax(0).clamp(min=0)
    found = [
        [
            (document, best[document].indices[unit].item(), values[document, unit].item())
            for document in range(len(texts))
            if values[document, unit] > 0 and values[document, unit] >= threshold * maximum[unit]
        ][:most]
        for unit in range(len(units))
    ]
    return found, maximum, active / tokens


@pytest.mark.parametrize("most", [3, 100])
@pytest.mark.parametrize("kind", ["neurons", "latents"])
def test_examples_are_the_first_documents_near_the_maximum_each_at_its_best_token(gpt2, kind, most, monkeypatch):
    monkeypatch.setattr("sae_lib.neuron_embeddings.TOKENS_AT_ONCE", 24)  # several passes, texts out of their order
    units = neurons(gpt2, 1) if kind == "neurons" else latents(gpt2, SITE, TopKSAE(d_in=12, d_sae=20, k=2))
    examples = collect(units, TEXTS, threshold=0.5, most=most)
    found, maximum, frequency = one_by_one(units, TEXTS, 0.5, most)
    assert torch.allclose(examples.maximum, maximum, atol=1e-5)
    assert torch.allclose(examples.frequency, frequency)
    assert examples.document.shape == (20, most)
    sizes = set()
    for unit in range(20):
        documents, positions, values, h = examples.of(unit)
        assert list(zip(documents.tolist(), positions.tolist(), strict=True)) == [place[:2] for place in found[unit]]
        assert values.tolist() == pytest.approx([value for *_, value in found[unit]], abs=1e-5)
        for number, position, row in zip(documents.tolist(), positions.tolist(), h, strict=True):
            alone = units.activations(gpt2.tokenize(TEXTS[number]))[0][0, position + 1]
            assert torch.allclose(row, alone, atol=1e-5)
        sizes.add(len(documents))
        missing = examples.document[unit] < 0
        assert (examples.value[unit][missing] == 0).all()
        assert (examples.position[unit][missing] == -1).all()
        assert (examples.place[unit][missing] == -1).all()
    assert max(sizes) == 3 if most == 3 else max(sizes) > 3
    assert examples.tokens == gpt2.encode(TEXTS)


def test_a_unit_that_is_never_active_has_no_examples(gpt2):
    sae = ReLUSAE(d_in=12, d_sae=5, l1_coeff=1.0)
    sae.b_enc.data[:] = torch.tensor([9.0, 9.0, -1e6, 9.0, 9.0])
    examples = collect(latents(gpt2, SITE, sae), TEXTS)
    assert examples.alive.tolist() == [True, True, False, True, True]
    assert len(examples.of(2)[0]) == 0
    assert examples.maximum[2] == 0
    assert examples.frequency[2] == 0


def test_a_text_longer_than_the_context_is_read_from_its_beginning(gpt2):
    long = "dog . " * 30
    examples = collect(neurons(gpt2, 0), [*TEXTS, long], threshold=0)
    assert len(examples.tokens[-1]) == gpt2.context - 1
    assert examples.position.max() < gpt2.context - 1


# Clusters


def test_average_linkage_joins_at_the_mean_distance_between_clusters():
    distances = np.array([[0, 0.1, 0.4, 0.8], [0.1, 0, 0.6, 0.9], [0.4, 0.6, 0, 0.7], [0.8, 0.9, 0.7, 0]])
    merges = tree(distances)
    assert merges[:, 2] == pytest.approx([0.1, 0.5, 0.8])  # (0.4 + 0.6) / 2; (0.8 + 0.9 + 0.7) / 3
    assert cut(merges).tolist() == [0, 0, 0, 1]
    assert cut(merges, threshold=0.45).tolist() == [0, 0, 1, 2]
    assert cut(merges, threshold=0.9).tolist() == [0, 0, 0, 0]
    assert cut(merges, clusters=3).tolist() == [0, 0, 1, 2]
    assert cut(merges, clusters=4).tolist() == [0, 1, 2, 3]


def test_clusters_are_numbered_by_size_and_as_many_as_asked_for_whatever_is_alike():
    e = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 2.0], [1.0, 0.1]])
    merges = tree(cosine_distances(e))
    assert cut(merges).tolist() == [1, 0, 0, 0, 1]
    for clusters in range(1, 6):  # three examples are the same: two merges at height 0
        assert cut(merges, clusters=clusters).max() == clusters - 1


def test_one_example_is_one_cluster():
    distances = cosine_distances(torch.ones(1, 3))
    assert cut(tree(distances)).tolist() == [0]
    found = proxies(distances, np.array([0]))
    assert found["size"] == found["clusters"] == 1
    assert all(math.isnan(found[f"{name}_distance"]) for name in ("max", "mean", "intra", "inter"))


def test_weights_of_one_input_make_all_distances_zero():
    h = torch.rand(6, 4, generator=torch.Generator().manual_seed(0)) + 0.1
    assert cosine_distances(embeddings(h, torch.tensor([0.0, 0.0, 2.0, 0.0]))).max() == pytest.approx(0, abs=1e-12)
    assert cosine_distances(h).max() > 0.05


def test_cosine_distances_know_no_length_and_see_signs():
    distances = cosine_distances(torch.tensor([[1.0, 1.0], [3.0, 3.0], [1.0, 0.0], [-2.0, -2.0], [0.0, 0.0]]))
    expected = 1 - 1 / math.sqrt(2)
    assert distances[0] == pytest.approx([0, 0, expected, 2, 1], abs=1e-9)
    assert (distances == distances.T).all()


def test_proxies_pool_pairs_over_clusters():
    distances = np.zeros((5, 5))
    for (one, other), value in {(0, 1): 0.1, (0, 2): 0.2, (1, 2): 0.3, (3, 4): 0.6}.items():
        distances[one, other] = distances[other, one] = value
    for one in (0, 1, 2):
        for other in (3, 4):
            distances[one, other] = distances[other, one] = 0.9
    found = proxies(distances, np.array([0, 0, 0, 1, 1]))
    assert found["intra_distance"] == pytest.approx((0.1 + 0.2 + 0.3 + 0.6) / 4)  # not the mean of 0.2 and 0.6
    assert found["inter_distance"] == pytest.approx(0.9)
    assert found["mean_distance"] == pytest.approx((1.2 + 6 * 0.9) / 10)
    assert (found["max_distance"], found["size"], found["clusters"]) == (0.9, 5, 2)
    alone = proxies(distances, np.arange(5))
    assert math.isnan(alone["intra_distance"])
    assert alone["inter_distance"] == pytest.approx(found["mean_distance"])
    assert math.isnan(proxies(distances, np.zeros(5, dtype=int))["inter_distance"])


def test_the_central_example_of_a_cluster_is_nearest_to_its_own():
    distances = np.array(
        [
            [0.0, 0.4, 0.1, 0.9],
            [0.4, 0.0, 0.2, 0.1],  # nearest to the last one, which is of another cluster
            [0.1, 0.2, 0.0, 0.9],
            [0.9, 0.1, 0.9, 0.0],
        ]
    )
    assert central(distances, np.array([0, 0, 0, 1])).tolist() == [2, 3]


def test_similar_clusters_are_those_of_other_units():
    inputs = torch.tensor([[1.0, 0.0], [2.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    cluster, cosine = similar_clusters(inputs, torch.tensor([0, 0, 1, 2]), most=3)
    assert cluster.tolist()[0] == [2, 3, -1]
    assert cosine[0, :2].tolist() == pytest.approx([math.sqrt(0.5), 0], abs=1e-6)
    assert cosine[0, 2].isnan()
    assert cluster[3].tolist() == [2, 0, 1] or cluster[3].tolist() == [2, 1, 0]


def test_similar_clusters_are_the_same_in_chunks():
    inputs = torch.randn(1500, 5, generator=torch.Generator().manual_seed(0))
    units = torch.arange(1500) // 3
    cluster, cosine = similar_clusters(inputs, units, most=4)
    one = torch.nn.functional.cosine_similarity(inputs[1400][None], inputs)
    one[units == units[1400]] = -2
    assert cluster[1400].tolist() == one.topk(4).indices.tolist()
    assert torch.allclose(cosine[1400], one.topk(4).values, atol=1e-5)


# Importance


def test_importance_is_the_activation_less_that_without_the_token(gpt2):
    units, ids = neurons(gpt2, 1), gpt2.encode([TEXTS[1]])[0]
    found = importance(units, 5, ids, position=4)
    assert found.shape == (5,)
    whole = units.activations(gpt2.pad([ids]))[1][0, 5, 5]
    for t in range(5):
        replaced = list(ids)
        replaced[t] = gpt2.tokenizer.pad_token_id
        without = units.activations(gpt2.pad([replaced]))[1][0, 5, 5]
        assert found[t].item() == pytest.approx((whole - without).item(), abs=1e-5)
    assert found.abs().max() > 1e-3


# Bad input


def test_what_is_no_population_is_refused(gpt2, as_a_user):
    with pytest.raises(ValueError, match=r"got 'blocks.3.mlp.hook_in': the nearest are"):
        neurons(gpt2, 3)
    with pytest.raises(ValueError, match="part must be gate or up, got 'in'"):
        neurons(gpt2, 1, part="in")
    with pytest.raises(ValueError, match=r"'blocks.1.hook_resid_post', which is 12 wide, got d_in=13"):
        latents(gpt2, SITE, TopKSAE(d_in=13, d_sae=20, k=2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 1.5}, r"share of the maximum, in \[0, 1\], got 1.5"),
        ({"most": 0}, "most must be an integer at least 1, got 0"),
        ({"texts": []}, "texts must hold at least one text, got none"),
        ({"texts": ["cat", ""]}, "at least one token, got '' at index 1"),
    ],
)
def test_examples_that_cannot_be_collected_are_refused(gpt2, arguments, message, as_a_user):
    with pytest.raises(ValueError, match=message):
        collect(neurons(gpt2, 0), **({"texts": TEXTS} | arguments))


def test_places_that_do_not_exist_are_refused(gpt2, as_a_user):
    with pytest.raises(ValueError, match=r"clusters must be an integer in \[1, examples=3\], got 4"):
        cut(tree(cosine_distances(torch.eye(3))), clusters=4)
    with pytest.raises(ValueError, match=r"position must be an integer in \[0, tokens - 1=2\], got 3"):
        importance(neurons(gpt2, 0), 0, [4, 5, 6], 3)
