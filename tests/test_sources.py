"""Parquet shards: random access, splits, and every way in which they can be wrong."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxchat.config import UserError
from jaxchat.data.sources import ParquetText, find_shards


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


def test_null_reads_as_empty(tmp_path):
    assert ParquetText([write(tmp_path / "a.parquet", ["x", None, ""])])[1] == ""


def test_fingerprint_tells_data_apart(tmp_path):
    a = ParquetText([write(tmp_path / "a.parquet", ["x", "y"])]).fingerprint
    assert ParquetText([tmp_path / "a.parquet"]).fingerprint == a
    assert ParquetText([write(tmp_path / "a.parquet", ["x", "y", "z"])]).fingerprint != a


def test_no_shard_and_one_shard(tmp_path):
    with pytest.raises(UserError, match=f"no .parquet file in {tmp_path}.*--data_dir"):
        find_shards(tmp_path, "train")
    write(tmp_path / "a.parquet", ["x"])
    with pytest.raises(UserError, match="only one .parquet file .* two are the least"):
        find_shards(tmp_path, "train")


def test_wrong_columns(tmp_path):
    pq.write_table(pa.table({"body": ["x"], "url": ["y"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a.parquet has no column `text`; it has: body, url"):
        ParquetText([tmp_path / "a.parquet"])
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="b.parquet has a column `text` of type int64; it must be string"):
        ParquetText([tmp_path / "b.parquet"])


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
    with pytest.raises(UserError, match=r"broken.parquet, row group \d, cannot be read .* fetch the file anew"):
        for i in range(0, len(found), 1000):
            found[i]
