"""Declare each weight in one place: its shape, mesh axes, initialisation and optimizer group.

Letters in names and comments: L layers, D model width, N query heads, K key/value heads, H head dimension,
F MLP width, V vocabulary, C features that a gate reads, E layers with value embeddings. The blocks' weights
are stacked along axis 0 over the layers that have the weight. A weight that a model lacks is None.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn.initializers import normal, zeros
from jax.sharding import PartitionSpec as P
from jax.tree_util import GetAttrKey

from jaxchat.config import ModelConfig


def tree(cls):
    """Make a class a frozen dataclass, and a pytree of those fields that are not None (a class decorator).

    Checkpoints hold only these fields, so a new field with the default None keeps older checkpoints valid.
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    names = [field.name for field in dataclasses.fields(cls)]

    def flatten(self):
        given = (name for name in names if getattr(self, name) is not None)
        present = vars(self).get("_present") or tuple(given)
        return [(GetAttrKey(name), getattr(self, name)) for name in present], present

    def unflatten(present, values):
        self = cls(**dict(zip(present, values, strict=True)))
        vars(self)["_present"] = present  # JAX also fills trees with None, and they must keep their structure
        return self

    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
    cls.replace = dataclasses.replace
    return cls


@tree
class Blocks:
    wq: Any = None  # [L, D, N, H]
    wk: Any = None  # [L, D, K, H]
    wv: Any = None  # [L, D, K, H]
    wo: Any = None  # [L, N, H, D]
    w_up: Any = None  # [L, D, F]
    w_down: Any = None  # [L, F, D]
    stream_scale: Any = None  # [L] factor on the residual stream before a layer
    embedding_scale: Any = None  # [L] factor on the token embedding that is added to the stream
    value_table: Any = None  # [E, V, K, H] value embeddings
    value_gate: Any = None  # [E, C, K] gates on the value embeddings


@tree
class Params:
    wte: Any = None  # [V, D] token embedding
    blocks: Any = None  # Blocks stacked over layers, or a tuple of one Blocks per layer
    lm_head: Any = None  # [D, V]
    smear_gate: Any = None  # [C] gate on the previous token's embedding
    smear_scale: Any = None  # [1] factor on that gate
    backout_scale: Any = None  # [1] factor on the middle layer's result, which is subtracted at the end


def uniform(low: float, high: float):
    return lambda key, shape: jax.random.uniform(key, shape, minval=low, maxval=high)


def line(first: float, last: float):
    """Return an initializer of one number per layer, evenly spaced from `first` to `last`."""
    return lambda key, shape: jnp.linspace(first, last, shape[0], dtype=jnp.float32)


