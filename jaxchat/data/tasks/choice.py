"""Multiple choice: MMLU and ARC, answered with the letter alone."""

from pathlib import Path

from jaxchat.config import UserError
from jaxchat.data.tasks.table import Table

LETTERS = "ABCDEFGHIJ"


def choice_conversation(question: str, choices: list[str], answer: int) -> dict:
    """{"messages", "letters"}: the question with lettered choices, and the right letter as the answer.

    UserError: no text, or an answer that is none of the choices.
    """
    if not all(isinstance(text, str) for text in (question, *choices)):
        raise UserError("the question or a choice is no text")
    if not 0 <= answer < len(choices) <= len(LETTERS):
        raise UserError(f"answer {answer} of {len(choices)} choices")
    letters = list(LETTERS[: len(choices)])
    # The letter follows its choice without a space: so it is the very token that the answer is (" A" is another).
    lines = [f"- {choice}={letter}" for choice, letter in zip(choices, letters, strict=True)]
    prompt = "\n".join([f"Choose the right answer: {question}", *lines, "Reply with one letter."])
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": letters[answer]}]
    return {"messages": messages, "letters": letters}


def mmlu(folder: Path, split: str) -> Table:
    def convert(row: dict) -> dict:
        return choice_conversation(row["question"], row["choices"], row["answer"])

    return Table("mmlu", folder / "mmlu" / "all", f"{split}*.parquet", ["question", "choices", "answer"], convert)


def arc(folder: Path, split: str, name: str) -> Table:
    def convert(row: dict) -> dict:
        labels, texts = row["choices"]["label"] or [], row["choices"]["text"] or []
        if row["answerKey"] not in labels:  # some rows count their choices 1 to 4
            raise UserError(f"{name}/{split}: the answer {row['answerKey']!r} is none of {labels}")
        return choice_conversation(row["question"], texts, labels.index(row["answerKey"]))

    return Table("arc", folder / "arc" / name, f"{split}*.parquet", ["question", "choices", "answerKey"], convert)
