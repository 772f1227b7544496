"""MMLU and ARC: multiple-choice questions, answered with the letter alone."""

from pathlib import Path

from jaxchat.config import UserError
from jaxchat.data.tasks.table import Table

LETTERS = "ABCDEFGHIJ"


def choice_conversation(question: str, choices: list[str], answer: int) -> dict:
    """Return {"messages", "letters"}: the question with lettered choices, and the right letter as the answer.

    UserError: something is not text, or the answer is not among the choices.
    """
    if not isinstance(choices, list) or not all(isinstance(text, str) for text in (question, *choices)):
        raise UserError("the question is not text, or the choices are not a list of texts")
    if not isinstance(answer, int) or not 0 <= answer < len(choices) <= len(LETTERS):
        raise UserError(f"answer {answer!r} of {len(choices)} choices, which count from 0")
    letters = list(LETTERS[: len(choices)])
    # No space before the letter: so it is the token that the answer is (" A" is another).
    lines = [f"- {choice}={letter}" for choice, letter in zip(choices, letters, strict=True)]
    prompt = "\n".join([f"Choose the right answer: {question}", *lines, "Reply with one letter."])
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": letters[answer]}]
    return {"messages": messages, "letters": letters}


def mmlu(folder: Path, split: str) -> Table:
    def convert(row: dict) -> dict:
        return choice_conversation(row["question"], row["choices"], row["answer"])

    return Table("mmlu", folder / "mmlu" / "all", split, ["question", "choices", "answer"], convert)


def arc(folder: Path, split: str, name: str) -> Table:
    def convert(row: dict) -> dict:
        labels, texts = row["choices"]["label"] or [], row["choices"]["text"] or []
        if row["answerKey"] not in labels:  # some rows count their choices 1 to 4
            raise UserError(f"the answer {row['answerKey']!r} is none of {labels}")
        return choice_conversation(row["question"], texts, labels.index(row["answerKey"]))

    return Table("arc", folder / "arc" / name, split, ["question", "choices", "answerKey"], convert)
