"""Time of one training step, for each way of computing it side by side: python bench/step.py --depth=3 --seq=256

Takes turns among the ways, so that a noisy machine hurts all alike; prints medians and the ratio to the first.
"""

import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxchat import sharding
from jaxchat.config import Compute, ModelConfig
from jaxchat.train.loop import place_batch
from jaxchat.train.optimizer import make_optimizer
from jaxchat.train.state import init_state
from jaxchat.train.step import make_train_step
from launch import cli


@dataclasses.dataclass(frozen=True)
class Config:
    """Time training steps on random tokens."""

    depth: int = 3
    """Of the model."""
    seq: int = 256
    """Tokens in a row."""
    vocab: int = 512
    """Vocabulary."""
    rows: int = 16
    """Rows in an optimizer step."""
    micro_rows: str = "8,2"
    """Rows computed at a time, commas between."""
    ways: str = "attention=xla,attention=blocks,remat=full attention=blocks,unroll=False attention=blocks"
    """Fields of Compute to change from this backend's defaults, ways with commas between."""
    repeats: int = 10
    """Steps of each way that are timed."""


def run(config: Config):
    mesh = sharding.make_mesh()
    model = ModelConfig.from_depth(config.depth, sequence_len=config.seq, vocab_size=config.vocab)
    random = np.random.default_rng(0)
    shape = (config.rows, config.seq)
    tokens = {name: random.integers(0, config.vocab, shape, dtype=np.int32) for name in ("inputs", "targets")}
    rows = tokens | {"weights": np.ones(shape, np.float32)}
    dtype = jnp.dtype(Compute.for_backend().dtype)
    optimizer = make_optimizer(model, grad_clip=1.0, muon_dtype=dtype)
    cli.print_plan(
        "Training step", [("model", str(model)), ("devices", sharding.describe(mesh)), ("jax", jax.__version__)]
    )
    runs = {}
    for way in config.ways.split(","):
        changes = dict(part.split("=") for part in way.split())
        changes = {name: {"True": True, "False": False}.get(value, value) for name, value in changes.items()}
        compute = Compute.for_backend(data_shards=sharding.data_shards(mesh), **changes)
        for micro in map(int, config.micro_rows.split(",")):
            batch = {k: a.reshape(config.rows // micro, micro, config.seq) for k, a in rows.items()}
            step, state = make_train_step(model, compute, optimizer, mesh), init_state(0, model, optimizer, mesh)
            runs[f"{way.strip()}, {micro} rows at a time"] = [step, state, place_batch(batch, mesh), []]
    for turn in range(config.repeats + 2):  # two to warm up
        for run in runs.values():
            step, state, batch, times = run
            start = time.perf_counter()
            run[1], metrics = step(state, batch, np.float32(1.0))
            jax.block_until_ready((run[1], metrics))
            if turn >= 2:
                times.append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, (*_, times) in runs.items()}
    first, tokens_per_step = next(iter(medians.values())), config.rows * config.seq
    for name, median in medians.items():
        rate = f"{1000 * median:8.1f} ms {tokens_per_step / median:12,.0f} tokens/s"
        print(f"{name:<45} {rate}  {first / median:.2f} × the first")


if __name__ == "__main__":
    cli.main(Config, run)
