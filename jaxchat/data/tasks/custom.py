"""Conversations from a user's .jsonl file."""

import json
import re
from pathlib import Path

from jaxchat.config import UserError
from jaxchat.data.tasks.table import NoFiles
from jaxchat.tokenizer import check_conversation

DECODER, SPACE = json.JSONDecoder(), re.compile(r"\s*")
LINES = "a JSON array of messages, an object with `messages` or `text`, or a JSON string for a plain document"


class JsonLines:
    """Conversations and plain documents of a JSON Lines file, all of which are checked on opening.

    A row is an array of messages, a string, or an object with `messages` or `text`.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            raise UserError(f"no file {path}; it should hold, on each line, {LINES}")
        self.paths = [path]
        self._lines: list[str] = []
        self.has_documents = False
        kind, lines = _rows_in(_text_of(path))
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = row_of(line)
                if "text" in row:
                    self.has_documents = True
                else:
                    check_conversation(row)
            except (ValueError, RecursionError, UserError) as problem:
                raise UserError(f"{path}, {kind} {number}: {_reason(problem)}") from problem
            self._lines.append(line)
        if not self._lines:
            raise UserError(f"{path} is empty; it should hold, on each line, {LINES}")

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> dict:
        return row_of(self._lines[index])


def _rows_in(text: str) -> tuple[str, list[str]]:
    """Split a file's text into rows of JSON; return ("line", rows) or ("row", rows).

    The word says what error messages should count: lines, or rows if the file is one array of rows or if its
    JSON values span several lines.
    """
    lines = text.split("\n")
    try:
        if not _is_array_of_rows(json.loads(next(filter(str.strip, lines), '""'))):
            return "line", lines
    except (ValueError, RecursionError):
        pass  # the value spans several lines
    values, text, end = [], text.strip(), 0
    try:
        while end < len(text):
            value, end = DECODER.raw_decode(text, end)
            values.append(value)
            end = SPACE.match(text, end).end()
    except (ValueError, RecursionError):
        return "line", lines
    if len(values) == 1 and _is_array_of_rows(values[0]):
        values = values[0]
    return "row", [json.dumps(value) for value in values]


def _is_array_of_rows(value) -> bool:
    """Return whether a JSON value is an array of rows, rather than an array of messages, which is one row."""
    return isinstance(value, list) and not any(isinstance(item, dict) and "role" in item for item in value)


def _reason(problem: Exception) -> str:
    if isinstance(problem, json.JSONDecodeError):
        return f"it is not JSON ({problem.msg}, column {problem.colno}); it should hold {LINES}"
    return "it is nested too deeply" if isinstance(problem, RecursionError) else str(problem)


def _text_of(path: Path) -> str:
    """Return a file's text, decoded from UTF-8, UTF-16 or UTF-32, without byte order marks."""
    data = path.read_bytes()
    try:
        text = data.decode(json.detect_encoding(data)).replace("\r\n", "\n").replace("\r", "\n")
        return text.replace("\n\ufeff", "\n")  # where files were concatenated
    except UnicodeDecodeError as problem:
        raise UserError(f"{path} is not UTF-8 ({problem}); save it as UTF-8") from problem


def row_of(line: str) -> dict:
    """Parse a line to {"messages": …} or {"text": …}; raise ValueError if it is neither."""
    value = json.loads(line)
    has_messages = isinstance(value, dict) and "messages" in value
    if isinstance(value, dict):  # the format of OpenAI's fine-tuning; other keys are ignored
        value = value.get("messages", value.get("text"))
    if isinstance(value, str) and not has_messages:
        return {"text": value}
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise ValueError(f"it must be {LINES}")
    return {"messages": [_plain(message) for message in value]}


def _plain(message: dict) -> dict:
    """Convert a message from OpenAI's format to jaxchat's; raise ValueError if that is impossible."""
    if message.get("tool_calls") or message.get("function_call"):
        raise ValueError("a message calls tools, which are not supported; remove this line")
    if message.get("weight", 1) != 1:
        raise ValueError("a message has a `weight` other than 1, not supported; remove it or this line")
    role, content = message.get("role"), message.get("content")
    if role != "assistant" and isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise ValueError(f"the {role}'s message has parts that are not text")
        content = "".join(str(part.get("text", "")) for part in content)
    return message | {"role": "system" if role == "developer" else role, "content": content}


def identity(folder: Path, split: str) -> JsonLines:
    """Open the conversations about the assistant's identity. They have no splits, so `split` is ignored."""
    del split
    path = folder / "identity" / "identity_conversations.jsonl"
    if not path.is_file():
        raise NoFiles(f"no {path} (on each of its lines, {LINES})", "identity")
    return JsonLines(path)
