"""The tasks that conversations come from, by name: `Name[/split][:rows]`, or a .jsonl file."""

from pathlib import Path

import numpy as np

from jaxchat.config import UserError, base_dir
from jaxchat.data.sources import file_fingerprint
from jaxchat.data.tasks.choice import arc, mmlu
from jaxchat.data.tasks.custom import custom_json, identity
from jaxchat.data.tasks.gsm8k import gsm8k
from jaxchat.data.tasks.humaneval import humaneval
from jaxchat.data.tasks.smoltalk import smoltalk
from jaxchat.data.tasks.spelling import simple_spelling, spelling_bee

TASKS = {
    "SmolTalk": smoltalk,
    "MMLU": mmlu,
    "GSM8K": gsm8k,
    "HumanEval": humaneval,
    "ARC-Easy": lambda folder, split: arc(folder, split, "ARC-Easy"),
    "ARC-Challenge": lambda folder, split: arc(folder, split, "ARC-Challenge"),
    "identity": identity,
    "SimpleSpelling": simple_spelling,
    "SpellingBee": spelling_bee,
}


class Task:
    """Conversations by index: rows[i] -> {"messages": …} (a choice task's with "letters", a document's {"text": …})."""

    def __init__(self, name: str, rows, count: int | None = None):
        self.name = name
        self._rows = rows
        self._count = len(rows) if count is None else min(count, len(rows))
        self.has_documents = getattr(rows, "has_documents", False)
        self.fingerprint = "".join(file_fingerprint(path)[:8] for path in rows.paths)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._rows[index]


class Mixture:
    """Tasks one after the other; a task that is listed twice is seen twice."""

    def __init__(self, tasks: list[Task]):
        self.tasks = tasks
        self._ends = np.cumsum([len(task) for task in tasks], dtype=np.int64)
        # What a checkpoint remembers of the data: each task's place, rows and files.
        self.fingerprint = {
            f"{i + 1}. {task.name}": f"{len(task)} rows of {task.fingerprint}" for i, task in enumerate(tasks)
        }

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.tasks else 0

    def name_of(self, index: int) -> str:
        """Which row of which task the index means, for messages."""
        which = int(np.searchsorted(self._ends, index, side="right"))
        return f"{self.tasks[which].name}, row {index - int(self._ends[which]) + len(self.tasks[which])}"

    def __getitem__(self, index: int) -> dict:
        which = int(np.searchsorted(self._ends, index, side="right"))
        return self.tasks[which][index - int(self._ends[which]) + len(self.tasks[which])]


def load_task(spec: str, tasks_dir: str | Path | None = None) -> Task:
    """One task of a spec such as "GSM8K/test:420" or "/path/to/mine.jsonl:1000"."""
    folder = Path(tasks_dir or base_dir() / "tasks").expanduser()
    name, colon, rows = spec.rpartition(":")
    if not colon:
        name, rows = spec, ""
    if rows and not rows.isdigit():
        raise UserError(f"task {spec!r}: {rows!r} is not a number of rows; write Name[/split][:rows]")
    count = int(rows) if rows else None
    if name.endswith(".jsonl"):
        return Task(name, custom_json(Path(name).expanduser()), count)
    task, _, split = name.partition("/")
    if task not in TASKS:
        raise UserError(f"unknown task {task!r}; it is one of {', '.join(TASKS)}, or a .jsonl file")
    return Task(name, TASKS[task](folder, split or "train"), count)


def load_mixture(spec: str, tasks_dir: str | Path | None = None) -> Mixture:
    """The tasks of a list with commas."""
    return Mixture([load_task(part.strip(), tasks_dir) for part in spec.split(",") if part.strip()])
