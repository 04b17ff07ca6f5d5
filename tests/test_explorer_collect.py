"""What a page holds is what the model does: each number against the model asked directly, or worked by hand."""

import base64

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.distance import squareform
from tiny_models import tiny_gemma2, tiny_gpt2

from sae_lib import ReLUSAE, TopKSAE
from sae_lib.explorer import collect as collect_module
from sae_lib.explorer import framed, render, show
from sae_lib.explorer.collect import contents, plane
from sae_lib.explorer.reading import (
    BACK,
    BINS,
    absorptions,
    decoder_neighbours,
    importances,
    logit_effects,
    text_of,
    token_texts,
    written,
)
from sae_lib.metrics.first_letter import Absorber, FirstLetter
from sae_lib.models import load_model
from sae_lib.neuron_embeddings import collect, cosine_distances, cut, embeddings, importance, latents, neurons, tree

TEXTS = [
    "the cat sings", "a dog sleeps under the moon and the queen runs", "king", "old river", "blue stone , red sun .",
    "the moon sings", "a new king and a queen", "the cat runs over the river", "dog . dog . dog", "queen under the sun",
]  # fmt: skip
SITE = "blocks.1.hook_resid_post"
FIELDS = {
    "examples",
    "tree",
    "order",
    "closeness",
    "map",
    "windows",
    "importance",
    "histogram",
    "promotes",
    "suppresses",
}


@pytest.fixture(scope="module")
def gpt2():
    return load_model(tiny_gpt2(), device="cpu")


@pytest.fixture(scope="module")
def made(gpt2):
    """Index and units of the 20 neurons of a layer."""
    index, parts = contents([neurons(gpt2, 1)], TEXTS, threshold=0.3, source="lines")
    return index, parts["explorer-part-0"], parts["explorer-documents"]["tokens"]


def words_of(index, ids):
    return [index["vocab"][number] for number in ids]


# The contract


def test_every_part_of_the_contract_is_there(made):
    index, units, documents = made
    (entry,) = index["sets"]
    assert index["version"] == 1
    assert index["title"] == f"{tiny_gpt2().name}: blocks.1.mlp neurons", "no path of this machine"
    assert entry["model"] == tiny_gpt2().name
    assert (entry["key"], entry["kind"], entry["n"], entry["site"]) == (
        "neurons-1",
        "neurons",
        20,
        "blocks.1.mlp.hook_in",
    )
    assert (entry["threshold"], entry["at_least"], entry["parts"]) == (0.5, 0.3, ["explorer-part-0"])
    assert entry["facts"]["read"] == "46 tokens of 10 lines"
    measures = "frequency maximum examples clusters max_distance mean_distance intra_distance inter_distance"
    measures += " random_distance participation"
    assert set(entry["summary"]) == set(measures.split())
    assert {len(values) for values in entry["summary"].values()} == {20}
    assert len(units) == len(entry["keys"]) == 20
    assert all(set(unit) == FIELDS | {"similar"} for unit in units)
    for unit, many in zip(units, entry["summary"]["examples"], strict=True):
        assert len(unit["examples"]) == len(unit["windows"]) == len(unit["map"]) == len(unit["order"]) == many
        assert len(unit["tree"]) == max(0, many - 1)
        assert len(base64.b64decode(unit["closeness"])) == many * (many - 1) // 2
        assert all(0 <= text < len(documents) for text, _, _ in unit["examples"])


def test_units_fill_parts_of_32_in_order(gpt2):
    sae = ReLUSAE(12, 70, 0.1)
    index, parts = contents([latents(gpt2, SITE, sae), neurons(gpt2, 1)], TEXTS, most=3)
    assert index["sets"][0]["parts"] == ["explorer-part-0", "explorer-part-1", "explorer-part-2"]
    assert index["sets"][1]["parts"] == ["explorer-part-3"]
    assert [len(parts[f"explorer-part-{i}"]) for i in range(4)] == [32, 32, 6, 20]
    assert [entry["key"] for entry in index["sets"]] == ["latents", "neurons-1"]


