"""The embedded texts and language model, and how they are made."""

import hashlib
import itertools
import json
import lzma
import math
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import sae_lib
from sae_lib.__main__ import app
from sae_lib.data import SPLITS, TEXTS, Record, load_texts
from sae_lib.pocket import build, gates, grammar, lexicon, marks, prose, provenance, spelling, story, train
from sae_lib.pocket import tokenizer as tokenizers
from sae_lib.pocket.card import card
from sae_lib.pocket.dice import Dice

MODEL = Path(sae_lib.__file__).parent / "assets" / "pocket"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def words():
    return json.loads((TEXTS / "words.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def texts():
    return {split: load_texts("pocket", split) for split in SPLITS}


# Chance ---------------------------------------------------------------------------------------------------------------


def test_dice_use_nothing_but_random_random():
    reference = random.Random("seed")
    expected = [int(reference.random() * 10) for _ in range(5)]
    dice = Dice("seed")
    assert [dice.roll(10), dice.pick(range(10)), dice.between(0, 9), *dice.sample(range(10), 1)] == expected[:4]


def test_zipf_prefers_the_first_items_as_one_over_place_plus_two():
    dice = Dice("zipf")
    drawn = [dice.zipf("ab") for _ in range(5_000)]
    assert drawn.count("a") / 5_000 == pytest.approx(0.6, abs=0.03)  # 1/2 against 1/3


def test_weights_are_shares():
    dice = Dice("weights")
    drawn = [dice.weighted({"a": 3.0, "b": 1.0}) for _ in range(5_000)]
    assert drawn.count("a") / 5_000 == pytest.approx(0.75, abs=0.03)


def test_a_sample_has_no_item_twice_and_is_at_most_everything():
    assert sorted(Dice("all").sample("abcde", 5)) == list("abcde")
    assert sorted(Dice("all").shuffled("abcde")) == list("abcde") != Dice("all").shuffled("abcde")
    with pytest.raises(ValueError, match="at most as large as its 2 items, got 3"):
        Dice("all").sample("ab", 3)


# Words and marks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inflect", "pairs"),
    [
        (lexicon.plural, "cow cows, berry berries, key keys, box boxes, mouse mice, bread bread, witch witches"),
        (
            lexicon.past,
            "paint painted, bake baked, carry carried, chop chopped, open opened, write wrote, stir stirred",
        ),
        (lexicon.third, "paint paints, watch watches, carry carries, go goes, obey obeys"),
        (lexicon.gerund, "bake baking, chop chopping, see seeing, carry carrying, iron ironing"),
    ],
)
def test_words_bend_as_english_does(inflect, pairs):
    for base, form in (pair.split() for pair in pairs.split(", ")):
        assert inflect(base) == form


def test_marks_leave_the_text_and_count_its_tokens():
    marked = f"the {marks.mark('noun', 'cows', 'cow')} and {marks.mark('name', 'Anna', 'Anna')}."
    assert marked == "the ⟨noun cow|cows⟩ and ⟨name|Anna⟩."
    assert marks.plain(marked) == "the cows and Anna."
    assert marks.length(marked) == 5
    assert marks.length("x_1 = 20\n") == 7
    assert marks.article(marks.mark("noun", "owl")) == "an ⟨noun|owl⟩"


# The generator --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("register", grammar.REGISTERS)
def test_documents_are_whole_words_and_fit_the_context(register, tokenizer):
    dice = Dice(register)
    documents = [grammar.document(dice, register) for _ in range(200)]
    encoded = tokenizer([marks.plain(document["marked"]) for document in documents]).input_ids
    assert max(map(len, encoded)) <= tokenizers.CONTEXT
    for document, ids in zip(documents, encoded, strict=True):
        assert not any(token.startswith("##") for token in tokenizer.convert_ids_to_tokens(ids))
        assert len(ids) == marks.length(document["marked"]) + 1
        assert document["register"] == register


def test_a_story_ends_before_it_is_too_long(monkeypatch):
    monkeypatch.setattr(story, "LIMIT", 60)
    dice = Dice("long")
    lengths = [marks.length(story.Story(dice).text()) for _ in range(100)]
    assert 50 < max(lengths) <= 60


def test_an_unknown_register_is_refused():
    with pytest.raises(ValueError, match="register must be one of story, fact, foreign, code, got 'poem'"):
        grammar.document(Dice("x"), "poem")


def test_stories_keep_their_promises(texts):
    stories = [record for record in texts["test"] if record.register == "story"]
    assert {record.tense for record in stories} == {"past", "present"}
    for record in stories:
        forms = {"past": lexicon.past, "present": lexicon.third}
        feelings = lexicon.GLAD if record.sentiment == "glad" else lexicon.SAD
        for start, end, slot, value in record.spans:
            text = record.text[start:end]
            if slot == "pronoun":
                assert text.lower() in ({"she", "her"} if record.gender == "female" else {"he", "his", "him"})
                assert value == record.names[0]
            elif slot == "name":
                assert text in record.names
            elif slot == "feeling":
                assert text in feelings
            elif slot == "verb" and value == "be":
                assert text in ({"was", "were"} if record.tense == "past" else {"is", "are"})
            elif slot == "verb":
                assert text in {forms[record.tense](value), value, lexicon.gerund(value)}
        assert (record.names[0] in lexicon.GIRLS) == (record.gender == "female")


def test_facts_are_true(texts):
    checked = set()
    for record in texts["test"]:
        if record.register != "fact":
            continue
        spans = iter(record.spans)
        for sentence in record.text.split(". "):
            values = [next(spans).value for _ in range(3 if sentence.startswith("The sum") else 2)]
            rule = " ".join(sentence.split()[:2])
            checked.add(rule)
            if rule == "The sum":
                assert int(values[0]) + int(values[1]) == int(values[2])
            elif rule == "The number":
                assert int(values[0]) > int(values[1])
            elif rule in ("The day", "The month"):
                names = lexicon.DAYS if rule == "The day" else lexicon.MONTHS
                assert (names.index(values[0]) + 1) % len(names) == names.index(values[1])
            elif rule == "The city":
                assert lexicon.CAPITALS[values[0]] == values[1]
            else:
                kind, member = values if sentence.startswith("Some") else values[::-1]
                assert member in lexicon.KINDS[kind]
        assert next(spans, None) is None
    assert {"The sum", "The number", "The day", "The month", "The city"} <= checked


# Spelling -------------------------------------------------------------------------------------------------------------


def test_spelling_lines_tell_the_truth_in_every_form():
    dice = Dice("spelling")
    lamp = "⟨word L|lamp⟩"
    assert spelling.LINES["dense"](dice, ["lamp"]) == f"{lamp} ⟨letter|L⟩"
    assert spelling.LINES["colon"](dice, ["lamp"]) == f"{lamp}: ⟨letter|L⟩"
    assert spelling.LINES["phrase"](dice, ["lamp"]) == f"{lamp} has the first letter: ⟨letter|L⟩"


def test_acronyms_give_the_letters_in_the_order_of_the_words(texts):
    lines = [line for record in texts["test"] if record.topic == "acronym" for line in record.text.split("\n")]
    assert len(lines) > 100
    for line in lines:
        words, letters = line.split(": ")
        assert [word[0].upper() for word in words.split()] == letters.split()
    assert {len(line.split(": ")[1].split()) for line in lines} == {2, 3, 4, 5, 6}


def test_questions_are_about_any_of_their_words(texts):
    places = set()
    for record in texts["test"]:
        for line in record.text.split("\n") if record.topic == "question" else ():
            words, question = line.split(". ")
            asked, letter = question.removeprefix("The word ").removesuffix(".").split(" starts with ")
            assert asked[0].upper() == letter
            places.add(words.split(", ").index(asked))
    assert places == {0, 1, 2, 3}


def test_each_split_spells_its_own_words_and_nobody_the_untaught(texts, words):
    assert sum(map(len, words.values())) == len(set().union(*words.values()))
    for split in SPLITS:
        spelled = {
            record.text[span.start : span.end]
            for record in texts[split]
            if record.register == "spelling"
            for span in record.spans
            if span.slot == "word"
        }
        assert spelled <= set(words[split])
        assert len(spelled) > 0.9 * len(words[split])


def test_word_splits_have_their_shares_and_depend_on_the_word_alone(words):
    total = sum(map(len, words.values()))
    for split, share in {"train": 0.75, "validation": 0.10, "test": 0.10, "untaught": 0.05}.items():
        assert len(words[split]) / total == pytest.approx(share, abs=0.02)
    assert spelling.split_words(itertools.chain(*words.values())) == words
    assert spelling.split_words(["Cat", "ox", "x1y", words["test"][0]]) == {
        "train": [],
        "validation": [],
        "test": [words["test"][0]],
        "untaught": [],
    }


# Prose ----------------------------------------------------------------------------------------------------------------

SOURCE = '''
"""A module about the weather, and what is to be said of it in a few words."""
# The first line of a comment that is
# continued on the next line.
x = 1

def rain():
    """It is of some use to know when the rain is going to fall on the fields."""
'''


def test_prose_is_found_in_the_order_of_the_source():
    texts = prose.texts_of(SOURCE)
    assert [text.split()[0] for text in texts] == ["A", "The", "It"]
    assert texts[1] == "The first line of a comment that is\ncontinued on the next line."


def test_what_does_not_parse_has_no_prose():
    assert prose.texts_of("def (:") == []


def test_only_english_paragraphs_stay():
    text = "This is\nthe `only` paragraph of the text that is — to stay.\n\nx = y + z * 2 - (a | b)\n\nToo short."
    assert list(prose.paragraphs(text)) == ["This is the only paragraph of the text that is  to stay."]


# The tokenizer --------------------------------------------------------------------------------------------------------


def test_the_tokenizer_is_an_ordinary_one_that_puts_bos_first(tokenizer):
    assert len(tokenizer) == tokenizers.VOCABULARY
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.model_max_length) == (0, 1, 128)
    ids = tokenizer("Anna saw 12 cows.\nlamp: L").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == [
        *("<|bos|>", "Anna", "saw", "1", "2", "cows", ".", "\n", "lamp", ":", "L"),
    ]


