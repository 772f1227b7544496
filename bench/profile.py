"""Show where a training step's time goes, by part of the model and by operation: python -m bench.profile
--depth=4

Profiles a few warm steps with jax.profiler and adds up what the device spent on each operation of the
compiled program, whose metadata names the part (a named scope in the code) and the direction it came from.
"""

import collections
import dataclasses
import os
import re
import tempfile
from pathlib import Path

import jax
import numpy as np

from bench.step import Shape, parse_way, prepare
from jaxchat import sharding
from launch import cli

CONTAINERS = ("while", "call", "conditional")  # their time is that of the operations in them
PARTS = ("projections", "attention", "mlp", "loss", "optimizer")


@dataclasses.dataclass(frozen=True)
class Config(Shape):
    """Profile training steps on random tokens."""

    way: str = ""
    """Fields of Compute to change from this backend's defaults: "attention=xla remat=full"."""
    top: int = 15
    """Operations to list, the longest first."""


def part_of(op_name: str) -> str:
    """ "attention, backward" of an operation's path through the traced functions and named scopes."""
    part = next((part for part in PARTS if re.search(rf"[/(]{part}[/)]", op_name)), "the rest")
    if part in ("loss", "optimizer", "the rest"):  # the loss computes its gradients with its value
        return part
    return f"{part}, {'backward' if 'transpose(' in op_name else 'forward'}"


def operations(hlo: str) -> dict[str, str]:
    """{operation: its path} of a compiled program's text."""
    found = re.findall(
        r"^\s*(?:ROOT )?%?([\w.-]+) = .*?metadata=\{[^}]*op_name=\"([^\"]*)\"", hlo, re.MULTILINE
    )
    return dict(found)


def device_events(folder: str):
    """(operation, nanoseconds) of what ran on devices while the profile was taken."""
    path = max(Path(folder).rglob("*.xplane.pb"))
    planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
    on_device = [plane for plane in planes if plane.name.startswith("/device:")]
    for plane in on_device or planes:  # a CPU is the host
        lines = [line for line in plane.lines if line.name == "XLA Ops"]
        lines = lines or plane.lines  # a TPU has lines of others too
        for event in (event for line in lines for event in line.events):
            yield str(dict(event.stats).get("hlo_op", event.name)), event.duration_ns


def run(config: Config):
    sharding.keep_compiled()
    # A GPU's kernels that are launched together, as a graph, have no names of operations.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer="
    step, state, batch, _ = prepare(config, parse_way(config.way), config.batch)
    compiled = step.lower(state, batch, np.float32(1.0)).compile()
    paths = operations(compiled.as_text())
    for _ in range(config.warmup):
        state, _ = compiled(state, batch, np.float32(1.0))
    jax.block_until_ready(state)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(config.steps):
                state, _ = compiled(state, batch, np.float32(1.0))
            jax.block_until_ready(state)
        by_operation = collections.Counter()
        for name, nanoseconds in device_events(folder):
            if name in paths and not name.startswith(CONTAINERS):
                by_operation[name] += nanoseconds
    by_part = collections.Counter()
    for name, nanoseconds in by_operation.items():
        by_part[part_of(paths[name])] += nanoseconds
    total = sum(by_part.values())
    cli.print_plan("Profile", [("device", jax.devices()[0].device_kind), ("steps", str(config.steps))])
    for title, counts in (("part", by_part), ("operation", by_operation)):
        print(f"\n{title:<34} {'ms a step':>10} {'share':>6}")
        for name, nanoseconds in counts.most_common(config.top):
            where = f"  {paths[name]}" if title == "operation" else ""
            print(f"{name:<34} {nanoseconds / 1e6 / config.steps:10.2f} {nanoseconds / total:6.1%}{where}")


if __name__ == "__main__":
    cli.main(Config, run)
