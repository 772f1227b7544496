"""Read a run's metadata, logs and evaluations from its folders, and derive the report's numbers."""

import contextlib
import dataclasses
import json
import re
import statistics
from pathlib import Path

from jaxchat import checkpoint
from jaxchat.config import STAGES, ModelConfig, UserError, base_dir
from jaxchat.files import read_json, read_lines
from jaxchat.model.flops import flops_per_token
from jaxchat.report.record import FILE

LAST = 20  # steps over which the reported training loss or reward is averaged


@dataclasses.dataclass(frozen=True)
class StageRun:
    """One stage of training (base, mid, SFT or RL), as read from its folder of checkpoints and logs."""

    name: str
    folder: Path
    step: int  # training step of the last complete checkpoint
    meta: dict
    rows: list[dict]  # lines of metrics.jsonl, in order
    runs: list[dict]  # lines of runs.jsonl: one for each start of the trainer that was not killed
    measured: dict[str, float]  # training loss or reward, and results of evaluations, by name
    left_out: list[str]  # evaluation results that are not in `measured`, and why
    sampled: list[str]  # evaluations on a sample of each task's items, with the sample's size
    eval_seconds: float  # wall time of the evaluations after training, over all checkpoints
    answers: list[dict]  # lines of samples.jsonl, written by reinforcement learning

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(**self.meta["model"])

    @property
    def parent(self) -> str:
        return self.meta.get("parent") or ("imported" if "imported" in self.meta else "random weights")

    @property
    def steps(self) -> list[dict]:
        """The lines of metrics.jsonl that log optimizer steps."""
        return [row for row in self.rows if "step_seconds" in row]

    @property
    def tokens(self) -> int:
        """Number of tokens computed in training, including padding."""
        return sum(tokens_of(row) for row in self.steps)

    @property
    def flops(self) -> float:
        """Total FLOPs of training. A step that did not log its FLOPs is estimated from its tokens."""
        per_token = flops_per_token(self.model)
        return sum(row.get("step_flops", tokens_of(row) * per_token) for row in self.steps)

    @property
    def step_seconds(self) -> float:
        return sum(row["step_seconds"] for row in self.steps)

    @property
    def wall_seconds(self) -> float:
        """Wall time of training in seconds: of all recorded runs or all logged steps, whichever is longer."""
        # A trainer that was killed leaves no record, but its steps are logged.
        return max(self.step_seconds, sum(run["seconds"] for run in self.runs))

    def share(self, name: str) -> float | None:
        """Fraction of step time spent on `name`, such as "data_wait_seconds". None: not logged."""
        spent = [row[name] for row in self.steps if name in row]
        return sum(spent) / self.step_seconds if spent else None

    def median(self, name: str) -> float | None:
        values = [row[name] for row in self.steps if isinstance(row.get(name), float)]
        return statistics.median(values) if values else None


@dataclasses.dataclass(frozen=True)
class Run:
    """All trained stages with the same model tag, in the order of training, and the tokenizer's results."""

    tag: str
    stages: dict[str, StageRun]
    compression: dict[str, dict]  # {text: results of tok_eval on it}; {}: not measured
    tokenizer_seconds: float  # wall time of training the tokenizer; 0: not recorded

    @property
    def lacking(self) -> list[str]:
        return [s.label for name, s in STAGES.items() if name not in self.stages and not s.optional]

    @property
    def model(self) -> ModelConfig:
        return next(iter(self.stages.values())).model


def gather(model_tag: str = "") -> Run:
    """Read all stages of a model. Raise UserError if no stage has a checkpoint.

    model_tag: "" selects a tag of the last stage that has checkpoints: d<N> with the largest N, or the newest
    tag if none has this form.
    """
    if not model_tag:
        for source in reversed(STAGES):
            with contextlib.suppress(UserError):
                model_tag = checkpoint.find(source, items=["meta"])[0].name
                break
        else:
            checkpoint.find("base", items=["meta"])  # raises a UserError that says what to do
    stages = {source: read_stage(source, model_tag) for source in STAGES}
    found = {source: stage for source, stage in stages.items() if stage}
    if not found:
        there = sorted({path.name for path in checkpoint.runs()})
        have = f"there are: {', '.join(there)}" if there else "train one with: python -m launch.base_train"
        raise UserError(f"no checkpoint of any stage is named {model_tag}; {have}")
    hashes = {stage.meta.get("tokenizer_hash") for stage in found.values()}
    folder = base_dir() / "tokenizer"
    measured, trained = (read_json(folder / name) for name in ("tok_eval.json", "tokenizer.json"))
    compression = measured.get("texts", {}) if measured.get("tokenizer_hash") in hashes else {}
    seconds = trained.get("training_seconds", 0.0) if trained.get("hash") in hashes else 0.0
    return Run(model_tag, found, compression, seconds)


