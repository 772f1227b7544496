"""Train small models by both recipes on the same tokens: python -m bench.recipes --data_dir=data --depth=4

Each run trains from random weights on the same documents in the same order, as launch.base_train would,
and ends with bits per byte on the validation shard. The runs:

- 2025 and 2026 for the same number of tokens, and 2026 for the CPU time that 2025 took;
- 2026 at full rates: its rule multiplies them by √(tokens a step / 2¹⁹), 1/16 for 2,048 tokens a step;
- the last without one of its parts at a time, which shows the part's share.

Figures are added to recipes.jsonl as they come, and runs that are in it are left out, so the same command
continues. It prints the means over the seeds.
"""

import dataclasses
import statistics
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np

from jaxchat import files, sharding
from jaxchat.config import BaseConfig, Compute, Model, ModelConfig
from jaxchat.data.encode import text_reader
from jaxchat.data.pipelines import packed_validation
from jaxchat.data.sources import ParquetText, find_shards
from jaxchat.eval.bpb import bits_per_byte
from jaxchat.tokenizer import Tokenizer
from jaxchat.train import stages
from jaxchat.train.loop import place_batch
from jaxchat.train.optimizer import NEWTON_SCHULZ, make_optimizer
from jaxchat.train.state import init_state
from jaxchat.train.step import make_train_step
from launch import cli

# What a run lacks of 2026: fields of the model, of Muon's rule, flags.
OLD_INIT = {"embedding_std": 1.0, "head_std": 0.0, "uniform_init": False, "up_scale": 1.0}
WITHOUT = {
    "windows": {"window_pattern": ""},
    "value embeddings": {"value_gate_channels": 0},
    "layer scales": {"layer_scales": False},
    "smear": {"smear_channels": 0},
    "backout": {"backout": False},
    "sharper attention": {"qk_scale": 1.0},
    "rotary base": {"rotary_base": 10_000.0},
    "initial values": OLD_INIT,
    "Polar Express": {"coefficients": NEWTON_SCHULZ, "norm_factor": 1.0},
    "MuonEq": {"equalize": False},
    "Muon+": {"exact_norm": False},
    "NorMuon": {"neuron_beta": 0.0},
    "Muon's decay": {"decay": None},
    "schedule": {"warmup_steps": 0, "warmdown_ratio": 0.2, "final_lr_frac": 0.0},
}
TOKENIZER_DOCUMENTS = 4000
FIGURES = "recipes.jsonl"
FULL, FULL_RATES = "2026 at full rates", {"lr_scale": 1.0}


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare the recipes of 2025 and 2026."""

    data_dir: str = ""
    """Folder of the parquet shards; empty: <base directory>/base_data."""
    depth: int = 4
    """Depth of the models."""
    tokens: int = 262144
    """Tokens to train on."""
    total_batch_size: int = 2048
    """Tokens in a step."""
    max_seq_len: int = 256
    """Tokens in a row."""
    vocab_size: int = 2048
    """Size of the vocabulary."""
    eval_tokens: int = 65536
    """Validation tokens."""
    seeds: str = "0,1,2"
    """Seeds of the recipes' runs, separated by commas; parts are left out with the first."""
    parts: bool = True
    """Leave each part out, too."""
    out: str = "."
    """Folder of recipes.jsonl, the file that figures are added to."""


@dataclasses.dataclass(frozen=True)
class Data:
    tokenizer: Tokenizer
    texts: ParquetText
    held_out: ParquetText


