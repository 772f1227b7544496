"""Compare how well this tokenizer and others compress text: python -m launch.tok_eval"""

import argparse
import dataclasses
import json
from pathlib import Path

from jaxchat.config import Flags, UserError, base_dir, flag
from launch import cli
from launch.tok_train import documents


@dataclasses.dataclass(frozen=True)
class Config(Flags):
    """Compare the average number of bytes per token of this tokenizer and others. The higher it is, the more
    text fits in a context. The texts are training and validation text, modules of Python's library, worked
    mathematics, and fifteen languages. The results are written beside the tokenizer, as tok_eval.csv and
    .json."""

    data_dir: str = ""
    """Folder of the parquet shards; empty: <base directory>/base_data."""
    max_chars: int = flag(2_000_000, 1, special=-1)
    """Maximum number of characters of training text, and of validation text, to measure on; -1: all."""
    references: str = "gpt2,cl100k_base"
    """Encodings of tiktoken to compare with, separated by commas; each is downloaded once. Empty: none."""


def texts_of(config: Config) -> dict[str, str]:
    """Return {name: text} of the texts to measure on."""
    from jaxchat import eval as package
    from jaxchat.data.sources import ParquetText, find_shards

    texts = {}
    for split in ("train", "val"):
        shards = ParquetText(find_shards(config.data_dir, split))
        texts[split] = "\n".join(documents(shards, config.max_chars))
    modules = (argparse, dataclasses, json.decoder)
    texts["code"] = "\n".join(Path(module.__file__).read_text(encoding="utf-8") for module in modules)
    for name in ("maths", "languages"):
        texts[name] = (Path(package.__path__[0]) / "texts" / f"{name}.txt").read_text(encoding="utf-8")
    return texts


def references(names: str) -> dict:
    """Return {name: tiktoken.Encoding} of the encodings in comma-separated `names`.

    An encoding that cannot be loaded is left out, with a message.
    """
    import tiktoken

    found = {}
    for name in filter(None, (name.strip() for name in names.split(","))):
        if name not in tiktoken.list_encoding_names():
            raise UserError(f"--references={name}; tiktoken has {', '.join(tiktoken.list_encoding_names())}")
        try:
            found[name] = tiktoken.get_encoding(name)
        except Exception as problem:  # a download may fail in any way; the others are still compared
            print(f"{name} is left out: tiktoken cannot load it ({type(problem).__name__})")
    return found


def run(config: Config):
    from jaxchat import files
    from jaxchat.eval.results import write_both
    from jaxchat.tokenizer import Tokenizer

    tokenizer, folder = Tokenizer.load(), base_dir() / "tokenizer"
    most = "all" if config.max_chars == -1 else f"at most {config.max_chars:,} characters of"
    cli.print_plan(
        "Tokenizer's compression",
        [
            ("tokenizer", f"{folder}, vocabulary {tokenizer.vocab_size:,}"),
            ("texts", f"{most} training and validation text; code, mathematics, fifteen languages"),
            ("references", config.references or "none"),
        ],
    )
    files.check_writable(folder)
    others = references(config.references)
    columns = "".join(f"{name:>22}" for name in others)
    print(f"\n{'':<10}{'bytes':>12}{'tokens':>12}{'bytes/token':>13}{columns}")
    found = {}
    for name, text in texts_of(config).items():
        size, tokens = len(text.encode("utf-8", "replace")), len(tokenizer.encode(text))
        found[name] = {"bytes": size, "tokens": tokens, "bytes_per_token": size / max(1, tokens)}
        line = f"{name:<10}{size:>12,}{tokens:>12,}{found[name]['bytes_per_token']:>13.3f}"
        for reference, encoding in others.items():
            theirs = max(1, len(encoding.encode_ordinary(text)))
            found[name][f"{reference}_bytes_per_token"] = size / theirs
            line += f"{size / theirs:>12.3f} ({tokens / theirs - 1:+.0%})"
        print(line)
    if others:
        print("(in brackets: how many more tokens ours needs; a larger vocabulary needs fewer)")
    rows = [["text", *found["train"]], *([name, *numbers.values()] for name, numbers in found.items())]
    path = folder / "tok_eval.json"
    write_both(path, rows, {"tokenizer_hash": tokenizer.hash, "max_chars": config.max_chars, "texts": found})
    print(f"saved {path} and .csv", flush=True)
    cli.next_step("python -m launch.base_train --depth=12", data_dir=config.data_dir)


main = cli.command(Config, run)

if __name__ == "__main__":
    main()
