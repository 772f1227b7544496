"""Advantages: the rewards of answers, relative to those of other answers to the same problem.

Letters: E problems of a step, G answers to each (a group).
"""

import numpy as np

EPSILON = 1e-6  # added to a standard deviation before dividing by it


def mixed_groups(rewards_EG: np.ndarray) -> np.ndarray:
    """Return bool [E]: whether the G answers to each problem (a group) got different rewards.

    A group without different rewards has no gradient. Rewards are compared directly, because the computed
    standard deviation of equal numbers may not be 0.
    """
    return (rewards_EG != rewards_EG[:, :1]).any(axis=1)


def advantages(rewards_EG: np.ndarray, kind: str) -> np.ndarray:
    """Compute the advantages, float64 [E, G], of G answers to each of E problems from their rewards.

    kind: "mean": reward − mean reward of the group (nanochat, Dr. GRPO). "loo": reward − mean of the other
    rewards in the group, which makes the gradient unbiased (RLOO). "std": the advantage of "mean" ÷ standard
    deviation of the group (GRPO). "batch_std": the advantage of "mean" ÷ standard deviation of all rewards of
    the step. Groups whose rewards are all equal get exactly 0.
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
