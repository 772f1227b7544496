"""Measure how well the tokenizer compresses text, beside others: python -m launch.tok_eval"""

import dataclasses

from jaxchat.config import UserError, base_dir
from launch import cli

TEXTS = {
    "code": "def area(width: float, height: float) -> float:\n    return width * height\n\n\nprint(area(2.5, 40))\n"
    * 4,
    "sums": "12 + 345 = 357; 99 * 7 = 693; 2026-11-24; 3.14159; 1,000,000 / 8 = 125,000\n" * 4,
    "accents": "Où sont les élèves? Größe, Übung, año, niño, señor; Łódź, Kraków; Ελλάδα; Москва; 東京\n" * 4,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare the average bytes a token with other tokenizers: the more, the more text fits into a row.

    The results go beside the tokenizer, as tok_eval.csv and .json.
    """

    data_dir: str = ""
    """Folder of the parquet shards; empty: <base directory>/base_data."""
    max_chars: int = 2_000_000
    """Characters of training text, and of validation text, to measure on at most."""
    references: str = "gpt2,cl100k_base"
    """Encodings of tiktoken to compare with, separated by commas; tiktoken downloads each once. Empty: none."""


def first_chars(data_dir: str, split: str, max_chars: int) -> str:
    from jaxchat.data.sources import ParquetText, find_shards

    texts, parts, have = ParquetText(find_shards(data_dir, split)), [], 0
    for i in range(len(texts)):
        if have >= max_chars:
            break
        parts.append(texts[i][: max_chars - have])
        have += len(parts[-1])
    return "\n".join(parts)


def references(names: str) -> dict:
    """{name: tiktoken.Encoding}; one that cannot be had is left out, with a line that says so."""
    import tiktoken

    found = {}
    for name in filter(None, (name.strip() for name in names.split(","))):
        if name not in tiktoken.list_encoding_names():
            raise UserError(f"--references={name}; tiktoken has {', '.join(tiktoken.list_encoding_names())}")
        try:
            found[name] = tiktoken.get_encoding(name)
        except Exception as problem:  # whatever its download may run into; the comparison goes on without it
            print(f"{name} is left out: tiktoken cannot get it ({type(problem).__name__})")
    return found


def run(config: Config):
    from jaxchat.eval.results import write_both
    from jaxchat.tokenizer import Tokenizer

    tokenizer, folder = Tokenizer.load(), base_dir() / "tokenizer"
    cli.print_plan(
        "Tokenizer's compression",
        [
            ("tokenizer", f"{folder}, vocabulary {tokenizer.vocab_size:,}"),
            ("texts", f"{config.max_chars:,} characters of training and of validation text each, and short samples"),
            ("references", config.references or "none"),
        ],
    )
    others = references(config.references)
    texts = {split: first_chars(config.data_dir, split, config.max_chars) for split in ("train", "val")} | TEXTS
    print(f"\n{'':<10}{'bytes':>12}{'tokens':>12}{'bytes/token':>13}" + "".join(f"{name:>22}" for name in others))
    found = {}
    for name, text in texts.items():
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
    cli.next_step("python -m launch.base_train --depth=12")


def main(args: list[str] | None = None):
    cli.main(Config, run, args)


if __name__ == "__main__":
    main()
