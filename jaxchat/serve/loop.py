"""Threads that run engines, and the classes through which the event loop uses them.

Only one thread uses an engine. The event loop sends requests to the thread through a queue. After each step
of the engine, which decodes a few tokens in every row, the thread passes all new tokens to the event loop by
`call_soon_threadsafe`. The event loop never waits for a thread.
"""

import asyncio
import contextlib
import dataclasses
import queue
import threading
import time
import traceback
from collections.abc import Callable

from jaxchat.infer.scheduler import CANCELLED, MAX_DECODE_STEPS, Generation, Request
from jaxchat.serve.metrics import Metrics
from jaxchat.serve.protocol import ApiError

# Maximum seconds of an engine's step: LOW_LATENCY_SECONDS while any row needs low latency, else STEP_SECONDS.
# A cancelled row may keep its slot, and a new row may wait, for that long. Sending tokens takes time for each
# row, so the low-latency maximum grows in proportion to the rows that need it, above LOW_LATENCY_ROWS.
LOW_LATENCY_SECONDS, STEP_SECONDS = 0.04, 0.25
LOW_LATENCY_ROWS = 16

clock = time.perf_counter


class Stopped(Exception):
    """Job.new_tokens can return no more tokens: the server is stopping, or an engine has failed."""


@dataclasses.dataclass(eq=False)
class Row:
    """One answer to generate, and its progress. Times are seconds of time.perf_counter, and 0 until known."""

    request: Request
    index: int  # number of the answer in its job
    low_latency: bool  # return new tokens often: the reply is streamed, or searched for stop strings
    job: "Job"
    worker: "Worker"
    asked: float  # time when the answer was requested
    began: float = 0.0  # start of the engine's step that returned the first event
    first: float = 0.0  # time when the first token arrived
    last: float = 0.0  # time when the latest token arrived
    num_tokens: int = 0  # tokens so far, including the calculator's
    ended: bool = False  # ended or cancelled
    id: int = -1  # the request's id in the engine; used by the engine's thread only


