"""Compute each layer for all micro-batches before the next layer starts (--remat=step).

This gathers weights less often. If each micro-batch passed through all layers in turn, it would gather each
weight twice and sum each gradient over devices. Here a weight is gathered twice per step, its gradient is
summed over devices once, and a device holds the complete weights and gradients of one layer at a time. In
exchange, the inputs of all layers are kept for all rows of the step.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxchat.config import Compute, ModelConfig
from jaxchat.model.embedding import embed_values
from jaxchat.model.matmul import E4M3, quantize, weight_in_fp8
from jaxchat.model.params import Blocks, declare
from jaxchat.sharding import ROWS, per_device


def in_parts(layer, x_BTD, w: Blocks, inputs, config: ModelConfig, compute: Compute):
    """Compute a layer on compute.parts micro-batches, one after another. Return x_BTD of all rows.

    Only the inputs are kept for the backward pass.
    layer: function (x_BTD, w, inputs, config, compute) -> x_BTD, called on equal parts of a device's rows.
    """
    axes = {field.name: getattr(declare(config).blocks, field.name) for field in dataclasses.fields(w)}
    axes = {name: weight.axes[1:] for name, weight in axes.items() if weight is not None}
    one_device = dataclasses.replace(compute, mesh=None, parts=1)
    if w.value_table is not None:
        inputs = inputs.replace(values_BTKH=embed_values(w.value_table, inputs.tokens_BT, compute))
        w = w.replace(value_table=None)
    w = {name: a for name, a in vars(w).items() if name in axes and a is not None}
    tables, by_row = inputs.tables, inputs.replace(tables=None)

    def local(x_BTD, w, by_row, tables):
        w = Blocks(**{name: gathered(a, axes[name], gather_dtype(name, compute)) for name, a in w.items()})

        @partial(jax.checkpoint, prevent_cse=False)
        def one(part):
            x_bTD, by_row = part
            return layer(x_bTD, w, by_row.replace(tables=tables), config, one_device)

        parts = jax.tree.map(lambda a: a.reshape(compute.parts, -1, *a.shape[1:]), (x_BTD, by_row))
        return lax.map(one, parts).reshape(x_BTD.shape)

    specs = {name: P(*axes[name]) for name in w}
    return per_device(local, compute.mesh, (P(ROWS), specs, P(ROWS), P()), P(ROWS))(x_BTD, w, by_row, tables)


def gather_dtype(name: str, compute: Compute):
    """Return the dtype in which the weight `name` is gathered over devices, which is that of its products."""
    return E4M3 if weight_in_fp8(name, compute) else jnp.dtype(compute.dtype)


def gathered(w, axes: tuple, dtype):
    """Gather the shards of a weight over fsdp in `dtype`. Return the weight in its original dtype.

    A weight that is not sharded over fsdp is returned unchanged. axes: the mesh axis of each dimension.
    """
    return gather(w, axes.index("fsdp"), dtype) if "fsdp" in axes else w


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather(w, axis: int, dtype):
    if dtype != E4M3:
        return lax.all_gather(w.astype(dtype), "fsdp", axis=axis, tiled=True).astype(w.dtype)
    # The product quantizes to float8 again without changing a value: it finds this scale or half of it.
    rounded, scale = quantize(w, E4M3, "fsdp")
    return lax.all_gather(rounded, "fsdp", axis=axis, tiled=True).astype(w.dtype) * scale


gather.defvjp(
    lambda w, axis, dtype: (gather(w, axis, dtype), None),
    lambda axis, dtype, _, dw: (lax.psum_scatter(dw, "fsdp", scatter_dimension=axis, tiled=True),),
)
