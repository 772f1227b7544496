"""The training loop that all stages share. A Stage (stages.py) holds what differs between them."""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh

from jaxchat.config import Preempted
from jaxchat.model.params import Params
from jaxchat.sharding import agree, from_first, place_rows
from jaxchat.store import Checkpoints
from jaxchat.train.metrics import MetricsLog, best_step
from jaxchat.train.reporter import NotFinite, Reporter, Unread
from jaxchat.train.saving import Saver
from jaxchat.train.signals import Interrupted, Stop
from jaxchat.train.stages import Stage
from jaxchat.train.state import TrainState
from jaxchat.train.step import compile_step


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A measurement of the weights every `every` steps and at the end, or never if `every` ≤ 0.

    measure: function from the weights to {name of a measured value: number}.
    at_start: whether to measure before the first step, too.
    best: name of a measured value. The checkpoint where it is largest is kept. "": no best one is kept.
    """

    name: str
    every: int
    measure: Callable[[Params], dict[str, float]]
    at_start: bool = False
    best: str = ""

    def due(self, step: int, finished: bool) -> bool:
        return self.every > 0 and (finished or (step % self.every == 0 if step else self.at_start))


@dataclasses.dataclass(frozen=True)
class Run:
    """A stage that is ready for training, with its jitted step and its initial or restored state."""

    stage: Stage
    state: TrainState  # train donates it to the first step
    step_fn: Callable
    first_step: int  # steps finished before this run
    checkpoints: Checkpoints | None  # None: nothing is written
    meta: dict  # metadata of the run's checkpoints


def train(run: Run, evaluations: list[Evaluation]) -> None:
    """Train to the end of a stage. If an error ends the run, save the state first, if possible.

    Raises Preempted after saving if a signal stopped the run.
    Raises UserError if the loss or gradient of a step was not finite, or if the last save failed.
    """
    with Stop() as stop, MetricsLog.of(run) as log:
        loop = Loop(run, evaluations, stop, log)
        try:
            loop.train()
        except Preempted:
            raise
        except Exception as problem:
            with contextlib.suppress(Exception):  # reporting may be what failed
                loop.reporter.flush()
            if isinstance(problem, Unread) and problem.step <= loop.step:
                loop.go_back(problem.step - 1)
            if not loop.ending:
                # All processes raise NotFinite and Unread, so they can save together. Another error may be
                # raised by this process only.
                loop.saver.rescue(loop.state, loop.step, alone=not isinstance(problem, NotFinite | Unread))
            if loop.read_error:  # why this process could not read its rows
                raise loop.read_error from problem
            raise


class Loop:
    """A training run in progress: its state, step, evaluations, reporter and saver."""

    def __init__(self, run: Run, evaluations: list[Evaluation], stop: Stop, log: MetricsLog):
        self.run, self.stage, self.evaluations, self.stop, self.log = run, run.stage, evaluations, stop, log
        self.reporter, self.saver = Reporter(run.stage, log), Saver(run)
        for evaluation in evaluations if run.checkpoints and run.first_step else ():
            if evaluation.best:
                find = partial(best_step, run.checkpoints.folder, evaluation.best, run.first_step)
                self.saver.restore_best(from_first(find))
        self.state, self.step = run.state, run.first_step
        self.finished = self.step == run.stage.num_steps
        self.ending = False  # the last save is under way
        self.schedule = jax.jit(run.stage.schedule)
        self.batch: dict = {}  # the last step's batch
        self.positions = []  # positions in the data before the last two steps, if several processes train
        self.read_error: Exception | None = None  # why this process, of several, can't read its rows

    def train(self):
        while True:
            stopping = not self.finished and self.stop.requested()
            # Save before the evaluations, which may fail or take too long.
            if self.saver.due(self.step, self.finished or stopping):
                self.reporter.flush()
                self.saver.save(self.state, self.step, stage_finished=self.finished)
                self.reporter.restart_clock()
            stopping = self.evaluate(stopping)
            if self.finished or stopping:
                self.reporter.flush()
                self.ending = True
                self.saver.finish(self.state, self.step, stage_finished=self.finished)
            if stopping:
                outcome = self.saver.stop_message(self.step)
                raise Preempted(f"stopped by {self.stop.signal} after step {self.step}; {outcome}")
            if self.finished:
                return
            self.take_step()

    def take_step(self):
        """Start the next training step without waiting for the devices to finish the previous step."""
        stage, mesh, first = self.stage, self.stage.model.mesh, self.step == self.run.first_step
        started = time.perf_counter()
        batch = self.next_batch()
        numbers = batch.get("numbers", {})  # numbers to log, already on the host
        waited = numbers.get("data_wait_seconds", time.perf_counter() - started)
        example = next(iter(batch["totals"].values()))  # the shape and dtype of all totals
        notes = {"overdue": self.saver.overdue(), "unread": bool(self.read_error)}
        notes = {name: np.full_like(example, value) for name, value in notes.items()}
        totals = agree(batch["totals"] | notes, mesh)
        if stage.num_steps:
            progress = self.step / stage.num_steps
            multiplier = np.float32(stage.schedule(progress, 1 / stage.num_steps))
        else:  # progress of all processes together, an array on the devices that is not waited for
            if first and not int(totals["targets"]):  # resumed at the end of the data
                self.finished = True
                return
            progress = totals["taken"] / stage.num_documents
            multiplier = self.schedule(progress, 0.0)
        placed = place_batch(batch, mesh)
        if first:
            compile_step(self.run.step_fn, self.state, placed, multiplier)
        self.state, metrics = self.run.step_fn(self.state, placed, multiplier)
        self.step += 1
        metrics = metrics | totals | numbers | {"progress": progress, "lr_multiplier": multiplier}
        size = int(numbers.get("computed_tokens", placed["inputs"].size))
        length = placed["inputs"].shape[-1]
        self.saver.note_overdue(self.reporter.step(self.step, size, waited, metrics, length))
        self.finished = self.step == stage.num_steps
        if not stage.num_steps and not batch["totals"]["left"].any():  # others may have rows
            self.finished = not int(totals["left"])

    def evaluate(self, stopping: bool) -> bool:
        """Run the evaluations that are due, unless `stopping`. Return whether the run is to stop now.

        In a run of one process, a signal to stop interrupts an evaluation, because the machine may be lost
        before it ends. The resumed run repeats the evaluation.
        """
        for evaluation in self.evaluations:
            # Whether the evaluation was already made before the run was resumed.
            done = self.step == self.run.first_step and evaluation.name in self.log.evaluated
            if not (stopping or done) and evaluation.due(self.step, self.finished):
                self.reporter.flush()
                try:
                    with self.stop.interruptible():
                        values = evaluation.measure(self.state.params)
                except Interrupted:
                    return True
                self.log.write(self.step, values, evaluation.name)
                if values:
                    shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
                    print(f"step {self.step:>6}  {evaluation.name}: {shown}", flush=True)
                if evaluation.best:
                    self.saver.keep_best(self.state, self.step, values[evaluation.best], self.finished)
                self.reporter.restart_clock()
                stopping = not self.finished and self.stop.requested()
        return stopping

    def next_batch(self) -> dict:
        """Return the batch of the next step.

        If one of several processes can't read its rows, it returns its previous rows with token weights of
        NaN. The others then need not wait for it, no process applies the step, and all raise Unread when the
        step is reported. In RL, or if there are no previous rows, the error is raised at once.
        """
        batches = self.stage.batches
        independent = batches.alone and jax.process_count() > 1
        if independent:
            self.positions = [*self.positions[-1:], batches.get_state()]
        try:
            if not self.read_error:
                self.batch = batches.next_batch(self.state.params, self.step)
        except Unread as problem:
            self.read_error = problem.__cause__
            raise
        except Exception as problem:
            if not independent or not self.batch:
                raise
            self.read_error = problem
            self.batch = self.batch | {"weights": np.full_like(self.batch["weights"], np.nan)}
        return self.batch

    def go_back(self, step: int):
        """Set the step and the data position back to `step`. The later steps have not changed the weights."""
        self.stage.batches.set_state(self.positions[step - self.step])
        self.state = self.state.replace(step=self.state.step - (self.step - step))
        self.step = step


def place_batch(batch: dict, mesh: Mesh) -> dict:
    """Place on the mesh, sharded by rows, the arrays that a step uses: all but "totals" and "numbers"."""
    arrays = {name: array for name, array in batch.items() if name not in ("totals", "numbers")}
    return {name: place_rows(array, mesh) for name, array in arrays.items()}
