"""A latent that is a label is explained by it, and judged right on text it was not explained on."""

import math

import numpy as np
import pytest
import torch

from sae_lib import TopKSAE, load_model
from sae_lib.metrics import Autointerp
from sae_lib.metrics.autointerp import f1_scores, occurs, pieces
from sae_lib.records import Record
from tests.tiny_models import WORDS, tiny_gpt2

SITE = "hook_embed"  # the same vector for a word wherever it stands
ANIMALS, SKY = ("cat", "dog"), ("sun", "moon")


class Words(TopKSAE):
    """Latent i lives on the words of the i-th set, with magnitudes that differ from token to token."""

    def __init__(self, model, *sets):
        super().__init__(model.width(SITE), len(sets), 1)
        words = model.encode([" ".join(WORDS)])[0]
        self.table = model.activations(torch.tensor(words).unsqueeze(1), SITE)[:, 0]
        self.sets = torch.tensor([[word in chosen for chosen in sets] for word in WORDS]).float()

    def encode(self, x):
        lives = self.sets[torch.cdist(x, self.table).argmin(1)]
        return lives * (1 + torch.arange(len(x)) / len(x)).unsqueeze(1)


def records(number=120, seed=0):
    """Texts of 5 to 14 words: glad ones with animals, which are marked, and sad ones with what is in the sky."""
    generator = np.random.default_rng(seed)
    made = []
    for place in range(number):
        glad = place % 2
        words = generator.choice(["the", "a", "red", "old", *(ANIMALS if glad else SKY)], generator.integers(5, 15))
        marked = " ".join(f"⟨animal|{word}⟩" if word in ANIMALS else word for word in words)
        made.append(Record(" ".join(words), sentiment="glad" if glad else "sad", marked=marked))
    return made


@pytest.fixture(scope="module")
def model():
    return load_model(tiny_gpt2())


@pytest.fixture(scope="module")
def task(model):
    return Autointerp(model, SITE, records())


def test_latents_that_are_labels_are_named_and_always_right(model, task):
    sae = Words(model, {"cat"}, {"red"}, set(ANIMALS), {"queen"})
    explained = task.explained(sae)
    assert [(found.latent, found.label) for found in explained] == [
        (0, "animal cat"),  # as good as the token, and first in the alphabet
        (1, "token 'red'"),
        (2, "animal"),
    ]
    assert all(found.score == found.f1 == 1 for found in explained)
    assert all(0 < found.never < 5 / 7 + 1e-9 for found in explained)  # four of 14 are active by construction
    assert sae.training
    report = task(sae)
    assert math.isnan(report.pop("autointerp_matched"))  # three frequent latents are no three classes
    assert report == {
        "autointerp": 1,
        "autointerp_chance": pytest.approx(sum(found.never for found in explained) / 3),
        "autointerp_f1": 1,
        "autointerp_latents": 3,
    }


def test_the_matched_score_is_of_the_share_of_tokens_on_which_a_latent_lives(model, task, monkeypatch):
    sae = TopKSAE(12, 24, 3)
    explained, x = task.explained(sae), torch.cat([task.explain.x, task.detect.x])
    lives = (sae.eval().encode(x) > 0).float().mean(0)
    assert [found.frequency for found in explained] == pytest.approx(
        lives[[found.latent for found in explained]].tolist()
    )
    middle = float(np.median([found.frequency for found in explained]))
    monkeypatch.setattr("sae_lib.metrics.matched.LIMITS", (0, middle, 1))
    rare, frequent = ([f.score for f in explained if (f.frequency <= middle) == is_rare] for is_rare in (True, False))
    assert task(sae)["autointerp_matched"] == pytest.approx((np.mean(rare) + np.mean(frequent)) / 2)


def test_a_property_of_the_text_explains_what_no_word_does(model):
    """The latent lives on all of the words of glad texts."""
    generator = np.random.default_rng(0)
    words = {"glad": WORDS[:6], "sad": WORDS[6:12]}
    made = [Record(" ".join(generator.choice(words[of], 6)), sentiment=of) for of in words for _ in range(30)]
    found = Autointerp(model, SITE, made).explained(Words(model, set(words["glad"])))[0]
    assert (found.label, found.f1, found.score) == ("sentiment glad", 1, 1)


def test_explanations_are_judged_on_text_that_they_were_not_chosen_on(model):
    task = Autointerp(model, SITE, records())
    swapped = task._labels[1].copy()
    places = [task.names.index(f"token {word!r}") for word in ("red", "old")]
    columns = np.arange(len(task.names))
    columns[places] = columns[places[::-1]]
    task._labels[1] = swapped[:, columns]
    found = task.explained(Words(model, {"red"}))[0]
    assert (found.label, found.f1) == ("token 'red'", 0)
    assert found.score < 0.8


def test_a_piece_ends_with_its_text(model):
    """Ten tokens to either side would reach into a neighbour, where the other word lives."""
    made = [Record(" ".join([word] * 5)) for word in ("cat", "dog") for _ in range(100)]
    task = Autointerp(model, SITE, made)
    found = [task.explained(Words(model, {word}))[0] for word in ("cat", "dog")]
    assert all(found.never > 0.15 for found in found)  # about half of the ten random ones; reaching over, about none
    assert all(found.score == 1 for found in found)


