"""Record each step's command, inputs and outputs, and decide from these records which steps must run.

<base directory>/speedrun/<tag>/<step>.json holds a step's command and the fingerprints of its inputs, written
before the step starts. The fingerprints of its outputs are added when the step ends with exit code 0. A step
is done if its command and all fingerprints are unchanged.
"""

import dataclasses
import datetime
import os
from pathlib import Path

from jaxchat import files
from jaxchat.config import UserError
from jaxchat.files import read_json
from jaxchat.speedrun.steps import Artifact, Step, dependents, makers

AGAIN = "again"  # the reason for steps that --redo names, and for steps that need their outputs
REDO = "redo"  # name of the file with the steps whose outputs --redo deleted, until the run is complete


class State:
    """The records of a run's steps, as JSON files in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, name: str, ending: str = "json") -> Path:
        return self.folder / f"{name}.{ending}"

    def record(self, name: str) -> dict:
        return read_json(self.path(name))

    def seconds(self, steps: list[Step]) -> dict[str, float]:
        """Return the recorded time of each step so far, as {step name: seconds}."""
        return {step.name: self.record(step.name).get("seconds", 0.0) for step in steps}

    def incomplete(self, step: Step) -> bool:
        """Return whether a step was started and has not succeeded since."""
        record = self.record(step.name)
        return bool(record) and "outputs" not in record

    def begin(self, step: Step):
        """Record a step's command and inputs, before it starts."""
        old = self.record(step.name)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        inputs = {artifact.title: artifact.found() for artifact in step.needs}
        same = not self.differences(step, old, skip=())
        seconds = old.get("seconds", 0.0) + self.killed_seconds(step, old) if same else 0.0
        record = {"argv": list(step.argv), "inputs": inputs, "began": now, "seconds": seconds}
        files.write_json(self.path(step.name), record)

    def killed_seconds(self, step: Step, record: dict) -> float:
        """Estimate from the log how many seconds a killed attempt ran. Return 0 if no attempt was killed."""
        log = self.path(step.name, "log")
        if not record or "code" in record or not log.exists():
            return 0.0
        began = datetime.datetime.fromisoformat(record["began"]).timestamp()
        return max(0.0, log.stat().st_mtime - began)

    def end(self, step: Step, seconds: float, code: int):
        """Add an attempt's time and exit code to the step's record, and its outputs if it succeeded."""
        record = self.record(step.name)
        record |= {"seconds": record.get("seconds", 0.0) + seconds, "code": code}
        if not code:
            record["outputs"] = found_in(step.makes)
        files.write_json(self.path(step.name), record)

    def why_to_do(self, step: Step, remade: frozenset[Artifact] = frozenset()) -> str | None:
        """Return the reason to run a step, or None if the step is done.

        The reason is "" for a step without outputs, or with neither a record nor a checkpoint. remade:
        inputs that will be made again and are not checked for changes. Raises UserError if the step succeeded
        or can continue, but its flags or inputs differ from those of its last start.
        """
        record = self.record(step.name)
        outputs, continues = record.get("outputs"), begun(step)
        if not step.makes:
            return ""
        if not record:
            return "continues from an existing checkpoint" if continues else ""
        if (outputs is not None or continues) and (changed := self.differences(step, record, remade)):
            raise UserError(
                f"step {step.name}: {changed}; restore what it was run with, or give --redo={step.name} to "
                "run it, and the steps that need it, again"
            )
        if outputs is not None:
            return damage(step, outputs) or None
        code = record.get("code")
        why = f"failed with exit code {code}" if code and code != os.EX_TEMPFAIL else "was interrupted"
        return f"{why}, continues" if continues else why

    def differences(self, step: Step, record: dict, skip) -> str:
        """Describe how a step's flags and inputs differ from its record, or return "" if they do not.

        skip: inputs to ignore.
        """
        now, then = step.fixed, dataclasses.replace(step, argv=tuple(record.get("argv", step.argv))).fixed
        parts = []
        if now != then:
            gone, new = [word for word in then if word not in now], [word for word in now if word not in then]
            was = " ".join(gone) or f"no {' '.join(word.partition('=')[0] for word in new)}"
            parts.append(f"it was run with {was}, but would now run with {' '.join(new) or 'the default'}")
        for artifact in step.needs:
            before = record.get("inputs", {}).get(artifact.title)
            if before is None or artifact in skip:
                continue
            found = artifact.found()
            if odd := sorted(name for name in before | found if found.get(name) != before.get(name)):
                more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
                parts.append(f"its input {odd[0]}{more} has changed")
        return "; ".join(parts)

    def again(self, steps: list[Step], names: set[str]) -> set[str]:
        """Return the names of the steps that --redo repeats: `names`, and all steps that need their outputs.

        Return an empty set if an interrupted run with the same --redo has already deleted the outputs.
        """
        found = dependents(steps, names)
        return found if read_json(self.path(REDO)) != commands_of(steps, names) else set()

    def forget(self, steps: list[Step], names: set[str]):
        """Delete the outputs and records of the named steps and of all steps that need their outputs."""
        again = dependents(steps, names)
        for step in reversed(steps):
            if step.name in again:
                for artifact in step.makes:
                    artifact.delete()
                files.delete(self.path(step.name))
        files.write_json(self.path(REDO), commands_of(steps, names))

    def complete(self):
        """Mark the run as complete. A command with --redo then deletes outputs, instead of continuing."""
        files.delete(self.path(REDO))


