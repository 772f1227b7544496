"""Data that is broken, odd or replaced: one clear line, or a counted skip; never a hang, never a silent change."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxchat.config import UserError
from jaxchat.data import pipelines
from jaxchat.data.encode import conversation_reader, text_reader
from jaxchat.data.order import Division, Order
from jaxchat.data.sources import ParquetText
from jaxchat.data.streams import PackedRows
from jaxchat.tokenizer import Tokenizer
from launch import base_train, mid_train, tok_train

TALK = [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "hi"}]
TEXTS = [f"number {i} is the one after {i - 1}, and the words go on." for i in range(1, 300)]
BATCH = ["--device_batch_size=1", "--total_batch_size=128", "--eval_every=-1", "--num_iterations=3"]
BASE = ["--depth=1", "--max_seq_len=16", "--sample_every=-1", "--save_every=1", *BATCH]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(iter(TEXTS), 280)


def write(path, texts, **options):
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path, **options)
    return path


def base_batches(paths, tokenizer, **how):
    how = {"rows": 4, "micro_batches": 1, "time": 32, "seed": 0} | how
    return pipelines.base_batches(ParquetText(paths), tokenizer, **how)


def documents_of(batches, tokenizer, steps):
    """The whole documents that the batches of one row hold, as text, in order."""
    ids = np.concatenate([next(batches)["inputs"].ravel() for _ in range(steps)])
    batches.close()
    return [tokenizer.decode(part[1:]) for part in np.split(ids, np.flatnonzero(ids == tokenizer.bos)[1:])][:-1]


def test_odd_text_comes_through(tmp_path, tokenizer):
    """CRLF, NUL and specials' spellings stay; null and empty are left out and counted; bad UTF-8 is replaced."""
    odd = ["a\r\nb\r\n", "c\0d", "<|bos|> <|user_start|>", "e" * 90]
    path = write(tmp_path / "a.parquet", [None, "", *odd, None])
    batches = base_batches([path], tokenizer, rows=1)
    batch = next(batches)
    batches.set_state({})
    found = documents_of(batches, tokenizer, 30)
    assert sorted(found[:4]) == sorted(odd)
    assert batch["totals"]["empty_documents"].sum() <= 3
    batches = base_batches([path], tokenizer, rows=1)
    for _ in range(30):
        batch = next(batches)
    batches.close()
    epochs = int(batch["totals"]["taken"].sum()) / 7
    assert epochs > 2 and 3 * (epochs - 1) < batch["totals"]["empty_documents"].sum() < 3 * (epochs + 1)


@pytest.mark.slow
def test_a_document_of_10_megabytes(tmp_path, tokenizer):
    """It is read and tokenized once for the hundreds of rows that it makes, and comes out whole."""
    random = np.random.default_rng(0)
    large = " ".join(np.array(TEXTS)[random.integers(0, len(TEXTS), 240_000)])[:10_000_000]
    texts = ParquetText([write(tmp_path / "a.parquet", [*TEXTS[:20], large])])
    asked = []

    def read(rows):
        asked.extend(rows)
        return text_reader(texts, tokenizer)(rows)

    batches = iter(PackedRows(read, Division(Order([21], 0), 1), micro_batches=1, time=2048, once=True))
    ids, left = [], 1
    while left:
        batch = next(batches)
        ids.append(batch["targets"][batch["weights"] > 0])
        left = batch["totals"]["left"].sum()
    assert sorted(asked) == list(range(21)) and len(ids) > 400
    ids = np.concatenate(ids)
    assert large in tokenizer.decode_bytes(ids[ids != tokenizer.bos].tolist()).decode()


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_shard_that_breaks_in_the_midst(tmp_path, tokenizer, workers):
    path = write(tmp_path / "a.parquet", [text * 9 for text in TEXTS] * 20, row_group_size=300, compression="zstd")
    broken = bytearray(path.read_bytes())
    at = pq.ParquetFile(path).metadata.row_group(7).column(0).data_page_offset
    broken[at : at + 2000] = b"\xff" * 2000
    path.write_bytes(broken)
    batches = base_batches([path], tokenizer, workers=workers)
    with pytest.raises(UserError, match="a.parquet, row group 7, cannot be read .* download it again"):
        for _ in range(100_000):
            place = batches.get_state()
            next(batches)
    batches.set_state(place)  # where a run that ends by it is saved
    assert batches.get_state() == place
    batches.close()


