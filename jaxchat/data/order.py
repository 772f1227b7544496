"""Seeded endless orders over a source, and their dealing to streams that every process can read on its own."""

from collections import OrderedDict

import numpy as np

STREAMS = 16  # at most; more mix a batch better, and hold more row groups in memory
KEPT = 64  # shuffled blocks remembered, of a few thousand rows each; of a source that is one block, 4


class Order:
    """An endless order over `num_rows` rows: item i of it is row `index(i)`; each epoch has an order of its own.

    Blocks are shuffled, and rows within a block, so that reading stays local; one block shuffles fully. Nothing as
    long as the data is held but where there is one block only.
    """

    def __init__(self, block_sizes: list[int], seed: int):
        self._sizes = np.array(block_sizes, np.int64)
        self._starts = np.cumsum([0, *block_sizes], dtype=np.int64)
        self.num_rows = int(self._starts[-1])
        self._seed = seed
        self._kept = KEPT if len(block_sizes) > 1 else 4
        self._epochs: OrderedDict[int, tuple] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def _random(self, *which: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence([self._seed, *which])))

    def index(self, i: int) -> int:
        epoch, place = divmod(i, self.num_rows)

        def shuffle_epoch():
            blocks = self._random(epoch).permutation(len(self._sizes))
            return blocks, np.cumsum(self._sizes[blocks])

        blocks, ends = _remembered(self._epochs, epoch, shuffle_epoch, 4)
        at = int(np.searchsorted(ends, place, side="right"))
        block = int(blocks[at])
        size = int(self._sizes[block])
        rows = _remembered(
            self._blocks,
            (epoch, block),
            lambda: self._random(epoch, block).permutation(size).astype(np.uint32),
            self._kept,
        )
        return int(self._starts[block]) + int(rows[place - int(ends[at]) + size])


def _remembered(cache: OrderedDict, key, make, most: int):
    if key not in cache:
        cache[key] = make()
        if len(cache) > most:
            cache.popitem(last=False)
    cache.move_to_end(key)
    return cache[key]


class Deal:
    """The rows of an optimizer step as streams of documents; which document is where depends on nothing else.

    Each epoch's order is cut into `streams` spans of equal length, and stream s reads the s-th span of every epoch: so
    it stays within a few row groups, whatever the pace of the others, and every document is read once an epoch.
    A stream makes `rows_each` consecutive rows of the step.
    """

    def __init__(self, order: Order, rows: int):
        self.order = order
        most = min(STREAMS, order.num_rows)
        self.streams = max(n for n in range(1, most + 1) if rows % n == 0)
        self.rows_each = rows // self.streams

    def first(self, stream: int) -> int:
        return stream * self.order.num_rows // self.streams

    def size(self, stream: int) -> int:
        """Documents of the stream an epoch."""
        return self.first(stream + 1) - self.first(stream)

    def index(self, stream: int, place: int) -> int:
        """The source's row that is the stream's document number `place`, counted over all epochs."""
        epoch, place = divmod(place, self.size(stream))
        return self.order.index(epoch * self.order.num_rows + self.first(stream) + place)

    def of_rows(self, first: int, end: int) -> range:
        """The streams that make the rows first … end − 1."""
        return range(first // self.rows_each, (end - 1) // self.rows_each + 1)
