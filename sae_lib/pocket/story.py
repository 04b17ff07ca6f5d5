"""Stories: a hero, a topic, a tense, a sentiment, and sentences that agree with them.

What makes them learnable: a story keeps to its variables; nouns come back; each noun has its favourite adjectives and
each verb its favourite objects; words earlier in a list are more frequent (Zipf). Chapter: ``pocket``.
"""

from __future__ import annotations

from sae_lib.pocket import lexicon
from sae_lib.pocket.dice import Dice
from sae_lib.pocket.lexicon import gerund, is_mass, past, plural, third
from sae_lib.pocket.marks import LIMIT, article, length, mark


def _favourites() -> tuple[dict[str, list[str]], dict[tuple[str, str], list[str]]]:
    """For each noun its adjectives, for each topic and verb its objects: the habits of this small world."""
    dice = Dice("favourites")
    every_adjective = sorted({word for topic in lexicon.TOPICS.values() for word in topic.adjectives})
    adjectives = {noun: dice.sample(every_adjective, 3) for noun in lexicon.COMMON_NOUNS}
    objects = {}
    for name, topic in lexicon.TOPICS.items():
        for noun in topic.nouns:
            adjectives[noun] = dice.sample(topic.adjectives, 3) + [dice.pick(every_adjective)]
        for verb in topic.verbs:
            objects[name, verb] = dice.sample(topic.nouns, 6)
    return adjectives, objects


ADJECTIVES, OBJECTS = _favourites()
COMMON_NOUNS = Dice("common nouns").shuffled(lexicon.COMMON_NOUNS)  # their list is alphabetical, frequency must not be


class Story:
    """One story: its latent variables, and phrases that agree with them.

    Args:
        dice: source of chance.
    """

    def __init__(self, dice: Dice) -> None:
        self.dice = dice
        self.topic = dice.pick(list(lexicon.TOPICS))
        self.words = lexicon.TOPICS[self.topic]
        self.tense = "past" if dice.chance(0.6) else "present"
        self.sentiment = dice.pick(("glad", "sad"))
        self.gender = dice.pick(("female", "male"))
        self.hero = dice.zipf(lexicon.GIRLS if self.gender == "female" else lexicon.BOYS)
        self.friend = dice.zipf([name for name in lexicon.BOYS + lexicon.GIRLS[::-1] if name != self.hero])
        self.role = dice.zipf(self.words.roles)
        self.place = dice.zipf(self.words.places)
        self.mentioned: list[str] = []

    # Words
    def is_past(self) -> bool:
        return self.tense == "past"

    def name(self) -> str:
        return mark("name", self.hero)

    def other(self) -> str:
        return mark("name", self.friend)

    def pronoun(self, she: str, he: str) -> str:
        return mark("pronoun", she if self.gender == "female" else he, self.hero)

    def subject(self, first: bool = True) -> str:
        """The hero, by name or pronoun; ``first`` in the sentence or not."""
        if self.dice.chance(0.35):
            return self.name()
        return self.pronoun("She", "He") if first else self.pronoun("she", "he")

    def his(self) -> str:
        return self.pronoun("her", "his")

    def him(self) -> str:
        return self.pronoun("her", "him")

    def inflected(self, verb: str, many: bool = False) -> str:
        return mark("verb", past(verb) if self.is_past() else verb if many else third(verb), verb)

    def be(self, many: bool = False) -> str:
        text = ("were" if many else "was") if self.is_past() else ("are" if many else "is")
        return mark("verb", text, "be")

    def any_verb(self) -> str:
        return self.dice.zipf(self.words.verbs)

    def noun(self, verb: str | None = None) -> str:
        """A base form: often one of the story's nouns again, else one that the verb likes, else any."""
        if self.mentioned and self.dice.chance(0.45):
            return self.dice.pick(self.mentioned)
        if verb and self.dice.chance(0.6):
            noun = self.dice.zipf(OBJECTS[self.topic, verb])
        else:
            noun = self.dice.zipf(COMMON_NOUNS) if self.dice.chance(0.15) else self.dice.zipf(self.words.nouns)
        self.mentioned = [*self.mentioned, noun][-4:]
        return noun

    def adjective(self, noun: str) -> str:
        favourite = self.dice.chance(0.75)
        return mark(
            "adjective", self.dice.zipf(ADJECTIVES[noun]) if favourite else self.dice.zipf(self.words.adjectives)
        )

    def feeling(self) -> str:
        return mark("feeling", self.dice.zipf(lexicon.GLAD if self.sentiment == "glad" else lexicon.SAD))

    def one(self, noun: str) -> str:
        return mark("noun", noun)

    def many(self, noun: str) -> str:
        """The plural, where the noun has one that the vocabulary knows."""
        return mark("noun", plural(noun) if noun in self.words.nouns else noun, noun)

    def has_plural(self, noun: str) -> bool:
        return noun in self.words.nouns and not is_mass(noun)

    def phrase(self, noun: str) -> str:
        """``the muddy cow``, ``three cows``, ``a cow``."""
        adjective = self.adjective(noun) + " " if self.dice.chance(0.4) else ""
        kind = self.dice.random()
        if self.has_plural(noun) and kind < 0.15:
            number = self.dice.between(2, 9)
            return f"{mark('number', lexicon.NUMBERS[number - 1], number)} {adjective}{self.many(noun)}"
        if self.has_plural(noun) and kind < 0.35:
            return f"the {adjective}{self.many(noun)}"
        if not is_mass(noun) and kind < 0.55:
            return article(adjective + self.one(noun))
        return f"the {adjective}{self.one(noun)}"

    def action(self, many: bool = False) -> str:
        """A verb with its object: ``fed the hungry goat``."""
        verb = self.any_verb()
        return f"{self.inflected(verb, many)} {self.phrase(self.noun(verb))}"

    def wish(self) -> str:
        verb = self.any_verb()
        return f"{mark('verb', verb)} {self.phrase(self.noun(verb))}"

    def at(self) -> str:
        return mark("place", self.place if self.dice.chance(0.6) else self.dice.zipf(self.words.places))

    def when(self) -> str:
        return self.dice.zipf(
            ("Later", "In the morning", "At night", "After lunch", f"On {mark('day', self.dice.pick(lexicon.DAYS))}")
        )

    # Whole
    def opening(self) -> str:
        role, city = mark("role", self.role), mark("city", self.dice.zipf(list(lexicon.CAPITALS)))
        month = mark("month", self.dice.pick(lexicon.MONTHS))
        return self.dice.zipf(
            (
                f"{self.name()} {self.be()} {article(role)} from {city}.",
                f"One day, {self.name()} the {role} {self.inflected('go')} to the {mark('place', self.place)}.",
                f"This is a story about {article(role)} called {self.name()}.",
                f"In {month}, {article(role)} named {self.name()} {self.inflected('come')} to {city}.",
            )
        )

    def ending(self) -> str:
        return self.dice.zipf(
            (
                f"{self.name()} {self.be()} {self.feeling()}.",
                f"In the end, {self.name()} and {self.other()} {self.be(True)} {self.feeling()}.",
                f"It {self.be()} {article(self.feeling())} day for {self.name()}.",
            )
        )

    def text(self) -> str:
        sentences, ending = [self.opening()], self.ending()
        for _ in range(self.dice.between(4, 9)):
            sentence = self.dice.zipf(SENTENCES)(self)
            if length(" ".join([*sentences, sentence, ending])) > LIMIT:
                break
            sentences.append(sentence)
        return " ".join([*sentences, ending])

    def labels(self) -> dict:
        return {
            "topic": self.topic,
            "tense": self.tense,
            "sentiment": self.sentiment,
            "gender": self.gender,
            "names": [self.hero, self.friend],
        }


