"""Words and how they bend: what the generated texts are made of.

The lists stand in ``words.toml``. This file reads them and knows the regular inflections of English and the irregular
forms that the lists need. Nothing here is random. Chapter: ``pocket``.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import NamedTuple


class Topic(NamedTuple):
    """The words of one topic, in their base form; a story keeps to one topic."""

    nouns: list[str]
    verbs: list[str]
    adjectives: list[str]
    places: list[str]
    roles: list[str]


def _pairs(text: str) -> dict[str, str]:
    words = text.split()
    return dict(zip(words[::2], words[1::2], strict=True))


_LISTS = tomllib.loads(Path(__file__).with_name("words.toml").read_text(encoding="utf-8"))

TOPICS = {
    name: Topic(**{part: words.split() for part, words in parts.items()}) for name, parts in _LISTS["topics"].items()
}
KINDS = {kind: words.split() for kind, words in _LISTS["kinds"].items()}
FOREIGN = {
    language: {part: phrases.split("|") for part, phrases in parts.items()}
    for language, parts in _LISTS["foreign"].items()
}
COMMON_NOUNS, MASS_NOUNS, ADVERBS, GLAD, SAD, BOYS, GIRLS, NUMBERS, DAYS, MONTHS = (
    _LISTS[name].split() for name in "common_nouns mass_nouns adverbs glad sad boys girls numbers days months".split()
)
CAPITALS = _pairs(_LISTS["capitals"])
_PLURALS = _pairs(_LISTS["plurals"])
_PASTS = _pairs(_LISTS["pasts"])
_MASS = frozenset(MASS_NOUNS)


def is_mass(noun: str) -> bool:
    """Whether the noun cannot be counted ("some bread", never "two breads")."""
    return noun in _MASS


def _hisses(word: str) -> bool:
    return word.endswith(("s", "x", "z", "ch", "sh"))


def _y_after_consonant(word: str) -> bool:
    return word.endswith("y") and word[-2] not in "aeiou"


def _doubles(verb: str) -> bool:
    """Verbs of one syllable that end in consonant, vowel, consonant double the last letter: ``chop``, ``chopped``."""
    return len(verb) <= 4 and verb[-1] in "pgtbnmr" and verb[-2] in "aeiou" and not set(verb[:-2]) & set("aeiou")


def plural(noun: str) -> str:
    """``cow`` -> ``cows``, ``berry`` -> ``berries``, ``mouse`` -> ``mice``; mass nouns stay."""
    if noun in _PLURALS:
        return _PLURALS[noun]
    if is_mass(noun):
        return noun
    if _hisses(noun):
        return noun + "es"
    return noun[:-1] + "ies" if _y_after_consonant(noun) else noun + "s"


def past(verb: str) -> str:
    """``paint`` -> ``painted``, ``chop`` -> ``chopped``, ``write`` -> ``wrote``."""
    if verb in _PASTS:
        return _PASTS[verb]
    if verb.endswith("e"):
        return verb + "d"
    if _y_after_consonant(verb):
        return verb[:-1] + "ied"
    return verb + verb[-1] + "ed" if _doubles(verb) else verb + "ed"


def third(verb: str) -> str:
    """Third person singular of the present: ``watch`` -> ``watches``."""
    if _hisses(verb) or verb.endswith("o"):
        return verb + "es"
    return verb[:-1] + "ies" if _y_after_consonant(verb) else verb + "s"


def gerund(verb: str) -> str:
    """``bake`` -> ``baking``, ``chop`` -> ``chopping``, ``see`` -> ``seeing``."""
    if verb.endswith("e") and not verb.endswith("ee"):
        return verb[:-1] + "ing"
    return verb + verb[-1] + "ing" if _doubles(verb) else verb + "ing"


def words() -> list[str]:
    """Every English word form that the grammar can put into a text, sorted. The tokenizer gives each one a token."""
    forms = {
        *COMMON_NOUNS,
        *ADVERBS,
        *GLAD,
        *SAD,
        *BOYS,
        *GIRLS,
        *NUMBERS,
        *DAYS,
        *MONTHS,
        *CAPITALS,
        *CAPITALS.values(),
    }
    for kind, members in KINDS.items():
        forms |= {kind, *members}
    for topic in TOPICS.values():
        forms |= {*topic.nouns, *map(plural, topic.nouns), *topic.adjectives, *topic.places, *topic.roles}
        forms |= {form(verb) for verb in topic.verbs for form in (str, past, third, gerund)}
    return sorted(forms)
