"""Requests, and the scheduler that decides when a request begins and in which slot of which device.

A request waits, runs in a slot, and ends with an end token, at its limit, or by cancellation. Requests begin
in the order of their arrival. This module does not use JAX.
"""

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import NamedTuple

from jaxchat.config import HOTTEST, UserError

SHORTEST = 16  # tokens to which the shortest prompts are padded for prefill
MAX_DECODE_STEPS = 64  # maximum tokens that a row decodes in one call of the device
MAX_LOGPROBS = 20  # maximum number of alternatives reported with each token
COLDEST = 1e-6  # lowest temperature to sample at; far lower, logits / temperature could overflow float32
MAX_STOP_TOKENS = 6  # maximum stop tokens of a request, besides <|assistant_end|> and <|bos|>

# What ended a request.
STOP, LENGTH, CANCELLED = "stop", "length", "cancelled"


@dataclasses.dataclass(frozen=True)
class Request:
    """One continuation to generate. Creating a Request raises UserError if a field is out of range."""

    prompt: Sequence[int]
    """Token ids of the prompt, at least one."""
    max_tokens: int
    """Maximum number of generated tokens, including the calculator's. A full context ends generation too."""
    temperature: float = 1.0
    """Sampling temperature, which divides the logits; below 10⁻⁶: always take the likeliest token."""
    top_k: int = 0
    """Number of likeliest tokens to sample from; 0: all."""
    top_p: float = 1.0
    """Sample only from the likeliest tokens that together have at least this probability; 1: from all."""
    min_p: float = 0.0
    """Minimum probability of a token, as a fraction of the likeliest token's probability; 0: no minimum."""
    seed: int = 0
    """Random seed, 0 to 2³² − 1."""
    sample: int = 0
    """Number combined with the seed, so that several continuations of a prompt can differ."""
    min_tokens: int = 0
    """Minimum number of tokens to generate before an end token or stop token can be sampled."""
    stop_tokens: Sequence[int] = ()
    """Ids of tokens that end the answer, besides <|assistant_end|> and <|bos|>."""
    ignore_end: bool = False
    """Continue the answer after <|assistant_end|> or <|bos|>."""
    tool: bool = True
    """Run the calculator when the model calls it."""
    logprobs: int | None = None
    """Report log-probabilities of each token and of the `logprobs` likeliest tokens; None: report none."""
    prompt_logprobs: bool = False
    """Report the log-probabilities of the prompt's tokens too. `logprobs` must not be None."""

    def __post_init__(self):
        for name, least, most in (
            ("max_tokens", 0, math.inf),
            ("temperature", 0, HOTTEST),
            ("top_k", 0, 2**31 - 1),
            ("top_p", 0, 1),
            ("min_p", 0, 1),
            ("seed", 0, 2**32 - 1),
            ("sample", 0, 2**31 - 1),
            ("min_tokens", 0, math.inf),
        ):
            value = getattr(self, name)
            whole = name not in ("temperature", "top_p", "min_p")
            if not _is_number(value, whole):
                raise UserError(f"{name} is {value!r}; it must be a {'whole ' if whole else ''}number")
            if not least <= value <= most or value == math.inf or (name == "top_p" and value == 0):
                above = "above 0 and " if name == "top_p" else f"at least {least} and "
                bound = above + (f"at most {most}" if most < math.inf else "finite")
                raise UserError(f"{name} is {value}; it must be {bound}")
        logprobs = self.logprobs
        if logprobs is not None and not (_is_number(logprobs, True) and 0 <= logprobs <= MAX_LOGPROBS):
            raise UserError(f"logprobs is {logprobs!r}; it must be a whole number from 0 to {MAX_LOGPROBS}")
        if self.prompt_logprobs and self.logprobs is None:
            raise UserError("prompt_logprobs needs logprobs, from 0 to 20")
        if len(self.stop_tokens) > MAX_STOP_TOKENS:
            raise UserError(f"{len(self.stop_tokens)} stop tokens; at most {MAX_STOP_TOKENS} are allowed")
        for token in self.stop_tokens:
            if not (_is_number(token, True) and 0 <= token < 2**31):
                raise UserError(f"a stop token is {token!r}; it must be a token's id")


def _is_number(value, whole: bool) -> bool:
    kind = numbers.Integral if whole else numbers.Real
    return isinstance(value, kind) and not isinstance(value, bool)


