"""The task on a model that knows its letters by construction: each word's embedding is a letter and a word."""

import pytest
import torch
from tiny_models import tiny_gemma2, tiny_gpt2

from sae_lib import TopKSAE, load_model, load_texts
from sae_lib.metrics import FirstLetter
from sae_lib.metrics.words import asking, places_in, prompts, vocabulary
from sae_lib.sparse import Code

SITE = "blocks.0.hook_resid_pre"
ENDINGS = [a + b for a in "aeiou" for b in "bcdfghjklmnp"]
WORDS = [letter + ending for letter in "klmn" for ending in ENDINGS]
D_LETTER, D_MODEL = 4, 32


@pytest.fixture(scope="module")
def speller(tmp_path_factory):
    """A GPT-2 with one block whose words, 60 for each of 4 letters, hold their letter in a dimension of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("speller")
    rest = ["<bos>", "has", "the", "first", "letter", ":", *"KLMN", *"ABCDEFGHIJOPQRSTUVWXYZ", ".", *WORDS, "<unk>"]
    vocabulary = {token: number for number, token in enumerate(rest)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", unk_token="<unk>").save_pretrained(folder)
    config = GPT2Config(
        vocab_size=len(rest), n_positions=100, n_embd=D_MODEL, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
        embedding = 0.2 * torch.randn(len(rest), D_MODEL)
        for word in WORDS:
            embedding[vocabulary[word], :D_LETTER] = 5 * torch.eye(D_LETTER)["klmn".index(word[0])]
        for number, letter in enumerate("KLMN"):
            embedding[vocabulary[letter]] = 20 * torch.eye(D_MODEL)[number]
        model.transformer.wte.weight.data = embedding
        model.transformer.wpe.weight.data.zero_()
        block = model.transformer.h[0]  # attends to all positions alike, and copies the letters
        block.attn.c_attn.weight.data.zero_()
        block.attn.c_attn.weight.data[:D_LETTER, 2 * D_MODEL : 2 * D_MODEL + D_LETTER] = 30 * torch.eye(D_LETTER)
        block.attn.c_proj.weight.data = torch.eye(D_MODEL)
        block.mlp.c_proj.weight.data.zero_()
        model.save_pretrained(folder)
    return load_model(folder, device="cpu")


@pytest.fixture(scope="module")
def task(speller):
    return FirstLetter(speller, SITE, words=WORDS)


class Dictionary(TopKSAE):
    """A latent for each letter and one for each absorbed word, which speaks for the letter as well and silences its
    latent. Norms of the decoder are not 1."""

    def __init__(self, speller, absorbed=(), norm=1.0):
        super().__init__(d_in=D_MODEL, d_sae=D_LETTER + 100, k=1)
        ids = [row[0] for row in speller.encode(absorbed)] if absorbed else []
        self.known = speller.bridge.original_model.transformer.wte.weight[ids].detach()
        directions = torch.eye(D_MODEL)[[*range(D_LETTER), *(D_LETTER + n % 28 for n in range(100))]]
        directions[D_LETTER:, 0] = 1.5
        with torch.no_grad():
            self.W_dec.copy_(norm * directions)
            self.b_dec.zero_()
        self.norm = norm

    def select(self, scores, batch):
        z = torch.zeros(len(batch.x), self.d_sae)
        z[:, :D_LETTER] = batch.x[:, :D_LETTER] * (batch.x[:, :D_LETTER] > 2)
        if len(self.known):
            which = torch.cdist(batch.x, self.known) < 0.1
            z[which.any(1), 0] = 0
            z[:, -len(self.known) :] = 3.0 * which
        return Code.from_dense(z / self.norm)


def absorbed(task):
    """Three test words with k, and their share of the rate: of this letter's words, and one of four letters."""
    words = [place.word for place in task.places if place.word[0] == "k"]
    return words[:3], 3 / len(words) / 4


def test_a_latent_for_each_letter_absorbs_nothing(task, speller):
    report = task(Dictionary(speller))
    assert task.letters == ["k", "l", "m", "n"]
    assert report["letters"] == report["letters_at_zero"] == 4
    assert report["words"] == len(task.places) == 48
    assert report["main_f1"] == report["feature_splits"] == 1
    assert report["absorption_fraction"] == report["absorption_full"] == report["absorption_older"] == 0


@pytest.mark.parametrize("norm", [1.0, 3.0])
def test_words_whose_letter_another_latent_writes_are_absorbed(task, speller, norm):
    words, rate = absorbed(task)
    report = task(Dictionary(speller, words, norm))
    for name in ("absorption_fraction", "absorption_full", "absorption_older"):
        assert report[name] == pytest.approx(rate)
        assert report[f"{name}_sd"] == pytest.approx(2 * rate)  # of 4 rate, 0, 0, 0
    assert report["feature_splits"] == 1
    assert 0.9 < report["main_f1"] < 1


@pytest.mark.parametrize("norm", [1.0, 3.0])
def test_the_latents_that_stand_in_are_named_with_the_letter_and_their_share(task, speller, norm):
    words, rate = absorbed(task)
    found = task.absorbers(Dictionary(speller, words, norm))
    d_sae = D_LETTER + 100
    assert [absorber.latent for absorber in found] == [d_sae - 3, d_sae - 2, d_sae - 1], "one word each"
    assert {(absorber.letter, absorber.main) for absorber in found} == {("k", 0)}
    assert sum(absorber.share for absorber in found) == pytest.approx(4 * rate)
    assert task.absorbers(Dictionary(speller)) == []


