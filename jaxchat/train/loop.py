"""The one training loop. What differs between stages is in the Stage that it is given."""

import dataclasses
import time
from collections.abc import Callable

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from jaxchat.checkpoint import Checkpoints
from jaxchat.config import ModelConfig
from jaxchat.model.flops import flops_per_token, peak_flops
from jaxchat.model.params import Params
from jaxchat.sharding import agree, place_rows
from jaxchat.train.metrics import MetricsLog, check_installed
from jaxchat.train.state import TrainState

UNTOLD = ("taken", "left", "targets")  # totals that only the loop needs


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Something measured while training: every `every` steps (≤ 0: never), at the end, and, if at_start, before all."""

    name: str
    every: int
    run: Callable[[Params], dict[str, float]]
    at_start: bool = False

    def due(self, step: int, first: int, finished: bool) -> bool:
        """Whether to measure after `step` steps, of which `first` were done when this run was resumed."""
        if self.every <= 0 or (step == first and step > 0):
            return False
        return finished or (step % self.every == 0 if step else self.at_start)


@dataclasses.dataclass
class Stage:
    """A stage of training as data."""

    title: str
    tag: str
    plan: list[tuple[str, str]]
    model: ModelConfig
    mesh: Mesh
    start: Callable[[], TrainState]  # the state to begin with; sets `batches` too where a run is resumed
    step_fn: Callable
    batches: grain.DatasetIterator
    num_steps: int | None  # None: one pass over num_documents
    num_documents: int
    lr_multiplier: Callable  # of progress and one step's share of it
    meta: dict  # what a checkpoint tells of itself
    checkpoints: Checkpoints | None  # None: nothing is written
    save_every: int
    keep_state: bool  # checkpoints hold optimizer and data position, to be resumed from
    resume_step: int
    run: str
    tensorboard: bool


def place_batch(batch: dict, mesh: Mesh) -> dict:
    """The arrays of a batch on the mesh, its rows spread over the devices."""
    return {name: place_rows(array, mesh, axis=1) for name, array in batch.items() if name != "totals"}


def train(stage: Stage, evaluations: list[Evaluation]) -> dict[str, float]:
    """Run a stage to its end. -> the last value of every evaluation."""
    folder = stage.checkpoints.folder if stage.checkpoints else None
    check_installed(run=stage.run, tensorboard=stage.tensorboard)
    state = stage.start()
    log = MetricsLog(folder, stage.meta, resume_step=stage.resume_step, run=stage.run, tensorboard=stage.tensorboard)
    reporter = Reporter(stage, log)
    lr_multiplier = jax.jit(stage.lr_multiplier)
    step, results, saved = stage.resume_step, {}, stage.resume_step
    finished = step == stage.num_steps
    try:
        while True:
            try:
                for evaluation in evaluations:
                    if evaluation.due(step, stage.resume_step, finished):
                        reporter.flush()
                        values = evaluation.run(state.params)
                        if values:
                            results |= values
                            log.write(step, values)
                            shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
                            print(f"step {step:>6}  {evaluation.name}: {shown}", flush=True)
                        reporter.restart_clock()
            finally:  # an evaluation that fails must not cost the steps before it
                wanted = finished or (stage.save_every > 0 and step % stage.save_every == 0)
                if stage.checkpoints and step > saved and wanted:
                    reporter.flush()
                    save(stage, state, step, results)
                    saved = step
                    reporter.restart_clock()
            if finished:
                reporter.flush()
                break
            asked = time.perf_counter()
            batch = next(stage.batches)
            waited = time.perf_counter() - asked
            # Nothing of this waits for the devices: they still compute the step before, and the copies overlap with it.
            totals = agree(batch["totals"], stage.mesh)
            if stage.num_steps:
                progress = step / stage.num_steps
                multiplier = np.float32(stage.lr_multiplier(progress, 1 / stage.num_steps))
            else:  # as far as all hosts together are; a number on the devices that no host waits for
                if step == stage.resume_step and not int(totals["targets"]):  # resumed where the data had ended
                    finished = True
                    continue
                progress = totals["taken"] / stage.num_documents
                multiplier = lr_multiplier(progress, 0.0)
            placed = place_batch(batch, stage.mesh)
            state, metrics = stage.step_fn(state, placed, multiplier)
            step += 1
            metrics = metrics | totals | {"progress": progress, "lr_multiplier": multiplier}
            reporter.step(step, placed["inputs"].size, waited, metrics)
            finished = step == stage.num_steps
            if not stage.num_steps and not batch["totals"]["left"].any():  # this process's rows have run out: all?
                finished = not int(totals["left"])
    finally:
        stage.batches.close()
        log.close()
        if stage.checkpoints:
            stage.checkpoints.close()
    return results


def save(stage: Stage, state: TrainState, step: int, results: dict[str, float]):
    rest = {"step": state.step, "empty_steps": state.empty_steps, "opt_state": state.opt_state}
    stage.checkpoints.save(
        step,
        params=state.params,
        optimizer=rest if stage.keep_state else None,
        batches=stage.batches if stage.keep_state else None,
        meta=stage.meta | {"step": step, "metrics": results},
    )


class Reporter:
    """Step lines and metrics, one step late: the numbers of a step are fetched when the next one is under way."""

    def __init__(self, stage: Stage, log: MetricsLog):
        self._stage, self._log = stage, log
        self._pending = None
        self._shown = float("-inf")
        self._reported = 0
        self._spent = 0.0  # seconds in steps after the first, which compiles
        self._first_progress = 0.0  # before the second
        peak = peak_flops(stage.mesh.devices.flat[0])
        self._peak = peak * stage.mesh.size if peak else None
        self.restart_clock()

    def restart_clock(self):
        self._clock = time.perf_counter()

    def step(self, step: int, tokens: int, waited: float, metrics: dict):
        """tokens: of all processes; waited: seconds until the data was there; metrics: arrays still under way."""
        previous, self._pending = self._pending, (step, tokens, waited, metrics)
        if previous:
            self._report(*previous)

    def flush(self):
        if self._pending:
            self._report(*self._pending, last=True)
            self._pending = None

    def _report(self, step, tokens, waited, metrics, last=False):
        values = {name: float(value) for name, value in jax.device_get(metrics).items() if name not in UNTOLD}
        progress = values["progress"]
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        eta = self._eta(progress)
        if self._reported:
            self._spent += seconds
        self._reported += 1
        tokens_per_s = tokens / seconds
        values |= {"step_seconds": seconds, "tokens_per_s": tokens_per_s, "data_wait_seconds": waited}
        if self._peak:
            values["mfu"] = tokens_per_s * flops_per_token(self._stage.model) / self._peak
        self._log.write(step, values)
        if not last and now - self._shown < 1.0:
            return
        self._shown = now
        of = f"/{self._stage.num_steps}" if self._stage.num_steps else f" ({progress:.0%})"
        line = f"step {step:>6}{of}  loss {values['loss']:.4f}  lr × {values['lr_multiplier']:.3f}"
        line += f"  {1000 * seconds:.0f} ms  {tokens_per_s:,.0f} tokens/s"
        if self._peak:
            line += f"  MFU {values['mfu']:.1%}"
        if values["empty_steps"]:
            line += f"  empty steps {values['empty_steps']:.0f}"
        if waited > 0.01 * seconds:
            line += f"  waited {1000 * waited:.0f} ms for data"
        if eta is not None:
            line += f"  ETA {duration(eta)}"
        print(line, flush=True)

    def _eta(self, progress: float) -> float | None:
        """Seconds left after the step that began at `progress`, at the pace of the steps between the first and it."""
        if self._reported == 1:
            self._first_progress = progress
        steps, done = self._reported - 1, progress - self._first_progress
        return self._spent / done * max(0.0, 1 - progress - done / steps) if steps > 0 and done > 0 else None


def duration(seconds: float) -> str:
    """1h02m, 3m20s or 12s."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"
