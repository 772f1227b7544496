"""ChatCORE: six tasks for chat models, which choose a letter or write an answer that is then checked."""

import dataclasses
import math
import os
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from jaxchat.config import Compute, ModelConfig, UserError
from jaxchat.data.tasks import Task
from jaxchat.data.tasks.answers import states_the_number
from jaxchat.eval import sandbox
from jaxchat.eval.results import TaskResult, mean
from jaxchat.eval.scoring import Progress, Scorer
from jaxchat.infer.engine import Engine
from jaxchat.model.flops import num_params
from jaxchat.sharding import gather_json
from jaxchat.tokenizer import Tokenizer

# Groups: an indent of four or more, the fence, what follows it, the code. A fence indented by four, as in a
# docstring, does not end a block whose opening fence is indented less.
FENCED = re.compile(
    r"(^[ \t]*(?: {4}|\t))?(```+|~~~+)[ \t]*([^\n`]*)\n(.*?)(?:(?(1)|(?<! {4})(?<!\t))\2|\Z)",
    re.DOTALL | re.MULTILINE,
)
PYTHON = re.compile(r"\W*(py|python)[\d.]*\b|\s*$", re.IGNORECASE)  # what may follow ``` before Python code

SLOTS = 64  # most answers to generate at a time


def code_of(row: dict, text: str) -> str:
    """Return the code in `text`, an answer to the HumanEval problem `row`.

    This is the first fenced block that defines the problem's function, or else the first block. If there are
    Python blocks, other blocks are ignored. An answer without blocks is returned in full.
    """
    blocks = [(PYTHON.match(info), code) for _, _, info, code in FENCED.findall(text)]
    candidates = [code for is_python, code in blocks if is_python] or [code for _, code in blocks] or [text]
    for code in candidates:
        flush = textwrap.dedent(code)  # for blocks in lists; a bare function body stays as it is
        if defines(row, flush):
            return flush
    return candidates[0]


def defines(row: dict, code: str) -> bool:
    return bool(re.search(rf"^def {re.escape(row['entry_point'])}\b", code, re.MULTILINE))


def program_of(row: dict, text: str) -> str:
    """Return a program that tests `text`, an answer to the HumanEval problem `row`.

    If the answer does not define the problem's function, it is taken as the continuation of the prompt.
    """
    code = code_of(row, text)
    code = row["prompt"] + ("\n" if defines(row, code) else "") + code  # prompts may hold imports and helpers
    return f"{code}\n\n{row['test']}\n\ncheck({row['entry_point']})\n"


def passes_its_tests(row: dict, text: str) -> bool:
    """Return whether an answer to a HumanEval problem passes the problem's tests in the sandbox."""
    return sandbox.run(program_of(row, text)).passed


@dataclasses.dataclass(frozen=True)
class ChatTask:
    spec: str  # for load_task
    chance: float  # accuracy of guessing
    check: Callable[[dict, str], bool] | None  # whether a written answer is right; None: a letter is chosen


TASKS = {
    "ARC-Easy": ChatTask("ARC-Easy/test", 0.25, None),
    "ARC-Challenge": ChatTask("ARC-Challenge/test", 0.25, None),
    "MMLU": ChatTask("MMLU/test", 0.25, None),
    "GSM8K": ChatTask("GSM8K/test", 0.0, states_the_number),
    "HumanEval": ChatTask("HumanEval/test", 0.0, passes_its_tests),
    "SpellingBee": ChatTask("SpellingBee/test:256", 0.0, states_the_number),
}


def drawn(task: Sequence[dict], max_problems: int) -> list[dict]:
    """Return at most max_problems problems of a task (-1: all) in a fixed random order."""
    count = len(task) if max_problems < 0 else min(max_problems, len(task))
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(task))  # neighbours share their subject
    return [task[int(i)] for i in order[:count]]


def why_not(name: str) -> str:
    """Return why a task cannot be measured on this machine, or "" if it can."""
    if name == "HumanEval":
        try:
            sandbox.check()
        except UserError as problem:
            return str(problem)
    return ""


