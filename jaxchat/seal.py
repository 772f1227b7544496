"""Seals: what a finished checkpoint folder holds, so that a partial or damaged one is known; and the run's lock.

A seal is written last, as a whole: {file: [bytes, BLAKE2b]} of every file in the folder.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jaxchat.config import UserError

NAME = "seal.json"
LOCK = ".lock"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, a quota, the largest file allowed


def seal(folder: Path):
    """Write the seal of a folder that nobody writes to any more."""
    fresh = folder / f"{NAME}.new"
    with fresh.open("w") as out:
        json.dump(_hashes(folder), out)
        out.flush()
        os.fsync(out.fileno())
    fresh.replace(folder / NAME)


@contextlib.contextmanager
def full_disk_told(folder: Path):
    """Turn what Orbax says of a full disk (errors of several kinds, a page long) into the OSError that it was."""
    try:
        yield
    except Exception as problem:
        for number in FULL:
            if os.strerror(number) in str(problem):
                raise OSError(number, os.strerror(number), str(folder)) from None
        raise


def read_lines(path: Path) -> list[dict]:
    """The objects of a .jsonl file; [] without one. A line that a kill cut short is left out."""
    rows = []
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def sweep(run_folder: Path):
    """Delete what saves that failed or were killed have left half-written, as far as that is possible."""
    for path in run_folder.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(path, ignore_errors=True)


def damage(folder: Path) -> str:
    """What is wrong with a sealed folder, '' if nothing.

    A folder without a seal passes; whether it should have one, checkpoint.whole_steps knows.
    """
    path = folder / NAME
    if not path.exists():
        return ""
    try:
        told = json.loads(path.read_text())
        for name, (size, _) in told.items():  # the cheap test first
            have = (folder / name).stat().st_size
            if have != size:
                return f"{name} has {have:,} bytes and not {size:,}"
        have = _hashes(folder, told)
    except FileNotFoundError as problem:
        return f"{Path(problem.filename).relative_to(folder)} is missing"
    except (ValueError, AttributeError, TypeError, OSError) as problem:
        return f"it cannot be read ({problem})"
    changed = sorted(name for name in told if have[name] != told[name])
    return f"{changed[0]} is not what was written" if changed else ""


def _hashes(folder: Path, names=None) -> dict[str, list]:
    def of(name: str) -> list:
        with (folder / name).open("rb") as file:
            return [os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "blake2b").hexdigest()]

    if names is None:
        paths = (path for path in folder.rglob("*") if path.is_file())
        names = (str(path.relative_to(folder)) for path in paths if not path.name.startswith(NAME))
    names = sorted(names)
    with ThreadPoolExecutor(4) as pool:  # hashing leaves Python's lock
        return dict(zip(names, pool.map(of, names), strict=True))


def lock(folder: Path) -> int:
    """Hold a run's folder until the descriptor that comes back is closed, or the process dies.

    UserError: another run holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:
        if problem.errno in (errno.EAGAIN, errno.EACCES):
            holder = os.read(held, 200).decode(errors="replace").strip() or "another process"
            os.close(held)
            raise UserError(
                f"{folder} is being written by {holder}; wait for that run, end it, or choose another --model_tag"
            ) from None
        return held  # a file system without locks
    with contextlib.suppress(OSError):  # a full disk: the lock holds without a name in it
        os.ftruncate(held, 0)
        os.pwrite(held, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return held
