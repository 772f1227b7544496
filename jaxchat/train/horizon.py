"""Choose steps, batch size, learning rates and weight decay of base training by nanochat's rules of 2026."""

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp

from jaxchat.config import BaseConfig, ModelConfig, UserError
from jaxchat.model.flops import flops_per_token, scaling_params

REFERENCE_DEPTH, REFERENCE_BATCH = 12, 2**19  # best batch size, in tokens, for a model of that depth
BATCH_POWER = 0.383  # the best batch size grows with this power of the number of training tokens
MOMENTUM_WARMUP = 400  # steps


@dataclasses.dataclass(frozen=True)
class Horizon:
    """The length of base training, and the settings that depend on it.

    steps, batch: number of steps, and tokens per step.
    lr_scale: factor on all learning rates.
    decay: Muon's initial weight decay.
    cooldown: number of cooldown steps. 0: --warmdown_ratio decides.
    plan: rows (name, text) to print before training.
    """

    steps: int
    batch: int
    lr_scale: float = 1.0
    decay: float = 0.0
    cooldown: int = 0
    plan: tuple[tuple[str, str], ...] = ()

    @property
    def tokens(self) -> int:
        return self.steps * self.batch


def horizon_2026(config: BaseConfig, model: ModelConfig, reference: ModelConfig) -> Horizon:
    """Choose the number of steps, batch size, learning-rate scale and weight decay of base training.

    reference: a model of REFERENCE_DEPTH layers, whose best settings are known and are scaled to `model`.
    Raises UserError if no flag sets the length of training, or if the length is less than one step.
    """
    growth = scaling_params(model) / scaling_params(reference)
    batch, why = config.total_batch_size, "as given"
    if batch < 0:
        best = REFERENCE_BATCH * growth**BATCH_POWER
        batch = 2 ** round(math.log2(best))
        why = f"the power of 2 nearest to {REFERENCE_BATCH:,} × {growth:.4g}^{BATCH_POWER} = {best:,.0f}"
    kind = "weights of the layers' matrices and the head"
    steps, reason = steps_for(config, model, batch, scaling_params(model), kind)
    scale, cooldown = math.sqrt(batch / REFERENCE_BATCH), round(config.warmdown_ratio * steps)
    decay = config.weight_decay * scale / growth
    final = f"{config.warmup_steps} steps of warmup, {cooldown:,} of cooldown to {config.final_lr_frac:g}"
    plan = (
        ("horizon", reason),
        ("batch size", f"{batch:,} tokens, {why}; {growth:.4g} = weights / those of depth {REFERENCE_DEPTH}"),
        ("rates", f"× {scale:.4g} = √({batch:,} / {REFERENCE_BATCH:,}); {final}"),
        ("decay", f"{decay:.4g} = {config.weight_decay:g} × {scale:.4g} / {growth:.4g}, along a cosine to 0"),
        ("momentum", f"0.85 to 0.97 in {MOMENTUM_WARMUP} steps, to 0.90 in the cooldown"),
    )
    return Horizon(steps, batch, scale, decay, cooldown, plan)


def steps_for(config: BaseConfig, model: ModelConfig, batch: int, weights: int, kind: str) -> tuple[int, str]:
    """Return (number of training steps, text that names the flag that sets it).

    Uses the first of --num_iterations, --target_flops and --target_param_data_ratio that is given.
    batch: tokens per step. weights: number of weights to multiply by the ratio. kind: their name in the text.
    """
    ratio = config.target_param_data_ratio
    if config.num_iterations > 0:
        return config.num_iterations, f"--num_iterations={config.num_iterations}"
    if config.target_flops > 0:
        steps = round(config.target_flops / (flops_per_token(model) * batch))
        reason = f"--target_flops={config.target_flops:g}"
    elif ratio > 0:
        steps = int(ratio * weights) // batch
        reason = f"{ratio:g} tokens for each of {weights:,} {kind} (--target_param_data_ratio)"
    else:
        raise UserError(
            "how long to train? give --num_iterations, --target_flops or --target_param_data_ratio"
        )
    if steps < 1:
        raise UserError(f"{reason} is less than one step of {batch:,} tokens; lower --total_batch_size")
    return steps, reason


def momentum_2026(steps: int, cooldown: int, warmup: int = MOMENTUM_WARMUP) -> Callable:
    """Return Muon's momentum as a function of the number of finished updates.

    It rises from 0.85 to 0.97 in the first `warmup` of `steps` updates and falls to 0.90 in the last
    `cooldown`.
    """

    def momentum(count):
        late = jnp.clip((count - (steps - cooldown)) / max(cooldown, 1), 0.0, 1.0)
        return jnp.where(count < warmup, 0.85 + (0.97 - 0.85) * (count / warmup), 0.97 - (0.97 - 0.90) * late)

    return momentum


def decay_2026(first: float, steps: int) -> Callable:
    """Return Muon's weight decay as a function of the number of finished updates.

    It falls along half a cosine, from `first` to 0 after `steps` updates.
    """
    return lambda count: first * 0.5 * (1 + jnp.cos(jnp.pi * count / steps))
