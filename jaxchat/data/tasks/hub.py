"""Tasks read from the Hugging Face hub's parquet files: MMLU, ARC, GSM8K, HumanEval and SmolTalk."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jaxchat.config import UserError
from jaxchat.data.sources import is_text
from jaxchat.data.tasks.table import Table

LETTERS = "ABCDEFGHIJ"
SUM = re.compile(r"<<([^<>]*)=([^<>=]*)>>")
HUMANEVAL = ["prompt", "canonical_solution", "test", "entry_point"]


def choice_conversation(question: str, choices: list[str], answer: int) -> dict:
    """Return {"messages": a question with lettered choices and its answer, "letters": all the letters}.

    answer: index of the right choice.
    Raises UserError if the question or a choice is not text, or if `answer` is not an index of `choices`.
    """
    if not isinstance(choices, list) or not all(isinstance(text, str) for text in (question, *choices)):
        raise UserError("the question is not text, or the choices are not a list of texts")
    if len(choices) > len(LETTERS):
        raise UserError(f"{len(choices)} choices; there are letters for {len(LETTERS)}")
    if not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise UserError(f"answer {answer!r} of {len(choices)} choices, which count from 0")
    letters = list(LETTERS[: len(choices)])
    # No space before the letter, so that it is the same token as the answer (" A" is another token).
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
        if row["answerKey"] not in labels:  # some rows label their choices 1 to 4
            raise UserError(f"the answer {row['answerKey']!r} is not one of {labels}")
        if len(labels) != len(texts):
            raise UserError(f"it has {len(labels)} labels for {len(texts)} choices")
        return choice_conversation(row["question"], texts, labels.index(row["answerKey"]))

    return Table("arc", folder / "arc" / name, split, ["question", "choices", "answerKey"], convert)


def answer_parts(answer: str) -> list[dict]:
    """Split a GSM8K answer into message parts. `<<12/60=0.2>>` gives Python code `12/60` and output `0.2`."""
    parts = []
    pieces = SUM.split(answer)  # text, expression, result, text, …
    for i in range(0, len(pieces), 3):
        if pieces[i]:
            parts.append({"type": "text", "text": pieces[i]})
        if i + 2 < len(pieces):
            parts.append({"type": "python", "text": pieces[i + 1]})
            parts.append({"type": "python_output", "text": pieces[i + 2]})
    return parts


def gsm8k(folder: Path, split: str) -> Table:
    def convert(row: dict) -> dict:
        question = {"role": "user", "content": row["question"]}
        return {"messages": [question, {"role": "assistant", "content": answer_parts(row["answer"])}]}

    return Table("gsm8k", folder / "gsm8k" / "main", split, ["question", "answer"], convert)


def humaneval(folder: Path, split: str) -> Table:
    """Open HumanEval. Besides its messages, a row has the fields `prompt`, `test` and `entry_point`."""

    def convert(row: dict) -> dict:
        if not all(isinstance(row[name], str) for name in HUMANEVAL):
            raise UserError("a column of HumanEval is not text")
        answer = {"role": "assistant", "content": row["prompt"] + row["canonical_solution"]}
        return {"messages": [{"role": "user", "content": row["prompt"]}, answer]} | row

    # The hub keeps the file in a subfolder.
    return Table("humaneval", folder / "humaneval", split, HUMANEVAL, convert, in_folders=True)


def smoltalk(folder: Path, split: str) -> Table:
    def convert(row: dict) -> dict:
        messages = [{key: (m or {}).get(key) for key in ("role", "content")} for m in row["messages"]]
        return {"messages": messages}

    return Table("smoltalk", folder / "smoltalk" / "data", split, ["messages"], convert, suspects=suspects)


def suspects(batch: pa.RecordBatch) -> np.ndarray:
    """Return the indices of SmolTalk's rows that may lack messages or text, or have roles out of order."""
    messages, all_rows = batch.column("messages"), np.arange(len(batch))
    kind, fields = messages.type, {}
    if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_struct(kind.value_type):
        fields = {field.name: field.type for field in kind.value_type}
    if not all(name in fields and is_text(fields[name]) for name in ("role", "content")):
        return all_rows
    lengths = pc.fill_null(pc.list_value_length(messages), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    flat = messages.flatten()
    roles = pc.struct_field(flat, "role").cast(pa.large_string())
    system, user, assistant = (
        pc.fill_null(pc.equal(roles, role), False).to_numpy(zero_copy_only=False)
        for role in ("system", "user", "assistant")
    )
    starts, row_of = np.cumsum(lengths) - lengths, np.repeat(all_rows, lengths)
    led = np.zeros(len(batch), bool)  # whether a row begins with a system message
    led[lengths > 0] = system[starts[lengths > 0]]
    turn = np.arange(len(flat)) - starts[row_of] - led[row_of]
    right = (turn < 0) | np.where(turn % 2 == 0, user, assistant)
    right &= pc.is_valid(pc.struct_field(flat, "content")).to_numpy(zero_copy_only=False)
    wrong = np.bincount(row_of, ~right, minlength=len(batch)) > 0
    return np.flatnonzero(wrong | (lengths <= led))
