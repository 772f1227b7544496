"""Where a run's numbers go: JSON lines beside the checkpoints; Weights & Biases and TensorBoard where asked."""

import json
from pathlib import Path

from jaxchat.config import UserError


class MetricsLog:
    """`metrics.jsonl` of a run: one object a line, each with its `step`. folder None: nothing is written."""

    def __init__(self, folder: Path | None, config: dict, *, resume_step: int, run: str, tensorboard: bool):
        self._file = self._wandb = self._board = None
        if run != "dummy":
            try:
                import wandb
            except ImportError as missing:
                raise UserError(f"--run={run} needs wandb: pip install 'jaxchat[wandb]'") from missing
            self._wandb = wandb.init(project="jaxchat", name=run, config=config)
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        if path.exists():  # what was logged after the checkpoint that training goes on from will be logged again
            kept = [line for line in path.read_text().splitlines(keepends=True) if _step_of(line) <= resume_step]
            fresh = path.with_suffix(".new")
            fresh.write_text("".join(kept))
            fresh.replace(path)
        self._file = path.open("a")
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError as missing:
                raise UserError("--tensorboard needs tensorboardX: pip install 'jaxchat[tensorboard]'") from missing
            self._board = SummaryWriter(str(folder / "tensorboard"))

    def write(self, step: int, values: dict[str, float]):
        if self._file:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        if self._wandb:
            self._wandb.log(values, step=step)
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self):
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
