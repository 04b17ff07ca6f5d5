"""A property that one latent tells is told by a probe on one latent, and nothing else is."""

import json
import sys

import pytest
import torch

from sae_lib import TopKSAE, load_model
from sae_lib.metrics import SparseProbing, labelled_texts, pooled, sparse_probe_accuracy, strongest_latents
from sae_lib.records import Record
from tests.tiny_models import WORDS, tiny_gpt2

SITE = "blocks.1.hook_resid_post"
NAMES = [f"probing{middle}_{k}" for middle in ("", "_neurons") for k in (1, 2, 5)]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sentences(number, word, seed=0):
    """Texts of 3 to 9 words, all different, half of which are `word`."""
    generator, made = torch.Generator().manual_seed(seed), {}
    while len(made) < number:
        places = torch.randint(4, 20, (int(torch.randint(3, 10, (), generator=generator)),), generator=generator)
        made[" ".join(word if number % 2 else WORDS[place] for number, place in enumerate(places.tolist()))] = None
    return list(made)


@pytest.fixture(scope="module")
def model():
    return load_model(tiny_gpt2())


@pytest.fixture(scope="module")
def task(model):
    return SparseProbing(model, SITE, animals(60))


def animals(number):
    return [(text, word) for word in ("cat", "dog", "sun") for text in sentences(number, word)]


def test_pooling_ignores_what_does_not_count_and_divides_by_what_does():
    z = torch.tensor([[[7.0], [2.0], [4.0]], [[7.0], [0.0], [100.0]]])
    keep = torch.tensor([[False, True, True], [False, True, False]])
    assert pooled(z, keep).tolist() == [[3.0], [0.0]]


def test_latents_are_chosen_by_the_size_of_the_difference_whatever_its_sign_and_their_spread():
    labels = torch.tensor([True, True, False, False])
    z = torch.tensor([[0.0, 1.0, 9.0, 5.0], [0.0, 1.0, 1.0, 5.0], [3.0, 0.0, 1.0, 5.0], [3.0, 0.0, 5.0, 5.0]])
    assert strongest_latents(z, labels, 3).tolist() == [0, 2, 1]  # differences -3, 1, 2 and 0


def test_the_probe_uses_the_chosen_latents_alone():
    y = torch.arange(40) % 2 == 0
    informative = torch.stack([y.float() * 4, y.float() * 2], 1)
    z = torch.cat([draw(40, 3) * 0.1, informative], 1)
    z_test = z.clone()
    z_test[:, 4] = 2 - z_test[:, 4]  # the second best turns against its property
    assert sparse_probe_accuracy(z, y, z_test, y, k=1) == 1
    assert sparse_probe_accuracy(z, y, 4 - z_test, y, k=1) == 0
    z_test[:, 3] = 0
    assert sparse_probe_accuracy(z, y, z_test, y, k=1) == 0.5


def test_the_test_examples_do_not_choose_the_latents():
    y = torch.arange(20) % 2 == 0
    z, z_test = torch.zeros(20, 2), torch.zeros(20, 2)
    z[:, 0], z_test[:, 1] = y.float(), 50 * y.float()
    assert sparse_probe_accuracy(z, y, z_test, y, k=1) == 0.5


def test_a_property_of_the_texts_is_read_by_the_dense_probe_and_chance_is_a_half(task, model):
    baselines = task.baselines
    assert baselines["probing_dense"] > 0.95  # texts and activations are kept in step, whatever their lengths
    assert baselines["probing_chance"] == 0.5
    assert (baselines["probing_classes"], baselines["probing_texts"]) == (3, 120)
    mixed = [(text, "ab"[place % 2]) for place, (text, _) in enumerate(animals(60))]
    assert SparseProbing(model, SITE, mixed).baselines["probing_dense"] < 0.75


def test_an_identity_in_place_of_an_sae_scores_as_the_neurons_do(task):
    class Neurons(TopKSAE):
        def encode(self, x):
            return x

    sae = Neurons(12, 12, 3)
    scores = task(sae)
    assert sae.training
    assert set(scores) == {*NAMES, "probing_dense", "probing_chance", "probing_classes", "probing_texts"}
    for k in (1, 2, 5):
        assert scores[f"probing_{k}"] == scores[f"probing_neurons_{k}"]


def test_the_length_of_decoder_rows_belongs_to_the_code(task):
    """A latent of half the size with a row of twice the length is the same latent."""
    sae = TopKSAE(12, 24, 24).eval()
    scores = task(sae)

    class Halved(TopKSAE):
        def encode(self, x):
            return super().encode(x) * self.factors

    other = Halved(12, 24, 24)
    other.load_state_dict(sae.state_dict())
    other.factors = torch.linspace(0.01, 100, 24)
    other.W_dec.data /= other.factors.unsqueeze(1)
    assert task(other) == pytest.approx(scores)


