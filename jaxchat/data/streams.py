"""Packed batches of the base and mid stages, identical for any number of processes and workers.

The rows of a step come from a fixed number of streams (order.Deal), each of which fills some consecutive rows
(packing.py). A process reads the streams that its rows come from, in threads or in worker processes.

A batch holds int32 `inputs` and `targets`, float32 `weights` and, if texts in a row must not attend to each
other, int32 `segments`, each [A, B, T]: A micro-batches of the process's B rows. It also has `totals`, {name:
int32 [A, B]}, whose sums over all rows of all processes are counts of the whole step (sharding.agree).
"""

from collections.abc import Sequence
from functools import partial

import grain
import numpy as np
from absl import flags

from jaxchat.config import UserError
from jaxchat.data.encode import Reader
from jaxchat.data.order import Deal
from jaxchat.data.packing import PACKINGS

EMPTY_IN_A_ROW = 10_000  # more consecutive empty documents than this are an error


class StreamRows(grain.IterDataset):
    """Yield, for each training step, {stream: {"rows": …, "totals": …, "state": …}} for some streams.

    rows: {name: array [rows of the stream, …]}. totals: {name: count}. state: the position after the step,
    from which to resume. make: builds a stream's packer. states: {stream: state} at the start. An exhausted
    stream yields rows of weight 0 for ever. Grain divides the streams among its workers by calling set_slice.
    """

    def __init__(self, read: Reader, deal: Deal, make, streams: Sequence[int], states: dict):
        super().__init__()
        self.read, self.deal, self.make, self.streams, self.states = read, deal, make, streams, states

    def set_slice(self, part: slice, sequential_slice: bool = False):
        self.streams = self.streams[part]

    def __iter__(self):
        return _StreamRowsIterator(self)


class _StreamRowsIterator(grain.DatasetIterator):
    def __init__(self, rows: StreamRows):
        super().__init__()
        self._p = rows
        self._streams = {n: rows.make(rows.deal.size(n), state=rows.states.get(str(n))) for n in rows.streams}

    def __next__(self):
        self._fill()
        made = self._streams.items()
        return {n: {"rows": s.rows(), "totals": s.totals(), "state": s.state()} for n, s in made}

    def _fill(self):
        """Read the documents that all streams request in one call, which keeps the reader's threads busy."""
        fruitless = 0
        while True:
            wanted = {n: list(stream.draw()) for n, stream in self._streams.items()}
            sources = [self._p.deal.index(n, place) for n, places in wanted.items() for place in places]
            if not sources:
                return
            documents = [ids for ids, _ in self._p.read(sources)]
            fruitless = 0 if any(map(len, documents)) else fruitless + len(documents)
            if fruitless > EMPTY_IN_A_ROW:
                raise UserError(f"{fruitless:,} documents in a row are empty; check that the data holds text")
            for n, places in wanted.items():
                if places:
                    self._streams[n].give(documents[: len(places)])
                    documents = documents[len(places) :]

    def get_state(self):  # __next__ returns the streams' states
        return {}

    def set_state(self, state):
        raise NotImplementedError("make a new StreamRows from the states")


class PackedRows(grain.IterDataset):
    """Iterate endlessly over one process's batches of packed documents.

    A batch is {inputs, targets, weights[, segments]} [A, B, T]: A micro-batches of B rows. once: one pass
    over the documents, then rows of weight 0. share: (first, end) of this process's rows in a micro-batch;
    None: all rows. workers: number of subprocesses that tokenize; 0: use threads of this process.
    """

    def __init__(
        self,
        read: Reader,
        deal: Deal,
        *,
        micro_batches,
        time,
        packing="stream",
        once=False,
        share=None,
        workers=0,
    ):
        super().__init__()
        self.read, self.deal, self.micro_batches = read, deal, micro_batches
        first, end = share or (0, deal.streams * deal.rows_each // micro_batches)
        self.rows = (first * micro_batches, end * micro_batches)  # of the step; see as_batch
        self.streams = deal.of_rows(*self.rows)
        self.workers = min(workers, len(self.streams))
        self.make = partial(PACKINGS[packing], time=time, rows=deal.rows_each, once=once)

    def __iter__(self):
        return _PackedRowsIterator(self)


class _PackedRowsIterator(grain.DatasetIterator):
    """Iterator of PackedRows. Its state is {stream: state of the stream's packer}; {} before the first batch.

    set_state also accepts the joined states of all processes, and keeps those of this process's streams.
    """

    def __init__(self, packing: PackedRows):
        super().__init__()
        self._p = packing
        self._parts = None
        self._state: dict[str, list[int]] = {}

    def get_state(self):
        return dict(self._state)

    def set_state(self, state):
        own = [str(n) for n in self._p.streams]
        if state and len(state) != self._p.deal.streams and [*state] != own:
            raise ValueError(f"a state of {len(state)} streams for a step of {self._p.deal.streams}")
        self._stop()
        self._state = {name: state[name] for name in own if state}

    def close(self):
        super().close()
        self._stop()

    def _start(self):
        p = self._p
        rows = StreamRows(p.read, p.deal, p.make, p.streams, self._state)
        if p.workers:
            if not flags.FLAGS.is_parsed():  # Grain needs parsed absl flags, which jaxchat doesn't use
                flags.FLAGS.mark_as_parsed()
            rows = rows.mp_prefetch(grain.MultiprocessingOptions(p.workers, per_worker_buffer_size=2))
        else:  # tokenize the next step's documents while this step's rows are assembled
            rows = grain.experimental.ThreadPrefetchIterDataset(rows, prefetch_buffer_size=1)
        self._parts = iter(rows)

    def _stop(self):
        if self._parts is not None:
            self._parts.close()
        self._parts = None

    def __next__(self):
        p = self._p
        if self._parts is None:
            self._start()
        streams = {}
        for _ in range(max(1, p.workers)):  # each worker returns the rows of its streams
            streams |= next(self._parts)
        self._state = {str(n): streams[n]["state"] for n in p.streams}
        made = [streams[n]["rows"] for n in p.streams]
        rows = {name: np.concatenate([m[name] for m in made]) for name in made[0]}
        tokens = rows.pop("tokens")
        rows |= {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
        counts = [streams[n]["totals"] for n in p.streams]
        totals = {name: np.zeros(len(tokens), np.int32) for name in counts[0]}
        for name in totals:  # a stream's first row holds its counts
            totals[name][:: p.deal.rows_each] = [of[name] for of in counts]
        # Every row holds `left`, so that a process without a stream's first row need not wait for the sum.
        totals["left"] = np.repeat(totals["left"][:: p.deal.rows_each], p.deal.rows_each)
        first = p.streams[0] * p.deal.rows_each  # the end streams may be shared with other processes
        mine = slice(p.rows[0] - first, p.rows[1] - first)
        return as_batch(rows, totals, mine, p.micro_batches)


def as_batch(rows: dict[str, np.ndarray], totals: dict[str, np.ndarray], mine: slice, micro_batches: int):
    """Return a batch of arrays [A, B, …], A micro-batches of B rows, made of rows `mine` of arrays [rows, …].

    `totals` becomes the batch's entry "totals". Row r of `mine` becomes row r // A of micro-batch r % A, so
    that each process's rows are consecutive in the step.
    """

    def split(a):
        return np.ascontiguousarray(a[mine].reshape(-1, micro_batches, *a.shape[1:]).swapaxes(0, 1))

    batch = {name: split(a) for name, a in rows.items()}
    return batch | {"totals": {name: split(a) for name, a in totals.items()}}
