"""What more devices bring, on paper: python -m bench.scaling --depth=20 --topologies=v5e:2x4,v5e:4x4,v5e:8x8

Compile base training's step for each topology, without having one (as launch.compile_check does), and
compare what a device computes with what it sends. Needs the extra tpu or gpu-plan.
"""

import dataclasses
import json

from jaxchat.config import flag
from launch import cli, compile_check


@dataclasses.dataclass(frozen=True)
class Config:
    """Print how much of each device's time is left for computing, by the number of devices.

    Assumed: every part takes the least time that its FLOPs or its bytes allow, collectives run at the links'
    rates (jaxchat/plan/roofline.py), and nothing hides them: computing slower, or at the same time, raises
    the efficiency.
    """

    depth: int = flag(20, 1)
    """Number of layers."""
    topologies: str = "h100:8,h100:2x8,h100:4x8,h100:8x8,h100:16x8,h100:32x8"
    """Devices to compile for, as in launch.compile_check, separated by commas."""
    device_tokens: int = flag(65536, 1)
    """Tokens of a step for each device, so that a step grows with the devices; 0: 524288 tokens a step."""
    device_batch_size: int = flag(-1, 1, special=-1)
    """Rows that a device computes at a time; -1: as many as divide a step evenly, at most 32."""
    remat: str = "auto"
    """What the backward pass recomputes, as in launch.compile_check."""
    json: bool = False
    """Print the figures as one JSON object in the last line."""


def run(config: Config):
    from jaxchat.plan import step, topologies

    topologies.compile_only()
    rows = []
    print(f"{'devices':<14} {'rows':>10} {'remat':<6} {'computing':>10} {'sending':>10} {'efficiency':>10}")
    for topology in config.topologies.split(","):
        devices = len(topologies.devices_of(topology)[0])
        tokens = config.device_tokens * devices or 524288
        size = {"depth": config.depth, "topology": topology, "total_batch_size": tokens}
        how = {"device_batch_size": config.device_batch_size, "remat": config.remat}
        plan = step.StepPlan(compile_check.Config(**size, **how))
        done = plan.fit(plan.batch)
        if not done.program:
            print(f"{topology:<14} does not fit")
            continue
        found = plan.bounds(done)
        sending = found["collectives"].seconds
        computing = sum(bound.seconds for bound in found.values()) - sending
        efficiency = computing / (computing + sending)
        row = {"topology": topology, "devices": devices, "tokens": tokens, "remat": done.remat}
        rows.append(row | {"computing": computing, "sending": sending, "efficiency": efficiency})
        cut = f"{plan.batch} × {plan.accumulated}"
        times = f"{1e3 * computing:>7.0f} ms {1e3 * sending:>7.0f} ms"
        print(f"{topology:<14} {cut:>10} {done.remat:<6} {times} {efficiency:>10.0%}", flush=True)
    if config.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    cli.main(Config, run)
