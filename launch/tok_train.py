"""Train the tokenizer on the training shards: python -m launch.tok_train --vocab_size=65536"""

import dataclasses
import time

from jaxchat.config import UserError, base_dir
from launch import cli


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a byte-level BPE tokenizer on the text of parquet shards. The last shard, for validation, is left out."""

    data_dir: str = ""
    """Folder of the parquet shards; empty: <base directory>/base_data."""
    vocab_size: int = 65536
    """Size of the vocabulary, the nine special tokens included."""
    max_chars: int = 2_000_000_000
    """Characters to read at most."""
    doc_cap: int = 10_000
    """Characters of one document to read at most."""
    overwrite: bool = False
    """Replace a tokenizer even if checkpoints need it; those that keep no copy of it become unusable."""


def run(config: Config):
    from jaxchat import checkpoint
    from jaxchat.data.sources import ParquetText, find_shards
    from jaxchat.tokenizer import Tokenizer

    texts = ParquetText(find_shards(config.data_dir, "train"))
    folder = base_dir() / "tokenizer"
    runs = [run for run in checkpoint.runs() if not (run / "tokenizer").is_dir()]  # the others keep their own
    in_use = f" ({len(runs)} runs use the present one: replaced only if identical, or with --overwrite)" if runs else ""
    cli.print_plan(
        "Training the tokenizer",
        [
            ("vocabulary", f"{config.vocab_size:,}"),
            ("text", f"{len(texts):,} documents, at most {config.max_chars:,} characters"),
            ("saves", f"{folder}{'' if config.overwrite else in_use}"),
        ],
    )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(f"{folder.parent} cannot be created ({problem.strerror}); set JAXCHAT_BASE_DIR") from problem
    read = 0

    def documents():
        nonlocal read
        for i in range(len(texts)):
            if read >= config.max_chars:
                return
            text = texts[i][: min(config.doc_cap, config.max_chars - read)]
            read += len(text)
            yield text

    start = time.perf_counter()
    tokenizer = Tokenizer.train(documents(), config.vocab_size)
    if not config.overwrite:
        for run in runs:
            needed = checkpoint.read_meta(run, checkpoint.steps_in(run)[-1])["tokenizer_hash"]
            if needed not in (None, tokenizer.hash):
                raise UserError(
                    f"{run} was trained with another tokenizer ({needed[:12]}) than this ({tokenizer.hash[:12]}); keep "
                    f"that one in {folder}, set JAXCHAT_BASE_DIR to another folder, or replace it with --overwrite"
                )
    tokenizer.save()
    print(f"{read:,} characters read in {time.perf_counter() - start:.1f} s; tokenizer {tokenizer.hash[:12]}")
    cli.next_step("python -m launch.base_train --depth=12")


def main(args: list[str] | None = None):
    cli.main(Config, run, args)


if __name__ == "__main__":
    main()
