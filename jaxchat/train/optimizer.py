"""One optax transformation for all weights: each declares a group, and a table gives each group its rule."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh

from jaxchat.config import ModelConfig
from jaxchat.model.params import Weight, declare
from jaxchat.sharding import per_device

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic coefficients of Jordan et al. 2024, "Muon"
MOMENTUM_START, MOMENTUM_END = 0.85, 0.95


def orthogonalize(g_Lmn, dtype=jnp.float32):
    """Bring every matrix of a stack near its orthogonal polar factor: singular values to about 1. -> float32.

    Five Newton–Schulz steps on the matrix divided by its Frobenius norm, in `dtype`, over the short side: a
    step is x ← P(x·xᵀ)·x with P(g) = a + b·g + c·g².
    """
    tall = g_Lmn.shape[-2] > g_Lmn.shape[-1]
    x = jnp.swapaxes(g_Lmn, -1, -2) if tall else g_Lmn
    # The tiny term only guards an all-zero matrix, whose update is zero.
    x = (x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)).astype(dtype)

    def polynomial_steps(steps, x):
        return newton_schulz_factor(x @ jnp.swapaxes(x, -1, -2), steps) @ x

    if x.shape[-1] > 1.5 * x.shape[-2]:
        # The Gram matrix of P·x is P·g·P, so the factors of several steps can be multiplied before x is:
        # fewer FLOPs where x is wide. All five at once would lose small singular values in bfloat16.
        x = polynomial_steps(2, polynomial_steps(3, x))
    else:  # a loop compiles faster and in less memory, but on a GPU it copies x at every turn
        x = lax.fori_loop(0, 5, lambda _, x: polynomial_steps(1, x), x, unroll=x.dtype != jnp.float32)
    return (jnp.swapaxes(x, -1, -2) if tall else x).astype(jnp.float32)


def newton_schulz_factor(gram, steps: int):
    """The factor by which `steps` steps multiply an x with this Gram matrix [L, m, m]. P is float32 sums."""
    a, b, c = NEWTON_SCHULZ
    diagonal, factor = a * jnp.eye(gram.shape[-1])[None], None
    for step in range(steps):
        p = (diagonal + b * gram.astype(jnp.float32) + c * (gram @ gram).astype(jnp.float32)).astype(
            gram.dtype
        )
        factor = p if factor is None else p @ factor
        if step < steps - 1:
            gram = p @ gram @ p
    return factor


def orthogonalize_spread(u, weight: Weight, mesh: Mesh, dtype):
    """Orthogonalize a stack [L, *in, *out] that is spread over a mesh as its weight is.

    Each device gathers whole matrices of L/devices layers (rounded up: zeros fill the stack),
    orthogonalizes them and sends the parts back: one exchange in, one out, none within the iteration. Where
    there are more devices than layers, neighbours along `data` share the stack and each such group does all
    of it.
    """
    in_axis, out_axis = weight.axes[1], next(axis for axis in weight.axes[2:] if axis)
    data, holders = mesh.shape["data"], mesh.shape["fsdp"] * mesh.shape["tensor"]
    divisors = [n for n in range(1, data + 1) if data % n == 0]
    # Fewest layers a device, then fewest copies.
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
        y_lmn = orthogonalize(u_lmn, dtype).astype(
            dtype
        )  # its values are dtype's: nothing is lost on the way
        y_Lmn = exchange(exchange(y_lmn, out_axis, 2, 0), in_axis, 1, 0)
        if shares > 1:
            y_Lmn = lax.all_gather(y_Lmn, "data", axis_index_groups=groups, tiled=True)
        return y_Lmn[:num_layers].astype(jnp.float32).reshape(u.shape)

    return per_device(local, mesh, weight.spec, weight.spec)(u)


class MuonState(NamedTuple):
    count: jax.Array  # finished updates
    momentum: optax.Params


def scale_by_muon(
    weights, momentum_warmup: int, dtype=jnp.float32, mesh: Mesh | None = None
) -> optax.GradientTransformation:
    """Nesterov momentum, then orthogonalization, then the factor √max(1, fan_out/fan_in).

    weights: the declared `Weight` of every matrix, in a tree like the gradients'. mesh: where they are
    spread by their axes; each device then orthogonalizes some layers. momentum_warmup: updates in which
    momentum rises to its final value; 0: it has that from the first.
    """

    def init(params):
        return MuonState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(grads, state, params=None):
        del params
        m = MOMENTUM_END
        if momentum_warmup:
            ramp = jnp.minimum(state.count / momentum_warmup, 1.0)
            m = MOMENTUM_START + ramp * (MOMENTUM_END - MOMENTUM_START)
        momentum = jax.tree.map(lambda buf, g: m * buf + (1 - m) * g, state.momentum, grads)

        def direction(weight, buf, g):
            u = (1 - m) * g + m * buf
            scale = math.sqrt(max(1.0, weight.fan_out / weight.fan_in))
            if mesh is not None and mesh.size > 1:
                return scale * orthogonalize_spread(u, weight, mesh, dtype)
            return scale * orthogonalize(u.reshape(-1, weight.fan_in, weight.fan_out), dtype).reshape(g.shape)

        return jax.tree.map(direction, weights, momentum, grads), MuonState(state.count + 1, momentum)

    return optax.GradientTransformation(init, update)


def make_optimizer(
    config: ModelConfig,
    *,
    matrix_lr: float = 0.02,
    embedding_lr: float = 0.2,
    unembedding_lr: float = 0.004,
    weight_decay: float = 0.0,
    grad_clip: float = 0.0,
    momentum_warmup: int = 300,
    muon_dtype=jnp.float32,
    mesh: Mesh | None = None,
) -> optax.GradientTransformation:
    """The optimizer over `Params`. Its updates are for a schedule multiplier of 1: the step scales them.

    AdamW's rates are × (n_embd/768)^−½. grad_clip bounds the global norm of all gradients; 0 is off.
    momentum_warmup and mesh: see scale_by_muon.
    """
    declared = declare(config)
    groups = jax.tree.map(lambda weight: weight.group, declared)
    matrices = jax.tree.map(
        lambda weight: weight if weight.group == "matrix" else optax.MaskedNode(), declared
    )
    width_scale = (config.n_embd / 768) ** -0.5

    def adamw(lr):
        return optax.adamw(lr * width_scale, b1=0.8, b2=0.95, eps=1e-10, weight_decay=weight_decay)

    rules = {
        "matrix": optax.chain(
            scale_by_muon(matrices, momentum_warmup, muon_dtype, mesh), optax.scale(-matrix_lr)
        ),
        "embedding": adamw(embedding_lr),
        "head": adamw(unembedding_lr),
    }
    clip = optax.clip_by_global_norm(grad_clip) if grad_clip > 0 else optax.identity()
    return optax.chain(clip, optax.partition(rules, groups))
