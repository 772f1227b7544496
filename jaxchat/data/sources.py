"""Read text documents from parquet shards in any order, and compute fingerprints of files."""

import contextlib
import hashlib
import mmap
import os
import shlex
import tempfile
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxchat.config import UserError, base_dir, check_utf8, user_path

SOURCE = ".source"  # written by launch.download beside shards: their repository, number and commit
CACHED_GROUPS = 32  # decoded row groups to cache: each of up to 16 streams reads one, or two at a boundary
GROUP_BYTES = 32 << 20  # larger row groups are kept in temporary files; CACHED_GROUPS of this size are 1 GiB
OPENED_AT_ONCE = 16  # shards to open at once, in threads, since opening one on a network drive is slow
HASHED_WHOLE = 16 << 20  # size in bytes up to which a file's fingerprint covers all of its content
SAMPLES, SAMPLE_BYTES = 16, 1 << 16  # the fingerprint of a larger file covers samples, 1 MiB in all


def parquet_files(folder: Path, start: str = "", *, in_folders: bool = False) -> list[Path]:
    """Return, sorted, the parquet files in a folder whose names begin with `start`, except hidden files.

    in_folders: include files in subfolders.
    """
    paths = folder.glob("**/*" if in_folders else "*")
    found = (path for path in paths if path.suffix.lower() == ".parquet" and path.name.startswith(start))
    return sorted(
        path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def find_shards(data_dir: str | Path | None, split: str, *, whole: bool = False) -> list[Path]:
    """Return the sorted parquet shards of a split: the last shard for "val", all others for "train".

    data_dir: the folder of the shards; None or "": base_data in the base directory.
    whole: raise UserError if launch.download has not yet fetched all requested shards.
    """
    folder = user_path(data_dir or base_dir() / "base_data")
    shards = parquet_files(folder)
    to = f" --to={shlex.quote(str(data_dir))}" if data_dir else ""
    remedy = f"fetch some: python -m launch.download fineweb-edu --shards=8{to}"
    if not shards:
        others = sorted(path.name for path in folder.glob("[!.]*"))
        only = f", only {', '.join(others[:3])}{', …' if len(others) > 3 else ''}" if others else ""
        remedy += "; or put shards with a column `text` there, or name --data_dir"
        raise UserError(f"no .parquet file in {folder}{only}; {remedy}")
    if len(shards) == 1:
        least = "at least two are needed, as the last is for validation"
        raise UserError(f"only one .parquet file in {folder}; {least}; {remedy}")
    source = folder / SOURCE
    wanted = int(source.read_text(encoding="utf-8").split()[1]) if source.is_file() else 0
    if whole and len(shards) < wanted:
        raise UserError(
            f"{folder} holds {len(shards)} of the {wanted} shards that were asked for; let the download "
            f"finish (the same command resumes it), or settle for fewer: --shards={len(shards)}"
        )
    return shards[-1:] if split == "val" else shards[:-1]


def repeated(train: dict[str, str], held_out: dict[str, str]) -> str:
    """Return a warning if two shards have the same fingerprint, and so the same content; otherwise "".

    train, held_out: {name: fingerprint} of the training and the validation shards.
    """
    first: dict[str, str] = {}
    for name, fingerprint in (train | held_out).items():
        if (twin := first.setdefault(fingerprint, name)) != name:
            result = "validation measures training text" if name in held_out else "its text is read twice"
            return f"{name} is the same file as {twin}, so {result}; move one of them away"
    return ""


def file_fingerprint(path: Path) -> str:
    """Hash a file's size and content to 16 hex digits. Above 16 MiB, only 16 samples are hashed."""
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
    """Open a parquet file; raise UserError if it is damaged, or if it lacks or repeats one of `columns`."""
    check_utf8("file", str(path))
    if path.is_dir():
        raise UserError(f"{path} is a folder; move the .parquet files in it to {path.parent}, and delete it")
    try:
        # Without these options, whole column chunks would be read into memory at once.
        file = pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except (OSError, pa.ArrowInvalid) as problem:
        line = str(problem).splitlines()[0]
        if is_pointer(path):
            raise UserError(f"{path} is a Git LFS pointer, not the file; run: git lfs pull") from problem
        raise UserError(f"{path} cannot be read as parquet ({line}); download it again") from problem
    names = file.schema_arrow.names
    for column in columns:
        if column not in names:
            raise UserError(f"{path} has no column `{column}`; it has: {', '.join(names)}")
        if names.count(column) > 1:
            raise UserError(f"{path} has {names.count(column)} columns `{column}`; rename all but one")
    return file


def is_pointer(path: Path) -> bool:
    """Return whether a file is a Git LFS pointer instead of the content that it stands for."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(40).startswith(b"version https://git-lfs")
    return False


def is_text(kind: pa.DataType) -> bool:
    """Return whether an Arrow type holds strings or bytes. Large, view and dictionary types count, too."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    tests = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    return any(getattr(pa.types, f"is_{name}")(kind) for name in tests)


def _stamp(path: Path) -> tuple[int, int]:
    """Return (size in bytes, modification time in ns) of a file, or (0, 0) if it cannot be accessed."""
    try:
        stat = path.stat()
        return stat.st_size, stat.st_mtime_ns
    except OSError:
        return 0, 0


def _inspect_shard(path: Path) -> tuple[list[int], str, tuple[int, int]]:
    """Return (rows of each row group, fingerprint, (size in bytes, modification time in ns)) of a shard."""
    stamp = _stamp(path)
    file = open_parquet(path, ["text"])
    kind = file.schema_arrow.field("text").type
    if not is_text(kind):
        raise UserError(f"{path} has a column `text` of type {kind}; it must be string")
    rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    return rows, file_fingerprint(path), stamp


class ParquetText:
    """A sequence of the strings in the `text` column of parquet shards. A null is read as "".

    Bytes that are not UTF-8 are read as U+FFFD. At most 1 GiB of decoded text is kept in memory.
    fingerprint: {file name: fingerprint of the file}.
    """

    def __init__(self, paths: list[Path]):
        self.paths = [Path(p) for p in paths]
        with ThreadPoolExecutor(OPENED_AT_ONCE) as threads:
            shards = list(threads.map(_inspect_shard, self.paths))
        self.block_sizes: list[int] = []  # rows of each non-empty row group, over all shards
        self._groups: list[tuple[int, int]] = []  # (shard, row group) of each block
        for shard, (sizes, _, _) in enumerate(shards):
            filled = [(group, rows) for group, rows in enumerate(sizes) if rows]
            self.block_sizes += [rows for _, rows in filled]
            self._groups += [(shard, group) for group, _ in filled]
        self.fingerprint = {path.name: of for path, (_, of, _) in zip(self.paths, shards, strict=True)}
        self._stamps = [stamp for _, _, stamp in shards]
        self._ends = np.cumsum(self.block_sizes, dtype=np.int64)
        if not self.block_sizes:
            names = ", ".join(map(str, self.paths))
            raise UserError(f"{names}: no rows; a data set needs at least one document")
        self._cache: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        self.groups_read = 0  # row groups decoded so far, repeats included

    def __getstate__(self):  # without the cache: Grain's workers fill their own
        return self.__dict__ | {"_cache": OrderedDict()}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> str:
        block = int(np.searchsorted(self._ends, index, side="right"))
        text = self._block(block)[index - int(self._ends[block]) + self.block_sizes[block]].as_py()
        return (text or b"").decode("utf-8", "replace")

    def _check_unchanged(self, shard: int):
        path = self.paths[shard]
        if (stamp := _stamp(path)) != self._stamps[shard]:
            if not path.is_file() or file_fingerprint(path) != self.fingerprint[path.name]:
                raise UserError(f"{path} has changed since this run began; restore it, and --resume")
            self._stamps[shard] = stamp

    def _block(self, block: int) -> pa.ChunkedArray:
        if block not in self._cache:
            shard, group = self._groups[block]
            self._check_unchanged(shard)
            while len(self._cache) >= CACHED_GROUPS:
                self._cache.popitem(last=False)
            self._cache[block] = _decoded(self.paths[shard], group)
            self.groups_read += 1
        self._cache.move_to_end(block)
        return self._cache[block]


def _decoded(path: Path, group: int) -> pa.ChunkedArray:
    """Read the texts of a row group into memory, or into a temporary file if they exceed GROUP_BYTES."""
    pieces, kept, size = _byte_arrays(path, group), [], 0
    for piece in pieces:
        kept.append(piece)
        size += piece.nbytes
        if size > GROUP_BYTES:
            break
    else:
        return pa.chunked_array(kept, pa.large_binary())
    try:
        return _in_file(chain(kept, pieces))
    except OSError as problem:  # from the temporary file; a problem of the shard is a UserError
        raise UserError(
            f"{path}: row group {group} is too large for memory, and {temporary_folder()} cannot take it "
            f"({problem.strerror}); set TMPDIR to a folder on a larger disk, or write the shard with "
            "smaller row groups (row_group_size=10000)"
        ) from problem


def _in_file(arrays: Iterable[pa.Array]) -> pa.ChunkedArray:
    """Write arrays to an unnamed temporary file, memory-map it, and return the mapped column."""
    schema = pa.schema({"text": pa.large_binary()})
    with tempfile.TemporaryFile(prefix="jaxchat-", dir=temporary_folder()) as file:
        with pa.ipc.new_file(file, schema) as writer:
            for array in arrays:
                writer.write(pa.record_batch([array], schema=schema))
        file.flush()
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return pa.ipc.open_file(pa.py_buffer(content)).read_all()["text"]


def _byte_arrays(path: Path, group: int) -> Iterable[pa.Array]:
    """Yield the texts of a row group as Arrow arrays of bytes, a few MiB each."""
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
        raise UserError(f"{path}, row group {group}, cannot be read ({line}); download it again") from problem


def temporary_folder() -> str:
    """Return the folder for temporary files: $TMPDIR, else /var/tmp if writable, else Python's default."""
    on_disk = "/var/tmp" if os.access("/var/tmp", os.W_OK) else tempfile.gettempdir()
    return os.environ.get("TMPDIR") or on_disk
