"""Advantages: the rewards of answers, relative to those of other answers to the same problem.

Letters: E problems of a step, G answers to each (a group).
"""

import numpy as np

EPSILON = 1e-6  # added to a standard deviation before dividing by it


def mixed_groups(rewards_EG: np.ndarray) -> np.ndarray:
    """Return, for each problem, whether the rewards of its G answers are not all equal, bool [E]."""
    # Rewards are compared, because the computed standard deviation of equal numbers may not be 0.
    return (rewards_EG != rewards_EG[:, :1]).any(axis=1)


def advantages(rewards_EG: np.ndarray, kind: str) -> np.ndarray:
    """Return the advantages, float64 [E, G], of G answers to each of E problems.

    The G answers to one problem are a group. The advantages are 0 where all rewards of a group are equal.
    kind: "mean": reward − mean reward of the group (nanochat, Dr. GRPO).
        "loo": reward − mean of the group's other rewards, for an unbiased gradient (RLOO).
        "std": the advantage of "mean" ÷ standard deviation of the group's rewards (GRPO).
        "batch_std": the advantage of "mean" ÷ standard deviation of all rewards.
    """
    rewards_EG = np.asarray(rewards_EG, np.float64)
    group = rewards_EG.shape[1]
    centred_EG = rewards_EG - rewards_EG.mean(axis=1, keepdims=True)
    scale = {
        "mean": 1.0,
        "loo": group / (group - 1),
        "std": 1 / (rewards_EG.std(axis=1, ddof=1, keepdims=True) + EPSILON),
        "batch_std": 1 / (rewards_EG.std() + EPSILON),
    }[kind]
    return np.where(mixed_groups(rewards_EG)[:, None], centred_EG * scale, 0.0)
