"""Phrasings of users: questions on sums, spelling, letters and definitions, greetings; from texts.toml."""

import tomllib
from pathlib import Path
from typing import NamedTuple

from jaxchat.demo.chance import Chance

TEXTS = tomllib.loads((Path(__file__).parent / "texts.toml").read_text(encoding="utf-8"))


class Phrasings(NamedTuple):
    """Ways to put one question. Those held out are in no conversation: the score is measured with them."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]

    def pick(self, held_out: bool) -> tuple[str, ...]:
        return self.held_out if held_out else self.train

    @classmethod
    def of(cls, table: dict) -> "Phrasings":
        return cls(tuple(table["train"]), tuple(table["held_out"]))


def tuples(table: dict[str, list[str]]) -> dict[str, tuple[str, ...]]:
    return {name: tuple(texts) for name, texts in table.items()}


OPENERS, QUESTION_ENDS, REQUEST_ENDS = (
    tuple(TEXTS[name]) for name in ("openers", "question_ends", "request_ends")
)
SIGNS = tuples(TEXTS["signs"])
SUM_FRAMES = Phrasings.of(TEXTS["sum_frames"])
SUM_WORDS = {sign: Phrasings.of(table) for sign, table in TEXTS["sum_words"].items()}
SPELLING, COUNTING, DEFINITIONS = (
    Phrasings.of(TEXTS[name]) for name in ("spelling", "counting", "definitions")
)
GREETINGS, GOODBYES, PROSE = (tuples(TEXTS[name]) for name in ("greetings", "goodbyes", "prose"))

# Every text of this module that a conversation may hold.
ALL = (OPENERS, SIGNS, SUM_FRAMES, SUM_WORDS, SPELLING, COUNTING, DEFINITIONS, GREETINGS, GOODBYES)


def in_case(chance: Chance, text: str) -> str:
    """Write a text as people type it: the first letter is a capital two times in three."""
    return text[0].upper() + text[1:] if chance.one_in(1.5) else text


def phrased(chance: Chance, phrasings: tuple[str, ...], **slots) -> str:
    """Ask a question in one of its phrasings, with or without an opener, now and then with another end."""
    phrasing = chance.of(phrasings)
    if phrasing[-1] in "?." and chance.one_in(4):
        phrasing = phrasing[:-1] + chance.of(QUESTION_ENDS if phrasing[-1] == "?" else REQUEST_ENDS)
    if chance.one_in(4):
        phrasing = chance.of(OPENERS) + phrasing
    if phrasing[0] != "{":  # a name keeps its capital, a word its small letter
        phrasing = in_case(chance, phrasing)
    return phrasing.format(**slots)
