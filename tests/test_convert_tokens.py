"""The tokenizer in others' formats: every id the same, and nothing in a pickle runs."""

import json
import os
import pickle
import random
import subprocess

import hypothesis.strategies as st
import pyarrow.parquet as pq
import pytest
import tiktoken
import tokenizers
from hypothesis import given

from jaxchat.config import UserError
from jaxchat.convert import tokens
from jaxchat.data.tasks import load_task
from jaxchat.tokenizer import SPECIAL_TOKENS, Tokenizer

SPELLINGS = [
    *SPECIAL_TOKENS, *(f"a{name}b" for name in SPECIAL_TOKENS), *(f" {name}\n" for name in SPECIAL_TOKENS),
    "<|bos", "|>", "<|", "<<|bos|>>", "<|<|bos|>|>", "<|user_start|><|user_end|>", "<|endoftext|>", "a <| b |> c",
]  # fmt: skip
MARKS = (tokens.MARK, tokens.BREAK)  # what text should not have
PARTS = [
    {"type": "text", "text": "Let me see: "},
    {"type": "python", "text": "12/60"},
    {"type": "python_output", "text": "0.2"},
    {"type": "text", "text": "\n\nIt is 0.2. <|assistant_end|>"},
]


@pytest.fixture(scope="module")
def tokenizer(shared_data):
    texts = pq.read_table(shared_data / "pretrain/shard_00000.parquet", columns=["text"])["text"].to_pylist()[:1500]
    return Tokenizer.train(iter(texts), 8192)


@pytest.fixture(scope="module")
def exported(tokenizer, tmp_path_factory):
    """The folder with tokenizer.json and tokenizer_config.json."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokens.save_hugging_face(tokenizer, folder, 2048, chat=True)
    return folder


@pytest.fixture(scope="module")
def rust(exported):
    """The exported tokenizer.json in the tokenizers library, set to read a special's spelling as text."""
    loaded = tokenizers.Tokenizer.from_file(str(exported / "tokenizer.json"))
    loaded.encode_special_tokens = True
    return loaded


def assert_all_equal(tokenizer, rust, texts):
    pickled = tiktoken.Encoding(
        "again", pat_str=tokens.SPLIT_PATTERN, mergeable_ranks=tokenizer.ranks, special_tokens={}
    )
    plain = pickled.encode_ordinary_batch(texts)
    theirs = [encoding.ids for encoding in rust.encode_batch(texts, add_special_tokens=False)]
    for text, ours, a, b in zip(texts, map(tokenizer.encode, texts), plain, theirs, strict=True):
        assert ours == a == b, text


def test_ids_of_the_validation_shard(tokenizer, rust, shared_data):
    texts = pq.read_table(shared_data / "pretrain/shard_00002.parquet", columns=["text"])["text"].to_pylist()
    assert sum(map(len, texts)) > 4_000_000
    assert_all_equal(tokenizer, rust, texts)
    assert rust.decode(tokenizer.encode(texts[0])) == texts[0]


@pytest.mark.slow
def test_ids_of_odd_text(tokenizer, rust):
    """Random bytes read as UTF-8, every character of Unicode in several neighbourhoods, and the specials' spellings."""
    noise = random.Random(0)
    texts = [noise.randbytes(noise.randint(1, 300)).decode("utf-8", "replace") for _ in range(3000)]
    texts += [noise.randbytes(200).decode("latin-1") for _ in range(500)]
    every = [chr(c) for c in range(1, 0x110000) if not 0xD800 <= c <= 0xDFFF and chr(c) not in MARKS]
    texts += ["".join(every[i : i + 64]) for i in range(0, len(every), 64)]
    some = [*every[:0x3000], *noise.sample(every, 4000)]
    for around in ("a{}b", "'{} ll", "1{}2\n{}", "  {}\t{}{}", "'{}"):
        texts += [around.format(c, c, c) for c in some]
    assert_all_equal(tokenizer, rust, texts + SPELLINGS)


@given(st.text(alphabet="abn '\n1", max_size=60))
def test_ids_of_repeats(text):
    """Little alphabets make many ways to merge; a tokenizer that has seen such text has many pieces to choose from."""
    assert_all_equal(SMALL, SMALL_RUST, [text])


def _small():
    noise = random.Random(1)
    texts = ["".join(noise.choices("abn '\n1", k=60)) for _ in range(3000)]
    tokenizer = Tokenizer.train(iter(texts), 1200)
    rust = tokens.to_hugging_face(tokenizer)
    rust.encode_special_tokens = True
    return tokenizer, rust


