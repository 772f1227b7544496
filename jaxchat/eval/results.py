"""Results of evaluations, written as CSV and JSON beside the checkpoint or the tokenizer."""

import csv
import dataclasses
import hashlib
import io
import json
from pathlib import Path

import jax

from jaxchat import files
from jaxchat.checkpoint import Found
from jaxchat.files import read_json


@dataclasses.dataclass(frozen=True)
class TaskResult:
    task: str
    accuracy: float
    centered: float  # (accuracy - chance) / (1 - chance): guessing is 0, perfect is 1
    items: int

    @property
    def note(self) -> str:
        """Remark at the end of the line that `show` prints, such as the number of cropped items, or ""."""
        return ""

    def show(self):
        scores = f"{self.accuracy:8.4f}  centred {self.centered:8.4f}{self.note}"
        print(f"  {self.task:<34}{self.items:>7,} items  {scores}", flush=True)


def mean(results: list[TaskResult]) -> float:
    """Return the mean of the tasks' centred accuracies, which is how CORE and ChatCORE are defined."""
    return sum(result.centered for result in results) / len(results)


def write_both(path: Path, rows: list[list], value: dict):
    """Write `value` to `path` as JSON, and `rows` to the same path with suffix .csv, each atomically."""
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows(rows)
    files.write_text(path.with_suffix(".csv"), table.getvalue())
    files.write_json(path, value)


def check_writable(folder: Path):
    """Raise OSError if process 0, which saves the results, cannot write to `folder`."""
    if jax.process_index() == 0:
        files.check_writable(folder)


def save_results(
    found: Found,
    source: str,
    command: str,
    results: list[TaskResult],
    values: dict[str, float],
    score: str,
    settings: dict,
    **more,
) -> Path:
    """Write <command>_<step>.json and .csv to the checkpoint's folder; return the path of the JSON file.

    Only process 0 writes. If the file exists with other settings, a hash is added to the new file's name.
    source: stage of the checkpoint. values: all numbers by name. settings: options that affect the numbers.
    score: name in `values` of the mean over the tasks, which becomes the last line of the CSV.
    more: further entries of the JSON, such as the wall time in `seconds`.
    """
    path = found.folder / f"{command}_{found.step}.json"
    if jax.process_index() > 0:
        return path
    if path.exists() and read_json(path).get("settings") != settings:
        digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=3).hexdigest()
        path = path.with_stem(f"{path.stem}_{digest}")
    columns = [field.name for field in dataclasses.fields(TaskResult)]
    rows = [[getattr(result, name) for name in columns] for result in results]
    tasks = {row[0]: dict(zip(columns[1:], row[1:], strict=True)) for row in rows}
    about = {"source": source, "tag": found.folder.name, "step": found.step, "settings": settings}
    last = [[score, "", values[score], ""]] if score in values else []
    write_both(path, [columns, *rows, *last], about | {"values": values, "tasks": tasks} | more)
    return path
