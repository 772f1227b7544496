"""Packed batches of the base and mid stages, identical for any number of processes and workers.

The rows of a step are divided among a fixed number of streams (order.Division), and each stream fills its
rows with documents of its own. A process reads only the streams that it needs for its rows.

A batch holds int32 `inputs`, int32 `targets` and float32 `weights`, each [A, B, T]: A micro-batches, each of
B rows of T tokens. If texts in a row must not attend to each other, it also holds int32 `segments` [A, B, T].
`totals` is {name: int32 [A, B]}. The sum of an array over the rows of all processes is a count of the step.
"""

from collections.abc import Sequence
from functools import partial

import grain
import numpy as np
from absl import flags

from jaxchat.config import UserError
from jaxchat.data.encode import Reader
from jaxchat.data.order import Division
from jaxchat.data.packing import PACKINGS

EMPTY_IN_A_ROW = 10_000  # more consecutive empty documents than this are an error


class StreamRows(grain.IterDataset):
    """For each training step, yield what each stream's packer returns: {stream: {"rows", "totals", "state"}}.

    make: builds the packer of a stream.
    states: {stream: state of its packer} from which to resume. Other streams start at their beginning.
    Grain divides `streams` among its workers by calling set_slice.
    """

    def __init__(self, read: Reader, division: Division, make, streams: Sequence[int], states: dict):
        super().__init__()
        self.read, self.division, self.make, self.streams, self.states = read, division, make, streams, states

    def set_slice(self, part: slice, sequential_slice: bool = False):
        self.streams = self.streams[part]

    def __iter__(self):
        return _StreamRowsIterator(self)


class _StreamRowsIterator(grain.DatasetIterator):
    def __init__(self, rows: StreamRows):
        super().__init__()
        self._p = rows
        self._streams = {
            n: rows.make(rows.division.size(n), state=rows.states.get(str(n))) for n in rows.streams
        }

    def __next__(self):
        self._fill()
        made = self._streams.items()
        return {n: {"rows": s.rows(), "totals": s.totals(), "state": s.state()} for n, s in made}

    def _fill(self):
        fruitless = 0
        while True:
            wanted = {n: list(stream.wanted()) for n, stream in self._streams.items()}
            sources = [self._p.division.index(n, place) for n, places in wanted.items() for place in places]
            if not sources:
                return
            documents = [ids for ids, _ in self._p.read(sources)]
            fruitless = 0 if any(map(len, documents)) else fruitless + len(documents)
            if fruitless > EMPTY_IN_A_ROW:
                raise UserError(f"the last {fruitless:,} documents read are empty; give data that holds text")
            for n, places in wanted.items():
                if places:
                    self._streams[n].add(documents[: len(places)])
                    documents = documents[len(places) :]

    def get_state(self):  # __next__ returns the streams' states
        return {}

    def set_state(self, state):
        raise NotImplementedError("make a new StreamRows from the states")


class PackedRows(grain.IterDataset):
    """Iterate endlessly over one process's batches of packed documents.

    A batch is {inputs, targets, weights[, segments]}, each [A, B, T], and totals. A is micro_batches. B is
    the number of this process's rows in a micro-batch. T is time.
    once: read every document only once. After the last one, all targets have weight 0.
    share: (first, end) of this process's rows in a micro-batch; None: all rows.
    workers: number of subprocesses that tokenize; 0: use threads of this process.
    """

    def __init__(
        self,
        read: Reader,
        division: Division,
        *,
        micro_batches,
        time,
        packing="stream",
        once=False,
        share=None,
        workers=0,
    ):
        super().__init__()
        self.read, self.division, self.micro_batches = read, division, micro_batches
        first, end = share or (0, division.streams * division.rows_per_stream // micro_batches)
        self.rows = (first * micro_batches, end * micro_batches)  # of the step; see as_batch
        self.streams = division.streams_of_rows(*self.rows)
        self.workers = min(workers, len(self.streams))
        self.make = partial(PACKINGS[packing], time=time, rows=division.rows_per_stream, once=once)

    def __iter__(self):
        return _PackedRowsIterator(self)


class _PackedRowsIterator(grain.DatasetIterator):
    """Iterator of PackedRows. Its state is {stream: state of its packer}, or {} before the first batch."""

    def __init__(self, packing: PackedRows):
        super().__init__()
        self._p = packing
        self._parts = None
        self._state: dict[str, list[int]] = {}

    def get_state(self):
        return dict(self._state)

    def set_state(self, state):
        """Resume from {stream: state}, which holds all streams of the step, or only those of this process."""
        own = [str(n) for n in self._p.streams]
        if state and len(state) != self._p.division.streams and [*state] != own:
            raise ValueError(f"a state of {len(state)} streams for a step of {self._p.division.streams}")
        self._stop()
        self._state = {name: state[name] for name in own if state}

    def close(self):
        super().close()
        self._stop()

    def _start(self):
        p = self._p
        rows = StreamRows(p.read, p.division, p.make, p.streams, self._state)
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
        per_stream = p.division.rows_per_stream
        for name in totals:  # a stream's first row holds its counts
            totals[name][::per_stream] = [of[name] for of in counts]
        # Every row holds `left`, so that a process without a stream's first row need not wait for the sum.
        totals["left"] = np.repeat(totals["left"][::per_stream], per_stream)
        first = p.streams[0] * per_stream  # the end streams may be shared with other processes
        mine = slice(p.rows[0] - first, p.rows[1] - first)
        return as_batch(rows, totals, mine, p.micro_batches)


def as_batch(rows: dict[str, np.ndarray], totals: dict[str, np.ndarray], mine: slice, micro_batches: int):
    """Return the rows `mine` of arrays [rows, …] as a batch of arrays [A, B, …], where A is micro_batches.

    Row r of `mine` becomes row r // A of micro-batch r % A. The entry "totals" of the batch holds `totals`.
    """

    def split(a):
        return np.ascontiguousarray(a[mine].reshape(-1, micro_batches, *a.shape[1:]).swapaxes(0, 1))

    batch = {name: split(a) for name, a in rows.items()}
    return batch | {"totals": {name: split(a) for name, a in totals.items()}}
