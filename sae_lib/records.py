"""A text and what is known about it: what its generator meant, aligned to characters and tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple


class Span(NamedTuple):
    """What the generator meant by a piece of its text: characters ``start`` to ``end`` fill ``slot`` with ``value``.

    Slots of the embedded texts: name, pronoun (value: the name meant), role, place, city, country, noun and verb
    (value: base form), adjective, adverb, feeling, number (value: digits), day, month, kind, subject, object, phrase,
    identifier, function, and in spelling word and letter (value: the first letter in upper case).
    """

    start: int
    end: int
    slot: str
    value: str


@dataclass(frozen=True)
class Record:
    """A text and what is known about it; None or empty where nothing is known. Chapter `pocket`.

    Attributes:
        text: the text itself, at most 127 tokens of the embedded tokenizer where it comes from the embedded texts.
        register: story, fact, foreign, code, spelling, prose; or plain, for texts from elsewhere.
        language: en, fr, de, es, python.
        topic: of a story; form of a spelling record; module of CPython that prose comes from.
        tense: past or present.
        sentiment: glad or sad.
        gender: of a story's hero, female or male.
        names: the hero and a friend.
        marked: the text with the latent variables of its generator: in ``the ⟨noun cow|cows⟩``, "cows" fills the slot
            noun with the value cow; without a value, the text is the value.
    """

    text: str
    register: str = "plain"
    language: str = "en"
    topic: str | None = None
    tense: str | None = None
    sentiment: str | None = None
    gender: str | None = None
    names: tuple[str, ...] = ()
    marked: str = field(default="", repr=False)

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """The latent variables of the generator, in the order of the text."""
        spans, removed = [], 0
        for found in _MARK.finditer(self.marked):
            slot, value, inner = found.groups()
            start = found.start() - removed
            spans.append(Span(start, start + len(inner), slot, value or inner))
            removed = found.end() - spans[-1].end
        return tuple(spans)

    def align(self, offsets: Iterable[tuple[int, int]]) -> list[Span | None]:
        """The span of each token, or None.

        Args:
            offsets: first and past-the-last character of each token, as ``return_offsets_mapping=True`` gives them;
                (0, 0) for special tokens.
        """
        spans, aligned = iter(self.spans), []
        span = next(spans, None)
        for start, end in offsets:
            while span and span.end <= start < end:
                span = next(spans, None)
            aligned.append(span if span and span.start < end and start < span.end else None)
        return aligned


_MARK = re.compile("⟨([^ |]+)(?: ([^|]*))?\\|([^⟩]*)⟩")
_MARKING = re.compile("⟨[^|]*\\||⟩")


def from_marked(document: dict) -> Record:
    """The record of one line of the embedded texts."""
    names = tuple(document.pop("names", ()))
    return Record(_MARKING.sub("", document["marked"]), names=names, **document)
