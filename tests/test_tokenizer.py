"""The tokenizer: BPE by hand, exact round trips, specials, and the mask of every piece of a conversation."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxchat.config import UserError
from jaxchat.tokenizer import PART_TYPES, SPECIAL_TOKENS, Tokenizer, _may_merge, chat_pieces

TEXT = (
    "The duck swims in the pond. The ducks don't swim in 12345 ponds; they swim where it's warm.\n"
    "¿Dónde está el pato? Über den Teich. 東京には鴨がいる。 x = y*3 + 41\n"
) * 20


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(iter([TEXT]), 330)


@given(st.text(max_size=200))
def test_every_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert all(0 <= i < tokenizer.vocab_size - len(SPECIAL_TOKENS) for i in ids)
    assert sum(tokenizer.token_bytes[ids]) == len(tokenizer.decode_bytes(ids))


def test_encoding_is_bpe_by_rank(tokenizer):
    """Merging by hand, lowest rank first, within pieces that split at the space."""

    def by_hand(piece: bytes):
        parts = [bytes([b]) for b in piece]
        while len(parts) > 1:
            ranked = [(tokenizer.ranks.get(a + b, 1 << 30), i) for i, (a, b) in enumerate(zip(parts, parts[1:]))]  # noqa: B905
            rank, i = min(ranked)
            if rank == 1 << 30:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return [tokenizer.ranks[part] for part in parts]

    pieces = [b"The", b" ducks", b" swim", b" in", b" ponds"]
    assert tokenizer.encode("The ducks swim in ponds") == [i for piece in pieces for i in by_hand(piece)]
    assert len(tokenizer.encode("The ducks swim")) < len("The ducks swim") / 2


@pytest.mark.parametrize(
    "text, pieces",
    [
        ("12345", ["12", "34", "5"]),  # digits in groups of at most two
        ("don't we'LL", ["don", "'t", " we", "'LL"]),
        ("a b  c\n\nd", ["a", " b", " ", " c", "\n\n", "d"]),
        ("x=(y)!", ["x", "=(", "y", ")!"]),
    ],
)
def test_no_token_crosses_a_split(text, pieces):
    frequent = Tokenizer.train(iter([TEXT, *[text] * 500]), 320)  # so frequent that all it may merge is merged
    assert [frequent.decode([i]) for i in frequent.encode(text)] == pieces


def test_spelled_out_specials_stay_text(tokenizer):
    text = "<|bos|> and <|assistant_end|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert not set(tokenizer.encode(text)) & {tokenizer.special(name) for name in SPECIAL_TOKENS}
    ids, _ = tokenizer.render_conversation({"messages": [{"role": "user", "content": "<|assistant_start|>"}]})
    assert ids.count(tokenizer.special("<|assistant_start|>")) == 0


def test_specials_are_the_last_ids_and_weigh_no_bytes(tokenizer):
    ids = [tokenizer.special(name) for name in SPECIAL_TOKENS]
    assert ids == list(range(330 - 9, 330)) and tokenizer.vocab_size == 330
    assert not tokenizer.token_bytes[ids].any() and tokenizer.token_bytes[: 330 - 9].all()


def test_mask_of_every_piece(tokenizer):
    """Which tokens of a conversation are trained on, piece by piece."""
    conversation = {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "What is 2*3?"},
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "Let me see."},
                    {"type": "python", "text": "2*3"},
                    {"type": "python_output", "text": "6"},
                    {"type": "text", "text": "It is 6."},
                ],
            },
            {"role": "user", "content": "Thanks"},
            {"role": "assistant", "content": "Welcome"},
        ]
    }
    expected = [
        ("<|bos|>", 0), ("<|user_start|>", 0), ("Be kind.\n\nWhat is 2*3?", 0), ("<|user_end|>", 0),
        ("<|assistant_start|>", 0), ("Let me see.", 1), ("<|python_start|>", 1), ("2*3", 1), ("<|python_end|>", 1),
        ("<|output_start|>", 0), ("6", 0), ("<|output_end|>", 0), ("It is 6.", 1), ("<|assistant_end|>", 1),
        ("<|user_start|>", 0), ("Thanks", 0), ("<|user_end|>", 0),
        ("<|assistant_start|>", 0), ("Welcome", 1), ("<|assistant_end|>", 1),
    ]  # fmt: skip
    want_ids, want_mask = [], []
    for piece, learn in expected:
        ids = [tokenizer.special(piece)] if piece in SPECIAL_TOKENS else tokenizer.encode(piece)
        want_ids += ids
        want_mask += [learn] * len(ids)
    assert tokenizer.render_conversation(conversation) == (want_ids, want_mask)
    last = want_ids.index(tokenizer.special("<|user_end|>"), want_ids.index(tokenizer.special("<|assistant_end|>")))
    assert tokenizer.render_for_completion(conversation) == want_ids[: last + 2]


USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    "messages, words",
    [
        ([], "no messages"),
        ([{"role": "system", "content": "x"}], "only a system message"),
        ([USER, USER], "alternate"),
        ([ASSISTANT, USER], "alternate"),
        ([USER, {"role": "tool", "content": "x"}], "unknown role 'tool'"),
        ([USER, {"role": "system", "content": "x"}], "alternate"),
        ([USER, {"role": "assistant", "content": [{"type": "image", "text": "x"}]}], "unknown type 'image'"),
        ([USER, {"role": "assistant", "content": None}], "NoneType"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "must be text"),
    ],
)
def test_bad_conversations_are_refused(tokenizer, messages, words):
    with pytest.raises(UserError, match=words):
        tokenizer.render_conversation({"messages": messages})


SAID = st.text(alphabet="ab<|> \n1\ud800\udc00é", max_size=8) | st.sampled_from([*SPECIAL_TOKENS, "|bos|>", "x<"])
PARTS = st.lists(st.fixed_dictionaries({"type": st.sampled_from(PART_TYPES), "text": SAID}), max_size=4)


@given(st.lists(st.tuples(SAID, SAID | PARTS), min_size=1, max_size=3), st.none() | SAID)
def test_conversations_in_one_go(tokenizer, turns, system):
    """Several conversations tokenized as one text are what each is when rendered part by part."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for asked, answered in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    rows = [{"messages": messages}, {"messages": messages[:-1]}, {"messages": messages}]
    made = tokenizer.render_all([chat_pieces(row) for row in rows])
    for row, (ids, mask) in zip(rows, made, strict=True):
        assert ids.dtype == mask.dtype == np.int32
        assert (ids.tolist(), mask.tolist()) == tokenizer.render_conversation(row)