def test_many_units_have_fewer_examples_each_so_that_the_page_fits(gpt2, monkeypatch):
    units = neurons(gpt2, 1)
    assert max(contents([units], TEXTS, threshold=0)[0]["sets"][0]["summary"]["examples"]) == 10
    monkeypatch.setattr(collect_module, "EXAMPLES", 40)
    for sets, most in (([units], 2), ([units, units], 1)):
        index, _ = contents(sets, TEXTS, threshold=0)
        assert max(max(entry["summary"]["examples"]) for entry in index["sets"]) == most
        assert index["sets"][0]["facts"]["examples"].startswith(f"at most {most} a unit")


def test_two_saes_have_two_keys(gpt2):
    index, _ = contents([latents(gpt2, SITE, ReLUSAE(12, 4, 0.1, seed=s)) for s in (0, 1)], TEXTS)
    assert [entry["key"] for entry in index["sets"]] == ["latents-1", "latents-2"]


def test_sets_must_be_one_or_two_of_one_model(gpt2):
    units = neurons(gpt2, 0)
    for sets in ([], [units] * 3):
        with pytest.raises(ValueError, match=f"one set of units, or two side by side, got {len(sets)}"):
            contents(sets, TEXTS)
    with pytest.raises(ValueError, match="both sets must be of one model that was opened once"):
        contents([units, neurons(load_model(tiny_gemma2(), device="cpu"), 0)], TEXTS)


# Examples and what is around them


def test_windows_and_values_are_the_models_activations(made, gpt2):
    index, units, documents = made
    for number, unit in enumerate(units):
        for (text, position, value), window in zip(unit["examples"], unit["windows"], strict=True):
            line = "".join(words_of(index, documents[text])).strip()
            assert line in TEXTS
            a = neurons(gpt2, 1).activations(gpt2.tokenize(line))[1][0, 1:, number]
            assert value == pytest.approx(a[position].item(), rel=1e-3)
            start = max(0, position - 20)
            share = a[start : position + 11].clamp(min=0) / index["sets"][0]["summary"]["maximum"][number]
            assert window == pytest.approx((255 * share).tolist(), abs=1)


def test_histograms_count_all_tokens_that_are_active(made, gpt2):
    index, units, _ = made
    tokens = gpt2.tokenize(TEXTS)
    a = neurons(gpt2, 1).activations(tokens)[1][gpt2.content(tokens)]
    for number, unit in enumerate(units):
        active = a[:, number][a[:, number] > 0].numpy()
        counts, edges = np.histogram(active, BINS, (0, float(a[:, number].max().clamp(min=1e-9))))
        assert np.allclose(unit["histogram"]["edges"], edges, rtol=1e-3, atol=1e-6)
        assert sum(unit["histogram"]["counts"]) == len(active)
        assert np.abs(np.cumsum(unit["histogram"]["counts"]) - np.cumsum(counts)).max() <= 1, "up to ties at an edge"
        assert index["sets"][0]["summary"]["frequency"][number] == pytest.approx(len(active) / 46, rel=1e-3)


def test_key_tokens_name_a_unit_and_find_it(made):
    index, units, documents = made
    (entry,) = index["sets"]
    for number, unit in enumerate(units):
        met = [documents[text][position] for text, position, _ in unit["examples"]]
        times = {token: met.count(token) for token in met}
        assert [times[token] for token in entry["keys"][number]] == sorted(times.values(), reverse=True)[:3]
        assert all(number in entry["words"][str(token)] for token in met)
    for token, found in entry["words"].items():
        times = [sum(documents[t][p] == int(token) for t, p, _ in units[unit]["examples"]) for unit in found]
        assert times == sorted(times, reverse=True), "most examples first"
        assert min(times) > 0


def test_a_unit_that_is_never_active_keeps_an_empty_row(gpt2):
    sae = ReLUSAE(12, 3, 0.1)
    with torch.no_grad():
        sae.b_enc.copy_(torch.tensor([9.0, -1e9, 9.0]))
    index, parts = contents([latents(gpt2, SITE, sae)], TEXTS)
    summary, unit = index["sets"][0]["summary"], parts["explorer-part-0"][1]
    assert summary["frequency"][1] == summary["maximum"][1] == summary["examples"][1] == summary["clusters"][1] == 0
    assert summary["mean_distance"][1] is None
    assert unit["examples"] == unit["tree"] == unit["order"] == unit["map"] == unit["windows"] == []
    assert (unit["closeness"], unit["importance"], unit["similar"]) == ("", {}, {})
    assert index["sets"][0]["facts"]["dead"] == "1 of 3 are active on no token"
    assert index["sets"][0]["keys"][1] == []