def commands_of(steps: list[Step], names: set[str]) -> dict[str, list[str]]:
    return {step.name: list(step.argv) for step in steps if step.name in names}


def to_do(state: State, steps: list[Step], chosen: list[Step], redo: set[str]) -> dict[str, str]:
    """Return {step name: reason} of the chosen steps that must run.

    steps: all steps of the run. redo: names given to --redo. Raises UserError if an input is missing, or if
    the flags or inputs of a finished or resumable step have changed since it was last started.
    """
    again = state.again(steps, redo)
    check_inputs(state, steps, chosen, again)
    found, remade = {}, frozenset()
    for step in (step for step in chosen if step.name not in again):
        why = state.why_to_do(step, remade)
        if why is not None:
            found[step.name] = why
            remade |= frozenset(step.makes)
    return found | {step.name: AGAIN for step in chosen if step.name in again}


def check_inputs(state: State, steps: list[Step], selected: list[Step], again: set[str] = frozenset()):
    """Raise UserError if a selected step needs a missing or incomplete input that no selected step makes.

    again: names of the steps whose outputs --redo will delete.
    """
    made, makes = makers(selected), makers(steps)
    for step in selected:
        for artifact in step.needs:
            maker = makes.get(artifact)
            if artifact in made:
                continue
            if not artifact.found():
                lacks = "is missing"
            elif maker and (maker.name in again or state.incomplete(maker)):
                lacks = "is incomplete"
            else:
                continue
            how = f"step {maker.name} makes it: run that step too" if maker else "provide it first"
            raise UserError(f"step {step.name} needs {artifact.title}, which {lacks}; {how}")


def found_in(artifacts: tuple[Artifact, ...]) -> dict[str, str]:
    return {name: value for artifact in artifacts for name, value in artifact.found().items()}


def begun(step: Step) -> bool:
    return any(artifact.begun() for artifact in step.makes)


def damage(step: Step, outputs: dict[str, str]) -> str:
    """Describe what is missing, damaged or changed in a step's `outputs`. Return "" if nothing is.

    outputs: {path: fingerprint}, as recorded when the step ended.
    """
    for artifact in step.makes:
        found = artifact.found()
        if not found:
            return f"{artifact.title} is missing"
        if wrong := artifact.damage():
            return f"{artifact.title} is damaged: {wrong}"
    found = found_in(step.makes)
    odd = sorted(name for name, value in outputs.items() if found.get(name) != value)
    return f"{odd[0]} has changed since it was made" if odd else ""
