"""Generation with continuous batching, a key/value cache and the calculator.

Each device has a fixed number of slots, each for one request. `Engine.step` prefills waiting prompts into
free slots and then decodes up to 64 tokens in all slots. Then the host collects the new tokens, inserts
("forces") the calculator's results into the rows that called the calculator, and frees slots of ended rows.

The shape of a prefill batch depends on the length of its prompts alone, and all slots are decoded in one
shape. Therefore few shapes are compiled, and the tokens of a request do not depend on other requests.
Each device has a full copy of the weights, and devices do not communicate.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxchat.config import Compute, ModelConfig, UserError
from jaxchat.infer.calculator import calculate
from jaxchat.infer.decode import (
    FORCED,
    DecodeInputs,
    DecodeOutputs,
    Program,
    Prompts,
    Scores,
    State,
    decode,
    empty_rows,
    empty_state,
    for_decoding,
    read_prompts,
    resize,
)  # fmt: skip
from jaxchat.infer.sampling import FILTERED, GREEDY, PLAIN, Rows
from jaxchat.infer.scheduler import (
    CANCELLED,
    COLDEST,
    LENGTH,
    MAX_DECODE_STEPS,
    MAX_LOGPROBS,
    STOP,
    Event,
    Generation,
    Request,
    Scheduler,
    bucket,
)
from jaxchat.infer.text import last_call
from jaxchat.model.attention_cpu import SLOT_BLOCK
from jaxchat.model.params import Params
from jaxchat.sharding import gather_json

STREAM_DECODE_STEPS = 4  # for `stream`: few steps, so that the tokens appear smoothly
SHORTEST_CACHE = 256  # positions of the shortest cache; longer rows get the next power of two
TOPS = (0, 5, MAX_LOGPROBS)  # numbers of alternatives computed with each token; requests are rounded up


@dataclasses.dataclass
class Running:
    """A request that runs in a slot, and the tokens decoded for it so far."""

    request: Request
    slot: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    forced: list[int] = dataclasses.field(default_factory=list)  # tool tokens still to be inserted


class Engine:
    """Text generator of one model, with continuous batching."""

    def __init__(
        self,
        params: Params,
        config: ModelConfig,
        tokenizer,
        compute: Compute | None = None,
        *,
        batch_size: int = 64,
        few_shapes: bool = False,
    ):
        """Create an engine that uses the devices of this process in compute.mesh.

        batch_size: number of requests that each device runs at a time.
        few_shapes: use few array shapes, so that a server can compile all of them in advance. For this, the
        cache always has the context's length, and log-probabilities are always computed with 20 alternatives.
        """
        self.config, self.tokenizer, self.batch_size = config, tokenizer, batch_size
        self.compute = compute or Compute.for_backend()
        mesh, own = self.compute.mesh, None
        self._mesh = None if mesh is None or mesh.size == 1 else mesh
        if self._mesh is not None:
            own = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
            own = Mesh(np.array(own), ("rows",))
        special = tokenizer.special
        one_device = dataclasses.replace(self.compute, mesh=None)
        single_row = batch_size == 1 and one_device.kernels and config.plain
        self._program = Program(config, one_device, own, special("<|python_end|>"), single_row)
        self._ends = (special("<|assistant_end|>"), special("<|bos|>"))
        self._full_cache = -(-config.sequence_len // SLOT_BLOCK) * SLOT_BLOCK
        self._shortest_cache = self._full_cache if few_shapes else min(SHORTEST_CACHE, self._full_cache)
        self._few_shapes, self._tops = few_shapes, TOPS[-1:] if few_shapes else TOPS
        devices, prefill_batch = 1 if own is None else own.size, max(1, batch_size // 8)
        self._scheduler = Scheduler(
            config.sequence_len, slots=batch_size, prefill_batch=prefill_batch, devices=devices
        )
        self._running: dict[int, Running] = {}
        self._events: list[Event] = []  # not yet returned by `step`
        self._state: State | None = None
        self._positions = 0  # positions of each row in the cache
        self.load(params)

    def load(self, params: Params):
        """Replace the weights without recompiling. Running requests continue with the new weights.

        All processes must call `load`, because it gathers sharded weights.
        """
        self._params = None  # the old ones' memory is free for the new ones
        dtype = self.compute.dtype
        if self._mesh is None:
            self._params = for_decoding(params, dtype, self.config.vocab_size, self._program.single_row)
            return
        everywhere = NamedSharding(self._mesh, P())
        if jax.tree.leaves(params)[0].sharding.device_set != everywhere.device_set:
            params = jax.device_put(params, everywhere)
        here = NamedSharding(self._program.mesh, P())

        @partial(jax.jit, out_shardings=everywhere)
        def prepare(params):
            params = params.replace(wte=params.wte.astype(dtype))
            return for_decoding(params, dtype, self.config.vocab_size, self._program.single_row)

        def own(array):
            shards = [shard.data for shard in array.addressable_shards]
            return jax.make_array_from_single_device_arrays(array.shape, here, shards)

        self._params = jax.tree.map(own, prepare(params))

    def generate(
        self,
        prompts: list[list[int]],
        *,
        num_samples: int = 1,
        on_progress: Callable[[int], None] = lambda finished: None,
        **settings,
    ) -> list[Generation]:
        """Generate num_samples continuations of every prompt. Return them in a flat list, grouped by prompt.

        settings: fields of Request. Request.sample defaults to the continuation's index in the list.
        on_progress: called when a continuation gets new tokens or ends, with 1 if it has ended, else with 0.
        All processes must call `generate` with the same arguments. Each process generates a part of the
        continuations and returns all of them.
        """
        rows = [prompt for prompt in prompts for _ in range(num_samples)]
        mine = range(jax.process_index(), len(rows), jax.process_count())
        # The longest prompts first, so that slow rows don't begin last.
        order = sorted(mine, key=lambda i: -len(rows[i]))
        found = dict.fromkeys(mine)
        for i, generation in self._run_requests(
            {i: Request(prompt=rows[i], **({"sample": i} | settings)) for i in order},
            MAX_DECODE_STEPS,
            full_batches=True,
        ):
            found[i] = found[i] or Generation()
            found[i].extend(generation)
            on_progress(bool(generation.finish))
        return [found[i] for i in range(len(rows))] if jax.process_count() == 1 else _gather(found, len(rows))

    def stream(self, prompt: list[int], **settings) -> Iterator[tuple[int, bool]]:
        """Generate one continuation. Yield (token, whether the calculator wrote it) as tokens are decoded."""
        request = Request(prompt=prompt, **settings)
        for _, new in self._run_requests({0: request}, STREAM_DECODE_STEPS, full_batches=False):
            yield from zip(new.tokens, new.forced, strict=True)

    def _run_requests(self, requests: dict[int, Request], decode_steps: int, full_batches: bool):
        """Run `requests`, {number: Request}. Yield (number, Generation of new tokens) until all have ended.

        If the iterator is closed early, cancel the remaining requests. Pass the other arguments to `step`.
        """
        if self.busy:
            raise RuntimeError("generate and stream need an engine without other requests")
        ids = {}
        try:
            for number, request in requests.items():
                ids[self.submit(request)] = number
            while self.busy:
                for id, new in self.step(decode_steps, full_batches):
                    yield ids[id], new
        except (Exception, KeyboardInterrupt):
            # The state may have been donated to a program whose result was lost.
            self._state, self._positions = None, 0
            raise
        finally:
            for id in ids:
                self.cancel(id)
            self._events.clear()

    @property
    def busy(self) -> bool:
        """Whether any request waits, runs, or has an Event that `step` has not yet returned."""
        return bool(self._scheduler.waiting or self._running or self._events)

    def submit(self, request: Request) -> int:
        """Queue a request and return its id. Raises UserError if its prompt or stop tokens are invalid."""
        last = self.config.vocab_size - 1
        for what, tokens in (("a prompt", request.prompt), ("stop_tokens", request.stop_tokens)):
            if len(tokens) and not 0 <= min(tokens) <= max(tokens) <= last:
                raise UserError(f"{what} has a token outside this model's vocabulary, 0 to {last:,}")
        id = self._scheduler.submit(request)
        if self._scheduler.max_length(request) == len(request.prompt) and not request.prompt_logprobs:
            self._end(id, Generation(finish=LENGTH))
        return id

    def cancel(self, id: int):
        """End a request now and free its slot. Do nothing if the request has ended or is unknown."""
        if id in self._scheduler.waiting or id in self._scheduler.running:
            self._end(id, Generation(finish=CANCELLED))

    def step(self, decode_steps: int = MAX_DECODE_STEPS, full_batches: bool = False) -> list[Event]:
        """Prefill waiting prompts, decode up to `decode_steps` tokens per request, and return the new Events.

        By default, prefill at most one batch per device, so that running requests don't wait long.
        full_batches: prefill as many batches as fit, but only when enough slots are free to fill them.
        """
        while ids := self._scheduler.admit(full_batches):
            self._read(ids)
            if not full_batches:
                break
        if self._running:
            self._decode(min(decode_steps, MAX_DECODE_STEPS), full_batches)
        events, self._events = self._events, []
        return events

    def _end(self, id: int, last: Generation):
        self._scheduler.remove(id)
        self._running.pop(id, None)
        self._events.append(Event(id, last))

    def _read(self, ids: list[int]):
        """Prefill the prompts of the requests `ids`, to which Scheduler.admit has just given slots."""
        scheduler, prefill_batch = self._scheduler, self._scheduler.prefill_batch
        self._fit_cache(scheduler.max_running_length())
        requests = [scheduler.running[id] for id in ids]
        length = scheduler.padded_length(requests[0])
        count = prefill_batch * scheduler.devices
        tokens_PT, lengths_P = np.zeros((count, length), np.int32), np.ones(count, np.int32)
        slots_P, rows = np.full(count, self.batch_size, np.int32), empty_rows(count, self.config.vocab_size)
        places, used = [], [0] * scheduler.devices
        for id, request in zip(ids, requests, strict=True):
            device, slot = divmod(scheduler.slot_of[id], self.batch_size)
            p = device * prefill_batch + used[device]
            used[device] += 1
            places.append(p)
            lengths_P[p], slots_P[p] = len(request.prompt), slot
            tokens_PT[p, : len(request.prompt)] = request.prompt
            self._write_settings(rows, p, request)
            self._running[id] = Running(request, scheduler.slot_of[id])
            if request.tool and request.prompt[-1] == self._program.call:
                self._running[id].forced = self._tool_result([*request.prompt])
        tops = [request.logprobs for request in requests if request.prompt_logprobs]
        top = self._top(tops)
        prompts = Prompts(tokens_PT, lengths_P, slots_P, rows)
        self._state, scores = read_prompts(self._program, self._params, self._state, prompts, top)
        scores = jax.device_get(scores)
        for id, request, p in zip(ids, requests, places, strict=True):
            new, n = Generation(), len(request.prompt)
            if request.prompt_logprobs:
                part = jax.tree.map(lambda a, p=p, n=n: a[p, : n - 1], scores)
                new.prompt_logprobs, new.prompt_top = _as_lists(part, request.logprobs)
            if scheduler.max_length(request) == n:
                new.finish = LENGTH
                self._end(id, new)
            elif request.prompt_logprobs:
                self._events.append(Event(id, new))

    def _write_settings(self, rows: Rows, p: int, request: Request):
        """Write the sampling settings of a request into row p of `rows`."""
        for name in ("seed", "sample", "temperature", "top_k", "top_p", "min_p"):
            getattr(rows, f"{name}_B")[p] = getattr(request, name)
        if request.temperature < COLDEST:
            rows.temperature_B[p] = 0
        rows.first_end_B[p] = min(len(request.prompt) + request.min_tokens, self.config.sequence_len)
        rows.limit_B[p] = self._scheduler.max_length(request)
        ends = [*(() if request.ignore_end else self._ends), *request.stop_tokens]
        rows.ends_BE[p, : len(ends)] = ends
        rows.tool_B[p] = request.tool

    def _fit_cache(self, longest: int):
        """Resize the key/value cache to hold rows of `longest` tokens. Shrink it only if no request runs."""
        positions = bucket(longest, self._shortest_cache, self._full_cache)
        if not self._running and positions != self._positions:
            self._state = None  # frees its memory before the next is allocated
            self._state = empty_state(self._program, self.batch_size, positions)
        elif positions > self._positions:
            self._state = resize(self._program, self._state, positions)
        else:
            return
        self._positions = positions

    def _decode(self, decode_steps: int, full_batches: bool):
        slots = self.batch_size * self._scheduler.devices
        waiting = bool(self._scheduler.waiting)
        inputs = DecodeInputs(
            active_B=np.zeros(slots, bool),
            forced_BF=np.zeros((slots, FORCED), np.int32),
            num_forced_B=np.zeros(slots, np.int32),
            max_steps=np.int32(decode_steps),
            waiting_limit=np.int32(1 if waiting and not full_batches else self._scheduler.prefill_batch),
            count_done=np.bool_(waiting),
        )
        for row in self._running.values():
            inputs.active_B[row.slot], inputs.num_forced_B[row.slot] = True, len(row.forced)
            inputs.forced_BF[row.slot, : len(row.forced)] = row.forced
        requests = [row.request for row in self._running.values()]
        tops = [request.logprobs for request in requests if request.logprobs is not None]
        kind, top = kind_of(requests), self._top(tops)
        if self._few_shapes and tops:
            kind = FILTERED  # which supports all settings
        self._state, outputs = decode(self._program, self._params, self._state, inputs, kind=kind, top=top)
        outputs = jax.device_get(outputs)
        for id, row in [*self._running.items()]:
            self._collect(id, row, jax.tree.map(lambda a, b=row.slot: a[b], outputs))

    def _top(self, wanted: list[int]) -> int | None:
        """Return the number of likeliest tokens to report: max(wanted), rounded up to a value in self._tops.

        wanted: the numbers that requests ask for. If it is empty, return None.
        """
        return next(top for top in self._tops if top >= max(wanted)) if wanted else None

    def _collect(self, id: int, row: Running, outputs: DecodeOutputs):
        """Record a request's new tokens as an Event. outputs: the request's row of `decode`'s outputs."""
        is_token_N = outputs.tokens_BN >= 0
        new = Generation(outputs.tokens_BN[is_token_N].tolist(), outputs.forced_BN[is_token_N].tolist())
        if row.request.logprobs is not None:
            part = jax.tree.map(lambda a: a[is_token_N], outputs.scores)
            new.logprobs, new.top = _as_lists(part, row.request.logprobs)
        if outputs.ended_B:
            new.forced.pop()
            new.end = new.tokens.pop(), new.logprobs.pop() if new.logprobs else None
            del new.top[len(new.tokens) :]
        row.tokens += new.tokens
        row.forced = self._tool_result(row.tokens) if outputs.called_B else row.forced[outputs.used_B :]
        if outputs.done_B:
            new.finish = STOP if outputs.ended_B else LENGTH
            self._end(id, new)
        elif new.tokens:
            self._events.append(Event(id, new))

    def _tool_result(self, tokens: list[int]) -> list[int]:
        """Evaluate the tool call at the end of `tokens`. Return the result, as tokens to insert after it.

        Return [] if the expression has no value or the result is longer than FORCED tokens.
        """
        code = last_call(tokens, self.tokenizer)
        value = None if code is None else calculate(code)
        if value is None:
            return []
        special = self.tokenizer.special
        forced = [special("<|output_start|>"), *self.tokenizer.encode(value), special("<|output_end|>")]
        return forced if len(forced) <= FORCED else []


