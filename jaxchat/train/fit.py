"""Choose the fastest --remat (recomputation of activations) with which a training step fits in memory."""

import math
import re
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from jaxchat.config import REMATS, UserError
from jaxchat.sharding import data_shards, gather_json
from jaxchat.train.step import can_merge

# Fraction of memory to fill while a smaller program is left to try. Pools leave gaps, and batches need room.
FILL = 0.95
# Tokens of a device's micro-batch up to which recomputing the layers takes no longer than sending all
# weights and gradients between devices: 5,000 (v5e, H100) to 11,600 (v6e) by arithmetic, docs/performance.md.
FEW_TOKENS = 4096


def first_that_fits(steps: dict[str, Callable], mesh: Mesh, *args) -> str:
    """Return the first value of --remat with which a training step fits in every device's memory.

    steps: {value of --remat: jitted step}. args: arguments for which the steps are compiled.
    If the memory limit is unknown (CPU), returns the first value. Raises UserError if no step fits.
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
        print(f"{message}: {'too much' if last else f'more than {FILL:.0%}'}", flush=True)
    instead = "" if remat == "full" else ", or give --remat=full"
    raise UserError(f"{message}; lower --device_batch_size{instead}")


def remats_to_try(batch: dict, mesh: Mesh) -> tuple[str, ...]:
    """Return the values of --remat worth trying, fastest first. batch: arrays [micro-batches, rows, time]."""
    if not can_merge(batch, mesh):
        return REMATS
    _, rows, time = batch["inputs"].shape
    if rows // data_shards(mesh) * time <= FEW_TOKENS:
        return "step", *REMATS
    return *REMATS[:-1], "step", REMATS[-1]


def device_memory(mesh: Mesh) -> int | None:
    """Return the smallest memory limit of the local devices, in bytes, or None if it is unknown (CPU)."""
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in mesh.local_devices]
    return None if None in limits else min(limits)


def memory_needed(compiled: jax.stages.Compiled) -> int:
    """Return the bytes of device memory that a program needs, including its arguments and results."""
    m = compiled.memory_analysis()
    arrays = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    return arrays + m.temp_size_in_bytes + m.generated_code_size_in_bytes


def memory_refused(problem: jax.errors.JaxRuntimeError) -> float:
    """Return the bytes that a program needs, read from the compiler's out-of-memory error.

    Returns ∞ if the error does not state them. Raises any other error again.
    """
    message, units = str(problem), {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    if found := re.search(r"\(?([\d.]+)([KMGT])\)? (?:of [\d.]+[KMGT] hbm|exceeds available HBM)", message):
        return float(found[1]) * units[found[2]]
    if "RESOURCE_EXHAUSTED" in message:
        return math.inf
    raise problem


def fitting(limit: float, platform: str) -> str:
    """Return the end of a message about a program that fits in a device's memory of `limit` bytes."""
    if platform == "tpu":
        return ", which on TPUs can be more than it takes; it compiled, so it fits"
    return f" of a device's {limit / 1e9:.1f} GB: it fits"


def fits(needed: int, limit: float, platform: str, last: bool) -> bool:
    """Return whether a program that needs `needed` bytes fits in a device memory of `limit` bytes.

    last: whether no smaller program is left to try. If so, this one may fill all memory, else the fraction
    FILL of it. On TPUs the result is always True, since their compiler rejects programs that do not fit.
    """
    # A TPU's `needed` is too high, since it counts temporaries that are never in memory together.
    return platform == "tpu" or needed <= limit * (1 if last else FILL)
