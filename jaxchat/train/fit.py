"""How much of a device's memory a step takes, and the least recomputation with which it fits."""

import re
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from jaxchat.config import UserError
from jaxchat.sharding import gather_json

SPARE = 0.95  # of the memory a program can have: pools leave gaps, and the next batch waits beside the step


def device_memory(mesh: Mesh) -> int | None:
    """Bytes that a program can have of each device here, the least of them; None where devices don't tell (CPUs)."""
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in mesh.local_devices]
    return None if None in limits else min(limits)


def memory_needed(compiled: jax.stages.Compiled) -> int:
    """Bytes of a device's memory that a compiled program takes: what goes in and comes out, temporaries, its code."""
    m = compiled.memory_analysis()
    own = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    return own + m.temp_size_in_bytes + m.generated_code_size_in_bytes


def memory_refused(message: str) -> int | None:
    """Bytes that a compiler's complaint about memory says are needed; None of another complaint."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    if found := re.search(r"\(?([\d.]+)([KMGT])\)? (?:of [\d.]+[KMGT] hbm|exceeds available HBM)", message):
        return round(float(found[1]) * units[found[2]])
    return None


def first_that_fits(steps: dict[str, Callable], mesh: Mesh, *args) -> str:
    """The first key of {remat: jitted step} whose step, compiled for `args`, fits into the memory of every device.

    UserError: none of them does. Where devices don't tell what they have, the first is taken, and nothing is compiled.
    """
    limit = device_memory(mesh)
    if limit is None:
        return next(iter(steps))
    for remat, step in steps.items():
        try:
            needed = memory_needed(step.lower(*args).compile())
        except jax.errors.JaxRuntimeError as problem:
            needed = memory_refused(str(problem))
            if needed is None:
                raise
        hosts = gather_json({"needed": needed, "limit": limit})
        fits = all(host["needed"] <= SPARE * host["limit"] for host in hosts)
        told = f"{needed / 1e9:.1f} GB of each device's {min(host['limit'] for host in hosts) / 1e9:.1f} GB"
        print(f"A step with --remat={remat} needs {told}{'' if fits else ': too much'}", flush=True)
        if fits:
            return remat
    instead = "" if remat == "full" else ", or give --remat=full"
    raise UserError(f"a step with --remat={remat} needs {told}; lower --device_batch_size{instead}")
