"""HumanEval: Python functions to complete; answers are run against tests."""

from pathlib import Path

from jaxchat.config import UserError
from jaxchat.data.tasks.table import Table

COLUMNS = ["prompt", "canonical_solution", "test", "entry_point"]


def humaneval(folder: Path, split: str) -> Table:
    """Open HumanEval's functions to complete. Rows also have `prompt`, `test` and `entry_point`."""

    def convert(row: dict) -> dict:
        if not all(isinstance(row[name], str) for name in COLUMNS):
            raise UserError("a column of HumanEval is not text")
        answer = {"role": "assistant", "content": row["prompt"] + row["canonical_solution"]}
        return {"messages": [{"role": "user", "content": row["prompt"]}, answer]} | row

    # The hub keeps the file in a folder of its own.
    return Table("humaneval", folder / "humaneval", split, COLUMNS, convert, in_folders=True)
