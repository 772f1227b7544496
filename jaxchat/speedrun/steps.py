"""The steps of a run as data: each step's command, inputs and outputs.

Inputs and outputs are artifacts: files, checkpoints and evaluation results. In a list of steps, each comes
after the steps that make its inputs.
"""

import dataclasses
import glob
import sys
from pathlib import Path

from jaxchat import files
from jaxchat.config import STAGES, UserError, base_dir


class Artifact:
    """An input or output of a step. Its `title` names it in records and messages."""

    def found(self) -> dict[str, str]:
        """Return {path: fingerprint} of the artifact's files; {}: the artifact is missing or incomplete."""
        raise NotImplementedError

    def damage(self) -> str:
        """Describe damage to the artifact that its fingerprints do not show; "": none."""
        return ""

    def begun(self) -> bool:
        """Return whether an interrupted run left a partial artifact from which the step can continue."""
        return False

    def delete(self):
        """Delete the artifact. The default does nothing, because commands overwrite their outputs."""


@dataclasses.dataclass(frozen=True)
class Files(Artifact):
    """The files that match a glob pattern, relative to the base directory or absolute.

    least: number of files below which the artifact is incomplete. first: number of files to use, in the order
    of their names; 0: all.
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
        # glob omits hidden files and folders, except those that the pattern itself names, such as ~/.cache.
        names = sorted(glob.glob(self.pattern.lstrip("/"), root_dir=root, recursive=True))
        names = [name for name in names if not name.endswith(files.PART) and (root / name).is_file()]
        if len(names) < self.least:
            return {}
        return {name: file_fingerprint(root / name) for name in names[: self.first or None]}


@dataclasses.dataclass(frozen=True)
class Checkpoint(Artifact):
    """The last checkpoint of a stage, such as "sft", of the model with this tag."""

    stage: str
    tag: str

    @property
    def title(self) -> str:
        return f"{STAGES[self.stage].folder}/{self.tag}"

    @property
    def folder(self) -> Path:
        return base_dir() / STAGES[self.stage].folder / self.tag

    def last(self) -> int | None:
        """Training step of the last checkpoint; None: there is no checkpoint."""
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
        """Read the last checkpoint's weights and metadata, and describe what is wrong; "": nothing."""
        from jaxchat import seal

        return seal.damage(self.folder / str(self.last()), ("params", "meta"))

    def begun(self) -> bool:
        return self.last() is not None

    def delete(self):
        """Delete the run's folder atomically. UserError: a trainer is using the folder."""
        if not self.folder.is_dir():
            return
        from jaxchat import store

        gone = self.folder.parent / ".deleted" / self.tag  # no command searches this folder for checkpoints
        with open(store.lock(self.folder), "rb"):
            files.delete(gone)
            gone.parent.mkdir(exist_ok=True)
            self.folder.replace(gone)
        files.delete(gone.parent)


@dataclasses.dataclass(frozen=True)
class Results(Artifact):
    """Results that `command` ("base_eval" or "chat_eval") measured on a stage's last checkpoint."""

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

    argv: words of the command. makes: artifacts it writes; (): none are tracked, so the step always runs.
    needs: artifacts it reads. minutes: estimated time; 0: not known. lane: the resource it uses, "devices" or
    "network"; steps on different resources run in parallel. resumes: whether the command takes --resume.
    free: names of flags that may be changed when the step is continued.
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
        """Words of the command that must be equal at every start: all but Python's path and `free` flags."""
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
    """Names of the given steps and of all steps that need their outputs, directly or not."""
    found = set(names)
    for step in steps:  # a step comes after those it needs
        made = {artifact for other in steps if other.name in found for artifact in other.makes}
        if made & set(step.needs):
            found.add(step.name)
    return found


def named(steps: list[Step], flag: str, text: str) -> set[str]:
    """Return the step names in `text`, the value of --`flag`. UserError: there is no step of that name."""
    names = {name.strip() for name in text.split(",") if name.strip()}
    known = [step.name for step in steps]
    if unknown := sorted(names - set(known)):
        raise UserError(f"--{flag}={text}: there is no step {unknown[0]!r}; the steps are {', '.join(known)}")
    return names


def chosen(steps: list[Step], first: str = "", last: str = "", only: str = "") -> list[Step]:
    """Return the steps from `first` to `last` (both included; "": no limit), or those named in `only`.

    UserError: a name is unknown, `only` is combined with the others, or `first` comes after `last`.
    """
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
