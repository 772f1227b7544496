"""Read the hub's parquet files: find the files of a split, and leave out invalid rows."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from jaxchat.config import UserError
from jaxchat.data.sources import file_fingerprint, open_parquet, parquet_files, repeated
from jaxchat.tokenizer import check_conversation

ROWS_READ = 10_000  # at a time; Arrow cannot hold more than 2 GiB of nested text in one piece
MOST_LEFT_OUT = 0.01  # fraction of rows that may be invalid; more of them mean a different format


class NoFiles(UserError):
    """Raised if a data set has no files at all. dataset: its name in launch.download."""

    def __init__(self, reason: str, dataset: str):
        super().__init__(f"{reason}; fetch it: python -m launch.download {dataset}; or name --tasks_dir")
        self.dataset = dataset


class Table:
    """Rows of a data set's parquet files, each converted to a conversation when it is read.

    Invalid rows are left out. Raises UserError if more than 1 in 100 rows are invalid.
    name: the data set's name in launch.download.
    convert: returns the conversation of a row, given as {column: value}.
    suspects: returns the indices of a batch's rows that may be invalid. Only they are checked. None: all are.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        split: str,
        columns: list[str],
        convert: Callable[[dict], dict],
        *,
        suspects: Callable[[pa.RecordBatch], np.ndarray] | None = None,
        in_folders: bool = False,
    ):
        self.paths = split_files(name, folder, split, in_folders=in_folders)
        self._convert, self._batches = convert, []
        problems: dict[int, str] = {}  # by row, over all files
        for path in self.paths:
            first = begin = sum(map(len, self._batches))
            for batch in _batches_of(path, columns):
                for row in suspects(batch) if suspects else range(len(batch)):
                    if why := self._problem(batch, int(row)):
                        problems[begin + row] = f"{path.name}, row {begin + row - first}: {why}"
                self._batches.append(batch)
                begin += len(batch)
        self._ends = np.cumsum([len(batch) for batch in self._batches], dtype=np.int64)
        count = sum(map(len, self._batches))
        self._rows = np.delete(np.arange(count), [*problems])
        if not count:
            raise UserError(f"{self.paths[0]} has no rows; fetch it again: python -m launch.download {name}")
        example = next(iter(problems.values()), "")
        if len(problems) > MOST_LEFT_OUT * count:
            raise UserError(
                f"{folder}, {example}; {len(problems)} of its {count:,} rows cannot be used, and at most "
                "1 in 100 may be left out; correct the file"
            )
        self.left_out = f"{len(problems)} left out, {example}" if problems else ""

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict:
        row = int(self._rows[index])
        which = int(np.searchsorted(self._ends, row, side="right"))
        batch = self._batches[which]
        return self._converted(batch, row - int(self._ends[which]) + len(batch))

    def _converted(self, batch: pa.RecordBatch, row: int) -> dict:
        cells = {name: _text_in(batch.column(name)[row].as_py()) for name in batch.schema.names}
        for name, cell in cells.items():
            if cell is None:
                raise UserError(f"`{name}` is null")
        try:
            return self._convert(cells)
        except (AttributeError, LookupError, TypeError, ValueError) as problem:
            kinds = ", ".join(f"`{field.name}` {field.type}" for field in batch.schema)
            raise UserError(f"its columns have other types than expected: {kinds}") from problem

    def _problem(self, batch: pa.RecordBatch, row: int) -> str:
        try:
            check_conversation(self._converted(batch, row))
        except UserError as problem:
            return str(problem)
        return ""


def _text_in(value):
    """Return a cell's value with all bytes in it decoded as UTF-8."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, dict):
        return {key: _text_in(item) for key, item in value.items()}
    return [_text_in(item) for item in value] if isinstance(value, list) else value


def _batches_of(path: Path, columns: list[str]) -> list[pa.RecordBatch]:
    try:
        batches = open_parquet(path, columns).iter_batches(ROWS_READ, columns=columns)
        return [batch for batch in batches if len(batch)]
    except (OSError, pa.ArrowException) as problem:
        line = str(problem).splitlines()[0]
        raise UserError(f"{path} cannot be read ({line}); download it again") from problem


def split_files(name: str, folder: Path, split: str, *, in_folders: bool = False) -> list[Path]:
    """Return the sorted parquet files of a split, such as "train.parquet" or "train-00000-of-00004.parquet".

    name: the data set's name in launch.download. in_folders: search subfolders too.
    Raises UserError if files are missing, or if two sets of files may hold the same rows.
    """
    paths = parquet_files(folder, split, in_folders=in_folders)
    if not paths:
        others = ", ".join(path.name for path in parquet_files(folder, in_folders=in_folders)[:4])
        if not others:
            raise NoFiles(f"no {split}*.parquet in {folder}", name)
        remedy = f"choose a split with Name/split, or fetch it: python -m launch.download {name}"
        raise UserError(f"no {split}*.parquet in {folder}, only {others}; {remedy}")
    sets: dict[tuple, dict[Path, str]] = {}
    for path in paths:
        stem = re.sub(r"-[0-9a-f]{16}$", "", path.stem)  # a hash that the hub used to add
        base, number, of = re.fullmatch(r"(.*?)(\d*)(?:-of-(\d+))?", stem).groups()
        sets.setdefault((path.parent, base, of, path.suffix), {})[path] = number
    if len(sets) > 1:
        one, other = (str(next(iter(files)).relative_to(folder)) for files in list(sets.values())[:2])
        raise UserError(
            f"{folder} holds {one} beside {other}, which may hold the same rows twice; move one of them away"
        )
    ((_, _, of, _), files), *_ = sets.items()
    if of and sorted(map(int, files.values())) != list(range(int(of))):
        raise UserError(
            f"{folder} holds {len(paths)} files {split}-…-of-{of}.parquet, not one each from 0 to "
            f"{int(of) - 1}; fetch the rest: python -m launch.download {name}"
        )
    if twins := repeated({str(path.relative_to(folder)): file_fingerprint(path) for path in paths}, {}):
        raise UserError(f"{folder}: {twins}")
    return paths