class Worker(threading.Thread):
    """A thread that runs one engine. Its public methods, except `run`, are for the event loop."""

    def __init__(self, open_engine: Callable, slots: int, metrics: Metrics, model: str):
        """Create the thread without starting it. Call this in the event loop.

        open_engine(on_progress): called in the thread. Returns a context manager that compiles the engine's
        programs and yields the engine. While compiling, it calls on_progress(number compiled, total number).
        slots: number of slots of the engine. model: the model's name, for metrics.
        """
        super().__init__(name=f"engine of {model}", daemon=True)
        self._open, self.slots, self._metrics, self._model = open_engine, slots, metrics, model
        self._loop = asyncio.get_running_loop()
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()
        self._token_seconds = 0.01  # estimated seconds to decode one token of every row
        self._begun: set[int] = set()  # ids of rows that have a slot
        self.ready: asyncio.Future = self._loop.create_future()  # the engine, or the error of opening it
        self.compiled, self.to_compile = 0, 0  # numbers of shapes
        self.failed: BaseException | None = None  # exception that ended the thread
        self.live: set[Row] = set()  # rows that have not ended; used by the event loop only

    def submit(self, row: Row):
        self.live.add(row)
        self._inbox.put(("submit", row))

    def cancel(self, row: Row):
        self._inbox.put(("cancel", row))

    def stop(self):
        """Ask the thread to end after the engine's current step."""
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
        while self._process_messages(engine, rows):
            began = clock()
            events = engine.step(self._decode_steps(rows))
            ended = clock()
            outputs = [(rows[id], new) for id, new in events]
            self._update_token_seconds(outputs, ended - began)
            for id, new in events:
                self._begun.add(id)
                if new.finish:
                    self._begun.discard(rows.pop(id).id)
            self._call(self._deliver, outputs, began, ended)

    def _process_messages(self, engine, rows: dict[int, Row]) -> bool:
        """Submit and cancel rows as the event loop's messages say. Return False if the thread must stop.

        If the engine has no requests, wait for a message. rows: {request id: Row}; submitted rows are added.
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

    def _decode_steps(self, rows: dict[int, Row]) -> int:
        if len(self._begun) < min(len(rows), self.slots):
            return 1  # each step prefills one batch of prompts, and there are free slots for more
        count, seconds = sum(row.low_latency for row in rows.values()), STEP_SECONDS
        if count:
            seconds = min(STEP_SECONDS, LOW_LATENCY_SECONDS * max(1, count / LOW_LATENCY_ROWS))
        return max(1, min(MAX_DECODE_STEPS, int(seconds / self._token_seconds)))

    def _update_token_seconds(self, outputs: list[tuple[Row, Generation]], seconds: float):
        """Update the estimated seconds per token, unless the engine's step prefilled a prompt.

        outputs: new tokens of the step. seconds: duration of the step.
        """
        tokens = max((len(new.tokens) + bool(new.end) for _, new in outputs), default=0)
        if tokens and all(row.id in self._begun for row, _ in outputs):
            self._token_seconds += 0.3 * (seconds / tokens - self._token_seconds)

    def _call(self, function: Callable, *args):
        with contextlib.suppress(RuntimeError):  # the event loop is closed, so nobody waits for this
            self._loop.call_soon_threadsafe(function, *args)

    # The methods below run in the event loop.

    def _set_ready(self, engine):
        if not self.ready.done():
            self.ready.set_result(engine)

    def _deliver(self, outputs: list[tuple[Row, Generation]], began: float, ended: float):
        for row, new in outputs:
            row.began = row.began or began
            if new.tokens:
                self._metrics.tokens(self._model, row, len(new.tokens), ended)
                row.first, row.last = row.first or ended, ended
                row.num_tokens += len(new.tokens)
            if new.finish:
                row.ended, row.last = True, row.last or ended
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
        self._queue: asyncio.Queue = asyncio.Queue()

    def put(self, row: Row, new: Generation):
        if new.finish != CANCELLED:
            self._queue.put_nowait((row, new))

    def stop(self, why: str):
        """End the job with an error: new_tokens will raise Stopped(why)."""
        self._queue.put_nowait(Stopped(why))

    async def new_tokens(self, timeout: float | None = None) -> list[tuple[Row, Generation]]:
        """Wait for new tokens and return them as (Row, Generation) pairs, or [] after `timeout` seconds.

        Raises Stopped if the server stops or an engine has failed.
        """
        try:
            async with asyncio.timeout(timeout):
                found = [await self._queue.get()]
        except TimeoutError:
            return []
        while not self._queue.empty():
            found.append(self._queue.get_nowait())
        for one in found:
            if isinstance(one, Stopped):
                raise one
        return found

    def cancel(self):
        """Cancel all answers. The engines free the slots after their current step."""
        for row in self.rows:
            self.cancel_row(row)

    def cancel_row(self, row: Row):
        if not row.ended:
            row.ended = True
            row.worker.cancel(row)


class Pool:
    """The engines of one model, one for each device. A new answer goes to the least busy engine."""

    def __init__(self, workers: list[Worker], context: int, max_waiting: int):
        """Create a Pool of `workers`. context: maximum number of tokens of prompt and answer together.

        max_waiting: maximum number of answers that wait for a slot.
        """
        self.workers, self._max_waiting = workers, max_waiting
        self._seconds = 1.0  # average seconds that an answer occupies its slot
        self.positions = self.slots * context  # of all caches together

    @property
    def slots(self) -> int:
        return sum(worker.slots for worker in self.workers)

    @property
    def live(self) -> list[Row]:
        return [row for worker in self.workers for row in worker.live]

    @property
    def failed(self) -> bool:
        return any(worker.failed for worker in self.workers)

    def submit(self, requests: list[Request], low_latency: bool) -> Job:
        """Queue `requests`, one for each answer, and return their Job.

        low_latency: return new tokens about every 40 ms, to stream them or to search for stop strings.
        Raises ApiError if too many answers are running or waiting, or if an engine has failed.
        """
        if self.failed:
            raise ApiError(500, "the engine failed; the server's log says why")
        most, rows = self.slots + self._max_waiting, len(self.live)
        if len(requests) > most:
            message = f"{len(requests)} answers at once; this model takes at most {most}"
            raise ApiError(400, message, param="n")
        if rows + len(requests) > most:
            message = f"{rows} answers are running or waiting; this model takes at most {most}"
            raise ApiError(429, message, code="rate_limit_exceeded", retry=self._retry())
        job, now = Job(), clock()
        for index, request in enumerate(requests):
            worker = min(self.workers, key=lambda worker: len(worker.live))
            row = Row(request, index, low_latency, job, worker, now)
            job.rows.append(row)
            worker.submit(row)
        return job

    def record_duration(self, seconds: float):
        """Update the average duration of answers with an answer that occupied its slot for `seconds`."""
        self._seconds += 0.1 * (seconds - self._seconds)

    def _retry(self) -> int:
        """Return seconds for Retry-After, 1 to 60: estimated time until half of a full queue has begun."""
        return max(1, min(60, round(self._seconds * self._max_waiting / self.slots / 2)))
