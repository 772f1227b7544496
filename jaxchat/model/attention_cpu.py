"""Attention for CPUs only: plain XLA operations, block after block, so that masked scores are mostly not computed.

A reader who wants to know what the model computes can skip this file: attention.py says it in two lines.
Queries and keys must be normed: then a score is at most √H (11 at H = 128) and exp needs no maximum subtracted.
"""

import math

import jax
import jax.numpy as jnp

QUERY_BLOCK = 128  # queries per block; a smaller block skips more of the mask, a larger one multiplies faster
SLOT_BLOCK = 32  # cache slots per block while decoding
SLOT_ROWS = 32  # rows per block while decoding


def block_causal_attention(q_BTNH, k_BTKH, v_BTKH, segments_BT=None):
    """Causal attention, one block of queries at a time against the keys up to its last query. -> [B, T, N, H]."""
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
        q_BKGtH, k_BKsH = q_BKGTH[..., start:end, :], k_BKSH[:, :, :end]
        scores_BKGts = jnp.einsum("bkgth,bksh->bkgts", q_BKGtH, k_BKsH, preferred_element_type=jnp.float32)
        p_BKGts = jnp.where(seen, jnp.exp(scores_BKGts), 0.0)
        y_BKGtH = jnp.einsum("bkgts,bksh->bkgth", p_BKGts.astype(v_BKSH.dtype), v_BKSH[:, :, :end])
        blocks.append((y_BKGtH / p_BKGts.sum(-1, keepdims=True)).astype(q_BTNH.dtype))
    return jnp.moveaxis(jnp.concatenate(blocks, axis=3), 3, 1).reshape(B, T, N, H)


def decoding_attention(q_B1NH, k_LBSKH, v_LBSKH, layer: int, positions_B):
    """Attention of one new token per row to its layer's cache slots, up to its own position. -> [B, 1, N, H].

    Works through blocks of slots for groups of rows, as far as the longest row of a group reaches. Slots beyond a row's
    own end add exactly 0, so a row's result does not depend on how long the others are.
    """
    (B, _, N, H), (_, _, S, K, _) = q_B1NH.shape, k_LBSKH.shape
    R, block = math.gcd(B, SLOT_ROWS), math.gcd(S, SLOT_BLOCK)
    q_BKGH = (q_B1NH.astype(jnp.float32) / math.sqrt(H)).reshape(B, K, N // K, H)
    blocks_M = jnp.minimum(jnp.max(positions_B.reshape(-1, R), axis=1) // block + 1, S // block)  # M groups of rows
    ends_M = jnp.cumsum(blocks_M)

    def add_block(n, sums):  # elementwise products and sums: five times as fast as matrix products here
        m = jnp.searchsorted(ends_M, n, side="right")
        row, slot = m * R, (n - ends_M[m] + blocks_M[m]) * block

        def rows(array):
            return jax.lax.dynamic_slice_in_dim(array, row, R)

        k_RsKH, v_RsKH = (
            jax.lax.dynamic_slice(a, (layer, row, slot, 0, 0), (1, R, block, K, H))[0] for a in (k_LBSKH, v_LBSKH)
        )
        seen_Rs1 = (slot + jnp.arange(block)[None, :, None]) <= rows(positions_B)[:, None, None]
        q_RKGH, added = rows(q_BKGH), []
        for g, (sum_BK, y_BKH) in enumerate(sums):
            scores_RsK = jnp.sum(q_RKGH[:, None, :, g] * k_RsKH, axis=-1)
            p_RsK = jnp.where(seen_Rs1, jnp.exp(scores_RsK), 0.0)
            sum_RK = rows(sum_BK) + p_RsK.sum(1)
            y_RKH = rows(y_BKH) + jnp.sum(p_RsK[..., None] * v_RsKH, axis=1)
            put = jax.lax.dynamic_update_slice_in_dim
            added.append((put(sum_BK, sum_RK, row, 0), put(y_BKH, y_RKH, row, 0)))
        return added

    zeros = [(jnp.zeros((B, K)), jnp.zeros((B, K, H))) for _ in range(N // K)]
    sums = jax.lax.fori_loop(0, ends_M[-1], add_block, zeros)
    y_BKGH = jnp.stack([y_BKH / sum_BK[..., None] for sum_BK, y_BKH in sums], axis=2)
    return y_BKGH.reshape(B, 1, N, H).astype(q_B1NH.dtype)