def test_which_conversations_go_in_one(tokenizer):
    def merges(*parts):
        content = [{"type": kind, "text": text} for kind, text in parts]
        row = {"messages": [{"role": "user", "content": "go"}, {"role": "assistant", "content": content}]}
        return _may_merge(chat_pieces(row))

    assert not merges(("text", "a"), ("python", "1"), ("python_output", "1"), ("text", "b"))
    assert merges(("text", "a<"), ("text", "|assistant_end|>"))  # would become the special
    assert merges(("text", "a<|b"))
    assert tokenizer.render_all([]) == []


def test_more_whitespace_than_a_regular_expression_takes(tokenizer):
    text = "a" + " \t" * 700_000 + "b"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_saving_and_loading(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tok")
    loaded = Tokenizer.load(tmp_path / "tok")
    assert loaded.hash == tokenizer.hash and loaded.encode(TEXT) == tokenizer.encode(TEXT)
    other = Tokenizer.train(iter([TEXT[::-1]]), 330)
    assert other.hash != tokenizer.hash
    other.save(tmp_path / "tok")  # in the place of the first
    assert Tokenizer.load(tmp_path / "tok").hash == other.hash
    assert [path.name for path in tmp_path.iterdir()] == ["tok"]


def test_missing_and_damaged_tokenizers_are_refused(tokenizer, tmp_path):
    with pytest.raises(UserError, match="no tokenizer in .*launch.tok_train"):
        Tokenizer.load(tmp_path)
    folder = tokenizer.save(tmp_path / "tok")
    lines = (folder / "ranks.txt").read_text().splitlines()
    (folder / "ranks.txt").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(UserError, match="damaged"):
        Tokenizer.load(folder)
    for text in ("{", "[]", ""):
        (folder / "tokenizer.json").write_text(text)
        with pytest.raises(UserError, match="damaged"):
            Tokenizer.load(folder)
    (folder / "ranks.txt").write_text("é", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be read"):
        Tokenizer.load(folder)


def test_a_vocabulary_that_cannot_be(tokenizer):
    with pytest.raises(UserError, match="below the minimum of 265"):
        Tokenizer.train(iter([TEXT]), 264)
    with pytest.raises(UserError, match="at most --vocab_size="):
        Tokenizer.train(iter(["ab ab"]), 400)


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_save_that_is_killed_leaves_a_tokenizer(tokenizer, tmp_path, monkeypatch, renames):
    """In a folder that is a symlink, too."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "tokenizer").symlink_to(tmp_path / "elsewhere")
    before = Tokenizer.train(iter([TEXT]), 300)
    before.save(tmp_path / "tokenizer")
    replace, done = Path.replace, []

    def killed(path, target):
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(replace(path, target))

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt) if renames < 2 else contextlib.nullcontext():
        tokenizer.save(tmp_path / "tokenizer")
    monkeypatch.undo()
    left = Tokenizer.load(tmp_path / "tokenizer")
    assert left.hash == (tokenizer if renames else before).hash
    tokenizer.save(tmp_path / "tokenizer")
    assert Tokenizer.load(tmp_path / "elsewhere").hash == tokenizer.hash
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == {"ranks.txt", "tokenizer.json"}
