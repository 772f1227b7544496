"""The learning-rate multiplier as a function of progress, from 0 (a stage's start) to 1 (its end)."""

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

    warmup_ratio, warmdown_ratio: fractions of the stage that are warmup and cooldown, both linear.
    progress: fraction of the stage that is complete. step: fraction that this step adds. It is included in
    the warmup, so that the first step has a rate above 0 and the last step of the warmup the full rate.
    """
    xp = jnp if isinstance(progress, jax.Array) else np
    up = xp.minimum(1.0, (progress + step) / warmup_ratio) if warmup_ratio else 1.0
    fraction = xp.minimum(1.0, xp.maximum(0.0, 1.0 - progress) / warmdown_ratio) if warmdown_ratio else 1.0
    return xp.where(progress < warmup_ratio, up, fraction + (1.0 - fraction) * final_lr_frac)


def cosine(progress: float | jax.Array, step: float) -> float | jax.Array:
    """Return a multiplier that falls along half a cosine: 1 at progress 0, 0 at progress 1; ignore `step`."""
    del step
    xp = jnp if isinstance(progress, jax.Array) else np
    return 0.5 * (1.0 + xp.cos(np.pi * progress))