# Clusters


def test_trees_and_distances_are_those_of_the_method(made, gpt2):
    index, units, _ = made
    layer = neurons(gpt2, 1)
    examples = collect(layer, TEXTS, 0.3)
    for number, unit in enumerate(units):
        distances = cosine_distances(embeddings(examples.of(number)[3], layer.weights[number]))
        merges = tree(distances)
        assert np.allclose([height for _, _, height in unit["tree"]], merges[:, 2], rtol=1e-3)
        clusters = cut(merges).max() + 1 if len(distances) else 0
        assert index["sets"][0]["summary"]["clusters"][number] == clusters
        assert sorted(unit["order"]) == list(range(len(distances)))
        shares = np.frombuffer(base64.b64decode(unit["closeness"]), np.uint8) / 255
        largest = index["sets"][0]["summary"]["max_distance"][number] or 0
        assert np.allclose(squareform(shares) * largest, distances, atol=0.01)


def test_a_map_keeps_the_distances_of_points_in_a_plane():
    points = np.array([[0, 0], [3, 0], [3, 4], [0, 1]])
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    found = plane(distances)
    again = np.linalg.norm(found[:, None] - found[None], axis=2)
    assert np.allclose(again / again.max(), distances / distances.max())
    assert found.min() >= 0
    assert found.max() <= 1
    assert plane(np.zeros((3, 3))).tolist() == [[0.5, 0.5]] * 3
    assert plane(squareform([1e-17, 0.0, 3e-17])).shape == (3, 2), "examples that are all but alike"
    assert plane(np.zeros((1, 1))).tolist() == [[0.5, 0.5]]


def test_similar_clusters_are_named_by_their_central_examples(made, gpt2):
    index, units, _ = made
    examples, weights = collect(neurons(gpt2, 1), TEXTS, 0.3), neurons(gpt2, 1).weights
    heads = []
    for number, many in enumerate(index["sets"][0]["summary"]["examples"]):
        distances = cosine_distances(embeddings(examples.of(number)[3], weights[number]))
        heads.append(collect_module.central(distances, cut(tree(distances))).tolist() if many else [])
    for number, unit in enumerate(units):
        assert list(unit["similar"]) == [str(i) for i in range(len(heads[number]))]
        for head, found in zip(heads[number], unit["similar"].values(), strict=True):
            assert [cosine for *_, cosine in found] == sorted((cosine for *_, cosine in found), reverse=True)
            for set_number, other, example, cosine in found:
                assert (set_number, example in heads[other], other != number) == (0, True, True)
                here, there = examples.of(number)[3][head], examples.of(other)[3][example]
                assert cosine == pytest.approx(F.cosine_similarity(here, there, 0).item(), abs=1e-3)


def test_random_inputs_are_any_tokens_under_the_units_own_weights(made, gpt2):
    """All 46 tokens of the texts are drawn, since they are fewer than 100."""
    tokens, units = gpt2.tokenize(TEXTS), neurons(gpt2, 1)
    h = units.activations(tokens)[0][gpt2.content(tokens)]
    found = made[0]["sets"][0]["summary"]["random_distance"]
    for number, distance in enumerate(found):
        distances = cosine_distances(embeddings(h, units.weights[number]))
        assert distance == pytest.approx(distances.sum() / (46 * 45), rel=1e-3)


# Importance


def test_importance_of_many_examples_is_that_of_each(gpt2):
    units, texts = neurons(gpt2, 2), gpt2.encode(TEXTS)
    wanted = [(3, 1, 9), (0, 1, 4), (3, 2, 0), (7, 1, 9)]
    for (unit, text, position), found in zip(wanted, importances(units, texts, wanted), strict=True):
        assert torch.allclose(found, importance(units, unit, texts[text], position), atol=1e-5)