def kind_of(requests: list[Request]) -> str:
    """Choose the cheapest kind of sampling that supports all requests: GREEDY, PLAIN or FILTERED."""
    hot = [request for request in requests if request.temperature >= COLDEST]
    filters = any(request.top_k or request.top_p < 1 or request.min_p for request in hot)
    if filters or any(request.min_tokens for request in requests):
        return FILTERED
    return PLAIN if hot else GREEDY


def _as_lists(scores: Scores, top: int) -> tuple[list[float], list[list[tuple[int, float]]]]:
    """Convert a row's Scores to a Generation's (logprobs, top). top: number of likeliest tokens to keep."""
    ids, values = scores.top_ids[:, :top].tolist(), scores.top_logprob[:, :top].tolist()
    return scores.logprob.tolist(), [list(zip(*both, strict=True)) for both in zip(ids, values, strict=True)]


def _gather(found: dict[int, Generation], count: int) -> list[Generation]:
    """Merge the {index: Generation} of all processes into a list of `count`, returned on every process."""
    every = gather_json({str(i): dataclasses.asdict(generation) for i, generation in found.items()})
    merged = {int(i): fields for part in every for i, fields in part.items()}
    return [Generation(**_tuples(merged[i])) for i in range(count)]


def _tuples(fields: dict) -> dict:
    """Restore the tuples in a Generation's fields, which JSON turned into lists."""
    pairs = {name: [[tuple(pair) for pair in at] for at in fields[name]] for name in ("top", "prompt_top")}
    return fields | pairs | {"end": fields["end"] and tuple(fields["end"])}
