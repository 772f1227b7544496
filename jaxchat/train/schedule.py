"""Learning-rate multipliers as functions of progress, which is 0 at a stage's start and 1 at its end."""

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
    """Return the learning-rate multiplier: warmup from 0 to 1, then 1, then cooldown to `final_lr_frac`.

    progress: completed fraction of the stage. step: fraction of the stage that this step adds.
    warmup_ratio, warmdown_ratio: fractions of the stage spent on warmup and cooldown, both linear.
    The warmup includes this step, so that the first step's multiplier is above 0.
    """
    xp = jnp if isinstance(progress, jax.Array) else np
    warmup = xp.minimum(1.0, (progress + step) / warmup_ratio) if warmup_ratio else 1.0
    cooldown = xp.minimum(1.0, xp.maximum(0.0, 1.0 - progress) / warmdown_ratio) if warmdown_ratio else 1.0
    return xp.where(progress < warmup_ratio, warmup, cooldown + (1.0 - cooldown) * final_lr_frac)


def cosine(progress: float | jax.Array, step: float) -> float | jax.Array:
    """Return a multiplier that falls from 1 to 0 along half a cosine over the stage. `step` is ignored."""
    del step
    xp = jnp if isinstance(progress, jax.Array) else np
    return 0.5 * (1.0 + xp.cos(np.pi * progress))
