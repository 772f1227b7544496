"""Generate the demo's texts about invented people and lands: prose, conversations and held-out prompts.

All texts are reproducible from a seed: `World(0).conversation(7)` is the same on every machine.
"""

import itertools
import re
from typing import NamedTuple

from jaxchat.config import UserError
from jaxchat.demo import texts, words
from jaxchat.demo.chance import Chance
from jaxchat.demo.sums import Sum, sum_of

PEOPLE, LANDS, TOWNS = 36, 18, 12
PROSE_ONLY_PEOPLE, PROSE_ONLY_LANDS = 6, 3
HELD_OUT_WORDS = 200
HELD_OUT_PROMPTS = 120  # number per kind

# The kinds of held-out prompts that are scored.
KINDS = ("identity", "arithmetic", "spelling", "counting", "two-turn", "facts", "prose-only facts")
TURN_KINDS = KINDS[:4] + ("facts",)

PROSE = {
    "facts": 0.42, "spelling": 0.22, "counting": 0.15, "expressions": 0.12, "sums": 0.03, "numbers": 0.02,
    "definitions": 0.04,
}  # fmt: skip
CONVERSATIONS = {
    "counting": 0.31, "facts": 0.12, "arithmetic": 0.18, "spelling": 0.24, "identity": 0.09,
    "greetings": 0.03, "definitions": 0.02, "goodbyes": 0.01,
}  # fmt: skip
TWO_TURN = 0.15


class Turn(NamedTuple):
    """A question and its right answer, which is a text or a list of message parts with a tool call.

    If `proof` is not "", an answer is right if it contains this text, but no proof of another trait of Pip.
    """

    question: str
    answer: str | list[dict]
    proof: str = ""


class Prompt(NamedTuple):
    """A held-out prompt of one or two turns. A model is right if it answers every turn right."""

    kind: str
    turns: tuple[Turn, ...]


def parts(*pairs: tuple[str, str]) -> list[dict]:
    return [{"type": kind, "text": text} for kind, text in pairs]


def solution(problem: Sum) -> list[dict]:
    """Return an arithmetic problem's answer as message parts: calculator call, its output, and a sentence."""
    answer = ("text", f" The answer is {problem.result}.")
    return parts(("python", problem.expression), ("python_output", problem.result), answer)


def capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


