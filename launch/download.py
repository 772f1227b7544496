"""Fetch data sets: python -m launch.download fineweb-edu --shards=240, or: … all-tasks core-bundle"""

import dataclasses
import difflib
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jaxchat.config import UserError, base_dir
from jaxchat.data.hub import File, Link, Repo, check_room, fetch_all, giga, is_there, listed, retried
from launch import cli

SETS: dict[str, list[Repo | Link]] = {
    "fineweb-edu": [Repo("karpathy/fineweb-edu-100b-shuffle", ("*.parquet",), "base_data", shards=True)],
    "climbmix": [Repo("karpathy/climbmix-400b-shuffle", ("*.parquet",), "base_data", shards=True)],
    "smoltalk": [Repo("HuggingFaceTB/smol-smoltalk", ("data/*.parquet",), "tasks/smoltalk")],
    "mmlu": [Repo("cais/mmlu", ("all/*.parquet",), "tasks/mmlu")],
    "gsm8k": [Repo("openai/gsm8k", ("main/*.parquet",), "tasks/gsm8k")],
    "arc": [Repo("allenai/ai2_arc", ("ARC-*/*.parquet",), "tasks/arc")],
    "humaneval": [Repo("openai/openai_humaneval", ("openai_humaneval/*.parquet",), "tasks/humaneval")],
    "identity": [
        Link(
            "https://karpathy-public.s3.us-west-2.amazonaws.com/identity_conversations.jsonl",
            "tasks/identity/identity_conversations.jsonl",
        )
    ],
    "words": [
        Link(
            "https://raw.githubusercontent.com/dwyl/english-words/refs/heads/master/words_alpha.txt",
            "tasks/words/words_alpha.txt",
        )
    ],
    "core-bundle": [Link("https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip", "eval_bundle.zip")],
}
TASKS = ("smoltalk", "mmlu", "gsm8k", "arc", "humaneval", "identity", "words")
NAMES = (*SETS, "all-tasks")


@dataclasses.dataclass(frozen=True)
class Config:
    """Fetch data sets, several files at a time. What is there already is checked and not fetched again; what was cut
    off goes on where it was. A file appears under its name only when its size and hash are what the hub says.

    Names: fineweb-edu, climbmix; smoltalk, mmlu, gsm8k, arc, humaneval, identity, words, or all-tasks for these seven;
    core-bundle. HF_ENDPOINT names a mirror of the hub, HF_HUB_DOWNLOAD_TIMEOUT the seconds until silence is an error.
    """

    what: str = ""
    """Names with commas between; they may also stand before the flags, with spaces."""
    shards: int = 240
    """Of fineweb-edu and climbmix, the first so many shards; the last of these is for validation."""
    to: str = ""
    """Folder that takes the place of base_data (of the two), tasks (of the tasks), or the bundle's parent."""
    parallel: int = 8
    """Files at a time."""


def place(folder: str, to: str) -> Path:
    """Where base_data/…, tasks/… or the bundle go: --to takes the place of the first of these names."""
    kind, _, rest = folder.partition("/")
    if kind not in ("base_data", "tasks"):
        return (Path(to).expanduser() if to else base_dir()) / folder
    return (Path(to).expanduser() if to else base_dir() / kind) / rest


def names_in(what: str) -> list[str]:
    names = [name for word in what.split(",") if word for name in (TASKS if word == "all-tasks" else [word])]
    for name in names:
        if name not in SETS:
            near = difflib.get_close_matches(name, NAMES, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"unknown data set {name!r}{hint}; it is one of {', '.join(NAMES)}")
    if not names:
        raise UserError(f"what to fetch? one or several of {', '.join(NAMES)}")
    if {"fineweb-edu", "climbmix"} <= set(names):
        raise UserError(
            "fineweb-edu and climbmix name their shards alike; fetch one, and the other with a --to of its own"
        )
    return list(dict.fromkeys(names))


def files_of(name: str, config: Config) -> list[File]:
    from jaxchat.data.sources import SOURCE

    files = []
    for part in SETS[name]:
        if isinstance(part, Link):
            files.append(File(part.url, place(part.path, config.to), {}))
            continue
        folder = place(part.folder, config.to)
        if part.shards:
            source = folder / SOURCE
            if source.is_file() and (other := source.read_text().split()[0]) != part.repo:
                raise UserError(f"{folder} holds shards of {other}; fetch {name} to another folder with --to")
        files += retried(part.repo, lambda part=part, folder=folder: listed(part, folder, config.shards))
        if part.shards:
            folder.mkdir(parents=True, exist_ok=True)
            source.write_text(f"{part.repo} {config.shards}\n")
    return files


def run(config: Config):
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils import logging as hub_logging

    disable_progress_bars()
    hub_logging.set_verbosity_error()
    names = names_in(config.what)
    for flag, least in (("shards", 2), ("parallel", 1)):
        if getattr(config, flag) < least:
            raise UserError(f"--{flag}={getattr(config, flag)}; it must be at least {least}")
    files = [file for name in names for file in files_of(name, config)]
    print(f"checking what is there of {len(files)} files…", flush=True)
    with ThreadPoolExecutor() as pool:
        there = list(pool.map(is_there, files))
    missing = [file for file, whole in zip(files, there, strict=True) if not whole]
    changed = [file.path.name for file in missing if file.path.is_file()]
    folders = sorted({str(file.path.parent) for file in files})
    rows = [
        ("files", f"{len(files):,}, of which {sum(there):,} are there and whole"),
        ("to fetch", f"{len(missing):,} files, {giga(sum(f.size or 0 for f in missing))} where the size is stated"),
        ("to", folders[0] + (f" and {len(folders) - 1} more" if len(folders) > 1 else "")),
    ]
    if changed:
        rows.append(("fetched anew", f"{len(changed)} that are not what the hub states: {', '.join(changed[:3])}"))
    cli.print_plan(f"Fetching {', '.join(names)}", rows)
    if missing:
        check_room(missing)
        fetch_all(missing, config.parallel)
    print("all files are there and whole", flush=True)
    tokenizer = base_dir() / "tokenizer"
    if not set(names) <= {*TASKS, "core-bundle"}:
        flag = f" --data_dir={config.to}" if config.to else ""
        cli.next_step(f"python -m launch.{'base_train' if tokenizer.is_dir() else 'tok_train'}{flag}")


def main(args: list[str] | None = None):
    words, args = [], list(sys.argv[1:] if args is None else args)
    while args and not args[0].startswith("-"):
        words.append(args.pop(0))
    cli.main(Config, run, [f"--what={','.join(words)}", *args] if words else args)


if __name__ == "__main__":
    main()
