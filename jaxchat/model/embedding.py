"""Look up tokens in embedding tables, on one device or on a mesh over which the tables are sharded."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxchat.config import Compute
from jaxchat.sharding import per_device, row_axes


def embed(wte_VD, tokens_BT, compute: Compute):
    """Return the tokens' embeddings x_BTD in compute.dtype. The table may be sharded over the mesh."""
    if compute.mesh is None or compute.mesh.size == 1:
        return look_up(wte_VD, tokens_BT, compute.dtype)
    return embed_sharded(wte_VD, tokens_BT, jnp.dtype(compute.dtype), compute.mesh)


def look_up(table, tokens_BT, dtype):
    """Look up tokens in a table [V, …] that is not sharded. Return [B, T, …] in `dtype`."""
    if table.dtype == jnp.float32:
        return table[tokens_BT].astype(dtype)
    return look_up_narrow(table, tokens_BT, jnp.dtype(dtype))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def look_up_narrow(table, tokens_BT, dtype):
    return table[tokens_BT].astype(dtype)


def look_up_backward(dtype, saved, d_rows):
    table, tokens_BT = saved
    return sum_rows(len(table), tokens_BT, d_rows).astype(table.dtype), None


look_up_narrow.defvjp(
    lambda table, tokens_BT, dtype: (look_up_narrow(table, tokens_BT, dtype), (table, tokens_BT)),
    look_up_backward,
)


def sum_rows(count: int, ids_BT, d_rows):
    """Sum the gradients d_rows of tokens with the same id. Return float32 [count, …], indexed by id."""
    return jnp.zeros((count, *d_rows.shape[2:])).at[ids_BT].add(d_rows.astype(jnp.float32))


def local_features(a, size: int):
    """Return the `size` features (last axis) of `a` that belong to this device on the mesh axis fsdp."""
    return lax.dynamic_slice_in_dim(a, lax.axis_index("fsdp") * size, size, axis=a.ndim - 1)


def embed_values(table_VKH, tokens_BT, compute: Compute):
    """Return the tokens' value embeddings v_BTKH in compute.dtype. The table may be sharded over the mesh."""
    if compute.mesh is None or compute.mesh.size == 1:
        return look_up(table_VKH, tokens_BT, compute.dtype)
    return embed_columns(table_VKH, tokens_BT, jnp.dtype(compute.dtype), compute.mesh)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def embed_columns(table_VKH, tokens_BT, dtype, mesh: Mesh):
    """Look up tokens in a table with heads sharded over `tensor` and features over `fsdp`. Return v_BTKH.

    Each device looks up, in its own shard, the tokens of all devices along `fsdp`. The table is not gathered.
    """
    axes = row_axes(mesh, tokens_BT.shape[0])

    def local(table_Vkh, tokens_BT):
        if not axes:  # all devices have all tokens
            return lax.all_gather(table_Vkh[tokens_BT].astype(dtype), "fsdp", axis=3, tiled=True)
        everyones_BT = lax.all_gather(tokens_BT, "fsdp", axis=0, tiled=True)
        return lax.all_to_all(table_Vkh[everyones_BT].astype(dtype), "fsdp", 0, 3, tiled=True)

    specs = (P(None, "tensor", "fsdp"), P(axes))
    return per_device(local, mesh, specs, P(axes, None, "tensor"))(table_VKH, tokens_BT)


def embed_columns_backward(dtype, mesh: Mesh, saved, d_BTKH):
    table_VKH, tokens_BT = saved
    axes = row_axes(mesh, tokens_BT.shape[0])

    def local(table_Vkh, tokens_BT, d_BTkH):
        size, dtype = len(table_Vkh), table_Vkh.dtype
        if not axes:  # all devices have all rows, so each already has the sum
            return sum_rows(size, tokens_BT, local_features(d_BTkH, table_Vkh.shape[2])).astype(dtype)
        everyones_BT = lax.all_gather(tokens_BT, "fsdp", axis=0, tiled=True)
        d_BTkh = lax.all_to_all(d_BTkH, "fsdp", 3, 0, tiled=True)
        return lax.psum(sum_rows(size, everyones_BT, d_BTkh), "data").astype(dtype)

    table = P(None, "tensor", "fsdp")
    specs = (table, P(axes), P(axes, None, "tensor"))
    return per_device(local, mesh, specs, table)(table_VKH, tokens_BT, d_BTKH), None


embed_columns.defvjp(
    lambda table, tokens_BT, *options: (embed_columns(table, tokens_BT, *options), (table, tokens_BT)),
    embed_columns_backward,
)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def embed_sharded(wte_VD, tokens_BT, dtype, mesh: Mesh):
    """Look up tokens in a table with the vocabulary sharded over `tensor` and features over `fsdp`.

    Return x_BTD in `dtype`. Each device gathers its part of the vocabulary over `fsdp`, in `dtype`.
    """
    rows = P(row_axes(mesh, tokens_BT.shape[0]))

    def local(wte_Vd, tokens_BT):
        wte_VD = lax.all_gather(wte_Vd.astype(dtype), "fsdp", axis=1, tiled=True)
        ids_BT, here_BT = local_rows(tokens_BT, wte_VD.shape[0])
        return lax.psum(jnp.where(here_BT[..., None], wte_VD[ids_BT], 0), "tensor")

    return per_device(local, mesh, (P("tensor", "fsdp"), rows), rows)(wte_VD, tokens_BT)


def embed_backward(dtype, mesh: Mesh, saved, dx_BTD):
    """Backward pass of embed_sharded: return (gradient of the table, None for the tokens)."""
    wte_VD, tokens_BT = saved
    axes = row_axes(mesh, tokens_BT.shape[0])

    def local(wte_Vd, tokens_BT, dx_BTD):
        ids_BT, here_BT = local_rows(tokens_BT, len(wte_Vd))
        dx_BTD = jnp.where(here_BT[..., None], dx_BTD.astype(jnp.float32), 0)
        d_VD = sum_rows(len(wte_Vd), ids_BT, dx_BTD)
        if not axes:  # all devices have all rows, so each already has the sum
            return local_features(d_VD, wte_Vd.shape[1]).astype(wte_Vd.dtype)
        d_Vd = lax.psum(lax.psum_scatter(d_VD, "fsdp", scatter_dimension=1, tiled=True), "data")
        return d_Vd.astype(wte_Vd.dtype)

    table, rows = P("tensor", "fsdp"), P(axes)
    return per_device(local, mesh, (table, rows, rows), table)(wte_VD, tokens_BT, dx_BTD), None


embed_sharded.defvjp(
    lambda wte_VD, tokens_BT, *options: (embed_sharded(wte_VD, tokens_BT, *options), (wte_VD, tokens_BT)),
    embed_backward,
)


def local_rows(tokens_BT, size: int):
    """Return (each token's index in this device's shard, whether the token is in that shard), both [B, T].

    size: number of embeddings in a shard. The index of a token in another shard is clipped to a valid one.
    """
    ids_BT = tokens_BT - lax.axis_index("tensor") * size
    near_BT = jnp.clip(ids_BT, 0, size - 1)
    return near_BT, ids_BT == near_BT