def test_importance_is_of_the_last_tokens_alone(gpt2, monkeypatch):
    monkeypatch.setattr("sae_lib.explorer.reading.BACK", 3)
    units, texts = neurons(gpt2, 2), gpt2.encode(TEXTS)
    (found,) = importances(units, texts, [(0, 1, 9)])
    assert torch.allclose(found, importance(units, 0, texts[1], 9)[-4:], atol=1e-5)
    assert BACK == 20


def test_importance_is_written_in_255ths_of_the_key_tokens_own(made, gpt2):
    index, units, documents = made
    for number, unit in enumerate(units):
        assert min(1, len(unit["examples"])) <= len(unit["importance"]) <= 3
        for example, written_there in unit["importance"].items():
            text, position, _ = unit["examples"][int(example)]
            ids = gpt2.encode(["".join(words_of(index, documents[text]))])[0]
            real = importance(neurons(gpt2, 1), number, ids, position)
            assert written_there == pytest.approx((255 * real / max(real[-1], 0.01)).clamp(0, 255).tolist(), abs=1)


def test_importance_is_computed_for_the_largest_clusters_alone(gpt2, monkeypatch):
    monkeypatch.setattr(collect_module, "CUT", 0.0)  # each example a cluster
    _, parts = contents([neurons(gpt2, 1)], TEXTS, threshold=0)
    many = [unit for unit in parts["explorer-part-0"] if len(unit["examples"]) > 3]
    assert many
    assert {len(unit["importance"]) for unit in many} == {3}


# Logits


def test_promoted_tokens_are_the_logits_of_the_direction_worked_by_hand(gpt2):
    hf = gpt2.bridge.original_model
    out, gain = hf.transformer.h[1].mlp.c_proj.weight[5].double(), hf.transformer.ln_f.weight.double()
    logits = (out - out.mean()) / out.std(unbiased=False) * gain @ hf.lm_head.weight.double().T
    logits -= logits.mean()
    best, promoted, worst, suppressed = (part[5] for part in logit_effects(neurons(gpt2, 1), most=4))
    assert torch.allclose(promoted.double(), logits.sort(descending=True).values[:4], rtol=1e-3)
    assert best.tolist() == logits.argsort(descending=True)[:4].tolist()
    assert torch.allclose(suppressed.double(), logits.sort().values[:4], rtol=1e-3)
    assert worst.tolist() == logits.argsort()[:4].tolist()


def test_biases_of_norm_and_unembedding_promote_nothing(gpt2, monkeypatch):
    before = logit_effects(neurons(gpt2, 1))
    for part in (gpt2.bridge.ln_final.original_component, gpt2.bridge.unembed.original_component):
        monkeypatch.setattr(part.bias, "data", torch.arange(len(part.bias)).float())
    for was, now in zip(before, logit_effects(neurons(gpt2, 1)), strict=True):
        assert torch.allclose(was.float(), now.float(), atol=1e-3)


def test_gains_stored_as_an_offset_from_one_are_gains(monkeypatch):
    gemma = load_model(tiny_gemma2(), device="cpu")
    hf = gemma.bridge.original_model
    out = hf.model.layers[0].mlp.down_proj.weight[:, 3].double()
    logits = out / out.square().mean().sqrt() * (1 + hf.model.norm.weight.double()) @ hf.lm_head.weight.double().T
    promoted = logit_effects(neurons(gemma, 0), most=4)[1][3]
    assert torch.allclose(promoted.double(), (logits - logits.mean()).sort(descending=True).values[:4], rtol=1e-3)


def test_latents_write_where_they_are(gpt2):
    sae = TopKSAE(12, 16, 3)
    for site in (SITE, "blocks.1.hook_mlp_out", "blocks.2.hook_resid_pre"):
        assert torch.equal(written(latents(gpt2, site, sae)), sae.W_dec)
    assert written(latents(gpt2, "blocks.1.ln2.hook_normalized", sae)) is None, "what an MLP reads is not written"
    hidden = TopKSAE(20, 16, 3)
    through = hidden.W_dec @ gpt2.mlp_weights(1, "out")
    assert torch.allclose(written(latents(gpt2, "blocks.1.mlp.hook_post", hidden)), through)


