"""Where a run's numbers go: JSON lines beside the checkpoints; Weights & Biases and TensorBoard where asked."""

import importlib.util
import json
from pathlib import Path

from jaxchat.config import UserError


def check_installed(*, run: str, tensorboard: bool):
    """UserError unless what the flags ask for can be imported; to be called before anything is written."""
    for asked, module, extra in ((run != "dummy", "wandb", "wandb"), (tensorboard, "tensorboardX", "tensorboard")):
        if asked and importlib.util.find_spec(module) is None:
            flag = f"--run={run}" if module == "wandb" else "--tensorboard"
            raise UserError(f"{flag} needs {module}: pip install 'jaxchat[{extra}]'")


class MetricsLog:
    """`metrics.jsonl` of a run: one object a line, each with its `step`. folder None: nothing is written."""

    def __init__(self, folder: Path | None, config: dict, *, resume_step: int, run: str, tensorboard: bool):
        self._file = self._wandb = self._board = None
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
            fresh = path.with_suffix(".new")
            fresh.write_text("".join(kept))
            fresh.replace(path)
        self._file = path.open("a")
        if tensorboard:
            from tensorboardX import SummaryWriter

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
