"""Download data sets: python -m launch.download fineweb-edu --shards=240"""

import contextlib
import dataclasses
import difflib
import sys
from pathlib import Path

from jaxchat import files
from jaxchat.config import Flags, UserError, base_dir, check_folder, flag, user_path
from jaxchat.data.hub import Link, Repo
from jaxchat.speedrun.presets import TASKS
from launch import cli

PUBLIC = "https://karpathy-public.s3.us-west-2.amazonaws.com"
WORDS = "https://raw.githubusercontent.com/dwyl/english-words/refs/heads/master/words_alpha.txt"
SETS: dict[str, Repo | Link] = {
    "fineweb-edu": Repo("karpathy/fineweb-edu-100b-shuffle", ("*.parquet",), "base_data", shards=True),
    "climbmix": Repo(
        "karpathy/climbmix-400b-shuffle",
        ("*.parquet",),
        "base_data",
        shards=True,
        held_out="shard_06542.parquet",
    ),
    "smoltalk": Repo("HuggingFaceTB/smol-smoltalk", ("data/*.parquet",), "tasks/smoltalk"),
    "mmlu": Repo("cais/mmlu", ("all/*.parquet",), "tasks/mmlu", "c30699e8356da336a370243923dbaf21066bb9fe"),
    "gsm8k": Repo(
        "openai/gsm8k", ("main/*.parquet",), "tasks/gsm8k", "740312add88f781978c0658806c59bc2815b9866"
    ),
    "arc": Repo(
        "allenai/ai2_arc", ("ARC-*/*.parquet",), "tasks/arc", "210d026faf9955653af8916fad021475a3f00453"
    ),
    "humaneval": Repo(
        "openai/openai_humaneval",
        ("openai_humaneval/*.parquet",),
        "tasks/humaneval",
        "7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544",
    ),
    "identity": Link(f"{PUBLIC}/identity_conversations.jsonl", "tasks/identity/identity_conversations.jsonl"),
    "words": Link(WORDS, "tasks/words/words_alpha.txt"),
    "core-bundle": Link(
        f"{PUBLIC}/eval_bundle.zip", "eval_bundle", needs=("core.yaml", "eval_meta_data.csv", "eval_data")
    ),
}
NAMES = (*SETS, "all-tasks")


@dataclasses.dataclass(frozen=True)
class Config(Flags):
    """Download data sets, several files at a time. Complete files are kept; after an interruption, the same
    command continues with the missing files. Files from the Hugging Face hub are verified by size and hash.

    The data sets are fineweb-edu and climbmix (text), core-bundle (CORE), and the tasks smoltalk, mmlu,
    gsm8k, arc, humaneval, identity and words. The name all-tasks stands for these seven. The environment
    variable HF_ENDPOINT sets a mirror of the hub. HF_HUB_DOWNLOAD_TIMEOUT sets the number of seconds without
    data after which a connection is closed.
    """

    what: str = ""
    """Names of the data sets, separated by commas. They may also be given before all flags, separated by
    spaces."""
    shards: int = flag(240, 2)
    """Number of shards of fineweb-edu or climbmix to download, starting with the first; the last one is for
    validation. For climbmix the last one is always shard_06542."""
    to: str = ""
    """Folder to download to, instead of <base directory>/base_data for fineweb-edu and climbmix, <base
    directory>/tasks for the tasks, and the base directory for core-bundle."""
    revision: str = ""
    """Commit, tag or branch on the hub, if only one data set is downloaded. Empty: the commit recorded in the
    folder's .source file, else the commit that jaxchat pins, else the newest. The downloaded commit is
    recorded in that file."""
    parallel: int = flag(8, 1)
    """Number of files downloaded at a time."""

    def __post_init__(self):
        super().__post_init__()
        check_folder("--to", self.to)
        if self.revision and not (
            len(names := names_in(self.what)) == 1 and isinstance(SETS[names[0]], Repo)
        ):
            raise UserError(f"--revision={self.revision} needs one data set of the hub, not {self.what}")