def read_stage(source: str, tag: str) -> StageRun | None:
    folder = checkpoint.run_folder(source, tag)
    steps = checkpoint.whole_steps(folder, ["meta"])
    if not steps:
        return None
    step = steps[-1]
    meta = checkpoint.read_meta(folder, step)
    rows = read_lines(folder / "metrics.jsonl")
    for row in rows:
        if "reward" in row:  # the loss of a policy gradient does not measure progress
            row.pop("loss", None)
    measured = {}
    for name in ("loss", "reward"):
        values = [row[name] for row in rows if isinstance(row.get(name), float)][-LAST:]  # None: not finite
        if values:
            measured[name] = statistics.fmean(values)
    measured |= results_of({"metrics": meta.get("metrics")})
    evaluated, left_out, sampled, seconds = read_evaluations(folder, step)
    runs = read_lines(folder / FILE)
    answers = [row for row in read_lines(folder / "samples.jsonl") if row.get("answers")]
    measured |= evaluated
    return StageRun(source, folder, step, meta, rows, runs, measured, left_out, sampled, seconds, answers)


def read_evaluations(folder: Path, step: int) -> tuple[dict[str, float], list[str], list[str], float]:
    """Read the results of evaluations of the checkpoint at `step`.

    Return ({name: result}, messages about omitted results, messages about evaluations on a sample, seconds).
    The seconds are the total time of the evaluations of all checkpoints in the folder.
    """
    found, left_out, seconds, older = [], [], 0.0, {}
    for path in sorted(folder.glob("*.json")) + sorted((folder / str(step)).glob("*.json")):
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            seconds += about.get("seconds", 0.0)
            command = re.sub(r"_\d+(_[0-9a-f]+)?$", "", path.stem)
            if about.get("step", step) == step:
                figures = results_of(about)
                if warning := about.get("warning"):  # base_eval warns if the validation shard was trained on
                    figures.pop("val_bpb", None)
                    left_out.append(f"val_bpb of {path.name}: {warning}")
                if cropped := about.get("cropped"):
                    tasks = ", ".join(f"{task} ({count} items)" for task, count in cropped.items())
                    left_out.append(f"the beginnings of CORE's longest prompts, in {tasks}")
                found.append((item_count(about), command, path.name, figures, settings_of(about)))
            else:
                older[command] = f"{path.name}, of step {about['step']}"
        except (OSError, ValueError, AttributeError, TypeError, OverflowError):
            left_out.append(f"{path.name}, which cannot be read")
    commands = {command for _, command, *_ in found}
    left_out += [reason for command, reason in older.items() if command not in commands]
    # A command's file with the most items decides the settings; results with other settings do not compare.
    evaluated, settings = {}, {}
    for _, command, name, figures, own in sorted(found, key=lambda file: -file[0]):
        first = settings.setdefault(command, own)
        if differ := [key for key in first | own if own.get(key) != first.get(key)]:
            shown = ", ".join(f"{key}={own.get(key)} (not {first.get(key)})" for key in differ)
            left_out.append(f"{name}, made with {shown}")
        else:
            evaluated = figures | evaluated
    sizes = {"CORE": settings.get("base_eval", {}).get("max_per_task")}
    sizes["chat tasks"] = settings.get("chat_eval", {}).get("max_problems")
    sampled = [f"{name}, at most {size:,} a task" for name, size in sizes.items() if (size or 0) > 0]
    return evaluated, left_out, sampled, seconds


def tokens_of(row: dict) -> int:
    """Return the number of tokens of a step, including padding. row: the step's line of metrics.jsonl."""
    return round(row["tokens_per_s"] * row["step_seconds"])


def item_count(evaluation: dict) -> int:
    """Return the total number of items over all tasks of an evaluation."""
    return sum(task.get("items", 0) for task in (evaluation.get("tasks") or {}).values())


def settings_of(evaluation: dict) -> dict:
    """Return an evaluation's settings that affect its results, except the list of tasks."""
    return {name: value for name, value in (evaluation.get("settings") or {}).items() if name != "tasks"}


def results_of(evaluation: dict) -> dict[str, float]:
    """Return all numbers in an evaluation by name, including the accuracy of each task."""
    accuracies = {name: task.get("accuracy") for name, task in (evaluation.get("tasks") or {}).items()}
    found = (evaluation.get("metrics") or {}) | (evaluation.get("values") or {}) | accuracies
    return {str(name): float(value) for name, value in found.items() if isinstance(value, int | float)}
