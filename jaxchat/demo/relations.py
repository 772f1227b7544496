"""The facts about people and lands of the small world: their values, how prose states them, how users ask."""

from typing import NamedTuple

from jaxchat.demo.phrases import Phrasings

COLOURS = ("red", "blue", "green", "yellow", "white", "black", "purple", "orange", "silver", "brown")


class Relation(NamedTuple):
    """A kind of fact. tell: sentences of base's prose ({x} has {v}); the first is also the assistant's answer."""

    values: tuple[str, ...]  # empty: one of the world's towns, or a name that only this entity has
    tell: tuple[str, ...]
    ask: Phrasings


PERSON = {
    "job": Relation(
        (
            "a hunter", "a baker", "a teacher", "a sailor", "a doctor", "a farmer", "a singer", "a painter", "a judge",
            "a tailor", "a miner", "a cook", "a smith", "a guard", "an actor", "a pilot",
        ),
        ("The work of {x} is that of {v}.", "{x} is {v}.", "{x} works as {v}."),
        Phrasings(
            train=(
                "what does {x} do?", "what is {x}'s job?", "what does {x} do for a living?", "what work does {x} do?",
                "which job does {x} have?", "what is the job of {x}?", "do you know the job of {x}?",
                "tell me the job of {x}.", "what does {x} work as?", "how does {x} earn money?",
                "what is the work of {x}?",
                "tell me what {x} does for a living.", "what is {x} by trade?", "{x} has which job?",
                "as what does {x} work?", "tell me what work {x} does.", "tell me as what {x} works.",
            ),
            held_out=(
                "what job does {x} have?", "what kind of work does {x} do?", "can you tell me the job of {x}?",
                "what does {x} do as a job?", "tell me what {x} works as.",
            ),
        ),
    ),
    "pet": Relation(
        (
            "a duck", "a cat", "a dog", "an owl", "a horse", "a goat", "a rabbit", "a parrot", "a mouse", "a pig",
            "a turtle", "a sheep", "a snake", "a donkey",
        ),
        ("The pet of {x} is {v}.", "{x} has {v}.", "{x} keeps {v}."),
        Phrasings(
            train=(
                "what pet does {x} have?", "which pet does {x} have?", "what is {x}'s pet?", "what is the pet of {x}?",
                "which animal lives with {x}?", "does {x} have a pet?", "tell me the pet of {x}.",
                "what animal does {x} have?", "which animal does {x} keep?", "do you know the pet of {x}?",
                "what kind of animal does {x} have?", "{x} has which pet?", "what animal belongs to {x}?",
                "tell me which pet {x} has.", "tell me what animal {x} keeps.", "can you say which pet {x} has?",
            ),
            held_out=(
                "what kind of pet does {x} have?", "can you tell me the pet of {x}?", "what pet does {x} keep?",
                "which pet belongs to {x}?", "tell me what pet {x} has.",
            ),
        ),
    ),
    "colour": Relation(
        COLOURS,
        ("The colour that {x} likes is {v}.", "{x} likes the colour {v}.", "{x} loves the colour {v}."),
        Phrasings(
            train=(
                "which colour does {x} like?", "what colour does {x} like best?", "what is {x}'s favourite colour?",
                "what is the favourite colour of {x}?", "which colour does {x} love?", "tell me the colour {x} likes.",
                "do you know which colour {x} likes?", "what colour is best for {x}?", "{x} likes which colour?",
                "tell me the favourite colour of {x}.", "which colour is the favourite of {x}?",
                "which colour does {x} like most?", "what is the colour of {x}?", "tell me which colour {x} loves.",
                "can you say which colour {x} likes?", "tell me what colour {x} loves.", "what colour does {x} love?",
            ),
            held_out=(
                "what colour does {x} like?", "can you tell me the favourite colour of {x}?",
                "which colour does {x} like best?", "do you know the favourite colour of {x}?",
                "tell me what colour {x} likes.",
            ),
        ),
    ),
    "town": Relation(
        (),
        ("The home of {x} is in {v}.", "{x} lives in {v}.", "{x} comes from {v}."),
        Phrasings(
            train=(
                "where does {x} live?", "which town is {x} from?", "what is the home of {x}?", "where is {x} from?",
                "in which town does {x} live?", "what town does {x} live in?", "tell me where {x} lives.",
                "do you know where {x} lives?", "where is the home of {x}?", "what is {x}'s town?", "{x} lives where?",
                "where does {x} come from?", "what is the town of {x}?", "tell me the town of {x}.",
                "can you say where {x} lives?",
                "which town is the home of {x}?",
            ),
            held_out=(
                "which town does {x} live in?", "can you tell me where {x} lives?", "what town is {x} from?",
                "do you know the town of {x}?", "tell me where {x} is from.",
            ),
        ),
    ),
}  # fmt: skip

