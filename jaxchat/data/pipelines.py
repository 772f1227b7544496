"""The three pipelines that training reads, and the fixed batches that validation reads."""

from collections.abc import Iterator, Sequence

import grain
import numpy as np

from jaxchat.config import UserError
from jaxchat.data.packing import PackedRows, PaddedRows, Tokenize, as_batch
from jaxchat.data.sources import ParquetText, Shuffled
from jaxchat.data.tasks import load_mixture
from jaxchat.tokenizer import Tokenizer

PREFETCH = 2  # batches made ahead in a thread, while the device computes


def micro_batches(total: int, per_micro_batch: int, flag: str, unit: str) -> int:
    """total ÷ per_micro_batch, or a UserError that names the nearest total that divides."""
    if total < 1 or total % per_micro_batch:
        nearest = max(1, round(total / per_micro_batch)) * per_micro_batch
        raise UserError(
            f"--{flag}={total} is not a multiple of {per_micro_batch} {unit} "
            f"(device_batch_size × devices); the nearest that is: {nearest}"
        )
    return total // per_micro_batch


def text_tokens(texts: ParquetText, order, tokenizer: Tokenizer) -> Tokenize:
    """Documents as token ids led by bos, everything supervised; an empty text gives no token at all."""

    def tokenize(indices: Sequence[int]):
        encoded = tokenizer.encode_batch([texts[order(i)] for i in indices])
        documents = [np.array([tokenizer.bos, *ids] if ids else [], np.int32) for ids in encoded]
        return [(ids, np.ones(len(ids), np.int32)) for ids in documents]

    return tokenize


def conversation_tokens(tasks, order, tokenizer: Tokenizer) -> Tokenize:
    """Rendered conversations with their masks; a plain document is led by bos and wholly supervised."""

    def one(index: int):
        row = tasks[index]
        if "text" in row:
            ids = [tokenizer.bos, *tokenizer.encode(row["text"])] if row["text"] else []
            return np.array(ids, np.int32), np.ones(len(ids), np.int32)
        try:
            ids, mask = tokenizer.render_conversation(row)
        except UserError as problem:
            raise UserError(f"{tasks.name_of(index)}: {problem}; mend or leave out this row") from problem
        return np.array(ids, np.int32), np.array(mask, np.int32)

    return lambda indices: [one(order(i)) for i in indices]


def prefetched(dataset: grain.IterDataset) -> grain.DatasetIterator:
    return iter(grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=PREFETCH))


def base_batches(texts: ParquetText, tokenizer: Tokenizer, *, rows, micro_batches, time, seed):
    """Packed documents in an endless seeded order, newly shuffled each epoch."""
    order = Shuffled(texts, texts.block_sizes, seed).index
    tokenize = text_tokens(texts, order, tokenizer)
    return prefetched(PackedRows(tokenize, rows=rows, micro_batches=micro_batches, time=time))


def mid_batches(tasks, tokenizer: Tokenizer, *, rows, micro_batches, time, seed, endless: bool):
    """Packed conversations, shuffled over all tasks: one pass, or endless."""
    tokenize = conversation_tokens(tasks, Shuffled(tasks, [len(tasks)], seed).index, tokenizer)
    once = None if endless else len(tasks)
    return prefetched(PackedRows(tokenize, rows=rows, micro_batches=micro_batches, time=time, num_documents=once))


def sft_batches(tasks, tokenizer: Tokenizer, *, examples, micro_batches, time, seed, num_examples: int):
    """One conversation a row, shuffled over all tasks, `num_examples` of them."""
    tokenize = conversation_tokens(tasks, Shuffled(tasks, [len(tasks)], seed).index, tokenizer)
    rows = PaddedRows(tokenize, examples=examples, micro_batches=micro_batches, time=time, num_examples=num_examples)
    return prefetched(rows)


def load_tasks(spec: str, tasks_dir: str, flag: str, *, documents: bool):
    """The mixture of a flag; refused if it is empty, or holds plain documents where a stage has no use for them."""
    tasks = load_mixture(spec, tasks_dir or None)
    if len(tasks) == 0:
        raise UserError(f"--{flag}={spec} has no rows; name at least one task that has some")
    if not documents and any(task.has_documents for task in tasks.tasks):
        raise UserError(f"--{flag}={spec} holds plain documents; this stage takes conversations only")
    return tasks


def packed_validation(tokenize: Tokenize, num_documents: int, *, rows: int, time: int, max_tokens: int) -> list[dict]:
    """One stream of documents in their own order, cut into windows, `rows` of them a batch, to max_tokens targets.

    What is supervised does not depend on `rows`: the last batch is filled with weight 0. Each batch is {inputs,
    targets, weights} [rows, time].
    """

    def stream() -> Iterator[np.ndarray]:
        for first in range(0, num_documents, 64):
            yield from (ids for ids, _ in tokenize(range(first, min(first + 64, num_documents))))

    wanted, parts, have = max_tokens + 1, [], 0
    for ids in stream():
        parts.append(ids)
        have += len(ids)
        if have >= wanted:
            break
    tokens = np.concatenate(parts)[:wanted]
    if len(tokens) < 2:
        raise UserError("the validation data holds no text; give it at least one document")
    num_targets = len(tokens) - 1
    num_rows = -(-num_targets // time)
    num_rows += -num_rows % rows
    padded = np.zeros(num_rows * time + 1, np.int32)
    padded[: len(tokens)] = tokens
    windows = np.stack([padded[i * time : (i + 1) * time + 1] for i in range(num_rows)])
    weights = (np.arange(num_rows * time) < num_targets).astype(np.float32).reshape(num_rows, time)
    return [_flat(as_batch(windows[i : i + rows], weights[i : i + rows], 1)) for i in range(0, num_rows, rows)]


def padded_validation(tokenize: Tokenize, num_examples: int, *, rows: int, time: int) -> list[dict]:
    """The first `num_examples` conversations, one a row, `rows` a batch, each batch padded to a bucket."""
    batches = PaddedRows(tokenize, examples=rows, micro_batches=1, time=time, num_examples=num_examples)
    return [_flat(batch) for batch in batches]


def _flat(batch: dict) -> dict:
    return {name: batch[name][0] for name in ("inputs", "targets", "weights")}
