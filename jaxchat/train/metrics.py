"""Log a run's numbers to metrics.jsonl and, depending on flags, to Weights & Biases and TensorBoard."""

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
from jaxchat.config import UserError, how_to_install
from jaxchat.sharding import from_first
from jaxchat.store import FULL


def check_installed(*, run: str, tensorboard: bool):
    """Raise UserError if a wanted logger is not installed. Weights & Biases is wanted unless run="dummy"."""
    for wanted, module, extra in (
        (run != "dummy", "wandb", "wandb"),
        (tensorboard, "tensorboardX", "tensorboard"),
    ):
        if wanted and importlib.util.find_spec(module) is None:
            flag = f"--run={run}" if module == "wandb" else "--tensorboard"
            raise UserError(f"{flag} needs {module}: {how_to_install(extra)}")


def peak_bytes() -> int:
    """Return the peak memory use of the first local device, or of the process on a CPU, in bytes."""
    stats = jax.local_devices()[0].memory_stats() or {}
    unit = 1 if sys.platform == "darwin" else 1024
    return stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class MetricsLog:
    """The log of a run: metrics.jsonl and, depending on flags, Weights & Biases and TensorBoard.

    folder: where to write files. None: write none.
    config: metadata of the run for Weights & Biases.
    resume_step: last step whose lines in metrics.jsonl are kept. 0: keep no lines.
    run: name at Weights & Biases. "dummy": do not log there.
    """

    def __init__(self, folder: Path | None, config: dict, *, resume_step: int, run: str, tensorboard: bool):
        self._file = self._wandb = self._board = None
        self._unwritten = b""  # lines that could not be written because the disk is full
        self.evaluated: list[str] = []  # evaluations already made at resume_step
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
        """Context manager that opens the MetricsLog of a loop.Run and closes it at the end."""
        flags, folder = run.stage.flags, run.checkpoints.folder if run.checkpoints else None
        done = []
        if folder and run.first_step:
            done = from_first(lambda: evaluations_at(run.first_step, folder))
        log = cls(folder, run.meta, resume_step=run.first_step, run=flags.run, tensorboard=flags.tensorboard)
        log.evaluated = done
        try:
            yield log
        finally:
            log.close()

    def write(self, step: int, values: dict[str, float], evaluation: str = ""):
        """Log the values of a step. evaluation: name of the evaluation that measured them, if any."""
        if self._file:
            named = {"evaluation": evaluation} if evaluation else {}
            known = {name: value if math.isfinite(value) else None for name, value in values.items()}
            self._unwritten += json.dumps({"step": step, **named, **known}).encode() + b"\n"
            self._flush()
        if self._wandb and values:
            self._wandb.log(values, step=step)
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def _flush(self):
        """Append the buffered lines to the file. If the disk is full, keep them and leave no partial line."""
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
            self._flush()
        if self._unwritten:
            print("metrics.jsonl lacks its last lines: the disk is full", flush=True)
        for sink in (self._file, self._board):
            if sink:
                sink.close()
        if self._wandb:
            self._wandb.finish()


def evaluations_at(step: int, folder: Path) -> list[str]:
    """Return the names of the evaluations that metrics.jsonl in `folder` records at `step`."""
    rows = files.read_lines(folder / "metrics.jsonl")
    return [row["evaluation"] for row in rows if row.get("step") == step and "evaluation" in row]


def best_step(folder: Path, name: str, last: int) -> tuple[int, float] | None:
    """Return the step up to `last` where evaluations measured the largest value of `name`, and that value.

    Returns None if metrics.jsonl in `folder` has no such value.
    """
    rows = [row for row in files.read_lines(folder / "metrics.jsonl") if "evaluation" in row]
    found = [(row["step"], row[name]) for row in rows if row["step"] <= last and row.get(name) is not None]
    return max(found, key=lambda one: one[1]) if found else None


def wandb_id(folder: Path, new: bool) -> str:
    """Return the run's id at Weights & Biases, stored in `folder`. new: whether to create a new id first."""
    path = folder / "wandb_id"
    if new or not path.exists():
        files.write_text(path, secrets.token_hex(8))
    return path.read_text(encoding="ascii")


def _step_of(line: str) -> float:
    """Return the step in a line of metrics.jsonl, or ∞ if the line is incomplete."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")