SMALL, SMALL_RUST = _small()


def conversations(shared_data) -> list[dict]:
    """700: of SmolTalk's (many with a system message), of GSM8K's with tool parts, and ones with spellings."""
    found = []
    for name, rows in (("SmolTalk/train", 400), ("GSM8K/train", 200)):
        task = load_task(name, str(shared_data))
        found += [task[i] for i in range(rows)]
    for i in range(100):
        spelling = SPELLINGS[i % len(SPELLINGS)]
        messages = [{"role": "user", "content": f"Say {spelling}!"}, {"role": "assistant", "content": PARTS}]
        messages += [{"role": "user", "content": spelling}, {"role": "assistant", "content": f" {spelling} \n"}]
        found.append({"messages": [{"role": "system", "content": f"Be {spelling}"}, *messages] if i % 2 else messages})
    for texts in (
        *(("a", "s"), ("o", "r "), ("a<", "|assistant_end|>"), ("<|", "bos|>"), ("", "x", ""), ("12", "34")),
        *(("so \U0001f642", "\U0001f642 so"), ("",), ("", "")),
    ):
        parts = [{"type": "text", "text": text} for text in texts]
        found.append({"messages": [{"role": "user", "content": "go"}, {"role": "assistant", "content": parts}]})
        parts = [PARTS[2], *parts, PARTS[1], PARTS[2], PARTS[2], PARTS[1], PARTS[0], PARTS[2]]
        found.append({"messages": [{"role": "user", "content": "go"}, {"role": "assistant", "content": parts}]})
    return found


def test_the_chat_template(tokenizer, exported, shared_data):
    transformers = pytest.importorskip("transformers")
    import jinja2

    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(exported)
    rows = conversations(shared_data)
    kinds = {
        part["type"] for row in rows for m in row["messages"] if isinstance(m["content"], list) for part in m["content"]
    }
    assert len(rows) > 700 and kinds == {"text", "python", "python_output"}
    assert sum(row["messages"][0]["role"] == "system" for row in rows) > 50
    for row in rows:
        out = theirs.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
        assert (out["input_ids"], out["assistant_masks"]) == tokenizer.render_conversation(row)
        prompt = theirs.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, return_dict=False)
        assert prompt == tokenizer.render_for_completion(row)
    # Outside a template a special's spelling is the special, as everywhere in transformers, unless message
    # otherwise.
    assert theirs("a<|bos|>").input_ids[-1] == tokenizer.bos
    for text in SPELLINGS:
        assert theirs(text, split_special_tokens=True).input_ids == tokenizer.encode(text)
    for messages, message in (
        ([{"role": "assistant", "content": "me first"}], "must alternate"),
        ([{"role": "system", "content": "alone"}], "must follow"),
        ([{"role": "user", "content": [{"type": "text", "text": "a<"}]}], "must be text"),
        ([{"role": "user", "content": None}], "must be text"),
        (
            [{"role": "user", "content": "x"}, {"role": "assistant", "content": [{"type": "image", "text": ""}]}],
            "unknown",
        ),
    ):
        with pytest.raises(jinja2.TemplateError, match=message):
            theirs.apply_chat_template(messages)


def test_round_trips(tokenizer, exported, tmp_path):
    assert tokens.from_hugging_face(exported / "tokenizer.json").hash == tokenizer.hash
    tokens.write_pickle(tokenizer, tmp_path / "tokenizer.pkl")
    assert tokens.read_pickle(tmp_path / "tokenizer.pkl").hash == tokenizer.hash
    theirs = pickle.loads((tmp_path / "tokenizer.pkl").read_bytes())  # as nanochat opens it
    assert isinstance(theirs, tiktoken.Encoding) and theirs.n_vocab == tokenizer.vocab_size
    text = "It's 1234 <|bos|> naïve\n\n"
    assert theirs.encode_ordinary(text) == tokenizer.encode(text)
    assert theirs.encode_single_token("<|output_end|>") == tokenizer.special("<|output_end|>")


