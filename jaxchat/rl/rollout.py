"""The sampled answers of a step and their statistics, computed without JAX.

Letters: E problems, G answers to each, R = E·G rows (answers, grouped by problem), T positions.
"""

import dataclasses
from dataclasses import field

import numpy as np

from jaxchat.infer.scheduler import Generation
from jaxchat.rl.advantages import mixed_groups
from jaxchat.rl.rewards import TERMS, Answer


@dataclasses.dataclass
class Rollout:
    """The rows of a step. A row is a prompt, a sampled answer, and the token that ended the answer, if any.

    All fields can be written as JSON, so that checkpoints can store them.
    """

    problems: list[int] = field(default_factory=list)  # E: indices into the tasks
    tokens: list[list[int]] = field(default_factory=list)  # R: prompt and answer
    sampled: list[list[bool]] = field(default_factory=list)  # R: whether the model sampled the token
    sampler: list[list[float]] = field(default_factory=list)  # R: the sampler's log-probabilities, else 0
    rewards: list[list[float]] = field(default_factory=list)  # E, G
    finished: list[bool] = field(default_factory=list)  # R: the answer ended by itself
    old: list[list[float]] | None = None  # R: the trainer's log-probabilities before the first update
    numbers: dict[str, float] = field(default_factory=dict)  # to log

    @property
    def rewards_EG(self) -> np.ndarray:
        return np.array(self.rewards, np.float64)

    def positions(self, values: list[list]) -> np.ndarray:
        """Return values of tokens as an array [R, T] aligned with the target tokens, padded with zeros.

        values: for each row, one value per token. The first value is dropped: the first token is no target.
        """
        found_RT = np.zeros((len(values), max(map(len, self.tokens)) - 1), np.float64)
        for row, of_row in enumerate(values):
            found_RT[row, : len(of_row) - 1] = of_row[1:]
        return found_RT

    def add(self, problems: list[int], prompts: list[list[int]], generations: list[Generation], rewards_EG):
        """Add to the rollout G answers to each of E problems.

        problems: E indices. prompts: one per problem. generations: E·G, grouped by problem.
        """
        samples = len(generations) // len(problems)
        for row, generation in enumerate(generations):
            tokens, sampled, logprobs = row_of(prompts[row // samples], generation)
            self.tokens.append(tokens)
            self.sampled.append(sampled)
            self.sampler.append(logprobs)
            self.finished.append(generation.finished)
        self.problems += problems
        self.rewards += rewards_EG.tolist()

    def best_groups(self, count: int) -> "Rollout":
        """Return a Rollout of only `count` problems, preferring those whose answers got different rewards."""
        samples = len(self.rewards[0])
        groups = sorted(range(len(self.rewards)), key=lambda e: len(set(self.rewards[e])) == 1)[:count]
        rows = [e * samples + g for e in groups for g in range(samples)]
        best = Rollout(numbers=self.numbers)
        for name in ("problems", "rewards"):
            setattr(best, name, [getattr(self, name)[e] for e in groups])
        for name in ("tokens", "sampled", "sampler", "finished"):
            setattr(best, name, [getattr(self, name)[r] for r in rows])
        return best


def row_of(prompt: list[int], generation: Generation) -> tuple[list[int], list[bool], list[float]]:
    """Join a prompt and its answer. Return (token ids, whether the model sampled each, log-probabilities).

    Log-probabilities are 0 for tokens that were not sampled. The token that ended the answer is included, so
    that the model learns to stop.
    """
    before = len(prompt)
    tokens, sampled = [*prompt, *generation.tokens], [False] * before + [not by for by in generation.forced]
    logprobs = [0.0] * before + generation.logprobs
    if generation.end:
        token, logprob = generation.end
        tokens, sampled, logprobs = [*tokens, token], [*sampled, True], [*logprobs, logprob]
    return tokens, sampled, [p if own else 0.0 for p, own in zip(logprobs, sampled, strict=True)]


def numbers_of(rollout: Rollout, answers: list[Answer], right_EG: np.ndarray) -> dict[str, float]:
    """Return statistics of a step's answers to log, {name: value}. right_EG: whether each answer is right."""
    rewards_EG, right_R = rollout.rewards_EG, right_EG.reshape(-1)
    mixed_E = mixed_groups(rewards_EG)
    lengths_R = np.array([sum(row) for row in rollout.sampled])
    logprobs = np.array([p for row in rollout.sampler for p in row])
    kinds = [answer.kinds() for answer in answers]
    calls, values = (sum(one.count(kind) for one in kinds) for kind in ("python", "python_output"))
    found = {
        "reward": rewards_EG.mean(),
        "reward_std": rewards_EG.std(),
        "right": right_R.mean(),
        "groups_mixed": mixed_E.mean(),
        "groups_right": (~mixed_E & right_EG.all(axis=1)).mean(),
        "groups_wrong": (~mixed_E & ~right_EG.any(axis=1)).mean(),
        "answer_tokens": lengths_R.mean(),
        "answer_tokens_max": lengths_R.max(),
        **{name: np.mean([term(answer) for answer in answers]) for name, term in TERMS.items()},
        "tool_calls": calls / len(kinds),
        "made_up_outputs": sum(one.count("made up") for one in kinds) / len(kinds),
        "entropy": -logprobs.sum() / max(1, lengths_R.sum()),
    }
    if calls:
        found["tool_values"] = values / calls
    for name, which_R in (("answer_tokens_right", right_R), ("answer_tokens_wrong", ~right_R)):
        if which_R.any():
            found[name] = lengths_R[which_R].mean()
    return {name: float(value) for name, value in found.items()}
