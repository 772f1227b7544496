"""Attention, and the one place that chooses its kernel."""

import jax
import jax.numpy as jnp


def causal_attention(q_BTNH, k_BTKH, v_BTKH, implementation: str):
    """Each position attends to itself and those before it; softmax in float32, scale 1/√H. -> [B, T, N, H].

    K may divide N: then N/K query heads in a row share one key/value head.
    """
    return jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, is_causal=True, implementation=implementation)


def cached_attention(q_BTNH, k_BSKH, v_BSKH, positions_BT):
    """Attend to the cache slots at or before each query's own position. -> [B, T, N, H]."""
    slots_S = jnp.arange(k_BSKH.shape[1])
    mask_BTS = slots_S[None, None, :] <= positions_BT[:, :, None]
    return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask_BTS[:, None], implementation="xla")