def test_the_seed_decides_everything_and_halves_share_no_text(model, task):
    sae = TopKSAE(12, 24, 3)
    again, other = (Autointerp(model, SITE, records(), seed=seed) for seed in (0, 1))
    assert again(sae) == pytest.approx(task(sae), nan_ok=True) != other(sae)
    assert other.explain.labels != task.explain.labels
    again.seed = 1  # of the pieces and latents alone
    assert again(sae) != pytest.approx(task(sae), nan_ok=True)
    assert len(task.explain.labels) + len(task.detect.labels) == sum(len(r.text.split()) for r in records())


def test_no_more_tokens_and_latents_are_used_than_asked_for(model):
    task = Autointerp(model, SITE, records(), tokens=600, latents=2)
    assert 600 <= len(task.explain.x) + len(task.detect.x) < 615
    assert task(Words(model, {"the"}, {"a"}, {"red"}))["autointerp_latents"] == 2


@pytest.mark.parametrize(("texts", "judged"), [(5, False), (6, True)])
def test_a_latent_needs_more_than_15_tokens(model, texts, judged):
    made = [Record("the cat cat cat")] * texts + [Record("the red dog")] * 150
    sae = Words(model, {"cat"}, {"the"})
    explained = [Autointerp(model, SITE, made, seed=seed).explained(sae) for seed in range(3)]
    assert any(found.latent == 0 for of_seed in explained for found in of_seed) == judged
    assert all(of_seed[-1].latent == 1 for of_seed in explained)


def test_an_activation_below_a_hundredth_of_the_maximum_is_none_and_long_texts_are_encoded_in_parts(model, monkeypatch):
    class Faint(Words):
        def encode(self, x):
            return super().encode(x) + 0.01

    monkeypatch.setattr("sae_lib.metrics.autointerp.ROWS_AT_ONCE", 100)
    found = Autointerp(model, SITE, records()).explained(Faint(model, {"red"}))[0]
    assert (found.label, found.f1, found.score) == ("token 'red'", 1, 1)


def test_an_sae_without_living_latents_has_no_score(model, task):
    report = task(Words(model, {"queen"}))
    assert report["autointerp_latents"] == 0
    assert all(math.isnan(report[f"autointerp{name}"]) for name in ("", "_chance", "_f1"))


def test_f1_of_every_label_for_every_latent():
    from scipy.sparse import csc_array

    active = csc_array(np.array([[1.0, 0], [1, 0], [0, 0], [1, 1]]))
    labels = csc_array(np.array([[1.0, 0, 0], [0, 0, 0], [1, 0, 0], [1, 1, 0]]))
    np.testing.assert_allclose(f1_scores(active, labels), [[4 / 6, 2 / 4, 0], [2 / 4, 1, 0]])


def test_pieces_are_strong_middling_and_random():
    """Strong: the peaks, and what is more than ten tokens from them. Middling: what is weaker than all of these."""
    spaced, peaks, weak = 30 * np.arange(12), 30 * np.arange(0, 12, 2) + 10, 30 * np.arange(12) + 15
    value = dict(zip(spaced, np.arange(9.0, 21.0), strict=True)) | dict.fromkeys(peaks, 30.0)
    value |= dict(zip(weak, np.linspace(0.1, 1.0, 12), strict=True))
    tokens = np.array(sorted(value))
    drawn = [pieces(tokens, np.array([value[t] for t in tokens]), 360, np.random.default_rng(s)) for s in range(200)]
    assert {len(centres) for centres in drawn} == {14}
    assert {centre for centres in drawn for centre in centres[:2]} == {*peaks, *spaced[1::2]}  # 10 and more
    middling = [centre for centres in drawn for centre in centres[2:4]]
    assert set(middling) <= {0, *weak}
    assert middling.count(0) > 180  # 9 squared, against at most 1 squared
    randoms = [centre for centres in drawn for centre in centres[4:]]
    assert min(randoms) < 10 and 350 < max(randoms) < 360


@pytest.mark.parametrize(("tokens", "values"), [((), ()), ((3, 50), (1.0, 1.0)), ((3, 4, 5, 6), (4.0, 3.0, 2.0, 1.0))])
def test_latents_without_two_strong_and_two_middling_tokens_have_no_pieces(tokens, values):
    assert pieces(np.array(tokens, dtype=int), np.array(values), 60, np.random.default_rng(0)) is None


def test_a_token_at_either_end_of_a_piece_lies_in_it():
    tokens = np.array([5, 9])
    assert occurs(tokens, np.array([0, 0, 5, 6, 9, 10]), np.array([4, 5, 5, 8, 12, 12])).tolist() == [
        False,
        True,
        True,
        False,
        True,
        False,
    ]


@pytest.mark.usefixtures("as_a_user")
def test_bad_input_is_refused(model):
    with pytest.raises(ValueError, match=r"at least two records, got 2 of \['str'\]; use load_texts"):
        Autointerp(model, SITE, ["a cat", "a dog"])
    with pytest.raises(ValueError, match="at least two records, got 1"):
        Autointerp(model, SITE, records(1))
    with pytest.raises(ValueError, match="tokens must be an integer at least 1, got 0"):
        Autointerp(model, SITE, records(4), tokens=0)
