"""The training step of all stages: gradients of all micro-batches, then an update by the optimizer."""

import ctypes
import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxchat.config import REMATS, Compute, Model
from jaxchat.model import params as model_params
from jaxchat.model.params import Params
from jaxchat.sharding import ROWS, constrain, data_shards
from jaxchat.train.loss import loss_sums
from jaxchat.train.state import TrainState, state_shardings


def train_step(
    state: TrainState,
    batch: dict,
    lr_multiplier: jax.Array,
    *,
    model: Model,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, dict]:
    """Take one optimizer step over all micro-batches. Return the new state and metrics, {name: scalar}.

    batch: {inputs, targets, weights[, counts][, segments][, sampler]}, arrays [A, B, T] with A micro-batches.
    sampler: the log-probabilities of the targets when they were sampled (RL).
    The loss is Σ weight·nll ÷ N over all micro-batches. N is Σ counts, or Σ weights if there are no counts.
    If all token weights are 0, parameters and optimizer state do not change and the loss is 0. If the loss or
    the gradient is not finite, they do not change and the metric "nonfinite" is 1.
    """
    if model.compute.remat == "step" and can_merge(batch, model.mesh):
        batch, model = merge_micro_batches(batch, model)
    add = sum_gradients_of_answers if "sampler" in batch else sum_gradients
    (grads, nll, count), differences = add(state.params, batch, model)

    supervised = jnp.sum(jnp.where(batch["weights"] != 0, 1.0, 0.0)) > 0
    mean = 1.0 / jnp.where(supervised, count, 1.0)
    grads = jax.tree.map(lambda g: g * mean, grads)
    with jax.named_scope("optimizer"):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: (p + lr_multiplier * u).astype(p.dtype), state.params, updates)

    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(nll) & jnp.isfinite(grad_norm)
    applied = supervised & finite

    def keep_if_applied(new, old):
        return jax.tree.map(lambda n, o: jnp.where(applied, n, o), new, old)

    new_state = TrainState(
        step=state.step + 1,
        empty_steps=state.empty_steps + jnp.where(supervised, 0, 1),
        params=keep_if_applied(params, state.params),
        opt_state=keep_if_applied(opt_state, state.opt_state),
    )
    metrics = {
        "loss": nll * mean,
        "weight": count,
        "grad_norm": grad_norm,
        "nonfinite": jnp.where(finite, 0, 1),
        "empty_steps": new_state.empty_steps,
    }
    return new_state, metrics | differences


def zero_sums(params: Params) -> tuple:
    """Return zeros for (float32 gradients, Σ weight·nll, loss divisor), to which micro-batches are added."""
    return jax.tree.map(lambda p: jnp.zeros(p.shape), params), jnp.zeros(()), jnp.zeros(())


def sum_gradients(params: Params, batch: dict, model: Model) -> tuple[tuple, dict]:
    """Return ((gradients, Σ weight·nll, N), {}), summed over all micro-batches.

    N: Σ counts, or Σ weights if there are no counts. The empty dict means that there are no further metrics.
    """
    config, compute = model.config, model.compute

    def add_micro_batch(sums, micro):
        micro = {f"{name}_BT": array for name, array in micro.items()}
        (nll, count), grads = jax.value_and_grad(loss_sums, has_aux=True)(params, micro, config, compute)
        grads = constrain(grads, model_params.specs(config), compute.mesh)  # summed over devices
        return jax.tree.map(jnp.add, sums, (grads, nll, count)), None

    return lax.scan(add_micro_batch, zero_sums(params), split_micro_batches(batch, compute))[0], {}


def sum_gradients_of_answers(params: Params, batch: dict, model: Model) -> tuple[tuple, dict]:
    """Return ((gradients, Σ weight·nll, N), metrics) over all micro-batches of sampled answers (RL).

    N: Σ counts, or Σ weights if there are no counts. Let d be a target's log-probability in the trainer minus
    that in the sampler, batch["sampler"]. Over targets with a weight other than 0, the metrics are the mean
    of |d|, the largest |d|, and the mean of e^d − 1 − d, an estimate of KL(sampler ‖ trainer).
    """
    config, compute = model.config, model.compute

    def add(carry, micro):
        sums, (tokens, total, estimate, largest) = carry
        micro = {f"{name}_BT": array for name, array in micro.items()}

        def loss(params, weights_BT):
            return loss_sums(params, micro | {"weights_BT": weights_BT}, config, compute)

        weights_BT = micro["weights_BT"]
        # The loss is Σ weight·nll, so its derivative with respect to a weight is that token's nll.
        derive = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        (nll, count), (grads, nll_BT) = derive(params, weights_BT)
        grads = constrain(grads, model_params.specs(config), compute.mesh)
        d_BT = jnp.where(weights_BT != 0, -nll_BT - micro["sampler_BT"], 0.0)
        differences = (
            tokens + jnp.sum(jnp.where(weights_BT != 0, 1.0, 0.0)),
            total + jnp.sum(jnp.abs(d_BT)),
            estimate + jnp.sum(jnp.expm1(d_BT) - d_BT),
            jnp.maximum(largest, jnp.max(jnp.abs(d_BT))),
        )
        return jax.tree.map(jnp.add, sums, (grads, nll, count)), differences

    def add_or_skip(carry, micro):
        weighs = jnp.any(micro["weights"] != 0)
        return lax.cond(weighs, lambda carry: add(carry, micro), lambda carry: carry, carry), None

    start = (zero_sums(params), (jnp.zeros(()),) * 4)
    micro_batches = split_micro_batches(batch, compute)
    (sums, (tokens, total, estimate, largest)), _ = lax.scan(add_or_skip, start, micro_batches)
    tokens = jnp.maximum(tokens, 1.0)
    names = ("logprob_difference", "logprob_difference_max", "sampler_kl")
    return sums, dict(zip(names, (total / tokens, largest, estimate / tokens), strict=True))


