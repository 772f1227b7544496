"""Tokens to text: characters and stop strings across any borders, tool calls written out."""

from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxchat.infer.text import TextReader, Writer, format_parts, split_parts
from jaxchat.tokenizer import Tokenizer

SPECIALS = ("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>")


@pytest.fixture(scope="module")
def tokenizer():
    """256 single bytes and the specials: a character beyond ASCII is always cut."""
    return Tokenizer({bytes([b]): b for b in range(256)})


def read(tokenizer, tokens, stop=(), forced=()):
    reader = TextReader(tokenizer, stop)
    deltas = []
    for i, token in enumerate(tokens):
        deltas += reader.feed(token, i in forced)
    return [*deltas, *reader.end()], reader


@given(st.text(st.sampled_from("aé😀\n"), max_size=12), st.binary(max_size=3))
@example("", b"\xff\xc3")
def test_characters_are_never_cut(tokenizer, text, rest):
    data = text.encode() + rest
    deltas, _ = read(tokenizer, data)
    assert "".join(delta.text for delta in deltas) == data.decode("utf-8", "replace")
    if not rest:
        assert "\ufffd" not in "".join(delta.text for delta in deltas)


def cut(text, stops):
    """Read letter by letter; end before the first stop string that is complete."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


@given(
    st.text(st.sampled_from("abé"), max_size=20),
    st.lists(st.text(st.sampled_from("abé"), min_size=1, max_size=5), max_size=3),
    st.lists(st.integers(1, 6), max_size=20),
)
@example("xabcd", ["abcd", "bc"], [5])
@example("aab", ["ab"], [])
def test_stop_strings_across_any_borders(text, stops, sizes):
    """Tokens of any length give what one letter at a time gives."""
    sizes, tokens, rest = [*sizes, *[1] * len(text.encode())], [], text.encode()
    for size in sizes:
        tokens.append(rest[:size])
        rest = rest[size:]
    plain = SimpleNamespace(special=lambda name: name, decode_bytes=lambda ids: ids[0])
    reader, shown_so_far = TextReader(plain, stops), ""
    for token in tokens:
        for delta in reader.feed(token):
            shown_so_far += delta.text
            assert cut(text, stops)[0].startswith(shown_so_far)  # nothing has to be taken back
    shown_so_far += "".join(delta.text for delta in reader.end())
    assert (shown_so_far, reader.stopped) == cut(text, stops)


def test_tool_calls_are_written_out(tokenizer):
    open_, close, out, out_end = map(tokenizer.special, SPECIALS)
    call, result = [open_, *b"1+1", close], [out, *b"2", out_end]
    tokens = [*b"so ", *call, *result, *result, *"é".encode()]
    forced = range(3 + len(call), 3 + len(call) + len(result))
    deltas, _ = read(tokenizer, tokens, forced=forced)
    writer = Writer()
    assert writer.write(deltas) + writer.end() == "so [python 1+1][output 2][output? 2]é"
    said = SimpleNamespace(tokens=tokens, forced=[i in forced for i in range(len(tokens))], finished=False)
    parts = split_parts(said, tokenizer)
    kinds = ("text", "python", "python_output", "made up", "text", "unfinished")
    assert parts == list(zip(kinds, ("so ", "1+1", "2", "2", "é", "…"), strict=True))
    assert format_parts(parts) == "so [python 1+1][output 2][output? 2]é … (cut)"


@pytest.mark.parametrize(
    "names, parts",
    [
        (["python_start", "python_end"], [("python", "")]),  # an empty call is one
        (["a", "python_end", "b"], [("text", "a"), ("text", "b")]),
        (["python_start", "a", "output_start", "output_end"], [("python", "a"), ("made up", "")]),
        ([], []),
    ],
)
def test_marks_out_of_order(tokenizer, names, parts):
    tokens = [ord(name) if len(name) == 1 else tokenizer.special(f"<|{name}|>") for name in names]
    assert split_parts(SimpleNamespace(tokens=tokens, forced=[False] * len(tokens), finished=True), tokenizer) == parts


def test_a_stop_string_is_looked_for_in_text_alone(tokenizer):
    open_, close, *_ = map(tokenizer.special, SPECIALS)
    deltas, reader = read(tokenizer, [*b"a", open_, *b"xx", close, *b"x", open_, close, *b"xyxx"], stop=["xx"])
    writer = Writer()
    assert writer.write(deltas) + writer.end() == "a[python xx]x[python ]xy"
    assert reader.stopped and reader.feed(ord("z")) == [] == reader.end()
