"""Speed of decoding beside what the memory allows: python -m bench.decode --depth=12 --batches=1,16,128

On one device. Every token of a batch needs all weights but the embedding, once: at the speed of a large copy that takes
the floor's time. The cache takes 2 × layers × width × seq numbers a row: at depth 12 75 MB in bfloat16.
"""

import dataclasses
import statistics
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from bench.eval import random_params, timed
from bench.step import parse_way
from jaxchat import sharding
from jaxchat.config import Compute, ModelConfig
from jaxchat.infer.engine import Engine
from jaxchat.model.flops import num_params
from launch import cli


@dataclasses.dataclass(frozen=True)
class Config:
    """Time the decoding of random models, whose answers go on to their limit."""

    depth: int = 12
    """Of the model."""
    seq: int = 2048
    """The longest context."""
    vocab: int = 65536
    """Vocabulary."""
    batches: str = "1,16,128"
    """Rows decoded at a time, several with commas between."""
    max_tokens: int = 256
    """Of each row, after a prompt of 16."""
    way: str = ""
    """Fields of Compute to change from this backend's defaults: "unroll=False"."""


class NoText:
    """A tokenizer whose specials are the last ids; random models don't call tools in earnest."""

    def __init__(self, vocab: int):
        self._vocab = vocab

    def special(self, name: str) -> int:
        return self._vocab - 1 - ("<|python_end|>", "<|assistant_end|>", "<|bos|>", "<|python_start|>").index(name)

    def decode(self, tokens) -> str:
        return ""


def copy_speed() -> float:
    """Bytes a second that a large copy reads and writes."""
    size = 2**28 if jax.default_backend() == "cpu" else 2**31
    array, double = jnp.ones(size // 4), jax.jit(lambda a: a + 1)
    seconds = [timed(lambda: jax.block_until_ready(double(array)))[1] for _ in range(10)]
    return 2 * size / statistics.median(seconds)


def run(config: Config):
    sharding.keep_compiled()
    sharding.take_memory()
    mesh = sharding.make_mesh(jax.devices()[:1])
    model = ModelConfig.from_depth(config.depth, sequence_len=config.seq, vocab_size=config.vocab)
    compute, params = Compute.for_backend(mesh=mesh, **parse_way(config.way)), random_params(model)
    read = (num_params(model) - model.vocab_size * model.n_embd) * jnp.dtype(compute.dtype).itemsize
    speed = copy_speed()
    cli.print_plan(
        "Decoding",
        [
            ("model", f"{model.n_layer} layers × {model.n_embd}, vocabulary {model.vocab_size:,}, in {compute.dtype}"),
            ("devices", sharding.describe(mesh)),
            (
                "floor",
                f"{read / 1e9:.2f} GB of weights at {speed / 1e12:.2f} TB/s: {1e3 * read / speed:.2f} ms a token",
            ),
        ],
    )
    random = np.random.default_rng(0)
    for batch in map(int, config.batches.split(",")):
        engine = Engine(params, model, NoText(model.vocab_size), compute, batch_size=batch)
        prompts = random.integers(0, model.vocab_size - 9, (batch, 16)).tolist()
        generate = partial(engine.generate, prompts, max_tokens=config.max_tokens)
        _, compiled = timed(generate)
        answers, seconds = timed(generate)
        tokens = sum(len(answer.tokens) for answer in answers)
        step = seconds * batch / tokens
        told = f"{tokens / seconds:10,.0f} tokens/s, {1e3 * step:.2f} ms a token of each row"
        told += f", {step * speed / read:.1f} × the floor (the first time {compiled - seconds:.1f} s more)"
        print(f"batch {batch:>4}  {told}", flush=True)


if __name__ == "__main__":
    cli.main(Config, run)
