"""Policy-gradient losses, expressed as weights of the tokens in the training loss.

The training loss is Σ w·nll with constant weights w of any sign, so its gradient is −Σ w·∇log π. Every loss
here has such a gradient; only the weights differ. All functions take NumPy arrays and compute in float64.

Letters: R rows (answers of a step), T positions; a position belongs to the token that follows it.
"""

import dataclasses

import numpy as np

MOST_LOG_RATIO = 20.0  # log-ratios are clipped to ± this before exp


@dataclasses.dataclass(frozen=True)
class Policy:
    """A loss and its constants; docs/rl.md has the formulas.

    loss: "reinforce", "ppo", "cispo" or "gspo". clip_low, clip_high: bounds 1 − clip_low and 1 + clip_high
    of the probability ratio new policy ÷ old policy. dual_clip: PPO's upper bound on the ratio where the
    advantage is negative; 0: no bound. tis: upper bound on the importance weight that corrects for
    differences between sampler and trainer; 0: no importance weight. kl_coef: weight of
    KL(policy ‖ reference).
    """

    loss: str = "reinforce"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float = 3.0
    tis: float = 0.0
    kl_coef: float = 0.0


@dataclasses.dataclass(frozen=True)
class LogProbs:
    """Log-probabilities [R, T] of the target tokens; None for those that the Policy does not need.

    now: under the current weights. old: under the weights that sampled the answers, computed by the trainer.
    sampler: as reported by the sampler. reference: under the reference model of the KL term.
    """

    now: np.ndarray | None = None
    old: np.ndarray | None = None
    sampler: np.ndarray | None = None
    reference: np.ndarray | None = None


def row_scales(kind: str, mask_RT: np.ndarray, mixed_R: np.ndarray, max_tokens: int) -> np.ndarray:
    """Return the factors [R, 1] that normalize the loss weights of each row. kind: a value of --loss_norm.

    "tokens": 1 ÷ sampled tokens in mixed groups (mixed_R: rewards differ). "all_tokens": 1 ÷ sampled
    tokens in all rows. "rows": 1 ÷ (sampled tokens of the row · rows in mixed groups), so that all rows have
    equal weight. "constant": 1 ÷ (rows · max_tokens). mask_RT: 1 where the target token was sampled.
    """
    counts_R1 = mask_RT.sum(axis=1, keepdims=True).astype(np.float64)
    mixed_counts = counts_R1[mixed_R]
    number = {
        "tokens": mixed_counts.sum(),
        "all_tokens": counts_R1.sum(),
        "rows": np.maximum(1, counts_R1) * (mixed_counts > 0).sum(),
        "constant": len(mask_RT) * max_tokens,
    }[kind]
    return np.broadcast_to(1 / np.maximum(1.0, number), counts_R1.shape)


def policy_weights(
    policy: Policy, advantages_R: np.ndarray, mask_RT: np.ndarray, logprobs: LogProbs, scales_R1: np.ndarray
) -> np.ndarray:
    """Compute the weight of each target token in the training loss, float64 [R, T].

    mask_RT: 1 where the model sampled the target token and the answers to the same problem differ in reward;
    0 for prompts, padding and the tool's tokens. scales_R1: result of row_scales;
    for GSPO, called with kind "rows".
    """
    a_R1, m_RT = np.asarray(advantages_R, np.float64)[:, None], np.asarray(mask_RT, np.float64)
    weights_RT = m_RT * a_R1 * _ratio(policy, a_R1, m_RT, logprobs)
    if policy.tis:
        weights_RT *= np.minimum(_exp(logprobs.old - logprobs.sampler), policy.tis)
    if policy.kl_coef:
        # The gradient of ½(log π − log π_ref)² is, in expectation, that of KL(π ‖ π_ref): arXiv 2506.09477.
        weights_RT -= policy.kl_coef * m_RT * (logprobs.now - logprobs.reference)
    return weights_RT * scales_R1


def clipped_share(policy: Policy, advantages_R: np.ndarray, mask_RT: np.ndarray, logprobs: LogProbs) -> float:
    """Fraction of the sampled tokens with a nonzero advantage whose loss weight is 0 due to clipping."""
    a_R1, m_RT = np.asarray(advantages_R, np.float64)[:, None], np.asarray(mask_RT, np.float64)
    learnt_RT = (m_RT > 0) & (a_R1 != 0)
    clipped_RT = learnt_RT & (_ratio(policy, a_R1, m_RT, logprobs) == 0)
    return float(clipped_RT.sum() / max(1, learnt_RT.sum()))


def _ratio(policy: Policy, a_R1, m_RT, logprobs: LogProbs):
    """Return the factors of the advantages: probability ratios new ÷ old policy [R, T], 0 where clipped.

    "reinforce": the number 1. "cispo": the ratios are limited to 1 + clip_high, never 0. "gspo": one ratio
    per row, [R, 1].
    """
    if policy.loss == "reinforce":
        return 1.0
    log_ratio_RT = logprobs.now - logprobs.old
    if policy.loss == "gspo":  # one ratio per row: the geometric mean of its tokens' ratios
        log_ratio_RT = (m_RT * log_ratio_RT).sum(1, keepdims=True) / np.maximum(1, m_RT.sum(1, keepdims=True))
    ratio = _exp(log_ratio_RT)
    if policy.loss == "cispo":  # bounded, but never 0
        return np.minimum(ratio, 1 + policy.clip_high)
    clipped = (a_R1 > 0) & (ratio > 1 + policy.clip_high) | (a_R1 < 0) & (ratio < 1 - policy.clip_low)
    if policy.loss == "ppo" and policy.dual_clip:
        clipped |= (a_R1 < 0) & (ratio > policy.dual_clip)
    return np.where(clipped, 0.0, ratio)


def _exp(log_ratio):
    return np.exp(np.clip(log_ratio, -MOST_LOG_RATIO, MOST_LOG_RATIO))
