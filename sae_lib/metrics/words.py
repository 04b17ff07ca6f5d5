"""Words that are single tokens, and where a model meets them: in prompts about spelling, or in running text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from sae_lib.models import LanguageModel

ASKS = " has the first letter:"
EXAMPLES = 10
"""Words with their letters before the first that is asked; fewer if the context is short."""
PER_WORD = 2
"""Most places in the texts where a word is read."""


class Place(NamedTuple):
    """A word that is one token: its text as token ids, where the token stands in it, and the word in small letters."""

    row: list[int]
    position: int
    word: str


def vocabulary(model: LanguageModel) -> list[str]:
    """The alphabetic tokens of a model, with a leading space where they have one, in the order of their ids."""
    ids = model.tokenizer.get_vocab()
    words = (model.tokenizer.convert_tokens_to_string([token]) for token in sorted(ids, key=ids.get))
    return list(dict.fromkeys(word for word in words if re.fullmatch(" ?[A-Za-z]+", word)))


def tokenized(model: LanguageModel, texts: Iterable[str]) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
    """Token ids of each text without BOS, and the characters that each token covers."""
    encoded = model.tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    for row, spans in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        bos = row[:1] == [model.bos]
        yield row[bos:], spans[bos:]


def places_in(model: LanguageModel, texts: Iterable[Any]) -> list[Place]:
    """All words of running texts that are one token. Of a text longer than the context, its beginning is read."""
    texts = [getattr(record, "text", record) for record in texts]
    places = []
    for text, (row, spans) in zip(texts, tokenized(model, texts), strict=True):
        row = row[: model.context - 1]
        for position, (start, end) in enumerate(spans[: len(row)]):
            word = text[start:end].lstrip()
            begin = end - len(word)
            alone = not text[max(0, begin - 1) : begin].isalpha() and not text[end : end + 1].isalpha()
            if alone and re.fullmatch("[A-Za-z]+", word):
                places.append(Place(row, position, word.lower()))
    return places


def some_of_each(places: Sequence[Place], generator: torch.Generator) -> list[Place]:
    """At most `PER_WORD` places of each word, by chance, in the order of the texts."""
    seen, chosen = Counter(), []
    for number in torch.randperm(len(places), generator=generator).tolist():
        word = places[number].word
        if seen[word] < PER_WORD:
            seen[word] += 1
            chosen.append(number)
    return [places[number] for number in sorted(chosen)]


def prompts(
    model: LanguageModel, words: Sequence[str], train: set[str], test: set[str], generator: torch.Generator
) -> list[Place]:
    """Each word of either set in the reference's prompt: ten examples of train words, then the word and the question.

    A prompt goes on with other words' questions as long as the context has room, which the word itself does not see; in
    a short context it has fewer examples. Words that are not one token where they stand are left out.
    """
    words = [word for word in words if word.strip().lower() in train | test]
    known = [word for word in words if word.strip().lower() in train]
    room = (model.context - 1) // max(len(row) for row, _ in tokenized(model, map(asking, words)))
    if not room:
        raise ValueError(f"a line such as {asking('word')!r} must fit the context, got {model.context} tokens")
    examples = min(EXAMPLES, room - 1)
    texts, asked = [], []
    for part in torch.randperm(len(words), generator=generator).split(room - examples):
        part = [words[number] for number in part.tolist()]
        drawn = torch.randperm(len(known), generator=generator)[:room].tolist()
        text, ends = "".join([asking(known[n]) for n in drawn if known[n] not in part][:examples]), {}
        for word in part:
            ends[len(text) + len(f"\n{word}")] = word
            text += asking(word)
        texts.append(text)
        asked.append(ends)
    places = []
    for text, ends, (row, spans) in zip(texts, asked, tokenized(model, texts), strict=True):
        for position, (start, end) in enumerate(spans):
            if end in ends and text[start:end].strip() == ends[end].strip():
                places.append(Place(row, position, ends[end].strip().lower()))
    return places


def asking(word: str) -> str:
    """A line of a prompt.

    >>> asking("lamp")
    '\\nlamp has the first letter: L'
    """
    return f"\n{word}{ASKS} {word.strip()[0].upper()}"
