"""Text documents in parquet shards, with random access, and fingerprints of files."""

import contextlib
import hashlib
import os
import shlex
import tempfile
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxchat.config import UserError, base_dir, check_utf8, user_path

SOURCE = ".source"  # launch.download notes in a folder of shards where they are from, and how many are wanted
CACHED_GROUPS = 32  # decoded row groups kept: each of up to 16 streams reads one, or two at a border
GROUP_BYTES = 32 << 20  # larger ones go to temporary files; CACHED_GROUPS of this size are 1 GiB
OPENED_AT_ONCE = 16  # shards, each in a thread: on a network drive, opening one is waiting
HASHED_WHOLE = 16 << 20  # bytes up to which a file's fingerprint is of all its content
SAMPLES, SAMPLE_BYTES = 16, 1 << 16  # that of a larger file is of samples, 1 MiB in all


def parquet_files(folder: Path, start: str = "", *, in_folders: bool = False) -> list[Path]:
    """The sorted parquet files of a folder whose names begin with `start`, in capitals or not (.PARQUET).

    Hidden files, such as macOS's `._x.parquet`, are ignored. in_folders: also those of the folders in it.
    """
    paths = folder.glob("**/*" if in_folders else "*")
    found = (path for path in paths if path.suffix.lower() == ".parquet" and path.name.startswith(start))
    return sorted(
        path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def find_shards(data_dir: str | Path | None, split: str, *, whole: bool = False) -> list[Path]:
    """The sorted parquet shards of a folder: all but the last for "train", the last for "val".

    whole: raise a UserError while launch.download has fetched only a part of what it was asked for.
    """
    folder = user_path(data_dir or base_dir() / "base_data")
    shards = parquet_files(folder)
    to = f" --to={shlex.quote(str(data_dir))}" if data_dir else ""
    remedy = f"fetch some: python -m launch.download fineweb-edu --shards=8{to}"
    if not shards:
        others = sorted(path.name for path in folder.glob("[!.]*"))
        only = f", only {', '.join(others[:3])}{', …' if len(others) > 3 else ''}" if others else ""
        raise UserError(
            f"no .parquet file in {folder}{only}; {remedy}; or put shards with a column `text` there, or "
            "name --data_dir"
        )
    if len(shards) == 1:
        raise UserError(
            f"only one .parquet file in {folder}; at least two are needed, as the last is for validation; "
            f"{remedy}"
        )
    source = folder / SOURCE
    wanted = int(source.read_text(encoding="utf-8").split()[1]) if source.is_file() else 0
    if whole and len(shards) < wanted:
        raise UserError(
            f"{folder} holds {len(shards)} of the {wanted} shards that were asked for; let the download "
            f"finish (the same command resumes it), or settle for fewer: --shards={len(shards)}"
        )
    return shards[-1:] if split == "val" else shards[:-1]


def repeated(train: dict[str, str], held_out: dict[str, str]) -> str:
    """A warning where two shards, in {name: fingerprint}, are the same file; "" where none are."""
    first: dict[str, str] = {}
    for name, fingerprint in (train | held_out).items():
        if (twin := first.setdefault(fingerprint, name)) != name:
            result = "validation measures training text" if name in held_out else "its text is read twice"
            return f"{name} is the same file as {twin}, so {result}; move one of them away"
    return ""


def file_fingerprint(path: Path) -> str:
    """16 hex digits for a file's size and content: all of it up to 16 MiB, else 16 samples, one at its end.

    A parquet file's end holds the place and size of every column chunk and, as a rule, their least and
    greatest values.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= HASHED_WHOLE:
            digest.update(file.read())
        else:
            for i in range(SAMPLES):
                file.seek(i * (size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def open_parquet(path: Path, columns: list[str]) -> pq.ParquetFile:
    """Open a parquet file that has each of these columns once. UserError: it does not, or is damaged."""
    check_utf8("file", str(path))
    if path.is_dir():
        raise UserError(f"{path} is a folder; move the .parquet files in it to {path.parent}, and delete it")
    try:
        # Else whole column chunks, as long as their row groups, would be read into memory at once.
        file = pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except (OSError, pa.ArrowInvalid) as problem:
        line = str(problem).splitlines()[0]
        if is_pointer(path):
            raise UserError(f"{path} is a pointer of Git LFS, not the file; run: git lfs pull") from problem
        raise UserError(f"{path} cannot be read as parquet ({line}); download it again") from problem
    names = file.schema_arrow.names
    for column in columns:
        if column not in names:
            raise UserError(f"{path} has no column `{column}`; it has: {', '.join(names)}")
        if names.count(column) > 1:
            raise UserError(f"{path} has {names.count(column)} columns `{column}`; rename all but one")
    return file


def is_pointer(path: Path) -> bool:
    """Return whether a file is what a clone without Git LFS holds in its place."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(40).startswith(b"version https://git-lfs")
    return False


def is_text(kind: pa.DataType) -> bool:
    """Return whether a column of this Arrow type holds text, in any layout; bytes count as UTF-8."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    tests = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    return any(getattr(pa.types, f"is_{name}")(kind) for name in tests)


def _stamp(path: Path) -> tuple[int, int]:
    """Return (bytes, time of the last change): cheap to compare; (0, 0) if the file is gone."""
    try:
        stat = path.stat()
        return stat.st_size, stat.st_mtime_ns
    except OSError:
        return 0, 0


def _inspect_shard(path: Path) -> tuple[list[int], str, tuple[int, int]]:
    """Return (rows of each row group, fingerprint, stamp) of a shard."""
    stamp = _stamp(path)
    file = open_parquet(path, ["text"])
    kind = file.schema_arrow.field("text").type
    if not is_text(kind):
        raise UserError(f"{path} has a column `text` of type {kind}; it must be string")
    rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    return rows, file_fingerprint(path), stamp


class ParquetText:
    """The `text` column of shards as a sequence of strings; null reads as "".

    Bytes that are not UTF-8 read as the replacement character. At most 1 GiB of decoded text is kept in
    memory, whatever the size of the row groups. fingerprint: {file name: fingerprint of its content}.
    """

    def __init__(self, paths: list[Path]):
        self.paths = [Path(p) for p in paths]
        with ThreadPoolExecutor(OPENED_AT_ONCE) as threads:
            shards = list(threads.map(_inspect_shard, self.paths))
        self.block_sizes: list[int] = []  # rows of each row group that has some, over all shards
        self._groups: list[tuple[int, int]] = []  # (shard, row group) of each block
        for shard, (sizes, _, _) in enumerate(shards):
            filled = [(group, rows) for group, rows in enumerate(sizes) if rows]
            self.block_sizes += [rows for _, rows in filled]
            self._groups += [(shard, group) for group, _ in filled]
        self.fingerprint = {path.name: of for path, (_, of, _) in zip(self.paths, shards, strict=True)}
        self._stamps = [stamp for _, _, stamp in shards]
        self._ends = np.cumsum(self.block_sizes, dtype=np.int64)
        if not self.block_sizes:
            raise UserError(
                f"{', '.join(map(str, self.paths))}: no rows; a data set needs at least one document"
            )
        self._cache: OrderedDict[int, InMemory | OnDisk] = OrderedDict()
        self.groups_read = 0  # how often a row group was decoded

    def __getstate__(self):  # Grain's workers decode for themselves
        return self.__dict__ | {"_cache": OrderedDict()}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> str:
        block = int(np.searchsorted(self._ends, index, side="right"))
        text = self._block(block)[index - int(self._ends[block]) + self.block_sizes[block]]
        return text.decode("utf-8", "replace")

    @property
    def bytes_in_memory(self) -> int:
        return sum(block.nbytes for block in self._cache.values())

    def _check_unchanged(self, shard: int):
        """Refuse a shard that was replaced during the run: it would silently change the order."""
        path = self.paths[shard]
        if (stamp := _stamp(path)) != self._stamps[shard]:
            if not path.is_file() or file_fingerprint(path) != self.fingerprint[path.name]:
                raise UserError(f"{path} has changed since this run began; put it back, and --resume")
            self._stamps[shard] = stamp

    def _block(self, block: int) -> "InMemory | OnDisk":
        if block not in self._cache:
            shard, group = self._groups[block]
            self._check_unchanged(shard)
            while len(self._cache) >= CACHED_GROUPS:
                self._cache.popitem(last=False)
            self._cache[block] = _decoded(self.paths[shard], group)
            self.groups_read += 1
        self._cache.move_to_end(block)
        return self._cache[block]


def _decoded(path: Path, group: int) -> "InMemory | OnDisk":
    """The texts of a row group, decoded piece by piece; on disk if they come to more than GROUP_BYTES."""
    pieces, size, file = [], 0, None
    try:
        for piece in _pieces(path, group):
            pieces.append(piece)
            size += piece.nbytes
            if size > GROUP_BYTES or file:
                file = file or OnDisk()
                file.append(pieces)
                pieces = []
    except OSError as problem:  # of the temporary file; what is wrong with the shard is a UserError
        raise UserError(
            f"{path}: row group {group} is too large for memory, and {temporary_folder()} cannot take it "
            f"({problem.strerror}); set TMPDIR to a folder on a larger disk, or write the shard with "
            "smaller row groups (row_group_size=10000)"
        ) from problem
    return file or InMemory(pieces)


def _pieces(path: Path, group: int) -> Iterable[pa.Array]:
    """The texts of a row group as arrays of bytes, a few MiB each."""
    try:
        file = open_parquet(path, ["text"])
        about = file.metadata.row_group(group)
        rows = max(1, min(1024, GROUP_BYTES // 8 * about.num_rows // max(1, about.total_byte_size)))
        for batch in file.iter_batches(rows, row_groups=[group], columns=["text"]):
            column = batch.column("text")
            if pa.types.is_dictionary(column.type):
                column = column.cast(column.type.value_type)
            yield column.cast(pa.large_binary())  # Arrow does not check that a column of strings holds UTF-8
    except (OSError, pa.ArrowException) as problem:
        line = str(problem).splitlines()[0]
        raise UserError(
            f"{path}, row group {group}, cannot be read ({line}); download the file again"
        ) from problem


def temporary_folder() -> str:
    """$TMPDIR, or else /var/tmp, which is on a disk even where /tmp is in memory."""
    on_disk = "/var/tmp" if os.access("/var/tmp", os.W_OK) else tempfile.gettempdir()
    return os.environ.get("TMPDIR") or on_disk


class InMemory:
    """The texts of a row group, in memory as Arrow arrays."""

    def __init__(self, pieces: list[pa.Array]):
        self._texts = pa.chunked_array(pieces, pa.large_binary())
        self.nbytes = self._texts.nbytes

    def __getitem__(self, row: int) -> bytes:
        return self._texts[row].as_py() or b""


class OnDisk:
    """The texts of a row group in a temporary file without a name, which ends with the process."""

    def __init__(self):
        self._file = tempfile.TemporaryFile(prefix="jaxchat-", dir=temporary_folder())  # noqa: SIM115
        self._lengths: list[np.ndarray] = []

    def __del__(self):
        if hasattr(self, "_file"):
            self._file.close()

    def append(self, pieces: list[pa.Array]):
        for piece in pieces:
            texts = [text or b"" for text in piece.to_pylist()]
            self._file.write(b"".join(texts))
            self._lengths.append(np.array([len(text) for text in texts], np.int64))
        self._file.flush()

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(np.concatenate([[0], *self._lengths]), dtype=np.int64)

    @property
    def nbytes(self) -> int:
        return self._ends.nbytes

    def __getitem__(self, row: int) -> bytes:
        start, end = int(self._ends[row]), int(self._ends[row + 1])
        parts = []
        while start < end:
            parts.append(os.pread(self._file.fileno(), end - start, start))
            start += len(parts[-1])
        return b"".join(parts)