def test_the_answer_is_asked_for_right_after_the_question(task, speller, monkeypatch):
    rows, pad = [], speller.pad
    monkeypatch.setattr(speller, "pad", lambda part: rows.extend(part) or pad(part))
    words, _ = absorbed(task)
    task.by_ablation(Dictionary(speller, words))
    ends = [speller.tokenizer.convert_ids_to_tokens(row)[-6:] for row in rows]
    assert sorted(ends) == [[word, "has", "the", "first", "letter", ":"] for word in words]


def test_the_model_confirms_that_it_needs_the_absorbing_latent(task, speller):
    words, rate = absorbed(task)
    assert task.by_ablation(Dictionary(speller)) == {"absorption_by_ablation": 0, "ablated": 0}
    assert task.by_ablation(Dictionary(speller, words)) == {
        "absorption_by_ablation": pytest.approx(rate), "ablated": 3
    }  # fmt: skip
    some = task.by_ablation(Dictionary(speller, words), most=1)
    assert some == {"absorption_by_ablation": pytest.approx(rate), "ablated": 1}


def test_in_texts_words_are_met_where_they_stand_alone(speller):
    places = places_in(speller, ["kab the mel.", "first kab : Lac kab1"])
    assert [(place.word, place.position) for place in places] == [
        ("kab", 0), ("the", 1), ("mel", 2), ("first", 0), ("kab", 1), ("lac", 3)
    ]  # fmt: skip


def test_texts_give_the_same_task_and_tell_frequent_words_from_rare_ones(speller, monkeypatch):
    texts = [" ".join(WORDS[n::7]) for n in range(7)] * 6 + [" ".join(WORDS[:30])] * 3
    monkeypatch.setattr("sae_lib.metrics.first_letter.FREQUENT", 30)
    task = FirstLetter(speller, SITE, texts=texts)
    words = [place.word for place in task.places]
    assert max(words.count(word) for word in words) == 2
    frequent = [word for word in dict.fromkeys(words) if word in WORDS[:30]][:2]
    report = task(Dictionary(speller, frequent))
    assert report["absorption_full_rare"] == 0
    assert report["absorption_full_frequent"] == pytest.approx(4 / sum(word in WORDS[:30] for word in words))
    with pytest.raises(ValueError, match="words must stand in prompts"):
        task.by_ablation(Dictionary(speller))


def test_the_seed_decides_everything(speller, task):
    again, other = (FirstLetter(speller, SITE, words=WORDS, seed=seed) for seed in (0, 1))
    assert again.places == task.places
    assert torch.equal(again._directions, task._directions)
    assert {place.word for place in other.places} != {place.word for place in task.places}
    assert again(Dictionary(speller)) == task(Dictionary(speller))


def test_train_and_test_words_differ_and_capitals_do_not_make_a_word_another(speller):
    train, test = {"kab", "lab"}, {"mab", "nab"}
    places = prompts(speller, ["kab", "lab", "mab", "nab", "kac"], train, test, torch.Generator().manual_seed(0))
    assert sorted(place.word for place in places) == ["kab", "lab", "mab", "nab"]
    for place in places:
        assert speller.tokenizer.convert_ids_to_tokens(place.row[place.position]) == place.word
        assert len(place.row) < speller.context
        assert place.row.count(place.row[place.position]) == 1  # not among its own examples
        first = speller.tokenizer.convert_ids_to_tokens(place.row)
        assert set(first[: first.index(place.word)]) & test <= test - {place.word}


def test_vocabulary_is_what_is_made_of_letters(speller):
    words = vocabulary(speller)
    assert {"has", "K", "kab"} <= set(words)
    assert not {":", ".", "<bos>", "<unk>"} & set(words)
    assert asking(" kab") == "\n kab has the first letter: K"


@pytest.mark.parametrize("folder", [tiny_gpt2, tiny_gemma2])
def test_too_few_letters_are_an_error_that_counts_them(folder):
    model = load_model(folder(), device="cpu")
    with pytest.raises(
        ValueError, match=r"at least 2 letters .* got [01] of the \d+ that \d+ train and \d+ test words have"
    ):
        FirstLetter(model, "blocks.0.hook_resid_post")
    with pytest.raises(ValueError, match="at least two words must be single tokens of .*, got 0"):
        FirstLetter(model, "blocks.0.hook_resid_post", texts=["... ,"])


def test_the_embedded_model_knows_letters():
    model = load_model("pocket", device="cpu")
    texts = load_texts("pocket", split="validation", register="spelling", limit=60)
    task = FirstLetter(model, "blocks.1.hook_resid_post", texts=texts)
    assert [place.word for place in places_in(model, ["Cats, lamp"])] == ["lamp"]  # C, ##ats, comma, lamp
    report = task(TopKSAE(d_in=128, d_sae=64, k=8))
    assert 2 <= report["letters"] == len(task.letters)
    assert 0 <= report["absorption_full"] <= 1
    assert report["absorption_older"] <= report["absorption_full"]
