"""The optimizer: Muon for matrices, AdamW for other weights. A table gives each group of weights its rule."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh
from optax import GradientTransformation

from jaxchat.config import ModelConfig
from jaxchat.model.params import Weight, declare, tree
from jaxchat.sharding import per_device

NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5  # quintic coefficients of Jordan et al. 2024, "Muon"
POLAR_EXPRESS = (  # coefficients of Amsel et al. 2025, for five steps
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
MOMENTUM_START, MOMENTUM_END = 0.85, 0.95
SCALAR_LR, MIXING_LR = 0.5, 0.2  # peak rates in 2026: of factors on the embedding; of smear and backout


@dataclasses.dataclass(frozen=True)
class Muon:
    """Muon's update rule for a group of matrices: momentum, then orthogonalization.

    lr: peak learning rate.
    momentum, decay: momentum and weight decay as functions of the number of finished updates.
    The decay applies only to weights that the update moves towards 0. decay=None: no decay.
    coefficients: (a, b, c) of the polynomial of each orthogonalization step.
    norm_factor, norm_eps: before these steps, divide a matrix by norm_factor × (its norm) + norm_eps.
    equalize: whether to scale its columns (output neurons) to the same norm before this division (MuonEq).
    exact_norm: whether to scale the orthogonalized matrix to the norm of an orthogonal matrix (Muon+).
    neuron_beta: decay rate of the running mean square of a neuron's updates. The updates are divided by the
    root of this mean (NorMuon). 0: they are not divided.
    """

    lr: float
    momentum: Callable
    coefficients: tuple = NEWTON_SCHULZ
    norm_factor: float = 1.0
    norm_eps: float = 1e-7
    equalize: bool = False
    exact_norm: bool = False
    neuron_beta: float = 0.0
    decay: Callable | None = None


@dataclasses.dataclass(frozen=True)
class AdamW:
    """AdamW's update rule for a group of weights: peak learning rate, betas and weight decay."""

    lr: float
    b1: float = 0.8
    b2: float = 0.95
    decay: float = 0.0


def orthogonalize(g_Lmn, dtype, rule: Muon):
    """Return a stack of matrices with their singular values brought close to 1, in float32.

    Each step replaces x by (a + b·G + c·G²)·x with the coefficients of `rule`, in `dtype`, where G = x·xᵀ. At
    first, x is a matrix divided by its norm and, to make G smaller, transposed if it is tall.
    """
    steps = rule.coefficients
    g_Lmn = equalize_columns(g_Lmn.astype(dtype).astype(jnp.float32)) if rule.equalize else g_Lmn
    tall = g_Lmn.shape[-2] > g_Lmn.shape[-1]
    x = jnp.swapaxes(g_Lmn, -1, -2) if tall else g_Lmn
    norm = jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)
    # norm_eps only guards an all-zero matrix, whose update is zero.
    x = (x / (rule.norm_factor * norm + rule.norm_eps)).astype(dtype)

    def polynomial_steps(steps, x):
        return newton_schulz_factor(x @ jnp.swapaxes(x, -1, -2), steps) @ x

    if len(set(steps)) > 1:  # the first step multiplies by 8, and with it the Gram matrix's rounding errors
        for step in steps:
            x = polynomial_steps([step], x)
    elif x.shape[-1] > 1.5 * x.shape[-2]:
        # The Gram matrix of P·x is P·g·P, so the factors of several steps can be multiplied first, then x
        # by their product: fewer FLOPs if x is wide. All five at once would lose small singular values in
        # bfloat16.
        x = polynomial_steps(steps[:2], polynomial_steps(steps[:3], x))
    else:  # a loop compiles faster and in less memory, but on a GPU it copies x every time
        x = lax.fori_loop(0, 5, lambda _, x: polynomial_steps(steps[:1], x), x, unroll=x.dtype != jnp.float32)
    return (jnp.swapaxes(x, -1, -2) if tall else x).astype(jnp.float32)


