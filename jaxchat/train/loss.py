"""The one loss: weighted sums of next-token losses, without ever holding a batch's logits."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxchat.config import Compute, ModelConfig
from jaxchat.model.gpt import features, logits
from jaxchat.model.params import Params


def chunk_length(batch: int, time: int, compute: Compute) -> int:
    """The longest divisor of `time` for which a device's logits stay within compute.loss_chunk_tokens (or 1)."""
    rows = max(1, batch // compute.data_shards)
    return max(n for n in range(1, time + 1) if time % n == 0 and (n == 1 or n * rows <= compute.loss_chunk_tokens))


def loss_sums(params: Params, batch: dict, config: ModelConfig, compute: Compute):
    """(Σ weight·nll in nats, Σ weight), float32, over a batch {inputs_BT, targets_BT, weights_BT}.

    The positions are cut into chunks along T (rows stay on their devices); each chunk's logits [B, t, V] are computed,
    reduced and forgotten, and computed again in the backward pass.
    """
    x_BTD = features(params, batch["inputs_BT"], config, compute)
    B, T, _ = x_BTD.shape
    t = chunk_length(B, T, compute)

    def chunks(a):  # [B, T, ...] -> [T/t, B, t, ...]
        return jnp.moveaxis(a.reshape(B, T // t, t, *a.shape[2:]), 1, 0)

    @jax.checkpoint
    def add_chunk(nll, chunk):
        x_BtD, targets_Bt, weights_Bt = chunk
        z_BtV = logits(params.lm_head, x_BtD)
        target_logit_Bt = jnp.take_along_axis(z_BtV, targets_Bt[..., None], axis=-1)[..., 0]
        return nll + jnp.sum(weights_Bt * (jax.nn.logsumexp(z_BtV, axis=-1) - target_logit_Bt)), None

    with jax.named_scope("loss"):
        nll, _ = lax.scan(
            add_chunk, jnp.zeros(()), (chunks(x_BTD), chunks(batch["targets_BT"]), chunks(batch["weights_BT"]))
        )
    return nll, jnp.sum(batch["weights_BT"])
