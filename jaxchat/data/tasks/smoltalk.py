"""SmolTalk: general conversations, some with a system message."""

from pathlib import Path

from jaxchat.data.tasks.table import Table


def smoltalk(folder: Path, split: str) -> Table:
    def convert(row: dict) -> dict:
        return {"messages": [{"role": m["role"], "content": m["content"]} if m else {} for m in row["messages"]]}

    return Table("smoltalk", folder / "smoltalk" / "data", f"{split}-*.parquet", ["messages"], convert)
