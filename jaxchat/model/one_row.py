"""Decode one row on a GPU: the layer of gpt.py, written so that XLA compiles it to few kernels.

With one token, kernels are so short that their number limits the speed. gpt.block compiles to seventeen,
because XLA splits products this small into partial sums that a second kernel adds up. Here each output of a
product is one sum over weights that are contiguous in memory, and the same kernel also computes the
operations before and after the sum. Only the model of November 2025 (config.plain) is supported.
Letters besides those of gpt.py: O outputs of a product, G query heads per key/value head, R ranges of slots
that are summed separately.
"""

import math

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxchat.config import Compute, ModelConfig
from jaxchat.model.cache import KVCache
from jaxchat.model.gpt import embedded, last_norm, rotary_tables
from jaxchat.model.layers import layers
from jaxchat.model.params import Blocks, Params

RANGES = 16  # ranges that a row's cache slots are divided into
WARP = 32  # GPU threads that read memory together


@struct.dataclass
class RowWeights:
    """One layer's matrices, stored so that the weights of each output are contiguous in memory."""

    w_qkv: jax.Array  # [N + 2K, H, D]
    wo: jax.Array  # [D, N·H]
    w_up: jax.Array  # [F, D]
    w_down: jax.Array  # [D, F]


def by_result(w: Blocks) -> RowWeights:
    w_qkv = jnp.concatenate([jnp.moveaxis(a, 0, -1) for a in (w.wq, w.wk, w.wv)])
    return RowWeights(w_qkv, w.wo.reshape(-1, w.wo.shape[-1]).T, w.w_up.T, w.w_down.T)


def by_input(w: RowWeights | Blocks, config: ModelConfig) -> Blocks:
    """Convert a layer's weights from RowWeights to Blocks. Blocks are returned unchanged."""
    if isinstance(w, Blocks):
        return w
    N, K = config.n_head, config.n_kv_head
    wq, wk, wv = jnp.split(jnp.moveaxis(w.w_qkv, -1, 0), (N, N + K), axis=1)
    wo = w.wo.T.reshape(N, config.head_dim, -1)
    return Blocks(wq=wq, wk=wk, wv=wv, wo=wo, w_up=w.w_up.T, w_down=w.w_down.T)


def add_product(stream_O, x_D, w_OD):
    """Return stream_O + w_OD·x_D in float32, computed in one kernel."""
    first_1D = jnp.arange(x_D.size)[None] == 0
    stream_OD = jnp.where(first_1D, stream_O[:, None], 0.0)
    return jnp.sum(w_OD.astype(jnp.float32) * x_D[None] + stream_OD, axis=-1)


def materialize(result):
    """Return `result` unchanged, but make XLA compute it once and not in every kernel that reads it."""
    return lax.optimization_barrier(result)


def normed_sums(x_D, w_OD, eps: float):
    """Return (w·x, O copies of 1 / RMS(x)), both float32, from one kernel. Their product is w·rms_norm(x)."""
    x_OD, w_OD = jnp.broadcast_to(x_D, w_OD.shape), w_OD.astype(jnp.float32)
    mean_O = jnp.sum((x_OD * x_OD + eps) * (1 / x_D.size) + 0 * w_OD, -1)
    return jnp.sum(w_OD * x_OD, -1), lax.rsqrt(mean_O)


def inverse_rms(x_NH, eps: float):
    return lax.rsqrt(jnp.sum((x_NH * x_NH + eps) * (1 / x_NH.shape[-1]), -1, keepdims=True))


def rotate(x_NH, tables):
    """Apply rotary embedding to one token's queries or keys. Return [N, H].

    tables: (cos, sin) of the token's position, both [H/2].
    """
    cos, sin = tables
    cos_1H, sin_1H = (jnp.concatenate(halves)[None] for halves in ((cos, cos), (sin, -sin)))
    other_NH = x_NH.reshape(len(x_NH), 2, -1)[:, ::-1].reshape(x_NH.shape)
    return x_NH * cos_1H + other_NH * sin_1H


