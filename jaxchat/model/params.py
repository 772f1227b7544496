"""The weights: one declaration gives each its shape, its initialisation and its place on a mesh.

Letters in names and comments: L layers, D model width, N query heads, K key/value heads, H head dimension,
F MLP width, V vocabulary. The blocks' weights are stacked over the layers (axis 0).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P

from jaxchat.config import ModelConfig


@struct.dataclass
class Blocks:
    wq: Any  # [L, D, N, H]
    wk: Any  # [L, D, K, H]
    wv: Any  # [L, D, K, H]
    wo: Any  # [L, N, H, D]
    w_up: Any  # [L, D, F]
    w_down: Any  # [L, F, D]


@struct.dataclass
class Params:
    wte: Any  # [V, D] token embedding
    blocks: Blocks
    lm_head: Any  # [D, V]


@dataclasses.dataclass(frozen=True)
class Weight:
    """One declared weight. std is that of its normal initialisation (0: all zeros)."""

    shape: tuple[int, ...]
    fan_in: int
    fan_out: int
    std: float
    spec: P


def declare(config: ModelConfig) -> Params:
    """A Params of `Weight`: every weight of the model, with `Params`' shapes."""
    L, D, N, K, H, V = (config.n_layer, config.n_embd, config.n_head, config.n_kv_head, config.head_dim,
                        config.vocab_size)  # fmt: skip
    F = 4 * D

    def matrix(shape, fan_in, fan_out, spec, zero=False):
        # std from spec.md: normal of variance 1/fan_in, made smaller where a matrix narrows.
        std = min(1.0, math.sqrt(fan_out / fan_in)) / math.sqrt(fan_in)
        return Weight(shape, fan_in, fan_out, 0.0 if zero else std, spec)

    return Params(
        wte=Weight((V, D), V, D, 1.0, P("tensor", "fsdp")),
        blocks=Blocks(
            wq=matrix((L, D, N, H), D, N * H, P(None, "fsdp", "tensor", None)),
            wk=matrix((L, D, K, H), D, K * H, P(None, "fsdp", "tensor", None)),
            wv=matrix((L, D, K, H), D, K * H, P(None, "fsdp", "tensor", None)),
            wo=matrix((L, N, H, D), N * H, D, P(None, "tensor", None, "fsdp"), zero=True),
            w_up=matrix((L, D, F), D, F, P(None, "fsdp", "tensor")),
            w_down=matrix((L, F, D), F, D, P(None, "tensor", "fsdp"), zero=True),
        ),
        lm_head=matrix((D, V), D, V, P("fsdp", "tensor"), zero=True),
    )


def specs(config: ModelConfig) -> Params:
    """The partition spec of every weight, over the mesh axes data, fsdp, tensor."""
    return jax.tree.map(lambda w: w.spec, declare(config))


def shapes(config: ModelConfig) -> Params:
    """The float32 ShapeDtypeStruct of every weight."""
    return jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, jnp.float32), declare(config))


def init(key: jax.Array, config: ModelConfig) -> Params:
    """Fresh float32 weights. The same key gives the same weights on any mesh."""
    declared, treedef = jax.tree.flatten(declare(config))
    keys = jax.random.split(key, len(declared))
    weights = [
        w.std * jax.random.normal(k, w.shape) if w.std else jnp.zeros(w.shape)
        for k, w in zip(keys, declared, strict=True)
    ]
    return jax.tree.unflatten(treedef, weights)


def layers_of(blocks: Blocks | tuple[Blocks, ...], dtype) -> tuple[Blocks, ...]:
    """Each layer's weights in `dtype`, of stacked blocks or of what this function gave."""
    if isinstance(blocks, Blocks):
        count = jax.tree.leaves(blocks)[0].shape[0]
        blocks = tuple(jax.tree.map(lambda a, i=i: a[i], blocks) for i in range(count))
    return jax.tree.map(lambda a: a.astype(dtype), blocks)