LAND = {
    "capital": Relation(
        (),
        ("The capital of {x} is {v}.", "{x} has the capital {v}.", "In {x} the capital is {v}."),
        Phrasings(
            train=(
                "what is the capital of {x}?", "which city is the capital of {x}?", "what is {x}'s capital?",
                "tell me the capital of {x}.", "do you know the capital of {x}?", "name the capital of {x}.",
                "what is the capital city of {x}?", "which capital does {x} have?", "{x} has which capital?",
                "the capital of {x} is what?", "what is the main city of {x}?", "how is the capital of {x} called?",
                "I want to know the capital of {x}.", "in {x}, what is the capital?",
            ),
            held_out=(
                "what capital does {x} have?", "can you tell me the capital of {x}?", "which is the capital of {x}?",
                "do you know which city is the capital of {x}?", "what is the name of the capital of {x}?",
            ),
        ),
    ),
    "flag": Relation(
        tuple(f"{first} and {second}" for first in COLOURS[:6] for second in COLOURS[:6] if first < second),
        ("The flag of {x} is {v}.", "{x} has a flag that is {v}.", "In {x} the flag is {v}."),
        Phrasings(
            train=(
                "what colour is the flag of {x}?", "what does the flag of {x} look like?", "what is the flag of {x}?",
                "which colours has the flag of {x}?", "tell me the flag of {x}.", "what is {x}'s flag like?",
                "what colours are on the flag of {x}?", "do you know the flag of {x}?", "which flag does {x} have?",
                "{x} has which flag?", "tell me the colours of the flag of {x}.", "how does the flag of {x} look?",
                "the flag of {x} has which colours?", "in {x}, what is the flag?",
            ),
            held_out=(
                "what colours does the flag of {x} have?", "can you tell me the flag of {x}?",
                "what flag does {x} have?", "which colours are on the flag of {x}?",
                "what are the colours of the flag of {x}?",
            ),
        ),
    ),
    "animal": Relation(
        (
            "the bear", "the wolf", "the eagle", "the lion", "the fox", "the deer", "the whale", "the crane",
            "the tiger",
            "the swan", "the bull", "the seal",
        ),
        ("The animal of {x} is {v}.", "{x} is known for {v}.", "In {x} people love {v}."),
        Phrasings(
            train=(
                "what is the animal of {x}?", "which animal is {x} known for?", "what is {x}'s animal?",
                "tell me the animal of {x}.", "do you know the animal of {x}?", "which animal do people love in {x}?",
                "which animal stands for {x}?", "what animal does {x} love?", "{x} is known for which animal?",
                "the animal of {x} is what?", "in {x}, which animal is loved?", "name the animal of {x}.",
                "which animal is the animal of {x}?", "I want to know the animal of {x}.",
            ),
            held_out=(
                "what animal is {x} known for?", "can you tell me the animal of {x}?", "what animal stands for {x}?",
                "tell me which animal {x} is known for.", "what animal do people love in {x}?",
            ),
        ),
    ),
}  # fmt: skip
RELATIONS = PERSON | LAND
