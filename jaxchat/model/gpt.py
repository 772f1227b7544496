"""The forward pass: a pure function of the weights and the tokens.

The suffix of an array's name is its shape: B batch, T time, S cache slots, D model width, N query heads,
K key/value heads, H head dimension, F MLP width, V vocabulary, C features that a gate reads.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxchat.config import Compute, ModelConfig
from jaxchat.model.attention import cached_attention, causal_attention
from jaxchat.model.cache import KVCache
from jaxchat.model.embedding import embed, embed_values
from jaxchat.model.layers import Layer, layers, middle, through_layers
from jaxchat.model.matmul import matmul
from jaxchat.model.params import Blocks, Params, layers_of
from jaxchat.model.parts import in_parts
from jaxchat.sharding import constrain, row_axes

# Minimum rows in decoding on a GPU: with fewer, XLA turns matrix products into elementwise products and sums.
GPU_ROWS = 16


def rms_norm(x, eps: float):
    """Divide x by its root mean square along the last axis, in float32, without a learned scale."""
    x32 = x.astype(jnp.float32)
    return (x32 * lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + eps)).astype(x.dtype)


def rotary_tables(positions_BT, head_dim: int, base: float):
    """Return (cos, sin) of the rotary angles position · base^(−2i/H) for i = 0 … H/2 − 1 (Su et al. 2021).

    Both are float32 [B, T, 1, H/2], with H = head_dim.
    """
    frequencies = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTNH, tables):
    """Apply rotary embedding: rotate each pair of features (i, i + H/2) by minus its angle.

    tables: (cos, sin) of the angles, from rotary_tables.
    """
    cos, sin = tables
    x1, x2 = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos + x2 * sin, x2 * cos - x1 * sin], axis=-1).astype(x_BTNH.dtype)


def rotate_norm(x_BTNH, tables, eps: float, scale: float = 1.0):
    """Apply rotary embedding to queries or keys, then RMS norm, then multiply by `scale`."""
    y_BTNH = rms_norm(rotate(x_BTNH, tables), eps)
    return y_BTNH if scale == 1 else scale * y_BTNH


def residual_norm(x_BTD, y_BTD=None, *, eps: float):
    """Add y_BTD, if given, to the residual stream x_BTD. Return (the sum, the RMS-normalized sum)."""
    x_BTD = x_BTD if y_BTD is None else x_BTD + y_BTD
    return x_BTD, rms_norm(x_BTD, eps)


def norms(config: ModelConfig, compute: Compute):
    """Return the functions (residual_norm, rotate_norm) for this model, with eps and scale already set.

    They are GPU kernels if compute.kernels is set, else the functions of this file.
    """
    eps, scale = config.norm_eps, config.qk_scale
    if not compute.kernels:
        return partial(residual_norm, eps=eps), partial(rotate_norm, eps=eps, scale=scale)
    from jaxchat.model import kernels  # here, so that other devices don't import Pallas

    return (
        partial(kernels.residual_norm, eps=eps, mesh=compute.mesh),
        partial(kernels.rotate_norm, eps=eps, mesh=compute.mesh, scale=scale),
    )


@struct.dataclass
class Inputs:
    """Inputs of a layer besides the residual stream and the weights."""

    tokens_BT: jax.Array
    embedded_BTD: jax.Array  # the first layer's input
    tables: tuple  # (cos, sin) from rotary_tables
    segments_BT: jax.Array | None = None  # a token attends only within its segment
    values_BTKH: jax.Array | None = None  # the layer's value embeddings, if they are looked up already


def block(x_BTD, w: Blocks, inputs: Inputs, attend, config: ModelConfig, compute: Compute):
    """Compute one transformer layer. Return the residual stream x_BTD after it.

    w: weights of this one layer; None for those that it does not have.
    attend: function (q_BTNH, k_BTKH, v_BTKH) -> y_BTNH. Its queries and keys are rotated and normalized.
    """
    residual_norm, rotate_norm = norms(config, compute)
    product = partial(matmul, compute=compute)
    with jax.named_scope("projections"):  # scopes name operations in profiles: bench/profile.py
        if w.stream_scale is not None:
            x_BTD = weighted_sum(w.stream_scale, x_BTD, w.embedding_scale, inputs.embedded_BTD)
        x_BTD, h_BTD = residual_norm(x_BTD)
        q_BTNH = rotate_norm(product(h_BTD, w.wq, "btd,dnh->btnh"), inputs.tables)
        k_BTKH = rotate_norm(product(h_BTD, w.wk, "btd,dkh->btkh"), inputs.tables)
        v_BTKH = product(h_BTD, w.wv, "btd,dkh->btkh")
        if w.value_gate is not None:
            e_BTKH = inputs.values_BTKH
            if e_BTKH is None:
                e_BTKH = embed_values(w.value_table, inputs.tokens_BT, compute)
            gate_BTK = value_gate(h_BTD, w, config, compute)
            v_BTKH = weighted_sum(1.0, v_BTKH, gate_BTK[..., None], e_BTKH)
    with jax.named_scope("attention"):
        y_BTNH = attend(q_BTNH, k_BTKH, v_BTKH)
    with jax.named_scope("projections"):
        x_BTD, h_BTD = residual_norm(x_BTD, product(y_BTNH, w.wo, "btnh,nhd->btd"))
    with jax.named_scope("mlp"):
        h_BTF = jax.nn.relu(product(h_BTD, w.w_up, "btd,df->btf"))
        return x_BTD + product(h_BTF * h_BTF, w.w_down, "btf,fd->btd")


def weighted_sum(a, x, b, y):
    """Return a·x + b·y, computed in float32 and then rounded to x's dtype."""
    return (a * x.astype(jnp.float32) + b * y.astype(jnp.float32)).astype(x.dtype)


