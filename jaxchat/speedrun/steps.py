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
        """Return {path: fingerprint} of the artifact's files, or {} if any are missing."""
        raise NotImplementedError

    def damage(self) -> str:
        """Describe damage that the fingerprints do not show, or return "" if there is none."""
        return ""

    def begun(self) -> bool:
        """Return whether an interrupted run left a partial artifact from which the step can continue."""
        return False

    def delete(self):
        """Delete the artifact. This default does nothing, because most commands overwrite their outputs."""


@dataclasses.dataclass(frozen=True)
class Files(Artifact):
    """The files that match a glob pattern, which may be relative to the base directory.

    least: minimum number of files. first: number of files to use, in the order of their names, or 0 for all.
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
    """The last checkpoint that a training stage, such as "sft", has saved of the model named `tag`."""

    stage: str
    tag: str

    @property
    def title(self) -> str:
        return f"{STAGES[self.stage].folder}/{self.tag}"

    @property
    def folder(self) -> Path:
        return base_dir() / STAGES[self.stage].folder / self.tag

    def last(self) -> int | None:
        """Return the training step of the last checkpoint, or None if there is no checkpoint."""
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
        """Describe damage to the last checkpoint's weights or metadata, or return "" if there is none."""
        from jaxchat import seal

        return seal.damage(self.folder / str(self.last()), ("params", "meta"))

    def begun(self) -> bool:
        return self.last() is not None

    def delete(self):
        """Delete the folder of the checkpoints, atomically. Raise UserError if a trainer is using it."""
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
    """The results of the command "base_eval" or "chat_eval" for a stage's last checkpoint."""

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
    """A command of a run, with its inputs and outputs."""

    name: str
    argv: tuple[str, ...]  # words of the command
    makes: tuple[Artifact, ...] = ()  # outputs; a step without them always runs
    needs: tuple[Artifact, ...] = ()  # inputs
    minutes: float = 0.0  # estimated time; 0: unknown
    lane: str = "devices"  # or "network": the resource it uses; steps on different ones run in parallel
    resumes: bool = False  # whether the command takes --resume
    free: frozenset[str] = frozenset()  # names of flags that may change when the step is continued

    @property
    def fixed(self) -> list[str]:
        """The part of the command that must not change: all but Python's path and the flags in `free`."""
        words = self.argv[1:] if self.argv[1:2] == ("-m",) else self.argv
        return [word for word in words if word.partition("=")[0].lstrip("-") not in self.free]

    @property
    def shown(self) -> str:
        """The command as a user would type it, but without quotes."""
        words = ["python" if word == sys.executable else word for word in self.argv]
        return " ".join(words)


def makers(steps: list[Step]) -> dict[Artifact, Step]:
    return {artifact: step for step in steps for artifact in step.makes}


def dependents(steps: list[Step], names: set[str]) -> set[str]:
    """Return `names` and the names of all steps that need their outputs, directly or indirectly."""
    found = set(names)
    for step in steps:  # a step comes after those it needs
        made = {artifact for other in steps if other.name in found for artifact in other.makes}
        if made & set(step.needs):
            found.add(step.name)
    return found


def named(steps: list[Step], flag: str, text: str) -> set[str]:
    """Split `text`, the value of --`flag`, at commas into step names. Raise UserError if one is unknown."""
    names = {name.strip() for name in text.split(",") if name.strip()}
    known = [step.name for step in steps]
    if unknown := sorted(names - set(known)):
        raise UserError(f"--{flag}={text}: there is no step {unknown[0]!r}; the steps are {', '.join(known)}")
    return names


def chosen(steps: list[Step], first: str = "", last: str = "", only: str = "") -> list[Step]:
    """Return the steps from `first` to `last`, or the steps that `only` names. By default, return all.

    only: names, separated by commas. Raises UserError if a name is unknown, if `only` is combined with
    `first` or `last`, or if `first` comes after `last`.
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
