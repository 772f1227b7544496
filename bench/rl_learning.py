"""What reinforcement learning learns in minutes, by the commands: python -m bench.rl_learning --seeds=0,1,2

Each case trains its own small model, and launch.chat_rl from it:

bandit    one question, 265 arms: all tokens, of which one is right; an untrained model
digits    the next digit of a sequence, by a base model that has read sequences and no conversation
stop      end an answer by itself; the untrained model
shuffled  digits, with the rewards of each problem's answers shuffled: nothing may be learnt
sums      sums of three digits with the calculator, by the demo's model after a short SFT; held-out phrasings

The share of answers at temperature 1 that are right (stop: that ended), before and after, on problems of
which none is trained on, but for the bandit's only one. Exit code 1 if a case misses what it should reach.
"""

import contextlib
import dataclasses
import itertools
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxchat import files
from jaxchat.config import STAGES, Flags, UserError, flag
from jaxchat.demo import World, write_world
from jaxchat.demo.write import write_sums
from jaxchat.rl.problems import Problems
from jaxchat.speedrun.demo import STEPS, commands
from launch import base_train, chat_rl, chat_sft, cli, tok_train

TAG, UNTRAINED = "small", "untrained"
SMALL = ["--examples_per_step=8", "--num_samples=8", "--min_groups=1", "--eval_others=0", "--sample_every=-1"]
SMALL += ["--eval_every=10000", "--eval_examples=40", "--device_type=cpu", "--init_lr_frac=0.2"]
SMALL += ["--overwrite"]


@dataclasses.dataclass(frozen=True)
class Case:
    """What a case trains, and the shares that it must have before and after."""

    start: str  # the model: "digits" or "sums"
    problems: str  # file of problems; those held out are beside it
    flags: list[str]
    before: float  # at most
    after: tuple[float, float]  # least and most
    tag: str = TAG
    value: str = "pass@1"
    shuffled: bool = False


CASES = {
    "bandit": Case(
        "digits", "bandit", ["--max_new_tokens=1", "--num_iterations=150"], 0.1, (0.9, 1), tag=UNTRAINED
    ),
    "digits": Case("digits", "digits", ["--max_new_tokens=1", "--num_iterations=150"], 0.5, (0.9, 1)),
    "stop": Case(
        "digits",
        "digits",
        ["--reward=finished", "--max_new_tokens=20", "--num_iterations=150"],
        0.3,
        (0.95, 1),
        tag=UNTRAINED,
        value="val_finished",
    ),
    "shuffled": Case(
        "digits", "digits", ["--max_new_tokens=1", "--num_iterations=150"], 0.5, (0, 0.3), shuffled=True
    ),
    "sums": Case("sums", "sums", ["--max_new_tokens=48", "--num_iterations=120"], 0.8, (0.9, 1)),
}


@dataclasses.dataclass(frozen=True)
class Config(Flags):
    """Measure what launch.chat_rl learns in small cases, from models that the other commands train."""

    cases: str = ",".join(CASES)
    """Cases to run, separated by commas."""
    seeds: str = "0,1,2"
    """Seeds of models, problems and answers, separated by commas."""
    folder: str = ""
    """Where to train; models that are there already are not trained again. Empty: a temporary folder."""
    sft_steps: int = flag(80, 1)
    """Steps of the short SFT of sums."""
    rl_flags: str = ""
    """Further flags of launch.chat_rl, separated by spaces."""
    json: bool = False
    """Print a last line of JSON: a list with an object a case and seed."""


