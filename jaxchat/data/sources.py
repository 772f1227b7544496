"""Where documents come from: parquet shards with random access, and what a checkpoint remembers of files."""

import hashlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxchat.config import UserError, base_dir

SOURCE = ".source"  # launch.download writes into a folder of shards where they are from, and how many are wanted
CACHED_GROUPS = 32  # row groups kept at a time: each of the up to 16 streams of an order reads one, two at a border
WHOLE = 16 << 20  # bytes up to which a fingerprint is of the whole file
SAMPLES, SAMPLE_BYTES = 16, 1 << 16  # of a larger one, it is of so many pieces of this size: 1 MiB a shard


def find_shards(data_dir: str | Path | None, split: str, *, whole: bool = False) -> list[Path]:
    """The sorted parquet shards of a folder: all but the last for "train", the last for "val".

    whole: a UserError if launch.download was to fetch more of them than are there yet.
    """
    folder = Path(data_dir or base_dir() / "base_data").expanduser()
    shards = sorted(folder.glob("*.parquet"))
    remedy = f"fetch some: python -m launch.download fineweb-edu --shards=8{f' --to={data_dir}' if data_dir else ''}"
    if not shards:
        raise UserError(
            f"no .parquet file in {folder}; {remedy}; or put shards with a column `text` there, or name --data_dir"
        )
    if len(shards) == 1:
        raise UserError(
            f"only one .parquet file in {folder}; the last shard is for validation, so two are the least; {remedy}"
        )
    source = folder / SOURCE
    wanted = int(source.read_text().split()[1]) if source.is_file() else 0
    if whole and len(shards) < wanted:
        raise UserError(
            f"{folder} holds {len(shards)} of the {wanted} shards that were to be fetched; let the download finish "
            f"(the same command goes on where it was), or settle for fewer: --shards={len(shards)}"
        )
    return shards[-1:] if split == "val" else shards[:-1]


def file_fingerprint(path: Path) -> str:
    """16 hex digits of a file's size and content: all of it up to 16 MiB, else 16 pieces, the last at its end.

    A parquet file's end holds the place and size of every column chunk and, as a rule, their least and greatest values.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= WHOLE:
            digest.update(file.read())
        else:
            for i in range(SAMPLES):
                file.seek(i * (size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def open_parquet(path: Path, columns: list[str]) -> pq.ParquetFile:
    """An open parquet file that has the columns; else a UserError that names it."""
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as problem:
        raise UserError(
            f"{path} cannot be read as parquet ({str(problem).splitlines()[0]}); fetch it anew"
        ) from problem
    for column in columns:
        if column not in file.schema_arrow.names:
            raise UserError(f"{path} has no column `{column}`; it has: {', '.join(file.schema_arrow.names)}")
    return file


def _stamp(path: Path) -> tuple[int, int]:
    """(bytes, time of the last change): cheap to look at; (0, 0) if the file is gone."""
    try:
        stat = path.stat()
        return stat.st_size, stat.st_mtime_ns
    except OSError:
        return 0, 0


class ParquetText:
    """The `text` column of shards as a sequence of strings; null reads as "".

    Bytes that are no UTF-8 read as the replacement character. fingerprint: what each shard holds, by name.
    """

    def __init__(self, paths: list[Path]):
        self.paths = [Path(p) for p in paths]
        self.block_sizes: list[int] = []  # rows of each row group, over all shards
        self.fingerprint: dict[str, str] = {}
        self._groups: list[tuple[int, int]] = []  # (shard, row group) of each block
        self._stamps: list[tuple[int, int]] = []  # of each shard, when it was opened
        for shard, path in enumerate(self.paths):
            file = open_parquet(path, ["text"])
            kind = file.schema_arrow.field("text").type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise UserError(f"{path} has a column `text` of type {kind}; it must be string")
            for group in range(file.num_row_groups):
                if rows := file.metadata.row_group(group).num_rows:
                    self.block_sizes.append(rows)
                    self._groups.append((shard, group))
            self.fingerprint[path.name] = file_fingerprint(path)
            self._stamps.append(_stamp(path))
        self._ends = np.cumsum(self.block_sizes, dtype=np.int64)
        if not self.block_sizes:
            raise UserError(f"{', '.join(map(str, self.paths))}: no rows; a data set needs at least one document")
        self._cache: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        self.groups_read = 0  # how often a row group was decoded

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> str:
        block = int(np.searchsorted(self._ends, index, side="right"))
        text = self._block(block)[index - int(self._ends[block]) + self.block_sizes[block]].as_py()
        return (text or b"").decode("utf-8", "replace")

    def _check_unchanged(self, shard: int):
        """A shard that is replaced while a run reads it would change the order without a word."""
        path = self.paths[shard]
        if (stamp := _stamp(path)) != self._stamps[shard]:
            if not path.is_file() or file_fingerprint(path) != self.fingerprint[path.name]:
                raise UserError(f"{path} has changed since this run began; put it back, and --resume")
            self._stamps[shard] = stamp

    def _block(self, block: int) -> pa.ChunkedArray:
        if block not in self._cache:
            shard, group = self._groups[block]
            path = self.paths[shard]
            self._check_unchanged(shard)
            try:
                column = open_parquet(path, ["text"]).read_row_group(group, columns=["text"])["text"]
                # As bytes: Arrow does not check that a column of strings holds UTF-8.
                self._cache[block] = column.cast(pa.large_binary())
            except (OSError, pa.ArrowException) as problem:
                line = str(problem).splitlines()[0]
                raise UserError(f"{path}, row group {group}, cannot be read ({line}); fetch the file anew") from problem
            self.groups_read += 1
            if len(self._cache) > CACHED_GROUPS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(block)
        return self._cache[block]