class Runs:
    """Pickled, it says: call this."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("way", ["whole", "inside", "state", "eval"])
def test_a_malicious_pickle_runs_nothing(way, protocol, tmp_path):
    proof = tmp_path / "it-ran"
    evil = Runs(os.system, f"touch {proof}")
    if way == "inside":
        evil = {"mergeable_ranks": {b"a": 0}, "special_tokens": evil}
    elif way == "state":
        evil = [tiktoken.Encoding, Runs(subprocess.getoutput, f"touch {proof}")]
    elif way == "eval":
        evil = Runs(eval, f"__import__('pathlib').Path({str(proof)!r}).touch()")
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(pickle.dumps(evil, protocol=protocol))
    # Old protocols write bytes and classes by calls too, and one of those may come first.
    asked = "posix|nt|subprocess|builtins|__builtin__" + ("|_codecs|commands" if protocol < 3 else "")
    with pytest.raises(UserError, match=f"is refused: it asks for ({asked})\\."):
        tokens.read_pickle(path)
    assert not proof.exists()
    pickle.loads(path.read_bytes())
    assert proof.exists()  # it is a weapon indeed


def encoding_of(ranks, specials) -> bytes:
    """The pickle of an Encoding with this state, which tiktoken itself would refuse to make."""
    encoding = tiktoken.Encoding.__new__(tiktoken.Encoding)
    encoding.name, encoding._pat_str, encoding._special_tokens = "x", tokens.SPLIT_PATTERN, specials
    encoding._mergeable_ranks = ranks
    return pickle.dumps(encoding)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"not a pickle", "is refused"),
        (pickle.dumps({"mergeable_ranks": {}}), "not hold a custom tiktoken Encoding"),
        (pickle.dumps(tiktoken.Encoding), "not hold a custom tiktoken Encoding"),
        (encoding_of({b"a": 0}, {"<|bos|>": [1]}), "not names and numbers"),
        (encoding_of({b"a": 0}, {5: 1}), "not names and numbers"),
        (encoding_of({"a": 0}, {}), "not names and numbers"),
        (encoding_of({b"a": 0}, {}), "no token for the byte"),
        (b"\x80\x04\x8c\rtiktoken.core\x8c\x08Encoding\x93)\x81\x8c\x04gpt2b.", "not hold a custom tiktoken Encoding"),
    ],
)
def test_other_pickles_are_refused(content, message, tmp_path):
    """The last asks tiktoken for an encoding by name, which would be a download."""
    (tmp_path / "tokenizer.pkl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        tokens.read_pickle(tmp_path / "tokenizer.pkl")


def test_other_tokenizers_are_refused(tokenizer, exported, tmp_path):
    def refused(change, message):
        """Changed so, it is refused for that."""
        content = json.loads((exported / "tokenizer.json").read_text())
        change(content)
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            tokens.from_hugging_face(tmp_path / "tokenizer.json")

    refused(lambda c: c["added_tokens"].pop(), "output_end.* is missing; jaxchat needs nine")
    split = {"Regex": r"\p{N}{1,3}"}
    refused(lambda c: c["pre_tokenizer"]["pretokenizers"][1].update(pattern=split), "unlike jaxchat .*pre_tokenizer")
    refused(lambda c: c.pop("model"), "not a readable byte-level BPE tokenizer")
    refused(lambda c: c["model"].update(merges=[]), r"unlike jaxchat .*\(merges\)")
    refused(lambda c: c["model"]["merges"].remove(c["model"]["merges"][0]), r"\(merges\)")
    refused(lambda c: c["model"]["merges"].insert(0, c["model"]["merges"].pop()), r"\(merges\)")
    refused(lambda c: c["model"].update(dropout=0.1), r"\(dropout\)")
    refused(lambda c: c.update(normalizer={"type": "NFC"}), r"\(normalizer\)")
    refused(lambda c: c["added_tokens"][3].update(lstrip=True), r"\(added_tokens\)")

    # As others write the same tokenizer: without our marks, each pair of a merge in one string.
    content = json.loads((exported / "tokenizer.json").read_text())
    content["normalizer"] = tokens.OLD_NORMALIZER
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert tokens.from_hugging_face(tmp_path / "tokenizer.json").hash == tokenizer.hash
    content["normalizer"] = None
    del content["pre_tokenizer"]["pretokenizers"][0]
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert tokens.from_hugging_face(tmp_path / "tokenizer.json").hash == tokenizer.hash

    encoding = tiktoken.Encoding(
        "x", pat_str=r"\w+|\W+", mergeable_ranks=tokenizer.ranks, special_tokens={"<|bos|>": len(tokenizer.ranks)}
    )
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))
    with pytest.raises(UserError, match="a different pattern"):
        tokens.read_pickle(tmp_path / "tokenizer.pkl")
