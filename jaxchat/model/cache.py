"""The key/value cache of generation. It owns all state that a row carries from token to token."""

import jax
import jax.numpy as jnp
from flax import struct

from jaxchat.config import ModelConfig


@struct.dataclass
class KVCache:
    """Keys and values of the tokens seen so far; each row has a length of its own.

    Slot s of row b holds the token at position s and is valid while s < lengths_B[b]. Slots beyond are never attended
    to and are overwritten by later tokens.
    """

    k_LBSKH: jax.Array
    v_LBSKH: jax.Array
    lengths_B: jax.Array  # int32

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, max_len: int, dtype):
        shape = (config.n_layer, batch, max_len, config.n_kv_head, config.head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(batch, jnp.int32))

    def write(self, layer, k_BTKH, v_BTKH, positions_BT) -> "KVCache":
        """Write one layer's keys and values at these positions; positions beyond the last slot are dropped."""
        rows_B1 = jnp.arange(k_BTKH.shape[0])[:, None]
        place = (layer, rows_B1, positions_BT)
        return self.replace(
            k_LBSKH=self.k_LBSKH.at[place].set(k_BTKH.astype(self.k_LBSKH.dtype), mode="drop"),
            v_LBSKH=self.v_LBSKH.at[place].set(v_BTKH.astype(self.v_LBSKH.dtype), mode="drop"),
        )

    def advance(self, counts_B) -> "KVCache":
        """Make each row `counts_B` tokens longer; their keys and values have been written."""
        return self.replace(lengths_B=self.lengths_B + counts_B)

    def cut(self, lengths_B) -> "KVCache":
        """Cut rows back to these lengths, which must not exceed their own; 0 empties a row."""
        return self.replace(lengths_B=lengths_B)

    def place(self, other: "KVCache", rows_P) -> "KVCache":
        """Copy the P rows of another cache, of at most as many slots, into rows_P; a row beyond the last is dropped."""
        slots = other.k_LBSKH.shape[2]
        return KVCache(
            self.k_LBSKH.at[:, rows_P, :slots].set(other.k_LBSKH, mode="drop"),
            self.v_LBSKH.at[:, rows_P, :slots].set(other.v_LBSKH, mode="drop"),
            self.lengths_B.at[rows_P].set(other.lengths_B, mode="drop"),
        )