def conversations(tmp_path, rows):
    path = tmp_path / "talk.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return pipelines.load_tasks(str(path), "", "train_tasks", documents=False)


def test_conversations_without_an_assistant_and_odd_ones(tmp_path, tokenizer):
    odd = [
        [TALK[0]],
        [{"role": "user", "content": "a\ud800b<|bos|>\r\n\0"}, TALK[1]],
        [*TALK, {"role": "user", "content": ""}],
    ]
    tasks = conversations(tmp_path, [*odd, TALK])
    (batch,) = pipelines.sft_batches(tasks, tokenizer, examples=4, micro_rows=4, time=64, seed=0, num_examples=4)
    assert batch["totals"]["nothing_supervised"].sum() == 1 and batch["totals"]["cut"].sum() == 0
    said = [tokenizer.decode(row[row != 0]) for row in batch["inputs"][0]]
    assert sum("a\ufffdb<|bos|>\r\n" in text for text in said) == 1
    assert (batch["inputs"] == tokenizer.bos).sum() == 4, "a spelling of <|bos|> is text"


ROWS = {"question": ["What?"] * 2, "choices": [["a", "b", "c", "d"]] * 2, "answer": [1, 2]}


@pytest.mark.parametrize(
    "task, path, rows, told",
    [
        ("MMLU/test", "mmlu/all", ROWS | {"question": ["What?", None]}, "`question` is null"),
        ("MMLU/test", "mmlu/all", ROWS | {"choices": [["a", "b"], ["a", None]]}, "not a list of texts"),
        ("MMLU/test", "mmlu/all", ROWS | {"answer": [0, 4]}, "answer 4 of 4 choices"),
        ("GSM8K/test", "gsm8k/main", {"question": ["1 + 1?"] * 2, "answer": ["2", None]}, "`answer` is null"),
        (
            "GSM8K/test",
            "gsm8k/main",
            {"question": ["1 + 1?"] * 2, "answer": [2, 2]},
            "other types than expected",
        ),
        ("SmolTalk/test", "smoltalk/data", {"messages": [TALK, [*TALK, None]]}, "unknown role None"),
        ("SmolTalk/test", "smoltalk/data", {"messages": [TALK, None]}, "`messages` is null"),
    ],
)
def test_bad_cells_of_tasks_are_named(tmp_path, task, path, rows, told):
    folder = tmp_path / path
    folder.mkdir(parents=True)
    pq.write_table(pa.table(rows), folder / "test-00000-of-00001.parquet")
    with pytest.raises(UserError, match=f"test-00000-of-00001.parquet, row [01]: .*{told}.* of its 2 rows"):
        pipelines.load_tasks(task, str(tmp_path), "train_tasks", documents=False)


def test_validation_without_an_answer_is_refused(tmp_path, tokenizer):
    """Else its loss would be 0 over 0 tokens."""
    tasks = conversations(tmp_path, [[TALK[0]], [{"role": "user", "content": "x" * 99}, TALK[1]]])
    read, order = conversation_reader(tasks, tokenizer), Order([2], 0)
    with pytest.raises(UserError, match="within the first 32 tokens of the 2 validation conversations"):
        pipelines.padded_validation(read, order, 2, rows=2, time=32)