def test_every_spelling_word_is_one_token_wherever_it_stands(tokenizer, words):
    every = sorted(set().union(*words.values()))
    for form in ("{}", "{}:", "the {} is", "\n{}\n"):
        lengths = {len(ids) for ids in tokenizer([form.format(word) for word in every]).input_ids}
        assert len(lengths) == 1


def test_other_words_are_cut_into_the_longest_pieces(monkeypatch):
    base = len(tokenizers.choose_vocabulary([], []))
    monkeypatch.setattr(tokenizers, "VOCABULARY", base + 3)
    monkeypatch.setattr(tokenizers, "PIECES", 1)
    chosen = tokenizers.choose_vocabulary(["dog"], ["the the the walking talking balking"])
    assert chosen[base:] == ["dog", "the", "##alking"]
    small = tokenizers.build(chosen)
    assert small.tokenize("the dog, talking") == ["the", "dog", ",", "t", "##alking"]
    assert small.tokenize("dogs 12") == ["dog", "##s", "1", "2"]
    assert small("dog \N{SNOWMAN}").input_ids[-1] == small.unk_token_id


def test_more_required_words_than_the_vocabulary_holds_are_refused():
    every = (a + b + c + d for a, b, c, d in itertools.product("abcdefghij", repeat=4))
    with pytest.raises(ValueError, match="the vocabulary has 6144 entries, but"):
        tokenizers.choose_vocabulary(every, [])