def can_merge(batch: dict, mesh: Mesh) -> bool:
    """Return whether a layer can compute all micro-batches before the next layer begins (--remat=step).

    This needs several micro-batches, several devices that share the rows of each evenly, and a tensor axis of
    size 1. RL batches are never merged, since micro-batches whose weights are all 0 are skipped in RL.
    """
    num_micro, rows, _ = batch["inputs"].shape
    sharded = mesh is not None and mesh.shape["tensor"] == 1 < data_shards(mesh)
    return num_micro > 1 and sharded and rows % data_shards(mesh) == 0 and "sampler" not in batch


def merge_micro_batches(batch: dict, model: Model) -> tuple[dict, Model]:
    """Join A micro-batches [A, B, T] into one, [1, A·B, T]. Return it and the model with compute.parts = A.

    Each layer of that model computes the rows in A parts, one per micro-batch. Rows stay on their devices.
    """
    num_micro, shards = len(batch["inputs"]), data_shards(model.mesh)

    def merge(a):
        return a.reshape(num_micro, shards, -1, a.shape[-1]).swapaxes(0, 1).reshape(1, -1, a.shape[-1])

    compute = dataclasses.replace(model.compute, parts=num_micro, micro_tokens=0)
    return jax.tree.map(merge, batch), dataclasses.replace(model, compute=compute)


def split_micro_batches(batch: dict, compute: Compute) -> dict:
    """Cut each micro-batch into n smaller ones: arrays [A, B, T] become [A·n, B/n, T].

    n is the smallest number for which a device computes at most compute.micro_tokens tokens at a time, or one
    row if that is longer. compute.micro_tokens=0: there is no limit. Rows stay on their devices.
    """
    num_micro, rows, time = batch["inputs"].shape
    shards = data_shards(compute.mesh)
    per_shard = rows // shards
    divisors = [n for n in range(1, per_shard + 1) if per_shard % n == 0]
    fitting = (n for n in divisors if per_shard // n * time <= compute.micro_tokens)
    n = next(fitting, per_shard) if compute.micro_tokens else 1
    if n == 1:
        return batch

    def split(a):
        return a.reshape(num_micro, shards, n, -1, time).swapaxes(1, 2).reshape(num_micro * n, -1, time)

    return jax.tree.map(split, batch)


def compile_step(step, *args):
    """Compile a jitted step for `args`, then give memory that the compiler freed back to the system."""
    step.lower(*args).compile()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def make_train_step(
    model: Model, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, dict, float], tuple[TrainState, dict]]:
    """Return the jitted step(state, batch, lr_multiplier) -> (state, metrics), which donates `state`."""
    options, mesh, compute = {}, model.mesh, model.compute
    platform = mesh.devices.flat[0].platform
    on_gpu = platform in ("gpu", "cuda")
    if on_gpu and compute.remat in REMATS[:-1]:
        # XLA would make a program that is too large fit by recomputing complete products (depth 32 on 8
        # H100s: 18 % more FLOPs). The next value of --remat saves memory at a lower cost, and train/fit.py
        # chooses it if this one is too large.
        options["xla_disable_hlo_passes"] = "rematerialization"
    if on_gpu and compute.matmul:
        # XLA uses cuBLASLt for float8 products only if Triton does not take them.
        options["xla_gpu_enable_triton_gemm"] = False
    if platform == "tpu" and not model.config.plain:
        # This pass sums gradients over devices after the loop over micro-batches instead of in it, and fails
        # ("user->opcode() == HloOpcode::kAdd") on gradients of replicated weights, which the 2026 model has.
        options["xla_disable_hlo_passes"] = "while-loop-all-reduce-code-motion"
    shardings = state_shardings(model, optimizer)
    everywhere = NamedSharding(mesh, P())

    def step(state, batch, lr_multiplier):  # a named function, so that traces and profiles show it
        return train_step(state, batch, lr_multiplier, model=model, optimizer=optimizer)

    return jax.jit(
        step,
        in_shardings=(shardings, NamedSharding(mesh, P(None, ROWS)), everywhere),
        out_shardings=(shardings, everywhere),
        donate_argnums=0,
        compiler_options=options or None,
    )
