"""Batches of conversations for SFT, with one conversation per row (padded) or several (packed).

Every process tokenizes all conversations of a step and keeps the rows of its own devices, so all processes
agree on the shapes of the arrays.
"""

from itertools import islice

import grain
import numpy as np

from jaxchat.data.encode import Reader
from jaxchat.data.order import Order
from jaxchat.data.streams import as_batch


def length_buckets(max_len: int) -> list[int]:
    """Return the row lengths that batches may be padded to: 64, 96, 128, 192, 256, … and finally max_len."""
    return [n for i in range(30) for n in (64 << i, 96 << i) if n < max_len] + [max_len]


def best_fit(lengths: list[int], capacity: int) -> list[tuple[int, int]]:
    """Pack texts into rows of `capacity` tokens; return the (row, offset in the row) of each text.

    lengths: number of tokens of each text. Longer texts are placed first. Each text goes into the fullest row
    that has room for it, or into a new row if none has.
    """
    filled: list[int] = []  # tokens in each row
    places = [(0, 0)] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [row for row, used in enumerate(filled) if used + lengths[i] <= capacity]
        if not fitting:
            filled.append(0)
            fitting = [len(filled) - 1]
        row = max(fitting, key=lambda row: filled[row])
        places[i] = (row, filled[row])
        filled[row] += lengths[i]
    return places


class ConversationRows(grain.IterDataset):
    """Iterate over batches of the first `num_examples` conversations in `order`, `examples` of them per step.

    read: maps row numbers to the (token ids, mask) of conversations; the mask is 1 for supervised tokens.
    micro_rows: rows of a micro-batch, over all processes. Rows of weight 0 fill up incomplete micro-batches.
    time: T, the maximum row length. Conversations are cut to T+1 tokens, which give T inputs and T targets.
    packed: put several conversations into each row, of length T. Otherwise, each row holds one conversation,
    and the rows of a step are padded to the smallest of length_buckets(T) that fits all of them.
    share: (first, end) of this process's rows in a micro-batch; None: all rows.
    """

    def __init__(
        self,
        read: Reader,
        order: Order,
        *,
        examples: int,
        micro_rows: int,
        time: int,
        num_examples: int,
        packed: bool = False,
        share: tuple[int, int] | None = None,
    ):
        super().__init__()
        self.read, self.order, self.time, self.packed = read, order, time, packed
        self.examples, self.num_examples, self.micro_rows = examples, num_examples, micro_rows
        self.share = share or (0, micro_rows)

    def __iter__(self):
        return _ConversationRowsIterator(self)


class _ConversationRowsIterator(grain.DatasetIterator):
    def __init__(self, rows: ConversationRows):
        super().__init__()
        self._rows = rows
        self._state = {"next": 0, "cut": 0, "nothing_supervised": 0}
        self._rendered = None  # the conversations from state["next"] on, tokenized ahead

    def get_state(self):
        return dict(self._state)

    def set_state(self, state):
        self._state |= state
        self._rendered = None

    def __next__(self):
        p, first = self._rows, self._state["next"]
        if first >= p.num_examples:
            raise StopIteration
        end = min(first + p.examples, p.num_examples)
        if self._rendered is None:
            self._rendered = p.read(p.order.index(i) for i in range(first, p.num_examples))
        rendered = list(islice(self._rendered, end - first))
        pairs = [(ids[: p.time + 1], mask[: p.time + 1]) for ids, mask in rendered]
        cut = self._state["cut"] + sum(len(ids) > p.time + 1 for ids, _ in rendered)
        silent = self._state["nothing_supervised"] + sum(not mask[1:].any() for _, mask in pairs)
        self._state = {"next": end, "cut": cut, "nothing_supervised": silent}
        rows = self._arrange(pairs)
        num_rows = len(rows["inputs"])
        counts = {"taken": first, "left": end < p.num_examples, "cut": cut, "nothing_supervised": silent}
        totals = {name: np.zeros(num_rows, np.int32) for name in counts}
        for name, count in counts.items():  # the first row holds the counts of the whole step
            totals[name][0] = count
        micro_batches = num_rows // p.micro_rows
        mine = slice(p.share[0] * micro_batches, p.share[1] * micro_batches)  # see as_batch
        return as_batch(rows, totals, mine, micro_batches)

    def _arrange(self, pairs: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
        """Convert (ids, mask) pairs to a step's {inputs, targets, weights[, segments]} for all processes."""
        p, lengths = self._rows, [len(ids) for ids, _ in pairs]
        time = p.time if p.packed else next(n for n in length_buckets(p.time) if n >= max(lengths) - 1)
        places = best_fit(lengths, time + 1) if p.packed else [(row, 0) for row in range(len(pairs))]
        num_rows = max(row for row, _ in places) + 1 if p.packed else p.examples
        num_rows += -num_rows % p.micro_rows
        tokens, masks, segments = np.zeros((3, num_rows, time + 1), np.int32)
        for number, ((ids, mask), (row, start)) in enumerate(zip(pairs, places, strict=True), 1):
            where = (row, slice(start, start + len(ids)))
            tokens[where], masks[where], segments[where] = ids, mask, number
        # A target is supervised if its own mask is 1; the bos of a following conversation never is.
        weights = masks[:, 1:].astype(np.float32)
        rows = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}
        if p.packed:  # a padded row holds one conversation, so it needs no segments
            rows["segments"] = segments[:, :-1]
        return rows
