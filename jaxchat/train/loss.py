"""The training loss, computed in chunks, so that all logits of a batch are never in memory at once."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxchat.config import Compute, ModelConfig
from jaxchat.model.gpt import features, logits, softcap
from jaxchat.model.params import Params
from jaxchat.sharding import ROWS, constrain, data_shards, per_device


@dataclasses.dataclass(frozen=True)
class Chunking:
    """How to compute the loss in chunks, each of `length` positions of every row.

    cap: the model's softcap. It bounds the logits, so the softmax need not subtract their maximum.
    mesh: the mesh over which rows and the vocabulary are sharded. None: one device.
    kernels: whether a GPU kernel (model/kernels.py) computes the softmax when gradients are needed.
    vocab_size: size of the vocabulary if the head has padding columns. None: it has none.
    """

    length: int
    cap: float
    mesh: Mesh | None = None
    kernels: bool = False
    vocab_size: int | None = None

    @classmethod
    def of(cls, batch: int, time: int, config: ModelConfig, compute: Compute):
        vocab_size = None if config.padded_vocab == config.vocab_size else config.vocab_size
        length = chunk_length(batch, time, compute)
        return cls(length, config.softcap, compute.mesh, compute.kernels, vocab_size)

    @property
    def sharded(self) -> bool:
        return self.mesh is not None and self.mesh.size > 1


def chunk_length(batch: int, time: int, compute: Compute) -> int:
    """Return the number of positions per chunk when computing the loss of [batch, time] tokens.

    A chunk has at most compute.loss_chunk_tokens tokens per device. The length divides `time`, unless all
    divisors within this limit are at most half of the limit. Then the last chunk is padded.
    """
    rows = max(1, batch // data_shards(compute.mesh))
    most = min(time, max(1, compute.loss_chunk_tokens // rows))
    divisor = max(n for n in range(1, most + 1) if time % n == 0)
    return divisor if 2 * divisor > most else -(-time // -(-time // most))


def loss_sums(params: Params, batch: dict, config: ModelConfig, compute: Compute):
    """Return (Σ weight·nll, N) of a batch, float32. nll: negative log-likelihood of a target token, in nats.

    batch: {inputs_BT, targets_BT, weights_BT[, counts_BT][, segments_BT]}. Weights may be negative.
    N is the divisor of the mean loss: Σ counts, or Σ weights if the batch has no counts.
    """
    x_BTD = features(params, batch["inputs_BT"], config, compute, batch.get("segments_BT"))
    chunking = Chunking.of(*batch["inputs_BT"].shape, config, compute)
    with jax.named_scope("loss"):
        nll = weighted_nll(x_BTD, params.lm_head, batch["targets_BT"], batch["weights_BT"], chunking)
    return nll, jnp.sum(batch.get("counts_BT", batch["weights_BT"]))


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def weighted_nll(x_BTD, lm_head_DV, targets_BT, weights_BT, chunking: Chunking):
    """Return Σ weight·nll, where nll is a target token's loss, given the features x_BTD and the output head.

    The sum is computed in chunks along T. If gradients are needed, they are computed in the same pass, from
    logits rounded to the features' dtype. Otherwise the logits are float32.
    """
    return _on_mesh(_nll, P(), chunking, x_BTD, lm_head_DV, targets_BT, weights_BT)


def _on_mesh(function, out_specs, chunking: Chunking, x_BTD, lm_head_DV, targets_BT, weights_BT):
    """Call `function` on each device with that device's rows and vocabulary shard of the head."""
    in_specs = (P(ROWS), P(None, "tensor"), P(ROWS), P(ROWS))
    local = partial(function, chunking=chunking)
    mapped = per_device(local, chunking.mesh, in_specs, out_specs, always=chunking.kernels)
    # Cast the head's shards: otherwise XLA would gather the head in float32 before casting it.
    head_DV = constrain(lm_head_DV.astype(x_BTD.dtype), P("fsdp", "tensor"), chunking.mesh)
    return mapped(x_BTD, head_DV, targets_BT, weights_BT)


def _nll(x_BTD, head_DV, targets_BT, weights_BT, chunking: Chunking):
    def add_chunk(nll, chunk):
        x_BtD, targets_Bt, weights_Bt = chunk
        nll_Bt = chunk_nll(x_BtD, head_DV, targets_Bt, chunking)[-1]
        return nll + jnp.sum(weights_Bt * nll_Bt), None

    chunks = split_time(chunking.length, x_BTD, targets_BT, weights_BT)
    nll, _ = lax.scan(add_chunk, jnp.zeros(()), chunks)
    return lax.psum(nll, ROWS) if chunking.sharded else nll


