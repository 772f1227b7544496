"""Validation: bits per byte, and the mean loss over supervised tokens."""

import math
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxchat.config import Compute, ModelConfig, UserError
from jaxchat.sharding import ROWS, place_same
from jaxchat.train.loss import loss_sums


@partial(jax.jit, static_argnames=("config", "compute", "mesh"))
def _sums(params, batch, config: ModelConfig, compute: Compute, mesh: Mesh):
    rows = NamedSharding(mesh, P(ROWS))
    batch = {name: jax.lax.with_sharding_constraint(array, rows) for name, array in batch.items()}
    return loss_sums(params, batch, config, compute)


def total_loss(params, batches: list[dict], config: ModelConfig, compute: Compute, mesh: Mesh) -> tuple[float, float]:
    """(Σ weight·nll in nats, Σ weight) over batches {inputs, targets, weights} [B, T], which every process has."""
    sums = []
    for batch in batches:
        placed = {f"{name}_BT": place_same(array, mesh, axis=0) for name, array in batch.items()}
        sums.append(_sums(params, placed, config, compute, mesh))
    nll, weight = np.array(jax.device_get(sums), np.float64).sum(axis=0)
    return float(nll), float(weight)


def bits_per_byte(params, batches: list[dict], token_bytes, config, compute, mesh) -> float:
    """Loss in bits over the bytes of the supervised tokens; specials (0 bytes) count on neither side."""
    sized = [b | {"weights": b["weights"] * (token_bytes[b["targets"]] > 0)} for b in batches]
    num_bytes = sum(float((b["weights"] * token_bytes[b["targets"]]).sum(dtype=np.float64)) for b in sized)
    if not num_bytes:
        raise UserError("bits per byte cannot be measured: all documents are empty; check the validation data")
    nll, _ = total_loss(params, sized, config, compute, mesh)
    return nll / (math.log(2) * num_bytes)