def batch_size_for(
    model: ModelConfig, compute: Compute, memory: int | None, *, most: int = SLOTS, each: int = 4
) -> int:
    """Return how many answers to generate at a time: a power of two that fits in memory, but at most `most`.

    memory: bytes per device. None means unknown: return the smaller of SLOTS and `most`.
    each: bytes of memory per parameter, besides the copy in the compute dtype.
    """
    if memory is None:
        return min(SLOTS, most)
    size = 4 if compute.dtype == "float32" else 2
    slot = 2 * model.n_layer * model.sequence_len * model.n_kv_head * model.head_dim * size
    slot += 4 * model.vocab_size
    room = 0.9 * memory - (each + size) * num_params(model)
    fitting = max(1, int(room // (2 * slot)))
    return min(most, 1 << (fitting.bit_length() - 1))


def choose_letters(scorer: Scorer, tokenizer: Tokenizer, rows: list[dict]) -> list[bool]:
    """Return, for each multiple-choice problem, whether the right letter is the most probable one.

    Only the letters of the problem's choices are compared. Long problems are cut at their start.
    """
    prompts = [tokenizer.render_for_completion(row) for row in rows]
    # A letter is one byte, so it is one token.
    letters = [[tokenizer.encode(letter)[0] for letter in row["letters"]] for row in rows]
    chosen = scorer.choose(prompts, letters)
    return [row["letters"][c] == row["messages"][-1]["content"] for row, c in zip(rows, chosen, strict=True)]


def letter_accuracy(
    scorer: Scorer, tokenizer: Tokenizer, task: Sequence[dict], max_problems: int = -1
) -> float:
    """Return the accuracy on a fixed sample of at most max_problems multiple-choice problems (-1: on all)."""
    right = choose_letters(scorer, tokenizer, drawn(task, max_problems))
    return sum(right) / max(1, len(right))


def in_threads(check: Callable, *arguments: Sequence) -> list:
    """Return list(map(check, *arguments)), computed in one thread per core."""
    # A machine may have more cores than this process may use.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    with ThreadPoolExecutor(cores) as threads:
        return list(threads.map(check, *arguments))


def write_answers(
    engine: Engine,
    rows: list[dict],
    check: Callable[[dict, str], bool],
    *,
    title: str = "",
    quiet: bool = False,
    **options,
) -> list[list[bool]]:
    """Generate answers to each problem in `rows`; return whether each answer is right, as [problem][sample].

    check: takes a problem and the text of an answer, and returns whether the answer is right.
    options: arguments of Engine.generate, including max_tokens. Long problems are cut at their start.
    title: prefix of progress lines. quiet: print no progress.
    """
    tokenizer, limit = engine.tokenizer, engine.config.sequence_len
    room = limit - min(options["max_tokens"], limit // 2)
    prompts = [tokenizer.render_for_completion(row)[-room:] for row in rows]
    progress = Progress(len(rows) * options.get("num_samples", 1), f"{title}written", quiet=quiet)
    answers = engine.generate(prompts, on_progress=progress.add, **options)
    samples, right = len(answers) // max(1, len(rows)), []
    if jax.process_index() == 0:  # programs run in one process only
        asked = [row for row in rows for _ in range(samples)]
        right = in_threads(check, asked, [tokenizer.decode(answer.tokens) for answer in answers])
    right = gather_json({"right": right})[0]["right"]
    return [right[i : i + samples] for i in range(0, len(right), samples)]


def pass_at(k: int, right: list[list[bool]]) -> float:
    """Return pass@k: the chance that k of a problem's answers include a right one, averaged over problems.

    right: whether each answer is right, as [problem][answer].
    """

    def one(answers: list[bool]) -> float:
        return 1 - math.comb(len(answers) - sum(answers), k) / math.comb(len(answers), k)

    return sum(map(one, right)) / len(right)


@dataclasses.dataclass(frozen=True)
class ChatResult(TaskResult):
    """Result of a chat task. The accuracy is pass@1, the fraction of right answers averaged over problems."""

    right: list[list[bool]]  # for each problem, for each of its answers


def result_of(name: str, right: list[list[bool]]) -> ChatResult:
    accuracy, chance = pass_at(1, right), TASKS[name].chance
    return ChatResult(name, accuracy, (accuracy - chance) / (1 - chance), len(right), right)


def chat_core(results: list[TaskResult]) -> dict[str, float]:
    """Return {name: mean centred accuracy} over all results, and over all results except SpellingBee's.

    Centred accuracy is 0 for guessing and 1 for only right answers. The name is "ChatCORE" if all six tasks
    are included; otherwise it lists the missing ones, as in "ChatCORE without HumanEval".
    """
    missing = [name for name in TASKS if name not in {result.task for result in results}]

    def named(without: list[str]) -> str:
        return f"ChatCORE without {', '.join(without)}" if without else "ChatCORE"

    values = {named(missing): mean(results)}
    five = [result for result in results if result.task != "SpellingBee"]
    if 0 < len(five) < len(results):
        values[named([*missing, "SpellingBee"])] = mean(five)
    return values


def measure(
    scorer: Scorer, engine: Engine, tasks: dict[str, Task], max_problems: int, **options
) -> Iterator[tuple[list[TaskResult], dict[str, float], str]]:
    """Measure the tasks one by one. After each task, print its result and yield (results, values, score).

    results: one per task so far. values: {name: number}, such as accuracies. options: for Engine.generate.
    score: name of the ChatCORE mean in `values`. It is "" until all tasks are measured, and also afterwards
    if `tasks` lacks a task of ChatCORE other than HumanEval.
    """
    results, values = [], {}
    for number, (name, task) in enumerate(tasks.items(), 1):
        rows, title = drawn(task, max_problems), f"{name}, {number} of {len(tasks)}: "
        if check := TASKS[name].check:
            right = write_answers(engine, rows, check, title=title, **options)
        else:
            scorer.title = title
            right = [[one] for one in choose_letters(scorer, engine.tokenizer, rows)]
        results.append(result_of(name, right))
        results[-1].show()
        values[name] = results[-1].accuracy
        for k in [2**i for i in range(len(right[0]).bit_length())] if len(right[0]) > 1 else []:
            values[f"{name} pass@{k}"] = pass_at(k, right)
            print(f"    pass@{k} {values[f'{name} pass@{k}']:.4f}", flush=True)
        score = ""
        if len(results) == len(tasks) and {*tasks, "HumanEval"} == {*TASKS}:
            means = chat_core(results)
            score, values = next(iter(means)), values | means
            for mean_of, value in means.items():
                print(f"{mean_of} {value:.4f} (over {len(results) - (mean_of != score)} tasks)", flush=True)
        yield results, values, score
