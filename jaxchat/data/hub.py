"""Download data sets from the Hugging Face hub, and single files by URL, with verification and retries."""

import dataclasses
import errno
import fcntl
import fnmatch
import glob
import os
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from jaxchat import files
from jaxchat.config import UserError

# Seconds between attempts; their sum exceeds the 5 minutes of the hub's rate-limit window.
PAUSES = (1, 2, 4, 8, 16, 32, 64, 128, 128)
PERMANENT = (401, 403, 404)  # HTTP status codes for which a retry is pointless
# Errors of the local file system, which a retry would not fix.
DISK = ("ENOSPC", "EDQUOT", "EFBIG", "EACCES", "EPERM", "EROFS", "ENOTDIR", "EISDIR", "EEXIST", "EMFILE")
STALE = 3600  # seconds after which a partial file is assumed to be from a killed download
SHOW = 5  # seconds between progress lines


@dataclasses.dataclass(frozen=True)
class Repo:
    """A data set on the hub. Files whose paths match one of `patterns` are saved under `folder`."""

    repo: str
    patterns: tuple[str, ...]
    folder: str
    commit: str = ""  # commit to download; "": the newest at the first download
    shards: bool = False  # whether --shards limits the number of files
    held_out: str = ""  # validation file, downloaded whatever --shards is; "": the last one requested


@dataclasses.dataclass(frozen=True)
class Link:
    """A file to download from `url` to `path`.

    needs: if not empty, the file is a zip. It must hold these names, and is unpacked into the folder `path`.
    """

    url: str
    path: str
    needs: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Listing:
    """The files to download from one commit of a data set.

    files: {path: (size in bytes, kind of hash, hash)}. The kind is "sha256", or "git" for a git blob.
    """

    repo: str
    commit: str
    folder: Path
    files: dict[str, tuple[int, str, str]]

    def missing(self) -> list[str]:
        """Return the names of the files that are missing or have the wrong size."""
        return [name for name, (size, *_) in self.files.items() if size_of(self.folder / name) != size]


def size_of(path: Path) -> int:
    """Return the size of a file in bytes, or -1 if the file does not exist."""
    return path.stat().st_size if path.is_file() else -1