def equalize_columns(x_Lmn):
    """Scale the columns (output neurons) of each matrix to equal norms, keeping the norm of the matrix."""
    norm = jnp.linalg.norm(x_Lmn, axis=(-2, -1), keepdims=True)
    columns = jnp.linalg.norm(x_Lmn, axis=-2, keepdims=True)
    return x_Lmn * (norm / math.sqrt(x_Lmn.shape[-1]) / jnp.maximum(columns, 1e-6))


def newton_schulz_factor(gram, steps):
    """Return the matrices [L, m, m] by which several orthogonalization steps together multiply x.

    gram: x·xᵀ [L, m, m] before the steps. steps: coefficients (a, b, c) of each step.
    """
    factor = None
    for i, (a, b, c) in enumerate(steps):
        linear = a * jnp.eye(gram.shape[-1])[None] + b * gram.astype(jnp.float32)
        p = (linear + c * (gram @ gram).astype(jnp.float32)).astype(gram.dtype)
        factor = p if factor is None else p @ factor
        if i < len(steps) - 1:
            gram = p @ gram @ p
    return factor


def orthogonalize_sharded(u, weight: Weight, mesh: Mesh, dtype, rule: Muon):
    """Orthogonalize a stack of matrices [L, *in, *out] that is sharded over a mesh as `weight` is.

    Each device gathers the complete matrices of about L/devices layers, orthogonalizes them, and sends the
    shards back. With more devices than layers, groups along the mesh axis `data` may each compute all layers.
    """
    in_axis, out_axis = weight.axes[1], next(axis for axis in weight.axes[2:] if axis)
    data, holders = mesh.shape["data"], mesh.shape["fsdp"] * mesh.shape["tensor"]
    divisors = [n for n in range(1, data + 1) if data % n == 0]
    # Fewest layers per device, then smallest groups.
    shares = min(divisors, key=lambda n: (-(-u.shape[0] // (holders * n)), n))
    groups = np.arange(data).reshape(-1, shares).tolist()

    def exchange(a, axis, split, concat):
        return a if mesh.shape[axis] == 1 else lax.all_to_all(a, axis, split, concat, tiled=True)

    def local(u):
        num_layers, (rows, cols) = u.shape[0], (weight.fan_in // mesh.shape[in_axis], -1)
        u_Lmn = u.reshape(num_layers, rows, cols)
        u_Lmn = jnp.pad(u_Lmn, ((0, -num_layers % (holders * shares)), (0, 0), (0, 0)))
        part = u_Lmn.shape[0] // shares
        u_lmn = lax.dynamic_slice_in_dim(u_Lmn, lax.axis_index("data") % shares * part, part)
        u_lmn = exchange(exchange(u_lmn, in_axis, 0, 1), out_axis, 0, 2)
        y_lmn = orthogonalize(u_lmn, dtype, rule).astype(dtype)  # its values are of dtype: nothing is lost
        y_Lmn = exchange(exchange(y_lmn, out_axis, 2, 0), in_axis, 1, 0)
        if shares > 1:
            y_Lmn = lax.all_gather(y_Lmn, "data", axis_index_groups=groups, tiled=True)
        return y_Lmn[:num_layers].astype(jnp.float32).reshape(u.shape)

    return per_device(local, mesh, weight.spec, weight.spec)(u)


@tree
class MuonState:
    count: Any = None  # finished updates
    momentum: Any = None
    second: Any = None  # NorMuon's mean squares


def scale_by_muon(weights, rule: Muon, dtype=jnp.float32, mesh: Mesh | None = None) -> GradientTransformation:
    """Return the optax transformation of a Muon rule, without its learning rate.

    It applies momentum, orthogonalization, weight decay and the factor √max(1, fan_out/fan_in).
    weights: the declared `Weight` of every matrix, in a tree like that of the gradients.
    dtype: used for the orthogonalization. mesh: devices that share its work. None: one device.
    """

    def init(params):
        second = None
        if rule.neuron_beta:
            second = jax.tree.map(lambda w, p: jnp.zeros(neuron_shape(w), p.dtype), weights, params)
        return MuonState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params), second)

    def direction(weight, buf, g, m):
        u = (1 - m) * g + m * buf
        if mesh is not None and mesh.size > 1 and any(weight.axes):
            return orthogonalize_sharded(u, weight, mesh, dtype, rule)
        return orthogonalize(u.reshape(-1, weight.fan_in, weight.fan_out), dtype, rule).reshape(g.shape)

    def update(grads, state, params=None):
        m = rule.momentum(state.count)
        momentum = jax.tree.map(lambda buf, g: m * buf + (1 - m) * g, state.momentum, grads)
        x = jax.tree.map(partial(direction, m=m), weights, momentum, grads)
        if rule.exact_norm:
            x = jax.tree.map(to_exact_norm, weights, x)
        second = state.second
        if rule.neuron_beta:
            squares = jax.tree.map(mean_squares, weights, x)
            second = jax.tree.map(lambda v, s: v + (1 - rule.neuron_beta) * (s - v), second, squares)
            x = jax.tree.map(normalize_neurons, x, squares, second)
        if rule.decay is not None:
            decay = rule.decay(state.count)
            x = jax.tree.map(lambda x, p: x + decay * jnp.where(x * p >= 0, p, 0), x, params)
        x = jax.tree.map(lambda w, x: math.sqrt(max(1.0, w.fan_out / w.fan_in)) * x, weights, x)
        return x, MuonState(state.count + 1, momentum, second)

    return GradientTransformation(init, update)


def with_new_schedule(opt_state):
    """Return optimizer state for a new stage, in which Muon's momentum and decay schedules start again."""

    def from_start(part):
        return part.replace(count=jnp.zeros_like(part.count)) if isinstance(part, MuonState) else part

    return jax.tree.map(from_start, opt_state, is_leaf=lambda part: isinstance(part, MuonState))


def to_exact_norm(weight: Weight, x):
    """Scale each matrix of a stack to the norm √min(fan_in, fan_out) of an orthogonal matrix (Muon+)."""
    norm = jnp.sqrt(jnp.sum(x * x, axis=tuple(range(1, x.ndim)), keepdims=True))
    return x * (math.sqrt(min(weight.fan_in, weight.fan_out)) / jnp.maximum(norm, 1e-6))


def neuron_axes(weight: Weight) -> tuple[int, ...]:
    """Return the axes over which NorMuon averages: input axes if fan_in ≤ fan_out, else output axes."""
    axes = range(1, len(weight.shape))
    inputs = next(n for n in axes if math.prod(weight.shape[1 : n + 1]) == weight.fan_in)
    return tuple(axes[:inputs] if weight.fan_out >= weight.fan_in else axes[inputs:])


def neuron_shape(weight: Weight) -> tuple[int, ...]:
    return tuple(1 if axis in neuron_axes(weight) else size for axis, size in enumerate(weight.shape))


def mean_squares(weight: Weight, x):
    return jnp.mean(x * x, axis=neuron_axes(weight), keepdims=True)


def normalize_neurons(x, squares, second):
    """Divide each neuron's update by its running RMS, keeping the norm of each layer's update (NorMuon).

    squares: mean square of each neuron's update. second: running mean of `squares`.
    """
    rates = lax.rsqrt(jnp.maximum(second, 1e-10))
    each = tuple(range(1, x.ndim))  # axes within a layer; each square is the mean of equally many numbers
    norm = jnp.sqrt(jnp.sum(squares, axis=each, keepdims=True))
    new_norm = jnp.sqrt(jnp.sum(squares * rates * rates, axis=each, keepdims=True))
    return x * rates * (norm / jnp.maximum(new_norm, 1e-10))


def in_float32(inner: GradientTransformation) -> GradientTransformation:
    """Wrap a transformation so that it computes in float32 but keeps its state in the weights' dtype."""

    def widen(tree):
        return jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, tree)

    def update(grads, state, params=None):
        updates, new = inner.update(widen(grads), widen(state), widen(params))
        return updates, jax.tree.map(lambda n, o: n.astype(o.dtype), new, state)

    return GradientTransformation(inner.init, update)


def table_2025(
    config: ModelConfig,
    *,
    matrix_lr: float = 0.02,
    embedding_lr: float = 0.2,
    unembedding_lr: float = 0.004,
    weight_decay: float = 0.0,
    momentum_warmup: int = 300,
) -> dict[str, Muon | AdamW]:
    """Return nanochat's update rules of November 2025 as {group of weights: rule}.

    momentum_warmup: number of updates in which Muon's momentum rises from 0.85 to 0.95.
    """

    def momentum(count):
        if not momentum_warmup:
            return MOMENTUM_END
        ramp = jnp.minimum(count / momentum_warmup, 1.0)
        return MOMENTUM_START + ramp * (MOMENTUM_END - MOMENTUM_START)

    width_scale = (config.n_embd / 768) ** -0.5
    return {
        "matrix": Muon(matrix_lr, momentum),
        "embedding": AdamW(embedding_lr * width_scale, decay=weight_decay),
        "head": AdamW(unembedding_lr * width_scale, decay=weight_decay),
    }


def table_2026(
    config: ModelConfig,
    *,
    matrix_lr: float = 0.02,
    embedding_lr: float = 0.3,
    unembedding_lr: float = 0.008,
    scalar_lr: float = SCALAR_LR,
    mixing_lr: float = MIXING_LR,
    momentum: Callable | None = None,
    decay: Callable | None = None,
) -> dict[str, Muon | AdamW]:
    """Return nanochat's update rules of July 2026 as {group of weights: rule}.

    momentum, decay: Muon's momentum and weight decay as functions of the number of finished updates.
    momentum=None: it rises from 0.85 to 0.95 in the first 300 updates. decay=None: no decay.
    """
    momentum = momentum or table_2025(config)["matrix"].momentum
    width_scale = (config.n_embd / 768) ** -0.5
    normalization = {"norm_factor": 1.01, "norm_eps": 1e-6, "equalize": True, "exact_norm": True}
    return {
        "matrix": Muon(matrix_lr, momentum, POLAR_EXPRESS, decay=decay, neuron_beta=0.9, **normalization),
        "head": AdamW(unembedding_lr * width_scale, b2=0.96, decay=0.01),
        "embedding": AdamW(embedding_lr * width_scale, b2=0.995, decay=0.001),
        "value_table": AdamW(0.5 * embedding_lr * width_scale, b2=0.995, decay=0.01),
        "stream_scale": AdamW(0.01 * scalar_lr, decay=0.05),
        "embedding_scale": AdamW(scalar_lr, b1=0.96),
        "mixing": AdamW(mixing_lr),
    }


def make_optimizer(
    config: ModelConfig,
    *,
    table: dict[str, Muon | AdamW] | None = None,
    grad_clip: float = 0.0,
    muon_dtype=jnp.float32,
    mesh: Mesh | None = None,
    **rates,
) -> GradientTransformation:
    """Return the optimizer of all weights. Its updates use the peak learning rates, without a schedule.

    table: {group of weights: rule}. None: table_2025 with the keyword arguments `rates`.
    grad_clip: largest global norm of the gradients. 0: no limit.
    muon_dtype: dtype of Muon's orthogonalization. mesh: the mesh over which the weights are sharded.
    """
    declared = declare(config)
    table = table or table_2025(config, **rates)
    groups = jax.tree.map(lambda weight: weight.group, declared)
    if missing := set(jax.tree.leaves(groups)) - table.keys():
        raise ValueError(f"no optimizer rule for weights of the groups {', '.join(sorted(missing))}")

    def matrices(group):
        return jax.tree.map(lambda weight: weight if weight.group == group else optax.MaskedNode(), declared)

    def transformation(group, rule):
        if isinstance(rule, Muon):
            return optax.chain(scale_by_muon(matrices(group), rule, muon_dtype, mesh), optax.scale(-rule.lr))
        return in_float32(optax.adamw(rule.lr, b1=rule.b1, b2=rule.b2, eps=1e-10, weight_decay=rule.decay))

    used = {group: transformation(group, table[group]) for group in sorted(set(jax.tree.leaves(groups)))}
    clip = optax.clip_by_global_norm(grad_clip) if grad_clip > 0 else optax.identity()
    return optax.chain(clip, optax.partition(used, groups))
