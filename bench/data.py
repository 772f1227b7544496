"""Time the three data pipelines beside bare tiktoken on the same text: python -m bench.data

The pipelines render documents into batches; tiktoken's encode_ordinary_batch gets only their texts, a
document or conversation a string, with as many threads as there are cores. The two take turns, so that a
noisy machine hurts both. The figures are medians, and the ratio is that of the medians. "of CPU time" is the
ratio of tokens a second of CPU time, which other programs on the machine disturb less. Each pipeline runs in
its own process, so that its peak memory is its own.
"""

import dataclasses
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from jaxchat.config import MidConfig, SFTConfig, UserError, base_dir, user_path
from jaxchat.data import pipelines
from jaxchat.data.order import Order
from jaxchat.data.sources import ParquetText, find_shards
from jaxchat.tokenizer import Tokenizer
from launch import cli

PIPELINES = ("base", "mid", "sft")


@dataclasses.dataclass(frozen=True)
class Config:
    """Time the pipelines of base, mid and SFT against bare tiktoken."""

    data_dir: str = ""
    """Folder of the parquet shards; empty: <base directory>/base_data."""
    tasks_dir: str = ""
    """Folder of the tasks; empty: <base directory>/tasks, or else the folder beside the shards'."""
    train_tasks: str = MidConfig.train_tasks
    """The mixture of mid."""
    sft_tasks: str = SFTConfig.train_tasks
    """The mixture of SFT."""
    vocab_size: int = 32768
    """Size of the vocabulary of a tokenizer trained on the shards, if the base directory has none."""
    rows: int = 64
    """Rows in a step of base and mid."""
    seq: int = 2048
    """Tokens in a row."""
    seconds: float = 2.0
    """Seconds for which each pipeline is read in a turn."""
    turns: int = 15
    """Turns of each side."""
    workers: int = 0
    """Number of Grain workers; 0: threads."""
    pipelines: str = ",".join(PIPELINES)
    """Pipelines to time, separated by commas; several run in a process each."""
    documents: int = 0
    """Documents of base to read (over many epochs) to measure how memory grows, instead of timing; 0:
    time.
    """
    json: bool = False
    """Print the figures as one JSON object in the last line."""


def tokenizer_for(config: Config) -> Tokenizer:
    """The base directory's, or one trained on the start of the shards."""
    if (base_dir() / "tokenizer").is_dir():
        return Tokenizer.load()
    texts = ParquetText(find_shards(config.data_dir, "train"))
    return Tokenizer.train((texts[i] for i in range(min(4000, len(texts)))), config.vocab_size)


def open_pipeline(name: str, config: Config, tokenizer: Tokenizer):
    """(batches, the source, how to get the plain texts of a row of it)."""
    how = {"time": config.seq, "seed": 0}
    packed = {"rows": config.rows, "micro_batches": 1, "workers": config.workers} | how
    if name == "base":
        texts = ParquetText(find_shards(config.data_dir, "train"))
        return pipelines.base_batches(texts, tokenizer, **packed), texts, lambda text: text
    tasks_dir = config.tasks_dir
    if not tasks_dir and config.data_dir and not (base_dir() / "tasks").is_dir():
        tasks_dir = str(user_path(config.data_dir).absolute().parent)
    spec = config.train_tasks if name == "mid" else config.sft_tasks
    tasks = pipelines.load_tasks(spec, tasks_dir, "train_tasks", documents=True)
    if name == "mid":
        batches = pipelines.mid_batches(tasks, tokenizer, endless=True, **packed)
    else:
        batches = pipelines.sft_batches(
            tasks, tokenizer, examples=32, micro_rows=4, num_examples=1 << 40, **how
        )
    return batches, tasks, lambda row: row["text"] if "text" in row else said(row)


def said(row: dict) -> str:
    """All that a conversation says, as one text."""
    contents = (message["content"] for message in row["messages"])
    return "\n".join(c if isinstance(c, str) else "".join(part["text"] for part in c) for c in contents)


