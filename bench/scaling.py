"""Step time on paper from 8 to 256 chips: python -m bench.scaling

The step takes the longer of what its products and what its collectives take at the speeds below. Bytes by the formulas
below, which the compiled step is held against: lines of `launch.compile_check --json` in docs/compile_check.jsonl are
drawn as crosses. Writes docs/scaling.png.
"""

import dataclasses
import json
from pathlib import Path

from jaxchat.config import ModelConfig
from jaxchat.model.flops import PEAK_FLOPS, num_params
from launch import cli

CHIPS = (8, 16, 32, 64, 128, 256)
TOKENS, TIME, VOCABULARY = 524288, 2048, 65536  # a step of the specification
ROWS = 8  # that a chip computes at a time, at most
PEAK = PEAK_FLOPS["TPU v5e"]
EFFICIENCY = 0.6  # of the peak that products of this size are taken to reach
LINKS = 100e9  # bytes a second that leave a v5e chip: four links of 400 Gbit/s, taken as half each way (Google's page)
MESHES = {"data": lambda n: (n, 1), "fsdp": lambda n: (1, n), "data × fsdp=8": lambda n: (n // 8, 8)}
FOLDER = Path(__file__).resolve().parent.parent / "docs"


@dataclasses.dataclass(frozen=True)
class Config:
    """Step times of a model on 8 to 256 TPU v5e chips."""

    depth: int = 20
    """Of the model."""


def bytes_sent(model: ModelConfig, data: int, fsdp: int, micro: int) -> float:
    """That leave a chip in a step: rings, in which what is gathered or scattered over n crosses (n − 1)/n times."""
    table = model.vocab_size * model.n_embd
    blocks = num_params(model) - 2 * table
    over_fsdp, over_data = (fsdp - 1) / fsdp, (data - 1) / data
    gathered = 2 * 2 * blocks * over_fsdp * micro  # bfloat16, forward and again backward
    gathered += 2 * 2 * table * over_fsdp
    gradients = (2 * blocks * micro + 4 * 2 * table) * over_fsdp  # blocks' in bfloat16, tables' in float32
    gradients += 2 * (2 * blocks * micro + 4 * 2 * table) / fsdp * over_data  # an all-reduce is two
    shares = min(data, -(-model.n_layer // fsdp))  # Newton–Schulz: float32 in, bfloat16 out, then over data
    muon = (4 + 2) * blocks / fsdp / shares * over_fsdp + 2 * blocks / fsdp * (shares - 1) / shares
    return gathered + gradients + muon


def products(model: ModelConfig, chips: int) -> float:
    """FLOPs of a chip in a step: 6 a weight and token; attention, causal, forward twice and 2.5 × backward; Muon."""
    table, width = model.vocab_size * model.n_embd, model.n_embd
    attention = (2 + 2.5) * 2 * model.n_layer * width * model.sequence_len
    per_layer = 4 * (5 * 6 * width**3) + 2 * ((4 * 8 + 14 * 2) * width**3)  # Newton–Schulz: see train/optimizer.py
    layers = -(-model.n_layer // chips)
    return (6 * (num_params(model) - table) + attention) * TOKENS / chips + layers * per_layer


def seconds(flops: float, sent: float) -> tuple[float, float]:
    """(products, collectives)."""
    return flops / (EFFICIENCY * PEAK), sent / LINKS


def compiled(depth: int) -> list[dict]:
    """What compile_check said of this model."""
    path = FOLDER / "compile_check.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [c for c in lines if c["depth"] == depth and c["fits"]]


def draw(depth: int, times: dict[str, list[tuple[float, float]]], points: list[tuple[int, tuple[float, float]]]):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 5.2), layout="constrained")
    products_only = [t[0] for t in next(iter(times.values()))]
    axes.plot(CHIPS, products_only, "ko-", label="products, on any mesh")
    for name, of_mesh in times.items():
        axes.plot(CHIPS, [t[1] for t in of_mesh], "--", label=f"collectives, {name}")
    if points:
        axes.plot([n for n, _ in points], [t[1] for _, t in points], "kx", label="collectives, compiled")
    axes.set(xscale="log", yscale="log", xlabel="TPU v5e chips", ylabel=f"seconds a step of {TOKENS:,} tokens")
    axes.set_xticks(CHIPS, map(str, CHIPS))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    axes.set_title(f"d{depth} on paper: a step takes the longer of products and collectives")
    speeds = f"Products at {EFFICIENCY:.0%} of {PEAK / 1e12:.0f} TFLOP/s; {LINKS / 1e9:.0f} GB/s leave a chip"
    figure.supxlabel(f"{speeds}; collectives wholly hidden; {ROWS} rows a chip at a time, or fewer.", fontsize=8)
    figure.savefig(FOLDER / "scaling.png", dpi=120)


def run(config: Config):
    FOLDER.mkdir(exist_ok=True)
    model = ModelConfig.from_depth(config.depth, sequence_len=TIME, vocab_size=VOCABULARY)
    times = {name: [] for name in MESHES}
    print(f"{'mesh':<16}" + "".join(f"{n:>16}" for n in CHIPS) + "   chips: products / collectives, ms")
    for name, shape in MESHES.items():
        for chips in CHIPS:
            data, fsdp = shape(chips)
            micro = max(1, TOKENS // TIME // chips // ROWS)
            times[name].append(seconds(products(model, chips), bytes_sent(model, data, fsdp, micro)))
        print(f"{name:<16}" + "".join(f"{1000 * p:>8.0f} /{1000 * c:>6.0f}" for p, c in times[name]))
    points = []
    for one in compiled(config.depth):
        sizes = one["mesh"]
        chips = sizes["data"] * sizes["fsdp"]
        attention = (2 + 2.5) * 2 * model.n_layer * model.n_embd * TIME * TOKENS / chips
        sent, by_formula = (
            sum(one["sent"].values()),
            bytes_sent(model, sizes["data"], sizes["fsdp"], one["micro_batches"]),
        )
        if one["topology"].startswith("v5e"):
            points.append((chips, seconds(one["flops"] + attention, sent)))
        more = f"{sent / 1e9:.2f} GB sent, {by_formula / 1e9:.2f} by the formula"
        flops = f"{one['flops'] + attention:.3e} FLOPs, {products(model, chips):.3e} by the formula"
        print(f"compiled for {one['topology']}, {sizes}, {one['micro_batches']} micro-batches: {more}; {flops}")
    draw(config.depth, times, points)
    print(f"wrote {FOLDER / 'scaling.png'}")


if __name__ == "__main__":
    cli.main(Config, run)