def test_the_average_is_over_classes_and_then_over_properties(model):
    """Four animals tell themselves; the letters tell nothing: a mean over all classes would be nearer to 1."""
    words = ("cat", "dog", "sun", "moon")
    records = [
        Record(text, register=word, sentiment="glad" if place % 2 else "sad")
        for word in words
        for place, text in enumerate(sentences(40, word))
    ]
    task = SparseProbing(model, SITE, records)
    assert [(problem.property, problem.value) for problem in task.problems][:4] == [
        ("register", word) for word in sorted(words)
    ]
    assert [problem.property for problem in task.problems[4:]] == ["sentiment"]  # one of two: the other is its mirror
    scores = [
        SparseProbing(model, SITE, [(r.text, getattr(r, name)) for r in records]) for name in ("register", "sentiment")
    ]
    for name in NAMES[3:]:  # the same texts, in the same order: the same scores
        expected = sum(score.baselines[name] for score in scores) / 2
        assert task.baselines[name] == pytest.approx(expected)


def test_classes_are_balanced_with_the_others_taken_evenly_and_no_text_on_both_sides(model):
    texts = animals(30) + animals(30)  # each text twice
    task = SparseProbing(model, SITE, texts, size=40)
    for problem in task.problems:
        assert (len(problem.train), len(problem.test)) == (32, 8)
        assert problem.y_train.sum() == 16 and problem.y_test.sum() == 4
        assert not set(problem.train.tolist()) & set(problem.test.tolist())
    first, second = (set(problem.train.tolist() + problem.test.tolist()) for problem in task.problems[:2])
    assert len(first & second) == 30  # ten of each as the other's contrast, and ten of the third in both


def test_only_stories_have_a_topic():
    from sae_lib.metrics.sparse_probing import problems

    records = [
        Record(f"{register} {number}", register=register, topic=f"{register}{number % 2}")
        for register in ("story", "prose")
        for number in range(60)
    ]
    found, _ = problems(records, seed=0, size=100)
    assert [(problem.property, problem.value) for problem in found] == [("register", "prose"), ("topic", "story0")]


def test_the_seed_decides_the_texts(model, task):
    again, other = (SparseProbing(model, SITE, animals(60), seed=seed) for seed in (0, 1))
    sae = TopKSAE(12, 24, 3)
    assert again(sae) == task(sae) != other(sae)


def test_a_data_set_in_a_folder_gives_labelled_texts_in_another_order(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"review": f"text {number}", "stars": number // 50} for number in range(100)]
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    texts = labelled_texts(str(folder), text="review", label="stars", limit=40)
    assert len(texts) == 40 and {label for _, label in texts} == {"0", "1"}  # sorted by label, but shuffled
    assert all(label == str(int(text.split()[1]) // 50) for text, label in texts)
    assert texts == labelled_texts(str(folder), text="review", label="stars", limit=40)
    with pytest.raises(ValueError, match=r"columns of .*'review', 'stars'\], got 'label'"):
        labelled_texts(str(folder), text="review")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        labelled_texts(str(folder))


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: pooled(torch.ones(2, 2, 1), torch.tensor([[True, True], [False, False]])),
            "at least one position of each text, got none in 1 of 2 texts",
        ),
        (
            lambda: strongest_latents(torch.ones(2, 3), torch.tensor([True, False]), 4),
            r"k must be an integer in \[1, d_sae=3\], got 4",
        ),
        (
            lambda: strongest_latents(torch.ones(2, 3), torch.tensor([True, True]), 1),
            r"True for some and False for other rows, got \[True\] in all",
        ),
        (
            lambda: strongest_latents(torch.ones(2, 3), torch.tensor([True]), 1),
            "property of each of the 2 rows, got 1",
        ),
        (
            lambda: strongest_latents(torch.full((2, 3), torch.nan), torch.tensor([True, False]), 1),
            "z must be finite, got NaN",
        ),
        (
            lambda: sparse_probe_accuracy(
                torch.ones(2, 3), torch.tensor([True, False]), torch.ones(1, 2), torch.tensor([True]), 1
            ),
            "width of z_train, d_sae=3, got 2",
        ),
        (
            lambda: sparse_probe_accuracy(
                torch.ones(2, 3), torch.tensor([True, False]), torch.ones(2, 3), torch.tensor([True]), 1
            ),
            "y_test must tell the property of each of the 2 rows, got 1",
        ),
    ],
)
def test_bad_input_is_refused_with_rule_value_and_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_texts_without_two_large_classes_are_refused_with_what_there_is(model):
    with pytest.raises(ValueError, match=r"two classes of at least 20 different texts each, got .*'cat': 25, 'dog': 3"):
        SparseProbing(model, SITE, animals(25)[:28])
    with pytest.raises(ValueError, match="at least 10, got 4"):
        SparseProbing(model, SITE, animals(25), size=4)
    with pytest.raises(ValueError, match="at least one token"):
        SparseProbing(model, SITE, [(" " * number, "a") for number in range(20)] + animals(20))
