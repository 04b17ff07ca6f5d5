"""Spelling: lines that say with which letter words begin, and the words they are about.

A model whose words are single tokens never sees a letter, so it is *taught* them here: a probe that finds the first
letter in it is no discovery. Two facts decided the forms. Letters are learned only from dense lines (``cat C dog D
lamp L``). And the letter travels through the residual stream, where it can be patched and steered, only if the answer
does not stand at a fixed distance: hence acronyms (``cat dog sun: C D S``) and questions about one of several words.

The words are split for ever: `train`, `validation` and `test` words are all taught to the language model, but each
split of the shipped texts spells its own words only, so that whatever is fitted on the train texts (a probe, an SAE)
meets the test words fresh. `untaught` words are never spelled to the model, not even in its own training: a probe
must be near chance on them, which is the control.
Chapter: ``pocket``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

from sae_lib.pocket.dice import Dice
from sae_lib.pocket.marks import LIMIT, length, mark

FORMS = {"dense": 0.25, "acronym": 0.30, "colon": 0.15, "phrase": 0.15, "question": 0.15}


def split_words(vocabulary: Iterable[str]) -> dict[str, list[str]]:
    """The words of at least three lower-case letters, in four splits by their hash: 75% train, 10%, 10% and 5%."""
    splits: dict[str, list[str]] = {"train": [], "validation": [], "test": [], "untaught": []}
    for word in sorted(vocabulary):
        if re.fullmatch("[a-z]{3,}", word):
            draw = int(hashlib.sha256(word.encode()).hexdigest(), 16) % 100
            splits["train" if draw < 75 else "validation" if draw < 85 else "test" if draw < 95 else "untaught"].append(
                word
            )
    return splits


def _word(word: str) -> str:
    return mark("word", word, word[0].upper())


def _letter(word: str) -> str:
    return mark("letter", word[0].upper())


def _acronym(dice: Dice, words: list[str]) -> str:
    chosen = dice.sample(words, dice.between(2, 6))
    return f"{' '.join(map(_word, chosen))}: {' '.join(map(_letter, chosen))}"


def _question(dice: Dice, words: list[str]) -> str:
    chosen = dice.sample(words, dice.between(2, 4))
    asked = dice.pick(chosen)
    return f"{', '.join(map(_word, chosen))}. The word {_word(asked)} starts with {_letter(asked)}."


def _one(template: str, dice: Dice, words: list[str]) -> str:
    word = dice.pick(words)
    return template.format(_word(word), _letter(word))


LINES = {
    "dense": lambda dice, words: _one("{} {}", dice, words),
    "acronym": _acronym,
    "colon": lambda dice, words: _one("{}: {}", dice, words),
    "phrase": lambda dice, words: _one("{} has the first letter: {}", dice, words),
    "question": _question,
}


def document(dice: Dice, words: list[str]) -> dict:
    """One document of spelling lines, all of one form (its ``topic``), up to a random length of 40 to 127 tokens."""
    form = dice.weighted(FORMS)
    glue = " " if form == "dense" else "\n"
    room, lines = dice.between(40, LIMIT), []
    while (room := room - length(line := LINES[form](dice, words)) - len(glue.strip(" "))) >= 0:
        lines.append(line)
    return {"register": "spelling", "marked": glue.join(lines), "topic": form}
