"""Convert generated tokens to text, find stop strings, and format tool calls."""

import codecs
from collections.abc import Iterable
from typing import NamedTuple

from jaxchat.tokenizer import SPECIAL_TOKENS, Tokenizer

# Kinds of parts, besides "text": "python" (a tool call), "python_output" (the tool's answer, forced), "made
# up" (output that the model wrote itself) and "unfinished" (the answer was cut off).
BRACKETS = {"python": ("[python ", "]"), "python_output": ("[output ", "]"), "made up": ("[output? ", "]")}
EXPRESSION = 256  # maximum tokens of a tool call, with its start and end


def last_call(tokens: list[int], tokenizer: Tokenizer) -> str | None:
    """Return the expression of the tool call at the end of `tokens`, whose last token ends the call.

    Return None if the call has no start token or is longer than EXPRESSION tokens.
    """
    start, opening = len(tokens) - 1, tokenizer.special("<|python_start|>")
    while start >= 0 and tokens[start] != opening:
        start -= 1
    if start < 0 or len(tokens) - start > EXPRESSION:
        return None
    return tokenizer.decode(tokens[start + 1 : -1])


class Delta(NamedTuple):
    """New text in a part of an answer. A part is text, a tool call, or a tool output."""

    kind: str  # kind of the part: "text", "python", "python_output" or "made up"
    text: str  # may be ""
    starts: bool  # whether a new part begins here


class TextReader:
    """Incremental decoder of an answer's tokens. The decoded text ends before the first stop string.

    Incomplete characters, and text that may be the beginning of a stop string, are held back until later
    tokens show what they are. Tool calls and tool outputs are not searched for stop strings.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Iterable[str] = ()):
        self._tokenizer = tokenizer
        special = tokenizer.special
        self._openings = {special("<|python_start|>"): "python", special("<|output_start|>"): "python_output"}
        self._closings = {special("<|python_end|>"), special("<|output_end|>")}
        self.marks = self._closings | {*self._openings}  # tokens that begin or end a part
        self.unseen = {special(name) for name in SPECIAL_TOKENS} - self.marks  # left out of server replies
        self._stop = tuple(stop)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._starts = True
        self.kind, self.held = "text", ""  # kind of the current part; text that is held back
        self.stopped = False  # a stop string was found

    @property
    def waits(self) -> bool:
        """Whether an incomplete character or the possible beginning of a stop string is held back."""
        return bool(self.held or self._utf8.getstate()[0])

    def feed(self, token: int, forced: bool = False) -> list[Delta]:
        """Return the text that `token` completes, as Deltas. After a stop string, return [].

        forced: whether the calculator, not the model, wrote `token`.
        """
        if self.stopped:
            return []
        if token in self._openings:
            kind = self._openings[token]
            return self._begin("made up" if kind == "python_output" and not forced else kind)
        if token in self._closings:
            return self._begin("text")
        return self._add(self._utf8.decode(self._tokenizer.decode_bytes([token])))

    def end(self) -> list[Delta]:
        """Return the text still held back, as Deltas. An incomplete character becomes U+FFFD."""
        return [] if self.stopped else self._add(self._utf8.decode(b"", final=True), last=True)

    def _begin(self, kind: str) -> list[Delta]:
        found = self.end()
        if self.stopped:
            return found
        self._utf8.reset()
        self.kind, self._starts = kind, True
        # An empty text between two marks is not a part, but an empty tool call is.
        return found if kind == "text" else [*found, *self._emit("")]

    def _add(self, text: str, last: bool = False) -> list[Delta]:
        text, self.held = self.held + text, ""
        if self.kind == "text" and self._stop:
            ends = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
            if ends:
                self.stopped, text = True, text[: min(ends)[1]]
            elif not last:
                keep = max(_overlap(text, stop) for stop in self._stop)
                text, self.held = text[: len(text) - keep], text[len(text) - keep :]
        return self._emit(text) if text else []

    def _emit(self, text: str) -> list[Delta]:
        starts, self._starts = self._starts, False
        return [Delta(self.kind, text, starts)]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a proper prefix of `stop`."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)


class Writer:
    """Incremental formatter of Deltas as text with tool calls in brackets: "so [python 1+1][output 2]"."""

    def __init__(self):
        self._closing = ""

    def write(self, deltas: Iterable[Delta]) -> str:
        out = ""
        for kind, text, starts in deltas:
            if starts:
                opening, closing = BRACKETS.get(kind, ("", ""))
                out, self._closing = out + self._closing + opening, closing
            out += text
        return out

    def end(self, cut: bool = False) -> str:
        """Return the end of the text: a closing bracket if one is open, and " … (cut)" if `cut`."""
        closing, self._closing = self._closing, ""
        return closing + (" … (cut)" if cut else "")


def split_parts(generation, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Split a generation into parts (kind, text), in order.

    kind: "text", "python" (a tool call), "python_output", or "made up" (a tool output that the model wrote).
    A generation that did not end with an end token gets a last part ("unfinished", "…").
    """
    reader = TextReader(tokenizer)
    found: list[tuple[str, str]] = []
    tokens = zip(generation.tokens, generation.forced, strict=True)
    deltas = [delta for token, forced in tokens for delta in reader.feed(token, forced)]
    for kind, text, starts in [*deltas, *reader.end()]:
        if starts:
            found.append((kind, text))
        else:
            found[-1] = (kind, found[-1][1] + text)
    return found if generation.finished else [*found, ("unfinished", "…")]


def format_parts(parts: Iterable[tuple[str, str]]) -> str:
    """Format parts (kind, text) as text, with tool calls and outputs in brackets."""
    writer, parts = Writer(), list(parts)
    cut = bool(parts) and parts[-1][0] == "unfinished"
    line = writer.write(Delta(kind, text, True) for kind, text in (parts[:-1] if cut else parts))
    return line + writer.end(cut)