# The shipped texts ----------------------------------------------------------------------------------------------------


def test_texts_and_tokenizer_are_those_of_the_provenance():
    made = json.loads((TEXTS / "provenance.json").read_text(encoding="utf-8"))
    for name, digest in made["sha256"].items():
        assert hashlib.sha256((TEXTS / name).read_bytes()).hexdigest() == digest
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in (TEXTS / "PSF-LICENSE.txt").read_text(encoding="utf-8")


def test_every_split_has_every_register_and_the_promised_size(texts):
    made = json.loads((TEXTS / "provenance.json").read_text(encoding="utf-8"))
    for split in SPLITS:
        registers = {record.register for record in texts[split]}
        assert registers == {"story", "fact", "foreign", "code", "spelling", "prose"} == set(made["tokens"][split])
    assert 2.4e6 < sum(made["tokens"]["train"].values()) < 2.7e6


def test_every_held_out_record_is_new_known_and_fits(texts, tokenizer):
    train_texts = {record.text for record in texts["train"]}
    for split in ("validation", "test"):
        assert not train_texts & {record.text for record in texts[split]}
        encoded = tokenizer([record.text for record in texts[split]]).input_ids
        assert max(map(len, encoded)) <= tokenizers.CONTEXT
        assert tokenizer.unk_token_id not in set(itertools.chain.from_iterable(encoded))
    assert not {record.text for record in texts["validation"]} & {record.text for record in texts["test"]}


