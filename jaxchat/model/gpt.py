"""The forward pass: a pure function of the weights and the tokens.

Names carry their shapes: B batch, T time, S cache slots, D model width, N query heads, K key/value heads,
H head dimension, F MLP width, V vocabulary.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxchat.config import Compute, ModelConfig
from jaxchat.model.attention import cached_attention, causal_attention, decoding_attention
from jaxchat.model.cache import KVCache
from jaxchat.model.params import Blocks, Params
from jaxchat.sharding import constrain, row_axes

NORM_EPS = 1.1920929e-07  # float32's machine epsilon, torch's default for rms_norm
ROTARY_BASE = 10_000.0
SOFTCAP = 15.0

REMAT_POLICIES = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def rms_norm(x):
    """x over its root mean square along the last axis, computed in float32, without a learned scale."""
    x32 = x.astype(jnp.float32)
    return (x32 * lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + NORM_EPS)).astype(x.dtype)


def rotary_tables(positions_BT, head_dim: int):
    """(cos, sin) [B, T, 1, H/2] of the rotary angles position · base^(−2i/H) (Su et al. 2021), float32."""
    frequencies = ROTARY_BASE ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTNH, tables):
    """Rotary embedding, halves layout: feature i is turned together with feature i + H/2, by minus its angle."""
    cos, sin = tables
    x1, x2 = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos + x2 * sin, x2 * cos - x1 * sin], axis=-1).astype(x_BTNH.dtype)


def embed(wte_VD, tokens_BT, dtype, mesh: Mesh | None):
    """The tokens' rows of the embedding, in `dtype`. -> x_BTD.

    On a mesh each device brings its share of the vocabulary to full width and looks up the tokens that are in it.
    """
    if mesh is None or mesh.size == 1:
        return wte_VD[tokens_BT].astype(dtype)
    rows = P(row_axes(mesh, tokens_BT.shape[0]))

    def local(wte_VD, tokens_BT):
        wte_VD = lax.all_gather(wte_VD, "fsdp", axis=1, tiled=True)
        ids_BT = tokens_BT - lax.axis_index("tensor") * wte_VD.shape[0]
        near_BT = jnp.clip(ids_BT, 0, wte_VD.shape[0] - 1)
        x_BTD = jnp.where((ids_BT == near_BT)[..., None], wte_VD[near_BT], 0.0).astype(dtype)
        return lax.psum(x_BTD, "tensor")

    in_specs = (P("tensor", "fsdp"), rows)
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=rows, check_vma=False)(wte_VD, tokens_BT)


def norm_rotate(x_BTNH, tables):
    return rms_norm(rotate(x_BTNH, tables))


def fork_norm(x_BTD, y_BTD=None, ways: int = 1):
    """x + y (x where there is no y) for the way round a part of a layer, and normed for the ways through it."""
    x_BTD = x_BTD if y_BTD is None else x_BTD + y_BTD
    return x_BTD, *[rms_norm(x_BTD)] * ways


def block(x_BTD, w: Blocks, tables, attend, fork_norm=fork_norm, norm_rotate=norm_rotate):
    """One transformer layer. `attend(q, k, v) -> (y_BTNH, extra)` sees rotated, normed queries and keys.

    -> (x_BTD, extra). w is a single layer's slice of the stack, in the activations' dtype. fork_norm and norm_rotate:
    the functions above, or kernels of theirs.
    """
    with jax.named_scope("projections"):  # the scopes are for profiles: bench/profile.py
        x_BTD, *h_for_qkv = fork_norm(x_BTD, ways=3)
        q_BTNH = norm_rotate(jnp.einsum("btd,dnh->btnh", h_for_qkv[0], w.wq), tables)
        k_BTKH = norm_rotate(jnp.einsum("btd,dkh->btkh", h_for_qkv[1], w.wk), tables)
        v_BTKH = jnp.einsum("btd,dkh->btkh", h_for_qkv[2], w.wv)
    with jax.named_scope("attention"):
        y_BTNH, extra = attend(q_BTNH, k_BTKH, v_BTKH)
    with jax.named_scope("projections"):
        x_BTD, h_BTD = fork_norm(x_BTD, jnp.einsum("btnh,nhd->btd", y_BTNH, w.wo))
    with jax.named_scope("mlp"):
        h_BTF = jax.nn.relu(jnp.einsum("btd,df->btf", h_BTD, w.w_up))
        return x_BTD + jnp.einsum("btf,fd->btd", h_BTF * h_BTF, w.w_down), extra


def features(
    params: Params, tokens_BT, config: ModelConfig, compute: Compute, cache: KVCache | None = None, segments_BT=None
):
    """What the head reads: normed activations x_BTD in the compute dtype; with a cache, (x_BTD, cache).

    tokens_BT is int32. With a cache, token t of row b stands at position cache.lengths_B[b] + t: its key and value
    are written there (dropped beyond the last slot), it attends to everything at or before it, and the returned
    lengths are T longer. A caller that padded its rows sets lengths_B back to the true ones.

    segments_BT, without a cache: tokens of one segment don't see another's. Positions run on: only differences count.
    """
    dtype = jnp.dtype(compute.dtype)
    batch, time = tokens_BT.shape
    start_B = jnp.zeros(batch, jnp.int32) if cache is None else cache.lengths_B
    positions_BT = start_B[:, None] + jnp.arange(time)[None, :]
    # Without a cache all rows stand at the same positions: one row of tables serves them all.
    tables = rotary_tables(positions_BT if cache is not None else positions_BT[:1], config.head_dim)
    x_BTD = rms_norm(embed(params.wte, tokens_BT, dtype, compute.mesh))
    unroll = config.n_layer if compute.unroll else 1

    if cache is None:
        mesh = compute.mesh
        rows = None if mesh is None else P(row_axes(mesh, batch))

        norms = {}
        if compute.kernels:
            from jaxchat.model import kernels  # here, so that other devices need nothing of Pallas'

            norms = {"fork_norm": partial(kernels.fork_norm, mesh=mesh)}
            norms["norm_rotate"] = partial(kernels.norm_rotate, mesh=mesh)

        def layer(x_BTD, w):
            w = jax.tree.map(lambda a: a.astype(dtype), w)
            attend = partial(causal_attention, implementation=compute.attention, segments_BT=segments_BT, mesh=mesh)
            x_BTD, _ = block(x_BTD, w, tables, lambda q, k, v: (attend(q, k, v), None), **norms)
            return constrain(x_BTD, rows, mesh), None

        if compute.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT_POLICIES[compute.remat], prevent_cse=compute.unroll)
        x_BTD, _ = lax.scan(layer, x_BTD, params.blocks, unroll=unroll)
        return rms_norm(x_BTD)

    # The whole cache is carried and written in place: as a scanned output it would be copied every step.
    rows = jnp.arange(batch)[:, None]

    def cached_layer(carry, layer_and_w):
        x_BTD, k_LBSKH, v_LBSKH = carry
        index, w = layer_and_w
        w = jax.tree.map(lambda a: a.astype(dtype), w)

        def attend(q, k, v):
            k_all = k_LBSKH.at[index, rows, positions_BT].set(k.astype(k_LBSKH.dtype), mode="drop")
            v_all = v_LBSKH.at[index, rows, positions_BT].set(v.astype(v_LBSKH.dtype), mode="drop")
            if time == 1 and compute.attention == "blocks":
                y = decoding_attention(q, k_all, v_all, index, positions_BT[:, 0])
            else:
                y = cached_attention(q, k_all[index].astype(dtype), v_all[index].astype(dtype), positions_BT)
            return y, (k_all, v_all)

        x_BTD, (k_LBSKH, v_LBSKH) = block(x_BTD, w, tables, attend)
        return (x_BTD, k_LBSKH, v_LBSKH), None

    carry = (x_BTD, cache.k_LBSKH, cache.v_LBSKH)
    (x_BTD, k, v), _ = lax.scan(cached_layer, carry, (jnp.arange(config.n_layer), params.blocks), unroll=unroll)
    return rms_norm(x_BTD), KVCache(k, v, cache.lengths_B + time)


def softcap(u):
    """15·tanh(u/15) in float32: what the head gives, brought within ±15."""
    return SOFTCAP * jnp.tanh(u.astype(jnp.float32) / SOFTCAP)


def logits(lm_head_DV, x_BTD):
    """15·tanh(head(x)/15) in float32: [..., V] from features [..., D]."""
    head = lm_head_DV.astype(x_BTD.dtype)
    return softcap(jnp.einsum("...d,dv->...v", x_BTD, head, preferred_element_type=jnp.float32))


def forward(params: Params, tokens_BT, config: ModelConfig, compute: Compute, cache: KVCache | None = None):
    """logits_BTV float32 for every position; with a cache, (logits_BTV, cache). See `features`."""
    if cache is None:
        return logits(params.lm_head, features(params, tokens_BT, config, compute))
    x_BTD, cache = features(params, tokens_BT, config, compute, cache)
    return logits(params.lm_head, x_BTD), cache