def measure(name: str, config: Config) -> dict:
    """{ours, bare: tokens/s of each turn, mib: peak memory of reading the pipeline}."""
    tokenizer = tokenizer_for(config)
    batches, source, text_of = open_pipeline(name, config, tokenizer)
    order = Order(getattr(source, "block_sizes", [len(source)]), seed=0)
    encoding, threads = tokenizer._encoding, os.cpu_count()
    next(batches)
    rates, cpu = {"ours": [], "bare": []}, {"ours": [], "bare": []}
    place = 0
    memory = 0.0
    for _ in range(config.turns):
        for _ in range(4):  # what was made ahead while the other side had its turn
            next(batches)
        start, used, tokens = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - start < config.seconds:
            batch = next(batches)
            # What tiktoken gives too: no specials; and no padding, which is token 0 without weight.
            real = (batch["targets"] != 0) | (batch["weights"] > 0)
            tokens += int((real & (tokenizer.token_bytes[batch["targets"]] > 0)).sum())
        rates["ours"].append(tokens / (time.perf_counter() - start))
        cpu["ours"].append(tokens / (time.process_time() - used))
        # A high-water mark: before the other side's first turn, whose lists are not to count.
        memory = memory or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        spent, used, tokens = 0.0, 0.0, 0
        # Stops reading ahead, which would take the cores from tiktoken.
        batches.set_state(batches.get_state())
        while spent < config.seconds:
            texts = [text_of(source[order.index(i)]) for i in range(place, place + 512)]
            place += 512
            start, cpu_start = time.perf_counter(), time.process_time()
            encoded = encoding.encode_ordinary_batch(texts, num_threads=threads)
            spent += time.perf_counter() - start
            used += time.process_time() - cpu_start
            tokens += sum(map(len, encoded))
        rates["bare"].append(tokens / spent)
        cpu["bare"].append(tokens / used)
    batches.close()
    return rates | {"mib": memory, "cpu": {side: statistics.median(values) for side, values in cpu.items()}}


def measure_memory(config: Config) -> dict:
    """The growth of memory over `documents` documents of base, and the size and restore time of the state."""
    tokenizer = tokenizer_for(config)
    batches, source, _ = open_pipeline("base", config, tokenizer)
    seen, status = [], Path("/proc/self/status")
    for batch in batches:
        read = int(batch["totals"]["taken"].sum())
        if read >= config.documents * (len(seen) + 1) / 20:
            resident = int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1]) / 1024
            seen.append((read, resident))
            print(f"{read:>10,} documents  {resident:,.0f} MiB", flush=True)
        if read >= config.documents:
            break
    print(f"{source.groups_read:,} row groups decoded, of {len(source.block_sizes):,} an epoch", flush=True)
    state = json.dumps(batches.get_state())
    batches.close()
    fresh, *_ = open_pipeline("base", config, tokenizer)
    start = time.perf_counter()
    fresh.set_state(json.loads(state))
    next(fresh)
    restored = time.perf_counter() - start
    fresh.close()
    half = [resident for read, resident in seen if read >= config.documents / 10]
    return {
        "state_bytes": len(state),
        "restore_s": restored,
        "growth": max(half) / half[0] - 1,
        "mib": max(half),
    }


def table_row(name: str, figures: dict) -> tuple[str, dict]:
    """A line of the table, and the figures that --json gives."""
    ours, bare = (statistics.median(figures[side]) for side in ("ours", "bare"))
    ratios = sorted(a / b for a, b in zip(figures["ours"], figures["bare"], strict=True))
    spread, cpu = f"{ratios[0]:.2f} to {ratios[-1]:.2f}", figures["cpu"]["ours"] / figures["cpu"]["bare"]
    rate = f"{ours:>12,.0f} {bare:>12,.0f}  {ours / bare:5.2f}"
    line = f"{name:6} {rate}  {spread:>15}  {cpu:11.2f}  {figures['mib']:,.0f} MiB"
    return line, {"tokens_per_s": round(ours), "ratio": round(ours / bare, 3)}


def alone(name: str, config: Config) -> tuple[str, dict]:
    """The same of a pipeline in a process of its own."""
    given = dataclasses.asdict(config) | {"pipelines": name}
    flags = [f"--{flag}={value}" for flag, value in given.items() if flag != "json"]
    done = subprocess.run(
        [sys.executable, "-m", "bench.data", *flags, "--json"], stdout=subprocess.PIPE, text=True
    )
    if done.returncode:  # it has printed why
        sys.exit(done.returncode)
    *_, line, figures = done.stdout.splitlines()
    return line, json.loads(figures)[name]


def run(config: Config):
    if config.documents:
        figures = measure_memory(config)
        print(
            f"from a tenth of them on, memory grew by at most {figures['growth']:.1%} (peak "
            f"{figures['mib']:,.0f} MiB)"
        )
        print(
            f"state {figures['state_bytes']:,} bytes, first batch {figures['restore_s']:.2f} s after it was "
            "restored"
        )
        if config.json:
            print(json.dumps(figures))
        return
    names = config.pipelines.split(",")
    if not set(names) <= set(PIPELINES):
        raise UserError(f"--pipelines={config.pipelines}; they are {', '.join(PIPELINES)}")
    print(
        f"{os.cpu_count()} cores; {config.rows} rows × {config.seq}; {config.turns} turns of "
        f"{config.seconds:g} s each"
    )
    print(
        f"{'':6} {'ours':>12} {'tiktoken':>12}  ratio  {'ratios of turns':>15}  of CPU time  peak memory",
        flush=True,
    )
    results = {}
    for name in names:
        line, results[name] = (
            table_row(name, measure(name, config)) if len(names) == 1 else alone(name, config)
        )
        print(line, flush=True)
    if config.json:
        print(json.dumps(results))


if __name__ == "__main__":
    cli.main(Config, run)
