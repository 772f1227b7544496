"""The records of a run's steps: which command made what, from which inputs, and whether it still holds.

<base directory>/speedrun/<tag>/<step>.json has a step's command and the fingerprints of its inputs, written
before it starts, and those of its outputs, added once it has ended with exit code 0. A step is done if
command and fingerprints are unchanged.
"""

import dataclasses
import datetime
import os
from pathlib import Path

from jaxchat import files
from jaxchat.config import UserError
from jaxchat.files import read_json
from jaxchat.speedrun.steps import Artifact, Step, dependents, makers

AGAIN = "again"  # why a step is to do that --redo names, or that needs one
REDO = "redo"  # the file with what --redo has thrown away in a run that is not complete yet


class State:
    """The records of a run's steps, in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, name: str, ending: str = "json") -> Path:
        return self.folder / f"{name}.{ending}"

    def record(self, name: str) -> dict:
        return read_json(self.path(name))

    def seconds(self, steps: list[Step]) -> dict[str, float]:
        """Seconds that steps have taken, in all starts whose end was recorded."""
        return {step.name: self.record(step.name).get("seconds", 0.0) for step in steps}

    def incomplete(self, step: Step) -> bool:
        """Return whether a step was begun and has not ended well."""
        record = self.record(step.name)
        return bool(record) and "outputs" not in record

    def begin(self, step: Step):
        """Record a step's command and inputs, before it starts."""
        old = self.record(step.name)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        inputs = {artifact.title: artifact.found() for artifact in step.needs}
        same = not self.differences(step, old, skip=())
        seconds = old.get("seconds", 0.0) + self.unrecorded(step, old) if same else 0.0
        record = {"argv": list(step.argv), "inputs": inputs, "began": now, "seconds": seconds}
        files.write_json(self.path(step.name), record)

    def unrecorded(self, step: Step, record: dict) -> float:
        """Seconds of a start that was killed, from its beginning to the last line of its log."""
        log = self.path(step.name, "log")
        if not record or "code" in record or not log.exists():
            return 0.0
        began = datetime.datetime.fromisoformat(record["began"]).timestamp()
        return max(0.0, log.stat().st_mtime - began)

    def end(self, step: Step, seconds: float, code: int):
        """Record the time a step took and, if it went well, its outputs."""
        record = self.record(step.name)
        record |= {"seconds": record.get("seconds", 0.0) + seconds, "code": code}
        if not code:
            record["outputs"] = found_in(step.makes)
        files.write_json(self.path(step.name), record)

    def why_to_do(self, step: Step, remade: frozenset[Artifact] = frozenset()) -> str | None:
        """Judge by a step's record and the files that are there why it is to do ("": no need to say).

        None: it is done. remade: artifacts that will be made again before it. UserError: its flags or inputs
        differ from those it was run with.
        """
        record = self.record(step.name)
        outputs, continues = record.get("outputs"), begun(step)
        if not step.makes:
            return ""
        if not record:
            return "continues what is there" if continues else ""
        if (outputs is not None or continues) and (changed := self.differences(step, record, remade)):
            raise UserError(
                f"step {step.name}: {changed}; give what it was run with, or --redo={step.name} to run it "
                "and what needs it again"
            )
        if outputs is not None:
            return damage(step, outputs) or None
        code = record.get("code")
        why = f"failed with exit code {code}" if code and code != os.EX_TEMPFAIL else "was interrupted"
        return f"{why}, continues" if continues else why

    def differences(self, step: Step, record: dict, skip) -> str:
        """Say which flags and inputs of a step differ from its record; "": none."""
        now, then = step.fixed, dataclasses.replace(step, argv=tuple(record.get("argv", step.argv))).fixed
        parts = []
        if now != then:
            gone, new = [word for word in then if word not in now], [word for word in now if word not in then]
            was = " ".join(gone) or f"no {' '.join(word.partition('=')[0] for word in new)}"
            parts.append(f"it was run with {was}, and is now to run with {' '.join(new) or 'its default'}")
        for artifact in step.needs:
            before = record.get("inputs", {}).get(artifact.title)
            if before is None or artifact in skip:
                continue
            found = artifact.found()
            if odd := sorted(name for name in before | found if found.get(name) != before.get(name)):
                more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
                parts.append(f"its input {odd[0]}{more} is not what it was")
        return "; ".join(parts)

    def again(self, steps: list[Step], names: set[str]) -> set[str]:
        """Names of the steps to do again for --redo=names: these, and all that need them.

        {} if an earlier start has deleted their outputs already and has not completed the run: then it
        continues.
        """
        found = dependents(steps, names)
        return found if read_json(self.path(REDO)) != commands_of(steps, names) else set()

    def forget(self, steps: list[Step], names: set[str]):
        """Delete the outputs and records of the named steps, and of all steps that need them."""
        again = dependents(steps, names)
        for step in reversed(steps):
            if step.name in again:
                for artifact in step.makes:
                    artifact.delete()
                files.delete(self.path(step.name))
        files.write_json(self.path(REDO), commands_of(steps, names))

    def complete(self):
        """Note that the run is complete, so that the next --redo starts over."""
        files.delete(self.path(REDO))


def commands_of(steps: list[Step], names: set[str]) -> dict[str, list[str]]:
    return {step.name: list(step.argv) for step in steps if step.name in names}


def to_do(state: State, steps: list[Step], chosen: list[Step], redo: set[str]) -> dict[str, str]:
    """Return {name: why} of the chosen steps that are not done. redo: the names that --redo gave.

    UserError: flags or inputs of a step differ from those it was run with, or an input is missing.
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
    """Raise UserError if an input of a chosen step is missing or incomplete, and no chosen step makes it.

    again: steps whose output --redo is going to delete.
    """
    made, makes = makers(selected), makers(steps)
    for step in selected:
        for artifact in step.needs:
            maker = makes.get(artifact)
            if artifact in made:
                continue
            if not artifact.found():
                lacks = "is not there"
            elif maker and (maker.name in again or state.incomplete(maker)):
                lacks = "is not complete"
            else:
                continue
            how = f"step {maker.name} makes it: choose that too" if maker else "put it there first"
            raise UserError(f"step {step.name} needs {artifact.title}, which {lacks}; {how}")


def found_in(artifacts: tuple[Artifact, ...]) -> dict[str, str]:
    return {name: value for artifact in artifacts for name, value in artifact.found().items()}


def begun(step: Step) -> bool:
    return any(artifact.begun() for artifact in step.makes)


def damage(step: Step, outputs: dict[str, str]) -> str:
    """Find what is wrong with a step's outputs; "": nothing."""
    for artifact in step.makes:
        found = artifact.found()
        if not found:
            return f"{artifact.title} is missing"
        if wrong := artifact.damage():
            return f"{artifact.title} is damaged: {wrong}"
    found = found_in(step.makes)
    odd = sorted(name for name, value in outputs.items() if found.get(name) != value)
    return f"{odd[0]} is not what was made" if odd else ""
