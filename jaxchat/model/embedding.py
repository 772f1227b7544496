"""Look tokens up in the embedding table, on one device or on a mesh that the table is spread over."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxchat.config import Compute
from jaxchat.sharding import per_device, row_axes


def embed(wte_VD, tokens_BT, compute: Compute):
    """The tokens' rows of the embedding, in compute.dtype. -> x_BTD."""
    if compute.mesh is None or compute.mesh.size == 1:
        return wte_VD[tokens_BT].astype(compute.dtype)
    return embed_sharded(wte_VD, tokens_BT, jnp.dtype(compute.dtype), compute.mesh)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def embed_sharded(wte_VD, tokens_BT, dtype, mesh: Mesh):
    """Look tokens up on a mesh: each device gathers its share of the vocabulary at full width, in `dtype`."""
    rows = P(row_axes(mesh, tokens_BT.shape[0]))

    def local(wte_Vd, tokens_BT):
        wte_VD = lax.all_gather(wte_Vd.astype(dtype), "fsdp", axis=1, tiled=True)
        ids_BT, here_BT = local_rows(tokens_BT, wte_VD.shape[0])
        return lax.psum(jnp.where(here_BT[..., None], wte_VD[ids_BT], 0), "tensor")

    return per_device(local, mesh, (P("tensor", "fsdp"), rows), rows)(wte_VD, tokens_BT)


def embed_backward(dtype, mesh: Mesh, saved, dx_BTD):
    """The table's gradient, summed in float32 within a device and across devices."""
    wte_VD, tokens_BT = saved
    axes = row_axes(mesh, tokens_BT.shape[0])

    def local(wte_Vd, tokens_BT, dx_BTD):
        size = wte_Vd.shape[0]
        ids_BT, here_BT = local_rows(tokens_BT, size)
        dx_BTD = jnp.where(here_BT[..., None], dx_BTD.astype(jnp.float32), 0)
        d_VD = jnp.zeros((size, dx_BTD.shape[-1])).at[ids_BT].add(dx_BTD)
        if not axes:  # all devices have all rows, so each already has the sum
            return lax.dynamic_slice_in_dim(
                d_VD, lax.axis_index("fsdp") * wte_Vd.shape[1], wte_Vd.shape[1], axis=1
            )
        return lax.psum(lax.psum_scatter(d_VD, "fsdp", scatter_dimension=1, tiled=True), "data")

    table, rows = P("tensor", "fsdp"), P(axes)
    return per_device(local, mesh, (table, rows, rows), table)(wte_VD, tokens_BT, dx_BTD), None


embed_sharded.defvjp(
    lambda wte_VD, tokens_BT, *options: (embed_sharded(wte_VD, tokens_BT, *options), (wte_VD, tokens_BT)),
    embed_backward,
)


def local_rows(tokens_BT, size: int):
    """Return (ids_BT, here_BT): ids within this device's share of the vocabulary, whether they are in it."""
    ids_BT = tokens_BT - lax.axis_index("tensor") * size
    near_BT = jnp.clip(ids_BT, 0, size - 1)
    return near_BT, ids_BT == near_BT
