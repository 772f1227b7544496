"""The one loss: weighted sums of next-token losses, without ever holding a batch's logits."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxchat.config import Compute, ModelConfig
from jaxchat.model.gpt import SOFTCAP, features, softcap
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
        nll = weighted_nll(x_BTD, params.lm_head, batch["targets_BT"], batch["weights_BT"], t, compute.mesh)
    return nll, jnp.sum(batch["weights_BT"])


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def weighted_nll(x_BTD, lm_head_DV, targets_BT, weights_BT, t: int, mesh: Mesh | None = None):
    """Σ weight·nll of the tokens that follow features x_BTD; logits exist for t positions of every row at a time.

    The positions are cut into chunks along T, so rows stay on their devices. Where gradients are wanted, a chunk's are
    computed at once, from the very logits of its loss: nothing is computed twice, and the backward pass only scales.
    On a mesh each device computes its rows' logits for its share of the vocabulary. Only sums over the vocabulary
    cross the tensor axis, and the head's gradient crosses the others once, after the last chunk.
    """
    return _on_mesh(_nll, P(), x_BTD, lm_head_DV, targets_BT, weights_BT, t, mesh)


def _on_mesh(function, out_specs, x_BTD, lm_head_DV, targets_BT, weights_BT, t, mesh):
    head_DV = lm_head_DV.astype(x_BTD.dtype)
    if mesh is None or mesh.size == 1:
        return function(x_BTD, head_DV, targets_BT, weights_BT, t, False)
    local = partial(function, t=t, sharded=True)
    in_specs = (P(ROWS), P(None, "tensor"), P(ROWS), P(ROWS))
    mapped = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return mapped(x_BTD, head_DV, targets_BT, weights_BT)


def _nll(x_BTD, head_DV, targets_BT, weights_BT, t: int, sharded: bool):
    def add_chunk(nll, chunk):
        x_BtD, targets_Bt, weights_Bt = chunk
        return nll + jnp.sum(weights_Bt * chunk_nll(x_BtD, head_DV, targets_Bt, sharded)[-1]), None

    nll = lax.scan(add_chunk, jnp.zeros(()), chunks(t, x_BTD, targets_BT, weights_BT))[0]
    return lax.psum(nll, ROWS) if sharded else nll


def chunk_nll(x_BtD, head_DV, targets_Bt, sharded: bool):
    """(what the head gives u_BtV in x's dtype, Σ exp(logit)_Bt, targets' ids in V, nll_Bt): logits are within ±15, so
    exp needs no maximum taken off. sharded: V is this device's share of the vocabulary; the sum and the loss are over
    all of it.
    """
    # In bfloat16 u is rounded as all products are: half the bytes of what is written and read most here.
    u_BtV = jnp.einsum("btd,dv->btv", x_BtD, head_DV)
    sum_Bt = jnp.sum(jnp.exp(softcap(u_BtV)), axis=-1)
    if not sharded:
        target_logit_Bt = softcap(jnp.take_along_axis(u_BtV, targets_Bt[..., None], axis=-1)[..., 0])
        return u_BtV, sum_Bt, targets_Bt, jnp.log(sum_Bt) - target_logit_Bt
    size = u_BtV.shape[-1]
    ids_Bt = targets_Bt - lax.axis_index("tensor") * size
    near_Bt = jnp.clip(ids_Bt, 0, size - 1)
    logit_Bt = softcap(jnp.take_along_axis(u_BtV, near_Bt[..., None], axis=-1)[..., 0])
    sum_Bt, logit_Bt = lax.psum((sum_Bt, jnp.where(ids_Bt == near_Bt, logit_Bt, 0.0)), "tensor")
    return u_BtV, sum_Bt, ids_Bt, jnp.log(sum_Bt) - logit_Bt


def nll_and_gradients(x_BTD, lm_head_DV, targets_BT, weights_BT, t: int, mesh: Mesh | None):
    """The value of weighted_nll, and what its backward pass needs: its gradients, for a cotangent of 1."""
    out_specs = (P(), (P(ROWS), P("fsdp", "tensor"), P(ROWS)))
    return _on_mesh(_nll_and_gradients, out_specs, x_BTD, lm_head_DV, targets_BT, weights_BT, t, mesh)


def _nll_and_gradients(x_BTD, head_DV, targets_BT, weights_BT, t: int, sharded: bool):
    dtype = x_BTD.dtype

    def add_chunk(carry, chunk):
        nll, d_head_DV = carry
        x_BtD, targets_Bt, weights_Bt = chunk
        u_BtV, sum_Bt, ids_Bt, nll_Bt = chunk_nll(x_BtD, head_DV, targets_Bt, sharded)
        # Computed again, not kept in float32 since the sum: the barrier hides from XLA that they are the same.
        z_BtV = softcap(lax.optimization_barrier(u_BtV))
        # ∂nll/∂logit = softmax − 1 at the target, and the softcap's slope is 1 − (z/15)².
        is_target_BtV = ids_Bt[..., None] == jnp.arange(z_BtV.shape[-1])[None, None]
        d_BtV = jnp.exp(z_BtV) / sum_Bt[..., None] - is_target_BtV
        d_BtV = d_BtV * (1 - (z_BtV / SOFTCAP) ** 2) * weights_Bt[..., None]
        d_BtV = d_BtV.astype(dtype)
        d_x_BtD = jnp.einsum("btv,dv->btd", d_BtV, head_DV)
        d_head_DV += jnp.einsum("btd,btv->dv", x_BtD, d_BtV, preferred_element_type=jnp.float32)
        return (nll + jnp.sum(weights_Bt * nll_Bt), d_head_DV), (d_x_BtD, nll_Bt)

    start = (jnp.zeros(()), jnp.zeros(head_DV.shape))
    (nll, d_head_DV), (d_x, nlls) = lax.scan(add_chunk, start, chunks(t, x_BTD, targets_BT, weights_BT))
    d_x_BTD = together(d_x)
    if sharded:
        nll, d_x_BTD = lax.psum(nll, ROWS), lax.psum(d_x_BTD, "tensor")
        d_head_DV = lax.psum(lax.psum_scatter(d_head_DV, "fsdp", scatter_dimension=0, tiled=True), "data")
    return nll, (d_x_BTD, d_head_DV, together(nlls))


def scale_gradients(t: int, mesh: Mesh | None, gradients, cotangent):
    del t, mesh
    d_x_BTD, d_head_DV, nll_BT = gradients
    return (cotangent * d_x_BTD).astype(d_x_BTD.dtype), cotangent * d_head_DV, None, cotangent * nll_BT


weighted_nll.defvjp(nll_and_gradients, scale_gradients)


def chunks(t: int, *arrays):
    """Arrays [B, T, ...] as [T/t, B, t, ...]."""
    return tuple(jnp.moveaxis(a.reshape(a.shape[0], -1, t, *a.shape[2:]), 1, 0) for a in arrays)


def together(a):
    """[T/t, B, t, ...] as [B, T, ...]."""
    return jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1, *a.shape[3:])
