"""The forward pass: a pure function of the weights and the tokens.

Names carry their shapes: B batch, T time, S cache slots, D model width, N query heads, K key/value heads,
H head dimension, F MLP width, V vocabulary.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxchat.config import Compute, ModelConfig
from jaxchat.model.attention import cached_attention, causal_attention
from jaxchat.model.cache import KVCache
from jaxchat.model.embedding import embed
from jaxchat.model.matmul import matmul
from jaxchat.model.params import Blocks, Params, layers_of
from jaxchat.sharding import constrain, row_axes

REMAT_POLICIES = {  # what the backward pass may keep; without remat all is kept
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def rms_norm(x, eps: float):
    """Divide x by its root mean square along the last axis, in float32, without a learned scale."""
    x32 = x.astype(jnp.float32)
    return (x32 * lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + eps)).astype(x.dtype)


def rotary_tables(positions_BT, head_dim: int, base: float):
    """Return float32 (cos, sin) [B, T, 1, H/2] of the angles position · base^(−2i/H) (Su et al. 2021)."""
    frequencies = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTNH, tables):
    """Rotary embedding, halves layout: rotate features i and i + H/2 as a pair, by minus their angle."""
    cos, sin = tables
    x1, x2 = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos + x2 * sin, x2 * cos - x1 * sin], axis=-1).astype(x_BTNH.dtype)


def rotate_norm(x_BTNH, tables, eps: float):
    """Rotate, then norm: for queries and keys."""
    return rms_norm(rotate(x_BTNH, tables), eps)


def residual_norm(x_BTD, y_BTD=None, *, eps: float):
    """Add y, if given, to the residual stream x. -> (the stream, its norm: what a sublayer reads)."""
    x_BTD = x_BTD if y_BTD is None else x_BTD + y_BTD
    return x_BTD, rms_norm(x_BTD, eps)


def norms(config: ModelConfig, compute: Compute):
    """Return (residual_norm, rotate_norm): this file's, or GPU kernels that also fuse sums of gradients."""
    if not compute.kernels:
        return partial(residual_norm, eps=config.norm_eps), partial(rotate_norm, eps=config.norm_eps)
    from jaxchat.model import kernels  # here, so that other devices don't import Pallas

    options = {"eps": config.norm_eps, "mesh": compute.mesh}
    return partial(kernels.residual_norm, **options), partial(kernels.rotate_norm, **options)


def block(x_BTD, w: Blocks, tables, attend, config: ModelConfig, compute: Compute):
    """One transformer layer. -> x_BTD.

    w: this layer's slice of the stacked weights.
    attend(q_BTNH, k_BTKH, v_BTKH) -> y_BTNH: attention over rotated, normed queries and keys.
    """
    residual_norm, rotate_norm = norms(config, compute)
    product = partial(matmul, compute=compute)
    with jax.named_scope("projections"):  # scopes are for profiles: bench/profile.py
        x_BTD, h_BTD = residual_norm(x_BTD)
        q_BTNH = rotate_norm(product(h_BTD, w.wq, "btd,dnh->btnh"), tables)
        k_BTKH = rotate_norm(product(h_BTD, w.wk, "btd,dkh->btkh"), tables)
        v_BTKH = product(h_BTD, w.wv, "btd,dkh->btkh")
    with jax.named_scope("attention"):
        y_BTNH = attend(q_BTNH, k_BTKH, v_BTKH)
    with jax.named_scope("projections"):
        x_BTD, h_BTD = residual_norm(x_BTD, product(y_BTNH, w.wo, "btnh,nhd->btd"))
    with jax.named_scope("mlp"):
        h_BTF = jax.nn.relu(product(h_BTD, w.w_up, "btd,df->btf"))
        return x_BTD + product(h_BTF * h_BTF, w.w_down, "btf,fd->btd")


