"""From documents to batches: rows packed without gaps (base, mid), or one conversation a row (SFT).

A batch is {inputs, targets int32, weights float32}, each [A, B, T]: A micro-batches of B rows. Beside it stand
`progress` (the share of a single pass that was taken before this batch) and `last` (no batch follows). Both iterators'
states are a few integers, exact at any point, and fit in JSON.
"""

from collections.abc import Callable, Sequence

import grain
import numpy as np

from jaxchat.config import UserError

EMPTY_IN_A_ROW = 10_000  # as many empty documents are a mistake, not noise

# (indices in the global order) -> for each the (ids, mask) of one document; a document may be empty.
Tokenize = Callable[[Sequence[int]], list[tuple[np.ndarray, np.ndarray]]]


def as_batch(windows: np.ndarray, weights: np.ndarray, micro_batches: int) -> dict:
    """{inputs, targets, weights} [A, B, T] from token windows [A·B, T+1] and weights [A·B, T]."""
    rows, time = weights.shape
    shape = (micro_batches, rows // micro_batches, time)
    return {
        "inputs": windows[:, :-1].reshape(shape),
        "targets": windows[:, 1:].reshape(shape),
        "weights": weights.reshape(shape),
    }


class PackedRows(grain.IterDataset):
    """Every row of a step is a token stream of its own, cut into windows of T+1 tokens that overlap by one.

    Of the `rows` rows of an optimizer step, row r takes the documents r, r + rows, r + 2·rows, … of the global order.
    So a batch depends on `rows` and T only, not on how the rows are split into micro-batches, devices or processes, and
    a row's position is two integers. With `num_documents` each document is taken once: rows that have run out are
    padded with weight 0 until all have. Without, it never ends.
    """

    def __init__(
        self, tokenize: Tokenize, *, rows: int, micro_batches: int, time: int, num_documents: int | None = None
    ):
        super().__init__()
        self.tokenize, self.rows, self.micro_batches, self.time = tokenize, rows, micro_batches, time
        self.num_documents = num_documents

    def __iter__(self):
        return _PackedRowsIterator(self)


class _PackedRowsIterator(grain.DatasetIterator):
    def __init__(self, packing: PackedRows):
        super().__init__()
        self._p = packing
        # Of each row: its unread tokens as a list of (document's place in the row, ids), and where to read on.
        self._set([0] * packing.rows, [0] * packing.rows, 0)

    def _set(self, first: list[int], offsets: list[int], empty: int):
        self._queues: list[list[tuple[int, np.ndarray]]] = [[] for _ in first]
        self._next = list(first)  # the place of the next document to draw
        self._offsets = list(offsets)  # tokens of the row's first unread document that are read already
        self._empty = empty
        self._begun = any(first) or any(offsets)

    def _unread(self, row: int) -> int:
        return sum(len(ids) for _, ids in self._queues[row]) - self._offsets[row]

    def _has_more(self, row: int) -> bool:
        n = self._p.num_documents
        return n is None or row + self._next[row] * self._p.rows < n

    def _fill(self, tokens: int):
        """Draw documents until every row has `tokens` unread ones or has run out."""
        fruitless = 0
        while True:
            hungry = [r for r in range(self._p.rows) if self._unread(r) < tokens and self._has_more(r)]
            if not hungry:
                return
            documents = self._p.tokenize([r + self._next[r] * self._p.rows for r in hungry])
            for r, (ids, _) in zip(hungry, documents, strict=True):
                self._empty += len(ids) == 0
                self._queues[r].append((self._next[r], ids))
                self._next[r] += 1
            fruitless = 0 if any(len(ids) for ids, _ in documents) else fruitless + len(documents)
            if fruitless > EMPTY_IN_A_ROW:
                raise UserError(f"{fruitless:,} documents in a row are empty; give data that holds text")

    def __next__(self):
        p = self._p
        begun = sum(self._first_unread())
        # One token more than a window: then what is left tells whether a further window will have a target.
        self._fill(p.time + 2)
        if all(self._unread(r) < 2 for r in range(p.rows)):
            if not self._begun:
                raise UserError("all documents are empty; give data that holds text")
            raise StopIteration
        self._begun = True
        windows = np.zeros((p.rows, p.time + 1), np.int32)
        weights = np.zeros((p.rows, p.time), np.float32)
        for r, queue in enumerate(self._queues):
            take = min(self._unread(r), p.time + 1)
            if take < 2:
                continue
            stream = np.concatenate([ids for _, ids in queue])[self._offsets[r] :]
            windows[r, :take] = stream[:take]
            weights[r, : take - 1] = 1.0
            self._offsets[r] += take - 1
            while queue and self._offsets[r] >= len(queue[0][1]):
                self._offsets[r] -= len(queue.pop(0)[1])
        batch = as_batch(windows, weights, p.micro_batches)
        batch["progress"] = 0.0 if p.num_documents is None else begun / p.num_documents
        batch["last"] = all(self._unread(r) < 2 and not self._has_more(r) for r in range(p.rows))
        batch["counts"] = {"empty_documents": self._empty}
        return batch

    def _first_unread(self) -> list[int]:
        """Of each row the place of the first document that is not read to its end."""
        return [queue[0][0] if queue else n for queue, n in zip(self._queues, self._next, strict=True)]

    def get_state(self):
        # Documents that are queued will be drawn, and counted, again.
        queued_empty = sum(len(ids) == 0 for queue in self._queues for _, ids in queue)
        return {"documents": self._first_unread(), "offsets": list(self._offsets), "empty": self._empty - queued_empty}

    def set_state(self, state):
        if len(state["documents"]) != self._p.rows:
            raise ValueError(f"state of {len(state['documents'])} rows for a batch of {self._p.rows}")
        self._set(state["documents"], state["offsets"], state["empty"])


def length_buckets(max_len: int) -> list[int]:
    """The row lengths that batches of conversations are padded to: 64, 96, 128, 192, 256, 384, … and max_len."""
    return [n for i in range(30) for n in (64 << i, 96 << i) if n < max_len] + [max_len]


class PaddedRows(grain.IterDataset):
    """One conversation a row: `examples` rows a step, in the global order, padded to the step's longest (a bucket).

    A conversation longer than T+1 tokens is cut and counted. Only what its mask says is supervised. After
    `num_examples` rows it ends; what the last batch lacks is filled with rows of weight 0.
    """

    def __init__(self, tokenize: Tokenize, *, examples: int, micro_batches: int, time: int, num_examples: int):
        super().__init__()
        self.tokenize, self.examples, self.micro_batches, self.time = tokenize, examples, micro_batches, time
        self.num_examples = num_examples

    def __iter__(self):
        return _PaddedRowsIterator(self)


class _PaddedRowsIterator(grain.DatasetIterator):
    def __init__(self, padding: PaddedRows):
        super().__init__()
        self._p = padding
        self._state = {"next": 0, "cut": 0, "nothing_supervised": 0}

    def __next__(self):
        p, s = self._p, self._state
        first = s["next"]
        if first >= p.num_examples:
            raise StopIteration
        rows = p.tokenize(range(first, min(first + p.examples, p.num_examples)))
        longest = min(p.time, max(len(ids) - 1 for ids, _ in rows))
        time = next(n for n in length_buckets(p.time) if n >= longest)
        windows = np.zeros((p.examples, time + 1), np.int32)
        weights = np.zeros((p.examples, time), np.float32)
        cut = nothing = 0
        for r, (ids, mask) in enumerate(rows):
            cut += len(ids) > time + 1
            ids, mask = ids[: time + 1], mask[: time + 1]
            windows[r, : len(ids)] = ids
            weights[r, : max(0, len(ids) - 1)] = mask[1:]
            nothing += not mask[1:].any()
        self._state = {
            "next": first + p.examples,
            "cut": s["cut"] + cut,
            "nothing_supervised": s["nothing_supervised"] + nothing,
        }
        batch = as_batch(windows, weights, p.micro_batches)
        batch["progress"] = first / p.num_examples
        batch["last"] = self._state["next"] >= p.num_examples
        batch["counts"] = {"cut": self._state["cut"], "nothing_supervised": self._state["nothing_supervised"]}
        return batch

    def get_state(self):
        return dict(self._state)

    def set_state(self, state):
        self._state = dict(state)
