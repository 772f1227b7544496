"""Step time on paper from 8 to 256 chips: python -m bench.scaling

Compiles the real step ahead of time for each slice and mesh (libtpu is needed, a TPU is not), and takes as its time the
longer of what its products and what its collectives take at the speeds below. Writes docs/scaling.json, from which a
second run goes on, and docs/scaling.png.
"""

import dataclasses
import json
from pathlib import Path

from jaxchat.config import UserError
from jaxchat.model.flops import PEAK_FLOPS
from launch import cli, topologies
from launch.compile_check import Config as Check
from launch.compile_check import Plan

SLICES = {8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
PEAK = PEAK_FLOPS["TPU v5e"]
EFFICIENCY = 0.6  # of the peak that products of this size are taken to reach
LINKS = 100e9  # bytes a second that leave a v5e chip: four links of 400 Gbit/s, half of them each way (Google's pages)
MESHES = {"data": "data=-1", "fsdp": "fsdp=-1", "fsdp=8": "data=-1,fsdp=8"}
FOLDER = Path(__file__).resolve().parent.parent / "docs"


@dataclasses.dataclass(frozen=True)
class Config:
    """Step times of a model on 8 to 256 TPU v5e chips, from compiled programs."""

    depth: int = 20
    """Of the model."""
    device_batch_size: int = 8
    """Rows a chip computes at a time, at most: halved until the step fits the chip."""
    chips: str = "8,16,32,64,128,256"
    """Chips, with commas between; what is in docs/scaling.json is not compiled again."""


def figures(config: Config, chips: int, mesh: str) -> dict | None:
    """{batch, flops, sent bytes} of one device's step; None: it fits with no batch."""
    batch = config.device_batch_size
    while batch:
        check = Check(config.depth, f"v5e:{SLICES[chips]}", mesh=mesh, find_batch=False)
        plan = Plan(check)
        batch = min(batch, plan.most)
        done = plan.compile(batch)
        print(f"{chips} chips, {mesh}, {batch} rows: {done.needs / 1e9:.1f} GB, {done.seconds:.0f} s", flush=True)
        if done.fits:
            model, tokens = plan.model, check.total_batch_size / chips
            # The kernels of attention, causal: forward twice (once again in the backward pass), and 2.5 × backward.
            attention = (2 + 2.5) * 2 * model.n_layer * model.n_embd * model.sequence_len * tokens
            flops, sent = done.program.flops + attention, done.program.sent()
            return {"device_batch_size": batch, "flops": flops, "sent": sent, "needs": done.needs}
        batch //= 2
    return None


def seconds(one: dict) -> tuple[float, float]:
    """(compute, collectives) of a step."""
    return one["flops"] / (EFFICIENCY * PEAK), sum(one["sent"].values()) / LINKS


def draw(found: dict, depth: int):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 5.2), layout="constrained")
    for mesh in MESHES:
        points = sorted(
            (int(key.split()[1]), seconds(one)) for key, one in found.items() if one and key.split()[2] == mesh
        )
        if points:
            chips, times = zip(*points, strict=True)
            (line,) = axes.plot(chips, [max(t) for t in times], "o-", label=f"{mesh}: the step")
            axes.plot(chips, [t[1] for t in times], ":", color=line.get_color(), label=f"{mesh}: its collectives")
    axes.set(xscale="log", yscale="log", xlabel="TPU v5e chips", ylabel="seconds a step of 524,288 tokens")
    ticks = sorted(SLICES)
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title(f"d{depth} on paper: step = max(products, collectives)")
    figure.supxlabel(
        f"Products at {EFFICIENCY:.0%} of {PEAK / 1e12:.0f} TFLOP/s; {LINKS / 1e9:.0f} GB/s leave a chip;\n"
        "collectives wholly hidden behind products; FLOPs and bytes from the compiled step.",
        fontsize=8,
    )
    figure.savefig(FOLDER / "scaling.png", dpi=120)


def run(config: Config):
    topologies.compile_only()
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / "scaling.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    chosen = [int(n) for n in config.chips.split(",") if n]
    if unknown := set(chosen) - set(SLICES):
        raise UserError(f"--chips={config.chips}: {unknown.pop()} is not one of {', '.join(map(str, SLICES))}")
    for chips in chosen:
        for name, mesh in MESHES.items():
            key = f"d{config.depth} {chips} {name}"
            if key not in found:
                found[key] = figures(config, chips, mesh)
                path.write_text(json.dumps(found, indent=1) + "\n")
    mine = {key: one for key, one in found.items() if key.startswith(f"d{config.depth} ")}
    for key, one in mine.items():
        if one:
            compute, collectives = seconds(one)
            rows = f"{key:<16} {one['device_batch_size']:>3} rows"
            print(f"{rows}  products {compute:.3f} s  collectives {collectives:.3f} s")
    draw(mine, config.depth)
    print(f"wrote {FOLDER / 'scaling.png'}")


if __name__ == "__main__":
    cli.main(Config, run)
