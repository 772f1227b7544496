"""Fetching files: from data sets on the hub, by its library, and from plain addresses; whole, checked, gone on with."""

import dataclasses
import errno
import fcntl
import fnmatch
import hashlib
import os
import shutil
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import BinaryIO

from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from jaxchat.config import UserError

CHUNK = 1 << 20  # bytes written at a time: less than one is lost when a connection breaks
TRIES, PAUSE = 5, 1.0  # in a row without progress; seconds before the second, doubled before each further one
# Failures of this machine's disk, which trying again does not mend.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EMFILE)


@dataclasses.dataclass(frozen=True)
class Repo:
    """A data set on the hub: the files that match one of `patterns` go to `folder`, under their own paths."""

    repo: str
    patterns: tuple[str, ...]
    folder: str
    shards: bool = False  # take only so many of the sorted files as --shards says


@dataclasses.dataclass(frozen=True)
class Link:
    """A file elsewhere, which goes to `path`; a .zip is unpacked beside it, to the folder of the same name."""

    url: str
    path: str


@dataclasses.dataclass(frozen=True)
class File:
    url: str
    path: Path
    headers: dict
    size: int | None = None  # bytes; None: whatever the server says
    digest: str = ""  # "sha256:…" or "git:…", as the hub states; "": none is stated

    @property
    def part(self) -> Path:
        return self.path.with_name(self.path.name + ".part")


def hash_of(path: Path, kind: str) -> str:
    """ "sha256:…" of a file's content, or "git:…", the name that git gives it (for small files the hub states that)."""
    digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return f"{kind}:{digest.hexdigest()}"


def is_whole(file: File, path: Path) -> bool:
    """Whether what lies at `path` is the file, as far as is known of it."""
    if not path.is_file() or (file.size is not None and path.stat().st_size != file.size):
        return False
    return not file.digest or hash_of(path, file.digest.partition(":")[0]) == file.digest


def retried(what: str, attempt: Callable, have: Callable[[], int] = lambda: 0):
    """attempt(), again after a pause where the server or the network failed. UserError: for good.

    have: the bytes that are here; a try after which they are more than ever before does not count.
    """
    tries, most = 0, have()
    while True:
        try:
            return attempt()
        except (HTTPError, OSError, ValueError) as problem:  # ValueError: no JSON came, but a page of somebody's
            status = problem.response.status_code if isinstance(problem, HfHubHTTPError) else None
            if isinstance(problem, OSError) and problem.errno in DISK:
                raise
            told = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
            if status in (401, 403, 404):
                raise UserError(f"{what}: {told}; is there such a thing at this endpoint? (HF_ENDPOINT)") from problem
            tries, most = (1 if have() > most else tries + 1), max(most, have())
            if tries == TRIES:
                raise UserError(
                    f"{what}: {told} ({TRIES} tries); run the same command again, it goes on where it was"
                ) from problem
            time.sleep(PAUSE * 2 ** (tries - 1))


def listed(repo: Repo, folder: Path, shards: int) -> list[File]:
    """The files of a data set, at its present commit, with the sizes and hashes that the hub states."""
    api = HfApi()
    commit = api.repo_info(repo.repo, repo_type="dataset").sha
    tree = api.list_repo_tree(repo.repo, recursive=True, revision=commit, repo_type="dataset")
    found = sorted((f for f in tree if hasattr(f, "size")), key=lambda f: f.path)
    found = [f for f in found if any(fnmatch.fnmatch(f.path, pattern) for pattern in repo.patterns)]
    if not found:
        raise UserError(f"{repo.repo} has no file like {', '.join(repo.patterns)}; it may have changed")
    for f in found:
        if Path(f.path).is_absolute() or ".." in Path(f.path).parts:
            raise UserError(
                f"{repo.repo} at this endpoint names a file {f.path!r}, outside of its folder; don't trust it"
            )
    if repo.shards and shards > len(found):
        raise UserError(f"--shards={shards}, but {repo.repo} has {len(found)}")
    return [
        File(
            url=hf_hub_url(repo.repo, f.path, repo_type="dataset", revision=commit),
            path=folder / f.path,
            headers=build_hf_headers(),
            size=f.size,
            digest=f"sha256:{f.lfs.sha256}" if f.lfs else f"git:{f.blob_id}",
        )
        for f in (found[:shards] if repo.shards else found)
    ]


