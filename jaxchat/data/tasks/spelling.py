"""Two tasks generated from a word list: SimpleSpelling (spell a word) and SpellingBee (count a letter in it).

Row i depends only on (task, split, i) and the word list. Words and question templates of the test split
never occur in training.
"""

import random
import zlib
from pathlib import Path

from jaxchat.config import UserError
from jaxchat.data.tasks.table import NoFiles

ROWS = 1000  # number of rows if a spec has no :rows
LARGEST = {"train": 10_000_000, "test": 1_000_000}  # maximum of :rows
EDITION = "-2"  # part of the fingerprint: raise it when the rows change

# {w}: the word; {c}: the letter; {cs}: the letter in the plural.
SPELL = {
    "train": (
        "Spell the word: {w}", "How is {w} spelled?", "Spell {w}.", "Which letters make up the word {w}?",
        "Spell {w} out for me.", "How do you spell {w}?", "Give me the spelling of {w}.",
        "Write {w} letter by letter.", "List the letters of {w}.", "What are the letters of {w}, in order?",
        "Take {w} apart into its letters.", "Would you please spell {w}?",
        "I don't know how to write {w}. Spell it, please.", "The letters of {w}?",
        "Break the word {w} up into letters.", "Go through the letters of {w} one by one.",
        "{w}, letter by letter!", "Buchstabiere das Wort {w}.", "Deletrea la palabra {w}.",
        "Épelle le mot {w}.", "Scrivi {w} lettera per lettera.",
    ),
    "test": (
        "Can you spell {w}?", "Name each letter of {w} in turn.",
        "What letters does {w} have, from first to last?", "Show me how the word {w} is written.",
        "I'd like to have {w} spelled out.", "Say {w} one letter at a time.", "Wie buchstabiert man {w}?",
        "¿Cómo se deletrea {w}?", "Comment épelle-t-on {w} ?",
    ),
}  # fmt: skip
COUNT = {
    "train": (
        "How many {cs} are in {w}?", "How many times does {c} appear in {w}?", "Count the {cs} in {w}.",
        "How many times does the letter {c} occur in the word {w}?", "Count the letter {c} in the word {w}.",
        "What is the number of {cs} in {w}?", "Tell me how many {cs} there are in {w}.",
        "Please count each {c} in {w}.", "In {w}, how often does {c} occur?",
        "Of the letters in {w}, how many are {c}?", "How many {cs} does {w} have?",
        "How often is the letter {c} used in {w}?", "How many {cs} does the word {w} contain?",
        "I need the number of {cs} in {w}.", "Give me the count of {c} in {w}.", "How many {cs} in {w}?",
        "If I write {w}, how many {cs} do I need?", "Look at {w}: how many {cs} do you see?",
        "{w}: how many {cs}?", "The number of {cs} in the word {w}?", "{c} in {w}, how many times?",
        "Could you count the {cs} in {w} for me?", "Do you know how many {cs} {w} has?",
        "Find out how many {cs} are in the word {w}.",
        "My teacher asks how many {cs} are in {w}. What do I say?", "Quick question: how many {cs} in {w}?",
        "For a puzzle I must know how many {cs} the word {w} has.", "Go through {w} and count every {c}.",
        "How frequent is {c} within {w}?", "Work out how many {cs} {w} is written with.",
        "Say how many times you meet {c} in {w}.", "Does {w} have any {cs}, and if so, how many?",
        "Wie viele {c} hat das Wort {w}?", "Wie oft kommt {c} in {w} vor?", "Zähle die {c} in {w}.",
        "¿Cuántas {c} hay en {w}?", "¿Cuántas veces aparece la letra {c} en {w}?", "Cuenta las {c} de {w}.",
        "Combien de {c} y a-t-il dans {w} ?", "Combien de fois la lettre {c} apparaît-elle dans {w} ?",
        "Quante {c} ci sono in {w}?", "Quante volte compare la lettera {c} in {w}?",
        "Quantas letras {c} há em {w}?", "Hoeveel keer komt {c} voor in {w}?",
    ),
    "test": (
        "How many of the letters of {w} are {cs}?", "Tell me the number of times that {c} turns up in {w}.",
        "What number of {cs} will I find in {w}?", "Please say how many {cs} the word {w} holds.",
        "How many {cs} can you find in {w}?", "I wonder how many {cs} there are in the word {w}.",
        "Add up all the {cs} in {w}, please.", "Is there a {c} in {w}, and how many of them?",
        "When you spell {w}, how many times do you say {c}?", "How often do we see {c} in {w}?",
        "Letter {c}, word {w}: what is the count?", "What's the total of {cs} in {w}?",
        "Aus wie vielen {c} besteht {w}?", "¿Qué número de {c} tiene {w}?",
        "Quel est le nombre de {c} dans {w} ?",
    ),
}  # fmt: skip
QUOTES = ("{}", "{}", "{}", "'{}'", '"{}"', "`{}`", "“{}”")
PLURALS = ("{}s", "{}'s", "{}")


