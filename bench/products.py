"""Time a layer's matrix products, forward and gradients, in each format: python -m bench.products

For each pair of widths: a product y = x·w and its two gradients, as training computes them
(model/matmul.py), in bfloat16, in float8, and on GPUs in bfloat16 without Triton, which the float8 program
must do without. Takes turns among them and prints medians. A product counts 2·tokens·inputs·outputs FLOPs.
"""

import dataclasses
import json
import statistics
import time

import jax
import jax.numpy as jnp

from jaxchat.config import Compute
from jaxchat.model.matmul import matmul
from launch import cli

WITHOUT_TRITON = {"xla_gpu_enable_triton_gemm": False}


@dataclasses.dataclass(frozen=True)
class Config:
    """Time matrix products in bfloat16 and float8."""

    tokens: int = 32768
    """Rows of the activations."""
    widths: str = "1280x5120,5120x1280,1280x1280"
    """Inputs × outputs of the weights, separated by commas; these are depth 20's."""
    rounds: int = 10
    """Times that each is measured."""
    json: bool = False
    """Print the figures as one JSON object in the last line."""


def ways_on(platform: str) -> dict[str, tuple[Compute, dict | None]]:
    """{name: (how products are computed, compiler options)}."""
    bfloat16, float8 = Compute(dtype="bfloat16"), Compute(dtype="bfloat16", matmul="fp8-all")
    if platform != "gpu":
        return {"bfloat16": (bfloat16, None), "float8": (float8, None)}
    return {
        "bfloat16": (bfloat16, None),
        "bfloat16 without Triton": (bfloat16, WITHOUT_TRITON),
        "float8": (float8, WITHOUT_TRITON),
    }


def programs(tokens: int, inputs: int, outputs: int) -> dict:
    """{(way, direction): a compiled function of no arguments}."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (1, tokens, inputs), jnp.bfloat16)
    w = jax.random.normal(keys[1], (inputs, outputs))
    dy = jax.random.normal(keys[2], (1, tokens, outputs), jnp.bfloat16)
    found = {}
    for name, (compute, options) in ways_on(jax.default_backend()).items():

        def forward(x, w, compute=compute):
            return matmul(x, w, "btd,df->btf", compute)

        def both(x, w, dy, forward=forward):
            y, gradients = jax.vjp(forward, x, w)
            return y, gradients(dy)

        for direction, function, args in (("forward", forward, (x, w)), ("all three", both, (x, w, dy))):
            compiled = jax.jit(function).lower(*args).compile(compiler_options=options)
            found[name, direction] = lambda compiled=compiled, args=args: compiled(*args)
    return found


def run(config: Config):
    figures = {}
    for widths in config.widths.split(","):
        inputs, outputs = (int(n) for n in widths.split("x"))
        timed, seconds = programs(config.tokens, inputs, outputs), {}
        for turn in range(config.rounds + 2):  # the first two warm up
            for key, function in timed.items():
                start = time.perf_counter()
                jax.block_until_ready(function())
                if turn > 1:
                    seconds.setdefault(key, []).append(time.perf_counter() - start)
        for (name, direction), each in seconds.items():
            median = statistics.median(each)
            flops = 2 * config.tokens * inputs * outputs * (1 if direction == "forward" else 3)
            rate = f"{1e3 * median:8.3f} ms {flops / median / 1e12:8.2f} TFLOP/s"
            print(f"{widths:>10} {name:<24} {direction:<9} {rate}")
            figures[f"{widths} {name}, {direction}"] = {"seconds": median, "flops_per_s": flops / median}
    if config.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    cli.main(Config, run)
