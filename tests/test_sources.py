"""Parquet shards: random access, splits, and every way in which they can be wrong."""

import os
import pickle
import subprocess
import sys
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT

from jaxchat.config import UserError
from jaxchat.data import sources
from jaxchat.data.order import Division, Order
from jaxchat.data.sources import ParquetText, file_fingerprint, find_shards, repeated
from jaxchat.data.streams import PackedRows
from jaxchat.data.tasks import load_task


def write(path, texts, **options):
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path, **options)
    return path


def test_rows_by_index_over_shards_and_row_groups(tmp_path):
    texts = [f"document {i}" for i in range(57)]
    write(tmp_path / "a.parquet", texts[:40], row_group_size=7)
    write(tmp_path / "b.parquet", texts[40:], row_group_size=5)
    write(tmp_path / "c.parquet", ["validation"])
    found = ParquetText(find_shards(tmp_path, "train"))
    assert len(found) == 57 and found.block_sizes == [7, 7, 7, 7, 7, 5, 5, 5, 5, 2]
    for i in np.random.default_rng(0).permutation(57):
        assert found[int(i)] == texts[i]
    assert [path.name for path in find_shards(tmp_path, "val")] == ["c.parquet"]


TEXT_TYPES = [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view()]


@pytest.mark.parametrize("kind", [*TEXT_TYPES, pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_every_arrow_type_of_text(tmp_path, kind):
    texts = ["a", "é" * 1000, None, "", "a"]
    bare = pa.array([t and t.encode() for t in texts], pa.binary()) if "binary" in str(kind) else pa.array(texts)
    pq.write_table(pa.table({"text": bare.cast(kind)}), tmp_path / "a.parquet")
    found = ParquetText([tmp_path / "a.parquet"])
    assert [found[i] for i in range(5)] == ["a", "é" * 1000, "", "", "a"]


def test_hidden_files_are_no_shards(tmp_path):
    for name in ("0", "1", "._0", "._2", ".hidden"):
        write(tmp_path / f"{name}.parquet", ["x"]) if name in "01" else (tmp_path / f"{name}.parquet").write_bytes(b"?")
    assert [path.name for path in find_shards(tmp_path, "train")] == ["0.parquet"]
    assert [path.name for path in find_shards(tmp_path, "val")] == ["1.parquet"]


def test_ends_of_names_in_capitals(tmp_path):
    for name in ("a.PARQUET", "b.Parquet", "c.parquet"):
        write(tmp_path / name, ["x"])
    assert [path.name for path in find_shards(tmp_path, "train")] == ["a.PARQUET", "b.Parquet"]
    (tmp_path / "smoltalk/data").mkdir(parents=True)
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    for name in ("test.PARQUET", "test.parquet"):
        pq.write_table(pa.table({"messages": [talk]}), tmp_path / "smoltalk/data" / name)
        if name == "test.PARQUET":
            assert load_task("SmolTalk/test", tmp_path)[0]["messages"] == talk
    with pytest.raises(UserError, match="holds test.PARQUET beside test.parquet"):
        load_task("SmolTalk/test", tmp_path)


@pytest.mark.parametrize("codec, dictionary", [("none", False), ("zstd", True)])
def test_memory_is_bounded_whatever_the_row_groups(tmp_path, monkeypatch, codec, dictionary):
    """pandas writes a file as one row group: it is read from a temporary file, and says what it says in memory."""
    texts = [f"{i} " * (i % 700) for i in range(2000)] + [None, "", "é"]
    paths = [write(tmp_path / f"{n}.parquet", texts, compression=codec, use_dictionary=dictionary) for n in range(3)]
    found = ParquetText(paths)
    size = found._block(0).nbytes
    del found
    monkeypatch.setattr(sources, "GROUP_BYTES", 100_000)
    assert size > 10 * sources.GROUP_BYTES
    bounded = ParquetText(paths)
    before = pa.total_allocated_bytes()
    order = np.random.default_rng(0).permutation(3 * len(texts))
    assert all(bounded[int(i)] == (texts[i % len(texts)] or "") for i in order)
    assert bounded.groups_read == 3 and pa.total_allocated_bytes() - before < sources.GROUP_BYTES
    copy = pickle.loads(pickle.dumps(bounded))  # as Grain's workers get it
    assert not copy._cache and copy[3] == texts[3]


def test_a_large_row_group_is_decoded_bit_by_bit(tmp_path):
    """In Arrow's own count of its memory: far less than the group's 40 MB."""
    path = write(tmp_path / "a.parquet", [f"{i:07} " * 250 for i in range(20_000)], compression="none")
    code = "import pyarrow as pa; from jaxchat.data import sources; sources.GROUP_BYTES = 2**20; "
    code += f"texts = sources.ParquetText([{str(path)!r}]); assert texts[19_999].startswith('0019999 '); "
    code += "print(pa.default_memory_pool().max_memory())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 12_000_000


def test_a_full_disk_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "GROUP_BYTES", 100)
    texts = ParquetText([write(tmp_path / "a.parquet", ["x" * 200])])
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    with pytest.raises(UserError, match=r"missing cannot take it \(No such file or directory\); set TMPDIR"):
        texts[0]
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert texts[0] == "x" * 200
    monkeypatch.setattr(sources.tempfile, "TemporaryFile", lambda **_: open("/dev/full", "wb"))  # noqa: SIM115
    texts = ParquetText(texts.paths)
    with pytest.raises(
        UserError, match="a.parquet: row group 0 is too large .*No space left.* TMPDIR .*row_group_size"
    ):
        texts[0]


def test_shards_are_opened_at_once(tmp_path, monkeypatch):
    """On a network drive each waits; the order of shards stays."""
    paths = [write(tmp_path / f"{n}.parquet", [f"text {n}"]) for n in range(8)]
    barrier, fingerprint = threading.Barrier(8, timeout=30), sources.file_fingerprint
    monkeypatch.setattr(sources, "file_fingerprint", lambda path: barrier.wait() * 0 or fingerprint(path))
    found = ParquetText(paths)
    assert list(found.fingerprint) == [path.name for path in paths] and [found[n] for n in range(8)] == [
        f"text {n}" for n in range(8)
    ]


def test_null_reads_as_empty(tmp_path):
    assert ParquetText([write(tmp_path / "a.parquet", ["x", None, ""])])[1] == ""


def test_fingerprint_tells_which_shard_was_replaced(tmp_path, monkeypatch):
    """Even by one of the same name, rows and size, with one letter changed."""
    a, b = (
        write(tmp_path / f"{n}.parquet", ["x", "y" * 9000], compression="none", write_statistics=False) for n in "ab"
    )
    before = ParquetText([a, b]).fingerprint
    assert ParquetText([a, b]).fingerprint == before and before.keys() == {"a.parquet", "b.parquet"}
    size = b.stat().st_size
    write(b, ["x", "y" * 8999 + "z"], compression="none", write_statistics=False)
    after = ParquetText([a, b]).fingerprint
    assert b.stat().st_size == size
    assert after["a.parquet"] == before["a.parquet"] and after["b.parquet"] != before["b.parquet"]
    monkeypatch.setattr(sources, "HASHED_WHOLE", 1000)
    monkeypatch.setattr(sources, "SAMPLE_BYTES", 100)  # now it is larger than what is read of it: its end is
    sampled = file_fingerprint(b)
    assert sampled != after["b.parquet"] and sampled == file_fingerprint(b)
    b.write_bytes(b.read_bytes()[:-1] + b"x")
    assert file_fingerprint(b) != sampled


def test_a_shard_replaced_while_it_is_read(tmp_path, monkeypatch):
    """Noticed when its next row group is read; the same bytes written anew are no replacement."""
    path = write(tmp_path / "a.parquet", list("abcd"), row_group_size=1)
    texts = ParquetText([path])
    assert texts[0] == "a"
    os.utime(path, ns=(1, 1))
    assert texts[1] == "b"
    write(path, list("abcx"), row_group_size=1)
    assert texts[1] == "b"  # from memory
    with pytest.raises(UserError, match="a.parquet has changed since this run began"):
        texts[2]


def test_shards_of_an_unfinished_download(tmp_path):
    for n in range(3):
        write(tmp_path / f"{n}.parquet", ["x"])
    (tmp_path / sources.SOURCE).write_text("some/data 4\n")
    assert len(find_shards(tmp_path, "train")) == 2
    with pytest.raises(UserError, match="holds 3 of the 4 shards .* --shards=3"):
        find_shards(tmp_path, "train", whole=True)
    (tmp_path / sources.SOURCE).write_text("some/data 3\n")
    assert len(find_shards(tmp_path, "train", whole=True)) == 2


def test_row_groups_are_read_once_whatever_the_pace(tmp_path):
    """256 rows of documents of very different lengths, 40 steps: each row group once, and once more at a border."""
    random = np.random.default_rng(0)
    for n in range(4):
        texts = ["a " * int(length) for length in random.lognormal(3, 1.5, 5000).clip(1, 5000)]
        write(tmp_path / f"{n}.parquet", texts, row_group_size=100)
    texts = ParquetText(sorted(tmp_path.glob("*")))
    division = Division(Order(texts.block_sizes, 0), 256)
    read = lambda rows: [(np.ones(len(texts[i]) // 2, np.int32), None) for i in rows]  # noqa: E731
    batches = iter(PackedRows(read, division, micro_batches=1, time=64))
    for _ in range(40):
        state = next(batches) and batches.get_state()
    rows_read = sum(place for place, _, _ in state.values())
    assert rows_read > 10_000 and texts.groups_read <= rows_read / 100 + 3 * division.streams


def test_bytes_that_are_no_utf8_are_replaced(tmp_path):
    """Such as a lone surrogate; CRLF and NUL stay."""
    raw = pa.array([b"a\xed\xa0\x80b", b"c\r\nd\0e"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    found = ParquetText([tmp_path / "a.parquet"])
    assert found[0] == "a\ufffd\ufffd\ufffdb" and found[1] == "c\r\nd\0e"


def test_row_groups_without_rows(tmp_path):
    schema = pa.schema([("text", pa.string())])
    with pq.ParquetWriter(tmp_path / "a.parquet", schema) as writer:
        for texts in ([], ["x", "y"], [], ["z"], []):
            writer.write_table(pa.table({"text": pa.array(texts, pa.string())}), row_group_size=10)
    found = ParquetText([tmp_path / "a.parquet"])
    assert [found[i] for i in range(len(found))] == ["x", "y", "z"] and found.block_sizes == [2, 1]


def test_no_shard_and_one_shard(tmp_path):
    with pytest.raises(UserError, match=f"no .parquet file in {tmp_path}.*--data_dir"):
        find_shards(tmp_path, "train")
    for name in ("b.csv", "a.txt", "c.csv", "d.csv", ".hidden"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"no .parquet file in {tmp_path}, only a.txt, b.csv, c.csv, …; fetch some"):
        find_shards(tmp_path, "train")
    write(tmp_path / "a.parquet", ["x"])
    with pytest.raises(UserError, match="only one .parquet file .* at least two are needed"):
        find_shards(tmp_path, "train")


def test_wrong_columns(tmp_path):
    pq.write_table(pa.table({"body": ["x"], "url": ["y"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a.parquet has no column `text`; it has: body, url"):
        ParquetText([tmp_path / "a.parquet"])
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="b.parquet has a column `text` of type int64; it must be string"):
        ParquetText([tmp_path / "b.parquet"])
    twice = pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["text", "text"])
    pq.write_table(twice, tmp_path / "c.parquet")
    with pytest.raises(UserError, match="c.parquet has 2 columns `text`; rename all but one"):
        ParquetText([tmp_path / "c.parquet"])


def test_what_is_no_file_of_parquet(tmp_path):
    """A folder, as Spark writes, and what a clone of the hub's repository without Git LFS holds."""
    (tmp_path / "a.parquet").mkdir()
    with pytest.raises(UserError, match=f"a.parquet is a folder; move the .parquet files in it to {tmp_path}, and"):
        ParquetText([tmp_path / "a.parquet"])
    (tmp_path / "b.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with pytest.raises(UserError, match="b.parquet is a Git LFS pointer, not the file; run: git lfs pull"):
        ParquetText([tmp_path / "b.parquet"])


def test_a_shard_that_is_there_twice(tmp_path):
    for name, text in (("a", "x"), ("b", "y"), ("c", "z")):
        write(tmp_path / f"{name}.parquet", [text])
    prints = lambda split: ParquetText(find_shards(tmp_path, split)).fingerprint  # noqa: E731
    assert repeated(prints("train"), prints("val")) == ""
    (tmp_path / "b (1).parquet").write_bytes((tmp_path / "a.parquet").read_bytes())
    assert "b (1).parquet is the same file as a.parquet, so its text is" in repeated(prints("train"), prints("val"))
    (tmp_path / "b (1).parquet").rename(tmp_path / "d.parquet")
    assert "d.parquet is the same file as a.parquet, so validation" in repeated(prints("train"), prints("val"))


def test_no_rows(tmp_path):
    with pytest.raises(UserError, match="no rows"):
        ParquetText([write(tmp_path / "a.parquet", [])])


def test_unreadable_shards_are_named(tmp_path):
    texts = [f"{i} " * 50 for i in range(5000)]
    good = write(tmp_path / "a.parquet", texts, row_group_size=1000, compression="zstd").read_bytes()
    (tmp_path / "empty.parquet").write_bytes(b"")
    (tmp_path / "cut.parquet").write_bytes(good[: len(good) // 2])
    (tmp_path / "text.parquet").write_text("hello")
    for name in ("empty", "cut", "text"):
        with pytest.raises(UserError, match=f"{name}.parquet cannot be read as parquet"):
            ParquetText([tmp_path / f"{name}.parquet"])
    # The footer is whole, and the data in the middle is not: found when that row group is read.
    broken = bytearray(good)
    broken[len(good) // 4 : len(good) // 2] = b"\xff" * (len(good) // 2 - len(good) // 4)
    (tmp_path / "broken.parquet").write_bytes(broken)
    found = ParquetText([tmp_path / "broken.parquet"])
    with pytest.raises(UserError, match=r"broken.parquet, row group \d, cannot be read .* download it again"):
        for i in range(0, len(found), 1000):
            found[i]
