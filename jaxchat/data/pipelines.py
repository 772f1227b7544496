"""Training batches of the base, mid and SFT stages, and the fixed batches that they are validated on."""

import math
from collections.abc import Iterable

import grain
import numpy as np

from jaxchat.config import UserError, rounded_up
from jaxchat.data.conversations import ConversationRows
from jaxchat.data.encode import Reader, conversation_reader, text_reader
from jaxchat.data.order import Deal, Order
from jaxchat.data.packing import PACKINGS
from jaxchat.data.sources import ParquetText
from jaxchat.data.streams import PackedRows
from jaxchat.data.tasks import load_mixture
from jaxchat.tokenizer import Tokenizer

PREFETCH = 2  # batches prepared in a thread while the device computes


def cut_step(rows: int, devices: int, asked: int, most: int, *, fills: bool = False) -> tuple[int, int]:
    """Return (rows per device in a micro-batch, number of micro-batches) for a step of `rows` rows.

    asked: --device_batch_size; -1: the largest number, at most `most`, that divides the rows per device.
    fills: if `devices` does not divide `rows`, allow for empty rows that fill up the step. UserError: no such
    split exists.
    """
    able = [] if rows % devices else divisors(rows // devices)
    if asked > 0 and asked not in able and able:
        raise UserError(
            f"--device_batch_size={asked} on {devices} devices does not divide the {rows} rows of an "
            f"optimizer step; it may be {', '.join(map(str, able))}, or -1 to choose"
        )
    if not able and not fills:
        step = f"an optimizer step has {rows} rows, which {devices} devices cannot share evenly"
        raise UserError(f"{step}; use a number of devices that divides {rows}")
    batch = asked
    if asked < 0:
        batch = max((n for n in able if n <= most), default=min(most, -(-rows // devices)))
    return batch, -(-rows // (batch * devices))


def divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def rows_of_step(total_batch_size: int, row_length: int) -> int:
    """Number of rows in an optimizer step. UserError: total_batch_size is not a multiple of row_length."""
    rows, rest = divmod(total_batch_size, row_length)
    if rest or not rows:
        instead = f"give {rows * row_length}" if rows else f"give at least {row_length}"
        raise UserError(
            f"--total_batch_size={total_batch_size} is not a multiple of the row length, {row_length}; "
            f"{instead}"
        )
    return rows


def prefetched(dataset: grain.IterDataset) -> grain.DatasetIterator:
    return iter(grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=PREFETCH))


def base_batches(texts: ParquetText, tokenizer: Tokenizer, *, rows: int, seed: int, packing="stream", **how):
    """Return an endless iterator over batches of packed documents, reshuffled every epoch.

    rows: number of rows in a step. packing: a key of PACKINGS. how: further arguments of PackedRows.
    """
    if packing not in PACKINGS:
        raise UserError(f"--packing={packing}; it is {' or '.join(PACKINGS)}")
    deal = Deal(Order(texts.block_sizes, seed), rows)
    return prefetched(PackedRows(text_reader(texts, tokenizer), deal, packing=packing, **how))


def mid_batches(tasks, tokenizer: Tokenizer, *, rows: int, seed: int, endless: bool, **how):
    """Return an iterator over batches of packed, shuffled conversations of all tasks.

    rows: number of rows in a step. endless: repeat the data; False: after one epoch, rows have weight 0. how:
    further arguments of PackedRows.
    """
    deal = Deal(Order([len(tasks)], seed), rows)
    return prefetched(PackedRows(conversation_reader(tasks, tokenizer), deal, once=not endless, **how))


def sft_batches(tasks, tokenizer: Tokenizer, *, seed: int, packing="padded", **how):
    """Return an iterator over batches of shuffled conversations of all tasks.

    packing: "padded" or "bestfit". how: further arguments of ConversationRows.
    """
    if packing not in ("padded", "bestfit"):
        raise UserError(f"--packing={packing}; it is padded or bestfit")
    read, order = conversation_reader(tasks, tokenizer), Order([len(tasks)], seed)
    return prefetched(ConversationRows(read, order, packed=packing == "bestfit", **how))


def load_tasks(spec: str, tasks_dir: str, flag: str, *, documents: bool):
    """Open the mixture of tasks that `spec`, the value of --<flag>, lists.

    documents: whether plain documents are allowed. UserError: the mixture is empty, or holds plain documents
    that are not allowed.
    """
    tasks = load_mixture(spec, tasks_dir or None)
    if len(tasks) == 0:
        raise UserError(f"--{flag}={spec} has no rows; name at least one task that has some")
    if not documents and any(task.has_documents for task in tasks.tasks):
        raise UserError(f"--{flag}={spec} holds plain documents; this stage trains on conversations only")
    return tasks


def packed_validation(
    read: Reader, documents: Iterable[int], *, rows: int, time: int, max_tokens: int
) -> list[dict]:
    """Return validation batches {inputs, targets, weights} [rows, time] of concatenated documents.

    read: a function from row numbers to documents. documents: the row numbers. At most max_tokens targets are
    supervised in all. They do not depend on `rows`, because the last batch is padded with weight 0. Each
    batch holds the rows of all processes.
    """

    wanted, parts, count = max_tokens + 1, [], 0
    for ids, _ in read(documents):
        parts.append(ids)
        count += len(ids)
        if count >= wanted:
            break
    tokens = np.concatenate(parts)[:wanted]
    if len(tokens) < 2:
        raise UserError("the validation data holds no text; it needs at least one document that is not empty")
    num_targets = len(tokens) - 1
    num_rows = rounded_up(-(-num_targets // time), rows)
    padded = np.zeros(num_rows * time + 1, np.int32)
    padded[: len(tokens)] = tokens
    inputs, targets = (padded[i : i + num_rows * time].reshape(-1, rows, time) for i in (0, 1))
    weights = (np.arange(num_rows * time) < num_targets).astype(np.float32).reshape(-1, rows, time)
    batches = zip(inputs, targets, weights, strict=True)
    return [{"inputs": i, "targets": t, "weights": w} for i, t, w in batches]


def padded_validation(read: Reader, order: Order, num_examples: int, *, rows: int, time: int) -> list[dict]:
    """Return validation batches of an order's first num_examples conversations, one conversation per row.

    Each batch is {inputs, targets, weights} [rows, T], where T is the smallest of length_buckets(time) that
    fits its longest conversation. UserError: no token of these conversations is supervised.
    """
    how = {"examples": rows, "micro_rows": rows, "time": time, "num_examples": num_examples}
    batches = ConversationRows(read, order, **how)
    made = [{name: batch[name][0] for name in ("inputs", "targets", "weights")} for batch in batches]
    if not any(batch["weights"].any() for batch in made):
        raise nothing_said(time, num_examples, "validation")
    return made


def check_supervised(tasks, tokenizer: Tokenizer, *, time, seed, num_examples: int):
    """Raise UserError if sft_batches' first num_examples conversations have no supervised token.

    time: number of tokens after which conversations are cut.
    """
    count, order = min(num_examples, len(tasks)), Order([len(tasks)], seed)
    rows = conversation_reader(tasks, tokenizer)(map(order.index, range(count)))
    if not any(mask[1 : time + 1].any() for _, mask in rows):
        raise nothing_said(time, count, "training")


def nothing_said(time: int, count: int, kind: str) -> UserError:
    flag = {"training": "--train_tasks", "validation": "--val_tasks"}[kind]
    return UserError(
        f"the assistant says nothing within the first {time} tokens of the {count:,} {kind} "
        f"conversations; give other {flag}, or a larger --max_seq_len"
    )
