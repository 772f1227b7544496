"""The one training loop. What differs between stages is in the Stage that it is given."""

import dataclasses
import time
from collections.abc import Callable

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from jaxchat.config import ModelConfig, Preempted
from jaxchat.model.params import Params
from jaxchat.sharding import agree, place_rows
from jaxchat.store import Checkpoints
from jaxchat.train.metrics import MetricsLog, check_installed
from jaxchat.train.reporter import Reporter
from jaxchat.train.saving import Saver
from jaxchat.train.signals import Stop
from jaxchat.train.state import TrainState
from jaxchat.train.step import compile_step


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
    start: Callable[[], TrainState]  # the state to begin with; sets `batches` where a run is resumed, and meta["remat"]
    step_fns: dict[str, Callable]  # by their remat: the first that fits is taken
    batches: grain.DatasetIterator
    num_steps: int | None  # None: one pass over num_documents
    num_documents: int
    lr_multiplier: Callable  # of progress and one step's share of it
    meta: dict  # what a checkpoint tells of itself
    checkpoints: Checkpoints | None  # None: nothing is written
    save_every: int
    keep_state: bool  # the last checkpoint, too, holds optimizer and data position
    resume_step: int
    run: str
    tensorboard: bool
    on_nonfinite: str = "stop"  # or skip
    at_end: Callable[[], None] = lambda: None  # called once training has begun and has ended, in whichever way


def place_batch(batch: dict, mesh: Mesh) -> dict:
    """The arrays of a batch on the mesh, its rows spread over the devices."""
    return {name: place_rows(array, mesh, axis=1) for name, array in batch.items() if name != "totals"}


def train(stage: Stage, evaluations: list[Evaluation]) -> dict[str, float]:
    """Run a stage to its end. -> the last value of every evaluation.

    Preempted: a signal asked to stop, and what was learnt is saved. UserError: a step was not finite, or the end of the
    run could not be saved.
    """
    with Stop() as stop:
        return _train(stage, evaluations, stop)


def _train(stage: Stage, evaluations: list[Evaluation], stop: Stop) -> dict[str, float]:
    folder = stage.checkpoints.folder if stage.checkpoints else None
    check_installed(run=stage.run, tensorboard=stage.tensorboard)
    state = start(stage)
    step_fn = stage.step_fns[stage.meta["remat"]]
    log = MetricsLog(folder, stage.meta, resume_step=stage.resume_step, run=stage.run, tensorboard=stage.tensorboard)
    reporter = Reporter(stage, log)
    lr_multiplier = jax.jit(stage.lr_multiplier)
    step, results = stage.resume_step, {}
    saver = Saver(stage)
    finished = step == stage.num_steps
    try:
        while True:
            stopping = not finished and stop.asked()
            if saver.due(step, finished or stopping):  # first: an evaluation may fail, or outlast a notice to stop
                reporter.flush()
                saver.save(state, step, finished=finished)
                reporter.restart_clock()
            for evaluation in evaluations:
                if not stopping and evaluation.due(step, stage.resume_step, finished):
                    reporter.flush()
                    values = evaluation.run(state.params)
                    if values:
                        results |= values
                        log.write(step, values)
                        shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
                        print(f"step {step:>6}  {evaluation.name}: {shown}", flush=True)
                    reporter.restart_clock()
                    stopping = not finished and stop.asked()
            if finished or stopping:
                reporter.flush()
                saver.finish(state, step, finished=finished)
            if finished:
                break
            if stopping:
                raise Preempted(f"stopped by {stop.signal} after step {step}; {saver.told(step)}")
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
            if step == stage.resume_step:
                compile_step(step_fn, state, placed, multiplier)
            state, metrics = step_fn(state, placed, multiplier)
            step += 1
            metrics = metrics | totals | {"progress": progress, "lr_multiplier": multiplier}
            reporter.step(step, placed["inputs"].size, waited, metrics, placed["inputs"].shape[-1])
            finished = step == stage.num_steps
            if not stage.num_steps and not batch["totals"]["left"].any():  # this process's rows have run out: all?
                finished = not int(totals["left"])
    finally:
        stage.batches.close()
        log.close()
        stage.at_end()
        if stage.checkpoints:
            stage.checkpoints.close()
    return results


def start(stage: Stage) -> TrainState:
    try:
        return stage.start()
    except BaseException:
        if stage.checkpoints:  # let go of the run's folder
            stage.checkpoints.close()
        raise
