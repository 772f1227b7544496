"""The whole pipeline on a small generated world, on a CPU, in minutes: python -m launch.demo"""

import dataclasses
import json
import time
from pathlib import Path

from jaxchat.config import Flags, base_dir, flag
from launch import base_train, chat_sft, cli, mid_train, report, tok_train

TAG = "demo"


@dataclasses.dataclass(frozen=True)
class Config(Flags):
    """Generate a small world, train a tokenizer and a model on it by the real commands, and ask what it has
    learned.

    All that it writes goes to <base directory>/demo, which it uses as a base directory of its own. Ends with
    a table of held-out prompts; exit code 1 if one of the scores misses its target.
    """

    seed: int = flag(0, 0, 2**32 - 1)
    """Random seed of the world, the initial weights and the order of the data."""
    base_steps: int = flag(110, 1)
    """Steps of pretraining, of 4,096 tokens each."""
    mid_steps: int = flag(640, 1)
    """Steps of midtraining, of 4,096 tokens each."""
    sft_steps: int = flag(250, 1)
    """Steps of chat finetuning, of 64 conversations each."""
    device_batch_size: int = flag(2, 1)
    """Rows to compute at a time in base and mid, twice as many in SFT. Another number changes speed, memory
    and rounding, nothing else."""


def run(config: Config) -> int:
    from jaxchat.demo import World, write_world
    from jaxchat.demo.score import passed, table

    start, folder = time.perf_counter(), base_dir() / "demo"
    cli.print_plan(
        "Demo: tokenizer, base, mid, SFT and chat on a generated world",
        [
            ("model", "depth 3: 3 layers × 192, vocabulary 512"),
            ("batch", f"16 rows × 256 = 4,096 tokens a step, {config.device_batch_size} rows at a time"),
            ("steps", f"base {config.base_steps:,}, mid {config.mid_steps:,}, SFT {config.sft_steps:,}"),
            ("saves", f"{folder}, as model_tag {TAG}"),
        ],
    )
    world = World(config.seed)
    rows = write_world(world, folder)
    print("written: " + ", ".join(f"{name} {count:,}" for name, count in rows.items()), flush=True)
    with cli.base_directory(folder):
        train(config, folder / "tasks")
        scores = ask(world)
        print(flush=True)
        report.run(report.Config(model_tag=TAG), texts(), questions(world))
        minutes, seconds = divmod(int(time.perf_counter() - start), 60)
        print(f"\n{table(scores)}\n\nin all {minutes} min {seconds:02} s", flush=True)
        cli.next_step('python -m launch.chat_cli -p "What is 23 * 7?"')
        cli.next_step("python -m launch.serve --open_browser")
    return 0 if passed(scores) else 1


def train(config: Config, tasks: Path):
    """Train the tokenizer and the three stages, each by its command."""
    common = [f"--model_tag={TAG}", f"--seed={config.seed}", "--overwrite", "--device_type=cpu"]
    batch = [f"--device_batch_size={config.device_batch_size}", "--total_batch_size=4096"]
    batch += ["--eval_every=80", "--eval_tokens=32768"]
    rate = ["--matrix_lr=0.04"]  # twice the default: learns faster in so few steps (dev/LOG.md)
    validation = f"--val_tasks={tasks / 'world_val.jsonl'}"

    tok_train.main(["--vocab_size=512", "--max_chars=2000000", "--overwrite"])
    base_train.main(
        ["--depth=3", "--max_seq_len=256", f"--num_iterations={config.base_steps}", "--warmdown_ratio=0.5"]
        + ["--sample_every=-1", *batch, *common, *rate]
    )
    mid_train.main(
        [f"--train_tasks={tasks / 'world_mid.jsonl'}", validation, f"--num_iterations={config.mid_steps}"]
        + [*batch, *common, *rate]
    )
    chat_sft.main(
        [f"--train_tasks={tasks / 'world_sft.jsonl'}", validation, f"--num_iterations={config.sft_steps}"]
        + [f"--device_batch_size={2 * config.device_batch_size}", "--max_seq_len=128", "--packing=bestfit"]
        + [
            "--target_examples_per_step=64",
            "--init_lr_frac=0.4",
            "--eval_steps=10",
            "--eval_metrics_every=-1",
        ]
        + common
    )


def ask(world) -> dict:
    """Return {kind: Score} of the held-out prompts; also saved beside the checkpoint, for the report."""
    from jaxchat import checkpoint
    from jaxchat.demo.score import score
    from jaxchat.infer.engine import Engine

    print("\nAsking what no training conversation asked…", flush=True)
    model = checkpoint.open_model("sft", TAG)
    engine = Engine(model.load(), model.config, model.tokenizer, batch_size=128)
    scores = score(engine, model.tokenizer, world)
    for kind, found in scores.items():
        if found.wrong:
            question, given, right = found.wrong[0]
            print(f"  a wrong answer ({kind}): {question} → {given} (right: {right})")
    shares = {f"world: {kind}": found.share for kind, found in scores.items()}
    (model.path / "world.json").write_text(json.dumps({"metrics": shares}))
    return scores


def texts(count: int = 5) -> list[str]:
    """The first three words of a few validation documents, for the report to continue."""
    from jaxchat.data.sources import ParquetText, find_shards

    documents = ParquetText(find_shards(None, "val"))
    return list(dict.fromkeys(" ".join(documents[n].split()[:3]) for n in range(10 * count)))[:count]


def questions(world) -> list[str]:
    """A held-out question of each kind, for the report to ask."""
    from jaxchat.demo import KINDS

    return [world.heldout(kind)[0].turns[0].question for kind in KINDS]


def main(args: list[str] | None = None):
    cli.main(Config, run, args)


if __name__ == "__main__":
    main()
