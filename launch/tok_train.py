"""Train the tokenizer on the training shards: python -m launch.tok_train --vocab_size=65536"""

import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path

from jaxchat.config import MOST_TOKENS, Flags, UserError, base_dir, flag
from launch import cli

REPORT_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Config(Flags):
    """Train a byte-level BPE tokenizer on the text of all parquet shards but the last, which is for
    validation."""

    data_dir: str = ""
    """Folder of the parquet shards; empty: <base directory>/base_data."""
    vocab_size: int = flag(65536, 1, MOST_TOKENS)
    """Size of the vocabulary, including the nine special tokens."""
    max_chars: int = flag(2_000_000_000, 1, special=-1)
    """Maximum number of characters of text to train on; -1: all."""
    doc_cap: int = flag(10_000, 1, special=-1)
    """Maximum number of characters of each document to train on; -1: all."""
    overwrite: bool = False
    """Replace the tokenizer even if checkpoints need it. Those without a copy of it become unusable."""


def documents(texts, max_chars: int = -1, doc_cap: int = -1) -> Iterator[str]:
    """Yield texts in order, at most `doc_cap` characters of each and `max_chars` in total; -1: no limit."""
    left = math.inf if max_chars == -1 else max_chars
    for i in range(len(texts)):
        text = texts[i]
        text = text[: min(left, len(text) if doc_cap == -1 else doc_cap, len(text))]
        left -= len(text)
        yield text
        if left <= 0:
            return


def run(config: Config):
    from jaxchat import checkpoint, files
    from jaxchat.data.sources import ParquetText, find_shards
    from jaxchat.tokenizer import Tokenizer

    texts = ParquetText(find_shards(config.data_dir, "train"))
    folder = base_dir() / "tokenizer"
    runs = [run for run in checkpoint.runs() if not (run / "tokenizer").is_dir()]  # the others have a copy
    in_use = f" ({len(runs)} runs need the present tokenizer: only an equal one replaces it)" if runs else ""
    most = "all characters" if config.max_chars == -1 else f"at most {config.max_chars:,} characters"
    cli.print_plan(
        "Training the tokenizer",
        [
            ("vocabulary", f"{config.vocab_size:,}"),
            ("text", f"{len(texts):,} documents, {most}"),
            ("saves", f"{folder}{'' if config.overwrite else in_use}"),
        ],
    )
    files.check_writable(folder)
    read, doing = 0, "reading"

    def counted() -> Iterator[str]:
        nonlocal read, doing
        for text in documents(texts, config.max_chars, config.doc_cap):
            read += len(text)
            yield text
        doing = "merging"

    start = time.perf_counter()
    with cli.progress(lambda: f"{doing}: {read:,} characters", REPORT_SECONDS):
        tokenizer = Tokenizer.train(counted(), config.vocab_size)
    tokenizer.trained_on, tokenizer.training_seconds = texts.fingerprint, time.perf_counter() - start
    if not config.overwrite:
        check_replaceable(runs, tokenizer, folder)
    tokenizer.save()
    print(f"{read:,} characters read in {tokenizer.training_seconds:.1f} s; tokenizer {tokenizer.hash[:12]}")
    cli.next_step("python -m launch.base_train --depth=12", data_dir=config.data_dir)


def check_replaceable(runs: list[Path], tokenizer, folder: Path):
    """Raise UserError if one of `runs` still needs the old tokenizer, which `tokenizer` would replace.

    runs: folders of runs that have no copy of their tokenizer. folder: where the old tokenizer is.
    """
    from jaxchat import checkpoint

    for run in runs:
        needed = checkpoint.read_meta(run, checkpoint.steps_in(run)[-1])["tokenizer_hash"]
        if needed not in (None, tokenizer.hash):
            raise UserError(
                f"{run} was trained with another tokenizer ({needed[:12]}) than the new one "
                f"({tokenizer.hash[:12]}); keep the old one in {folder}, set JAXCHAT_BASE_DIR to another "
                "folder, or replace the old one with --overwrite"
            )


main = cli.command(Config, run)

if __name__ == "__main__":
    main()