def attention(q_KGH, own: tuple, k_KSH, v_KSH, position, window: int | None):
    """Return attention of a new token to itself and to the slots before `position`: float32 [K, G, H].

    Queries and keys must be normalized, because the softmax subtracts no maximum.
    own: (scores of the token's queries with its own key, [K, G, 1]; the token's value, [K, 1, H]).
    window: how many earlier positions the token attends to; None: all.
    """
    (own_KG1, v_K1H), (K, S, H) = own, k_KSH.shape
    p_KGS = materialize(jnp.exp(jnp.sum(q_KGH[:, :, None] * k_KSH[:, None].astype(jnp.float32), -1)))
    slots_S = jnp.arange(S)
    seen_S = slots_S < position
    if window is not None:
        seen_S &= slots_S >= position - window
    ranges = math.gcd(S, RANGES)
    p_KGRs1 = p_KGS.reshape(K, -1, ranges, S // ranges, 1)
    # Columns of ones beside v make the sums of p itself.
    v_K1Rsh = jnp.pad(v_KSH.astype(jnp.float32), ((0, 0), (0, 0), (0, WARP)), constant_values=1.0)
    v_K1Rsh = v_K1Rsh.reshape(K, 1, ranges, -1, H + WARP)
    terms_KGRsh = jnp.where(seen_S.reshape(1, 1, ranges, -1, 1), p_KGRs1 * v_K1Rsh, 0.0)
    y_KGh = jnp.sum(materialize(jnp.sum(terms_KGRsh, 3)), 2)
    own_KG1 = jnp.exp(own_KG1)
    return materialize((y_KGh[..., :H] + own_KG1 * v_K1H) / (y_KGh[..., H : H + 1] + own_KG1))


def layer(x_D, w: RowWeights, cache: tuple, at: tuple, window: int | None, config: ModelConfig):
    """Compute one transformer layer for one new token of one row. Return (x_D, the token's k_KH and v_KH).

    cache: this layer's (k_KSH, v_KSH), without the new token. at: (the token's position, its (cos, sin)).
    window: how many earlier positions the token attends to; None: all.
    """
    (position, tables), (N, K, H) = at, (config.n_head, config.n_kv_head, config.head_dim)
    with jax.named_scope("projections"):
        u_OH, r_OH = normed_sums(x_D, w.w_qkv, config.norm_eps)
        q_KGH, k_K1H, v_K1H = (a.reshape(K, -1, H) for a in jnp.split(r_OH[0, 0] * u_OH, (N, N + K)))
        q_KGH, k_K1H = (rotate(a.reshape(-1, H), tables).reshape(a.shape) for a in (q_KGH, k_K1H))
        r_KG1, r_K11 = (inverse_rms(a, config.norm_eps) for a in (q_KGH, k_K1H))
        own_KG1 = jnp.sum(q_KGH * k_K1H, -1, keepdims=True)
        q_KGH, r_KG1, r_K11, own_KG1 = materialize((q_KGH, r_KG1, r_K11, own_KG1))
        r_KG1, r_K11 = config.qk_scale / math.sqrt(H) * r_KG1, config.qk_scale * r_K11
        k_K1H = r_K11 * k_K1H
    with jax.named_scope("attention"):
        own = r_KG1 * r_K11 * own_KG1, v_K1H
        y_KGH = attention(r_KG1 * q_KGH, own, *cache, position, window)
    with jax.named_scope("projections"):
        x_D = add_product(x_D, y_KGH.reshape(-1), w.wo)
    with jax.named_scope("mlp"):
        u_F, r_F = normed_sums(x_D, w.w_up, config.norm_eps)
        x_D = add_product(x_D, jnp.square(jax.nn.relu(r_F * u_F)), w.w_down)
    return x_D, k_K1H[:, 0], v_K1H[:, 0]


def features(params: Params, tokens_11, cache: KVCache, config: ModelConfig, compute: Compute, counts_1):
    """Compute the LM head's input for one new token of one row. Return (x_11D, the cache with the token).

    params.blocks: one RowWeights per layer. cache: a cache from KVCache.joined.
    counts_1: number of tokens by which the row grows: 1, or 0 if the token is padding.
    """
    position, K = cache.lengths_B[0], config.n_kv_head
    tables = rotary_tables(cache.lengths_B[:, None], config.head_dim, config.rotary_base)
    tables = [a[0, 0, 0] for a in tables]
    x_D = embedded(params, tokens_11, config, compute)[0, 0].astype(jnp.float32)
    new = []
    for i, (w, kind) in enumerate(zip(params.blocks, layers(config), strict=True)):
        held = (a[0][0, K * i : K * (i + 1)] for a in (cache.k_BKSH, cache.v_BKSH))
        x_D, *keys_and_values = layer(x_D, w, tuple(held), (position, tables), kind.window, config)
        new.append(keys_and_values)
    k, v = (jnp.concatenate(each).astype(compute.dtype) for each in zip(*new, strict=True))
    cache = cache.write_one(k, v, position).advance(counts_1)
    return last_norm(params, x_D[None, None].astype(compute.dtype), None, config), cache
