"""The learning-rate multiplier as a function of progress: 0 before a stage's first step, 1 after its last."""


def lr_multiplier(
    progress: float, step: float, *, warmup_ratio: float, warmdown_ratio: float, final_lr_frac: float
) -> float:
    """Linear up over the first `warmup_ratio` of a stage, 1, then linear to `final_lr_frac` over the last part.

    progress: the share of the stage that is done; step: the share that this step adds, so that the first step of a
    warmup has a rate above 0 and its last step the full one. (warmup 0, warmdown 1) is a straight line from 1 down.
    """
    if progress < warmup_ratio:
        return min(1.0, (progress + step) / warmup_ratio)
    left = max(0.0, 1.0 - progress)
    if left < warmdown_ratio:
        fraction = left / warmdown_ratio
        return fraction + (1.0 - fraction) * final_lr_frac
    return 1.0
