"""Shuffle the rows of a data source anew in each epoch, and divide them among streams that fill a step."""

from functools import lru_cache

import numpy as np

STREAMS = 16  # largest number; more would mix a batch better, but need more row groups in memory
KEPT = 64  # shuffled blocks to cache, of a few thousand rows each (4 if the source is a single block)


class Order:
    """An endless order of the rows of a data source, reshuffled every epoch.

    block_sizes: number of rows in each block of the source, such as a row group. The blocks are shuffled, and
    so are the rows within each block, so that reads stay local.
    """

    def __init__(self, block_sizes: list[int], seed: int):
        self._sizes = np.array(block_sizes, np.int64)
        self._starts = np.cumsum([0, *block_sizes], dtype=np.int64)
        self.num_rows = int(self._starts[-1])
        self._seed = seed
        self._blocks = lru_cache(4)(self._shuffle_blocks)
        self._rows = lru_cache(KEPT if len(block_sizes) > 1 else 4)(self._shuffle_rows)

    def __reduce__(self):  # without the caches: Grain's workers fill their own
        return Order, (self._sizes.tolist(), self._seed)

    def _random(self, *which: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence([self._seed, *which])))

    def _shuffle_blocks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the shuffled block numbers of an epoch, and the position in it at which each block ends."""
        blocks = self._random(epoch).permutation(len(self._sizes))
        return blocks, np.cumsum(self._sizes[blocks])

    def _shuffle_rows(self, epoch: int, block: int) -> np.ndarray:
        return self._random(epoch, block).permutation(int(self._sizes[block])).astype(np.uint32)

    def index(self, i: int) -> int:
        """Return the number of the source row that is at position `i` of the order."""
        epoch, place = divmod(i, self.num_rows)
        blocks, ends = self._blocks(epoch)
        at = int(np.searchsorted(ends, place, side="right"))
        block = int(blocks[at])
        rows = self._rows(epoch, block)
        return int(self._starts[block]) + int(rows[place - int(ends[at]) + len(rows)])


class Division:
    """Divide an order into streams, each of which fills `rows_per_stream` consecutive rows of every step.

    rows: number of rows in a training step. Every epoch is cut into `streams` parts of nearly equal size, and
    stream s reads part s of each epoch. The division does not depend on the number of devices or processes.
    """

    def __init__(self, order: Order, rows: int):
        self.order = order
        most = min(STREAMS, order.num_rows)
        self.streams = max(n for n in range(1, most + 1) if rows % n == 0)
        self.rows_per_stream = rows // self.streams

    def first(self, stream: int) -> int:
        return stream * self.order.num_rows // self.streams

    def size(self, stream: int) -> int:
        """Return the number of documents that a stream reads in an epoch."""
        return self.first(stream + 1) - self.first(stream)

    def index(self, stream: int, position: int) -> int:
        """Return the number of the source row at `position` of a stream. Positions continue across epochs."""
        epoch, place = divmod(position, self.size(stream))
        return self.order.index(epoch * self.order.num_rows + self.first(stream) + place)

    def streams_of_rows(self, first: int, end: int) -> range:
        """Return the numbers of the streams that fill the rows `first` to `end` − 1 of a step."""
        return range(first // self.rows_per_stream, (end - 1) // self.rows_per_stream + 1)