@dataclasses.dataclass(frozen=True)
class Weight:
    """How one weight is initialised, sharded, stored and optimized.

    axes: the mesh axis over which each dimension is sharded, or None.
    init: function (key, shape) -> initial values, float32.
    group: the key in the optimizer's table {group: update rule} (train/optimizer.py).
    fan_in, fan_out: numbers of inputs and outputs of one layer's matrix; 0 if the weight is no matrix.
    lookup: whether the matrix is an embedding table, whose rows are looked up instead of multiplied.
    dtype: the dtype in which the weight is stored.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Callable
    group: str
    fan_in: int = 0
    fan_out: int = 0
    lookup: bool = False
    dtype: str = "float32"

    @property
    def spec(self) -> P:
        return P(*self.axes)


def declare(config: ModelConfig) -> Params:
    """Return the declarations of all weights: Params with a `Weight` in place of each array."""
    D, V = config.n_embd, config.padded_vocab
    std, dtype = config.embedding_std, config.table_dtype
    wte = Weight((V, D), ("tensor", "fsdp"), normal(std), "embedding", V, D, lookup=True, dtype=dtype)
    head = normal(config.head_std) if config.head_std else zeros
    smear = backout = {}
    if C := config.smear_channels:
        gate = Weight((C,), (None,), uniform(0.0, 0.02), "mixing", C, 1)
        smear = {"smear_gate": gate, "smear_scale": Weight((1,), (None,), zeros, "mixing")}
    if config.backout:
        backout = {"backout_scale": Weight((1,), (None,), line(0.2, 0.2), "mixing")}
    lm_head = Weight((D, V), ("fsdp", "tensor"), head, "head", D, V)
    return Params(wte=wte, blocks=declare_blocks(config), lm_head=lm_head, **smear, **backout)


def declare_blocks(config: ModelConfig) -> Blocks:
    L, D, N, K, H = config.n_layer, config.n_embd, config.n_head, config.n_kv_head, config.head_dim
    F = 4 * D

    def stack(inputs, outputs, axes, init=None, scale=1.0):
        """Declare matrices [*inputs, *outputs], one per layer. axes: mesh axes of a matrix's dimensions.

        init: initializer; None: the model's default, multiplied by `scale`.
        """
        fan_in, fan_out = math.prod(inputs), math.prod(outputs)
        if config.uniform_init:  # variance 1/D
            bound = scale * math.sqrt(3 / D)
            init = init or uniform(-bound, bound)
        # Variance 1/fan_in, times fan_out/fan_in if a matrix has fewer outputs than inputs.
        init = init or normal(scale * min(1.0, math.sqrt(fan_out / fan_in)) / math.sqrt(fan_in))
        return Weight((L, *inputs, *outputs), (None, *axes), init, "matrix", fan_in, fan_out)

    return Blocks(
        wq=stack([D], [N, H], ("fsdp", "tensor", None)),
        wk=stack([D], [K, H], ("fsdp", "tensor", None)),
        wv=stack([D], [K, H], ("fsdp", "tensor", None)),
        wo=stack([N, H], [D], ("tensor", None, "fsdp"), zeros),
        w_up=stack([D], [F], ("fsdp", "tensor"), scale=config.up_scale),
        w_down=stack([F], [D], ("tensor", "fsdp"), zeros),
        **declare_mixing(config),
    )


def declare_mixing(config: ModelConfig) -> dict[str, Weight]:
    """Declare the layers' optional weights: scales of residual stream and embedding, value embeddings, gates.

    Return {field of Blocks: Weight} for those that the model has.
    """
    L, D, K, H, V = config.n_layer, config.n_embd, config.n_kv_head, config.head_dim, config.padded_vocab
    found = {}
    if config.layer_scales:
        found["stream_scale"] = Weight((L,), (None,), line(1.15, 1.05), "stream_scale")
        found["embedding_scale"] = Weight((L,), (None,), line(0.20, 0.05), "embedding_scale")
    if C := config.value_gate_channels:
        E, bound = (L + 1) // 2, math.sqrt(3 / D)
        shape, axes, init = (E, V, K, H), (None, None, "tensor", "fsdp"), uniform(-bound, bound)
        found["value_table"] = Weight(shape, axes, init, "value_table", V, K * H, True, config.table_dtype)
        found["value_gate"] = Weight((E, C, K), (None, None, None), uniform(0.0, 0.02), "matrix", C, K)
    return found


def has_values(layer: int, num_layers: int) -> bool:
    """Return whether a layer has a value embedding, in a model that has value embeddings.

    The last layer has one, and so does every second layer before it.
    """
    return layer % 2 == (num_layers - 1) % 2


def specs(config: ModelConfig) -> Params:
    """Return a Params with the PartitionSpec of every weight, over the mesh axes data, fsdp and tensor."""
    return jax.tree.map(lambda w: w.spec, declare(config))


def shapes(config: ModelConfig) -> Params:
    """Return a Params with the ShapeDtypeStruct of every weight."""
    return jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), declare(config))


def named(config: ModelConfig) -> dict[str, Weight]:
    """Return the declarations of all weights by name, for example "wte" and "blocks.wq"."""
    leaves = jax.tree_util.tree_leaves_with_path(declare(config))
    return {name_of(path): weight for path, weight in leaves}


def name_of(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def init(key: jax.Array, config: ModelConfig) -> Params:
    """Initialise all weights. Their values do not depend on the mesh."""

    def fresh(path, weight):
        own_key = jax.random.fold_in(key, zlib.crc32(name_of(path).encode()))
        return weight.init(own_key, weight.shape).astype(weight.dtype)

    return jax.tree_util.tree_map_with_path(fresh, declare(config))


def layer_of(blocks: Blocks, layer: int, with_values: bool) -> Blocks:
    """Slice one layer from stacked Blocks. with_values: include the layer's value embedding and gate."""
    tables = ("value_table", "value_gate")
    stacks = {field.name: getattr(blocks, field.name) for field in dataclasses.fields(blocks)}
    one = {name: a[layer] for name, a in stacks.items() if a is not None and name not in tables}
    if with_values:
        one |= {name: getattr(blocks, name)[layer // 2] for name in tables}
    return Blocks(**one)


def layers_of(blocks: Blocks | tuple[Blocks, ...], dtype) -> tuple[Blocks, ...]:
    """Return each layer's weights, cast to `dtype` except for scalars.

    blocks: the weights stacked over layers, or one Blocks per layer.
    """
    if isinstance(blocks, Blocks):
        count, any_values = blocks.wq.shape[0], blocks.value_table is not None
        blocks = tuple(layer_of(blocks, i, any_values and has_values(i, count)) for i in range(count))
    return jax.tree.map(lambda a: a.astype(dtype) if a.ndim else a, blocks)
