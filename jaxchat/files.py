"""File helpers: atomic writes, JSON lines, free disk space, hashes, locks."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxchat.config import UserError

PART = ".part"  # suffix of files and folders that are not complete yet
ESCAPED = "backslashreplace"  # writes lone surrogates, which UTF-8 cannot hold, as JSON's escapes: \ud800


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a new file or folder, and rename it to `path` when the block ends.

    Until then `path` keeps its old content. If the block raises, `path` is not replaced, and the temporary
    path is deleted. A new folder can only replace an empty folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + PART)
    delete(part)  # left by a process that was killed
    try:
        yield part
        if part.is_file():
            with part.open("rb+") as file:  # else a power cut may leave the file's name without its content
                os.fsync(file.fileno())
    except BaseException:
        delete(part)
        raise
    part.replace(path)


def write_text(path: Path, text: str):
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8", errors=ESCAPED, newline="\n")


def write_json(path: Path, value: Any, indent: int | None = 1):
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def write_lines(path: Path, values: Iterable):
    """Write JSON values to a .jsonl file atomically, one per line."""
    with atomic(path) as part, part.open("w", encoding="utf-8", errors=ESCAPED, newline="\n") as file:
        file.writelines(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def read_json(path: Path) -> dict:
    """Return the JSON object in a file; {} if the file is missing, unreadable or not a JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {}
    return found if isinstance(found, dict) else {}


def append_line(path: Path, value: Any):
    """Append a JSON value to a .jsonl file."""
    with path.open("a", encoding="utf-8", errors=ESCAPED, newline="\n") as file:
        file.write(json.dumps(value, ensure_ascii=False) + "\n")


def read_lines(path: Path) -> list[dict]:
    """Return the JSON objects of a .jsonl file, without incomplete lines; [] if the file is missing."""
    rows = []
    if path.exists():
        # Not splitlines(), which also splits at characters that JSON strings may contain, such as U+2028.
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def delete(path: Path):
    """Delete a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def size_text(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


def duration(seconds: float) -> str:
    """Format seconds as in "1h02m", "3m20s" or "12s"."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"


def check_writable(folder: Path):
    """Raise OSError if a folder cannot be written to. The folder need not exist yet."""
    while not os.path.lexists(folder):
        folder = folder.absolute().parent
    if not folder.is_dir():  # a file, or a broken link
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder))
    try:
        tempfile.NamedTemporaryFile(dir=folder, prefix=".new").close()
    except OSError as problem:
        raise OSError(problem.errno, problem.strerror, str(folder)) from None


def free_space(folder: Path) -> int:
    """Return the free bytes on a folder's disk. The folder need not exist yet."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def check_space(folder: Path, needed: int, remedy: str = "free some"):
    """Raise UserError, with `remedy` as advice, if fewer than `needed` bytes are free on a folder's disk."""
    free = free_space(folder)
    if free < needed:
        sizes = f"{size_text(needed)} of disk space, and {size_text(free)} are free there"
        raise UserError(f"{folder} needs {sizes}; {remedy}")


def file_hash(path: Path, kind: str = "sha256") -> str:
    """Return the hex digest of a file. kind: a hashlib algorithm, or "git" for the SHA-1 of a git blob."""
    with path.open("rb") as file:
        if kind != "git":
            return hashlib.file_digest(file, kind).hexdigest()
        digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
        while block := file.read(1 << 22):
            digest.update(block)
        return digest.hexdigest()


class Held(Exception):
    """Raised if another process holds a lock. The message is the content of the lock file."""


def lock(path: Path, holder: str) -> int:
    """Lock a file, write `holder`, a description of this process, into it, and return its file descriptor.

    The lock ends when the descriptor is closed or all processes that share it end.
    Raises Held if another process holds the lock. On a file system without locks, nothing is locked.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    held = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:
        if problem.errno in (errno.EAGAIN, errno.EACCES):
            other = os.read(held, 200).decode(errors="replace").strip()
            os.close(held)
            raise Held(other) from None
        return held  # the file system has no locks
    with contextlib.suppress(OSError):  # on a full disk the lock works without the holder's name
        os.ftruncate(held, 0)
        os.pwrite(held, holder.encode(), 0)
    return held
