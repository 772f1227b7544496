"""CORE (DCLM): 22 in-context tasks, scored by the most probable continuation, centred so that chance is 0.

The tasks are read from a bundle: a folder, or the zip that launch.download fetches. core.yaml lists the
tasks, eval_data/ holds their items (questions) as JSON lines, and eval_meta_data.csv the accuracy of
guessing. Items, few-shot examples and prompts are the same as for published scores. Prompts of more than
four times the model's context are cut at their start, and their items are counted as cropped.
"""

import csv
import dataclasses
import json
import os
import random
import zipfile
from collections.abc import Callable

import numpy as np
import yaml

from jaxchat.config import UserError, base_dir, counted, user_path
from jaxchat.eval.results import TaskResult
from jaxchat.eval.scoring import Score, Scorer, Span
from jaxchat.tokenizer import Tokenizer

DRAW_SEED = 1337  # chooses the items
EXAMPLES_SEED = 1234  # plus the item's index: chooses its few-shot examples
FIELDS = {
    "multiple_choice": ("query", "choices"),
    "schema": ("context_options", "continuation"),
    "language_modeling": ("context", "continuation"),
}


class NoBundle(UserError):
    """Raised when CORE's bundle is missing or incomplete."""


@dataclasses.dataclass(frozen=True)
class CoreTask:
    label: str
    kind: str  # a key of FIELDS
    shots: int  # examples before each question
    delimiter: str  # between a question and its answer
    chance: float  # accuracy of guessing, as the bundle states it
    items: list[dict]

    def drawn(self, max_per_task: int) -> list[dict]:
        """Return at most max_per_task items (-1: all) in a fixed random order.

        Raises UserError if there are too few items to draw the task's few-shot examples from.
        """
        items = list(self.items)
        random.Random(DRAW_SEED).shuffle(items)
        items = items if max_per_task < 0 else items[:max_per_task]
        if len(items) <= self.shots:
            raise UserError(
                f"CORE's {self.label} needs {self.shots} examples besides the question, but has only "
                f"{counted(len(items), 'item')}; raise --core_metric_max_per_task (base_train) or "
                f"--max_per_task (base_eval) to at least {self.shots + 1}"
            )
        return items


@dataclasses.dataclass(frozen=True)
class CoreResult(TaskResult):
    right: list[bool]  # for each item
    cropped: int = 0  # items with a prompt that was cut at its start

    @property
    def note(self) -> str:
        return f"  ({self.cropped} cropped)" if self.cropped else ""


def load_bundle(place: str = "") -> list[CoreTask]:
    """Read the tasks of a bundle, which is a folder or a zip; "" means eval_bundle[.zip] in base_dir().

    Raises NoBundle if a file is missing, or UserError if the content is malformed.
    """
    path = user_path(place) if place else base_dir() / "eval_bundle"
    if not place and not path.is_dir():
        path = path.with_suffix(".zip")
    zipped = zipfile.is_zipfile(path)
    root = zipfile.Path(path) if zipped else path
    root = root / "eval_bundle" if (root / "eval_bundle").exists() else root
    try:
        listed = yaml.safe_load((root / "core.yaml").read_text(encoding="utf-8-sig"))["icl_tasks"]
        rows = csv.DictReader((root / "eval_meta_data.csv").read_text(encoding="utf-8-sig").splitlines())
        chance = {row["Eval Task"]: 0.01 * float(row["Random baseline"]) for row in rows}
        if not listed:
            raise ValueError("core.yaml lists no tasks")
        return [read_task(root / "eval_data", entry, chance[entry["label"]]) for entry in listed]
    except (OSError, LookupError, ValueError, TypeError, yaml.YAMLError, zipfile.BadZipFile) as problem:
        missing = isinstance(problem, FileNotFoundError | NotADirectoryError)
        why = f" ({type(problem).__name__}: {problem})" if path.exists() else ""
        why = ", which is neither a folder nor a zip" if path.is_file() and not zipped else why
        raise (NoBundle if missing else UserError)(
            f"no CORE bundle can be read in {path}{why}; fetch it: python -m launch.download core-bundle; "
            "or name its folder with --eval_bundle"
        ) from problem


def read_task(folder: os.PathLike, entry: dict, chance: float) -> CoreTask:
    """Read from `folder` the task that an entry of core.yaml describes. chance: accuracy of guessing."""
    label, shots = entry["label"], int(entry["num_fewshot"][0])
    delimiter = entry.get("continuation_delimiter", " ")
    if shots < 0 or not isinstance(delimiter, str) or not 0 <= chance < 1:
        raise ValueError(f"{label} has invalid {shots} shots, delimiter {delimiter!r} or chance {chance}")
    path, kind = folder / entry["dataset_uri"], entry["icl_task_type"]
    items = read_items(path.read_text(encoding="utf-8-sig"), kind, path)
    return CoreTask(label, kind, shots, delimiter, chance, items)


