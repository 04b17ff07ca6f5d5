"""Documents whose latent variables are known: stories, facts, foreign sentences and code. Chapter: ``pocket``."""

from __future__ import annotations

from sae_lib.pocket import lexicon
from sae_lib.pocket.dice import Dice
from sae_lib.pocket.marks import article, mark, plain
from sae_lib.pocket.story import Story

LANGUAGES = sorted(lexicon.FOREIGN)
REGISTERS = {"story": 0.72, "fact": 0.12, "foreign": 0.09, "code": 0.07}  # share of documents


def facts(dice: Dice) -> str:
    """Four to nine true statements: kinds of things, sums, order of numbers, days and months, capitals."""
    return " ".join(dice.zipf(FACTS)(dice) for _ in range(dice.between(4, 9)))


def _kind(dice: Dice) -> str:
    kind = dice.pick(list(lexicon.KINDS))
    member = mark("noun", dice.zipf(lexicon.KINDS[kind]))
    if kind in ("metal", "food", "clothing"):
        return f"Some {mark('kind', kind)} is called {member}."
    return f"{'An' if plain(member)[0] in 'aeiou' else 'A'} {member} is {article(mark('kind', kind))}."


def _number(value: int) -> str:
    return mark("number", lexicon.NUMBERS[value - 1], value)


def _sum(dice: Dice) -> str:
    left, right = dice.between(1, 10), dice.between(1, 10)
    return f"The sum of {_number(left)} and {_number(right)} is {_number(left + right)}."


def _order(dice: Dice) -> str:
    small, large = sorted(dice.sample(range(1, 21), 2))
    return f"The number {_number(large)} is more than {_number(small)}."


def _next(slot: str, names: list[str], dice: Dice) -> str:
    place = dice.roll(len(names))
    return f"The {slot} after {mark(slot, names[place])} is {mark(slot, names[(place + 1) % len(names)])}."


def _capital(dice: Dice) -> str:
    city = dice.zipf(list(lexicon.CAPITALS))
    return f"The city of {mark('city', city)} is in {mark('country', lexicon.CAPITALS[city])}."


FACTS = (
    _kind,
    _sum,
    _capital,
    lambda dice: _next("day", lexicon.DAYS, dice),
    lambda dice: _next("month", lexicon.MONTHS, dice),
    _order,
)


def foreign(dice: Dice, language: str) -> str:
    """Four to eight sentences of subject, verb, object and sometimes a phrase, in French, German or Spanish."""
    parts = lexicon.FOREIGN[language]
    sentences = []
    for _ in range(dice.between(4, 8)):
        subject = dice.zipf(parts["subjects"])
        words = [
            mark("subject", subject[0].upper() + subject[1:], subject),
            mark("verb", dice.zipf(parts["verbs"])),
            mark("object", dice.zipf(parts["objects"])),
        ]
        if dice.chance(0.6):
            words.append(mark("phrase", dice.zipf(parts["phrases"])))
        sentences.append(" ".join(words) + ".")
    return " ".join(sentences)


VARIABLES = "value item name line text key result count index node path data".split()
FUNCTIONS = "find load update check read count open save get make".split()


def code(dice: Dice) -> str:
    """A short function in the manner of Python, or two; variables come back in their scope."""
    return "\n".join(_function(dice) for _ in range(dice.between(1, 2)))


def _function(dice: Dice) -> str:
    given, inner, out = (mark("identifier", name) for name in dice.sample(VARIABLES, 3))
    digit = mark("number", str(dice.roll(10)))
    lines = [
        f"def {mark('function', dice.zipf(FUNCTIONS))}({given}):",
        f"    {out} = {dice.zipf(('[]', '0', 'None', digit))}",
    ]
    body = dice.zipf(
        (
            f"        if {inner} == {digit}:\n            return {inner}",
            f"        if not {inner}:\n            continue",
            f"        {out}.append({inner})",
            f"        print({inner})",
            f"        {out} = {out} + {inner}",
        )
    )
    lines += dice.zipf(
        (
            [f"    for {inner} in {given}:", body],
            [f"    while {inner} < {digit}:", body],
            [f"    if {given} is None:", f"        raise ValueError({given})"],
            [f"    with open({given}) as {inner}:", f"        {out} = {inner}.read()"],
        )
    )
    return "\n".join([*lines, f"    return {dice.zipf((out, given, 'None'))}"])


def document(dice: Dice, register: str | None = None) -> dict:
    """One document: its ``register``, its labels and its ``marked`` text, as ``data.Record`` reads them.

    Args:
        dice: source of chance.
        register: one of ``REGISTERS``; drawn by their shares if not given.
    """
    register = register or dice.weighted(REGISTERS)
    if register == "story":
        story = Story(dice)
        return {"register": register, "marked": story.text(), **story.labels()}
    if register == "fact":
        return {"register": register, "marked": facts(dice)}
    if register == "foreign":
        language = dice.pick(LANGUAGES)
        return {"register": register, "marked": foreign(dice, language), "language": language}
    if register == "code":
        return {"register": register, "marked": code(dice), "language": "python"}
    raise ValueError(f"register must be one of {', '.join(REGISTERS)}, got {register!r}")
