"""Attention, and the one place that chooses its kernel."""

import math

import jax
import jax.numpy as jnp

QUERY_BLOCK = 128  # "blocks": queries taken together; smaller skips more of the mask, larger multiplies faster


def causal_attention(q_BTNH, k_BTKH, v_BTKH, implementation: str, segments_BT=None):
    """Each position attends to itself and those before it; softmax in float32, scale 1/√H. -> [B, T, N, H].

    K may divide N: then N/K query heads in a row share one key/value head. Queries and keys must be normed.
    segments_BT: only to those of its own segment.
    implementation: "blocks" is ours, for CPUs; "xla" and "cudnn" are jax.nn's.
    """
    if implementation == "blocks":
        return block_causal_attention(q_BTNH, k_BTKH, v_BTKH, segments_BT)
    same = (
        None if segments_BT is None else (segments_BT[:, :, None] == segments_BT[:, None, :])[:, None]
    )  # [B, 1, T, S]
    return jax.nn.dot_product_attention(
        q_BTNH, k_BTKH, v_BTKH, mask=same, is_causal=True, implementation=implementation
    )


def block_causal_attention(q_BTNH, k_BTKH, v_BTKH, segments_BT=None):
    """Block after block of queries, each with no more keys than its last query may see: what the mask drops is mostly
    never computed. Normed queries and keys bound a score by √H (11 at H = 128), so exp needs no maximum taken off.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    # Heads before time, contiguous: matrix products over the last two axes. G = N/K query heads share a key head.
    q_BKGTH = jnp.moveaxis((q_BTNH / math.sqrt(H)).reshape(B, T, K, N // K, H), 1, 3)
    k_BKSH, v_BKSH = jnp.moveaxis(k_BTKH, 1, 2), jnp.moveaxis(v_BTKH, 1, 2)
    blocks = []
    for start in range(0, T, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, T)
        seen = (jnp.arange(end)[None, :] <= jnp.arange(start, end)[:, None])[None, None, None]  # [B, K, G, t, s]
        if segments_BT is not None:
            seen = seen & (segments_BT[:, start:end, None] == segments_BT[:, None, :end])[:, None, None]
        scores_BKGts = jnp.einsum(
            "bkgth,bksh->bkgts", q_BKGTH[..., start:end, :], k_BKSH[:, :, :end], preferred_element_type=jnp.float32
        )
        p_BKGts = jnp.where(seen, jnp.exp(scores_BKGts), 0.0)
        y_BKGtH = jnp.einsum("bkgts,bksh->bkgth", p_BKGts.astype(v_BKSH.dtype), v_BKSH[:, :, :end])
        blocks.append((y_BKGtH / p_BKGts.sum(-1, keepdims=True)).astype(q_BTNH.dtype))
    return jnp.moveaxis(jnp.concatenate(blocks, axis=3), 3, 1).reshape(B, T, N, H)


def cached_attention(q_BTNH, k_BSKH, v_BSKH, positions_BT):
    """Attend to the cache slots at or before each query's own position. -> [B, T, N, H]."""
    slots_S = jnp.arange(k_BSKH.shape[1])
    mask_BTS = slots_S[None, None, :] <= positions_BT[:, :, None]
    return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask_BTS[:, None], implementation="xla")
