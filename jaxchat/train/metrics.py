"""Where a run's numbers go: JSON lines beside the checkpoints; Weights & Biases and TensorBoard where
asked."""

import contextlib
import importlib.util
import json
import math
import os
import resource
import sys
from pathlib import Path

import jax

from jaxchat import files
from jaxchat.config import UserError
from jaxchat.store import FULL


def check_installed(*, run: str, tensorboard: bool):
    """UserError unless what the flags ask for can be imported; to be called before anything is written."""
    for asked, module, extra in ((run != "dummy", "wandb", "wandb"), (tensorboard, "tensorboardX", "tensorboard")):
        if asked and importlib.util.find_spec(module) is None:
            flag = f"--run={run}" if module == "wandb" else "--tensorboard"
            raise UserError(f"{flag} needs {module}: pip install 'jaxchat[{extra}]'")


def peak_bytes() -> int:
    """The most memory used so far: of the first device here where it keeps count (GPU, TPU), else of the
    process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    unit = 1 if sys.platform == "darwin" else 1024
    return stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class MetricsLog:
    """`metrics.jsonl` of a run: one object a line, each with its `step`. folder None: nothing is written."""

    def __init__(self, folder: Path | None, config: dict, *, resume_step: int, run: str, tensorboard: bool):
        self._file = self._wandb = self._board = None
        self._unwritten = b""  # what did not fit on a full disk
        if jax.process_index() > 0:  # all processes have the same numbers
            return
        if run != "dummy":
            import wandb

            self._wandb = wandb.init(project="jaxchat", name=run, config=config)
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        if path.exists():  # what was logged after the checkpoint that training goes on from will be logged again
            logged = path.read_text().splitlines(keepends=True) if resume_step else []
            kept = [line for line in logged if _step_of(line) <= resume_step]
            files.write_text(path, "".join(kept))
        self._file = path.open("ab", buffering=0)
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"))

    @classmethod
    @contextlib.contextmanager
    def of(cls, run):
        """The log of a loop.Run, closed at the end of the context."""
        flags, folder = run.stage.flags, run.checkpoints.folder if run.checkpoints else None
        log = cls(folder, run.meta, resume_step=run.first_step, run=flags.run, tensorboard=flags.tensorboard)
        try:
            yield log
        finally:
            log.close()

    def write(self, step: int, values: dict[str, float]):
        if self._file:
            known = {name: value if math.isfinite(value) else None for name, value in values.items()}
            self._unwritten += json.dumps({"step": step, **known}).encode() + b"\n"
            self._write()
        if self._wandb:
            self._wandb.log(values, step=step)
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def _write(self):
        """All that is not written yet, or nothing: a full disk costs no step, and no line is cut."""
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


def _step_of(line: str) -> float:
    """The step of a line; a line that a kill cut short belongs to no step."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")