def features(params: Params, tokens_BT, config: ModelConfig, compute: Compute, segments_BT=None):
    """The head's input: normed activations x_BTD in the compute dtype. tokens_BT is int32.

    segments_BT: tokens of one segment don't see another's. Positions run on: only their differences count.
    """
    mesh = compute.mesh
    batch, time = tokens_BT.shape
    tables = rotary_tables(jnp.arange(time)[None, :], config.head_dim, config.rotary_base)
    attend = partial(causal_attention, implementation=compute.attention, segments_BT=segments_BT, mesh=mesh)
    rows = None if mesh is None else P(row_axes(mesh, batch))

    def layer(x_BTD, w):
        return constrain(block(x_BTD, w, tables, attend, config, compute), rows, mesh), None

    if compute.remat != "none":
        layer = jax.checkpoint(layer, policy=REMAT_POLICIES[compute.remat], prevent_cse=compute.unroll)
    x_BTD = rms_norm(embed(params.wte, tokens_BT, compute), config.norm_eps)
    x_BTD, _ = lax.scan(layer, x_BTD, params.blocks, unroll=config.n_layer if compute.unroll else 1)
    return rms_norm(x_BTD, config.norm_eps)


def features_prompt(params: Params, tokens_BT, lengths_B, config: ModelConfig, compute: Compute):
    """The head's input for prompts padded at their ends, and a cache that holds them. -> (x_BTD, cache)."""
    time = tokens_BT.shape[1]
    tables = rotary_tables(jnp.arange(time)[None, :], config.head_dim, config.rotary_base)
    plain = dataclasses.replace(compute, kernels=False, mesh=None, matmul="")
    kept = []

    def attend(q, k, v):
        kept.append((k, v))
        return causal_attention(q, k, v, implementation=compute.attention)

    x_BTD = rms_norm(embed(params.wte, tokens_BT, plain), config.norm_eps)
    for w in layers_of(params.blocks, compute.dtype):
        x_BTD = block(x_BTD, w, tables, attend, config, plain)
    return rms_norm(x_BTD, config.norm_eps), KVCache.holding(kept, lengths_B)


def features_cached(
    params: Params, tokens_BT, cache: KVCache, config: ModelConfig, compute: Compute, counts_B=None
):
    """The head's input, for new tokens of rows whose earlier tokens are in a cache. -> (x_BTD, cache).

    Token t of row b stands at position cache.lengths_B[b] + t: its key and value are written there (dropped
    beyond the last slot), and it attends to everything at or before it.
    counts_B: how many of each row's tokens are real; by that many the returned cache's rows are longer. The
    rest is padding, whose features mean nothing. A row that waits has 0. None: all T.
    """
    time = tokens_BT.shape[1]
    positions_BT = cache.lengths_B[:, None] + jnp.arange(time)[None, :]
    tables = rotary_tables(positions_BT, config.head_dim, config.rotary_base)
    # The kernels take one row of tables for all rows. Every device holds all weights here.
    plain = dataclasses.replace(compute, kernels=False, mesh=None, matmul="")
    x_BTD = rms_norm(embed(params.wte, tokens_BT, plain), config.norm_eps)
    for index, w in enumerate(layers_of(params.blocks, compute.dtype)):

        def attend(q, k, v, index=index):
            nonlocal cache
            cache = cache.write(index, k, v, positions_BT)
            return cached_attention(
                q, cache.k_BKSH[index], cache.v_BKSH[index], positions_BT, compute.attention
            )

        x_BTD = block(x_BTD, w, tables, attend, config, plain)
    return rms_norm(x_BTD, config.norm_eps), cache.advance(time if counts_B is None else counts_B)


def softcap(u, cap: float):
    """cap·tanh(u/cap) in float32: the head's output, brought within ±cap."""
    return cap * jnp.tanh(u.astype(jnp.float32) / cap)


def logits(lm_head_DV, x_BTD, cap: float):
    """softcap(head(x)) in float32: [..., V] from features [..., D]."""
    head = lm_head_DV.astype(x_BTD.dtype)
    return softcap(jnp.einsum("...d,dv->...v", x_BTD, head, preferred_element_type=jnp.float32), cap)


def forward(params: Params, tokens_BT, config: ModelConfig, compute: Compute):
    """logits_BTV float32 for every position."""
    return logits(params.lm_head, features(params, tokens_BT, config, compute), config.softcap)
