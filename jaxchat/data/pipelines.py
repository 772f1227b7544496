"""Training batches and fixed validation batches of the base, mid and SFT stages."""

import math
from collections.abc import Iterable

import grain
import numpy as np

from jaxchat.config import UserError, counted, rounded_up
from jaxchat.data.conversations import ConversationRows
from jaxchat.data.encode import Reader, conversation_reader, text_reader
from jaxchat.data.order import Division, Order
from jaxchat.data.packing import PACKINGS
from jaxchat.data.sources import ParquetText
from jaxchat.data.streams import PackedRows
from jaxchat.data.tasks import load_mixture
from jaxchat.tokenizer import Tokenizer

PREFETCH = 2  # batches prepared in a thread while the device computes


def cut_step(
    rows: int, devices: int, device_batch_size: int, limit: int, *, fills: bool = False
) -> tuple[int, int]:
    """Return (rows per device in a micro-batch, number of micro-batches) for a step of `rows` rows.

    device_batch_size: rows per device in a micro-batch; -1: choose the number, at most `limit`.
    fills: if `devices` does not divide `rows`, fill up the step with empty rows instead of raising UserError.
    Raises UserError if the rows cannot be divided evenly, or device_batch_size exceeds a device's rows.
    """
    able = [] if rows % devices else divisors(rows // devices)
    if device_batch_size > 0 and device_batch_size not in able and able:
        raise UserError(
            f"--device_batch_size={device_batch_size} on {devices} devices does not divide the {rows} "
            f"rows of an optimizer step; it may be {', '.join(map(str, able))}, or -1 to choose"
        )
    if not able and not fills:
        step = f"an optimizer step has {rows} rows, which {devices} devices cannot share evenly"
        raise UserError(f"{step}; use a number of devices that divides {rows}")
    most = -(-rows // devices)
    if device_batch_size > most:
        here = f"a step has {counted(most, 'row')} a device"
        raise UserError(f"--device_batch_size={device_batch_size}: {here}; lower it")
    batch = device_batch_size
    if batch < 0:
        batch = max((n for n in able if n <= limit), default=min(limit, most))
    return batch, -(-rows // (batch * devices))


def divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def rows_of_step(total_batch_size: int, row_length: int) -> int:
    """Return total_batch_size / row_length, the rows of an optimizer step; raise UserError on a remainder."""
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
    division = Division(Order(texts.block_sizes, seed), rows)
    return prefetched(PackedRows(text_reader(texts, tokenizer), division, packing=packing, **how))


def mid_batches(tasks, tokenizer: Tokenizer, *, rows: int, seed: int, endless: bool, **how):
    """Return an iterator over batches of packed, shuffled conversations of all tasks.

    endless: repeat the data without end. Otherwise, all targets after the first epoch have weight 0.
    rows: number of rows in a step. how: further arguments of PackedRows.
    """
    division = Division(Order([len(tasks)], seed), rows)
    return prefetched(PackedRows(conversation_reader(tasks, tokenizer), division, once=not endless, **how))


def sft_batches(tasks, tokenizer: Tokenizer, *, seed: int, packing="padded", **how):
    """Return an iterator over batches of shuffled conversations of all tasks.

    packing: "padded" (one conversation per row) or "bestfit" (several). how: arguments of ConversationRows.
    """
    if packing not in ("padded", "bestfit"):
        raise UserError(f"--packing={packing}; it is padded or bestfit")
    read, order = conversation_reader(tasks, tokenizer), Order([len(tasks)], seed)
    return prefetched(ConversationRows(read, order, packed=packing == "bestfit", **how))


def load_tasks(spec: str, tasks_dir: str, flag: str, *, documents: bool):
    """Open the tasks listed in `spec`, the value of the flag --<flag>.

    Raises UserError if they have no rows, or if they hold plain documents and `documents` is false.
    """
    try:
        tasks = load_mixture(spec, tasks_dir or None)
    except UserError as problem:
        off = "; or turn this evaluation off: --eval_every=-1" if flag == "val_tasks" else ""
        raise UserError(f"--{flag}: {problem}{off}") from problem
    if len(tasks) == 0:
        raise UserError(f"--{flag}={spec} has no rows; name at least one task that has some")
    if not documents and any(task.has_documents for task in tasks.tasks):
        raise UserError(f"--{flag}={spec} holds plain documents; this stage trains on conversations only")
    return tasks


def packed_validation(
    read: Reader, documents: Iterable[int], *, rows: int, time: int, max_tokens: int
) -> list[dict]:
    """Return validation batches {inputs, targets, weights} [rows, time] of concatenated documents.

    read: maps row numbers to documents. documents: the row numbers to read.
    rows: rows per batch, over all processes. The last batch is filled up with targets of weight 0.
    max_tokens: maximum number of supervised targets in all batches together.
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
    """Return validation batches of the first num_examples conversations in `order`, one per row.

    Each batch is {inputs, targets, weights} [rows, T], where T is the smallest of length_buckets(time) that
    fits its longest conversation. Raises UserError if no token of these conversations is supervised.
    """
    how = {"examples": rows, "micro_rows": rows, "time": time, "num_examples": num_examples}
    batches = ConversationRows(read, order, **how)
    made = [{name: batch[name][0] for name in ("inputs", "targets", "weights")} for batch in batches]
    if not any(batch["weights"].any() for batch in made):
        raise nothing_said(time, num_examples, "validation")
    return made


def check_supervised(tasks, tokenizer: Tokenizer, *, time, seed, num_examples: int):
    """Raise UserError if none of the first num_examples shuffled conversations has a supervised token.

    time: number of targets after which a conversation is cut. seed: seed of the shuffle.
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
