"""Two or more runs side by side: results and training of each stage, curves on one axis, samples."""

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from jaxchat.config import STAGES
from jaxchat.files import duration
from jaxchat.model.flops import flops_per_token, num_params
from jaxchat.report.document import escape, fence, number, percent, table
from jaxchat.report.gather import Run, StageRun, tokens_of
from jaxchat.report.plots import CURVES, finish, png_of, points, smoothed
from jaxchat.report.samples import Samples


def markdown(
    runs: list[Run],
    images: dict[str, tuple[str, bytes]],
    samples: dict[str, Samples],
    price_per_hour: float = 0,
) -> str:
    """The page. images: {file name: (title, PNG)}; samples: of each run, by its tag; {}: none."""
    tags = [run.tag for run in runs]
    parts = [f"# {escape(', '.join(tags))}: runs of jaxchat side by side", models(runs)]
    for name, info in STAGES.items():
        having = [run for run in runs if name in run.stages]
        if having:
            stages = [run.stages[name] for run in having]
            title = f"## {info.label}"
            parts += [title, results(having, stages), training(having, stages, price_per_hour)]
        if having and len(having) < len(runs):
            parts.append(f"Without a checkpoint: {', '.join(run.tag for run in runs if run not in having)}.")
    parts.append("## Curves")
    parts += [f"### {title}\n\n![{title}]({name})" for name, (title, _) in images.items()]
    if not images:
        parts.append("No step was logged.")
    parts += samples_text(samples)
    return "\n\n".join(part for part in parts if part) + "\n"


def models(runs: list[Run]) -> str:
    configs = [next(iter(run.stages.values())).model for run in runs]
    rows = [
        ["parameters", *(f"{num_params(model):,}" for model in configs)],
        ["layers × width", *(f"{model.n_layer} × {model.n_embd}" for model in configs)],
        ["vocabulary", *(f"{model.vocab_size:,}" for model in configs)],
        ["tokens of context", *(f"{model.sequence_len:,}" for model in configs)],
        ["FLOPs a token", *(f"{flops_per_token(model):,}" for model in configs)],
    ]
    return table(["", *(run.tag for run in runs)], rows)


def results(runs: list[Run], stages: list[StageRun]) -> str:
    names = dict.fromkeys(name for stage in stages for name in stage.measured)
    rows = [[name, *(number(stage.measured.get(name)) for stage in stages)] for name in names]
    return table(["", *(run.tag for run in runs)], rows)


def training(runs: list[Run], stages: list[StageRun], price_per_hour: float) -> str:
    shown = {
        "last checkpoint": lambda stage: f"step {stage.step:,}",
        "starts from": lambda stage: stage.parent,
        "tokens": lambda stage: f"{stage.tokens:,}",
        "FLOPs": lambda stage: f"{stage.flops:.2e}",
        "tokens/s, median": lambda stage: number(stage.median("tokens_per_s")),
        "MFU, median": lambda stage: percent(stage.median("mfu")),
        "training": lambda stage: duration(stage.wall_seconds),
        "evaluations": lambda stage: duration(stage.eval_seconds),
    }
    if price_per_hour:
        name = f"cost, at {price_per_hour:g} an hour"
        shown[name] = lambda s: f"{(s.wall_seconds + s.eval_seconds) / 3600 * price_per_hour:,.2f}"
    rows = [[name, *(value(stage) for stage in stages)] for name, value in shown.items()]
    rows += different_flags(stages)
    return table(["", *(run.tag for run in runs)], rows)


def different_flags(stages: list[StageRun]) -> list[list[str]]:
    """Rows of the flags in which the stages' last runs differ, "–" where one had the default."""
    flags = [stage.runs[-1].get("flags", {}) if stage.runs else {} for stage in stages]
    names = sorted({name for given in flags for name in given} - {"model_tag", "resume", "overwrite"})
    rows = [[f"--{name}", *(str(given.get(name, "–")) for given in flags)] for name in names]
    return [row for row in rows if len(set(row[1:])) > 1]


def curves(runs: list[Run]) -> dict[str, tuple[str, bytes]]:
    """Plot every quantity, all runs on one axis, a panel a stage: {file name: (title, PNG)}."""
    colors = colormaps["tab10"](range(10))
    images = {}
    for name, (title, trained, measured) in CURVES.items():
        panels = []
        for stage in STAGES:
            lines = []
            for run, color in zip(runs, np.resize(colors, (len(runs), 4)), strict=True):
                if stage in run.stages:
                    for key in filter(None, (trained, measured)):
                        xy = by_tokens(run.stages[stage], key)
                        lines += [(run.tag, color, xy, key == trained)] if len(xy) else []
            if lines:
                panels.append((STAGES[stage].label, lines))
        if panels:
            images[f"{name}.png"] = title, figure(panels, from_zero=name in ("lr", "tokens_per_s"))
    return images


def by_tokens(stage: StageRun, key: str) -> np.ndarray:
    """Tokens trained on and values [N, 2], where a finite number was logged."""
    xy = points(stage, key)
    seen = np.cumsum([0, *(tokens_of(row) for row in stage.steps)])
    steps = [0, *(row["step"] for row in stage.steps)]
    return np.stack([np.interp(xy[:, 0], steps, seen), xy[:, 1]], axis=1)


def figure(panels: list, *, from_zero: bool) -> bytes:
    """Draw panels, each (title, [(tag, color, points [N, 2], whether a point a step)]), as one PNG."""
    drawing = Figure(figsize=(10, 3), layout="constrained")
    axes = drawing.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, lines) in zip(axes, panels, strict=True):
        for tag, color, xy, of_steps in lines:
            line = smoothed(xy) if of_steps else xy
            style = {"linewidth": 1.3} if of_steps else {"marker": "o", "markersize": 3.5, "linewidth": 0.8}
            axis.plot(*line.T, color=color, label=tag if of_steps else f"{tag}, validation", **style)
        axis.legend(frameon=False, fontsize=7)
        finish(axis, title, "tokens", from_zero=from_zero)
    return png_of(drawing)


def samples_text(samples: dict[str, Samples]) -> list[str]:
    """What each run says to the same beginnings and questions."""
    said: dict[str, list[tuple[str, str]]] = {}
    for tag, of in samples.items():
        for text, continuation in of.continued:
            said.setdefault(f"{text} …", []).append((tag, continuation.strip()))
        for question, answers in of.answered:
            said.setdefault(f"user: {question}", []).extend(
                (f"{tag}, {STAGES[stage].label}", answer) for stage, answer in answers.items()
            )
    if not said:
        return []
    blocks = []
    for beginning, lines in said.items():
        width = max(len(who) for who, _ in lines) + 1
        blocks.append(fence("\n".join([beginning, *(f"{who + ':':<{width}} {text}" for who, text in lines)])))
    return ["## Samples", *blocks]
