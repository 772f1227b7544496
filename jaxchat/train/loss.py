"""The one loss: weighted sums of next-token losses, without ever holding a batch's logits."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxchat.config import Compute, ModelConfig
from jaxchat.model.gpt import SOFTCAP, features, logits, softcap
from jaxchat.model.params import Params
from jaxchat.sharding import ROWS, data_shards


def chunk_length(batch: int, time: int, compute: Compute) -> int:
    """The longest divisor of `time` for which a device's logits stay within compute.loss_chunk_tokens (or 1)."""
    rows = max(1, batch // data_shards(compute.mesh))
    return max(n for n in range(1, time + 1) if time % n == 0 and (n == 1 or n * rows <= compute.loss_chunk_tokens))


def loss_sums(params: Params, batch: dict, config: ModelConfig, compute: Compute):
    """(Σ weight·nll in nats, Σ weight), float32, over a batch {inputs_BT, targets_BT, weights_BT[, segments_BT]}."""
    x_BTD = features(params, batch["inputs_BT"], config, compute, segments_BT=batch.get("segments_BT"))
    t = chunk_length(*batch["inputs_BT"].shape, compute)
    with jax.named_scope("loss"):
        targets_BT, weights_BT = batch["targets_BT"], batch["weights_BT"]
        nll = weighted_nll(x_BTD, params.lm_head, targets_BT, weights_BT, t, compute.mesh, compute.kernels)
    return nll, jnp.sum(batch["weights_BT"])


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def weighted_nll(x_BTD, lm_head_DV, targets_BT, weights_BT, t: int, mesh: Mesh | None = None, by_kernel: bool = False):
    """Σ weight·nll of the tokens that follow features x_BTD; logits exist for t positions of every row at a time.

    The positions are cut into chunks along T, so rows stay on their devices. Where gradients are wanted, a chunk's are
    computed at once, from the very logits of its loss: nothing is computed twice, and the backward pass only scales.
    On a mesh each device computes its rows' logits for its share of the vocabulary. Only sums over the vocabulary
    cross the tensor axis, and the head's gradient crosses the others once, after the last chunk. by_kernel: the
    softmax by model/kernels.py, for GPUs, where gradients are wanted.
    """
    return _on_mesh(_nll, P(), x_BTD, lm_head_DV, targets_BT, weights_BT, t, mesh, by_kernel)


def _on_mesh(function, out_specs, x_BTD, lm_head_DV, targets_BT, weights_BT, t, mesh, by_kernel):
    head_DV = lm_head_DV.astype(x_BTD.dtype)
    if mesh is None or (mesh.size == 1 and not by_kernel):
        return function(x_BTD, head_DV, targets_BT, weights_BT, t, False, by_kernel)
    local = partial(function, t=t, sharded=mesh.size > 1, by_kernel=by_kernel)
    in_specs = (P(ROWS), P(None, "tensor"), P(ROWS), P(ROWS))
    mapped = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return mapped(x_BTD, head_DV, targets_BT, weights_BT)


def _nll(x_BTD, head_DV, targets_BT, weights_BT, t: int, sharded: bool, by_kernel: bool):
    del by_kernel  # it would write what only gradients need

    def add_chunk(nll, chunk):
        x_BtD, targets_Bt, weights_Bt = chunk
        return nll + jnp.sum(weights_Bt * chunk_nll(x_BtD, head_DV, targets_Bt, sharded)[-1]), None

    nll = lax.scan(add_chunk, jnp.zeros(()), chunks(t, x_BTD, targets_BT, weights_BT))[0]
    return lax.psum(nll, ROWS) if sharded else nll


def chunk_nll(x_BtD, head_DV, targets_Bt, sharded: bool):
    """(logits z_BtV float32, targets' ids in V, nll_Bt): logits are within ±15, so exp needs no maximum taken off.

    sharded: V is this device's share of the vocabulary, where ids can lie beyond it; the loss is over all of it.
    """
    z_BtV = logits(head_DV, x_BtD)
    ids_Bt = own_ids(targets_Bt, z_BtV.shape[-1], sharded)
    sum_Bt, target_Bt = jnp.sum(jnp.exp(z_BtV), axis=-1), logit_of(z_BtV, ids_Bt, sharded)
    if sharded:
        sum_Bt, target_Bt = lax.psum((sum_Bt, target_Bt), "tensor")
    return z_BtV, ids_Bt, jnp.log(sum_Bt) - target_Bt


def own_ids(targets_Bt, size: int, sharded: bool):
    """The targets counted from the first of this device's `size` words."""
    return targets_Bt - lax.axis_index("tensor") * size if sharded else targets_Bt


def logit_of(z_BtV, ids_Bt, sharded: bool):
    """Those of the ids. Of one that isn't here 0, where other devices have it; NaN, where none has."""
    if not sharded:
        return jnp.take_along_axis(z_BtV, ids_Bt[..., None], axis=-1)[..., 0]
    near_Bt = jnp.clip(ids_Bt, 0, z_BtV.shape[-1] - 1)
    return jnp.where(ids_Bt == near_Bt, jnp.take_along_axis(z_BtV, near_Bt[..., None], axis=-1)[..., 0], 0.0)


def slope(z):
    """The softcap's, where it gives z."""
    return 1 - (z / SOFTCAP) ** 2


def nll_and_gradients(x_BTD, lm_head_DV, targets_BT, weights_BT, t: int, mesh: Mesh | None, by_kernel: bool):
    """The value of weighted_nll, and what its backward pass needs: its gradients, for a cotangent of 1."""
    out_specs = (P(), (P(ROWS), P("fsdp", "tensor"), P(ROWS)))
    return _on_mesh(_nll_and_gradients, out_specs, x_BTD, lm_head_DV, targets_BT, weights_BT, t, mesh, by_kernel)


def _nll_and_gradients(x_BTD, head_DV, targets_BT, weights_BT, t: int, sharded: bool, by_kernel: bool):
    dtype = x_BTD.dtype

    def add_chunk(carry, chunk):
        nll, d_head_DV = carry
        x_BtD, targets_Bt, weights_Bt = chunk
        # In bfloat16 what the head gives is rounded, as any product is, and then read as logits: half the bytes of what
        # is written and read most.
        u_BtV = jnp.einsum("btd,dv->btv", x_BtD, head_DV)
        size = u_BtV.shape[-1]
        ids_Bt = own_ids(targets_Bt, size, sharded)
        target_Bt = softcap(logit_of(u_BtV, ids_Bt, sharded))
        if by_kernel:
            from jaxchat.model import kernels

            d_MV, sum_M = kernels.softcap_exp(u_BtV.reshape(-1, size), SOFTCAP)
            d_BtV, sum_Bt = d_MV.reshape(u_BtV.shape), sum_M.reshape(ids_Bt.shape)
        else:
            z_BtV = softcap(u_BtV)
            exp_BtV = jnp.exp(z_BtV)
            d_BtV, sum_Bt = (exp_BtV * slope(z_BtV)).astype(dtype), jnp.sum(exp_BtV, axis=-1)
        if sharded:
            sum_Bt, target_Bt = lax.psum((sum_Bt, target_Bt), "tensor")
        # ∂nll/∂u = (exp(z)/sum − 1 at the target)·slope. Here it is sum/weight times that until after the products:
        # so it needs no sum, and one pass over the logits does.
        d_target_Bt = ((jnp.exp(target_Bt) - sum_Bt) * slope(target_Bt)).astype(dtype)
        if by_kernel:
            b, i = jnp.ogrid[: ids_Bt.shape[0], : ids_Bt.shape[1]]
            place_Bt = jnp.where(ids_Bt >= 0, ids_Bt, size)  # what is not in V is dropped
            d_BtV = d_BtV.at[b, i, place_Bt].set(d_target_Bt, mode="drop", unique_indices=True)
        else:  # XLA makes it part of the pass that writes d_BtV
            is_target_BtV = ids_Bt[..., None] == jnp.arange(size)[None, None]
            d_BtV = jnp.where(is_target_BtV, d_target_Bt[..., None], d_BtV)
        nll_Bt = jnp.log(sum_Bt) - target_Bt
        scale_Bt1 = (weights_Bt / sum_Bt)[..., None]
        d_x_BtD = scale_Bt1 * jnp.einsum("btv,dv->btd", d_BtV, head_DV, preferred_element_type=jnp.float32)
        scaled_x_BtD = (scale_Bt1 * x_BtD).astype(dtype)
        d_head_DV += jnp.einsum("btd,btv->dv", scaled_x_BtD, d_BtV, preferred_element_type=jnp.float32)
        return (nll + jnp.sum(weights_Bt * nll_Bt), d_head_DV), (d_x_BtD.astype(dtype), nll_Bt)

    start = (jnp.zeros(()), jnp.zeros(head_DV.shape))
    (nll, d_head_DV), (d_x, nlls) = lax.scan(add_chunk, start, chunks(t, x_BTD, targets_BT, weights_BT))
    d_x_BTD = together(d_x)
    if sharded:
        nll, d_x_BTD = lax.psum(nll, ROWS), lax.psum(d_x_BTD, "tensor")
        d_head_DV = lax.psum(lax.psum_scatter(d_head_DV, "fsdp", scatter_dimension=0, tiled=True), "data")
    return nll, (d_x_BTD, d_head_DV, together(nlls))


def scale_gradients(t: int, mesh: Mesh | None, by_kernel: bool, gradients, cotangent):
    del t, mesh, by_kernel
    d_x_BTD, d_head_DV, nll_BT = gradients
    return (cotangent * d_x_BTD).astype(d_x_BTD.dtype), cotangent * d_head_DV, None, cotangent * nll_BT


weighted_nll.defvjp(nll_and_gradients, scale_gradients)


def chunks(t: int, *arrays):
    """Arrays [B, T, ...] as [T/t, B, t, ...]."""
    return tuple(jnp.moveaxis(a.reshape(a.shape[0], -1, t, *a.shape[2:]), 1, 0) for a in arrays)


def together(a):
    """[T/t, B, t, ...] as [B, T, ...]."""
    return jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1, *a.shape[3:])
