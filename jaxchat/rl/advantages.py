"""Advantages: how much better each answer did than the others to the same problem.

Letters: E problems of a step, G answers to each (a group).
"""

import numpy as np

EPSILON = 1e-6  # added to a standard deviation before dividing by it


def mixed_groups(rewards_EG: np.ndarray) -> np.ndarray:
    """Return whether the rewards of each group differ, bool [E]; only such groups have a gradient.

    Rewards are compared directly, because the computed standard deviation of equal numbers may not be 0.
    """
    return (rewards_EG != rewards_EG[:, :1]).any(axis=1)


def advantages(rewards_EG: np.ndarray, kind: str) -> np.ndarray:
    """Advantages in float64 [E, G]; exactly 0 in groups whose rewards are all the same.

    kind: "mean": reward − mean of its group (nanochat, Dr. GRPO). "loo": reward − mean of the group's other
    rewards, for an unbiased gradient (RLOO). "std": "mean" ÷ the group's standard deviation (GRPO).
    "batch_std": "mean" ÷ the standard deviation of all rewards of the step.
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
