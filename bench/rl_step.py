"""Time a step of launch.chat_rl by part: python -m bench.rl_step --depth=4 --rival="python rival.py"

A random model answers random problems; hardly an answer ends before its limit, and coins reward them, so that
all answers are trained on. Seconds of a step and of its parts (rollout, training), sampled tokens of the step
a second, and CPU seconds, which say more where other programs run: medians of the steps after the
first. --rival names another program to time in turn, each in a process of its own; it takes the flags
--depth to --steps and --micro, and its last line is a JSON object as --json prints it.
"""

import dataclasses
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from bench.compare import run as run_process
from bench.eval import random_params
from jaxchat import checkpoint, files, store
from jaxchat.config import Flags, ModelConfig, flag
from jaxchat.rl.batches import RolloutBatches
from jaxchat.rl.problems import Problems
from jaxchat.tokenizer import Tokenizer
from launch import chat_rl, cli

TAG = "random"
FLAGS = ("depth", "seq", "vocab", "problems", "samples", "prompt_tokens", "max_tokens", "micro", "steps")


@dataclasses.dataclass(frozen=True)
class Config(Flags):
    """Time steps of reinforcement learning of a random model."""

    depth: int = flag(4, 1)
    """Depth of the model."""
    seq: int = flag(512, 32)
    """Longest context, in tokens."""
    vocab: int = flag(8192, 300)
    """Size of the vocabulary."""
    problems: int = flag(4, 1)
    """Problems in a step."""
    samples: int = flag(8, 2)
    """Answers to each problem."""
    prompt_tokens: int = flag(64, 8)
    """Tokens of each problem, about."""
    max_tokens: int = flag(64, 2)
    """Tokens of each answer."""
    micro: int = flag(8, 1)
    """Answers to train on at a time."""
    steps: int = flag(3, 1)
    """Steps to time, after a first one."""
    rounds: int = flag(3, 1)
    """With --rival: times that each program runs."""
    rival: str = ""
    """Command of another program, timed in turn with ours; empty: none."""
    json: bool = False
    """Print a last line of JSON: seconds and CPU seconds of a step, of its parts, and tokens a second."""


def write_start(config: Config, folder: Path):
    """Write a checkpoint of a random model, as SFT leaves it, its tokenizer, and problems of random words."""
    random = np.random.default_rng(0)
    words = ["".join(chr(97 + c) for c in word) for word in random.integers(0, 26, (6 * config.vocab, 4))]
    tokenizer = Tokenizer.train((" ".join(words[i::50]) for i in range(50)), config.vocab)
    model = ModelConfig.from_depth(config.depth, sequence_len=config.seq, vocab_size=config.vocab)
    meta = {"stage": "sft", "step": 1, "model": dataclasses.asdict(model), "tokenizer_hash": tokenizer.hash}
    checkpoints = store.Checkpoints(checkpoint.run_folder("sft", TAG))
    checkpoints.keep_tokenizer(tokenizer)
    checkpoints.save(1, params=random_params(model), optimizer=None, batches=None, meta=meta)
    checkpoints.close()

    def problem(i: int) -> list[dict]:
        tokens = tokenizer.encode(" ".join(words[100 * i : 100 * i + config.prompt_tokens]))
        question = tokenizer.decode(tokens[: config.prompt_tokens])
        return [{"role": "user", "content": question}, {"role": "assistant", "content": "#### 1"}]

    files.write_lines(folder / "problems.jsonl", map(problem, range(4 * config.problems)))


def measure(config: Config) -> dict:
    """Run the command. -> the medians of its steps."""
    starts, judge, next_batch = [], Problems.judge, RolloutBatches.next_batch
    random = np.random.default_rng(0)

    def coins(problems, chosen, generations):
        answers, right, _ = judge(problems, chosen, generations)
        return answers, right, random.permuted(np.arange(right.size).reshape(right.shape) % 2.0, axis=1)

    def noted(batches, params, step):
        jax.block_until_ready(params)  # the end of the step before
        starts.append((time.perf_counter(), time.process_time()))
        return next_batch(batches, params, step)

    Problems.judge, RolloutBatches.next_batch = coins, noted
    with tempfile.TemporaryDirectory() as folder, cli.base_directory(Path(folder)):
        write_start(config, Path(folder))
        chat_rl.main(
            [f"--train_tasks={folder}/problems.jsonl", f"--model_tag={TAG}"]
            + [f"--examples_per_step={config.problems}", f"--num_samples={config.samples}"]
            + [f"--max_new_tokens={config.max_tokens}", f"--device_batch_size={config.micro}"]
            + [f"--num_iterations={config.steps + 2}", "--eval_every=-1", "--sample_every=-1"]
        )
        metrics = checkpoint.run_folder("rl", TAG) / "metrics.jsonl"
        rows = [row for row in files.read_lines(metrics) if "rollout_seconds" in row][1:-1]
    pairs = list(zip(starts[1:], starts[2:], strict=False))
    found = {
        "step_s": statistics.median(end[0] - begin[0] for begin, end in pairs),
        "cpu_s": statistics.median(end[1] - begin[1] for begin, end in pairs),
        "rollout_s": statistics.median(row["rollout_seconds"] for row in rows),
        "reward_s": statistics.median(row["reward_seconds"] for row in rows),
        "tokens": statistics.mean(row["answer_tokens"] * config.problems * config.samples for row in rows),
    }
    found["training_s"] = found["step_s"] - found["rollout_s"] - found["reward_s"]
    return found | {"tokens_per_s": found["tokens"] / found["step_s"]}


def line_of(name: str, found: dict) -> str:
    return (
        f"{name:<6} {found['step_s']:7.2f} s a step: rollout {found['rollout_s']:.2f}, training "
        f"{found['training_s']:.2f}; {found['tokens_per_s']:7.1f} tokens/s; CPU {found['cpu_s']:.2f} s"
    )


def run(config: Config):
    if not config.rival:
        found = measure(config)
        print(line_of("ours", found))
        if config.json:
            print(json.dumps(found))
        return
    shape = [f"--{name}={getattr(config, name)}" for name in FLAGS]
    commands = {"ours": [sys.executable, "-m", "bench.rl_step", "--json"], "rival": shlex.split(config.rival)}
    rows = [("answers", f"{config.problems} problems × {config.samples} × {config.max_tokens} tokens")]
    cli.print_plan("A step of reinforcement learning", [*rows, ("cores", str(os.cpu_count()))])
    runs = []
    for round_ in range(config.rounds):
        order = list(commands) if round_ % 2 else list(commands)[::-1]
        runs.append({name: run_process([*commands[name], *shape]) for name in order})
        for name in commands:
            print(line_of(name, runs[-1][name]), flush=True)
    for seconds, what in (("step_s", "tokens/s"), ("cpu_s", "tokens a CPU second")):
        rates = [{name: one["tokens"] / one[seconds] for name, one in round_.items()} for round_ in runs]
        ratios = [rate["ours"] / rate["rival"] for rate in rates]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"ours / rival, {what}: {statistics.median(ratios):.2f} ({spread}, {len(ratios)} rounds)")


if __name__ == "__main__":
    cli.main(Config, run)
