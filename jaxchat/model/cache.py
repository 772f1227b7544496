"""The key/value cache of generation."""

import jax
import jax.numpy as jnp
from flax import struct

from jaxchat.config import ModelConfig


@struct.dataclass
class KVCache:
    """Keys and values of the tokens seen so far; each row has a length of its own.

    Slot s of row b holds the token at position s and is valid while s < lengths_B[b]. What lies beyond is never
    attended to and is overwritten by later tokens, so a row can be cut back by setting its length.
    """

    k_LBSKH: jax.Array
    v_LBSKH: jax.Array
    lengths_B: jax.Array  # int32

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, max_len: int, dtype):
        shape = (config.n_layer, batch, max_len, config.n_kv_head, config.head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(batch, jnp.int32))
