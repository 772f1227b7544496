"""GSM8K: school word problems; the calculations in their answers become calls of the python tool."""

import re
from pathlib import Path

from jaxchat.config import UserError
from jaxchat.data.tasks.table import Table

SUM = re.compile(r"<<([^<>]*)=([^<>=]*)>>")


def answer_parts(answer: str) -> list[dict]:
    """Split an answer into parts: `<<12/60=0.2>>` is a python part `12/60` and its output `0.2`.

    UserError: it is not text.
    """
    if not isinstance(answer, str):
        raise UserError("the answer is not text")
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