def conversation(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def sequence(start: int, step: int, count: int) -> list[str]:
    """Digits that go up by a step, past 9 from 0 again."""
    return [str((start + step * i) % 10) for i in range(count)]


def write_digits(seed: int, folder: Path):
    """Write documents with sequences for base; problems with three to six digits in order, one in five held
    out.
    """
    random = np.random.default_rng(seed)
    data = folder / "base_data"
    data.mkdir(parents=True)
    for shard, rows in enumerate((2000, 50)):
        drawn = random.integers(0, 10, (rows, 2))
        texts = [" ".join(sequence(start, 1 + step % 3, 20)) for start, step in drawn]
        pq.write_table(pa.table({"text": texts}), data / f"shard_{shard:05d}.parquet")
    shapes = itertools.product(range(10), (1, 2, 3), (3, 4, 5, 6))
    every = [sequence(start, step, count + 1) for start, step, count in shapes]
    rows = [conversation(" ".join(every[i][:-1]), every[i][-1]) for i in random.permutation(len(every))]
    files.write_lines(folder / "digits.jsonl", rows[24:])
    files.write_lines(folder / "digits-held-out.jsonl", rows[:24])
    for name in ("bandit", "bandit-held-out"):
        files.write_lines(folder / f"{name}.jsonl", [conversation("which?", "7")] * 40)


def train_digits(seed: int):
    """A base model of one layer that continues sequences, and one of a single step, to which all is alike."""
    tok_train.main(["--vocab_size=265"])
    for tag, steps in ((TAG, 300), (UNTRAINED, 1)):
        base_train.main(
            ["--depth=1", "--max_seq_len=64", f"--model_tag={tag}", f"--num_iterations={steps}"]
            + ["--device_batch_size=16", "--total_batch_size=1024", "--eval_every=-1", "--sample_every=-1"]
            + [f"--seed={seed}", "--device_type=cpu"]
        )


def write_world_and_sums(seed: int, folder: Path):
    write_world(World(seed), folder)
    write_sums(folder / "sums.jsonl", 2000, digits=3)
    write_sums(folder / "sums-held-out.jsonl", 200, held_out=True, digits=3)


def train_sums(seed: int, folder: Path, sft_steps: int):
    """The demo's base, and SFT from it without a mid stage."""
    flags = commands(folder / "tasks", seed=seed, rows=4, steps=STEPS | {"sft": sft_steps})
    tag = f"--model_tag={TAG}"
    tok_train.main(flags["tok_train"])
    base_train.main([*flags["base_train"], tag])
    chat_sft.main([*flags["chat_sft"], tag, "--source=base", "--init_lr_frac=1", "--matrix_lr=0.04"])


def prepare(start: str, seed: int, folder: Path, config: Config):
    """Train what a case starts from, unless it is there."""
    made = folder / "made"
    if made.exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if start == "digits":
        write_digits(seed, folder)
        train_digits(seed)
    else:
        write_world_and_sums(seed, folder)
        train_sums(seed, folder, config.sft_steps)
    made.touch()


@contextlib.contextmanager
def shuffled_rewards(seed: int):
    """Give the rewards of a training step's answers to others to the same problem."""
    judge, random = Problems.judge, np.random.default_rng(seed)

    def judged(problems, chosen, generations):
        answers, right, rewards = judge(problems, chosen, generations)
        return answers, right, random.permuted(rewards, axis=1)

    Problems.judge = judged
    try:
        yield
    finally:
        Problems.judge = judge


def measure(name: str, seed: int, config: Config, root: Path) -> dict:
    """Train one case. -> the shares before and after, steps and seconds."""
    case = CASES[name]
    folder = root / f"{case.start}-{seed}"
    began = time.perf_counter()
    with cli.base_directory(folder):
        prepare(case.start, seed, folder, config)
        prepared = time.perf_counter()
        source = "base" if case.start == "digits" else "sft"
        flags = [*SMALL, *case.flags, f"--source={source}", f"--model_tag={case.tag}", f"--seed={seed}"]
        flags += [f"--train_tasks={folder / case.problems}.jsonl", *config.rl_flags.split()]
        flags += [f"--val_tasks={folder / case.problems}-held-out.jsonl"]
        with shuffled_rewards(seed) if case.shuffled else contextlib.nullcontext():
            chat_rl.main(flags)
    seconds = time.perf_counter() - prepared
    metrics = folder / STAGES["rl"].folder / case.tag / "metrics.jsonl"
    rows = [row for row in files.read_lines(metrics) if case.value in row]
    before, after = rows[0][case.value], rows[-1][case.value]
    least, most = case.after
    passed = before <= case.before and least <= after <= most
    found = {"case": name, "seed": seed, "before": before, "after": after, "passed": passed}
    return found | {"steps": rows[-1]["step"], "seconds": seconds, "preparing": prepared - began}


def run(config: Config) -> int:
    names = config.cases.split(",")
    for name in names:
        if name not in CASES:
            raise UserError(f"--cases: {name!r} is no case; the cases are {', '.join(CASES)}")
    seeds = config.seeds.split(",")
    if not all(map(str.isdecimal, seeds)):
        raise UserError(f"--seeds={config.seeds}: give whole numbers from 0, separated by commas")
    cli.print_plan("What reinforcement learning learns", [("cases", config.cases), ("seeds", config.seeds)])
    print("case      seed  before   after  should reach   steps  seconds, of RL and before it")
    table = []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(config.folder or temporary).resolve()
        root.mkdir(parents=True, exist_ok=True)
        for name, seed in itertools.product(names, map(int, seeds)):
            with (root / f"{name}-{seed}.log").open("w") as log, contextlib.redirect_stdout(log):
                found = measure(name, seed, config, root)
            table.append(found)
            least, most = CASES[name].after
            asked = f"{least:.0%} to {most:.0%}" + ("" if found["passed"] else "  MISSED")
            print(
                f"{name:<9} {seed:>4}  {found['before']:6.1%}  {found['after']:6.1%}  {asked:<13} "
                f"{found['steps']:>6}  {found['seconds']:5.0f} + {found['preparing']:.0f}",
                flush=True,
            )
    if config.json:
        print(json.dumps(table))
    return 0 if all(found["passed"] for found in table) else 1


if __name__ == "__main__":
    sys.exit(cli.main(Config, run))
