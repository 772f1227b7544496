"""How much of a device's memory a step takes, and the least recomputation with which it fits."""

import math
import re
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from jaxchat.config import UserError
from jaxchat.sharding import gather_json

SPARE = 0.95  # of the memory a program can have, where there is a choice: pools leave gaps, batches wait beside a step


def device_memory(mesh: Mesh) -> int | None:
    """Bytes that a program can have of each device here, the least of them; None where devices don't tell
    (CPUs)."""
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in mesh.local_devices]
    return None if None in limits else min(limits)


def memory_needed(compiled: jax.stages.Compiled) -> int:
    """Bytes of a device's memory that a compiled program takes: what goes in and comes out, temporaries, its
    code."""
    m = compiled.memory_analysis()
    own = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    return own + m.temp_size_in_bytes + m.generated_code_size_in_bytes


def memory_refused(problem: jax.errors.JaxRuntimeError) -> float:
    """Bytes that a compiler says it would need (∞ where it doesn't say) and has not; raises what is another
    problem."""
    message, units = str(problem), {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    if found := re.search(r"\(?([\d.]+)([KMGT])\)? (?:of [\d.]+[KMGT] hbm|exceeds available HBM)", message):
        return float(found[1]) * units[found[2]]
    if "RESOURCE_EXHAUSTED" in message:
        return math.inf
    raise problem


def first_that_fits(steps: dict[str, Callable], mesh: Mesh, *args) -> str:
    """The first key of {remat: jitted step} whose step, compiled for `args`, fits into the memory of every device.

    UserError: none of them does. Where devices don't tell what they have, the first is taken, and nothing is compiled.
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
        told = f"a step with --remat={remat} needs {size} (by the compiler's count)"
        if all(host["enough"] for host in hosts):
            print(told + fitting(limit, platform), flush=True)
            return remat
        told += f" of a device's {limit / 1e9:.1f} GB"
        print(f"{told}: {'too much' if last else f'more than {SPARE:.0%}'}", flush=True)
    instead = "" if remat == "full" else ", or give --remat=full"
    raise UserError(f"{told}; lower --device_batch_size{instead}")


def fitting(limit: float, platform: str) -> str:
    """The words for a program that fits, after what it needs; on a TPU without `limit`, which does not decide
    there."""
    if platform == "tpu":
        return ", which on TPUs can be more than it takes; it compiled, so it fits"
    return f" of a device's {limit / 1e9:.1f} GB: it fits"


def fits(needed: int, limit: float, platform: str, last: bool) -> bool:
    """Whether a program that was compiled fits; last: nothing that takes less is left to try.

    On a TPU it does: libtpu refuses what doesn't, and its sum of temporaries can exceed what they take at once (18.9 GB
    of a v5e's 16.9).
    """
    return platform == "tpu" or needed <= limit * (1 if last else SPARE)