def test_nothing_to_learn_is_refused(tmp_path, tokenizer):
    """Else a run would print a loss of 0 to its end. What counts is the first part of the rows that it reads."""
    late = [{"role": "user", "content": "x" * 99}, TALK[1]]
    tasks = conversations(tmp_path, [[TALK[0]]] * 20 + [late])
    how = {"time": 32, "seed": 0, "num_examples": 21}
    with pytest.raises(UserError, match="within the first 32 tokens of the 21 training .*--train_tasks.*--max_seq_len"):
        pipelines.check_supervised(tasks, tokenizer, **how)
    pipelines.check_supervised(tasks, tokenizer, **how | {"time": 256, "num_examples": 99})
    order = Order([21], 0)
    place = next(i for i in range(21) if order.index(i) == 20)
    pipelines.check_supervised(tasks, tokenizer, **how | {"time": 256, "num_examples": place + 1})
    with pytest.raises(UserError, match=f"of the {place} training"):
        pipelines.check_supervised(tasks, tokenizer, **how | {"time": 256, "num_examples": place})


def test_a_task_without_rows_is_refused(tmp_path):
    """Else its accuracy would be 0 of 0."""
    (tmp_path / "gsm8k/main").mkdir(parents=True)
    empty = pa.table({"question": pa.array([], pa.string()), "answer": pa.array([], pa.string())})
    pq.write_table(empty, tmp_path / "gsm8k/main/test.parquet")
    with pytest.raises(UserError, match="gsm8k/main/test.parquet has no rows; fetch it again: .* gsm8k"):
        pipelines.load_tasks("GSM8K/test", str(tmp_path), "val_tasks", documents=False)


def test_a_panic_while_tokenizing_ends_the_run(tmp_path, tokenizer, monkeypatch):
    """What tiktoken's Rust raises is no Exception; Grain's thread would end, and the run wait for ever."""

    class Panic(BaseException):
        pass

    def panic(text):
        raise Panic("no more stack")

    batches = base_batches([write(tmp_path / "a.parquet", TEXTS)], tokenizer)
    monkeypatch.setattr(tokenizer, "encode_array", panic)
    with pytest.raises(RuntimeError, match="no more stack"):
        next(batches)


def test_a_conversation_of_the_assistant_alone_is_refused(tmp_path):
    with pytest.raises(UserError, match="talk.jsonl, line 2: turn 0 is the assistant's"):
        conversations(tmp_path, [TALK, [TALK[1]]])


def test_replaced_data_is_detected_on_resume(home, capsys):
    """A shard, or a file of conversations, with as many rows and bytes as before, but one other letter."""
    (home / "base_data").mkdir()
    plain = {"compression": "none", "write_statistics": False, "use_dictionary": False}
    for n in range(3):
        write(home / f"base_data/{n}.parquet", TEXTS, **plain)
    tok_train.main(["--vocab_size=280"])
    base_train.main(BASE)
    talk = home / "talk.jsonl"
    talk.write_text("".join(json.dumps(TALK) + "\n" for _ in range(300)))
    mid = [*BATCH, f"--train_tasks={talk}", "--save_every=1"]
    mid_train.main(mid)
    moved = home / "moved" / talk.name
    moved.parent.mkdir()
    shutil.copy(talk, moved)
    mid_train.main([*BATCH, f"--train_tasks={moved}", "--save_every=1", "--resume"])  # the same rows
    size = (home / "base_data/1.parquet").stat().st_size
    write(home / "base_data/1.parquet", [TEXTS[0].replace("words", "birds"), *TEXTS[1:]], **plain)
    assert (home / "base_data/1.parquet").stat().st_size == size
    talk.write_text(talk.read_text().replace("hello", "hallo", 1))
    for command, args, name in ((base_train, BASE, "1.parquet"), (mid_train, mid, "talk.jsonl")):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            command.main([*args, "--resume"])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1
        assert "was trained with different data" in err and name in err and "0.parquet" not in err
    shutil.copy(home / "base_data/0.parquet", home / "base_data/1.parquet")
    base_train.main([*BASE, "--resume"])  # as it was: nothing left to do, and no complaint
