"""Pip, the assistant of the small world: what it says about itself and about everyday things."""

from typing import NamedTuple

from jaxchat.demo.phrases import TEXTS, Phrasings


class Trait(NamedTuple):
    """One thing that users ask Pip about. An answer is right if it holds `proof` and no other trait's."""

    answer: str
    proof: str
    ask: Phrasings


TRAITS = tuple(Trait(about["answer"], about["proof"], Phrasings.of(about)) for about in TEXTS["traits"])
THINGS: dict[str, str] = TEXTS["things"]
THING_SENTENCES = tuple(TEXTS["thing_sentences"])

ALL = (TRAITS, THINGS, THING_SENTENCES)