def read_items(text: str, kind: str, path: os.PathLike) -> list[dict]:
    if kind not in FIELDS:
        raise UserError(f"{path}: unknown icl_task_type {kind!r}; it is one of {', '.join(FIELDS)}")
    items = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            for field in FIELDS[kind]:
                parts = item[field] if field in ("choices", "context_options") else [item[field]]
                if not parts or not all(isinstance(part, str) for part in parts):
                    raise ValueError(f"`{field}` is not text")
            options = item.get("choices") or item.get("context_options")
            if options and (type(item["gold"]) is not int or not 0 <= item["gold"] < len(options)):
                raise ValueError(f"gold {item['gold']!r} is not an index of the {len(options)} options")
        except (KeyError, ValueError, TypeError) as problem:
            raise UserError(f"{path}, line {number}: {type(problem).__name__} {problem}") from problem
        items.append(item)
    return items


def examples_of(task: CoreTask, items: list[dict], index: int) -> list[dict]:
    """Draw the few-shot examples for items[index] from the other items, with a fixed seed."""
    drawn = random.Random(EXAMPLES_SEED + index).sample(range(len(items) - 1), task.shots)
    return [items[i + (i >= index)] for i in drawn]  # any item but this one


def format_example(task: CoreTask, item: dict) -> str:
    """Return an item with its right answer as text, for use as a few-shot example."""
    if task.kind == "multiple_choice":
        question, answer = item["query"], item["choices"][item["gold"]]
    elif task.kind == "schema":
        question, answer = item["context_options"][item["gold"]], item["continuation"]
    else:
        question, answer = item["context"].strip(), item["continuation"]
    return question + task.delimiter + answer


def prompts_of(task: CoreTask, items: list[dict], index: int) -> list[str]:
    """Return the prompts of items[index], which begin with few-shot examples.

    There is one prompt per option. In language modeling, there are two: without and with the answer.
    """
    item = items[index]
    before = "".join(format_example(task, example) + "\n\n" for example in examples_of(task, items, index))
    if task.kind == "multiple_choice":
        return [before + item["query"] + task.delimiter + choice for choice in item["choices"]]
    if task.kind == "schema":
        end = task.delimiter + item["continuation"]
        return [before + context + end for context in item["context_options"]]
    asked = before + item["context"].strip() + task.delimiter
    return [asked.strip(), asked + item["continuation"]]


def spans_of(task: CoreTask, prompts: list[str], tokenizer: Tokenizer) -> list[Span]:
    """Return the tokens to score in an item's prompts.

    Multiple choice: the tokens after the common beginning of the prompts. Schema: the common ending of the
    prompts. Language modeling: the answer.
    """
    encoded = map(tokenizer.encode_array, prompts)
    rows = [np.concatenate([[tokenizer.bos], ids]).astype(np.int32) for ids in encoded]
    if task.kind == "schema":
        shared = common_length([row[::-1] for row in rows])
        return [Span(row, len(row) - shared, len(row)) for row in rows]
    start = common_length(rows)
    return [Span(row, start, len(row)) for row in (rows if task.kind == "multiple_choice" else rows[1:])]


def common_length(rows: list[np.ndarray]) -> int:
    """Return the number of leading tokens that all rows share."""
    shortest = min(map(len, rows))
    same = np.all([row[:shortest] == rows[0][:shortest] for row in rows], axis=0)
    return shortest if same.all() else int(np.argmin(same))


def is_right(task: CoreTask, item: dict, scores: list[Score]) -> bool:
    """Return whether the model answers an item right, given the scores of the item's spans.

    In language modeling, every token of the answer must be the most probable one. In other tasks, the right
    option must have the lowest mean loss.
    """
    if task.kind == "language_modeling":
        return len(scores[0].right) > 0 and bool(scores[0].right.all())
    losses = [score.loss for score in scores]
    return losses.index(min(losses)) == item["gold"]


def evaluate(
    scorer: Scorer,
    tokenizer: Tokenizer,
    bundle: list[CoreTask],
    max_per_task: int = -1,
    on_result: Callable[[TaskResult], None] = lambda result: None,
) -> list[CoreResult]:
    """Evaluate the tasks of a bundle, and return one result per task.

    max_per_task: maximum number of items per task; -1: all. on_result: called with each result when ready.
    """
    results = []
    drawn = [task.drawn(max_per_task) for task in bundle]  # before scoring, so that too few items fail early
    for number, (task, items) in enumerate(zip(bundle, drawn, strict=True), 1):
        scorer.title = f"{task.label}, {number} of {len(bundle)}: "
        asked = [spans_of(task, prompts_of(task, items, i), tokenizer) for i in range(len(items))]
        scores = iter(scorer.spans([span for spans in asked for span in spans]))
        each = zip(items, asked, strict=True)
        right = [is_right(task, item, [next(scores) for _ in spans]) for item, spans in each]
        accuracy = sum(right) / len(right)
        centered = (accuracy - task.chance) / (1 - task.chance)
        cropped = sum(any(len(span.tokens) > scorer.longest for span in spans) for spans in asked)
        results.append(CoreResult(task.label, accuracy, centered, len(right), right, cropped))
        on_result(results[-1])
    return results
