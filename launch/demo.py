"""Run the complete pipeline on a small generated world, on a CPU, in minutes: python -m launch.demo"""

import dataclasses
import json
import time
from pathlib import Path

from jaxchat.config import Flags, base_dir, flag
from jaxchat.speedrun.demo import STEPS, TAG, commands
from launch import base_train, chat_sft, cli, mid_train, report, tok_train


@dataclasses.dataclass(frozen=True)
class Config(Flags):
    """Generate a small world (text and conversations from a random seed), train a tokenizer and a model on it
    with the real commands, and score the model on held-out prompts.

    All files are written to <base directory>/demo, which serves as the demo's base directory. The demo ends
    with a table of scores; the exit code is 1 if a score misses its target.
    """

    seed: int = flag(0, 0, 2**32 - 1)
    """Random seed of the world, the initial weights and the order of the data."""
    base_steps: int = flag(STEPS["base"], 1)
    """Number of pretraining steps, of 2,048 tokens each."""
    mid_steps: int = flag(STEPS["mid"], 1)
    """Number of midtraining steps, of 2,048 tokens each."""
    sft_steps: int = flag(STEPS["sft"], 1)
    """Number of chat-finetuning steps, of 64 conversations each."""
    device_batch_size: int = flag(2, 1)
    """Number of rows to compute at a time in base and mid; SFT computes twice as many. It affects only speed,
    memory and rounding."""
    part: str = flag("all", choices=("all", "world", "score"))
    """Part of the demo to run. "all": everything, in <base directory>/demo. "world": only write the data, in
    the base directory itself. "score": only score the model there and write the report."""


def run(config: Config) -> int:
    if config.part == "world":
        cli.print_plan("The demo's world", [("seed", str(config.seed)), ("saves", str(base_dir()))])
        write(config.seed, base_dir())
        return 0
    if config.part == "score":
        return score_and_report(config.seed)
    start, folder = time.perf_counter(), base_dir() / "demo"
    cli.print_plan(
        "Demo: tokenizer, base, mid, SFT and chat on a generated world",
        [
            ("model", "depth 3: 3 layers × 192, vocabulary 512"),
            ("batch", f"8 rows × 256 = 2,048 tokens a step, {config.device_batch_size} rows at a time"),
            ("steps", f"base {config.base_steps:,}, mid {config.mid_steps:,}, SFT {config.sft_steps:,}"),
            ("saves", f"{folder}, as model_tag {TAG}"),
        ],
    )
    write(config.seed, folder)
    with cli.base_directory(folder):
        train(config, folder / "tasks")
        return score_and_report(config.seed, start)


def write(seed: int, folder: Path):
    """Generate the demo's data from `seed`, and write its text and tasks under `folder`."""
    from jaxchat.demo import World, write_world

    rows = write_world(World(seed), folder)
    print("written: " + ", ".join(f"{name} {count:,}" for name, count in rows.items()), flush=True)


def train(config: Config, tasks: Path):
    """Train the tokenizer and the base, mid and SFT models. tasks: folder of the generated task files."""
    steps = {"base": config.base_steps, "mid": config.mid_steps, "sft": config.sft_steps}
    modules = (tok_train, base_train, mid_train, chat_sft)
    flags = commands(tasks, seed=config.seed, rows=config.device_batch_size, steps=steps)
    for module in modules:
        again = [] if module is tok_train else ["--overwrite"]
        module.main([*flags[module.__name__.rpartition(".")[2]], *again])


def score_and_report(seed: int, start: float | None = None) -> int:
    """Score the model on held-out prompts, write the report and print the scores.

    Returns 1 if a score misses its target, else 0. start: time.perf_counter() when the demo began, to print
    how long it took; None: not printed.
    """
    from jaxchat.demo import World
    from jaxchat.demo.score import passed, table

    world = World(seed)
    scores = score_prompts(world)
    print(flush=True)
    report.run(report.Config(model_tag=TAG), texts(), questions(world))
    print(f"\n{table(scores)}\n")
    if start is not None:
        minutes, seconds = divmod(int(time.perf_counter() - start), 60)
        print(f"in all {minutes} min {seconds:02} s")
    cli.next_step('python -m launch.chat_cli -p "What is 23 * 7?"')
    cli.next_step("python -m launch.serve --open_browser")
    return 0 if passed(scores) else 1


def score_prompts(world) -> dict:
    """Score the SFT model on held-out prompts, save the scores, and return {kind of prompt: Score}."""
    from jaxchat import checkpoint
    from jaxchat.demo.score import score
    from jaxchat.infer.engine import Engine

    print("\nScoring held-out prompts…", flush=True)
    model = checkpoint.open_model("sft", TAG)
    engine = Engine(model.load(), model.config, model.tokenizer, batch_size=128)
    scores = score(engine, model.tokenizer, world)
    for kind, found in scores.items():
        if found.wrong:
            question, given, right = found.wrong[0]
            print(f"  a wrong answer ({kind}): {question} → {given} (right: {right})")
    shares = {f"world: {kind}": found.share for kind, found in scores.items()}
    (model.path / "world.json").write_text(json.dumps({"metrics": shares}), encoding="utf-8")
    return scores


def texts() -> list[str]:
    """Return up to five texts for the base model to continue: the first words of validation documents."""
    from jaxchat.data.sources import ParquetText, find_shards

    documents = ParquetText(find_shards(None, "val"))
    return list(dict.fromkeys(" ".join(documents[n].split()[:3]) for n in range(50)))[:5]


def questions(world) -> list[str]:
    """Return one held-out question of each kind, for the report to ask the chat models."""
    from jaxchat.demo import KINDS

    return [world.heldout(kind)[0].turns[0].question for kind in KINDS]


main = cli.command(Config, run)

if __name__ == "__main__":
    main()
