"""Report a run's progress and remaining time, as printed lines and in status.json."""

import contextlib
import dataclasses
import json
import time

from jaxchat import files
from jaxchat.files import duration
from jaxchat.speedrun.estimate import time_of
from jaxchat.speedrun.runner import Runner, show
from jaxchat.speedrun.state import AGAIN
from jaxchat.speedrun.steps import Checkpoint, Step

SECONDS = 60.0  # between two progress lines
STATUS_SECONDS = 5.0  # between two writes of status.json
TAIL = 1 << 16  # bytes of metrics.jsonl to read, from its end
RECENT = 50  # optimizer steps over which the pace is averaged
PRIOR = 0.1  # fraction of the planned time that is assumed to take as long as planned


@dataclasses.dataclass(frozen=True)
class Pace:
    """The progress and the speed of a trainer."""

    fraction: float  # of the training, done so far
    seconds: float  # for all of the training, at the recent speed

    @property
    def left(self) -> float:
        return (1 - self.fraction) * self.seconds


def pace_of(step: Step) -> Pace | None:
    """Read a trainer's Pace from metrics.jsonl. Return None for other steps, or if the file is too short."""
    paths = [artifact.folder / "metrics.jsonl" for artifact in step.makes if isinstance(artifact, Checkpoint)]
    if not paths or not paths[0].exists():
        return None
    rows = []
    with paths[0].open("rb") as file:
        file.seek(max(0, paths[0].stat().st_size - TAIL))
        for line in file:
            with contextlib.suppress(ValueError):  # a line cut short by the seek above, or by a kill
                rows.append(json.loads(line))
    rows = [row for row in rows if {"progress", "step_seconds"} <= row.keys()][-RECENT:]
    if len(rows) < 2:
        return None
    first, last = rows[0], rows[-1]
    each = (last["progress"] - first["progress"]) / (len(rows) - 1)
    seconds = sum(row["step_seconds"] for row in rows[1:]) / (len(rows) - 1)
    if each <= 0:
        return None
    done = min(1.0, last["progress"] + each)  # a row logs the progress before its step
    return Pace(done, seconds / each)


def scale_of(steps: list[Step], done: dict[str, float]) -> float:
    """Return the ratio of measured to planned time, each summed over the steps that run on devices.

    done: {step name: measured seconds} of completed steps. The time of an incomplete trainer is computed from
    its logged speed. Other steps are left out of both sums. A tenth (PRIOR) of the planned time of all steps
    is added to both sums, so that the first, short steps change the ratio little.
    """
    planned = {step.name: 60 * step.minutes for step in steps if step.lane == "devices"}
    prior = PRIOR * sum(planned.values())
    measured, expected = prior, prior
    for step in steps:
        pace = None if step.name in done else pace_of(step)
        seconds = pace.seconds if pace else done.get(step.name)
        if seconds and planned.get(step.name):
            measured, expected = measured + seconds, expected + planned[step.name]
    return measured / expected if expected else 1.0


def seconds_left(step: Step, scale: float) -> float:
    """Estimate a step's remaining seconds from its logged speed or planned time. Return 0 if unknown.

    scale: ratio of measured to planned time, which corrects the planned time of a step on devices.
    """
    pace = pace_of(step)
    return pace.left if pace else 60 * step.minutes * (scale if step.lane == "devices" else 1.0)


def outlook(steps: list[Step], spent: dict[str, float], why: dict[str, str]) -> dict[str, float]:
    """Estimate the remaining time of the steps to do, as {step name: seconds, or 0 if unknown}.

    spent: {step name: seconds so far} of all steps. why: {step name: reason to run it} of the steps to do.
    """
    done = {name: seconds for name, seconds in spent.items() if name not in why}
    scale = scale_of([step for step in steps if why.get(step.name) != AGAIN], done)
    # The speed logged before --redo says nothing about the steps that it repeats.
    anew = [dataclasses.replace(step, makes=()) for step in steps if why.get(step.name) == AGAIN]
    left = [step for step in steps if why.get(step.name, AGAIN) != AGAIN]
    return {step.name: seconds_left(step, scale) for step in [*anew, *left]}


