"""Endless orders over a source by a seed, and how they are dealt to streams for each process to read."""

from functools import lru_cache

import numpy as np

STREAMS = 16  # at most; more would mix a batch better, and need more row groups in memory
KEPT = 64  # shuffled blocks kept, of a few thousand rows each (of a source with one block: 4)


class Order:
    """An endless order over `num_rows` rows, shuffled anew in each epoch; index(i) is the row at place i.

    Blocks are shuffled, and the rows within each block, so that reading stays local; a single block is
    shuffled completely. Memory does not grow with the data, except for a single block.
    """

    def __init__(self, block_sizes: list[int], seed: int):
        self._sizes = np.array(block_sizes, np.int64)
        self._starts = np.cumsum([0, *block_sizes], dtype=np.int64)
        self.num_rows = int(self._starts[-1])
        self._seed = seed
        self._blocks = lru_cache(4)(self._shuffle_blocks)
        self._rows = lru_cache(KEPT if len(block_sizes) > 1 else 4)(self._shuffle_rows)

    def __reduce__(self):  # Grain's workers shuffle for themselves
        return Order, (self._sizes.tolist(), self._seed)

    def _random(self, *which: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence([self._seed, *which])))

    def _shuffle_blocks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (the blocks in an epoch's order, the places at which they end)."""
        blocks = self._random(epoch).permutation(len(self._sizes))
        return blocks, np.cumsum(self._sizes[blocks])

    def _shuffle_rows(self, epoch: int, block: int) -> np.ndarray:
        return self._random(epoch, block).permutation(int(self._sizes[block])).astype(np.uint32)

    def index(self, i: int) -> int:
        epoch, place = divmod(i, self.num_rows)
        blocks, ends = self._blocks(epoch)
        at = int(np.searchsorted(ends, place, side="right"))
        block = int(blocks[at])
        rows = self._rows(epoch, block)
        return int(self._starts[block]) + int(rows[place - int(ends[at]) + len(rows)])


class Deal:
    """Deal documents to the rows of a step, independently of devices, processes and micro-batches.

    Each epoch's order is cut into `streams` spans of equal length, and stream s reads the s-th span of every
    epoch. So it stays within a few row groups, whatever the pace of the others, and every document is read
    once an epoch. A stream makes `rows_each` consecutive rows of the step.
    """

    def __init__(self, order: Order, rows: int):
        self.order = order
        most = min(STREAMS, order.num_rows)
        self.streams = max(n for n in range(1, most + 1) if rows % n == 0)
        self.rows_each = rows // self.streams

    def first(self, stream: int) -> int:
        return stream * self.order.num_rows // self.streams

    def size(self, stream: int) -> int:
        """Number of documents in an epoch of the stream."""
        return self.first(stream + 1) - self.first(stream)

    def index(self, stream: int, place: int) -> int:
        """The source's row at a place of the stream; places are counted on over all epochs."""
        epoch, place = divmod(place, self.size(stream))
        return self.order.index(epoch * self.order.num_rows + self.first(stream) + place)

    def of_rows(self, first: int, end: int) -> range:
        """The streams that make the rows from first to end − 1."""
        return range(first // self.rows_each, (end - 1) // self.rows_each + 1)