def flags_of(config: Config, recipe: str, seed: int, tokens: int, changes: dict) -> BaseConfig:
    """The flags of base_train for a run."""
    names = {field.name for field in dataclasses.fields(BaseConfig)}
    shared = {name: getattr(config, name) for name in ("depth", "max_seq_len", "total_batch_size")}
    steps = max(1, tokens // config.total_batch_size)
    changed = {name: value for name, value in changes.items() if name in names}
    return BaseConfig.given(arch=recipe, seed=seed, num_iterations=steps, **shared, **changed)


def stage_of(flags: BaseConfig, data: Data, changes: dict) -> stages.Stage:
    """The stage that base_train would train, but for what is changed."""
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    model = stages.base_model(flags, data.tokenizer.vocab_size)
    model = dataclasses.replace(model, **{name: value for name, value in changes.items() if name in names})
    mesh = sharding.make_mesh(jax.devices()[:1])
    whole = Model(model, Compute.for_backend(mesh=mesh))
    stage = stages.base(flags, "bench", whole, data.tokenizer, data.texts, data.held_out)
    horizon = stages.horizon_of(flags, model)
    horizon = dataclasses.replace(horizon, lr_scale=changes.get("lr_scale", horizon.lr_scale))
    table = stages.table_for(flags, model, horizon=horizon)
    rule = {name: value for name, value in changes.items() if hasattr(table["matrix"], name)}
    table |= {"matrix": dataclasses.replace(table["matrix"], **rule)}
    optimizer = make_optimizer(model, table=table, grad_clip=flags.grad_clip, mesh=mesh)
    return dataclasses.replace(stage, optimizer=optimizer)


def train(stage: stages.Stage, validation: list[dict]) -> dict:
    """-> {bpb, loss of the last tenth of the steps, seconds of CPU time a step}."""
    model, steps, losses = stage.model, stage.num_steps, []
    state = init_state(stage.flags.seed, model, stage.optimizer)
    step = make_train_step(model, stage.optimizer)
    for number in range(steps):
        batch = place_batch(stage.batches.next_batch(None, number), model.mesh)
        rate = np.float32(stage.schedule(number / steps, 1 / steps))
        state, metrics = step(state, batch, rate)
        losses.append(float(metrics["loss"]))
        if number == 0:  # it compiled
            began = time.process_time()
    seconds = (time.process_time() - began) / max(1, steps - 1)
    stage.batches.close()
    bpb = bits_per_byte(state.params, validation, stage.tokenizer.token_bytes, model)
    return {"bpb": bpb, "loss": statistics.mean(losses[-max(1, steps // 10) :]), "step_seconds": seconds}


def run(config: Config):
    sharding.keep_compiled()
    Path(config.out).mkdir(parents=True, exist_ok=True)
    known = files.read_lines(Path(config.out) / FIGURES)
    done = [row for row in known if row.items() >= about(config).items()]
    texts, held_out = (ParquetText(find_shards(config.data_dir, split)) for split in ("train", "val"))
    some = (texts[i] for i in range(min(TOKENIZER_DOCUMENTS, len(texts))))
    data = Data(Tokenizer.train(some, config.vocab_size), texts, held_out)
    seeds = [int(seed) for seed in config.seeds.split(",")]
    one = partial(one_run, config, data, done)
    for seed in seeds:
        slow = one("2025", seed)
        fast = one("2026", seed)
        one("2026", seed, name="2026 in 2025's time", share=slow["step_seconds"] / fast["step_seconds"])
        one("2026", seed, name=FULL, changes=FULL_RATES)
    for part, changes in WITHOUT.items() if config.parts else ():
        one("2026", seeds[0], name=f"without {part}", changes=FULL_RATES | changes)
    table(done)


def about(config: Config) -> dict:
    """What figures must have in common to be compared."""
    names = ("depth", "tokens", "total_batch_size", "max_seq_len", "vocab_size", "eval_tokens")
    return {name: getattr(config, name) for name in names}


def one_run(config: Config, data: Data, done: list[dict], recipe: str, seed: int, **how) -> dict:
    """Train one model, unless it is in `done`, and note its figures.

    how: name of the run; share of the tokens to train on; changes, see WITHOUT.
    """
    name, share, changes = how.get("name", recipe), how.get("share", 1.0), how.get("changes", {})
    for row in done:
        if (row["name"], row["seed"]) == (name, seed):
            return row
    flags = flags_of(config, recipe, seed, int(share * config.tokens), changes)
    stage = stage_of(flags, data, changes)
    rows = {"rows": 8, "time": config.max_seq_len, "max_tokens": config.eval_tokens}
    read = text_reader(data.held_out, data.tokenizer)
    validation = packed_validation(read, range(len(data.held_out)), **rows)
    row = about(config) | {"name": name, "seed": seed, "steps": stage.num_steps} | train(stage, validation)
    files.append_line(Path(config.out) / FIGURES, row)
    done.append(row)
    print(
        f"{name:<28} seed {seed}  bpb {row['bpb']:.4f}  {1000 * row['step_seconds']:.0f} ms a step",
        flush=True,
    )
    return row


def table(done: list[dict]):
    """Print the mean of each kind of run, and how far it is from 2026 at full rates with the same seeds."""
    best = {row["seed"]: row["bpb"] for row in done if row["name"] == FULL}
    print(f"\n{'run':<28} {'seeds':>5} {'bpb':>8} {'- full':>8} {'spread':>7} {'ms a step':>10}")
    for name in dict.fromkeys(row["name"] for row in done):
        rows = [row for row in done if row["name"] == name]
        values = [row["bpb"] for row in rows]
        apart = statistics.mean(row["bpb"] - best[row["seed"]] for row in rows)
        mean, spread = statistics.mean(values), max(values) - min(values)
        pace = 1000 * statistics.median(row["step_seconds"] for row in rows)
        print(f"{name:<28} {len(rows):>5} {mean:>8.4f} {apart:>+8.4f} {spread:>7.4f} {pace:>10.0f}")


def main(args: list[str] | None = None):
    cli.main(Config, run, args)


if __name__ == "__main__":
    main()
