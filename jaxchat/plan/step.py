"""Compile a step of base training for devices that are not attached, to find its memory and largest batch."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxchat import sharding
from jaxchat.config import DEVICE_ROWS, Compute, Model, ModelConfig
from jaxchat.data.pipelines import cut_step, rows_of_step
from jaxchat.model.flops import flops_per_token
from jaxchat.plan import hlo, roofline, topologies
from jaxchat.train.fit import fits, memory_needed, memory_refused, remats_to_try
from jaxchat.train.optimizer import make_optimizer, table_2026
from jaxchat.train.state import abstract_state
from jaxchat.train.step import make_train_step


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Result of compiling a training step. Sizes are bytes per device."""

    batch: int  # rows per device in a micro-batch
    remat: str
    needs: float  # memory in all
    fits: bool
    seconds: float  # spent compiling
    arguments: float = 0.0  # state and batch
    temporary: float = 0.0
    program: hlo.Program | None = None  # None: the step was refused for lack of memory


class StepPlan:
    """A step of base training, to be compiled for the devices of config.topology.

    config: the flags of launch.compile_check.
    """

    def __init__(self, config):
        devices, self.backend, self.memory = topologies.devices_of(config.topology, config.num_slices)
        self.config = config
        self.mesh = sharding.make_mesh(devices, config.mesh)
        shape = {"sequence_len": config.max_seq_len, "vocab_size": config.vocab_size}
        model = ModelConfig.from_depth(config.depth, arch=config.arch, **shape)
        # base_train too keeps embedding tables in bfloat16 where activations are bfloat16.
        self.model = model if model.plain else dataclasses.replace(model, table_dtype="bfloat16")
        sharding.check_fits(self.model, self.mesh)
        self.shards = sharding.data_shards(self.mesh)
        self.rows = rows_of_step(config.total_batch_size, config.max_seq_len)
        self.batch, _ = cut_step(self.rows, self.shards, config.device_batch_size, DEVICE_ROWS)
        most = self.rows // self.shards
        self.batches = [n for n in range(1, most + 1) if self.rows % (n * self.shards) == 0]

    def remats(self, batch: int) -> tuple[str, ...]:
        """Return the --remat values to try, fastest first, for `batch` rows per device in a micro-batch."""
        given = self.config.remat
        return remats_to_try(self.batch_shapes(batch), self.mesh) if given == "auto" else (given,)

    def batch_shapes(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return {name: ShapeDtypeStruct} of a step's arrays. batch: rows per device in a micro-batch."""
        shape = (self.rows // (batch * self.shards), batch * self.shards, self.config.max_seq_len)
        by_rows = NamedSharding(self.mesh, P(None, sharding.ROWS))
        kinds = {"inputs": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
        return {name: jax.ShapeDtypeStruct(shape, kind, sharding=by_rows) for name, kind in kinds.items()}

    @property
    def accumulated(self) -> int:
        """Number of micro-batches in a step, over which gradients are accumulated."""
        return self.rows // (self.batch * self.shards)

    @property
    def flops(self) -> float:
        """FLOPs of a step on one device, by the formula in model/flops.py."""
        return flops_per_token(self.model) * self.config.total_batch_size / self.mesh.size

    def compile(self, batch: int, remat: str) -> Compiled:
        compute = Compute.for_backend(
            "bfloat16", self.backend, remat, mesh=self.mesh, matmul=self.config.matmul
        )
        how = {"grad_clip": 1.0} if self.model.plain else {"table": table_2026(self.model)}
        optimizer = make_optimizer(self.model, muon_dtype=jnp.bfloat16, mesh=self.mesh, **how)
        model = Model(self.model, compute)
        state = abstract_state(model, optimizer)
        lr_multiplier = jax.ShapeDtypeStruct((), np.float32, sharding=NamedSharding(self.mesh, P()))
        step = make_train_step(model, optimizer)
        start = time.perf_counter()
        try:
            compiled = step.lower(state, self.batch_shapes(batch), lr_multiplier).compile()
        except jax.errors.JaxRuntimeError as problem:
            return Compiled(batch, remat, memory_refused(problem), False, time.perf_counter() - start)
        seconds, sizes = time.perf_counter() - start, compiled.memory_analysis()
        needs, temporary = memory_needed(compiled), sizes.temp_size_in_bytes
        enough = fits(needs, self.memory, self.backend, last=remat == self.remats(batch)[-1])
        arguments = needs - temporary - sizes.generated_code_size_in_bytes
        program = hlo.read(compiled.as_text())
        return Compiled(batch, remat, needs, enough, seconds, arguments, temporary, program)

    def bounds(self, done: Compiled) -> dict[str, roofline.Bound]:
        """Return {part of the step: lower bound on its time}. done: a step that compiled successfully."""
        tokens = self.config.total_batch_size / self.mesh.size
        again = done.remat != "none"
        attention = roofline.attention_flops(self.model, tokens, self.config.max_seq_len, again)
        hosts = {
            getattr(d, "slice_index", 0) if self.backend == "tpu" else d.process_index
            for d in self.mesh.devices.flat
        }
        return roofline.bounds(done.program, self.mesh.devices.flat[0], attention, len(hosts) > 1)

    def fit(self, batch: int, first: str = "") -> Compiled:
        """Compile the step with one value of --remat after another until it fits in memory.

        Return the last result, which does not fit if no value is enough. The fastest values are tried first.
        batch: rows per device in each micro-batch.
        first: value of --remat to start with. If it is not among those to try, start with the fastest.
        """
        remats = self.remats(batch)
        for remat in remats[remats.index(first) if first in remats else 0 :]:
            done = self.compile(batch, remat)
            verdict = "" if done.fits else ", too much"
            print(
                f"  {batch} rows at a time, --remat={remat}: {done.needs / 1e9:.1f} GB{verdict}", flush=True
            )
            if done.fits:
                break
        return done

    def largest(self, planned: Compiled) -> Compiled | None:
        """Return the step compiled with the largest micro-batch that fits in memory; None if none fits.

        planned: the step to start from. If it fits, larger micro-batches are tried, else smaller ones.
        """
        at, best = self.batches.index(planned.batch), planned if planned.fits else None
        for batch in self.batches[at + 1 :] if planned.fits else reversed(self.batches[:at]):
            tried = self.fit(batch, best.remat if best and best.remat != "step" else "")
            if tried.fits:
                best = tried
            if tried.fits != planned.fits:
                break
        return best
