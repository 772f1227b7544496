"""Three ways to pack a stream of documents into rows of T+1 tokens, which give T inputs and T targets each.

A packer asks for documents by their positions in the stream (`wanted`), receives them (`add`), and returns
the rows of a step (`rows`). Between steps, its state is a list of integers.
"""

from collections.abc import Sequence

import numpy as np

DRAW = 16  # documents that a packer requests at a time
BUFFER = 64  # documents that best-fit packing chooses from


class Concatenated:
    """Concatenate documents and cut them into windows of T+1 tokens that overlap by one token.

    size: documents in an epoch of the stream. time: T. rows: windows per step.
    once: end the stream after one epoch; all later targets have weight 0.
    state: a result of state() from which to resume, or None to start at the beginning.
    """

    def __init__(self, size: int, *, time: int, rows: int, once: bool, state: Sequence[int] | None):
        self._size, self._time, self._rows, self._once = size, time, rows, once
        # The first document with unread tokens, the number of its tokens read, and of empty documents so far.
        self._first, self._offset, self._empty = state or (0, 0, 0)
        self._queue: list[np.ndarray] = []
        self._unread = -self._offset  # tokens
        self._targets = self._taken = 0  # of the last step

    def state(self) -> list[int]:
        return [self._first, self._offset, self._empty]

    def wanted(self) -> range:
        """Return the stream positions of the documents to add next, if any are needed for the next step."""
        place = self._first + len(self._queue)
        # One token more than the windows need, to know whether another step will have a target.
        if self._unread >= self._rows * self._time + 2:
            return range(0)
        return range(place, min(place + DRAW, self._size) if self._once else place + DRAW)

    def add(self, documents: list[np.ndarray]):
        self._queue += documents
        self._unread += sum(map(len, documents))

    def rows(self) -> dict[str, np.ndarray]:
        """Return the next step as {"tokens": int32 [rows, T+1], "weights": float32 [rows, T]}."""
        wanted, self._taken = self._rows * self._time, self._first
        unread = np.concatenate([np.zeros(0, np.int32), *self._queue])[self._offset :][: wanted + 1]
        stream = np.zeros(wanted + 1, np.int32)
        stream[: len(unread)] = unread
        targets = max(0, len(unread) - 1)
        self._targets = targets
        self._offset += targets
        self._unread -= targets
        while self._queue and self._offset >= len(self._queue[0]):
            ids = self._queue.pop(0)
            self._offset -= len(ids)
            self._first += 1
            self._empty += len(ids) == 0
        windows = np.lib.stride_tricks.sliding_window_view(stream, self._time + 1)[:: self._time]
        weights = (np.arange(wanted) < targets).astype(np.float32).reshape(self._rows, self._time)
        return {"tokens": windows, "weights": weights}

    def totals(self) -> dict[str, int]:
        """Return {name: count} for the step that rows() returned last.

        targets: supervised tokens in the step. taken: documents that were used up before the step.
        left: 1 if the next step has targets, else 0. empty_documents: empty documents skipped so far.
        """
        counts = {"targets": self._targets, "taken": self._taken, "left": int(self._unread >= 2)}
        return counts | {"empty_documents": self._empty}


class BestFit:
    """Pack rows by repeatedly adding the longest buffered document that fits in the current row.

    When none fits, the beginning of the shortest one fills the row, and the rest of that document is dropped.
    """

    buffer = BUFFER
    apart = True  # documents in a row don't attend to each other
    long_first = True  # a document longer than a row counts as a full row

    def __init__(self, size: int, *, time: int, rows: int, once: bool, state: Sequence[int] | None):
        if once:
            raise ValueError("best-fit packing is for endless data")
        self._time, self._rows = time, rows
        # Position of the next document, number of empty ones before it, positions of those in the buffer.
        self._next, self._empty, *waiting = state or (0, 0)
        self._waiting = waiting  # positions of the buffer's documents, to be read again
        self._buffer: list[tuple[int, np.ndarray]] = []
        self._queue: list[np.ndarray] = []  # documents from place `_next` on
        self._begin_step()

    def _begin_step(self):
        self._row, self._filled, self._segment, self._cut_tokens = 0, 0, 0, 0
        self._tokens = np.zeros((self._rows, self._time + 1), np.int32)
        self._segments = np.zeros((self._rows, self._time + 1), np.int32)

    def state(self) -> list[int]:
        return [self._next, self._empty, *self._waiting, *(place for place, _ in self._buffer)]

    def wanted(self) -> Sequence[int]:
        """Return the stream positions of the documents to add next, if any are needed for the next step."""
        if self._waiting:
            return self._waiting
        while self._row < self._rows:
            while self._queue and len(self._buffer) < self.buffer:
                ids = self._queue.pop(0)
                if len(ids):
                    self._buffer.append((self._next, ids))
                self._next, self._empty = self._next + 1, self._empty + (len(ids) == 0)
            if len(self._buffer) < self.buffer:
                return range(self._next, self._next + max(DRAW, self.buffer - len(self._buffer)))
            self._place_one()
        return range(0)

    def add(self, documents: list[np.ndarray]):
        if self._waiting:
            self._buffer, self._waiting = list(zip(self._waiting, documents, strict=True)), []
        else:
            self._queue += documents

    def _place_one(self):
        """Move the longest document that fits, or a part of the shortest, from the buffer to the row."""
        room = self._time + 1 - self._filled
        lengths = np.array([len(ids) for _, ids in self._buffer])
        if self.long_first:  # so that long documents, chosen at the start of a row, never starve
            lengths = np.minimum(lengths, self._time + 1)
        fits = lengths <= room
        chosen = int(np.where(fits, lengths, 0).argmax() if fits.any() else lengths.argmin())
        _, ids = self._buffer.pop(chosen)
        part = ids[:room]
        self._cut_tokens += len(ids) - len(part)
        place = (self._row, slice(self._filled, self._filled + len(part)))
        self._segment += 1
        self._tokens[place], self._segments[place] = part, self._segment
        self._filled += len(part)
        if self._filled > self._time:
            self._row, self._filled, self._segment = self._row + 1, 0, 0

    def rows(self) -> dict[str, np.ndarray]:
        """Return the next step as {"tokens": int32 [rows, T+1], "weights": float32 [rows, T]}.

        If documents must not attend to each other, "segments" [rows, T] holds each token's document number.
        """
        weights = np.ones((self._rows, self._time), np.float32)
        rows = {"tokens": self._tokens, "weights": weights}
        rows |= {"segments": self._segments[:, :-1]} if self.apart else {}
        self._last_cut = self._cut_tokens
        self._begin_step()
        return rows

    def totals(self) -> dict[str, int]:
        """Return {name: count} for the step that rows() returned last.

        targets: supervised tokens in the step. cut_tokens: dropped tokens in the step.
        taken: documents read so far. empty_documents: how many of them were skipped because they were empty.
        left: always 1, because this order of documents never ends.
        """
        counts = {"targets": self._rows * self._time, "taken": self._next, "left": 1}
        return counts | {"empty_documents": self._empty, "cut_tokens": self._last_cut}


class CroppedBestFit(BestFit):
    """Pack rows by best fit as nanochat does, from a buffer of 1,000 documents.

    Where no document fits in the rest of a row, the shortest is cropped to it, and its remainder is dropped.
    Documents in the same row attend to each other.
    """

    buffer = 1000
    apart = long_first = False


PACKINGS = {"stream": Concatenated, "bos_bestfit": BestFit, "nanochat": CroppedBestFit}
