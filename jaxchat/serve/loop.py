"""Threads that run engines, and the classes through which the event loop uses them.

Each engine is used by one thread only. The event loop sends requests through a queue. After each stretch
(a few tokens decoded in every row) the thread returns all new tokens by `call_soon_threadsafe`. The loop
never waits for a thread; a thread waits for the queue only when it has nothing to generate.
"""

import asyncio
import contextlib
import dataclasses
import queue
import threading
import time
import traceback
from collections.abc import Callable

from jaxchat.infer.scheduler import CANCELLED, Generation, Request
from jaxchat.serve.metrics import Metrics
from jaxchat.serve.protocol import ApiError

# Maximum seconds of a stretch: HASTY while any row is hasty, otherwise PATIENT. A cancelled row may keep its
# slot, and a new row may wait, for that long. Sending takes time for each row, so HASTY grows with the rows.
HASTY, PATIENT = 0.04, 0.25
HASTY_ROWS = 16  # hasty rows up to which HASTY holds; above, the time grows with their number
STRETCH = 64  # largest number of tokens of each row in a stretch

clock = time.perf_counter


class Stopped(Exception):
    """Raised by Job.news if no more tokens will arrive, because the server stops or an engine has failed."""


@dataclasses.dataclass(eq=False)
class Row:
    """One answer to generate, and the times of its events in seconds of `clock`; 0 before an event."""

    request: Request
    index: int  # number of the answer in its job
    hasty: bool  # the reply is streamed, or searched for stop strings
    job: "Job"
    worker: "Worker"
    asked: float  # submitted
    began: float = 0.0  # prefill began
    first: float = 0.0  # first token arrived
    last: float = 0.0  # latest token arrived
    said: int = 0  # number of tokens, the tool's included
    over: bool = False  # ended or cancelled
    id: int = -1  # in the engine; for the engine's thread alone


class Worker(threading.Thread):
    """A thread that runs one engine.

    live: the Rows (answers) that have not ended; only the event loop uses it. ready: future of the engine, or
    of the exception with which opening the engine failed. failed: exception that ended the thread, if any.
    """

    def __init__(self, open_engine: Callable, slots: int, metrics: Metrics, model: str):
        """Create a Worker in the event loop, then call `start`. slots: number of slots of the engine.

        open_engine(on_progress): called in the thread; returns a context manager that gives an engine with
        its shapes compiled. on_progress: called with the numbers of shapes compiled so far and in total.
        """
        super().__init__(name=f"engine of {model}", daemon=True)
        self._open, self.slots, self._metrics, self._model = open_engine, slots, metrics, model
        self._loop = asyncio.get_running_loop()
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()
        self._pace = 0.01  # estimated seconds to decode one token of every row
        self._begun: set[int] = set()  # ids of rows that have a slot
        self.ready: asyncio.Future = self._loop.create_future()
        self.compiled, self.to_compile = 0, 0  # numbers of shapes
        self.failed: BaseException | None = None
        self.live: set[Row] = set()

    def submit(self, row: Row):
        self.live.add(row)
        self._inbox.put(("submit", row))

    def cancel(self, row: Row):
        self._inbox.put(("cancel", row))

    def stop(self):
        """Ask the thread to end once it has decoded its current stretch of tokens."""
        self._inbox.put(("stop", None))

    # The methods below run in the thread.

    def run(self):
        try:
            with self._open(self._on_progress) as engine:
                self._call(self._set_ready, engine)
                self._work(engine)
        except BaseException as problem:
            if self.ready.done():  # else `ready` raises it
                traceback.print_exc()
            self._call(self._fail, problem)

    def _on_progress(self, done: int, total: int):
        self.compiled, self.to_compile = done, total

    def _work(self, engine):
        rows: dict[int, Row] = {}
        while self._obey(engine, rows):
            began = clock()
            events = engine.step(self._stretch(rows))
            ended = clock()
            news = [(rows[id], new) for id, new in events]
            self._measure(news, ended - began)
            for id, new in events:
                self._begun.add(id)
                if new.finish:
                    self._begun.discard(rows.pop(id).id)
            self._call(self._deliver, news, began, ended)

    def _obey(self, engine, rows: dict[int, Row]) -> bool:
        """Process the event loop's messages: submit and cancel rows, stop. Return False after "stop".

        If the engine has nothing to do, wait for a message. rows: {request id: Row}, updated.
        """
        while True:
            try:
                what, row = self._inbox.get(block=not engine.busy)
            except queue.Empty:
                return True
            if what == "stop":
                return False
            if what == "submit":
                row.id = engine.submit(row.request)
                rows[row.id] = row
            else:
                engine.cancel(row.id)

    def _stretch(self, rows: dict[int, Row]) -> int:
        if len(self._begun) < min(len(rows), self.slots):
            return 1  # each step prefills one batch of prompts, and there are free slots for more
        hasty = sum(row.hasty for row in rows.values())
        seconds = min(PATIENT, HASTY * max(1, hasty / HASTY_ROWS)) if hasty else PATIENT
        return max(1, min(STRETCH, int(seconds / self._pace)))

    def _measure(self, news: list[tuple[Row, Generation]], seconds: float):
        """Update the estimated seconds per token with a stretch of `seconds`, unless it had a prefill."""
        tokens = max((len(new.tokens) + bool(new.end) for _, new in news), default=0)
        if tokens and all(row.id in self._begun for row, _ in news):
            self._pace += 0.3 * (seconds / tokens - self._pace)

    def _call(self, function: Callable, *args):
        with contextlib.suppress(RuntimeError):  # the event loop is closed, so nobody waits for this
            self._loop.call_soon_threadsafe(function, *args)

    # The methods below run in the event loop.

    def _set_ready(self, engine):
        if not self.ready.done():
            self.ready.set_result(engine)

    def _deliver(self, news: list[tuple[Row, Generation]], began: float, ended: float):
        for row, new in news:
            row.began = row.began or began
            if new.tokens:
                self._metrics.tokens(self._model, row, len(new.tokens), ended)
                row.first, row.last, row.said = row.first or ended, ended, row.said + len(new.tokens)
            if new.finish:
                row.over, row.last = True, row.last or ended
                self.live.discard(row)
            row.job.put(row, new)

    def _fail(self, problem: BaseException):
        self.failed = problem
        if not self.ready.done():
            self.ready.set_exception(problem)
        for job in {row.job for row in self.live}:
            job.stop("the engine failed; the server's log says why")
        self.live.clear()


