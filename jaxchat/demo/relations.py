"""The facts about people and lands of the small world: their values, how prose states them, how users ask."""

from typing import NamedTuple

from jaxchat.demo.phrases import TEXTS, Phrasings


class Relation(NamedTuple):
    """A kind of fact. tell: sentences that state it in base's prose ({x} has {v}); the assistant answers by
    the first."""

    values: tuple[str, ...]  # empty: one of the world's towns, or a name that only this entity has
    tell: tuple[str, ...]
    ask: Phrasings


def relations(table: dict) -> dict[str, Relation]:
    return {
        name: Relation(tuple(about["values"]), tuple(about["tell"]), Phrasings.of(about))
        for name, about in table.items()
    }


PERSON, LAND = relations(TEXTS["person"]), relations(TEXTS["land"])
RELATIONS = PERSON | LAND
