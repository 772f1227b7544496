"""Plot the curves of a run as PNG images: one a quantity, with a panel for each stage that has it."""

import io

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jaxchat.config import STAGES
from jaxchat.report.gather import Run, StageRun

SMOOTH = 0.02  # a point of the dark line is a mean over about this share of the steps
POINTS = 2000  # of a line; more would not be visible

# file name → (title, name in the steps' rows, name in the evaluations' rows)
CURVES = {
    "loss": ("Loss, nats per token", "loss", "val_loss"),
    "reward": ("Reward of sampled answers, and pass@1", "reward", "pass@1"),
    "groups": ("Problems with right and wrong answers, share", "groups_mixed", None),
    "answer_tokens": ("Sampled tokens of an answer", "answer_tokens", None),
    "entropy": ("Entropy, nats per sampled token", "entropy", None),
    "lr": ("Learning rate multiplier", "lr_multiplier", None),
    "bpb": ("Validation, bits per byte", None, "val_bpb"),
    "core": ("CORE", None, "core"),
    "tokens_per_s": ("Tokens per second", "tokens_per_s", None),
}
FROM_ZERO = ("reward", "groups", "answer_tokens", "lr", "tokens_per_s")


def curves(run: Run) -> dict[str, tuple[str, bytes]]:
    """Plot every quantity that some stage has: {file name: (title, PNG)}."""
    images = {}
    for name, (title, trained, measured) in CURVES.items():
        drawn = []
        for stage in run.stages.values():
            lines = [(points(stage, key), key == trained) for key in (trained, measured) if key]
            lines = [(xy, of_steps) for xy, of_steps in lines if len(xy)]
            if lines:
                drawn.append((STAGES[stage.name].label, lines))
        if drawn:
            images[f"{name}.png"] = title, figure(drawn, from_zero=name in FROM_ZERO)
    return images


def points(stage: StageRun, key: str) -> np.ndarray:
    """Steps and values [N, 2], where a finite number was logged."""
    found = [(row["step"], row[key]) for row in stage.rows if isinstance(row.get(key), int | float)]
    array = np.array(found, np.float64).reshape(-1, 2)
    return array[np.isfinite(array[:, 1])]


def figure(panels: list, *, from_zero: bool) -> bytes:
    """Draw panels, each (title, [(points [N, 2], whether a point a step)]), as one PNG."""
    drawing = Figure(figsize=(10, 2.7), layout="constrained")
    axes = drawing.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, lines) in zip(axes, panels, strict=True):
        for xy, of_steps in lines:
            if of_steps:
                thin = xy[:: -(-len(xy) // POINTS)]
                axis.plot(thin[:, 0], thin[:, 1], color="#9db7d5", linewidth=0.8)
                smooth = smoothed(xy)[:: -(-len(xy) // POINTS)]
                axis.plot(smooth[:, 0], smooth[:, 1], color="#1f4e8c", linewidth=1.5, label="training")
            else:
                axis.plot(xy[:, 0], xy[:, 1], color="#c2571a", marker="o", markersize=3.5, label="validation")
        if len(lines) > 1:
            axis.legend(frameon=False, fontsize=8)
        finish(axis, title, "step", from_zero=from_zero)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return png_of(drawing)


def finish(axis, title: str, unit: str, *, from_zero: bool):
    """Give a panel its title, unit and grid."""
    if from_zero:
        axis.set_ylim(bottom=0)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(unit, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def png_of(drawing: Figure) -> bytes:
    png = io.BytesIO()
    drawing.savefig(png, format="png", dpi=144, metadata={"Software": None})
    return png.getvalue()


def smoothed(xy: np.ndarray) -> np.ndarray:
    """Replace each value by the mean of a window centred on it, narrower at both ends."""
    half = int(SMOOTH * len(xy) / 2)
    sums = np.concatenate([[0.0], np.cumsum(xy[:, 1])])
    at = np.arange(len(xy))
    reach = np.minimum(half, np.minimum(at, len(xy) - 1 - at))
    return np.stack([xy[:, 0], (sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1)], axis=1)