class Progress:
    """Print the progress of a Runner and write it to status.json, while its steps run."""

    def __init__(self, runner: Runner, price_per_hour: float = 0.0):
        self.runner, self.steps, self.price = runner, runner.steps, price_per_hour
        self.began = self.shown = self.written = time.monotonic()
        records = [runner.state.record(step.name) for step in self.steps if step.lane == "devices"]
        # Seconds spent by earlier starts, in which the runner's parallel steps are assumed to have kept busy.
        self.before = sum(record.get("seconds", 0.0) for record in records) / runner.parallel
        runner.on_progress = self.report

    def report(self, changed: bool):
        """Print and write the progress, at intervals or when a step has just started or ended (`changed`)."""
        now = time.monotonic()
        if self.runner.running and (changed or now - self.shown >= SECONDS):
            self.shown = now
            show(self.line())
        if changed or now - self.written >= STATUS_SECONDS:
            self.write("running")

    def left_of(self, step: Step, scale: float) -> float | None:
        """Estimate the remaining seconds of a step. Return 0 if it is done, or None if they are unknown.

        scale: ratio of measured to planned time.
        """
        if step.name in self.runner.done:
            return 0.0
        left, running = seconds_left(step, scale), self.runner.running.get(step.name)
        if running and not pace_of(step):
            left -= time.monotonic() - running.began
        return left if left > 0 else None  # it takes longer than planned

    def left(self) -> tuple[float, bool]:
        """Return (remaining seconds of the run, whether all times are known). Unknown times count as 0."""
        scale = scale_of(self.steps, self.runner.done)
        left = {step.name: self.left_of(step, scale) for step in self.steps}
        known = {name: seconds or 0.0 for name, seconds in left.items()}
        return time_of(self.steps, known, self.runner.parallel), None not in left.values()

    def line(self) -> str:
        """Return a line such as "d20: base 12%, 3 of 11 steps done; 40m00s so far, about 3h10m left"."""
        at = []
        for name, running in self.runner.running.items():
            pace = pace_of(running.step)
            at.append(f"{name} {pace.fraction:.0%}" if pace else name)
        left, known = self.left()
        passed = time.monotonic() - self.began
        run, done = self.runner.state.folder.name, len(self.runner.done)
        text = f"{run}: {' + '.join(at)}, {done} of {len(self.steps)} steps done; "
        text += f"{duration(passed)} so far, {'about' if known else 'more than'} {duration(left)} left"
        if self.price:
            text += f", cost about {(self.spent() + left) / 3600 * self.price:,.2f} in all"
        return text

    def summary(self) -> str:
        """Return the total time and cost as a text, such as "all 13 steps are done, in 3h20m; cost 80.00"."""
        cost = f"; cost {self.spent() / 3600 * self.price:,.2f}" if self.price else ""
        return f"all {len(self.steps)} steps are done, in {duration(self.spent())}{cost}"

    def spent(self) -> float:
        """Return the seconds spent on the run so far, including those before an interruption."""
        return self.before + time.monotonic() - self.began

    def write(self, state: str):
        """Write status.json, with the time left and the `state` "running", "stopped", "failed" or "done"."""
        self.written = time.monotonic()
        left, known = self.left()
        steps = []
        for step in self.steps:
            is_done, runs = step.name in self.runner.done, step.name in self.runner.running
            pace = pace_of(step) if runs else None
            steps.append(
                {
                    "name": step.name,
                    "state": "done" if is_done else "running" if runs else "to do",
                    "fraction": 1.0 if is_done else pace.fraction if pace else 0.0,
                    "seconds": self.runner.done.get(step.name),
                    "planned_seconds": 60 * step.minutes or None,
                }
            )
        about = {"state": state, "updated": time.time(), "seconds": time.monotonic() - self.began}
        about |= {"seconds_left": left, "all_known": known, "line": self.line(), "steps": steps}
        with contextlib.suppress(OSError):  # on a full disk, the steps report the error
            files.write_json(self.runner.state.folder / "status.json", about)
