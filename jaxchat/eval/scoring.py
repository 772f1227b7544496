"""Score lists of tokens in batches: the loss of given tokens, or the most probable of several next tokens.

A batch holds lists of similar length, and is sharded over the devices of all processes. The lists are padded
to one of a few lengths, since each shape of a batch must be compiled.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxchat import sharding
from jaxchat.config import Model, UserError
from jaxchat.files import duration
from jaxchat.model.gpt import features, logits
from jaxchat.model.params import Params
from jaxchat.sharding import ROWS
from jaxchat.train.loss import Chunking, chunk_nll, pad_time

SHORTEST = 32  # shortest length that rows are padded to, in tokens
LONGER = 4  # longest row, in multiples of the trained context; rotary positions continue beyond it
CANDIDATES = 16  # most candidates per row


@dataclasses.dataclass(frozen=True)
class Span:
    """A list of tokens, of which tokens[start:end] are scored, each given all tokens before it. start ≥ 1."""

    tokens: np.ndarray  # int32
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class Score:
    """For each token of a span, its loss in nats (`nll`) and whether it was the most probable (`right`)."""

    nll: np.ndarray  # float32
    right: np.ndarray  # bool

    @property
    def loss(self) -> float:
        """Mean loss per token in nats, or inf for an empty span."""
        # In float64, so that equal losses tie exactly.
        return float(self.nll.mean(dtype=np.float64)) if len(self.nll) else float("inf")


def buckets(sequence_len: int) -> list[int]:
    """Return the padded lengths of rows: powers of two below the context, then 1, 2 and 4 × the context."""
    lengths = [SHORTEST << i for i in range(sequence_len.bit_length()) if SHORTEST << i < sequence_len]
    return [*lengths, *(sequence_len << i for i in range(LONGER.bit_length()))]


@partial(jax.jit, static_argnames="model")
def span_losses(params, tokens_BT, first, last, model: Model):
    """Return nll_BT, the loss of the token after each position, and right_BT, whether it is most probable.

    Only chunks of positions that overlap with first ≤ t < last are computed. Elsewhere, both results are 0.
    """
    x_BTD = features(params, tokens_BT, model.config, model.compute)
    head_DV, targets_BT = params.lm_head.astype(x_BTD.dtype), jnp.roll(tokens_BT, -1, axis=1)
    score = partial(_score_chunks, chunking=Chunking.of(*tokens_BT.shape, model.config, model.compute))
    in_specs = (P(ROWS), P(None, "tensor"), P(ROWS), P(), P())
    score = sharding.per_device(score, model.mesh, in_specs, (P(ROWS), P(ROWS)))
    found = score(x_BTD, head_DV, targets_BT, first, last)
    return lax.with_sharding_constraint(found, NamedSharding(model.mesh, P()))


def _score_chunks(x_BTD, head_DV, targets_BT, first, last, chunking: Chunking):
    t, time = chunking.length, targets_BT.shape[1]
    x_BTD, targets_BT = pad_time(t, x_BTD), pad_time(t, targets_BT)

    def add_chunk(i, found):
        x_BtD, targets_Bt = (lax.dynamic_slice_in_dim(a, i * t, t, axis=1) for a in (x_BTD, targets_BT))
        z_BtV, ids_Bt, nll_Bt = chunk_nll(x_BtD, head_DV, targets_Bt, chunking)
        likeliest_Bt = jnp.argmax(z_BtV, axis=-1)
        if chunking.sharded:  # among devices that have the largest logit, the lowest id wins
            largest_Bt = jnp.max(z_BtV, axis=-1)
            has_it_Bt = largest_Bt == lax.pmax(largest_Bt, "tensor")
            mine_Bt = jnp.where(has_it_Bt, likeliest_Bt - ids_Bt + targets_Bt, 2**30)
            likeliest_Bt = lax.pmin(mine_Bt, "tensor")
        return tuple(
            lax.dynamic_update_slice_in_dim(whole, part, i * t, axis=1)
            for whole, part in zip(found, (nll_Bt, likeliest_Bt == targets_Bt), strict=True)
        )

    nothing = (jnp.zeros(targets_BT.shape), jnp.zeros(targets_BT.shape, bool))
    return tuple(a[:, :time] for a in lax.fori_loop(first // t, -(-last // t), add_chunk, nothing))


@partial(jax.jit, static_argnames="model")
def last_logits(params, tokens_BT, lengths_B, candidates_BC, model: Model):
    """Return the logits of the token ids candidates_BC after the first lengths_B tokens of each row."""
    x_BTD = features(params, tokens_BT, model.config, model.compute)
    last_BD = jnp.take_along_axis(x_BTD, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
    all_BV = logits(params.lm_head, last_BD, model.config.softcap)
    found_BC = jnp.take_along_axis(all_BV, candidates_BC, axis=1)
    return lax.with_sharding_constraint(found_BC, NamedSharding(model.mesh, P()))


class Scorer:
    """Score token lists with a model: the loss of given tokens, or the most probable of several next tokens.

    All processes must pass the same lists, and all get all results. quiet: print no progress.
    device_tokens: maximum number of tokens per device in a batch; None: a default.
    """

    def __init__(
        self, params: Params, model: Model, *, device_tokens: int | None = None, quiet: bool = False
    ):
        self.params, self.model, self.quiet = params, model, quiet
        self.title = ""  # prefix of progress lines
        on_cpu = model.mesh.devices.flat[0].platform == "cpu"
        self.device_tokens = device_tokens or (4096 if on_cpu else 65536)

    @property
    def longest(self) -> int:
        """Largest number of tokens in a list that the method `spans` scores without cutting it."""
        return LONGER * self.model.config.sequence_len

    def spans(self, spans: list[Span]) -> list[Score]:
        """Return the score of each span. A list of more than `longest` tokens is cut at its start."""
        scores = [None] * len(spans)
        rows, bounds = [], []
        for span in spans:
            cut = max(0, len(span.tokens) - self.longest)
            rows.append(span.tokens[cut:])
            bounds.append((max(1, span.start - cut), max(1, span.end - cut)))

        def losses(chosen, tokens_BT):
            first, last = min(bounds[r][0] for r in chosen) - 1, max(bounds[r][1] for r in chosen) - 1
            placed, ends = self._place(tokens_BT), (np.int32(first), np.int32(last))
            return span_losses(self.params, placed, *ends, self.model)

        for chosen, (nll_BT, right_BT) in self._run(rows, losses):
            for b, r in enumerate(chosen):
                part = slice(bounds[r][0] - 1, bounds[r][1] - 1)
                scores[r] = Score(nll_BT[b, part], right_BT[b, part])
        return scores

    def choose(self, prompts: list[list[int]], candidates: list[list[int]]) -> list[int]:
        """Return, for each prompt, the index of the candidate that is the most probable next token.

        candidates: token ids for each prompt. Prompts longer than the model's context are cut at their start.
        """
        rows = [np.array(prompt[-self.model.config.sequence_len :], np.int32) for prompt in prompts]
        answers = [0] * len(rows)

        def logits_of(chosen, tokens_BT):
            lengths_B = np.ones(len(tokens_BT), np.int32)
            candidates_BC = np.zeros((len(tokens_BT), CANDIDATES), np.int32)
            for b, r in enumerate(chosen):
                lengths_B[b], candidates_BC[b, : len(candidates[r])] = len(rows[r]), candidates[r]
            placed = (self._place(array) for array in (tokens_BT, lengths_B, candidates_BC))
            return last_logits(self.params, *placed, self.model)

        for chosen, logits_BC in self._run(rows, logits_of):
            for b, r in enumerate(chosen):
                answers[r] = int(np.argmax(logits_BC[b, : len(candidates[r])]))
        return answers

    def _place(self, array: np.ndarray) -> jax.Array:
        return sharding.place_same(array, self.model.mesh)

    def _run(self, rows: list[np.ndarray], call: Callable) -> Iterator[tuple[list[int], Any]]:
        """Yield (row indices, call(row indices, tokens_BT)) for each batch; compute one batch ahead."""
        total, pending = sum(map(len, rows)), None
        progress = Progress(total, f"{self.title}scored", quiet=self.quiet)
        for batch in chain(self._batches(rows), [None]):
            running = batch and (batch[0], call(*batch))
            if pending:
                yield pending[0], jax.device_get(pending[1])
                progress.add(sum(len(rows[r]) for r in pending[0]))
            pending = running

    def _batches(self, rows: list[np.ndarray]) -> Iterator[tuple[list[int], np.ndarray]]:
        """Yield batches as (indices of their rows, tokens_BT padded at the end), the longest rows first."""
        left = sorted(range(len(rows)), key=lambda r: -len(rows[r]))
        shards = sharding.data_shards(self.model.mesh)
        while left:
            length = next(n for n in buckets(self.model.config.sequence_len) if n >= len(rows[left[0]]))
            batch = shards * max(1, self.device_tokens // length)
            chosen, left = left[:batch], left[batch:]
            tokens_BT = np.zeros((batch, length), np.int32)
            for b, r in enumerate(chosen):
                tokens_BT[b, : len(rows[r])] = rows[r]
            yield chosen, tokens_BT


@contextlib.contextmanager
def out_of_memory(remedy: str):
    """Turn a device's out-of-memory error in a `with` block into a UserError that ends in `remedy`."""
    try:
        yield
    except jax.errors.JaxRuntimeError as problem:
        if "RESOURCE_EXHAUSTED" not in str(problem):
            raise
        raise UserError(f"the devices' memory is full; {remedy}") from problem


class Progress:
    """Print progress and the estimated remaining time on process 0, at most every five seconds."""

    def __init__(self, total: int, done: str, *, quiet: bool = False):
        self._total, self._word, self._quiet = total, done, quiet or jax.process_index() > 0
        self._done, self._began = 0, time.perf_counter()
        self._shown = self._began

    def add(self, amount: int):
        self._done += amount
        now = time.perf_counter()
        if self._quiet or now - self._shown < 5 or not 0 < self._done < self._total:
            return
        self._shown = now
        eta = (now - self._began) / self._done * (self._total - self._done)
        print(f"  {self._word} {self._done / self._total:.0%}  ETA {duration(eta)}", flush=True)
