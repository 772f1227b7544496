"""The demo's texts, read from texts.toml: questions, facts, and answers of the assistant Pip."""

import tomllib
from pathlib import Path
from typing import NamedTuple

from jaxchat.demo.chance import Chance

TEXTS = tomllib.loads((Path(__file__).parent / "texts.toml").read_text(encoding="utf-8"))


class Phrasings(NamedTuple):
    """Ways to ask one question. `train` is for training conversations, `held_out` for scoring only."""

    train: list[str]
    held_out: list[str]

    def pick(self, held_out: bool) -> list[str]:
        return self.held_out if held_out else self.train

    @classmethod
    def of(cls, table: dict) -> "Phrasings":
        return cls(table["train"], table["held_out"])


class Relation(NamedTuple):
    """A kind of fact about a person or a land, such as a land's capital."""

    values: list[str]  # empty: the world's towns for a person, the land's own capital for a land
    # Sentences of base training, with {x} for the name and {v} for the value. The assistant says the first.
    tell: list[str]
    ask: Phrasings  # questions about the fact

    @classmethod
    def all_of(cls, table: dict) -> dict[str, "Relation"]:
        return {name: cls(one["values"], one["tell"], Phrasings.of(one)) for name, one in table.items()}


class Trait(NamedTuple):
    """A trait of the assistant Pip. A right answer about it contains `proof` and no other trait's proof."""

    answer: str
    proof: str
    ask: Phrasings


OPENERS, QUESTION_ENDS, REQUEST_ENDS = TEXTS["openers"], TEXTS["question_ends"], TEXTS["request_ends"]
SIGNS, PROSE, GREETINGS, GOODBYES = TEXTS["signs"], TEXTS["prose"], TEXTS["greetings"], TEXTS["goodbyes"]
THINGS, THING_SENTENCES = TEXTS["things"], TEXTS["thing_sentences"]
SUM_FRAMES, SPELLING = Phrasings.of(TEXTS["sum_frames"]), Phrasings.of(TEXTS["spelling"])
COUNTING, DEFINITIONS = Phrasings.of(TEXTS["counting"]), Phrasings.of(TEXTS["definitions"])
SUM_WORDS = {sign: Phrasings.of(table) for sign, table in TEXTS["sum_words"].items()}
TRAITS = [Trait(about["answer"], about["proof"], Phrasings.of(about)) for about in TEXTS["traits"]]
PERSON, LAND = Relation.all_of(TEXTS["person"]), Relation.all_of(TEXTS["land"])
RELATIONS = PERSON | LAND

# Every text that a conversation may contain.
SPOKEN = (OPENERS, SIGNS, SUM_FRAMES, SUM_WORDS, SPELLING, COUNTING, DEFINITIONS, GREETINGS, GOODBYES)
SPOKEN += (TRAITS, THINGS, THING_SENTENCES, RELATIONS)


def maybe_capitalized(chance: Chance, text: str) -> str:
    """Capitalize the first letter with probability 2/3, to imitate how people type."""
    return text[0].upper() + text[1:] if chance.one_in(1.5) else text


def phrased(chance: Chance, phrasings: list[str], **slots) -> str:
    """Fill `slots` into a random template of `phrasings`. Vary its beginning and ending at random."""
    phrasing = chance.of(phrasings)
    if phrasing[-1] in "?." and chance.one_in(4):
        phrasing = phrasing[:-1] + chance.of(QUESTION_ENDS if phrasing[-1] == "?" else REQUEST_ENDS)
    if chance.one_in(4):
        phrasing = chance.of(OPENERS) + phrasing
    if phrasing[0] != "{":  # a name keeps its capital, and a word its lower case
        phrasing = maybe_capitalized(chance, phrasing)
    return phrasing.format(**slots)
