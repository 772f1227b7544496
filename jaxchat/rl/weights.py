"""Policy-gradient losses, expressed as weights of the tokens in the training loss.

The training loss is Σ w·nll with constant weights w of any sign, so its gradient is −Σ w·∇log π. Every loss
here has such a gradient; only the weights differ. All functions take NumPy arrays and compute in float64.

Letters: R rows (answers of a step), T positions. The value at position t is that of token t + 1.
"""

import dataclasses

import numpy as np

MOST_LOG_RATIO = 20.0  # log-ratios are clipped to ± this before exp


@dataclasses.dataclass(frozen=True)
class Policy:
    """A policy-gradient loss and its constants; docs/rl.md has the formulas.

    loss: "reinforce", "ppo", "cispo" or "gspo".
    clip_low, clip_high: the ratio of new to old probability is clipped at 1 − clip_low and 1 + clip_high.
    dual_clip: PPO's upper bound on this ratio for negative advantages; 0: no bound.
    tis: upper bound on the importance weight, trainer's ÷ sampler's probability; 0: no such weight.
    kl_coef: weight of KL(policy ‖ reference).
    """

    loss: str = "reinforce"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float = 3.0
    tis: float = 0.0
    kl_coef: float = 0.0


@dataclasses.dataclass(frozen=True)
class LogProbs:
    """Log-probabilities [R, T] of the target tokens; None where the Policy does not need them.

    now: under the current weights.
    old: under the weights that sampled the answers, computed by the trainer.
    sampler: as reported by the sampler.
    reference: under the model before training, for the KL term.
    """

    now: np.ndarray | None = None
    old: np.ndarray | None = None
    sampler: np.ndarray | None = None
    reference: np.ndarray | None = None


def row_scales(kind: str, mask_RT: np.ndarray, mixed_R: np.ndarray, max_tokens: int) -> np.ndarray:
    """Return the factor on each row's loss weights that normalizes the loss, [R, 1].

    A row is mixed if the answers to its problem did not all get the same reward.
    kind: "tokens": 1 ÷ number of sampled tokens in mixed rows.
        "all_tokens": 1 ÷ number of sampled tokens in all rows.
        "rows": 1 ÷ (number of sampled tokens in the row · number of mixed rows with sampled tokens).
        "constant": 1 ÷ (number of rows · max_tokens).
    mask_RT: 1 where the target token was sampled.
    mixed_R: whether each row is mixed.
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
    """Return the weight of each target token in the training loss, float64 [R, T].

    mask_RT: 1 for sampled tokens of problems whose answers differ in reward, else 0.
    scales_R1: result of row_scales; for GSPO, of the kind "rows".
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
    """Return the fraction of the tokens with a nonzero advantage whose loss weight is 0 due to clipping."""
    a_R1, m_RT = np.asarray(advantages_R, np.float64)[:, None], np.asarray(mask_RT, np.float64)
    learnt_RT = (m_RT > 0) & (a_R1 != 0)
    clipped_RT = learnt_RT & (_ratio(policy, a_R1, m_RT, logprobs) == 0)
    return float(clipped_RT.sum() / max(1, learnt_RT.sum()))


def _ratio(policy: Policy, a_R1, m_RT, logprobs: LogProbs):
    """Return each token's probability under the new policy ÷ that under the old one, as [R, T].

    The ratio is 0 where it is clipped; with loss "cispo" it is limited to 1 + clip_high instead. Loss "gspo"
    has one ratio per row, [R, 1], and "reinforce" has the ratio 1.
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
