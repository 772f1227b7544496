"""Save the checkpoints of a run when they are due. A failed save is retried while training continues."""

import math
import time

import jax

from jaxchat.checkpoint import first_line
from jaxchat.config import UserError
from jaxchat.train.state import TrainState

clock = time.monotonic  # a module-level name, which tests replace
MOST_STEPS_BETWEEN = 64  # largest number of steps between attempts after failures
LAST_ATTEMPTS = 4  # attempts at the end of a run, 1, 2 and 4 seconds apart


class Saver:
    """Save checkpoints of a run when they are due, and retry failed saves. In a dry run, do nothing."""

    def __init__(self, run):
        self._run, self._stage, self._checkpoints = run, run.stage, run.checkpoints
        self._saved = self._begun = run.first_step  # last step that was saved, and whose save was begun
        self._failures, self._retry_step = 0, None  # the step after which a failed save is retried
        self._saved_at, self._overdue = clock(), False  # overdue: all processes agree to save now
        self._best = -math.inf  # largest value of the evaluation that decides which checkpoint is kept

    def due(self, step: int, last: bool) -> bool:
        """Check on the save in progress, and return whether to save now. last: whether the run ends here."""
        if not self._checkpoints:
            return False
        # Any Exception is a failed save: Orbax and TensorStore raise many kinds if a disk is full.
        try:
            if self._checkpoints.poll() and self._begun > self._saved:
                self._succeeded()
        except Exception as problem:
            self._failed(step, problem)
        if step <= self._begun:
            return False
        every = self._stage.flags.save_every
        by_steps = every > 0 and step % every == 0
        retry = self._retry_step is not None and step >= self._retry_step
        return last or by_steps or self._overdue or retry

    def overdue(self) -> bool:
        """Return whether --save_minutes have passed since the last save began, by this process's clock."""
        minutes = self._stage.flags.save_minutes
        return bool(self._checkpoints) and 0 < 60 * minutes <= clock() - self._saved_at

    def note_overdue(self, values: dict[str, float]):
        """Make a save due if a step's metrics say that --save_minutes have passed on any process."""
        self._overdue = self._overdue or values.get("overdue", 0) > 0

    def save(self, state: TrainState, step: int, *, stage_finished: bool):
        """Start to save the state. If this fails, print the error and retry after a later step."""
        try:
            self._start(state, step, stage_finished)
        except Exception as problem:
            self._failed(step, problem)

    def keep_best(self, state: TrainState, step: int, value: float, stage_finished: bool):
        """If `value` is the largest so far, keep this step's checkpoint as the best. Save it if necessary."""
        if not self._checkpoints or not value > self._best:
            return
        self._best = value
        if step:
            self._checkpoints.kept = step
            if self._begun < step and not stage_finished:  # a finished run saves it anyway
                self.save(state, step, stage_finished=stage_finished)

    def restore_best(self, found: tuple[int, float] | None):
        """Restore which step was best, and its value, before the run was resumed. None: there was none."""
        if self._checkpoints and found:
            self._checkpoints.kept, self._best = found

    def finish(self, state: TrainState, step: int, *, stage_finished: bool):
        """Save the last state and wait until it is saved. Raise UserError if LAST_ATTEMPTS attempts fail.

        stage_finished: whether the stage is at its end, where only weights are saved unless Stage.keep_state.
        """
        if not self._checkpoints:
            return
        for attempt in range(LAST_ATTEMPTS):
            try:
                if self._begun < step:
                    self._start(state, step, stage_finished)
                self._checkpoints.wait()
                return self._succeeded()
            except Exception as problem:
                self._failed(step, problem, quiet=True)
                if attempt == LAST_ATTEMPTS - 1:
                    place = f"step {self._saved}" if self._saved else "the start"
                    raise UserError(
                        f"{self._checkpoints.folder / str(step)} could not be saved: {first_line(problem)}; "
                        f"free disk space or repair the folder, then continue with --resume from {place}"
                    ) from problem
                print(f"saving step {step} failed: {first_line(problem)}; trying again", flush=True)
                time.sleep(2**attempt)

    def rescue(self, state: TrainState, step: int, *, alone: bool):
        """Save the state, if possible, before an error ends the run.

        alone: whether the error may have occurred in this process only. Then a run of several processes is
        not saved, because all of them must take part in a save.
        """
        if not self._checkpoints or step <= self._begun or alone and jax.process_count() > 1:
            return
        try:
            self._start(state, step, stage_finished=False)
            self._checkpoints.wait()
            self._succeeded()
        except Exception as problem:
            print(f"an error ends the run; saving step {step} failed too: {first_line(problem)}", flush=True)
        else:
            print(f"an error ends the run; step {step} is saved: continue from it with --resume", flush=True)

    def stop_message(self, step: int) -> str:
        """Return a message on what is saved when the run stops after `step` steps, and how to continue."""
        if not self._checkpoints:
            return "nothing is saved (dry run)"
        if not self._saved:
            return "no step is finished, so nothing is saved; run the same command again"
        return f"saved in {self._checkpoints.folder / str(step)}; continue with the same command and --resume"

    def _start(self, state: TrainState, step: int, stage_finished: bool):
        if self._begun > self._saved:
            self._checkpoints.wait()
            self._succeeded()
        keep = self._stage.keep_state or not stage_finished
        self._begun, self._retry_step = step, None
        self._saved_at, self._overdue = clock(), False
        self._checkpoints.save(
            step,
            params=state.params,
            optimizer=state.rest if keep else None,
            batches=self._stage.batches if keep else None,
            meta=self._run.meta | {"step": step},
        )

    def _succeeded(self):
        self._saved = self._begun
        self._failures = 0

    def _failed(self, step: int, problem: Exception, quiet: bool = False):
        self._begun = self._saved
        self._retry_step = step + min(2**self._failures, MOST_STEPS_BETWEEN)
        self._failures += 1
        if not quiet and jax.process_index() == 0:
            print(
                f"saving failed: {first_line(problem)}; training continues, next attempt after step "
                f"{self._retry_step}",
                flush=True,
            )