def test_latent_variables_align_with_tokens(texts, tokenizer):
    for record in texts["test"][:300]:
        encoding = tokenizer(record.text, return_offsets_mapping=True)
        aligned = record.align(encoding.offset_mapping)
        assert aligned[0] is None
        found = [span for span, _ in itertools.groupby(span for span in aligned if span)]
        assert [span for span, _ in itertools.groupby(found)] == list(record.spans)
        for span, (start, end) in zip(aligned, encoding.offset_mapping, strict=True):
            assert span is None or span.start <= start < end <= span.end


# The training ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def rows(words):
    return train.Rows(MODEL, words["train"], ["This is the first record of the text."], seed=0)


def test_rows_start_with_bos_and_a_document_and_fill_the_context(rows, tokenizer, monkeypatch):
    monkeypatch.setattr(train, "STEPS", 2)
    for group in ("generated", "prose", "spelling"):
        block = rows.block(0, {group: 1.0})
        assert block.shape == (2, 16, 128)
        assert (block[:, :, 0] == tokenizer.bos_token_id).all()
        assert not np.isin(block, [tokenizer.pad_token_id, tokenizer.unk_token_id]).any()
    sentence = "<|bos|> This is the first record of the text ."
    assert tokenizer.convert_ids_to_tokens(rows.block(0, {"prose": 1.0})[0, 0])[:20] == (sentence.split() * 2)[:20]


def test_rows_depend_on_seed_and_block_alone(rows, words, monkeypatch):
    monkeypatch.setattr(train, "STEPS", 1)
    block = rows.block(3, train.SHARES)
    assert (rows.block(3, train.SHARES) == block).all()
    assert (rows.block(4, train.SHARES) != block).any()
    assert (train.Rows(MODEL, words["train"], ["A record."], seed=1).block(3, train.SHARES) != block).any()


def test_loss_is_the_mean_over_the_real_tokens_of_a_register(tokenizer):
    model = train.new_model(0)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)  # all 6,144 tokens are equally likely
    records = [Record("A cow.", "fact"), Record("Anna saw a cow and a goat.", "story"), Record("A pig.", "fact")]
    assert train.losses(model, tokenizer, records) == {
        "fact": pytest.approx(math.log(6144)),
        "story": pytest.approx(math.log(6144)),
    }
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = 1.0
        model.transformer.wte.weight[tokenizer.convert_tokens_to_ids("."), 0] = math.log(
            6143
        )  # half of the mass on "."
    found = train.losses(model, tokenizer, records)
    full_stop, other = math.log(2), math.log(2 * 6143)
    assert found["fact"] == pytest.approx((2 * other + full_stop) / 3, rel=1e-5)
    assert found["story"] == pytest.approx((7 * other + full_stop) / 8, rel=1e-5)


def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(train, "ROWS", 2)
    monkeypatch.setattr(train, "STEPS", 2)
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", -1)  # after every step

    def here(first, last, start, arguments):
        made = train.Rows(*arguments)
        for place in range(first, last):
            yield made.block(place, train.SHARES_AT_START if place < start else train.SHARES)

    steps, step = itertools.count(1), train._step

    def stop_at_the_fourth_step(*arguments):
        if next(steps) == 4:  # in the middle of a block
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(train, "blocks", here)
    arguments = (MODEL, ["lamp", "cup", "dog", "tree", "sun", "moon"], ["Prose."], [Record("A cow.")], 5 * 256, 0)
    whole, state = train.train(tmp_path / "whole", *arguments)
    assert (state["step"], state["tokens"], [row["tokens"] for row in state["history"]]) == (5, 1280, [1280])
    monkeypatch.setattr(train, "_step", stop_at_the_fourth_step)
    with pytest.raises(KeyboardInterrupt):
        train.train(tmp_path / "parts", *arguments)
    parts, resumed = train.train(tmp_path / "parts", *arguments)
    assert resumed["history"] == state["history"]
    assert len(resumed["commits"]) == 2
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match=r"is of a run with tokens, seed = \[1280, 0\], got \[1280, 1\]"):
        train.train(tmp_path / "parts", *arguments[:-1], 1)


def test_the_learning_rate_ends_at_zero():
    assert train.learning_rate(0.0) == pytest.approx(3e-3)
    assert train.learning_rate(0.5) == pytest.approx(1.5e-3)
    assert train.learning_rate(1.0) == 0.0


