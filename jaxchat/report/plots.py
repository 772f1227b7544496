"""Plot curves of runs as PNG images: one image per metric, with one panel per stage that logged it."""

import dataclasses
import io

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jaxchat.config import STAGES
from jaxchat.report.gather import Run, StageRun, tokens_of

SMOOTH = 0.02  # fraction of the steps over which a point of the dark line is averaged
POINTS = 2000  # maximum number of points of a training curve; more would not be visible

Images = dict[str, tuple[str, bytes]]  # {file name: (title, PNG)}

# {file name: (title, key in the rows of steps, key in the rows of evaluations)}
CURVES = {
    "loss": ("Loss, nats per token", "loss", "val_loss"),
    "reward": ("Reward of sampled answers, and pass@1", "reward", "pass@1"),
    "groups": ("Fraction of problems with both right and wrong answers", "groups_mixed", None),
    "answer_tokens": ("Sampled tokens per answer", "answer_tokens", None),
    "entropy": ("Entropy, nats per sampled token", "entropy", None),
    "lr": ("Learning rate multiplier", "lr_multiplier", None),
    "bpb": ("Validation, bits per byte", None, "val_bpb"),
    "core": ("CORE", None, "core"),
    "tokens_per_s": ("Tokens per second", "tokens_per_s", None),
}
FROM_ZERO = ("reward", "groups", "answer_tokens", "lr", "tokens_per_s")


@dataclasses.dataclass(frozen=True)
class Line:
    """A curve in a panel. of_steps: True for a metric of steps, drawn smoothed; False for evaluations."""

    label: str
    xy: np.ndarray  # [N, 2]
    of_steps: bool
    color: np.ndarray | None = None  # None: the default, for a report on one run


def curves(runs: list[Run]) -> Images:
    """Plot each metric, with all runs on the same axes. Return {file name: (title, PNG)}.

    The x axis shows the step for one run, and the tokens trained on so far for several runs.
    """
    alone = len(runs) == 1
    colors = [None] if alone else np.resize(colormaps["tab10"](range(10)), (len(runs), 4))
    images = {}
    for name, (title, *keys) in CURVES.items():
        panels = []
        for stage, info in STAGES.items():
            lines = []
            for run, color in zip(runs, colors, strict=True):
                labels = ("training", "validation") if alone else (run.tag, f"{run.tag}, validation")
                for key, label in zip(keys, labels, strict=True) if stage in run.stages else ():
                    xy = (points if alone else by_tokens)(run.stages[stage], key)
                    lines += [Line(label, xy, key == keys[0], color)] if len(xy) else []
            if lines:
                panels.append((info.label, lines))
        if panels:
            unit = "step" if alone else "tokens"
            images[f"{name}.png"] = title, figure(panels, unit, from_zero=name in FROM_ZERO)
    return images


def points(stage: StageRun, key: str) -> np.ndarray:
    """Return the logged (step, value) pairs [N, 2] of the metric `key` whose values are finite."""
    found = [(row["step"], row[key]) for row in stage.rows if isinstance(row.get(key), int | float)]
    array = np.array(found, np.float64).reshape(-1, 2)
    return array[np.isfinite(array[:, 1])]


def by_tokens(stage: StageRun, key: str) -> np.ndarray:
    """Return (tokens trained on so far, value) pairs [N, 2] of the metric `key`."""
    xy = points(stage, key)
    seen = np.cumsum([0, *(tokens_of(row) for row in stage.steps)])
    steps = [0, *(row["step"] for row in stage.steps)]
    return np.stack([np.interp(xy[:, 0], steps, seen), xy[:, 1]], axis=1)


def figure(panels: list[tuple[str, list[Line]]], unit: str, *, from_zero: bool) -> bytes:
    """Draw panels side by side, each given as (title, curves). Return a PNG.

    unit: label of the x axis. from_zero: whether the y axis starts at 0.
    """
    drawing = Figure(figsize=(10, 2.7), layout="constrained")
    axes = drawing.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, lines) in zip(axes, panels, strict=True):
        for line in lines:
            draw(axis, line)
        if len(lines) > 1 or lines[0].color is not None:
            axis.legend(frameon=False, fontsize=8)
        if from_zero:
            axis.set_ylim(bottom=0)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(unit, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return png_of(drawing)


def draw(axis, line: Line):
    thin = slice(None, None, max(1, -(-len(line.xy) // POINTS)))
    own = line.color is None
    if line.of_steps:
        if own:  # with several runs, the noisy lines would hide the smooth ones
            axis.plot(*line.xy[thin].T, color="#9db7d5", linewidth=0.8)
        color = "#1f4e8c" if own else line.color
        axis.plot(*smoothed(line.xy)[thin].T, color=color, linewidth=1.4, label=line.label)
    else:
        color = "#c2571a" if own else line.color
        axis.plot(*line.xy.T, color=color, marker="o", markersize=3.5, linewidth=1, label=line.label)


def png_of(drawing: Figure) -> bytes:
    png = io.BytesIO()
    drawing.savefig(png, format="png", dpi=144, metadata={"Software": None})
    return png.getvalue()


def smoothed(xy: np.ndarray) -> np.ndarray:
    """Smooth the values of (x, value) pairs [N, 2] by a centred moving average, narrower near the ends."""
    half = int(SMOOTH * len(xy) / 2)
    sums = np.concatenate([[0.0], np.cumsum(xy[:, 1])])
    at = np.arange(len(xy))
    reach = np.minimum(half, np.minimum(at, len(xy) - 1 - at))
    return np.stack([xy[:, 0], (sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1)], axis=1)
