"""Plan before paying: python -m launch.compile_check --depth=20 --topology=v5e:4x4

Compiles the real training step for devices that are not here, and prints what it needs of each: memory, FLOPs,
collectives, kernels, and the largest batch that fits.
"""

import dataclasses
import json
import os
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX reads it: nothing but descriptions of devices is used

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxchat import sharding
from jaxchat.config import REMATS, BaseConfig, Compute, ModelConfig, UserError
from jaxchat.data.pipelines import micro_batches
from jaxchat.model.flops import flops_per_token, num_params, peak_flops
from jaxchat.train.fit import fits, fitting, memory_needed, memory_refused
from jaxchat.train.optimizer import make_optimizer
from jaxchat.train.state import abstract_state
from jaxchat.train.step import make_train_step
from launch import cli, hlo, topologies


@dataclasses.dataclass(frozen=True)
class Config:
    """Compile base training's step for a TPU slice or GPUs without having them, and print what it needs."""

    depth: int = 20
    """The one dial of the model's size, as in base_train."""
    topology: str = "v5e:4x4"
    """v4, v5e, v5p, v6e or tpu7x and the chips along each side (v5p:4x4x4); or h100:8, h200:8, h100:2x8 (two hosts)."""
    num_slices: int = 1
    """So many slices of that topology, joined by the data centre's network."""
    mesh: str = ""
    """Devices along each axis, as in base_train; empty: as it would choose."""
    device_batch_size: int = -1
    """Rows a device computes at a time; -1: 32, or fewer where a step has fewer."""
    total_batch_size: int = 524288
    """Tokens in an optimizer step, over all devices."""
    max_seq_len: int = 2048
    """Tokens in a row."""
    vocab_size: int = 65536
    """Of the tokenizer."""
    remat: str = "auto"
    """As in base_train, which for auto takes the first of none, dots and full that fits: a compilation each try."""
    find_batch: bool = True
    """Also search for the largest device batch that fits, a compilation each try."""
    json: bool = False
    """Print the figures as one JSON object in the last line."""


@dataclasses.dataclass
class Compiled:
    """needs: bytes of a device's memory; program: None where it did not fit."""

    needs: float
    fits: bool
    seconds: float
    program: hlo.Program | None = None
    arguments: float = 0.0
    temporary: float = 0.0