def chunk_nll(x_BtD, head_DV, targets_Bt, chunking: Chunking):
    """Return (float32 logits z_BtV, target ids_Bt, losses nll_Bt) at the t positions of a chunk.

    On a mesh, V is this device's shard of the vocabulary, and ids_Bt are relative to the shard's first id.
    Ids of other shards are negative or ≥ V. The losses are normalized over the complete vocabulary.
    """
    z_BtV = logits(head_DV, x_BtD, chunking.cap)
    if chunking.vocab_size:
        z_BtV = jnp.where(is_token(z_BtV.shape[-1], chunking), z_BtV, -jnp.inf)
    ids_Bt = local_ids(targets_Bt, z_BtV.shape[-1], chunking.sharded)
    sum_Bt, target_Bt = jnp.sum(jnp.exp(z_BtV), axis=-1), target_logits(z_BtV, ids_Bt, chunking.sharded)
    if chunking.sharded:
        sum_Bt, target_Bt = lax.psum((sum_Bt, target_Bt), "tensor")
    return z_BtV, ids_Bt, jnp.log(sum_Bt) - target_Bt


def local_ids(targets_Bt, size: int, sharded: bool):
    """Return target ids relative to the first id of this device's vocabulary shard of `size` ids."""
    return targets_Bt - lax.axis_index("tensor") * size if sharded else targets_Bt


def is_token(size: int, chunking: Chunking):
    """Return bool [1, 1, size]: which of the `size` head columns on this device are tokens, not padding."""
    first = lax.axis_index("tensor") * size if chunking.sharded else 0
    return (first + jnp.arange(size) < chunking.vocab_size)[None, None]


def target_logits(z_BtV, ids_Bt, sharded: bool):
    """Return the logits [B, t] of the target ids. If `sharded`, ids of other shards have the logit 0."""
    if not sharded:
        return jnp.take_along_axis(z_BtV, ids_Bt[..., None], axis=-1)[..., 0]
    near_Bt = jnp.clip(ids_Bt, 0, z_BtV.shape[-1] - 1)
    return jnp.where(ids_Bt == near_Bt, jnp.take_along_axis(z_BtV, near_Bt[..., None], axis=-1)[..., 0], 0.0)


def softcap_slope(z, cap: float):
    """Return the derivative dz/du of z = softcap(u), computed from z."""
    return 1 - (z / cap) ** 2


def nll_and_gradients(x_BTD, lm_head_DV, targets_BT, weights_BT, chunking: Chunking):
    """Return (Σ weight·nll, gradients), as the forward pass of weighted_nll.

    The gradients are (d_x_BTD, d_lm_head_DV, nll_BT). The last, the loss of every token, is the gradient with
    respect to weights_BT. The backward pass, scale_gradients, multiplies all three by the cotangent.
    """
    out_specs = (P(), (P(ROWS), P("fsdp", "tensor"), P(ROWS)))
    return _on_mesh(_nll_and_gradients, out_specs, chunking, x_BTD, lm_head_DV, targets_BT, weights_BT)


def _nll_and_gradients(x_BTD, head_DV, targets_BT, weights_BT, chunking: Chunking):
    dtype, time = x_BTD.dtype, targets_BT.shape[1]

    def add_chunk(carry, chunk):
        nll, d_head_DV = carry
        x_BtD, targets_Bt, weights_Bt = chunk
        # The logits are rounded to the features' dtype: bfloat16 halves the bytes of the array that is
        # written and read most.
        u_BtV = jnp.einsum("btd,dv->btv", x_BtD, head_DV)
        d_BtV, sum_Bt, nll_Bt = logits_gradient(u_BtV, targets_Bt, chunking)
        scale_Bt1 = (weights_Bt / sum_Bt)[..., None]
        d_x_BtD = scale_Bt1 * jnp.einsum("btv,dv->btd", d_BtV, head_DV, preferred_element_type=jnp.float32)
        scaled_x_BtD = (scale_Bt1 * x_BtD).astype(dtype)
        d_head_DV += jnp.einsum("btd,btv->dv", scaled_x_BtD, d_BtV, preferred_element_type=jnp.float32)
        return (nll + jnp.sum(weights_Bt * nll_Bt), d_head_DV), (d_x_BtD.astype(dtype), nll_Bt)

    start = (jnp.zeros(()), jnp.zeros(head_DV.shape))
    chunks = split_time(chunking.length, x_BTD, targets_BT, weights_BT)
    (nll, d_head_DV), (d_x, nlls) = lax.scan(add_chunk, start, chunks)
    d_x_BTD = join_time(d_x, time)
    if chunking.sharded:
        nll, d_x_BTD = lax.psum(nll, ROWS), lax.psum(d_x_BTD, "tensor")
        d_head_DV = lax.psum(lax.psum_scatter(d_head_DV, "fsdp", scatter_dimension=0, tiled=True), "data")
    return nll, (d_x_BTD, d_head_DV, join_time(nlls, time))