def place(folder: str, to: str) -> Path:
    """Return the path to which a data set is downloaded.

    folder: its default path in the base directory, such as tasks/mmlu. to: value of --to, which replaces
    base_data, tasks or, for the CORE bundle, the base directory; "": not given.
    """
    kind, _, rest = folder.partition("/")
    if kind not in ("base_data", "tasks"):
        return (user_path(to) if to else base_dir()) / folder
    return (user_path(to) if to else base_dir() / kind) / rest


def names_in(what: str) -> list[str]:
    names = [name for word in what.split(",") if word for name in (TASKS if word == "all-tasks" else [word])]
    for name in names:
        if name not in SETS:
            near = difflib.get_close_matches(name, NAMES, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"unknown data set {name!r}{hint}; it must be one of {', '.join(NAMES)}")
    if not names:
        raise UserError(f"no data set was named; give one or several of {', '.join(NAMES)}")
    if {"fineweb-edu", "climbmix"} <= set(names):
        raise UserError(
            "fineweb-edu and climbmix have shards of the same names; download them one by one, each with "
            "its own --to"
        )
    return list(dict.fromkeys(names))


def run(config: Config):
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils import logging as hub_logging

    from jaxchat.data import hub

    disable_progress_bars()
    hub_logging.set_verbosity_error()
    names = names_in(config.what)
    repos = {repo: place(repo.folder, config.to) for name in names if isinstance(repo := SETS[name], Repo)}
    links = {link: place(link.path, config.to) for name in names if isinstance(link := SETS[name], Link)}
    listings = [
        hub.list_files(repo, folder, config.revision, config.shards) for repo, folder in repos.items()
    ]
    missing = [listing.files[name][0] for listing in listings for name in listing.missing()]
    wanted = {link: path for link, path in links.items() if not hub.is_complete(link, path)}
    rows = [(listing.repo, f"commit {listing.commit[:12]}, to {listing.folder}") for listing in listings]
    rows += [(path.name, f"to {path.parent}") for path in links.values()]
    count = sum(len(listing.files) for listing in listings) + len(links)
    left = len(missing) + len(wanted)
    more = f", and {len(wanted)} files of unknown size" if wanted else ""
    rows.append(("complete", f"{count - left:,} of {count:,} files"))
    rows.append(("to download", f"{files.size_text(sum(missing))}{more}"))
    cli.print_plan(f"Download {', '.join(names)}", rows)
    if missing:
        remedy = "free some, ask for fewer --shards, or give a folder on another disk with --to"
        files.check_space(listings[0].folder, sum(missing), remedy)

    def work():
        for listing in listings:
            hub.fetch(listing, config.parallel)
        for link, path in wanted.items():
            hub.fetch_link(link, path)

    hub.show_progress(work, listings, wanted.values())
    print("all files are complete", flush=True)
    if not set(names) <= {*TASKS, "core-bundle"}:
        print_next(config.to)


def print_next(to: str):
    """Print the next command: base_train if the tokenizer was trained on the text in `to`, else tok_train."""
    from jaxchat.data.sources import file_fingerprint, find_shards
    from jaxchat.tokenizer import Tokenizer

    folder, known = base_dir() / "tokenizer", {}
    with contextlib.suppress(UserError):  # the tokenizer is missing or damaged
        known = Tokenizer.load(folder).trained_on
    fits = file_fingerprint(find_shards(to, "train")[0]) in known.values()
    if folder.is_dir() and not fits:
        print(f"the tokenizer in {folder} was not trained on this text, as far as is known")
    command = "base_train" if fits else "tok_train"
    cli.next_step(f"python -m launch.{command}", data_dir=to)


def main(args: list[str] | None = None):
    words, args = [], list(sys.argv[1:] if args is None else args)
    while args and not args[0].startswith("-"):
        words.append(args.pop(0))
    cli.main(Config, run, [f"--what={','.join(words)}", *args] if words else args)


if __name__ == "__main__":
    main()
