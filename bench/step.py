"""Time a warm training step: python -m bench.step --depth=4 --seq=512 --batch=8 --vocab=8192

With several --ways to compute it, takes turns among them, so that a noisy machine hurts all alike, and prints
medians and the ratio to the first. bench/compare.py compares it with another program, bench/profile.py shows
where the time goes.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxchat import sharding
from jaxchat.config import BaseConfig, Compute, Model, UserError
from jaxchat.model.flops import flops_per_token, num_params, peak_flops
from jaxchat.train import fit, stages
from jaxchat.train.loop import place_batch
from jaxchat.train.metrics import peak_bytes
from jaxchat.train.optimizer import make_optimizer
from jaxchat.train.state import abstract_state, init_state
from jaxchat.train.step import compile_step, make_train_step
from launch import cli

GRAD_CLIP = {"base": 1.0, "mid": 0.0, "sft": 0.0}


@dataclasses.dataclass(frozen=True)
class Shape:
    """The model, the batch and the number of steps."""

    depth: int = 4
    """Depth of the model."""
    arch: str = BaseConfig.arch
    """2025 or 2026: the model and its optimizer, as base_train's --arch."""
    seq: int = 512
    """Tokens in a row."""
    batch: int = 8
    """Rows in an optimizer step."""
    vocab: int = 8192
    """Size of the vocabulary."""
    stage: str = "base"
    """base (gradients clipped), mid, or sft (a third of the tokens supervised)."""
    steps: int = 10
    """Steps to time."""
    warmup: int = 3
    """Warm-up steps before the timed ones."""


@dataclasses.dataclass(frozen=True)
class Config(Shape):
    """Time training steps on random tokens."""

    micro_rows: str = ""
    """Rows to compute at a time; several values separated by commas; empty: all at once."""
    ways: str = ""
    """Fields of Compute to change from this backend's defaults; several ways separated by commas."""
    json: bool = False
    """Print the first way's figures as one JSON object in the last line."""


def batch_of(config: Shape, micro_rows: int, random: np.random.Generator) -> dict[str, np.ndarray]:
    """{inputs, targets, weights} [A, B, T] of random tokens."""
    if config.batch % micro_rows:
        raise UserError(f"--micro_rows={micro_rows} does not divide --batch={config.batch}")
    shape = (config.batch // micro_rows, micro_rows, config.seq)
    tokens = {name: random.integers(0, config.vocab, shape, dtype=np.int32) for name in ("inputs", "targets")}
    supervised = random.random(shape) < (1 / 3 if config.stage == "sft" else 1)
    return tokens | {"weights": supervised.astype(np.float32)}


def prepare(config: Shape, changes: dict, micro_rows: int, make_state: Callable | None = None):
    """(step function, state, placed batch, model) of one way, the step not yet compiled.

    make_state: init_state by default; abstract_state where shapes are enough. Where devices tell their memory
    and `changes` don't name a remat, the first that fits is taken, as the trainers do.
    """
    if config.stage not in GRAD_CLIP:
        raise UserError(f"--stage={config.stage}; it is one of {', '.join(GRAD_CLIP)}")
    sharding.take_memory()
    mesh = sharding.make_mesh()
    flags = BaseConfig.given(
        arch=config.arch,
        depth=config.depth,
        max_seq_len=config.seq,
        total_batch_size=config.batch * config.seq,
        num_iterations=1000,
    )
    model = stages.base_model(flags, config.vocab)
    compute = Compute.for_backend(mesh=mesh, **changes)
    optimizer = make_optimizer(
        model,
        table=stages.table_for(flags, model, horizon=stages.horizon_of(flags, model)),
        grad_clip=GRAD_CLIP[config.stage],
        muon_dtype=jnp.dtype(compute.dtype),
        mesh=mesh,
    )
    batch = place_batch(batch_of(config, micro_rows, np.random.default_rng(0)), mesh)
    auto = fit.device_memory(mesh) and "remat" not in changes
    remats = fit.remats_to_try(batch, mesh) if auto else (compute.remat,)
    steps = {
        remat: make_train_step(Model(model, dataclasses.replace(compute, remat=remat)), optimizer)
        for remat in remats
    }
    if len(steps) > 1:
        remats = [
            fit.first_that_fits(
                steps, mesh, abstract_state(Model(model, compute), optimizer), batch, np.float32(1.0)
            )
        ]
    make_state = make_state or partial(init_state, 0)
    return steps[remats[0]], make_state(Model(model, compute), optimizer), batch, model


def parse_way(text: str) -> dict:
    """ "unroll=False remat=full" -> {field of Compute: value}. UserError: no such field."""
    fields, read, changes = Compute.__dataclass_fields__, {"True": True, "False": False}, {}
    for name, _, value in (part.partition("=") for part in text.split()):
        if name not in fields or not value:
            raise UserError(f"{name}={value} is no way to compute; it is FIELD=VALUE of {', '.join(fields)}")
        changes[name] = int(value) if value.isdigit() else read.get(value, value)
    return changes


def run(config: Config):
    sharding.keep_compiled()  # as the commands do
    micros = [int(n) for n in (config.micro_rows or str(config.batch)).split(",")]
    runs = {}
    for way in config.ways.split(","):
        for micro in micros:
            runs[f"{way.strip() or 'defaults'}, {micro} rows at a time"] = prepare(
                config, parse_way(way), micro
            )
    # Donated to each step, and replaced by what it returns.
    states = {name: run[1] for name, run in runs.items()}
    for step, state, batch, _ in runs.values():
        compile_step(step, state, batch, np.float32(1.0))
    times, losses = {name: [] for name in runs}, {}
    model = next(iter(runs.values()))[3]
    cli.print_plan(
        "Training step",
        [
            ("model", str(model)),
            ("devices", sharding.describe(sharding.make_mesh())),
            ("jax", jax.__version__),
        ],
    )
    for turn in range(config.warmup + config.steps):
        for name, (step, _, batch, *_) in runs.items():
            start = time.perf_counter()
            states[name], metrics = step(states[name], batch, np.float32(1.0))
            jax.block_until_ready((states[name], metrics))
            if turn >= config.warmup:
                times[name].append(time.perf_counter() - start)
            losses[name] = float(metrics["loss"])
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    first, tokens = next(iter(medians.values())), config.batch * config.seq
    peak = peak_flops(jax.devices()[0])
    for name, median in medians.items():
        rate = f"{1000 * median:8.1f} ms {tokens / median:12,.0f} tokens/s"
        if peak:
            rate += f"  {flops_per_token(model) * tokens / median / peak / jax.device_count():.1%} MFU"
        print(f"{name:<45} {rate}  {first / median:.2f} × the first")
    if config.json:
        fields = {
            "framework": f"jax {jax.__version__}",
            "device": jax.devices()[0].device_kind,
            "depth": config.depth,
            "seq": config.seq,
            "batch": config.batch,
            "vocab": config.vocab,
            "compiled": True,
            "step_s": round(first, 5),
            "tokens_per_s": round(tokens / first, 1),
            "flops_per_s": flops_per_token(model) * tokens / first,
            "parameters": num_params(model),
            "peak_bytes": peak_bytes(),
            "loss": round(next(iter(losses.values())), 4),
        }
        print(json.dumps(fields))


if __name__ == "__main__":
    cli.main(Config, run)
