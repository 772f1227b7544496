"""Measure what the training loop adds to the bare step: python -m bench.loop --data_dir=DIR

Base training as the command does it, with its data, logging and a checkpoint at the end, in a temporary base
directory, but each step is waited for, so that all the host does between two steps is seen (in a real run it
overlaps with the step before). Then the bare step on one batch, over and over. Medians of both, and the
loop's share.
"""

import dataclasses
import itertools
import os
import statistics
import tempfile
import time

import jax
import numpy as np

from jaxchat import sharding
from jaxchat.config import BaseConfig, UserError, base_dir
from jaxchat.train import loop
from jaxchat.train.run import find_start, open_run
from launch import base_train, cli, tok_train

WARMUP = 3  # steps that are not counted


@dataclasses.dataclass(frozen=True)
class Config:
    """Time base training's loop and its bare step."""

    data_dir: str = ""
    """Folder of the parquet shards; empty: <base directory>/base_data."""
    depth: int = 4
    """Depth of the model."""
    seq: int = 512
    """Tokens in a row."""
    batch: int = 8
    """Rows in an optimizer step."""
    vocab: int = 8192
    """Size of the vocabulary of a tokenizer trained here."""
    steps: int = 30
    """Steps of the loop, and steps of the bare step."""


class Timed:
    """A step that is waited for and notes when it began and ended, and the last call's results and batch."""

    def __init__(self, step):
        self.lower, self._step, self.spans = step.lower, step, []

    def __call__(self, state, batch, multiplier):
        began = time.perf_counter()
        self.state, metrics = jax.block_until_ready(self._step(state, batch, multiplier))
        self.spans.append((began, time.perf_counter()))
        self.batch = batch
        return self.state, metrics

    def median(self) -> float:
        return statistics.median(end - began for began, end in self.spans[WARMUP:])


def run(config: Config):
    if config.steps < WARMUP + 2:
        raise UserError(f"--steps={config.steps}; it must be at least {WARMUP + 2}")
    data = config.data_dir or str(base_dir() / "base_data")
    sharding.take_memory()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["JAXCHAT_BASE_DIR"] = folder
        tok_train.main([f"--data_dir={data}", f"--vocab_size={config.vocab}", "--max_chars=2000000"])
        size = {
            "depth": config.depth,
            "max_seq_len": config.seq,
            "total_batch_size": config.batch * config.seq,
        }
        size |= {
            "device_batch_size": max(1, config.batch // jax.device_count()),
            "num_iterations": config.steps,
        }
        stage = base_train.stage_for(BaseConfig(data_dir=data, **size))
        with open_run(stage, find_start(stage)) as ready:
            looped, bare = Timed(ready.step_fn), Timed(ready.step_fn)
            loop.train(dataclasses.replace(ready, step_fn=looped), [])
    bare.state = looped.state
    for _ in range(config.steps):
        bare(bare.state, looped.batch, np.float32(1.0))
    between = [begin - end for (_, end), (begin, _) in itertools.pairwise(looped.spans[WARMUP:])]
    gap, step = statistics.median(between), looped.median()
    print(
        f"a step in the loop {1000 * step:.1f} ms, bare {1000 * bare.median():.1f} ms; between two steps "
        f"{1000 * gap:.2f} ms, {gap / step:.2%} of a step (at most {max(between) / step:.2%})"
    )


def main(args: list[str] | None = None):
    cli.main(Config, run, args)


if __name__ == "__main__":
    main()
