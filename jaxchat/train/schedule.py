"""The learning-rate multiplier as a function of progress: 0 before a stage's first step, 1 after its last."""

import jax
import jax.numpy as jnp
import numpy as np


def lr_multiplier(
    progress: float | jax.Array,
    step: float,
    *,
    warmup_ratio: float,
    warmdown_ratio: float,
    final_lr_frac: float,
) -> float | jax.Array:
    """The learning-rate multiplier: linear from 0 in the first `warmup_ratio`, then 1, then linear to
    `final_lr_frac`.

    progress: fraction of the stage that is done; step: fraction that this step adds, so that the first step
    of a warmup has a rate above 0 and its last step the full one. (warmup 0, warmdown 1) is a straight line
    from 1 down.
    """
    xp = jnp if isinstance(progress, jax.Array) else np
    up = xp.minimum(1.0, (progress + step) / warmup_ratio) if warmup_ratio else 1.0
    fraction = xp.minimum(1.0, xp.maximum(0.0, 1.0 - progress) / warmdown_ratio) if warmdown_ratio else 1.0
    return xp.where(progress < warmup_ratio, up, fraction + (1.0 - fraction) * final_lr_frac)


def cosine(progress: float | jax.Array, step: float) -> float | jax.Array:
    """The learning-rate multiplier of half a cosine: 1 at progress 0, 0 at progress 1."""
    del step
    xp = jnp if isinstance(progress, jax.Array) else np
    return 0.5 * (1.0 + xp.cos(np.pi * progress))