def test_a_unit_that_writes_nothing_promotes_nothing(gpt2):
    _, parts = contents([latents(gpt2, "blocks.1.ln2.hook_normalized", TopKSAE(12, 4, 2))], TEXTS)
    assert all(unit["promotes"] == unit["suppresses"] == [] for unit in parts["explorer-part-0"])


# Latents alone


def test_decoder_neighbours_are_other_rows_by_cosine():
    sae = TopKSAE(2, 4, 1)
    with torch.no_grad():
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0], [-0.6, -0.8]]))
    numbers, cosines = decoder_neighbours(sae, most=2)
    assert numbers.tolist() == [[2, 1], [2, 0], [1, 0], [0, 1]]
    assert torch.allclose(cosines, torch.tensor([[0.6, 0.0], [0.8, 0.0], [0.8, 0.6], [-0.6, -0.8]]), atol=1e-6)


def test_a_latent_that_stands_in_for_letters_is_flagged(gpt2, monkeypatch):
    monkeypatch.setattr(FirstLetter, "__init__", lambda self, *_: self.__dict__.update(words=9, letters=["k", "q"]))
    monkeypatch.setattr(FirstLetter, "absorbers", lambda self, _: [Absorber("k", 2, 0, 0.25), Absorber("q", 1, 0, 0.5)])
    index, parts = contents([latents(gpt2, SITE, TopKSAE(12, 4, 2))], TEXTS)
    flags = [unit["absorption"] for unit in parts["explorer-part-0"]]
    assert flags == [[["k", 2, 0.25], ["q", 1, 0.5]], [], [], []]
    assert index["sets"][0]["facts"]["absorption"] == "first letters of 9 words, 2 letters"


def test_where_words_cannot_tell_the_page_says_so(gpt2):
    flags, said = absorptions(latents(gpt2, SITE, TopKSAE(12, 4, 2)))
    assert flags == []
    assert said.startswith("not measured: at least 2 letters")


# Tokens


def test_tokens_stand_as_in_running_text(gpt2):
    assert token_texts(gpt2.tokenizer, gpt2.encode(["the cat ."])[0]) == [" the", " cat", " ."]
    assert token_texts(gpt2.tokenizer, [99]) == ["<99>"], "models have rows that no token has"
    pocket = load_model("pocket", device="cpu")
    ids = pocket.encode(["the finalized caves, she said"])[0]
    assert "".join(token_texts(pocket.tokenizer, ids)) == " the finalized caves, she said"


def test_bytes_that_are_no_text_are_shown_by_number():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["cat", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġcat", "ðŁĺ", "é"]
    tokenizer = Tokenizer(models.WordLevel({piece: number for number, piece in enumerate(pieces)}, unk_token="cat"))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="cat")
    asked = [pieces.index(piece) for piece in ("Ġcat", "ðŁĺ", "â", "<", "Ċ")]
    assert token_texts(tokenizer, asked) == [" cat", "<0xF0><0x9F><0x98>", "<0xE2>", "<", "\n"]
    assert text_of("and\ufffd", "and", "<0xE2>") == "<0xE2>", "as SentencePiece names a byte"
    assert text_of("else", "and", "▁odd") == "▁odd", "what cannot be told from its neighbour keeps its name"


# Pages


def test_the_same_units_and_texts_give_the_same_page(gpt2):
    assert render(neurons(gpt2, 0), TEXTS) == render([neurons(gpt2, 0)], TEXTS)


def test_a_notebook_shows_the_page_in_a_frame_of_its_own(gpt2):
    piece = show(neurons(gpt2, 0), TEXTS, height=500, title="<b>'\"")
    assert piece._repr_html_() == piece
    assert piece.startswith('<iframe title="Explorer" style="width: 100%; height: 500px')
    assert piece.count("<") == 2, "all else is escaped"
    assert "&amp;lt;b&amp;gt;" in piece
    assert 'srcdoc="&lt;p&gt;&quot;"' in framed('<p>"')