def retry(what: str, attempt: Callable, progress: Callable[[], int] = lambda: 0):
    """Return attempt(), repeated with increasing pauses while the network fails or a download is damaged.

    what: name of the download, for messages.
    progress: returns a number that measures progress. When it grows, the attempts are counted from 1 again.
    Raises UserError if the server refuses the download or the last attempt fails.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, XetDownloadError

    network = (HTTPError, XetDownloadError, OSError, RuntimeError)
    content = (ValueError, EOFError, zipfile.BadZipFile, zlib.error)
    tries, best = 0, progress()
    while True:
        try:
            return attempt()
        except (*network, *content) as problem:
            if isinstance(problem, OSError) and errno.errorcode.get(problem.errno) in DISK:
                raise
            answers = [error for error in (problem, problem.__cause__) if isinstance(error, HfHubHTTPError)]
            reason = next(iter(str(problem).strip().splitlines()), type(problem).__name__)
            refused = any(answer.response.status_code in PERMANENT for answer in answers)
            if refused or constants.is_offline_mode():
                remedy = "check the name, --revision, HF_ENDPOINT and HF_HUB_OFFLINE"
                raise UserError(f"{what}: {reason}; {remedy}") from problem
            if progress() > best:
                tries, best = 0, progress()
            if tries == len(PAUSES):
                remedy = "check the network, HF_ENDPOINT and the proxy, then run the same command again"
                raise UserError(f"{what}: {reason} ({tries + 1} attempts); {remedy}") from problem
            pause, most = PAUSES[tries], sum(PAUSES[tries:])
            left = f"attempt {tries + 2} of {len(PAUSES) + 1}, for {most} s at most"
            print(f"{what}: {reason}; trying again in {pause} s ({left})", file=sys.stderr, flush=True)
            time.sleep(pause)
            tries += 1


def list_files(repo: Repo, folder: Path, revision: str, shards: int) -> Listing:
    """Return the Listing of a data set's files to download into `folder`.

    revision: branch, tag or commit. "": the commit recorded in `folder`, else repo.commit, else the newest.
    shards: number of files to download. If repo.shards is false, it is ignored, and all files are listed.
    Raises UserError if the folder has other files that would be read as part of the data set.
    """
    from huggingface_hub import HfApi

    from jaxchat.data.sources import SOURCE, parquet_files

    recorded = (folder / SOURCE).read_text(encoding="utf-8").split() if (folder / SOURCE).is_file() else []
    if recorded and recorded[0] != repo.repo:
        raise UserError(f"{folder} holds files of {recorded[0]}; give --to=FOLDER for {repo.repo}")
    api, where = HfApi(), {"repo_id": repo.repo, "repo_type": "dataset"}
    commit = "" if revision else (*recorded[2:], repo.commit)[0]
    # Requested even if the commit is known: unlike the next call, it fails at once when no server answers.
    info = retry(repo.repo, lambda: api.repo_info(**where, revision=commit or revision or None))
    commit = commit or info.sha
    tree = retry(repo.repo, lambda: list(api.list_repo_tree(**where, recursive=True, revision=commit)))
    stated = {
        file.path: (file.size, "sha256", file.lfs.sha256) if file.lfs else (file.size, "git", file.blob_id)
        for file in sorted((file for file in tree if hasattr(file, "size")), key=lambda file: file.path)
        if any(fnmatch.fnmatch(file.path, pattern) for pattern in repo.patterns)
    }
    if not stated:
        patterns = " or ".join(repo.patterns)
        raise UserError(f"{repo.repo} has no {patterns} at {commit}; choose another --revision")
    if outside := [name for name in stated if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise UserError(
            f"{repo.repo} at this endpoint has a file {outside[0]!r}, outside of its folder; don't trust it, "
            "and set another HF_ENDPOINT"
        )
    if repo.shards and shards > len(stated):
        raise UserError(f"--shards={shards}: {repo.repo} has only {len(stated)}; give at most {len(stated)}")
    local = [path.relative_to(folder).as_posix() for path in parquet_files(folder, in_folders=True)]
    wanted = [pattern.lower() for pattern in repo.patterns]
    there = {name for name in local if any(fnmatch.fnmatch(name.lower(), pattern) for pattern in wanted)}
    others = there - stated.keys()
    if not recorded:  # then a file of the wrong size is not a part of this data set
        others |= {name for name in there & stated.keys() if size_of(folder / name) != stated[name][0]}
    if others:
        raise UserError(
            f"{folder} has {len(others)} files that are not of {repo.repo} ({min(others)}) and would be "
            "read with it; move them away, or give --to=FOLDER"
        )
    names = list(stated)[: shards if repo.shards else None]
    if repo.held_out in stated and repo.held_out not in names:
        names[-1] = repo.held_out
    return Listing(repo.repo, commit, folder, {name: stated[name] for name in names})


def no_flock(*_):
    """Stand-in for fcntl.flock that raises ENOSYS, so that huggingface_hub uses lock files instead."""
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def fetch(listing: Listing, parallel: int):
    """Download a listing's missing files, `parallel` at a time, and verify their sizes and hashes."""
    from huggingface_hub import snapshot_download

    from jaxchat.data.sources import SOURCE

    folder, source = listing.folder, listing.folder / SOURCE
    for partial in (folder / ".cache/huggingface/download").rglob("*.incomplete"):
        if time.time() - partial.stat().st_mtime > STALE:
            partial.unlink(missing_ok=True)

    def verify(name: str):
        """Delete a file that has the wrong size or, if it was just downloaded, the wrong hash."""
        (size, kind, digest), path = listing.files[name], folder / name
        is_new = path.is_file() and path.stat().st_mtime_ns >= source.stat().st_mtime_ns
        if size_of(path) != size or (is_new and files.file_hash(path, kind) != digest):
            path.unlink(missing_ok=True)

    def attempt():
        files.write_text(source, f"{listing.repo} {len(listing.files)} {listing.commit}\n")
        try:
            with source.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as problem:
            if problem.errno in (errno.ENOLCK, errno.EOPNOTSUPP):
                fcntl.flock = no_flock
        where = {"repo_type": "dataset", "revision": listing.commit, "local_dir": folder}
        names = [glob.escape(name) for name in listing.files]
        try:
            snapshot_download(listing.repo, **where, allow_patterns=names, max_workers=parallel)
        finally:
            with ThreadPoolExecutor(parallel) as pool:
                list(pool.map(verify, listing.files))
        if lacking := listing.missing():
            raise OSError(f"{len(lacking)} files are missing or differ from the hub's ({lacking[0]})")

    retry(listing.repo, attempt, lambda: -len(listing.missing()))


