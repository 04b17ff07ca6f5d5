"""Marks: texts that say what they mean.

A document is written with marks: ``the ⟨noun cow|cows⟩`` is the text "the cows" in which characters 4 to 8 fill the
slot ``noun`` with the value ``cow`` (without a value, the text is the value). ``data.Record`` turns marks into spans:
every word which the generator chose carries what the generator meant. Chapter: ``pocket``.
"""

from __future__ import annotations

import re

LIMIT = 127  # tokens in a document; one more, the beginning-of-sequence token, fills the context of 128


def mark(slot: str, text: str, value: str | int | None = None) -> str:
    """``text`` that fills ``slot`` with ``value`` (by default the text itself)."""
    return f"⟨{slot}|{text}⟩" if value is None or value == text else f"⟨{slot} {value}|{text}⟩"


def plain(marked: str) -> str:
    """The text without its marks."""
    return re.sub(r"⟨[^|]*\|([^⟩]*)⟩", r"\1", marked)


def length(marked: str) -> int:
    """Tokens in a generated text: words, single digits, punctuation marks and ends of lines (each is one token)."""
    return len(re.findall(r"[^\W\d_]+|\d|[^\w ]|_", plain(marked)))


def article(phrase: str) -> str:
    return ("an " if plain(phrase)[0] in "aeiou" else "a ") + phrase
