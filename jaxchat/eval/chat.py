"""What a chat model can do: multiple choice by letter, and answers that it writes and that are then checked."""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from jaxchat.eval import sandbox
from jaxchat.eval.results import TaskResult
from jaxchat.eval.scoring import Progress, Scorer
from jaxchat.infer.engine import Engine
from jaxchat.sharding import gather_json
from jaxchat.tokenizer import Tokenizer

FINAL = re.compile(r"#### (-?[\d.,]*\d)")
FENCED = re.compile(r"```(?:python)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


def final_number(text: str) -> str | None:
    """The number after the first ####, without thousands commas."""
    found = FINAL.search(text)
    return found[1].replace(",", "") if found else None


def states_the_number(row: dict, text: str) -> bool:
    """Whether an answer ends with the number that the row's own ends with."""
    content = row["messages"][-1]["content"]
    wanted = content if isinstance(content, str) else "".join(part["text"] for part in content)
    return (said := final_number(text)) is not None and said == final_number(wanted)


def program_of(row: dict, text: str) -> str:
    """A HumanEval answer as the program to run: the function, from the answer's first fenced block if it has one, its
    tests, and the call of these. An answer without the function itself goes on where the prompt ends."""
    code = fenced[1] if (fenced := FENCED.search(text)) else text
    defines_it = re.search(rf"^def {re.escape(row['entry_point'])}\b", code, re.MULTILINE)
    code = row["prompt"] + ("\n" if defines_it else "") + code  # the prompt may hold imports and helpers
    return f"{code}\n\n{row['test']}\n\ncheck({row['entry_point']})\n"


def passes_its_tests(row: dict, text: str) -> bool:
    """Whether a HumanEval answer passes; it runs in the sandbox."""
    return sandbox.run(program_of(row, text)).passed


@dataclasses.dataclass(frozen=True)
class ChatTask:
    spec: str  # for load_task
    chance: float  # the share that guessing gets right
    check: Callable[[dict, str], bool] | None  # of an answer that the model writes; None: it chooses a letter


TASKS = {
    "ARC-Easy": ChatTask("ARC-Easy/test", 0.25, None),
    "ARC-Challenge": ChatTask("ARC-Challenge/test", 0.25, None),
    "MMLU": ChatTask("MMLU/test", 0.25, None),
    "GSM8K": ChatTask("GSM8K/test", 0.0, states_the_number),
    "HumanEval": ChatTask("HumanEval/test", 0.0, passes_its_tests),
    "SpellingBee": ChatTask("SpellingBee/test:256", 0.0, states_the_number),
}


def drawn(task: Sequence[dict], max_problems: int) -> list[dict]:
    """A fixed draw of max_problems of a task's problems; all where that is below 0."""
    count = len(task) if max_problems < 0 else min(max_problems, len(task))
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(task))  # neighbours share their subject
    return [task[int(i)] for i in order[:count]]


def choose_letters(scorer: Scorer, tokenizer: Tokenizer, rows: list[dict]) -> list[bool]:
    """Of each choice problem, whether the right letter is likeliest.

    A problem is asked as in training, up to where the assistant's letter follows, and only the letters of its own
    choices compete. Of a problem longer than the model's context the end is kept.
    """
    prompts = [tokenizer.render_for_completion(row) for row in rows]
    letters = [
        [tokenizer.encode(letter)[0] for letter in row["letters"]] for row in rows
    ]  # one byte each, so one token
    chosen = scorer.choose(prompts, letters)
    return [row["letters"][c] == row["messages"][-1]["content"] for row, c in zip(rows, chosen, strict=True)]


def letter_accuracy(scorer: Scorer, tokenizer: Tokenizer, task: Sequence[dict], max_problems: int = -1) -> float:
    """The share of a choice task's problems (of a fixed draw of max_problems) that are answered right."""
    right = choose_letters(scorer, tokenizer, drawn(task, max_problems))
    return sum(right) / max(1, len(right))


def write_answers(
    engine: Engine, rows: list[dict], check: Callable[[dict, str], bool], *, quiet: bool = False, **how
) -> list[list[bool]]:
    """Of each problem, whether each of its answers is right. how: of Engine.generate; quiet: print no progress.

    Of a long problem the end is kept, at least half of what the model takes; an answer has what is left.
    """
    tokenizer, limit = engine.tokenizer, engine.config.sequence_len
    room = limit - min(how["max_tokens"], limit // 2)
    prompts = [tokenizer.render_for_completion(row)[-room:] for row in rows]
    progress = Progress(len(rows) * how.get("num_samples", 1), "written", quiet=quiet)
    answers = engine.generate(prompts, told=progress.add, **how)
    samples, right = len(answers) // max(1, len(rows)), []
    if jax.process_index() == 0:  # programs run once, not once a process
        asked = [row for row in rows for _ in range(samples)]
        # HumanEval waits for processes, on Linux alone; a machine may have more processors than are ours.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        with ThreadPoolExecutor(cores) as threads:
            right = list(threads.map(check, asked, [tokenizer.decode(answer.tokens) for answer in answers]))
    right = gather_json({"right": right})[0]["right"]
    return [right[i : i + samples] for i in range(0, len(right), samples)]


def pass_at(k: int, right: list[list[bool]]) -> float:
    """The chance that of k of a problem's answers, drawn without replacement, one is right; the mean over problems."""

    def one(answers: list[bool]) -> float:
        return 1 - math.comb(len(answers) - sum(answers), k) / math.comb(len(answers), k)

    return sum(map(one, right)) / len(right)


@dataclasses.dataclass(frozen=True)
class ChatResult(TaskResult):
    """accuracy: the mean share of a problem's answers that are right, which is pass@1."""

    right: list[list[bool]]  # of each problem, of each of its answers


def result_of(name: str, right: list[list[bool]]) -> ChatResult:
    accuracy, chance = pass_at(1, right), TASKS[name].chance
    return ChatResult(name, accuracy, (accuracy - chance) / (1 - chance), len(right), right)