def logits_gradient(u_BtV, targets_Bt, chunking: Chunking):
    """Return (d_BtV, sum_Bt, nll_Bt) from the head's outputs u_BtV. The gradient ∂nll/∂u is d/sum.

    With z = softcap(u) and sum = Σ exp(z), ∂nll/∂u = (exp(z)/sum − δ)·dz/du, where δ is 1 at the target and 0
    elsewhere. Except at the target, d does not depend on sum, so one pass over the logits is enough.
    """
    dtype, size, sharded, cap = u_BtV.dtype, u_BtV.shape[-1], chunking.sharded, chunking.cap
    ids_Bt = local_ids(targets_Bt, size, sharded)
    target_Bt = softcap(target_logits(u_BtV, ids_Bt, sharded), cap)
    if chunking.kernels and not chunking.vocab_size:
        from jaxchat.model import kernels  # here, so that other devices don't import Pallas

        d_MV, sum_M = kernels.softcap_exp(u_BtV.reshape(-1, size), cap)
        d_BtV, sum_Bt = d_MV.reshape(u_BtV.shape), sum_M.reshape(ids_Bt.shape)
    else:
        z_BtV = softcap(u_BtV, cap)
        exp_BtV = jnp.exp(z_BtV)
        if chunking.vocab_size:
            exp_BtV = jnp.where(is_token(size, chunking), exp_BtV, 0.0)
        d_BtV, sum_Bt = (exp_BtV * softcap_slope(z_BtV, cap)).astype(dtype), jnp.sum(exp_BtV, axis=-1)
    if sharded:
        sum_Bt, target_Bt = lax.psum((sum_Bt, target_Bt), "tensor")
    d_target_Bt = ((jnp.exp(target_Bt) - sum_Bt) * softcap_slope(target_Bt, cap)).astype(dtype)
    if chunking.kernels:
        b, i = jnp.ogrid[: ids_Bt.shape[0], : ids_Bt.shape[1]]
        place_Bt = jnp.where(ids_Bt >= 0, ids_Bt, size)  # ids outside V are dropped
        d_BtV = d_BtV.at[b, i, place_Bt].set(d_target_Bt, mode="drop", unique_indices=True)
    else:  # XLA fuses this into the pass that writes d_BtV
        is_target_BtV = ids_Bt[..., None] == jnp.arange(size)[None, None]
        d_BtV = jnp.where(is_target_BtV, d_target_Bt[..., None], d_BtV)
    return d_BtV, sum_Bt, jnp.log(sum_Bt) - target_Bt


def scale_gradients(chunking: Chunking, gradients, cotangent):
    del chunking
    d_x_BTD, d_head_DV, nll_BT = gradients
    return (cotangent * d_x_BTD).astype(d_x_BTD.dtype), cotangent * d_head_DV, None, cotangent * nll_BT


weighted_nll.defvjp(nll_and_gradients, scale_gradients)


def pad_time(length: int, a):
    """Append zeros along T to an array [B, T, ...] until T is a multiple of `length`."""
    return jnp.pad(a, ((0, 0), (0, -a.shape[1] % length), *[(0, 0)] * (a.ndim - 2)))


def split_time(length: int, *arrays):
    """Cut each array [B, T, ...] into chunks [n, B, length, ...]. Zeros pad the last chunk."""
    padded = (pad_time(length, a) for a in arrays)
    return tuple(jnp.moveaxis(a.reshape(a.shape[0], -1, length, *a.shape[2:]), 1, 0) for a in padded)


def join_time(a, time: int):
    """Join chunks [n, B, length, ...] into one array [B, time, ...], dropping the padding."""
    return jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1, *a.shape[3:])[:, :time]