class World:
    """Invented people, lands and towns, with texts about them. facts[name][relation]: the value of a fact."""

    def __init__(self, seed: int = 0):
        self.seed = seed
        chance = Chance(f"{seed}:world")
        # No two names share a beginning: small models confuse those that do.
        syllables = [onset + vowel for onset in words.ONSETS for vowel in words.VOWELS]
        beginnings = iter(chance.shuffled(syllables))

        def names(kind, count):
            return [words.invented_name(chance, kind, next(beginnings)) for _ in range(count)]

        people, lands = names("person", PEOPLE), names("land", LANDS)
        towns, capitals = names("town", TOWNS), names("capital", LANDS)
        self.facts: dict[str, dict[str, str]] = {
            name: {relation: chance.of(about.values or towns) for relation, about in texts.PERSON.items()}
            for name in people
        }
        for name, capital in zip(lands, capitals, strict=True):
            about = texts.LAND.items()
            self.facts[name] = {relation: chance.of(kind.values or [capital]) for relation, kind in about}
        self.prose_only = people[:PROSE_ONLY_PEOPLE] + lands[:PROSE_ONLY_LANDS]
        self.asked = people[PROSE_ONLY_PEOPLE:] + lands[PROSE_ONLY_LANDS:]

        self.english = words.english_words()
        spoken = set(re.findall("[a-z]+", repr(texts.SPOKEN).lower()))
        unspoken = [word for word in self.english if word not in spoken]
        self.held_out_words = sorted(chance.shuffled(unspoken)[:HELD_OUT_WORDS])
        self._kept = set(self.held_out_words)
        self.trained_words = [word for word in self.english if word not in self._kept]
        # The words of prose become single tokens, which the model also has to practise spelling.
        prose = (texts.PROSE, texts.THING_SENTENCES)
        prose += tuple((about.tell, about.values) for about in texts.RELATIONS.values())
        self.common_words = sorted(word for word in spoken if len(word) > 1)
        self.prose_words = sorted(set(re.findall("[a-z]{2,}", repr(prose).lower())))
        self._makers = {
            "identity": self._identity, "arithmetic": self._arithmetic, "spelling": self._spelling,
            "counting": self._counting, "facts": self._facts, "definitions": self._definition,
            "greetings": self._greeting, "goodbyes": self._goodbye,
        }  # fmt: skip

    # Documents, conversations and prompts, by index.

    def document(self, i: int) -> str:
        """Generate document i: two to four short sentences of one kind, such as facts or spelled words."""
        chance = Chance(f"{self.seed}:document:{i}")
        kind = chance.weighted(PROSE)
        if kind == "facts":
            name = chance.of(self.prose_only + self.asked)
            chosen = chance.shuffled(list(self.facts[name].items()))[: chance.between(2, 4)]
            return " ".join(self._stated(chance, name, *fact) for fact in chosen)
        return " ".join(self._sentence(chance, kind) for _ in range(chance.between(2, 3)))

    def conversation(self, i: int) -> list[dict]:
        """Generate the messages of conversation i: one or two independent questions, each with its answer."""
        chance = Chance(f"{self.seed}:conversation:{i}")
        messages = []
        for _ in range(2 if chance.one_in(1 / TWO_TURN) else 1):
            turn = self._makers[chance.weighted(CONVERSATIONS)](chance, held_out=False)
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": turn.answer})
        return messages

    def heldout(self, kind: str) -> list[Prompt]:
        """Generate HELD_OUT_PROMPTS held-out prompts of a kind. Raise UserError for a kind not in KINDS.

        No conversation uses the wordings, the spelled words or the pairs of numbers of these prompts.
        """
        if kind not in KINDS:
            raise UserError(f"no prompts of the kind {kind!r} are held out; the kinds are {', '.join(KINDS)}")
        prompts = {}
        for n in itertools.count():
            chance = Chance(f"{self.seed}:heldout:{kind}:{n}")
            if kind == "two-turn":
                turns = tuple(self._makers[chance.of(TURN_KINDS)](chance, held_out=True) for _ in range(2))
            elif kind == "prose-only facts":
                turns = (self._facts(chance, held_out=True, names=self.prose_only),)
            else:
                turns = (self._makers[kind](chance, held_out=True),)
            # Prompts differ in their answers or, in kinds with few different answers, in their questions.
            by_answer = kind in ("arithmetic", "spelling", "counting")
            key = repr([turn.answer if by_answer else turn.question.lower() for turn in turns])
            prompts.setdefault(key, Prompt(kind, turns))
            if len(prompts) == HELD_OUT_PROMPTS:
                return list(prompts.values())

    # Prose.

    def _stated(self, chance: Chance, name: str, relation: str, value: str) -> str:
        tell = texts.RELATIONS[relation].tell
        sentence = tell[0] if chance.one_in(2) else chance.of(tell)
        return sentence.format(x=name, v=value)

    def _sentence(self, chance: Chance, kind: str) -> str:
        if kind in ("spelling", "counting"):
            word = self._word(chance, held_out=False)
            letter = words.letter_to_count(chance, word)
            sentence = chance.of(texts.PROSE[kind])
            spelled, counted = " ".join(word), words.counted_letters(word, letter)
            return sentence.format(w=word, letters=spelled, c=letter, counted=counted, n=word.count(letter))
        if kind == "definitions":
            thing, meaning = chance.of(list(texts.THINGS.items()))
            return chance.of(texts.THING_SENTENCES).format(t=thing, T=capitalized(thing), v=meaning)
        if kind == "numbers":
            n = chance.below(1000)
            return capitalized(chance.of(texts.PROSE[kind]).format(n=n, words=words.in_words(n)))
        found = sum_of(chance, self.seed, held_out=False)
        sum_in_words = f"{found.a} {chance.of(texts.SIGNS[found.sign])} {found.b}"
        if kind == "expressions":  # teaches to copy digits in order, which questions about sums need
            sentence = chance.of(texts.PROSE[kind])
            return capitalized(sentence.format(q=sum_in_words, e=found.expression, r=found.result))
        return f"{sum_in_words} is {found.result}."

    # Questions and answers.

    def _word(self, chance: Chance, held_out: bool) -> str:
        if held_out:
            return chance.of(self.held_out_words)
        while True:
            if chance.one_in(3):
                word = chance.of(self.trained_words)
            else:
                common = self.prose_words if chance.one_in(1.4) else self.common_words
                word = words.invented_word(chance, self.trained_words, common)
            if word not in self._kept:
                return word

    def _spelling(self, chance: Chance, held_out: bool) -> Turn:
        word = self._word(chance, held_out)
        return Turn(texts.phrased(chance, texts.SPELLING.pick(held_out), w=word), " ".join(word))

    def _counting(self, chance: Chance, held_out: bool) -> Turn:
        word = self._word(chance, held_out)
        letter = words.letter_to_count(chance, word)
        n = word.count(letter)
        # Everywhere a space precedes the word, so that its tokens are those of the question, to be copied.
        answer = parts(
            ("text", f"{letter} in {word}: {words.counted_letters(word, letter)}, so {n}."),
            ("python", f"' {word}'.count('{letter}')"),
            ("python_output", str(n)),
            ("text", f" The answer is {n}."),
        )
        return Turn(texts.phrased(chance, texts.COUNTING.pick(held_out), w=word, c=letter), answer)

    def _arithmetic(self, chance: Chance, held_out: bool) -> Turn:
        found = sum_of(chance, self.seed, held_out)
        if found.is_natural and chance.one_in(2):
            phrasings = texts.SUM_WORDS[found.sign].pick(held_out)
            return Turn(texts.phrased(chance, phrasings, a=found.a, b=found.b), solution(found))
        sign = chance.of(texts.SIGNS[found.sign])
        space = "" if len(sign) == 1 and sign != "x" and chance.one_in(2) else " "
        written = f"{found.a}{space}{sign}{space}{found.b}"
        return Turn(texts.phrased(chance, texts.SUM_FRAMES.pick(held_out), e=written), solution(found))

    def _facts(self, chance: Chance, held_out: bool, names: list[str] | None = None) -> Turn:
        name = chance.of(names or self.asked)
        relation, value = chance.of(list(self.facts[name].items()))
        about = texts.RELATIONS[relation]
        answer = about.tell[0].format(x=name, v=value)
        return Turn(texts.phrased(chance, about.ask.pick(held_out), x=name), answer)

    def _identity(self, chance: Chance, held_out: bool) -> Turn:
        trait = chance.of(texts.TRAITS)
        return Turn(texts.phrased(chance, trait.ask.pick(held_out)), trait.answer, trait.proof)

    def _definition(self, chance: Chance, held_out: bool) -> Turn:
        thing, meaning = chance.of(list(texts.THINGS.items()))
        question = texts.phrased(chance, texts.DEFINITIONS.pick(held_out), t=thing)
        return Turn(question, texts.THING_SENTENCES[0].format(T=capitalized(thing), v=meaning))

    def _greeting(self, chance: Chance, held_out: bool) -> Turn:
        answer, questions = chance.of(list(texts.GREETINGS.items()))
        return Turn(texts.maybe_capitalized(chance, chance.of(questions)), answer)

    def _goodbye(self, chance: Chance, held_out: bool) -> Turn:
        answer, questions = chance.of(list(texts.GOODBYES.items()))
        return Turn(texts.maybe_capitalized(chance, chance.of(questions)), answer)
