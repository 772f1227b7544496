"""The steps of a run as data: the command of each, what it needs and what it makes.

Steps need and make files, checkpoints and results of evaluations. A step that needs what another makes comes
after it.
"""

import dataclasses
import glob
import sys
from pathlib import Path

from jaxchat import files
from jaxchat.config import STAGES, UserError, base_dir


class Artifact:
    """What a step makes or needs. Its `title` names it in records and messages."""

    def found(self) -> dict[str, str]:
        """Return {path: fingerprint} of the artifact's files; {}: it is missing or incomplete."""
        raise NotImplementedError

    def damage(self) -> str:
        """Find what is wrong with the artifact that fingerprints do not show; "": nothing."""
        return ""

    def begun(self) -> bool:
        """Return whether an interrupted run has left a part of the artifact that is worth keeping."""
        return False

    def delete(self):
        """Delete the artifact; does nothing where the command that makes it replaces it."""


@dataclasses.dataclass(frozen=True)
class Files(Artifact):
    """The files that match a pattern, in the base directory or (an absolute pattern) elsewhere.

    least: fewest files of a complete output. first: number of files to look at, in the order of their
    names; 0: all.
    """

    pattern: str
    least: int = 1
    first: int = 0

    @property
    def title(self) -> str:
        return self.pattern + (f" (the first {self.first})" if self.first else "")

    def found(self) -> dict[str, str]:
        from jaxchat.data.sources import file_fingerprint

        root = Path("/") if Path(self.pattern).is_absolute() else base_dir()
        # What is hidden is left out, but for folders that the pattern itself names, such as ~/.cache.
        names = sorted(glob.glob(self.pattern.lstrip("/"), root_dir=root, recursive=True))
        names = [name for name in names if not name.endswith(files.PART) and (root / name).is_file()]
        if len(names) < self.least:
            return {}
        return {name: file_fingerprint(root / name) for name in names[: self.first or None]}


@dataclasses.dataclass(frozen=True)
class Checkpoint(Artifact):
    """The last checkpoint of a stage under a tag."""

    stage: str
    tag: str

    @property
    def title(self) -> str:
        return f"{STAGES[self.stage].folder}/{self.tag}"

    @property
    def folder(self) -> Path:
        return base_dir() / STAGES[self.stage].folder / self.tag

    def last(self) -> int | None:
        """The last step; None: there is no checkpoint."""
        from jaxchat import checkpoint  # here, since it imports jax

        return next(reversed(checkpoint.steps_in(self.folder)), None)

    def found(self) -> dict[str, str]:
        from jaxchat import seal

        step = self.last()
        if step is None:
            return {}
        sealed = self.folder / str(step) / seal.NAME
        return {f"{self.title}/{step}": files.file_hash(sealed)[:16] if sealed.exists() else "not sealed"}

    def damage(self) -> str:
        """Read the weights, and say what is wrong with them; "": nothing."""
        from jaxchat import seal

        return seal.damage(self.folder / str(self.last()), ("params", "meta"))

    def begun(self) -> bool:
        return self.last() is not None

    def delete(self):
        """Delete the run's folder, all of it or nothing. UserError: a trainer is at work there."""
        if not self.folder.is_dir():
            return
        from jaxchat import store

        gone = self.folder.parent / ".deleted" / self.tag  # where nothing looks for checkpoints
        with open(store.lock(self.folder), "rb"):
            files.delete(gone)
            gone.parent.mkdir(exist_ok=True)
            self.folder.replace(gone)
        files.delete(gone.parent)


@dataclasses.dataclass(frozen=True)
class Results(Artifact):
    """Results that a command has measured on a stage's last checkpoint."""

    stage: str
    tag: str
    command: str

    @property
    def title(self) -> str:
        return f"{STAGES[self.stage].folder}/{self.tag}/{self.command}_<step>.json"

    def found(self) -> dict[str, str]:
        run = Checkpoint(self.stage, self.tag)
        return Files(f"{run.title}/{self.command}_{run.last()}[!0-9]*json").found()


@dataclasses.dataclass(frozen=True)
class Step:
    """A command of a run.

    argv: its words. makes: the artifacts it leaves; (): none that last, so it runs each time. needs: those it
    reads. minutes: an estimate; 0: unknown. lane: steps of one lane take turns; "network" runs beside the
    others. resumes: whether the command takes --resume. free: flags that may differ from those of an earlier
    start.
    """

    name: str
    argv: tuple[str, ...]
    makes: tuple[Artifact, ...] = ()
    needs: tuple[Artifact, ...] = ()
    minutes: float = 0.0
    lane: str = "devices"
    resumes: bool = False
    free: frozenset[str] = frozenset()

    @property
    def fixed(self) -> list[str]:
        """The words of the command that must not change from start to start. The path of Python may."""
        words = self.argv[1:] if self.argv[1:2] == ("-m",) else self.argv
        return [word for word in words if word.partition("=")[0].lstrip("-") not in self.free]

    @property
    def shown(self) -> str:
        """The command as a user would type it, without quoting."""
        words = ["python" if word == sys.executable else word for word in self.argv]
        return " ".join(words)


def makers(steps: list[Step]) -> dict[Artifact, Step]:
    return {artifact: step for step in steps for artifact in step.makes}


def dependents(steps: list[Step], names: set[str]) -> set[str]:
    """Names of the given steps and of all that need what these make, directly or not."""
    found = set(names)
    for step in steps:  # a step comes after those it needs
        made = {artifact for other in steps if other.name in found for artifact in other.makes}
        if made & set(step.needs):
            found.add(step.name)
    return found


def named(steps: list[Step], flag: str, text: str) -> set[str]:
    """Split a comma-separated list of steps into names. UserError: there is no such step."""
    names = {name.strip() for name in text.split(",") if name.strip()}
    known = [step.name for step in steps]
    if unknown := sorted(names - set(known)):
        raise UserError(f"--{flag}={text}: there is no step {unknown[0]!r}; the steps are {', '.join(known)}")
    return names


def chosen(steps: list[Step], first: str = "", last: str = "", only: str = "") -> list[Step]:
    """The steps from `first` until `last`, or `only` those named. UserError: none, or an unknown name."""
    if only and (first or last):
        raise UserError("--only contradicts --from and --until; leave them out")
    if only:
        names = named(steps, "only", only)
        return [step for step in steps if step.name in names]
    known = [step.name for step in steps]
    for flag, name in (("from", first), ("until", last)):
        if name and name not in known:
            raise UserError(f"--{flag}={name}: there is no step {name!r}; the steps are {', '.join(known)}")
    start = known.index(first) if first else 0
    end = known.index(last) if last else len(known) - 1
    if end < start:
        raise UserError(f"--from={first} comes after --until={last}; the order is {', '.join(known)}")
    return steps[start : end + 1]