# The command ----------------------------------------------------------------------------------------------------------


def test_the_command_makes_an_ordinary_folder_in_twenty_steps(tmp_path, monkeypatch, texts, words):
    (tmp_path / "pocket").mkdir()
    (tmp_path / "texts").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, tmp_path / "pocket")
    shutil.copy(TEXTS / "provenance.json", tmp_path / "texts")
    few = {split: members[::20] for split, members in words.items()}
    (tmp_path / "texts" / "words.json").write_text(json.dumps(few))
    for split in SPLITS:
        with lzma.open(TEXTS / f"{split}.jsonl.xz") as whole:
            lines = b"".join(itertools.islice(whole, 60))
        (tmp_path / "texts" / f"{split}.jsonl.xz").write_bytes(lzma.compress(lines))
    for name, value in build.FAST_MEMORY.items():
        monkeypatch.setenv(name, value)
    arguments = ["pocket", "--out", str(tmp_path), "--tokens", str(20 * 16 * 128)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pocket")
    assert model.dtype == torch.float16
    block = 2 * 256 + (128 * 384 + 384) + (128 * 128 + 128) + (128 * 512 + 512) + (512 * 128 + 128)
    assert sum(parameter.numel() for parameter in model.parameters()) == (6144 + 128) * 128 + 4 * block + 256
    made = json.loads((tmp_path / "pocket" / "provenance.json").read_text())
    assert (made["tokens"], made["seed"], len(made["history"])) == (20 * 16 * 128, 0, 1)
    assert made["sha256"]["model.safetensors"] == provenance.sha256(tmp_path / "pocket" / "model.safetensors")
    assert not made["gates"]["test"]["spelling"]["passes"]
    assert not (tmp_path / "runs").exists()
    assert "is complete" in CliRunner().invoke(app, arguments).output


def test_the_command_starts_again_once_with_fast_memory(monkeypatch):
    started = []
    monkeypatch.setattr(os, "execve", lambda *arguments: started.append(arguments))
    monkeypatch.setattr("sys.argv", ["sae_lib", "pocket", "--seed", "3"])
    monkeypatch.delenv("MALLOC_MMAP_MAX_", raising=False)
    build.restart_with_fast_memory()
    ((_, command, environment),) = started
    assert command[1:] == ["-m", "sae_lib", "pocket", "--seed", "3"]
    assert environment["MALLOC_MMAP_MAX_"] == "0"
    for name, value in build.FAST_MEMORY.items():
        monkeypatch.setenv(name, value)
    build.restart_with_fast_memory()
    assert len(started) == 1


def test_a_file_is_whole_or_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    provenance.write_json(path, {"old": 1})

    def fail(*arguments):
        raise OSError("full disk")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="full disk"):
        provenance.write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}


# The gates, on the shipped weights ------------------------------------------------------------------------------------


def test_a_gate_passes_on_its_side_of_the_threshold():
    assert gates.Gate(1.69, most=1.7).passes
    assert not gates.Gate(1.71, most=1.7).passes
    assert gates.Gate(0.98, least=0.98).passes
    assert not gates.Gate(0.97, least=0.98).passes
    assert gates.Gate(0.0).passes


def test_the_shipped_model_passes_every_gate_on_a_sample(model, tokenizer, texts, words):
    found = gates.gates(model, tokenizer, texts["validation"], words, limit=150)
    assert {name: gate for name, gate in found.items() if not gate.passes} == {}


def test_without_the_letters_the_spelling_gates_fail(model, tokenizer, words):
    probes = gates.letter_probes(model, tokenizer, words["train"][::4], words["test"][::5], words["untaught"])
    assert max(untaught for _, untaught in probes) < 0.5  # words that were never spelled to the model
    assert gates.acronym_patch(model, tokenizer, words["test"], 50, layer=3) < 0.1  # after the last block: too late


def test_the_shipped_model_is_that_of_its_provenance():
    made = json.loads((MODEL / "provenance.json").read_text(encoding="utf-8"))
    for name, digest in made["sha256"].items():
        path = TEXTS.parent / name if name.startswith("texts/") else MODEL / name
        assert provenance.sha256(path) == digest
    assert (MODEL / "README.md").read_text(encoding="utf-8") == card(made)
    assert all(gate["passes"] for split in made["gates"].values() for gate in split.values())
