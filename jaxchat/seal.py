"""Seal files: sizes and hashes of a checkpoint's files, which reveal damage before the files are used.

seal.json is written last and holds {file: [size in bytes, BLAKE2b hash]} for all files. If several processes
save together, process N > 0 writes the hashes of its own files to seal.N.json, and seal.json lacks them.
"""

import json
import re
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jaxchat import files

NAME = "seal.json"


def seal(folder: Path, process: int = 0):
    """Record sizes and hashes of a complete checkpoint's files in the seal file of process `process`."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("seal."))
    names = [path.relative_to(folder).as_posix() for path in paths]
    hashes = _hashes(folder, [name for name in names if _writer(name) == process])
    listed = hashes if process else names
    sealed = {name: [(folder / name).stat().st_size, hashes.get(name, "")] for name in sorted(listed)}
    files.write_json(folder / (f"seal.{process}.json" if process else NAME), sealed, indent=None)


def damage(folder: Path, items: Collection[str] | None = None) -> str:
    """Describe in one line how a checkpoint is damaged; "" if it is intact or has no seal file.

    items: folders whose files' hashes are compared, such as "params"; None: all. Sizes are always compared.
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
    """Return the number of the process that wrote a file, from "ocdbt.process_N" in its path, or else 0."""
    found = re.search(r"/ocdbt\.process_(\d+)/", name)
    return int(found[1]) if found else 0


def _hashes(folder: Path, names: Collection[str]) -> dict[str, str]:
    with ThreadPoolExecutor(4) as pool:  # hashing releases Python's global lock
        hashes = pool.map(lambda name: files.file_hash(folder / name, "blake2b"), names)
        return dict(zip(names, hashes, strict=True))
