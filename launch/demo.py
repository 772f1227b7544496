"""The whole pipeline on a small generated world, on a CPU, in minutes: python -m launch.demo"""

import dataclasses
import json
import time
from pathlib import Path

from jaxchat.config import UserError, base_dir
from launch import base_train, chat_sft, cli, mid_train, report, tok_train

TAG = "demo"


@dataclasses.dataclass(frozen=True)
class Config:
    """Generate a small world, train a tokenizer and a model on it by the real commands, and ask what it has learnt.

    Ends with a table of held-out prompts; exit code 1 if one of the scores misses its target.
    """

    seed: int = 0
    """Of the world, the weights and the order of the data."""
    base_steps: int = 110
    """Steps of pretraining, of 4,096 tokens each."""
    mid_steps: int = 640
    """Steps of midtraining, of 4,096 tokens each."""
    sft_steps: int = 250
    """Steps of chat finetuning, of 64 conversations each."""
    device_batch_size: int = 2
    """Rows to compute at a time in base and mid, twice as many in SFT. Another number changes speed, memory and
    rounding, nothing else."""


def refuse_to_mix():
    """The demo's tokenizer must not take the place of another one."""
    from jaxchat import checkpoint

    tokenizer = base_dir() / "tokenizer"
    if tokenizer.exists() and not (base_dir() / "demo").exists():
        raise UserError(f"the demo would replace the tokenizer in {tokenizer}; set JAXCHAT_BASE_DIR to an empty folder")
    for path in checkpoint.runs():
        if path.name != TAG:
            raise UserError(
                f"{path} was trained with the tokenizer in {base_dir() / 'tokenizer'}, which the demo would "
                "replace; set JAXCHAT_BASE_DIR to an empty folder"
            )


def beginnings(folder: Path, count: int = 5) -> list[str]:
    """The first three words of a few documents that were not trained on, each once."""
    from jaxchat.data.sources import ParquetText, find_shards

    texts = ParquetText(find_shards(str(folder / "base_data"), "val"))
    return list(dict.fromkeys(" ".join(texts[n].split()[:3]) for n in range(10 * count)))[:count]


def run(config: Config) -> int:
    from jaxchat import checkpoint
    from jaxchat.demo import KINDS, World, write_world
    from jaxchat.demo.score import passed, score, table
    from jaxchat.infer.engine import Engine

    refuse_to_mix()
    start = time.perf_counter()
    cli.print_plan(
        "Demo: tokenizer, base, mid, SFT and chat on a generated world",
        [
            ("model", "depth 3: 3 layers × 192, vocabulary 512"),
            ("batch", f"16 rows × 256 = 4,096 tokens a step, {config.device_batch_size} at a time"),
            ("steps", f"base {config.base_steps:,}, mid {config.mid_steps:,}, SFT {config.sft_steps:,}"),
            ("saves", f"{base_dir()}, as model_tag {TAG}"),
        ],
    )
    world = World(config.seed)
    folder = base_dir() / "demo"
    rows = write_world(world, folder)
    print("written: " + ", ".join(f"{name} {count:,}" for name, count in rows.items()), flush=True)
    data, tasks = f"--data_dir={folder / 'base_data'}", folder / "tasks"
    batch = [
        f"--device_batch_size={config.device_batch_size}",
        "--total_batch_size=4096",
        "--eval_every=80",
        "--eval_tokens=32768",
    ]
    common = [f"--model_tag={TAG}", f"--seed={config.seed}", "--overwrite"]
    one_device = ["--device_type=cpu"]
    rate = ["--matrix_lr=0.04"]  # twice the default: learns faster in so few steps (dev/LOG.md)

    tok_train.main([data, "--vocab_size=512", "--max_chars=2000000", "--overwrite"])
    base_train.main(
        ["--depth=3", "--max_seq_len=256", f"--num_iterations={config.base_steps}", data]
        + ["--warmdown_ratio=0.5", "--sample_every=-1", *batch, *common, *one_device, *rate]
    )
    mid_train.main(
        [f"--num_iterations={config.mid_steps}", f"--train_tasks={tasks / 'world_mid.jsonl'}"]
        + [f"--val_tasks={tasks / 'world_val.jsonl'}", *batch, *common, *one_device, *rate]
    )
    chat_sft.main(
        [f"--num_iterations={config.sft_steps}", f"--train_tasks={tasks / 'world_sft.jsonl'}"]
        + [f"--val_tasks={tasks / 'world_val.jsonl'}", f"--device_batch_size={2 * config.device_batch_size}"]
        + ["--max_seq_len=128"]
        + [
            "--packing=bestfit",
            "--target_examples_per_step=64",
            "--init_lr_frac=0.4",
            "--eval_steps=10",
            "--eval_metrics_every=-1",
            *common,
            *one_device,
        ]
    )

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
    questions = [world.heldout(kind)[0].turns[0].question for kind in KINDS]
    print(flush=True)
    report.run(report.Config(model_tag=TAG), beginnings(folder), questions)
    minutes, seconds = divmod(int(time.perf_counter() - start), 60)
    print(f"\n{table(scores)}\n\nin all {minutes} min {seconds:02} s", flush=True)
    cli.next_step('python -m launch.chat_cli -p "What is 23 * 7?"')
    return 0 if passed(scores) else 1


def main(args: list[str] | None = None):
    cli.main(Config, run, args)


if __name__ == "__main__":
    main()