def is_complete(link: Link, path: Path) -> bool:
    """Return whether a link was downloaded to `path`; raise UserError if `path` is an incomplete folder."""
    lacking = [name for name in link.needs if not (path / name).exists()]
    if lacking and path.is_dir() and any(path.iterdir()):
        raise UserError(f"{path} is incomplete: it has no {lacking[0]}; delete it, and run this again")
    return not lacking if link.needs else size_of(path) > 0


def fetch_link(link: Link, path: Path):
    """Download the file of a link to `path`. If link.needs is not empty, unpack it into the folder `path`."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import hf_raise_for_status

    how = {"timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT, "headers": {"Accept-Encoding": "identity"}}

    def attempt():
        with files.atomic(path) as part, part.open("wb+") as out:
            with get_session().stream("GET", link.url, follow_redirects=True, **how) as response:
                hf_raise_for_status(response)
                for chunk in response.iter_bytes():
                    out.write(chunk)
            if not out.tell():
                raise OSError(f"{link.url} sent an empty file")
            if link.needs:
                part.unlink()  # the open file stays readable; its name is free for a folder
                with zipfile.ZipFile(out) as archive:
                    for member in (member for member in archive.infolist() if not member.is_dir()):
                        member.filename = member.filename.removeprefix(f"{path.name}/")
                        archive.extract(member, part)  # verifies its checksum
                if lacking := [name for name in link.needs if not (part / name).exists()]:
                    raise OSError(f"{link.url} is not the expected archive: it has no {lacking[0]}")

    retry(path.name, attempt)
    print(f"{path} downloaded", flush=True)


def show_progress(work: Callable[[], None], listings: list[Listing], links: Iterable[Path]):
    """Run `work`, which downloads `listings` and the files `links`; print its progress every few seconds."""

    def on_disk() -> int:
        partial = [path for listing in listings for path in (listing.folder / ".cache").rglob("*.incomplete")]
        if not listings:  # the sizes of links are not in `total`
            partial += [path.with_name(path.name + files.PART) for path in links]
        complete = [listing.folder / name for listing in listings for name in listing.files]
        return sum(max(0, size_of(path)) for path in [*partial, *complete])

    before, start = on_disk(), time.perf_counter()
    total = sum(size for listing in listings for size, *_ in listing.files.values())
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(work)
        try:
            while not wait([running], SHOW).done:
                have = on_disk()
                rate = max(0, have - before) / (time.perf_counter() - start)
                left = f", ETA {(total - have) / rate:,.0f} s" if rate and total > have else ""
                of = f" of {files.size_text(total)}" if total else ""
                if have:
                    print(f"{files.size_text(have)}{of}, {rate / 1e6:.1f} MB/s{left}", flush=True)
        except KeyboardInterrupt:  # else huggingface_hub's threads would finish their files
            print("interrupted; run the same command to continue", file=sys.stderr, flush=True)
            os._exit(130)
    running.result()