def value_gate(h_BTD, w: Blocks, config: ModelConfig, compute: Compute):
    """Return the factor on each value embedding, between 0 and config.value_gate_bound: float32 [B, T, K]."""
    h_BTC = h_BTD[..., : config.value_gate_channels]
    gate_BTK = matmul(h_BTC, w.value_gate, "btc,ck->btk", compute)
    return config.value_gate_bound * jax.nn.sigmoid(gate_BTK.astype(jnp.float32))


def embedded(params: Params, tokens_BT, config: ModelConfig, compute: Compute):
    """Return the RMS-normalized token embeddings x_BTD in compute.dtype."""
    return rms_norm(embed(params.wte, tokens_BT, compute), config.norm_eps)


def smear(params: Params, x_BTD, before_BTD, config: ModelConfig, compute: Compute):
    """Add to each token's embedding the previous token's, times a learnt gate ("smear"). Return x_BTD.

    before_BTD: embeddings of the previous tokens; zeros where there is none.
    If the model has no smear, x_BTD is returned unchanged.
    """
    if not config.smear_channels:
        return x_BTD
    gate_BT = matmul(x_BTD[..., : config.smear_channels], params.smear_gate, "btc,c->bt", compute)
    gate_BT = params.smear_scale[0] * jax.nn.sigmoid(gate_BT.astype(jnp.float32))
    return weighted_sum(1.0, x_BTD, gate_BT[..., None], before_BTD)


