"""Where documents come from: parquet shards with random access, and seeded endless orders over any source."""

import hashlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxchat.config import UserError, base_dir

CACHED_GROUPS = 16  # decoded row groups kept at a time


def find_shards(data_dir: str | Path | None, split: str) -> list[Path]:
    """The sorted parquet shards of a folder: all but the last for "train", the last for "val"."""
    folder = Path(data_dir or base_dir() / "base_data").expanduser()
    shards = sorted(folder.glob("*.parquet"))
    if not shards:
        raise UserError(f"no .parquet file in {folder}; put shards with a column `text` there, or name --data_dir")
    if len(shards) == 1:
        raise UserError(f"only one .parquet file in {folder}; the last shard is for validation, so two are the least")
    return shards[-1:] if split == "val" else shards[:-1]


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


class ParquetText:
    """The `text` column of shards as a sequence of strings; null reads as ""."""

    def __init__(self, paths: list[Path]):
        self.paths = [Path(p) for p in paths]
        self.block_sizes: list[int] = []  # rows of each row group, over all shards
        self._groups: list[tuple[int, int]] = []  # (shard, row group) of each block
        names = hashlib.sha256()
        for shard, path in enumerate(self.paths):
            file = open_parquet(path, ["text"])
            kind = file.schema_arrow.field("text").type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise UserError(f"{path} has a column `text` of type {kind}; it must be string")
            for group in range(file.num_row_groups):
                if rows := file.metadata.row_group(group).num_rows:
                    self.block_sizes.append(rows)
                    self._groups.append((shard, group))
            names.update(f"{path.name} {file.metadata.num_rows} {path.stat().st_size}\n".encode())
        self._ends = np.cumsum(self.block_sizes, dtype=np.int64)
        if not self.block_sizes:
            raise UserError(f"{', '.join(map(str, self.paths))}: no rows; a data set needs at least one document")
        self.fingerprint = names.hexdigest()[:16]
        self._cache: OrderedDict[int, list[str | None]] = OrderedDict()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> str:
        block = int(np.searchsorted(self._ends, index, side="right"))
        return self._block(block)[index - int(self._ends[block]) + self.block_sizes[block]] or ""

    def _block(self, block: int) -> list[str | None]:
        if block not in self._cache:
            shard, group = self._groups[block]
            path = self.paths[shard]
            try:
                column = open_parquet(path, ["text"]).read_row_group(group, columns=["text"])["text"]
                self._cache[block] = column.to_pylist()
            except (OSError, pa.ArrowException, UnicodeDecodeError) as problem:
                line = str(problem).splitlines()[0]
                raise UserError(f"{path}, row group {group}, cannot be read ({line}); fetch the file anew") from problem
            if len(self._cache) > CACHED_GROUPS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(block)
        return self._cache[block]


class Shuffled:
    """An endless order over a source's rows: item i of it is row `index(i)`; each epoch has an order of its own.

    Blocks are shuffled, and rows within a block, so that reading stays local; one block shuffles fully.
    """

    def __init__(self, source, block_sizes: list[int], seed: int):
        self.num_rows = len(source)
        self._starts = np.cumsum([0, *block_sizes], dtype=np.int64)
        self._seed = seed
        self._orders: OrderedDict[int, np.ndarray] = OrderedDict()  # the last two epochs'

    def index(self, i: int) -> int:
        epoch, place = divmod(i, self.num_rows)
        if epoch not in self._orders:
            random = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self._seed, epoch])))
            blocks = random.permutation(len(self._starts) - 1)
            spans = [random.permutation(np.arange(self._starts[b], self._starts[b + 1])) for b in blocks]
            self._orders[epoch] = np.concatenate(spans)
            if len(self._orders) > 2:
                self._orders.popitem(last=False)
        return int(self._orders[epoch][place])
