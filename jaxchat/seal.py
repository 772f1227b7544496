"""Seals: sizes and hashes of a complete checkpoint's files, which show damage before the files are used.

seal.json is written last and holds {file: [size in bytes, BLAKE2b hash]} of every file. If several processes
save together, each hashes the files that it wrote, which are still in its page cache: process 2 writes the
hashes of its files to seal.2.json, and seal.json has "" instead of these hashes.
"""

import json
import re
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jaxchat import files

NAME = "seal.json"


def seal(folder: Path, process: int = 0):
    """Write the seal file of process number `process` into a checkpoint's folder, after all other files."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("seal."))
    names = [path.relative_to(folder).as_posix() for path in paths]
    hashes = _hashes(folder, [name for name in names if _writer(name) == process])
    listed = hashes if process else names
    sealed = {name: [(folder / name).stat().st_size, hashes.get(name, "")] for name in sorted(listed)}
    files.write_json(folder / (f"seal.{process}.json" if process else NAME), sealed, indent=None)


def damage(folder: Path, items: Collection[str] | None = None) -> str:
    """Describe in a line how a checkpoint's folder is damaged; "" if it is intact or has no seal.

    The sizes of all files are compared with the seal. Hashes are compared for files in the folders `items`,
    such as "params"; None: for all files.
    """
    if not (folder / NAME).exists():
        return ""
    try:
        sealed = json.loads((folder / NAME).read_text(encoding="utf-8"))
        for part in folder.glob("seal.*.json"):
            sealed |= json.loads(part.read_text(encoding="utf-8"))
        for name, (size, _) in sealed.items():
            have = (folder / name).stat().st_size
            if have != size:
                return f"{name} has {have:,} bytes and not {size:,}"
        read = [name for name in sealed if items is None or name.partition("/")[0] in items]
        wanted = {name: sealed[name][1] for name in read if sealed[name][1]}
        hashes = _hashes(folder, wanted)
    except FileNotFoundError as problem:
        return f"{Path(problem.filename).relative_to(folder)} is missing"
    except (ValueError, AttributeError, TypeError, OSError) as problem:
        return f"it cannot be read ({problem})"
    changed = sorted(name for name, digest in wanted.items() if hashes[name] != digest)
    return f"{changed[0]} is not what was written" if changed else ""


def _writer(name: str) -> int:
    """Number of the process that wrote a file, from its folder "ocdbt.process_N"; 0 for other folders."""
    found = re.search(r"/ocdbt\.process_(\d+)/", name)
    return int(found[1]) if found else 0


def _hashes(folder: Path, names: Collection[str]) -> dict[str, str]:
    with ThreadPoolExecutor(4) as pool:  # hashing releases Python's global lock
        hashes = pool.map(lambda name: files.file_hash(folder / name, "blake2b"), names)
        return dict(zip(names, hashes, strict=True))
