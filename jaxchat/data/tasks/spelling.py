"""SimpleSpelling and SpellingBee: generated from a word list, row by row from the row's number."""

import random
import zlib
from pathlib import Path

from jaxchat.config import UserError

ROWS = {"train": 10_000_000, "test": 1_000_000}  # as many as asked for; a spec's :rows takes the first
SPELL = ("Spell the word: {w}", "How is {w} spelled?", "Spell {w}.", "Which letters make up the word {w}?")
COUNT = (
    "How many {c} are in {w}?",
    "How many times does the letter {c} appear in {w}?",
    "Count the letter {c} in the word {w}.",
    "In {w}, how often does {c} occur?",
    "What is the number of {c}'s in the word {w}?",
    "how many {c} does {w} have",
    "Tell me how many of the letters in {w} are {c}.",
    "Please count each {c} in {w}.",
)


def is_test_word(word: str) -> bool:
    """One word in ten is kept for the test split."""
    return zlib.crc32(word.encode()) % 10 == 0


class Generated:
    """Row i is made from (task, split, i) alone: the same on every machine, and no word of test is one of train's."""

    def __init__(self, folder: Path, split: str, task: str, make):
        path = folder / "words" / "words_alpha.txt"
        if not path.is_file():
            raise UserError(f"no {path}; fetch it: python -m launch.download words; or name --tasks_dir")
        if split not in ROWS:
            raise UserError(f"{task} has no split {split!r}; it is train or test")
        words = path.read_bytes().decode("utf-8", "replace").split()
        self._words = [w for w in words if w.isascii() and w.isalpha() and is_test_word(w) == (split == "test")]
        if not self._words:
            raise UserError(f"{path} has no word for {split}: none of ASCII letters alone among its {len(words)}")
        self.paths = [path]
        self._seed, self._rows, self._make = f"{task} {split}", ROWS[split], make

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int) -> dict:
        chance = random.Random(f"{self._seed} {index}")
        word = self._words[int(chance.random() * len(self._words))]
        question, answer = self._make(chance, word)
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def pick(chance: random.Random, items):
    return items[int(chance.random() * len(items))]


def _spelling(chance: random.Random, word: str):
    return pick(chance, SPELL).format(w=word), f"{word}: {','.join(word)}"


def _bee(chance: random.Random, word: str):
    """The letter is mostly one of the word's. The answer counts by hand, then checks with the tool."""
    letter = pick(chance, word) if chance.random() < 0.9 else pick(chance, "abcdefghijklmnopqrstuvwxyz")
    question = pick(chance, COUNT).format(w=word, c=letter)
    lines, seen = [], 0
    for i, c in enumerate(word, 1):
        seen += c == letter
        lines.append(f"{i}. {c}" + (f" (number {seen})" if c == letter else ""))
    text = f"I go through {word} letter by letter:\n" + "\n".join(lines) + f"\nThat makes {seen}. Let me check:\n"
    return question, [
        {"type": "text", "text": text},
        {"type": "python", "text": f"'{word}'.count('{letter}')"},
        {"type": "python_output", "text": str(seen)},
        {"type": "text", "text": f"\nPython says {seen} too.\n\n#### {seen}"},
    ]


def simple_spelling(folder: Path, split: str) -> Generated:
    return Generated(folder, split, "SimpleSpelling", _spelling)


def spelling_bee(folder: Path, split: str) -> Generated:
    return Generated(folder, split, "SpellingBee", _bee)
