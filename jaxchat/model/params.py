"""The weights: one declaration gives each its shape, mesh axes, initialisation and optimizer rule.

Letters in names and comments: L layers, D model width, N query heads, K key/value heads, H head dimension,
F MLP width, V vocabulary. The blocks' weights are stacked over the layers (axis 0).
"""

import dataclasses
import math
import zlib
from collections.abc import Callable
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


def normal(std: float):
    """Initialise with normal numbers of this standard deviation."""
    return lambda key, shape: std * jax.random.normal(key, shape)


def zeros(key, shape):
    return jnp.zeros(shape)


@dataclasses.dataclass(frozen=True)
class Weight:
    """One declared weight.

    axes: the mesh axis that each dimension is cut over, or None.
    init: (key, shape) -> the initial values, float32.
    group: names the optimizer's rule, a key of the table in train/optimizer.py.
    fan_in, fan_out: of a matrix, or of each matrix of a stack over the layers.
    lookup: rows are looked up, so a token costs no product with it.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Callable
    group: str
    fan_in: int = 0
    fan_out: int = 0
    lookup: bool = False

    @property
    def spec(self) -> P:
        return P(*self.axes)


def declare(config: ModelConfig) -> Params:
    """A Params of `Weight`: every weight of the model, with `Params`' shapes."""
    L, D, N, K, H, V = (config.n_layer, config.n_embd, config.n_head, config.n_kv_head, config.head_dim,
                        config.vocab_size)  # fmt: skip
    F = 4 * D

    def stack(inputs, outputs, axes, init=None):
        """A matrix [*inputs, *outputs] for every layer."""
        fan_in, fan_out = math.prod(inputs), math.prod(outputs)
        # Variance 1/fan_in, made smaller where a matrix narrows.
        init = init or normal(min(1.0, math.sqrt(fan_out / fan_in)) / math.sqrt(fan_in))
        return Weight((L, *inputs, *outputs), (None, *axes), init, "matrix", fan_in, fan_out)

    return Params(
        wte=Weight((V, D), ("tensor", "fsdp"), normal(1.0), "embedding", V, D, lookup=True),
        blocks=Blocks(
            wq=stack([D], [N, H], ("fsdp", "tensor", None)),
            wk=stack([D], [K, H], ("fsdp", "tensor", None)),
            wv=stack([D], [K, H], ("fsdp", "tensor", None)),
            wo=stack([N, H], [D], ("tensor", None, "fsdp"), zeros),
            w_up=stack([D], [F], ("fsdp", "tensor")),
            w_down=stack([F], [D], ("tensor", "fsdp"), zeros),
        ),
        lm_head=Weight((D, V), ("fsdp", "tensor"), zeros, "head", D, V),
    )


def specs(config: ModelConfig) -> Params:
    """The partition spec of every weight, over the mesh axes data, fsdp, tensor."""
    return jax.tree.map(lambda w: w.spec, declare(config))


def shapes(config: ModelConfig) -> Params:
    """The float32 ShapeDtypeStruct of every weight."""
    return jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, jnp.float32), declare(config))


def named(config: ModelConfig) -> dict[str, Weight]:
    """The declared weights by name: "wte", "blocks.wq", "lm_head"."""
    leaves = jax.tree_util.tree_leaves_with_path(declare(config))
    return {jax.tree_util.keystr(path, simple=True, separator="."): weight for path, weight in leaves}


def init(key: jax.Array, config: ModelConfig) -> Params:
    """Fresh float32 weights, the same on any mesh. Each depends on the key and its own declaration only."""
    keys = {name: jax.random.fold_in(key, zlib.crc32(name.encode())) for name in named(config)}
    weights = [weight.init(keys[name], weight.shape) for name, weight in named(config).items()]
    return jax.tree.unflatten(jax.tree.structure(declare(config)), weights)


def layers_of(blocks: Blocks | tuple[Blocks, ...], dtype) -> tuple[Blocks, ...]:
    """Each layer's weights in `dtype`, from stacked blocks or from an earlier result of this function."""
    if isinstance(blocks, Blocks):
        count = jax.tree.leaves(blocks)[0].shape[0]
        blocks = tuple(jax.tree.map(lambda a, i=i: a[i], blocks) for i in range(count))
    return jax.tree.map(lambda a: a.astype(dtype), blocks)
