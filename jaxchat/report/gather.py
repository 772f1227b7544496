"""Read a run's metadata, logs and evaluations from its folders, and derive the report's numbers."""

import contextlib
import dataclasses
import json
import statistics
from pathlib import Path

from jaxchat import checkpoint
from jaxchat.config import STAGES, ModelConfig, UserError, base_dir
from jaxchat.eval.results import read_json
from jaxchat.files import read_lines
from jaxchat.model.flops import flops_per_token, num_params
from jaxchat.report.record import FILE

LAST = 20  # steps that the reported training loss is a mean of


@dataclasses.dataclass(frozen=True)
class StageRun:
    """One stage of a run, read from its folder."""

    name: str
    folder: Path
    step: int  # of its last checkpoint
    meta: dict
    rows: list[dict]  # lines of metrics.jsonl, in order
    runs: list[dict]  # lines of runs.jsonl: one for each time it was trained, unless it was killed
    measured: dict[str, float]  # results of evaluations, during training and afterwards
    left_out: list[str]  # files of evaluations that are not in `measured`, and why

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(**self.meta["model"])

    @property
    def parent(self) -> str:
        return self.meta.get("parent") or ("imported" if "imported" in self.meta else "random weights")

    @property
    def steps(self) -> list[dict]:
        """The rows of optimizer steps."""
        return [row for row in self.rows if "step_seconds" in row]

    @property
    def tokens(self) -> int:
        """Tokens computed in training, padding included."""
        return sum(tokens_of(row) for row in self.steps)

    @property
    def flops(self) -> float:
        """FLOPs of its steps. Where an old log lacks them, all rows count as long as the model's context."""
        per_token = flops_per_token(self.model)
        return sum(row.get("step_flops", tokens_of(row) * per_token) for row in self.steps)

    @property
    def step_seconds(self) -> float:
        return sum(row["step_seconds"] for row in self.steps)

    @property
    def wall_seconds(self) -> float:
        """Wall time of all times that it was trained, start-up and evaluations included; at least the steps' sum."""
        return max(self.step_seconds, sum(run["seconds"] for run in self.runs))

    def median(self, name: str) -> float | None:
        values = [row[name] for row in self.steps if isinstance(row.get(name), float)]
        return statistics.median(values) if values else None


@dataclasses.dataclass(frozen=True)
class Run:
    """The stages that exist for one tag, in order."""

    tag: str
    stages: dict[str, StageRun]
    compression: dict[str, dict]  # for each text, what tok_eval measured of this run's tokenizer; {}: not measured

    @property
    def lacking(self) -> list[str]:
        return [stage.label for name, stage in STAGES.items() if name not in self.stages]

    @property
    def parameters(self) -> int:
        return num_params(next(iter(self.stages.values())).model)


def gather(model_tag: str = "") -> Run:
    """The run of a tag; without a tag, of the model that chat would take. UserError: there is none."""
    if not model_tag:
        for source in reversed(STAGES):
            with contextlib.suppress(UserError):
                model_tag = checkpoint.find(source, items=["meta"])[0].name
                break
        else:
            checkpoint.find("base", items=["meta"])  # raises, with what to do
    stages = {source: read_stage(source, model_tag) for source in STAGES}
    found = {source: stage for source, stage in stages.items() if stage}
    if not found:
        there = sorted({path.name for path in checkpoint.runs()})
        have = f"there are: {', '.join(there)}" if there else "train one with: python -m launch.base_train"
        raise UserError(f"no checkpoint of any stage is named {model_tag}; {have}")
    measured = read_json(base_dir() / "tokenizer" / "tok_eval.json")
    hashes = {stage.meta.get("tokenizer_hash") for stage in found.values()}
    return Run(model_tag, found, measured.get("texts", {}) if measured.get("tokenizer_hash") in hashes else {})


def read_stage(source: str, tag: str) -> StageRun | None:
    folder = checkpoint.run_folder(source, tag)
    steps = checkpoint.whole_steps(folder, ["meta"])
    if not steps:
        return None
    meta = checkpoint.read_meta(folder, steps[-1])
    rows = read_lines(folder / "metrics.jsonl")
    measured, evaluated, settings, left_out = {}, {}, {}, []
    losses = [row["loss"] for row in rows if isinstance(row.get("loss"), float)][-LAST:]  # None: not finite
    if losses:
        measured["loss"] = statistics.fmean(losses)
    measured |= numbers({"metrics": meta.get("metrics")})
    files = []
    for path in sorted(folder.glob("*.json")) + sorted((folder / str(steps[-1])).glob("*.json")):
        try:
            about = json.loads(path.read_text())
            if about.get("step", steps[-1]) == steps[-1]:
                files.append((items(about), path, numbers(about), settings_of(about)))
            else:
                left_out.append(f"{path.name}, of step {about['step']}")
        except (OSError, ValueError, AttributeError, TypeError, OverflowError):
            left_out.append(f"{path.name}, which cannot be read")
    # Of the files of one command, the one with the most items decides the settings: only equal ones are
    # comparable.
    for _, path, found, own in sorted(files, key=lambda file: -file[0]):
        first = settings.setdefault(path.stem.partition(f"_{steps[-1]}")[0], own)
        if differ := [name for name in first | own if own.get(name) != first.get(name)]:
            settings_shown = ", ".join(f"{name}={own.get(name)} (not {first.get(name)})" for name in differ)
            left_out.append(f"{path.name}, made with {settings_shown}")
        else:
            evaluated = found | evaluated
    measured |= evaluated
    return StageRun(source, folder, steps[-1], meta, rows, read_lines(folder / FILE), measured, left_out)


def tokens_of(row: dict) -> int:
    """Tokens computed in a step, from its row of metrics.jsonl."""
    return round(row["tokens_per_s"] * row["step_seconds"])


def items(evaluation: dict) -> int:
    """Number of items in all tasks of an evaluation."""
    return sum(task.get("items", 0) for task in (evaluation.get("tasks") or {}).values())


def settings_of(evaluation: dict) -> dict:
    """The settings that an evaluation's figures depend on; which tasks were asked for is not one."""
    return {name: value for name, value in (evaluation.get("settings") or {}).items() if name != "tasks"}


def numbers(evaluation: dict) -> dict[str, float]:
    """The numbers in an evaluation's file, by name: its `metrics` or `values`, and the accuracy of each of `tasks`."""
    accuracies = {name: task.get("accuracy") for name, task in (evaluation.get("tasks") or {}).items()}
    found = (evaluation.get("metrics") or {}) | (evaluation.get("values") or {}) | accuracies
    return {str(name): float(value) for name, value in found.items() if isinstance(value, int | float)}
