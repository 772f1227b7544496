"""SmolTalk: general conversations, some with a system message."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jaxchat.data.sources import is_text
from jaxchat.data.tasks.table import Table


def smoltalk(folder: Path, split: str) -> Table:
    def convert(row: dict) -> dict:
        messages = [{key: (m or {}).get(key) for key in ("role", "content")} for m in row["messages"]]
        return {"messages": messages}

    return Table("smoltalk", folder / "smoltalk" / "data", split, ["messages"], convert, suspects=suspects)


def suspects(batch: pa.RecordBatch) -> np.ndarray:
    """The rows that are not [system,] user, assistant, user, … with text throughout.

    They are found without a loop over the rows.
    """
    messages, all_rows = batch.column("messages"), np.arange(len(batch))
    kind = messages.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not is_list or not pa.types.is_struct(kind.value_type):
        return all_rows
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
    led = np.zeros(len(batch), bool)  # by a system message
    led[lengths > 0] = system[starts[lengths > 0]]
    turn = np.arange(len(flat)) - starts[row_of] - led[row_of]
    right = (turn < 0) | np.where(turn % 2 == 0, user, assistant)
    right &= pc.is_valid(pc.struct_field(flat, "content")).to_numpy(zero_copy_only=False)
    wrong = np.bincount(row_of, ~right, minlength=len(batch)) > 0
    return np.flatnonzero(wrong | (lengths <= led))