def _description(story: Story) -> str:
    noun = story.noun()
    many = story.has_plural(noun) and story.dice.chance(0.5)
    thing = story.many(noun) if many else story.one(noun)
    return f"The {thing} in the {story.at()} {story.be(many)} {story.adjective(noun)} and {story.adjective(noun)}."


def _reason(story: Story) -> str:
    noun = story.noun()
    start = f"{story.subject()} {story.be()} {story.feeling()}"
    return f"{start} because the {story.one(noun)} {story.be()} {story.adjective(noun)}."


def _question(story: Story) -> str:
    noun = story.noun()
    answer = story.dice.pick(("Yes", "No"))
    be = "Was" if story.is_past() else "Is"
    return f"{be} the {story.one(noun)} {story.adjective(noun)}? {answer}, it {story.be()}."


def _denial(story: Story) -> str:
    auxiliary = "did" if story.is_past() else "does"
    return f"{story.subject()} {auxiliary} not {story.wish()}, but {story.other()} {story.action()}."


def _speech(story: Story) -> str:
    start = story.dice.zipf(("I want to", "We must", "Please", "I will", "Do not"))
    return f'"{start} {story.wish()}," {story.inflected("say")} {story.name()}.'


def _taste(story: Story) -> str:
    verb = story.any_verb()
    noun = story.noun(verb)
    return f"{story.subject()} {story.inflected('like')} {mark('verb', gerund(verb), verb)} the {story.one(noun)}."


def _clause(story: Story) -> str:
    verb = story.any_verb()
    noun = story.noun(verb)
    return f"The {story.one(noun)} that {story.name()} {story.inflected(verb)} {story.be()} {story.adjective(noun)}."


SENTENCES = (
    lambda story: f"{story.subject()} {story.action()} in the {story.at()}.",
    lambda story: f"{story.subject()} {story.action()}.",
    lambda story: f"{story.subject()} {mark('adverb', story.dice.zipf(lexicon.ADVERBS))} {story.action()}.",
    _description,
    _reason,
    lambda story: f"{story.other()} {story.action()} with {story.him()}.",
    _speech,
    lambda story: f"{story.name()} and {story.other()} {story.action(many=True)} at the {story.at()}.",
    lambda story: f"{story.when()}, {story.subject(first=False)} {story.action()}.",
    _denial,
    lambda story: (
        f"{story.when()}, the {mark('role', story.role)} {story.action()} for {story.his()} {story.one(story.noun())}."
    ),
    _clause,
    _taste,
    _question,
    lambda story: f"{story.subject()} {story.action()}, {story.phrase(story.noun())} and {story.phrase(story.noun())}.",
)