@dataclasses.dataclass
class Generation:
    """Tokens generated for a request, and why it ended. In an Event, only the tokens since the last Event."""

    tokens: list[int] = dataclasses.field(default_factory=list)  # without the token that ended the request
    forced: list[bool] = dataclasses.field(default_factory=list)  # whether the tool inserted each token
    logprobs: list[float] = dataclasses.field(default_factory=list)  # of each token; [] unless requested
    # The likeliest tokens at each position, as (token, log-probability) pairs.
    top: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    finish: str = ""  # "stop" (by itself), "length" or "cancelled"; "" while unfinished
    end: tuple[int, float | None] | None = None  # the token that ended the request, and its log-probability
    prompt_logprobs: list[float] = dataclasses.field(default_factory=list)  # from the second token on
    prompt_top: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether the generation ended with an end token, not at a limit or by cancellation."""
        return self.finish == STOP

    def extend(self, more: "Generation"):
        for name in ("tokens", "forced", "logprobs", "top", "prompt_logprobs", "prompt_top"):
            getattr(self, name).extend(getattr(more, name))
        self.finish, self.end = more.finish or self.finish, more.end or self.end


class Event(NamedTuple):
    """New tokens of a request. `new.finish` says why the request ended; before its last event, it is ""."""

    id: int
    new: Generation


def bucket(n: int, smallest: int, largest: int) -> int:
    """Return the smallest power of two ≥ n, clamped to the range from `smallest` to `largest`."""
    return min(largest, max(smallest, 1 << (n - 1).bit_length()))


class Scheduler:
    """Queue of waiting requests, and assignment of slots to running requests.

    Slots are numbered across devices: with n slots per device, device d has slots d·n to (d + 1)·n − 1.
    """

    def __init__(self, sequence_len: int, *, slots: int, prefill_batch: int, devices: int = 1):
        """Create a scheduler without requests.

        slots: number of slots per device. prefill_batch: maximum prompts that a device prefills at a time.
        """
        self.sequence_len, self.slots, self.devices = sequence_len, slots, devices
        self.prefill_batch = min(prefill_batch, slots)
        self.waiting: dict[int, Request] = {}
        self.running: dict[int, Request] = {}
        self.slot_of: dict[int, int] = {}  # id -> slot of running requests
        self._next = 0

    def submit(self, request: Request) -> int:
        """Queue a request and return its id. Raises UserError if the prompt is empty or too long."""
        if not 1 <= len(request.prompt) <= self.sequence_len:
            given = f"a prompt of {len(request.prompt)} tokens"
            raise UserError(f"{given}; this model takes 1 to {self.sequence_len}")
        id, self._next = self._next, self._next + 1
        self.waiting[id] = request
        return id

    def remove(self, id: int) -> bool:
        """Remove a request and free its slot. Return False if no such request was waiting or running."""
        self.slot_of.pop(id, None)
        return (self.running.pop(id, None) or self.waiting.pop(id, None)) is not None

    def max_length(self, request: Request) -> int:
        """Return the maximum number of tokens of a request, prompt included."""
        return min(len(request.prompt) + request.max_tokens, self.sequence_len)

    def max_running_length(self) -> int:
        """Return the largest max_length of the running requests, or 0 if no request runs."""
        return max(map(self.max_length, self.running.values()), default=0)

    def padded_length(self, request: Request) -> int:
        """Return the number of tokens to which the request's prompt is padded for prefill."""
        return bucket(len(request.prompt), SHORTEST, self.sequence_len)

    def admit(self, full_batches: bool = False) -> list[int]:
        """Give slots to the oldest waiting requests, at most one prefill batch per device. Return their ids.

        All these requests have the same padded_length.
        full_batches: admit no request until enough slots are free for a full batch per device, or for all
        waiting requests. This raises throughput and delays first tokens.
        """
        free = self._free_slots()
        if full_batches and sum(map(len, free)) < min(self.prefill_batch * self.devices, len(self.waiting)):
            return []
        admitted, free_places = [], [min(self.prefill_batch, len(slots)) for slots in free]
        for id, request in self.waiting.items():
            device = max(range(self.devices), key=lambda d: (free_places[d] > 0, len(free[d]), -d))
            first = self.waiting[admitted[0]] if admitted else request
            if free_places[device] == 0 or self.padded_length(request) != self.padded_length(first):
                break
            free_places[device] -= 1
            self.slot_of[id] = free[device].pop(0)
            admitted.append(id)
        for id in admitted:
            self.running[id] = self.waiting.pop(id)
        return admitted

    def _free_slots(self) -> list[list[int]]:
        taken = set(self.slot_of.values())
        each = [range(d * self.slots, (d + 1) * self.slots) for d in range(self.devices)]
        return [[slot for slot in slots if slot not in taken] for slots in each]
