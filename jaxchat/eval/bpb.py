"""Measure a model's loss on validation batches, as a sum over all targets or in bits per byte of text."""

import math
from functools import partial

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxchat.checkpoint import Found
from jaxchat.config import Model, UserError
from jaxchat.data.encode import text_reader
from jaxchat.data.pipelines import packed_validation
from jaxchat.data.sources import ParquetText
from jaxchat.sharding import ROWS, data_shards, place_same
from jaxchat.train.loss import loss_sums


@partial(jax.jit, static_argnames="model")
def _sums(params, batch, model: Model):
    rows = NamedSharding(model.mesh, P(ROWS))
    batch = {name: jax.lax.with_sharding_constraint(array, rows) for name, array in batch.items()}
    return loss_sums(params, batch, model.config, model.compute)


def total_loss(params, batches: list[dict], model: Model) -> tuple[float, float]:
    """Return (Σ weight·loss, Σ weight) over all targets of the batches, with losses in nats."""
    sums = []
    for batch in batches:
        placed = {f"{name}_BT": place_same(array, model.mesh) for name, array in batch.items()}
        sums.append(_sums(params, placed, model))
    nll, weight = np.array(jax.device_get(sums), np.float64).sum(axis=0)
    return float(nll), float(weight)


def bits_per_byte(params, batches: list[dict], token_bytes, model: Model) -> float:
    """Return the loss in bits per byte of text, over all supervised tokens that are not special tokens.

    token_bytes: number of bytes of each token id; 0 for special tokens.
    """
    sized = [b | {"weights": b["weights"] * (token_bytes[b["targets"]] > 0)} for b in batches]
    num_bytes = sum(float((b["weights"] * token_bytes[b["targets"]]).sum(dtype=np.float64)) for b in sized)
    if not num_bytes:
        raise UserError("bits per byte can't be measured: all documents are empty; check the validation data")
    nll, _ = total_loss(params, sized, model)
    return nll / (math.log(2) * num_bytes)


def measure_text(
    found: Found, params, texts: dict[str, ParquetText], rows: int, max_tokens: int, model: Model
):
    """Print the bits per byte of each split in `texts`; return them as {"train_bpb": …, "val_bpb": …}.

    texts: {split: text}. rows: rows per batch on each data shard. max_tokens: maximum per split.
    """
    values = {}
    rows *= data_shards(model.mesh)
    size = {"rows": rows, "time": found.config.sequence_len, "max_tokens": max_tokens}
    batches = {  # made for all splits first, since one may hold no text
        split: packed_validation(text_reader(text, found.tokenizer), range(len(text)), **size)
        for split, text in texts.items()
    }
    for split, of_split in batches.items():
        value = bits_per_byte(params, of_split, found.tokenizer.token_bytes, model)
        values[f"{split}_bpb"] = value
        print(f"{split}_bpb {value:.4f}", flush=True)
    return values


def trained_on(found: Found, validation: ParquetText) -> str:
    """Return a warning if the checkpoint was trained on a shard of `validation`; otherwise ""."""
    shards = sorted((found.meta.get("data") or {}).items())[:-1]  # the last one was its validation shard
    trained = {fingerprint for _, fingerprint in shards}
    for name, fingerprint in validation.fingerprint.items():
        if fingerprint in trained:
            return (
                f"{name}, now the last shard, is one that {found.folder.name} was trained on, so val_bpb "
                "measures training text; put back the shard that came after it"
            )
    return ""
