"""Choose the fastest --remat (recomputation of activations) with which a training step fits in memory."""

import math
import re
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from jaxchat.config import REMATS, UserError
from jaxchat.sharding import data_shards, gather_json
from jaxchat.train.step import can_merge

# Fraction of memory to fill while a smaller program is left to try: pools leave gaps, batches need room too.
SPARE = 0.95
# Tokens of a device's micro-batch up to which recomputing the layers takes no longer than sending all
# weights and gradients between devices: 5,000 (v5e, H100) to 11,600 (v6e) by arithmetic, docs/performance.md.
FEW_TOKENS = 4096


def remats_to_try(batch: dict, mesh: Mesh) -> tuple[str, ...]:
    """Values of --remat that are worth trying, the fastest first.

    batch: arrays [A, B, T] of one step, where A is the number of micro-batches.
    """
    if not can_merge(batch, mesh):
        return REMATS
    _, rows, time = batch["inputs"].shape
    if rows // data_shards(mesh) * time <= FEW_TOKENS:
        return "step", *REMATS
    return *REMATS[:-1], "step", REMATS[-1]


def device_memory(mesh: Mesh) -> int | None:
    """Smallest memory limit among local devices, in bytes; None if the backend reports none (CPU)."""
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in mesh.local_devices]
    return None if None in limits else min(limits)


def memory_needed(compiled: jax.stages.Compiled) -> int:
    """Bytes of device memory that a compiled program needs: arguments, results, temporaries and code."""
    m = compiled.memory_analysis()
    own = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    return own + m.temp_size_in_bytes + m.generated_code_size_in_bytes


def memory_refused(problem: jax.errors.JaxRuntimeError) -> float:
    """Return the bytes that a program needs, read from the compiler's out-of-memory error; ∞ if not stated.

    An error that is not about memory is raised again.
    """
    message, units = str(problem), {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    if found := re.search(r"\(?([\d.]+)([KMGT])\)? (?:of [\d.]+[KMGT] hbm|exceeds available HBM)", message):
        return float(found[1]) * units[found[2]]
    if "RESOURCE_EXHAUSTED" in message:
        return math.inf
    raise problem


def first_that_fits(steps: dict[str, Callable], mesh: Mesh, *args) -> str:
    """Return the first value of --remat whose training step fits in every device's memory.

    steps: {value of --remat: jitted step}. args: the arguments for which a step is compiled. If the memory
    limit is unknown (CPU), return the first value and compile nothing. UserError: no step fits.
    """
    limit, platform = device_memory(mesh), mesh.devices.flat[0].platform
    if limit is None:
        return next(iter(steps))
    for remat, step in steps.items():
        last = remat == list(steps)[-1]
        try:
            needed = memory_needed(step.lower(*args).compile())
            enough = fits(needed, limit, platform, last)
        except jax.errors.JaxRuntimeError as problem:
            needed, enough = memory_refused(problem), False
        hosts = gather_json({"needed": needed, "limit": limit, "enough": enough})
        needed, limit = max(host["needed"] for host in hosts), min(host["limit"] for host in hosts)
        size = f"{needed / 1e9:.1f} GB" if needed < math.inf else "more than all"
        message = f"a step with --remat={remat} needs {size} (by the compiler's count)"
        if all(host["enough"] for host in hosts):
            print(message + fitting(limit, platform), flush=True)
            return remat
        message += f" of a device's {limit / 1e9:.1f} GB"
        print(f"{message}: {'too much' if last else f'more than {SPARE:.0%}'}", flush=True)
    instead = "" if remat == "full" else ", or give --remat=full"
    raise UserError(f"{message}; lower --device_batch_size{instead}")


def fitting(limit: float, platform: str) -> str:
    """Return the end of the printed message on a program that fits. limit: a device's memory in bytes."""
    if platform == "tpu":
        return ", which on TPUs can be more than it takes; it compiled, so it fits"
    return f" of a device's {limit / 1e9:.1f} GB: it fits"


def fits(needed: int, limit: float, platform: str, last: bool) -> bool:
    """Return whether a compiled program that needs `needed` bytes fits in `limit` bytes of device memory.

    A program may fill only the fraction SPARE of the limit, or all of it if `last`, that is, if no smaller
    program is left to try. On a TPU every program that compiles fits, because libtpu refuses to compile
    others. There `needed` is too high, since it includes temporaries that are never in memory together
    (18.9 GB were counted on a v5e with 16.9 GB).
    """
    return platform == "tpu" or needed <= limit * (1 if last else SPARE)
