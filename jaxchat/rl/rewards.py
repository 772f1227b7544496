"""Rewards: named terms that score an answer, and their weighted sum."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from jaxchat.config import UserError
from jaxchat.data.tasks import JSON, Task
from jaxchat.data.tasks.answers import final_number, states_the_number
from jaxchat.eval import chat
from jaxchat.infer.scheduler import Generation
from jaxchat.infer.text import split_parts
from jaxchat.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Answer:
    """The text of an answer to a problem, and whether the answer was finished."""

    text: str  # the complete answer with special tokens spelled out, as evaluation reads it
    parts: list[tuple[str, str]]  # (kind, text) of text, tool calls and their results: infer/text.py
    finished: bool  # ended by itself, not at a limit

    @classmethod
    def of(cls, generation: Generation, tokenizer: Tokenizer) -> "Answer":
        return cls(
            tokenizer.decode(generation.tokens), split_parts(generation, tokenizer), generation.finished
        )

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.parts]


Checker = Callable[[dict, Answer], bool]  # (row, answer) -> whether the answer to the row's problem is right

# Terms of a reward besides "answer", which is the checker's result.
TERMS: dict[str, Callable[[Answer], bool]] = {
    "format": lambda answer: final_number(answer.text) is not None,
    "finished": lambda answer: answer.finished,
    "tool": lambda answer: "python_output" in answer.kinds(),
}


def parse_reward(spec: str) -> dict[str, float]:
    """Parse a --reward such as "answer:1,format:0.1" into {term: weight}. Raise UserError if invalid."""
    known, weights = ("answer", *TERMS), {}
    for part in spec.split(","):
        name, colon, weight = part.strip().partition(":")
        try:
            value = float(weight) if colon else 1.0
        except ValueError:
            value = np.nan
        if name not in known or name in weights or not np.isfinite(value):
            raise UserError(
                f"--reward={spec}: {part.strip()!r} is not a term; write name:weight, separated by commas, "
                f"with each of {', '.join(known)} at most once"
            )
        weights[name] = value
    if not any(weight > 0 for weight in weights.values()):
        raise UserError(f"--reward={spec} rewards nothing; give at least one term a weight above 0")
    return weights


def checker_for(task: Task) -> tuple[Checker, str]:
    """Return (function that says whether an answer is right, what it compares, such as "the text").

    Raises UserError if the task has no checker, or if its checker can't run on this machine.
    """
    if task.name.lower().endswith(JSON):
        wanted = [_wanted(task, row) for row in range(len(task))]
        by_number = all(final_number(text) is not None for text in wanted)
        return (states_number, "the number after ####") if by_number else (states_text, "the text")
    name = task.name.partition("/")[0]
    known = chat.TASKS.get(name)
    if known and known.check is states_the_number:
        return states_number, "the number after ####"
    if known and known.check:
        if why := chat.why_not(name):
            raise UserError(f"{task.name}: {why}; train on another task")
        return lambda row, answer: known.check(row, answer.text), "its tests"
    if known or name == "SimpleSpelling":  # letters of multiple choice are compared as texts
        return states_text, "the text"
    able = [*chat.TASKS, "SimpleSpelling"]
    raise UserError(
        f"{task.name} has no checker, so nothing says which answers are right; train on "
        f"{', '.join(able)}, or on a .jsonl file of conversations that end with the right answer"
    )


def _wanted(task: Task, row: int) -> str:
    last = task[row]["messages"][-1]
    if last["role"] != "assistant" or not text_of(last["content"]):
        problem = f"{task.name}, row {row} does not end with an answer to compare with"
        raise UserError(f"{problem}; add one, or remove the row")
    return text_of(last["content"])


def text_of(content: str | list[dict]) -> str:
    """Return a message's text without tool calls and their results, with single spaces between words."""
    if not isinstance(content, str):
        content = "".join(part["text"] for part in content if part["type"] == "text")
    return " ".join(content.split())


def states_number(row: dict, answer: Answer) -> bool:
    """Return whether the answer has the same number after #### as the row's reference answer."""
    return states_the_number(row, answer.text)


def states_text(row: dict, answer: Answer) -> bool:
    """Return whether answer and reference have the same text, apart from whitespace and tool calls."""
    said = "".join(text for kind, text in answer.parts if kind == "text")
    return " ".join(said.split()) == text_of(row["messages"][-1]["content"])


def combine(terms: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """Return the rewards of G answers to each of E problems: Σ weight · term, float64 [E, G].

    If "answer" has a weight, the other terms count only for problems with both right and wrong answers.
    terms: {name: values [E, G]}. Raises UserError if a reward is not finite.
    """
    rewards_EG = np.zeros(next(iter(terms.values())).shape)
    for name, weight in weights.items():
        term_EG = np.asarray(terms[name], np.float64)
        if name != "answer" and "answer" in weights:
            right_EG = terms["answer"]  # without right and wrong answers, only form would be learnt
            term_EG = np.where((right_EG != right_EG[:, :1]).any(1, keepdims=True), term_EG, 0.0)
        rewards_EG += weight * term_EG
    if not np.isfinite(rewards_EG).all():
        group, sample = np.argwhere(~np.isfinite(rewards_EG))[0]
        raise UserError(
            f"the reward of answer {sample} to problem {group} of the step is {rewards_EG[group, sample]}; "
            "it must be a number: correct the checker"
        )
    return rewards_EG
