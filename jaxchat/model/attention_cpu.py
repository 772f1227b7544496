"""Attention for CPUs, in plain XLA operations on one block at a time, to skip most of the masked scores.

Queries and keys must be RMS-normalized and multiplied by the model's qk_scale. No score then exceeds
√H · qk_scale², so the softmax can use exp(score) without subtracting the maximum.
"""

import math

import jax
import jax.numpy as jnp

QUERY_BLOCK = 128  # queries per block; a smaller block skips more of the mask, a larger one multiplies faster
SLOT_BLOCK = 64  # cache slots per block while decoding


def block_causal_attention(q_BTNH, k_BTKH, v_BTKH, segments_BT=None, *, window: int | None = None):
    """Compute causal attention, one block of queries at a time. Return [B, T, N, H].

    A block skips the keys after its last query, and those before the window of its first query.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    # Heads before time, for matrix products over the last two axes. G = N/K query heads share a key head.
    q_BKGTH = jnp.moveaxis((q_BTNH / math.sqrt(H)).reshape(B, T, K, N // K, H), 1, 3)
    k_BKSH, v_BKSH = jnp.moveaxis(k_BTKH, 1, 2), jnp.moveaxis(v_BTKH, 1, 2)
    blocks = []
    for start in range(0, T, QUERY_BLOCK):
        end, first = min(start + QUERY_BLOCK, T), 0 if window is None else max(0, start - window)
        s, t = jnp.arange(first, end)[None, :], jnp.arange(start, end)[:, None]
        seen = s <= t if window is None else (s <= t) & (s >= t - window)
        seen = seen[None, None, None]  # [B, K, G, t, s]
        if segments_BT is not None:
            seen = seen & (segments_BT[:, start:end, None] == segments_BT[:, None, first:end])[:, None, None]
        q_BKGtH, k_BKsH = q_BKGTH[..., start:end, :], k_BKSH[:, :, first:end]
        scores_BKGts = jnp.einsum("bkgth,bksh->bkgts", q_BKGtH, k_BKsH, preferred_element_type=jnp.float32)
        p_BKGts = jnp.where(seen, jnp.exp(scores_BKGts), 0.0)
        y_BKGtH = jnp.einsum("bkgts,bksh->bkgth", p_BKGts.astype(v_BKSH.dtype), v_BKSH[:, :, first:end])
        blocks.append((y_BKGtH / p_BKGts.sum(-1, keepdims=True)).astype(q_BTNH.dtype))
    return jnp.moveaxis(jnp.concatenate(blocks, axis=3), 3, 1).reshape(B, T, N, H)


def decoding_attention(q_B1NH, k_BKSH, v_BKSH, positions_B, window: int | None = None):
    """Compute attention of one new token per row to the cache slots up to its own. Return [B, 1, N, H].

    Rows are computed one after another, so that a row's result does not depend on the other rows.
    window: how many earlier positions the token attends to; None: all.
    """
    (B, _, N, H), (_, K, S, _) = q_B1NH.shape, k_BKSH.shape
    block = math.gcd(S, SLOT_BLOCK)
    q_BKGH = (q_B1NH.astype(jnp.float32) / math.sqrt(H)).reshape(B, K, N // K, H)
    first_B = jnp.zeros_like(positions_B) if window is None else jnp.maximum(positions_B - window, 0) // block
    blocks_B = jnp.minimum(positions_B // block + 1, S // block) - first_B
    ends_B = jnp.cumsum(blocks_B)

    def add_block(n, sums):
        row = jnp.sum(ends_B <= n)
        slot = (n - ends_B[row] + blocks_B[row] + first_B[row]) * block
        slots = [jax.lax.dynamic_slice(a, (row, 0, slot, 0), (1, K, block, H)) for a in (k_BKSH, v_BKSH)]
        k_1KsH, v_1KsH = (a.astype(jnp.float32) for a in slots)
        q_1KGH, *own = (jax.lax.dynamic_slice_in_dim(a, row, 1) for a in (q_BKGH, *sums))
        slots_s = slot + jnp.arange(block)
        seen_s = slots_s <= positions_B[row]
        if window is not None:
            seen_s &= slots_s >= positions_B[row] - window
        scores_1KGs = jnp.einsum("bkgh,bksh->bkgs", q_1KGH, k_1KsH)
        p_1KGs = jnp.where(seen_s[None, None, None], jnp.exp(scores_1KGs), 0.0)
        more = (p_1KGs.sum(-1, keepdims=True), jnp.einsum("bkgs,bksh->bkgh", p_1KGs, v_1KsH))
        put = jax.lax.dynamic_update_slice_in_dim
        return tuple(put(a, x + y, row, 0) for a, x, y in zip(sums, own, more, strict=True))

    zeros = (jnp.zeros((B, K, N // K, 1)), jnp.zeros((B, K, N // K, H)))
    weight_BKG1, y_BKGH = jax.lax.fori_loop(0, ends_B[-1], add_block, zeros)
    return (y_BKGH / weight_BKG1).reshape(B, 1, N, H).astype(q_B1NH.dtype)
