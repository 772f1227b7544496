"""Open tasks, which are sources of conversations, by a spec: `Name[/split][:rows]` or `file.jsonl[:rows]`."""

import os
import re
import shlex
from pathlib import Path

import numpy as np

from jaxchat.config import UserError, base_dir, user_path
from jaxchat.data.sources import file_fingerprint
from jaxchat.data.tasks.custom import JsonLines, identity
from jaxchat.data.tasks.hub import arc, gsm8k, humaneval, mmlu, smoltalk
from jaxchat.data.tasks.spelling import Generated, count_letters, spell
from jaxchat.data.tasks.table import NoFiles

JSON = (".jsonl", ".json", ".ndjson")  # file name extensions of conversation files
DRAW_SEED = 42
TASKS = {
    "SmolTalk": smoltalk,
    "MMLU": mmlu,
    "GSM8K": gsm8k,
    "HumanEval": humaneval,
    "ARC-Easy": lambda folder, split: arc(folder, split, "ARC-Easy"),
    "ARC-Challenge": lambda folder, split: arc(folder, split, "ARC-Challenge"),
    "identity": identity,
    "SimpleSpelling": lambda folder, split: Generated(folder, split, "SimpleSpelling", spell),
    "SpellingBee": lambda folder, split: Generated(folder, split, "SpellingBee", count_letters),
}


class Task:
    """A sequence of conversations, {"messages": …}, and documents, {"text": …}.

    A multiple-choice question also has "letters", which lists the letters of its choices.
    count: number of rows to draw at random, with a fixed seed. None: all, or 1,000 if rows are generated.
    """

    def __init__(self, name: str, rows, count: int | None = None):
        self.name, self._rows, self._drawn = name, rows, None
        if count is not None and hasattr(rows, "largest"):  # generated rows, already in random order
            rows.count = min(count, rows.largest)
        elif count is not None and count < len(rows):
            self._drawn = np.random.Generator(np.random.PCG64(DRAW_SEED)).permutation(len(rows))[:count]
        self.has_documents = getattr(rows, "has_documents", False)
        self.left_out = getattr(rows, "left_out", "")
        self.fingerprint = "".join(file_fingerprint(path)[:8] for path in rows.paths)
        self.fingerprint += getattr(rows, "edition", "") + ("" if self._drawn is None else ", shuffled")

    def __len__(self) -> int:
        return len(self._rows if self._drawn is None else self._drawn)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._rows[index if self._drawn is None else int(self._drawn[index])]

    @property
    def summary(self) -> str:
        """Description to print before training: name, number of rows, and invalid rows that were left out."""
        return f"{self.name} {len(self):,}" + (f" ({self.left_out})" if self.left_out else "")


class Mixture:
    """Several tasks as one sequence. The rows of a task that is listed twice occur twice."""

    def __init__(self, tasks: list[Task]):
        self.tasks = tasks
        self._ends = np.cumsum([len(task) for task in tasks], dtype=np.int64)
        # Stored in checkpoints, to detect changed data: each task's position, number of rows and files.
        self.fingerprint = {
            f"{i + 1}. {task.name}": f"{len(task)} rows of {task.fingerprint}" for i, task in enumerate(tasks)
        }

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.tasks else 0

    def _find(self, index: int) -> tuple[Task, int]:
        which = int(np.searchsorted(self._ends, index, side="right"))
        return self.tasks[which], index - int(self._ends[which]) + len(self.tasks[which])

    def task_of(self, index: int) -> Task:
        return self._find(index)[0]

    def name_of(self, index: int) -> str:
        """Return the name of row `index` for error messages, such as "GSM8K/train, row 3"."""
        task, row = self._find(index)
        return f"{task.name}, row {row}"

    def __getitem__(self, index: int) -> dict:
        task, row = self._find(index)
        return task[row]


def load_task(spec: str, tasks_dir: str | Path | None = None) -> Task:
    """Open a task by its spec, such as "GSM8K/test:420" (420 rows of the test split) or "folder/my.jsonl"."""
    folder = user_path(tasks_dir or base_dir() / "tasks")
    name, colon, rows = spec.rpartition(":")
    if not colon or spec.lower().endswith(JSON):  # a path may hold a colon
        name, rows = spec, ""
    if rows and not rows.isdecimal():
        raise UserError(f"task {spec!r}: {rows!r} is not a number of rows; write Name[/split][:rows]")
    count = int(rows) if rows else None
    if name.lower().endswith(JSON):
        return Task(name, JsonLines(user_path(name)), count)
    task, _, split = name.partition("/")
    if task not in TASKS:
        shown = name if os.path.exists(user_path(name)) else task
        files = f"a file whose name ends in {', '.join(JSON)}"
        raise UserError(f"unknown task {shown!r}; it is one of {', '.join(TASKS)}, or {files}")
    try:
        return Task(name, TASKS[task](folder, split or "train"), count)
    except UserError as problem:
        if not tasks_dir:
            raise
        to = f"--to={shlex.quote(str(tasks_dir))}"  # make the suggested command use this folder
        message = re.sub(r"launch\.download [\w-]+", lambda found: f"{found[0]} {to}", str(problem))
        problem.args = (message,)
        raise


def load_mixture(spec: str, tasks_dir: str | Path | None = None) -> Mixture:
    """Open the tasks of a comma-separated list of specs, such as "GSM8K/train,mine.jsonl:1000".

    Raises UserError if any cannot be opened.
    """
    return Mixture(open_tasks(_parts(spec), tasks_dir))


def open_tasks(specs: list[str], tasks_dir: str | Path | None = None) -> list[Task]:
    """Open the tasks of `specs`. Raises one UserError for all that cannot be opened."""
    tasks, missing, problems = [], {}, []
    for spec in specs:
        try:
            tasks.append(load_task(spec, tasks_dir))
        except NoFiles as problem:
            missing[spec] = problem
        except UserError as problem:
            problems.append(str(problem))
    if len(missing) == 1:
        problems += map(str, missing.values())
    elif missing:
        folder = user_path(tasks_dir or base_dir() / "tasks")
        datasets = " ".join(dict.fromkeys(problem.dataset for problem in missing.values()))
        fetch = f"python -m launch.download {datasets}"
        fetch += f" --to={shlex.quote(str(tasks_dir))}" if tasks_dir else ""
        lacking = f"no files of {', '.join(missing)} in {folder}"
        problems.append(f"{lacking}; fetch them: {fetch}; or name --tasks_dir")
    if problems:
        raise UserError("; ".join(problems))
    return tasks


def _parts(spec: str) -> list[str]:
    """Split a comma-separated list into specs, except at commas in the path of an existing file."""
    parts, pieces = [], spec.split(",")
    while pieces:
        joined = (",".join(pieces[:n]).strip() for n in range(2, len(pieces) + 1))
        files = (part for part in joined if os.path.isfile(user_path(re.sub(r":\d+$", "", part))))
        part = next(files, pieces[0].strip())
        del pieces[: part.count(",") + 1]
        parts += [part] if part else []
    return parts
