"""Log a run's numbers to metrics.jsonl and, if flags ask for them, to Weights & Biases and TensorBoard."""

import contextlib
import importlib.util
import json
import math
import os
import resource
import secrets
import sys
from pathlib import Path

import jax

from jaxchat import files
from jaxchat.config import UserError
from jaxchat.sharding import gather_json
from jaxchat.store import FULL


def check_installed(*, run: str, tensorboard: bool):
    """Raise UserError unless the loggers that the flags ask for are installed."""
    for asked, module, extra in (
        (run != "dummy", "wandb", "wandb"),
        (tensorboard, "tensorboardX", "tensorboard"),
    ):
        if asked and importlib.util.find_spec(module) is None:
            flag = f"--run={run}" if module == "wandb" else "--tensorboard"
            raise UserError(f"{flag} needs {module}: pip install -e '.[{extra}]' in jaxchat's folder")


def peak_bytes() -> int:
    """Peak memory use, in bytes, of the first local device or, if it reports none (CPU), of the process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    unit = 1 if sys.platform == "darwin" else 1024
    return stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class MetricsLog:
    """A run's log: metrics.jsonl and, if flags ask for them, Weights & Biases and TensorBoard.

    folder: where files are written; None: no files. resume_step: lines of later steps are deleted.
    """

    def __init__(self, folder: Path | None, config: dict, *, resume_step: int, run: str, tensorboard: bool):
        self._file = self._wandb = self._board = None
        self._unwritten = b""  # lines that could not be written because the disk is full
        self.measured: list[str] = []  # evaluations already made after resume_step
        if jax.process_index() > 0:  # all processes have the same numbers, so one logs
            return
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        if run != "dummy":
            import wandb

            identity = {"id": wandb_id(folder, new=not resume_step), "resume": "allow"} if folder else {}
            self._wandb = wandb.init(project="jaxchat", name=run, config=config, **identity)
        if folder is None:
            return
        path = folder / "metrics.jsonl"
        if path.exists():  # drop what was logged after resume_step, since it will be logged again
            text = path.read_text(encoding="utf-8", errors="replace") if resume_step else ""
            kept = [line for line in text.splitlines(keepends=True) if _step_of(line) <= resume_step]
            files.write_text(path, "".join(kept))
        self._file = path.open("ab", buffering=0)
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)

    @classmethod
    @contextlib.contextmanager
    def of(cls, run):
        """A context with the MetricsLog of a loop.Run, which is closed at the end."""
        flags, folder = run.stage.flags, run.checkpoints.folder if run.checkpoints else None
        done = evaluations_after(run.first_step, folder) if folder and run.first_step else []
        log = cls(folder, run.meta, resume_step=run.first_step, run=flags.run, tensorboard=flags.tensorboard)
        log.measured = gather_json({"done": done})[0]["done"]  # as the first process sees it
        try:
            yield log
        finally:
            log.close()

    def write(self, step: int, values: dict[str, float], evaluation: str = ""):
        """Log {name: number} of a step. evaluation: name of the evaluation that measured them, if any."""
        if self._file:
            named = {"evaluation": evaluation} if evaluation else {}
            known = {name: value if math.isfinite(value) else None for name, value in values.items()}
            self._unwritten += json.dumps({"step": step, **named, **known}).encode() + b"\n"
            self._write()
        if self._wandb and values:
            self._wandb.log(values, step=step)
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def _write(self):
        """Append all buffered lines; on a full disk, keep them in the buffer and leave no partial line."""
        end = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(self._unwritten) == len(self._unwritten):
                self._unwritten = b""
                return
        except OSError as problem:
            if problem.errno not in FULL:
                raise
        os.ftruncate(self._file.fileno(), end)

    def close(self):
        if self._unwritten:
            self._write()
        if self._unwritten:
            print("metrics.jsonl lacks its last lines: the disk is full", flush=True)
        for sink in (self._file, self._board):
            if sink:
                sink.close()
        if self._wandb:
            self._wandb.finish()


def evaluations_after(step: int, folder: Path) -> list[str]:
    """Names of the evaluations after step `step` that metrics.jsonl in `folder` records."""
    rows = files.read_lines(folder / "metrics.jsonl")
    return [row["evaluation"] for row in rows if row.get("step") == step and "evaluation" in row]


def best_step(folder: Path, name: str, last: int) -> tuple[int, float] | None:
    """Return (step, value) of the largest logged `name` up to step `last`; None if it was never logged."""
    rows = [row for row in files.read_lines(folder / "metrics.jsonl") if "evaluation" in row]
    found = [(row["step"], row[name]) for row in rows if row["step"] <= last and row.get(name) is not None]
    return max(found, key=lambda one: one[1]) if found else None


def wandb_id(folder: Path, new: bool) -> str:
    """Return the run's id at Weights & Biases, which `folder` keeps. new: replace it by a new id."""
    path = folder / "wandb_id"
    if new or not path.exists():
        files.write_text(path, secrets.token_hex(8))
    return path.read_text(encoding="ascii")


def _step_of(line: str) -> float:
    """Return the step in a line of metrics.jsonl; ∞ for a line that a killed process left incomplete."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")
