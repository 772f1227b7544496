"""Words for the demo: English words, invented words and names, words spelled out, and numbers in words."""

from pathlib import Path

from jaxchat.demo.chance import Chance

# A name begins with one of these and a vowel. A small model easily confuses names with the same beginning, so
# a world uses each beginning for one name only.
ONSETS = (
    "b", "bl", "br", "d", "dr", "f", "fl", "fr", "g", "gl", "gr", "h", "j", "k", "kl", "kr", "l", "m", "n",
    "p", "pl", "pr", "r", "s", "sk", "sl", "sm", "sn", "sp", "st", "t", "tr", "v", "w", "y", "z", "sh",
    "th", "ch", "qu",
)  # fmt: skip
VOWELS = "aeiou"
CODAS = ["", "", "", "n", "l", "r", "s", "m", "t", "ck", "nd", "st", "sk", "x", "ng", "mp"]

ENDINGS = {
    "person": ("o", "in", "a", "el", "us"),
    "land": ("land", "ia", "or"),
    "town": ("ton", "wick", "ford"),
    "capital": ("burg", "polis", "haven"),
}

ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
TENS = ("zero", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def english_words() -> list[str]:
    """Return about 3,000 common English words of 3 to 10 lower-case letters, in alphabetical order."""
    return (Path(__file__).parent / "words.txt").read_text(encoding="utf-8").split()


def invented_name(chance: Chance, kind: str, beginning: str) -> str:
    """Invent a name that starts with `beginning` and ends as its kind does: person, land, town or capital."""
    middle = chance.of("bdfgklmnprstvz") + chance.of(VOWELS)
    consonant = chance.of("bdklmnrstv")
    ending = chance.of(ENDINGS[kind])
    return (beginning + middle + (consonant if ending[0] in "aeiou" else "") + ending).capitalize()


def invented_word(chance: Chance, english: list[str], common: list[str]) -> str:
    """Invent a word of 3 to 10 letters, for the model to practise spelling.

    english: words to take any parts from. common: words to take only beginnings from.
    """
    # To learn to spell tokens, instead of memorizing words, the model must see every token more than once, at
    # every position of a word and beside every other token. Beginnings of common words become tokens, with
    # which other words begin too: the|ory, in|vite, colo|nel (colour), cap|able (capital).
    way = chance.weighted({"halves": 3, "fragments": 4, "syllables": 3, "common": 6, "name": 1})
    if way == "halves":
        first, second = chance.of(english), chance.of(english)
        word = (
            first[: chance.between(2, max(2, len(first) - 1))] + second[chance.between(1, len(second) - 2) :]
        )
    elif way == "fragments":  # one word in three repeats a fragment
        fragments = [_fragment(chance, english) for _ in range(chance.between(2, 4))]
        if chance.one_in(3):
            fragments.insert(chance.below(len(fragments) + 1), chance.of(fragments))
        word = "".join(fragments)
    elif way == "syllables":
        word = "".join(
            chance.of(ONSETS) + chance.of(VOWELS) + chance.of(CODAS) for _ in range(chance.between(1, 3))
        )
    elif way == "common":
        beginning = chance.of(common)[: 7 if chance.one_in(2) else chance.between(2, 6)]
        word = beginning + (chance.of(english)[1:] if chance.one_in(2) else _fragment(chance, english))
    else:  # the endings of names are tokens of their own, which other words contain too (af|ford)
        word = chance.of(english)[: chance.between(1, 4)] + chance.of(ENDINGS[chance.of(list(ENDINGS))])
    if chance.one_in(4):  # double a letter, as in "winner"
        twice = chance.below(len(word))
        word = word[:twice] + word[twice] + word[twice:]
    return word[:10] if len(word) > 2 else word + chance.of(VOWELS)


def _fragment(chance: Chance, english: list[str]) -> str:
    """Draw 1 to 4 neighbouring letters of a random word of `english`."""
    word = chance.of(english)
    start = chance.below(len(word) - 1)
    return word[start : start + chance.between(1, 4)]


def counted_letters(word: str, letter: str) -> str:
    """Spell a word and number each occurrence of `letter`. "apple" and "p" give "a p1 p2 l e"."""
    out, seen = [], 0
    for c in word:
        seen += c == letter
        out.append(f"{c}{seen}" if c == letter else c)
    return " ".join(out)


def letter_to_count(chance: Chance, word: str) -> str:
    """Draw a letter to count in `word`: with probability 5/6 one of the word's letters, else any letter."""
    return chance.of("abcdefghijklmnopqrstuvwxyz") if chance.one_in(6) else chance.of(word)


def in_words(n: int) -> str:
    """Write a number from 0 to 999 in English. 342 gives "three hundred forty-two"."""
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10] + (f"-{ONES[n % 10]}" if n % 10 else "")
    return f"{ONES[n // 100]} hundred" + (f" {in_words(n % 100)}" if n % 100 else "")
