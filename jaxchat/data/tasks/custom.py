"""Conversations from a file of one's own: a JSON array of messages a line, or a JSON string for a plain document."""

import json
from pathlib import Path

from jaxchat.config import UserError
from jaxchat.tokenizer import check_conversation


class JsonLines:
    """Rows of a .jsonl file, all checked when it is opened."""

    def __init__(self, path: Path):
        if not path.is_file():
            raise UserError(f"no file {path}; each of its lines is to be a JSON array of messages")
        self.paths = [path]
        self._lines: list[str] = []
        self.has_documents = False
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError as problem:
            raise UserError(f"{path} is not UTF-8 ({problem}); save it as UTF-8") from problem
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = self._row(line)
                if "text" in row:
                    self.has_documents = True
                else:
                    check_conversation(row)
            except (ValueError, UserError) as problem:
                raise UserError(f"{path}, line {number}: {problem}") from problem
            self._lines.append(line)

    @staticmethod
    def _row(line: str) -> dict:
        value = json.loads(line)
        if isinstance(value, str):
            return {"text": value}
        if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
            raise ValueError("neither a JSON array of messages nor a JSON string")
        return {"messages": value}

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> dict:
        return self._row(self._lines[index])


def custom_json(path: Path) -> JsonLines:
    return JsonLines(path)


def identity(folder: Path, split: str) -> JsonLines:
    """Who the assistant is; the file has no splits."""
    del split
    path = folder / "identity" / "identity_conversations.jsonl"
    if not path.is_file():
        raise UserError(
            f"no {path}; fetch it: python -m launch.download identity; or write one, a JSON array of messages a line"
        )
    return JsonLines(path)