def fetch(file: File, stop: threading.Event):
    """Put the file under its name, whole; a part that an earlier attempt left is gone on with."""

    def attempt():
        if stop.is_set():
            return
        file.part.parent.mkdir(parents=True, exist_ok=True)
        with open(file.part, "ab") as out:
            try:
                fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{file.part} is being fetched by another process; let it finish") from None
            have = os.fstat(out.fileno()).st_size
            if not file.digest or (file.size is not None and have > file.size):
                out.truncate(0)  # what has no hash stated is not gone on with: it may be another file by now
                have = 0
            if have != file.size:
                receive(file, out, have)
            out.flush()  # and still locked: nobody else may touch the part until it has its name
            if file.digest and hash_of(file.part, file.digest.partition(":")[0]) != file.digest:
                file.part.unlink()  # nothing of it can be trusted
                raise OSError("what came has another hash than the hub states")
            if file.path.suffix == ".zip":
                unpack(file.part, file.path.with_suffix(""))
                file.part.unlink()
            else:
                os.replace(file.part, file.path)

    retried(file.path.name, attempt, have=lambda: size_of(file.part))


def receive(file: File, out: BinaryIO, have: int):
    """Append to `out`, which holds `have` bytes of the file, what is lacking. OSError, HTTPError: not all of it came.

    The library's own http_get is not used: it goes on by itself, for ever where a server ignores ranges and drops.
    """
    headers = file.headers | {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    request = {"headers": headers, "timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT, "follow_redirects": True}
    with get_session().stream("GET", file.url, **request) as response:
        if response.status_code == 416 or (have and response.status_code == 200):
            out.truncate(0)  # no more there than is here, or something else by now; or the whole file comes
        hf_raise_for_status(response)
        for chunk in response.iter_bytes(CHUNK):
            out.write(chunk)
    out.flush()
    got = os.fstat(out.fileno()).st_size
    if file.size is not None and got != file.size:
        raise OSError(f"{got:,} bytes came, the hub states {file.size:,}")


def unpack(archive: Path, folder: Path):
    """The folder of the same name in an archive, whole or not at all."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(fresh)  # checks each member's CRC
    except (zipfile.BadZipFile, EOFError, zlib.error, RuntimeError, NotImplementedError) as problem:
        archive.unlink()
        raise OSError(f"not a whole zip file ({problem})") from problem
    os.replace(fresh / folder.name if (fresh / folder.name).is_dir() else fresh, folder)
    shutil.rmtree(fresh, ignore_errors=True)


def is_there(file: File) -> bool:
    return file.path.with_suffix("").is_dir() if file.path.suffix == ".zip" else is_whole(file, file.path)


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def check_room(missing: list[File]):
    need = sum((file.size or 0) - size_of(file.part) for file in missing)
    folder = missing[0].path.parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if need > free:
        raise UserError(
            f"{giga(need)} are still to be fetched to {missing[0].path.parent}, but {giga(free)} are free there; free "
            "some, ask for fewer --shards, or name a larger disk with --to or JAXCHAT_BASE_DIR"
        )


def giga(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


def fetch_all(missing: list[File], parallel: int):
    """Fetch all, with a line about it every few seconds. A file that fails stops no other; a full disk stops all."""
    stop, start = threading.Event(), time.perf_counter()
    before = sum(size_of(file.part) for file in missing)
    total = sum(file.size or 0 for file in missing)
    pool = ThreadPoolExecutor(parallel)
    running = {pool.submit(fetch, file, stop): file for file in missing}
    pending, done, failed, shown = set(running), 0, [], start
    try:
        while pending:
            finished, pending = wait(pending, timeout=1.0)
            for future in finished:
                problem = future.exception()
                done += problem is None
                if problem is not None and not isinstance(problem, UserError):
                    stop.set()
                    pool.shutdown(cancel_futures=True)
                    raise problem
                failed += [problem] if problem else []
            now = time.perf_counter()
            if now - shown >= 5 or not pending:
                shown = now
                have = sum(size_of(file.path if file.path.exists() else file.part) for file in missing)
                rate = (have - before) / (now - start)
                left = f", ETA {(total - have) / rate:,.0f} s" if rate > 0 and total > have else ""
                print(f"{done}/{len(missing)} files, {giga(have)}, {rate / 1e6:.1f} MB/s{left}", flush=True)
    except KeyboardInterrupt:  # the threads would still fetch their files to the end
        print("interrupted; the same command goes on where it was", file=sys.stderr, flush=True)
        os._exit(130)
    pool.shutdown()
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise UserError(f"{failed[0]}{more}")