class Job:
    """The rows (answers) of one HTTP request, and a queue of their new tokens."""

    def __init__(self):
        self.rows: list[Row] = []
        self._news: asyncio.Queue = asyncio.Queue()

    def put(self, row: Row, new: Generation):
        if new.finish != CANCELLED:
            self._news.put_nowait((row, new))

    def stop(self, why: str):
        """End the job with an error: `news` will raise Stopped(why)."""
        self._news.put_nowait(Stopped(why))

    async def news(self, seconds: float | None = None) -> list[tuple[Row, Generation]]:
        """Wait for new tokens and return them as (Row, Generation) pairs; [] if none arrive within `seconds`.

        Stopped: the server stops or an engine has failed.
        """
        try:
            async with asyncio.timeout(seconds):
                found = [await self._news.get()]
        except TimeoutError:
            return []
        while not self._news.empty():
            found.append(self._news.get_nowait())
        for one in found:
            if isinstance(one, Stopped):
                raise one
        return found

    def cancel(self):
        """Cancel all answers; the engines free their slots after the current stretch of tokens."""
        for row in self.rows:
            self.cancel_row(row)

    def cancel_row(self, row: Row):
        if not row.over:
            row.over = True
            row.worker.cancel(row)


class Pool:
    """The engines of one model, one for each device. A new answer goes to the least busy engine."""

    def __init__(self, workers: list[Worker], context: int, max_waiting: int):
        """context: maximum tokens of prompt and answer. max_waiting: maximum answers that wait for a slot."""
        self.workers, self._max_waiting = workers, max_waiting
        self._seconds = 1.0  # average time of an answer in its slot
        self.positions = self.slots * context  # of all caches together

    @property
    def slots(self) -> int:
        return sum(worker.slots for worker in self.workers)

    @property
    def live(self) -> list[Row]:
        """The answers of all engines that have not ended."""
        return [row for worker in self.workers for row in worker.live]

    @property
    def failed(self) -> bool:
        return any(worker.failed for worker in self.workers)

    def submit(self, requests: list[Request], hasty: bool) -> Job:
        """Queue requests, one per answer, and return their Job.

        hasty: return new tokens about every HASTY seconds, because the reply is streamed or searched for stop
        strings. ApiError: too many answers are running or waiting, or an engine has failed.
        """
        if self.failed:
            raise ApiError(500, "the engine failed; the server's log says why")
        most, rows = self.slots + self._max_waiting, len(self.live)
        if len(requests) > most:
            message = f"{len(requests)} answers at once; this server takes at most {most}"
            raise ApiError(400, message, param="n")
        if rows + len(requests) > most:
            message = f"{rows} answers are running or waiting; this server takes at most {most}"
            raise ApiError(429, message, code="rate_limit_exceeded", retry=self._retry())
        job, now = Job(), clock()
        for index, request in enumerate(requests):
            worker = min(self.workers, key=lambda worker: len(worker.live))
            row = Row(request, index, hasty, job, worker, now)
            job.rows.append(row)
            worker.submit(row)
        return job

    def took(self, seconds: float):
        """Update the average time per answer with one that occupied its slot for `seconds`."""
        self._seconds += 0.1 * (seconds - self._seconds)

    def _retry(self) -> int:
        """Estimate the seconds, 1 to 60, in which half of a full queue gets slots, for Retry-After."""
        return max(1, min(60, round(self._seconds * self._max_waiting / self.slots / 2)))