def is_test_word(word: str) -> bool:
    """Return whether a word belongs to the test split, as about one word in ten does."""
    return zlib.crc32(word.encode()) % 10 == 0


class Generated:
    """Rows of a spelling task, each generated when it is read. Row i is the same on every machine."""

    def __init__(self, folder: Path, split: str, task: str, make):
        path = folder / "words" / "words_alpha.txt"
        if not path.is_file():
            raise NoFiles(f"no {path}", "words")
        if split not in LARGEST:
            raise UserError(f"{task} has no split {split!r}; it is train or test")
        words = dict.fromkeys(path.read_bytes().decode("utf-8", "replace").lower().split())
        plain = (word for word in words if word.isascii() and word.isalpha())
        self._words = [word for word in plain if is_test_word(word) == (split == "test")]
        if not self._words:
            raise UserError(f"{path} needs words of ASCII letters; none of its {len(words)} is for {split}")
        self.paths, self.edition = [path], EDITION
        self.count, self.largest = ROWS, LARGEST[split]
        self._task, self._split, self._make = task, split, make

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        chance = random.Random(f"{self._task} {self._split} {index}")
        question, answer = self._make(chance, pick(chance, self._words), self._split)
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def pick(chance: random.Random, items):
    return items[int(chance.random() * len(items))]


def _ask(chance: random.Random, template: str, word: str, letter: str = "") -> str:
    """Fill a word and a letter into the template of a question, with random capitals and quotes."""
    if chance.random() < 0.2:
        template = template.lower()
    if chance.random() < 0.2:
        template = template.rstrip(" ?.!")
    shown = pick(chance, (word, word, word, word.capitalize(), word.upper()))
    quote = pick(chance, QUOTES)
    if shown.isupper() and chance.random() < 0.5:
        letter = letter.upper()
    marked = (quote if chance.random() < 0.5 else "{}").format(letter)
    plural = pick(chance, PLURALS).format(marked)
    return template.format(w=quote.format(shown), c=marked, cs=plural)


def spell(chance: random.Random, word: str, split: str):
    """Return a question on how a word is spelled, and its answer, such as "word:w,o,r,d"."""
    # No space after the colon, so that the first letter is the same token as it is after a comma.
    return _ask(chance, pick(chance, SPELL[split]), word), f"{word}:{','.join(word)}"


def count_letters(chance: random.Random, word: str, split: str):
    """Return a question on how often a letter occurs in a word, and an answer that counts it step by step."""
    letter = pick(chance, word) if chance.random() < 0.9 else pick(chance, "abcdefghijklmnopqrstuvwxyz")
    question = _ask(chance, pick(chance, COUNT[split]), word, letter)
    lines, seen = [], 0
    for i, c in enumerate(word, 1):
        seen += c == letter
        lines.append(f"{i}:{c}" + (f" (number {seen})" if c == letter else ""))  # no space: as in spell
    lines = [f"I go through {word} letter by letter:", *lines, f"That makes {seen}. Let me check:\n"]
    return question, [
        {"type": "text", "text": "\n".join(lines)},
        {"type": "python", "text": f"'{word}'.count('{letter}')"},
        {"type": "python_output", "text": str(seen)},
        {"type": "text", "text": f"\nPython says {seen} too.\n\n#### {seen}"},
    ]
