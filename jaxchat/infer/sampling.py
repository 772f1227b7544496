"""Choosing the next token on the device."""

import jax
import jax.numpy as jnp


def sample(logits_BV, rows_B, positions_B, seed, temperature, *, greedy: bool, top_k: int | None):
    """The next token of every row, int32 [B]: the likeliest if greedy, else drawn from softmax(logits / temperature).

    top_k: from that many likeliest only. A row's draw depends on (seed, its number, its position) alone, not on what
    else is in the batch.
    """
    if greedy:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    if top_k is not None and top_k < logits_BV.shape[-1]:
        least_B1 = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)

    def draw(logits_V, row, position):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), position)
        return jax.random.categorical(key, logits_V)

    return jax.vmap(draw)(logits_BV / temperature, rows_B, positions_B).astype(jnp.int32)
