"""The key/value cache, which saves generation from computing earlier tokens again."""

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxchat.config import ModelConfig


@struct.dataclass
class KVCache:
    """Key/value cache of B rows of different lengths.

    Slot s of row b holds the keys and values of the token at position s. The slots from lengths_B[b] on are
    free, so lowering a length truncates the row.
    """

    # An array per layer, since slicing a layer from a stacked array would copy it.
    k_BKSH: tuple[jax.Array, ...]
    v_BKSH: tuple[jax.Array, ...]
    lengths_B: jax.Array  # int32
    tokens_BS: jax.Array | None = None  # int32; only for a model with smear, which reads the previous token

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, max_len: int, dtype):
        shape = (batch, config.n_kv_head, max_len, config.head_dim)
        k, v = (tuple(jnp.zeros(shape, dtype) for _ in range(config.n_layer)) for _ in "kv")
        tokens_BS = jnp.zeros((batch, max_len), jnp.int32) if config.smear_channels else None
        return cls(k, v, jnp.zeros(batch, jnp.int32), tokens_BS)

    @classmethod
    def from_prefill(cls, layers: list[tuple[jax.Array, jax.Array]], lengths_B, tokens_BT=None):
        """Make a cache of T slots per row from prefilled keys and values, (k_BTKH, v_BTKH) of each layer.

        tokens_BT: token ids, needed only by a model with smear, which reads the previous token's embedding.
        """
        k, v = (tuple(jnp.swapaxes(x_BTKH, 1, 2) for x_BTKH in each) for each in zip(*layers, strict=True))
        return cls(k, v, lengths_B, tokens_BT)

    @property
    def slots(self) -> int:
        return self.k_BKSH[0].shape[2]

    def write(self, layer: int, k_BTKH, v_BTKH, positions_BT) -> "KVCache":
        """Write a layer's keys and values to the slots positions_BT, dropping those beyond the last slot."""
        B, _, K, _ = k_BTKH.shape
        # Every index is explicit: with a slice for the heads, XLA would change the cache's layout on a TPU.
        at_BKT = jnp.arange(B)[:, None, None], jnp.arange(K)[None, :, None], positions_BT[:, None, :]

        def put(arrays, x_BTKH):
            array = arrays[layer]
            array = array.at[at_BKT].set(jnp.swapaxes(x_BTKH, 1, 2).astype(array.dtype), mode="drop")
            return (*arrays[:layer], array, *arrays[layer + 1 :])

        return self.replace(k_BKSH=put(self.k_BKSH, k_BTKH), v_BKSH=put(self.v_BKSH, v_BTKH))

    def joined(self) -> "KVCache":
        """Return a cache with one array [B, L·K, S, H] for all layers' keys, and another for all values."""
        k, v = ((jnp.concatenate(arrays, axis=1),) for arrays in (self.k_BKSH, self.v_BKSH))
        return self.replace(k_BKSH=k, v_BKSH=v)

    def write_one(self, k_LKH, v_LKH, position) -> "KVCache":
        """Write a token's keys and values to slot `position`, in a cache from joined() with one row."""

        def put(array, x_LKH):
            return (lax.dynamic_update_slice(array, x_LKH[None, :, None], (0, 0, position, 0)),)

        return self.replace(k_BKSH=put(*self.k_BKSH, k_LKH), v_BKSH=put(*self.v_BKSH, v_LKH))

    def write_tokens(self, tokens_BT, positions_BT) -> "KVCache":
        """Write token ids to the slots positions_BT, dropping those beyond the last slot.

        A cache without token ids is returned unchanged.
        """
        if self.tokens_BS is None:
            return self
        rows_B1 = jnp.arange(tokens_BT.shape[0])[:, None]
        return self.replace(tokens_BS=self.tokens_BS.at[rows_B1, positions_BT].set(tokens_BT, mode="drop"))

    def last_tokens(self):
        """Return the id of each row's last token, [B]. For an empty row the id is arbitrary."""
        return jnp.take_along_axis(self.tokens_BS, jnp.maximum(self.lengths_B - 1, 0)[:, None], axis=1)[:, 0]

    def advance(self, counts_B) -> "KVCache":
        """Return the cache with counts_B added to the rows' lengths."""
        return self.replace(lengths_B=self.lengths_B + counts_B)

    def place(self, other: "KVCache", rows_P) -> "KVCache":
        """Return this cache with the P rows of `other` copied into it, row p to row rows_P[p].

        If there is no such row, row p is ignored. `other` must not have more slots than this cache.
        """

        def put(array, other):
            return array.at[rows_P, :, : other.shape[2]].set(other, mode="drop")

        tokens_BS = self.tokens_BS
        if tokens_BS is not None:
            tokens_BS = tokens_BS.at[rows_P, : other.slots].set(other.tokens_BS, mode="drop")
        return KVCache(
            jax.tree.map(put, self.k_BKSH, other.k_BKSH),
            jax.tree.map(put, self.v_BKSH, other.v_BKSH),
            self.lengths_B.at[rows_P].set(other.lengths_B, mode="drop"),
            tokens_BS,
        )

    def resize(self, slots: int) -> "KVCache":
        """Return the cache with `slots` slots per row, which must be enough for the longest row."""

        def change(array):
            more = slots - array.shape[2]
            return jnp.pad(array, ((0, 0), (0, 0), (0, more), (0, 0))) if more > 0 else array[:, :, :slots]

        k, v = jax.tree.map(change, (self.k_BKSH, self.v_BKSH))
        tokens_BS = None if self.tokens_BS is None else change(self.tokens_BS[:, None, :, None])[:, 0, :, 0]
        return self.replace(k_BKSH=k, v_BKSH=v, tokens_BS=tokens_BS)