def shift(x_BTD, first_B1D=None, segments_BT=None):
    """Shift features by one position, so that position t gets those of t − 1. Return [B, T, D].

    first_B1D: features for position 0; None: zeros.
    segments_BT: segment ids. The first position of every later segment gets zeros.
    """
    first_B1D = jnp.zeros_like(x_BTD[:, :1]) if first_B1D is None else first_B1D
    moved_BTD = jnp.concatenate([first_B1D, x_BTD[:, :-1]], axis=1)
    if segments_BT is None:
        return moved_BTD
    same_BT = jnp.pad(segments_BT[:, 1:] == segments_BT[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(same_BT[..., None], moved_BTD, 0)


def last_norm(params: Params, x_BTD, middle_BTD, config: ModelConfig):
    """Return the LM head's input: the RMS-normalized output of the last layer.

    middle_BTD: the middle layer's output, scaled and subtracted before the norm; None: nothing is subtracted.
    """
    if middle_BTD is not None:
        x_BTD = weighted_sum(1.0, x_BTD, -params.backout_scale[0], middle_BTD)
    return rms_norm(x_BTD, config.norm_eps)


def features(params: Params, tokens_BT, config: ModelConfig, compute: Compute, segments_BT=None):
    """Return the LM head's input x_BTD, in compute.dtype, for complete rows of tokens.

    segments_BT: segment ids. A token attends only within its segment.
    """
    time = tokens_BT.shape[1]
    tables = rotary_tables(jnp.arange(time)[None, :], config.head_dim, config.rotary_base)
    x_BTD = embedded(params, tokens_BT, config, compute)
    if config.smear_channels:
        x_BTD = smear(params, x_BTD, shift(x_BTD, segments_BT=segments_BT), config, compute)
    # Positions are not reset at a new segment, since attention depends only on differences of positions.
    inputs = Inputs(tokens_BT, x_BTD, tables, segments_BT)

    def layer(x_BTD, w, kind):
        if compute.parts > 1:
            return in_parts(partial(training_block, kind=kind), x_BTD, w, inputs, config, compute)
        return training_block(x_BTD, w, inputs, config, compute, kind)

    x_BTD, middle_BTD = through_layers(layer, x_BTD, params.blocks, config, compute)
    return last_norm(params, x_BTD, middle_BTD, config)


def training_block(x_BTD, w: Blocks, inputs: Inputs, config: ModelConfig, compute: Compute, kind: Layer):
    """Compute one layer in training, with causal attention over complete rows. Return x_BTD."""
    mesh = compute.mesh
    options = {"segments_BT": inputs.segments_BT, "mesh": mesh, "window": kind.window}
    attend = partial(causal_attention, implementation=compute.attention, **options)
    rows = None if mesh is None else P(row_axes(mesh, x_BTD.shape[0]))
    return constrain(block(x_BTD, w, inputs, attend, config, compute), rows, mesh)


def features_prompt(params: Params, tokens_BT, lengths_B, config: ModelConfig, compute: Compute):
    """Prefill prompts, padded at the end to T tokens. Return (LM head's input x_BTD, KVCache of T slots).

    lengths_B: number of tokens of each prompt, without padding.
    """
    time = tokens_BT.shape[1]
    tables = rotary_tables(jnp.arange(time)[None, :], config.head_dim, config.rotary_base)
    plain = dataclasses.replace(compute, kernels=False, mesh=None, matmul="")
    kept = []
    x_BTD = embedded(params, tokens_BT, config, plain)
    x_BTD = smear(params, x_BTD, shift(x_BTD), config, plain)

    def attend(q, k, v, layer, window):
        kept.append((k, v))
        return causal_attention(q, k, v, implementation=compute.attention, window=window)

    x_BTD = generating_blocks(params, Inputs(tokens_BT, x_BTD, tables), attend, config, plain)
    return x_BTD, KVCache.from_prefill(kept, lengths_B, tokens_BT if config.smear_channels else None)


def generating_blocks(params: Params, inputs: Inputs, attend, config: ModelConfig, compute: Compute):
    """Compute all layers for prefill or decoding. Return the LM head's input x_BTD.

    attend: function (q, k, v, layer=index, window=…) -> y_BTNH that also stores k and v in a cache.
    """
    x_BTD, middle_BTD = inputs.embedded_BTD, None
    blocks = layers_of(params.blocks, compute.dtype)
    for index, (w, kind) in enumerate(zip(blocks, layers(config), strict=True)):
        attend_here = partial(attend, layer=index, window=kind.window)
        x_BTD = block(x_BTD, w, inputs, attend_here, config, compute)
        middle_BTD = x_BTD if index == middle(config) else middle_BTD
    return last_norm(params, x_BTD, middle_BTD, config)


def features_cached(
    params: Params, tokens_BT, cache: KVCache, config: ModelConfig, compute: Compute, counts_B=None
):
    """Compute the LM head's input for new tokens of cached rows. Return (x_BTD, cache with the new tokens).

    The new tokens follow those in the cache. Keys and values beyond the last slot are dropped.
    counts_B: how many of each row's new tokens are not padding; None: all. The row grows by this number.
    """
    rows, time = tokens_BT.shape
    positions_BT = cache.lengths_B[:, None] + jnp.arange(time)[None, :]

    def pad(a):  # to GPU_ROWS rows, for the layers' matrix products only
        return jnp.pad(a, ((0, max(0, GPU_ROWS - rows) if compute.kernels else 0), *[(0, 0)] * (a.ndim - 1)))

    # Without kernels, which need one row of rotary tables for all rows; here every device holds all weights.
    plain = dataclasses.replace(compute, kernels=False, mesh=None, matmul="")
    x_BTD = embedded(params, tokens_BT, config, plain)
    if config.smear_channels:
        last_B1D = embedded(params, cache.last_tokens()[:, None], config, plain)
        last_B1D = jnp.where(cache.lengths_B[:, None, None] > 0, last_B1D, 0)
        x_BTD = smear(params, x_BTD, shift(x_BTD, last_B1D), config, plain)
        cache = cache.write_tokens(tokens_BT, positions_BT)
    tables = rotary_tables(pad(positions_BT), config.head_dim, config.rotary_base)

    def attend(q, k, v, layer, window):
        nonlocal cache
        cache = cache.write(layer, k[:rows], v[:rows], positions_BT)
        k_BKSH, v_BKSH = cache.k_BKSH[layer], cache.v_BKSH[layer]
        return pad(cached_attention(q[:rows], k_BKSH, v_BKSH, positions_BT, compute.attention, window))

    x_BTD = generating_blocks(params, Inputs(pad(tokens_BT), pad(x_BTD), tables), attend, config, plain)
    return x_BTD[:rows], cache.advance(time if counts_B is None else counts_B)


def softcap(u, cap: float):
    """Limit u smoothly to ±cap: return cap·tanh(u/cap) in float32."""
    return cap * jnp.tanh(u.astype(jnp.float32) / cap)


def logits(lm_head_DV, x_BTD, cap: float):
    """Return the logits [..., V] of features [..., D], in float32 and limited to ±cap by softcap."""
    head = lm_head_DV.astype(x_BTD.dtype)
    return softcap(jnp.einsum("...d,dv->...v", x_BTD, head, preferred_element_type=jnp.float32), cap)


def forward(params: Params, tokens_BT, config: ModelConfig, compute: Compute):
    """Return the logits at every position, float32 [B, T, config.vocab_size]."""
    head_DV = params.lm_head[:, : config.vocab_size]
    return logits(head_DV, features(params, tokens_BT, config, compute), config.softcap)
