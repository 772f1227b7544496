"""How long to train, with which batch and rates: nanochat's rules of 2026, each number with its reason."""

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp

from jaxchat.config import BaseConfig, ModelConfig, UserError
from jaxchat.model.flops import flops_per_token, scaling_params

BATCH, DEPTH = 2**19, 12  # the batch that was best for the model of this depth, in tokens
BATCH_POWER = 0.383  # the best batch grows with this power of the tokens that are trained on
MOMENTUM_WARMUP = 400  # steps


@dataclasses.dataclass(frozen=True)
class Horizon:
    """steps of `batch` tokens; lr_scale: factor on learning rates; decay: Muon's first weight decay."""

    steps: int
    batch: int
    lr_scale: float
    decay: float
    plan: tuple[tuple[str, str], ...] = ()  # rows of a run's plan


def horizon_2026(config: BaseConfig, model: ModelConfig, reference: ModelConfig) -> Horizon:
    """The horizon of a model. reference: the model of DEPTH layers with the same vocabulary and context.

    UserError: nothing says how long to train, or that is less than a step.
    """
    ratio, count = config.target_param_data_ratio, scaling_params(model)
    wanted = int(ratio * count)  # tokens
    batch = config.total_batch_size
    why = "as given"
    growth = count / scaling_params(reference)
    if batch < 0:
        best = BATCH * growth**BATCH_POWER
        batch = 2 ** round(math.log2(best))
        why = f"the power of 2 next to {BATCH:,} × (tokens / depth {DEPTH}'s)^{BATCH_POWER} = {best:,.0f}"
    if config.num_iterations > 0:
        steps, reason = config.num_iterations, "as given"
    elif config.target_flops > 0:
        steps = round(config.target_flops / (flops_per_token(model) * batch))
        reason = f"--target_flops={config.target_flops:g} / (FLOPs a token × batch)"
    elif ratio > 0:
        steps, reason = wanted // batch, f"{ratio:g} tokens for each of {count:,} weights of layers and head"
    else:
        raise UserError(
            "how long to train? give --num_iterations, --target_flops or --target_param_data_ratio"
        )
    if steps < 1:
        raise UserError(
            f"the horizon, {reason}, is less than one step of {batch:,} tokens; lower --total_batch_size"
        )
    scale = math.sqrt(batch / BATCH)
    decay = config.weight_decay * scale / growth
    plan = (
        ("horizon", f"{steps:,} steps = {steps * batch:,} tokens: {reason}"),
        ("batch size", f"{batch:,} tokens: {why}"),
        ("rates", f"× {scale:.4g} = √(batch / {BATCH:,}); warmup {config.warmup_steps} steps"),
        (
            "decay",
            f"{decay:.4g} = {config.weight_decay:g} × {scale:.4g} / (tokens / depth {DEPTH}'s), falling to 0",
        ),
    )
    return Horizon(steps, batch, scale, decay, plan)


def momentum_2026(num_steps: int, warmdown_ratio: float = 0.65, warmup: int = MOMENTUM_WARMUP) -> Callable:
    """Muon's momentum after `count` updates: from 0.85 to 0.97 in `warmup`, to 0.90 while rates cool down."""
    cooling = round(warmdown_ratio * num_steps)

    def momentum(count):
        late = jnp.clip((count - (num_steps - cooling)) / max(cooling, 1), 0.0, 1.0)
        return jnp.where(count < warmup, 0.85 + (0.97 - 0.85) * (count / warmup), 0.97 - (0.97 - 0.90) * late)

    return momentum


def decay_2026(start: float, num_steps: int) -> Callable:
    """Muon's weight decay after `count` updates: half a cosine from `start` to 0."""
    return lambda count: start * 0.5 * (1 + jnp.cos(jnp.pi * count / num_steps))