class Plan:
    def __init__(self, config: Config):
        devices, self.backend, self.memory = topologies.devices_of(config.topology, config.num_slices)
        self.config = config
        self.mesh = sharding.make_mesh(devices, config.mesh)
        self.model = ModelConfig.from_depth(config.depth, sequence_len=config.max_seq_len, vocab_size=config.vocab_size)
        sharding.check_fits(self.model, self.mesh)
        first = REMATS[0] if config.remat == "auto" else config.remat
        self.compute = Compute.for_backend("bfloat16", self.backend, first, mesh=self.mesh)
        self.shards = sharding.data_shards(self.mesh)
        self.rows = config.total_batch_size // config.max_seq_len  # of a step
        micro_batches(self.rows, self.shards, "total_batch_size", f"rows of {config.max_seq_len} = 1 ×")
        self.most = max(n for n in range(1, self.rows // self.shards + 1) if self.rows % (n * self.shards) == 0)
        self.batch = config.device_batch_size if config.device_batch_size > 0 else min(32, self.most)
        micro_batches(self.rows, self.batch * self.shards, "total_batch_size", f"rows = {self.batch} ×")

    def compile(self, batch: int) -> Compiled:
        """The step with `batch` rows a device at a time."""
        optimizer = make_optimizer(self.model, grad_clip=1.0, muon_dtype=jnp.bfloat16, mesh=self.mesh)
        state = abstract_state(self.model, optimizer, self.mesh)
        shape = (self.rows // (batch * self.shards), batch * self.shards, self.config.max_seq_len)
        place = NamedSharding(self.mesh, P(None, sharding.ROWS))
        kinds = {"inputs": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
        rows = {name: jax.ShapeDtypeStruct(shape, kind, sharding=place) for name, kind in kinds.items()}
        number = jax.ShapeDtypeStruct((), np.float32, sharding=NamedSharding(self.mesh, P()))
        step = make_train_step(self.model, self.compute, optimizer, self.mesh)
        start = time.perf_counter()
        try:
            compiled = step.lower(state, rows, number).compile()
        except jax.errors.JaxRuntimeError as problem:
            return Compiled(memory_refused(problem), False, time.perf_counter() - start)
        seconds, m = time.perf_counter() - start, compiled.memory_analysis()
        needs = memory_needed(compiled)
        own = needs - m.temp_size_in_bytes - m.generated_code_size_in_bytes
        last = self.config.remat != "auto" or self.compute.remat == REMATS[-1]
        enough = fits(needs, self.memory, self.backend, last)
        return Compiled(needs, enough, seconds, hlo.read(compiled.as_text()), own, m.temp_size_in_bytes)

    def fit(self, batch: int) -> Compiled:
        """The step with `batch` rows a device; for --remat=auto by the first that fits, from this remat on."""
        done = self.compile(batch)
        while not done.fits and self.config.remat == "auto" and self.compute.remat != REMATS[-1]:
            print(f"  {batch} rows, --remat={self.compute.remat}: {done.needs / 1e9:.1f} GB, too much", flush=True)
            self.compute = dataclasses.replace(self.compute, remat=REMATS[REMATS.index(self.compute.remat) + 1])
            done = self.compile(batch)
        return done

    def largest(self, known: Compiled) -> tuple[int, str] | None:
        """(the largest device batch that fits, its remat), from what is known of the planned one; or None."""
        able = [n for n in range(1, self.most + 1) if self.rows % (n * self.shards) == 0]
        at, best = able.index(self.batch), (self.batch, self.compute.remat) if known.fits else None
        upwards = bool(best)
        while 0 <= (at := at + (1 if upwards else -1)) < len(able):
            tried = self.fit(able[at])
            told = f"{tried.needs / 1e9:.1f} GB{'' if tried.fits else ', too much'}"
            print(f"  {able[at]} rows at a time: {told}", flush=True)
            if tried.fits:
                best = able[at], self.compute.remat
            if tried.fits != upwards:
                break
        return best


def run(config: Config):
    topologies.compile_only()
    plan = Plan(config)
    model, micro = plan.model, plan.rows // (plan.batch * plan.shards)
    per_device = flops_per_token(model) * config.total_batch_size / plan.mesh.size
    cli.print_plan(
        f"Compiling the step of d{config.depth} for {config.topology}",
        [
            ("model", f"{num_params(model):,} parameters; {flops_per_token(model):,} FLOPs a token"),
            ("devices", f"{sharding.describe(plan.mesh)}, {plan.memory / 1e9:.0f} GB each"),
            ("batch", f"{plan.batch} rows × {plan.shards} devices × {micro} accumulated × {config.max_seq_len} tokens"),
            ("takes", "some minutes a compilation (one for GPUs)"),
        ],
    )
    done = plan.fit(plan.batch)
    figures = {"depth": config.depth, "topology": config.topology, "mesh": dict(plan.mesh.shape)} | {
        "device_batch_size": plan.batch, "micro_batches": micro, "remat": plan.compute.remat, "fits": done.fits,
        "bytes": done.needs, "tokens": config.total_batch_size, "model_flops": per_device,
        "compile_seconds": done.seconds,
    }  # fmt: skip
    of = memory_told(plan, done)
    rows = [("memory", of), ("remat", plan.compute.remat)]
    if done.program:
        program, sent = done.program, done.program.sent()
        peak = peak_flops(plan.mesh.devices.flat[0])
        rows[0] = ("memory", f"{of}; state and batch {done.arguments / 1e9:.1f}, temporary {done.temporary / 1e9:.1f}")
        at_peak = f", {program.flops / peak:.2f} s at peak" if peak else ""
        rows += [
            ("FLOPs", f"{program.flops:.3e} a device, kernels' not counted; by the formula {per_device:.3e}{at_peak}"),
            ("collectives", ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in sent.items() if size) or "none"),
            ("kernels", ", ".join(f"{name} × {n}" for name, n in program.kernels.most_common(8)) or "none"),
        ]
        figures |= {"flops": program.flops, "sent": sent, "kernels": dict(program.kernels)}
    cli.print_plan("One step", [*rows, ("compiled in", f"{done.seconds:.0f} s")])
    if config.find_batch:
        best = plan.largest(done)
        figures["largest_device_batch"] = best[0] if best else 0
        told = f"largest device batch that fits: {best[0]} rows, with --remat={best[1]}" if best else ""
        print(told or "no device batch fits, not even one row")
    if config.json:
        print(json.dumps(figures))
    if not done.fits:
        raise UserError(remedy(plan, done, figures.get("largest_device_batch")))
    cli.next_step(training(config, plan.batch))


def memory_told(plan: Plan, done: Compiled) -> str:
    told = f"{done.needs / 1e9:.1f} GB (by the compiler's count)"
    if done.fits:
        return told + fitting(plan.memory, plan.backend)
    return f"{told} of a device's {plan.memory / 1e9:.1f} GB: too much"


def training(config: Config, batch: int) -> str:
    """The command that trains what was compiled, with `batch` rows a device."""
    words = [f"--depth={config.depth}", f"--device_batch_size={batch}"]
    for name in ("total_batch_size", "max_seq_len", "mesh", "remat"):
        if (value := getattr(config, name)) != getattr(BaseConfig, name):
            words.append(f"--{name}={value}")
    return " ".join(["python -m launch.base_train", *words])


def remedy(plan: Plan, done: Compiled, largest: int | None) -> str:
    message = f"a step of {plan.batch} rows a device needs {done.needs / 1e9:.1f} GB of {plan.memory / 1e9:.0f} GB; "
    if plan.compute.remat != "full":
        message += "try --remat=full, or "
    if largest:
        return message + f"lower it: --device_batch_size={largest}"
    if largest is None and plan.batch > 1:
        return message + f"lower --device_batch_size={plan.batch}"
    return (
        message
        + f"spread it further (--mesh=fsdp={plan.mesh.size}), take more devices or lower --depth or --max_seq_len"
    )


def main(args: list[str] | None = None):
    cli.main(Config, run, args)


if __name__ == "__main__":
    main()
