"""The compiled device programs: prefill prompts into slots, and decode tokens in all slots.

A slot holds one running request. A row is a slot's entry in an array. A decode step computes one token of
every running row. A forced token is inserted into a row instead of a sampled token.

The suffix of an array's name is its shape, in the letters of model/gpt.py and these: P prompts in a prefill
batch, N decode steps, F forced tokens, K alternatives per token, E tokens that end a row.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxchat.config import Compute, ModelConfig
from jaxchat.infer.sampling import Rows, sample
from jaxchat.infer.scheduler import MAX_DECODE_STEPS, MAX_STOP_TOKENS
from jaxchat.model import one_row
from jaxchat.model.cache import KVCache
from jaxchat.model.gpt import features_cached, features_prompt, logits
from jaxchat.model.params import Params, layers_of
from jaxchat.sharding import per_device

FORCED = 64  # maximum tokens of a tool call's result
PROMPT_CHUNK = 128  # positions of a prompt whose logits are computed at a time


@struct.dataclass
class State:
    """Device arrays of all slots: key/value cache, logits of the next token, and sampling settings."""

    cache: KVCache
    logits_BV: Any  # logits of each slot's next token, float32
    rows: Rows


@struct.dataclass
class Scores:
    """Log-probabilities of tokens and of the likeliest alternatives, before temperature, top_k and top_p."""

    logprob: Any  # [...] of the given token
    top_ids: Any  # [..., K] of the likeliest tokens
    top_logprob: Any  # [..., K] of the likeliest tokens


@struct.dataclass
class Prompts:
    """Right-padded prompts to prefill, and their slots."""

    tokens_PT: Any
    lengths_P: Any
    slots_P: Any  # beyond the last slot for an unused row, so that nothing is written
    rows: Rows


@struct.dataclass
class DecodeInputs:
    """Inputs of one `decode` call: which slots run, which tokens to insert, and when to stop decoding."""

    active_B: Any  # whether each slot has a running request
    forced_BF: Any  # tokens to force into each row, padded
    num_forced_B: Any  # number of tokens to force into each row
    max_steps: Any  # maximum number of decode steps
    waiting_limit: Any  # return once this many rows of a device wait for the host's calculator
    count_done: Any  # count finished rows and empty slots as waiting too: new requests can use their slots


@struct.dataclass
class DecodeOutputs:
    """Outputs of one `decode` call: the new tokens of each slot, and whether its request has ended."""

    tokens_BN: Any  # −1 at steps in which the row did not run; the last token may be an end token
    forced_BN: Any  # whether each token was forced
    scores: Scores | None  # [B, N]
    ended_B: Any  # whether the row sampled an end token
    done_B: Any  # whether the row ended, is at its limit, or is an empty slot
    called_B: Any  # whether the row called the calculator
    used_B: Any  # number of forced tokens that were inserted


@dataclasses.dataclass(frozen=True)
class Program:
    """Constants for which the device programs are compiled. jax.jit takes them as a static argument."""

    config: ModelConfig
    compute: Compute
    mesh: Mesh | None  # one axis, of the devices that hold slots; None: one device
    call: int  # id of the token that calls the calculator
    single_row: bool = False  # each device has one row, decoded by model/one_row.py


@partial(jax.jit, static_argnames=("program", "count", "positions"))
def empty_state(program: Program, count: int, positions: int) -> State:
    """Create the State of `count` empty slots per device, with `positions` cache positions per slot."""
    config = program.config

    def empty():
        cache = KVCache.empty(config, count, positions, jnp.dtype(program.compute.dtype))
        cache = cache.joined() if program.single_row else cache
        rows = jax.tree.map(jnp.asarray, empty_rows(count, config.vocab_size))
        return State(cache, jnp.zeros((count, config.vocab_size)), rows)

    return per_device(empty, program.mesh, (), P("rows"))()


@partial(jax.jit, static_argnames=("program", "positions"))
def resize(program: Program, state: State, positions: int) -> State:
    """Return `state` with its key/value cache resized to `positions` positions per slot."""
    resized = per_device(lambda cache: cache.resize(positions), program.mesh, (P("rows"),), P("rows"))
    return state.replace(cache=resized(state.cache))


@partial(jax.jit, static_argnames=("program", "top"), donate_argnames="state")
def read_prompts(program: Program, params, state: State, prompts: Prompts, top: int | None):
    """Prefill prompts into their slots. Return (the new State, the Scores of the prompts' tokens).

    top: number of likeliest tokens per position in the Scores; None: return None instead of Scores.
    """
    config, compute = program.config, program.compute

    def read(params, state, prompts):
        params = params.replace(blocks=tuple(one_row.by_input(w, config) for w in params.blocks))
        x_PTD, cache = features_prompt(params, prompts.tokens_PT, prompts.lengths_P, config, compute)
        cache = cache.joined() if program.single_row else cache
        last_PD = jnp.take_along_axis(x_PTD, (prompts.lengths_P - 1)[:, None, None], axis=1)[:, 0]
        last_PV = logits(params.lm_head, last_PD, config.softcap)

        def put(array, new):
            return array.at[prompts.slots_P].set(new, mode="drop")

        state = State(
            state.cache.place(cache, prompts.slots_P),
            put(state.logits_BV, last_PV),
            jax.tree.map(put, state.rows, prompts.rows),
        )
        return state, None if top is None else prompt_scores(params, x_PTD, prompts.tokens_PT, config, top)

    specs = (P(), P("rows"), P("rows"))
    return per_device(read, program.mesh, specs, P("rows"))(params, state, prompts)


def prompt_scores(params, x_PTD, tokens_PT, config: ModelConfig, top: int) -> Scores:
    """Compute Scores [P, T] of the prompts' tokens: position t has the scores of the token at position t + 1.

    The scores at a prompt's last position are meaningless. top: number of likeliest tokens per position.
    """
    count, T = tokens_PT.shape
    t = np.gcd(T, PROMPT_CHUNK)
    next_PT = jnp.roll(tokens_PT, -1, axis=1)

    def chunk(x_and_next):
        x_PtD, next_Pt = x_and_next
        return score(logits(params.lm_head, x_PtD, config.softcap), next_Pt, top)

    def split(array):  # with the axis of chunks first
        return jnp.moveaxis(array.reshape(count, T // t, t, *array.shape[2:]), 1, 0)

    found = lax.map(chunk, (split(x_PTD), split(next_PT)))
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(count, T, *a.shape[3:]), found)


def score(logits_V, token, top: int) -> Scores:
    """Compute Scores of `token` [...] and of the `top` likeliest tokens, from logits [..., V]."""
    total = jax.nn.logsumexp(logits_V, axis=-1)
    # A sum, because XLA's GPU compiler fails on take_along_axis for a single row.
    ids_V = lax.broadcasted_iota(jnp.int32, logits_V.shape, logits_V.ndim - 1)
    chosen = jnp.sum(jnp.where(ids_V == token[..., None], logits_V, 0.0), axis=-1)
    largest, ids = lax.top_k(logits_V, top)
    return Scores(chosen - total, ids, largest - total[..., None])


@partial(jax.jit, static_argnames=("program", "kind", "top"), donate_argnames="state")
def decode(program: Program, params, state: State, inputs: DecodeInputs, *, kind: str, top: int | None):
    """Decode tokens in all slots that run a request. Return (the new State, DecodeOutputs).

    Each device stops after inputs.max_steps steps, when inputs.waiting_limit of its slots wait for the host,
    or when none of its slots can continue. kind: the kind of sampling, GREEDY, PLAIN or FILTERED.
    top: number of likeliest tokens per position in the outputs' Scores; None: no Scores.
    """
    run = partial(_decode, program=program, kind=kind, top=top)
    specs = (P(), P("rows"), DecodeInputs(P("rows"), P("rows"), P("rows"), P(), P(), P()))
    return per_device(run, program.mesh, specs, P("rows"))(params, state, inputs)


def _decode(params, state: State, inputs: DecodeInputs, *, program: Program, kind: str, top: int | None):
    config, compute, rows = program.config, program.compute, state.rows
    next_features = one_row.features if program.single_row else features_cached

    def more(carry):
        i, state, outputs = carry
        waiting = jnp.sum(outputs.called_B) + jnp.where(inputs.count_done, jnp.sum(outputs.done_B), 0)
        return (
            (i < inputs.max_steps)
            & (waiting < inputs.waiting_limit)
            & ~jnp.all(outputs.done_B | outputs.called_B)
        )

    def step(carry):
        i, state, outputs = carry
        sampled_B = sample(state.logits_BV, rows, state.cache.lengths_B, kind)
        is_forced_B = outputs.used_B < inputs.num_forced_B
        is_next_BF = outputs.used_B[:, None] == jnp.arange(FORCED)[None]
        next_forced_B = jnp.sum(jnp.where(is_next_BF, inputs.forced_BF, 0), axis=1)
        token_B = jnp.where(is_forced_B, next_forced_B, sampled_B)
        active_B = ~outputs.done_B & ~outputs.called_B
        ends_B = active_B & ~is_forced_B & jnp.any(token_B[:, None] == rows.ends_BE, axis=1)
        emits_B = active_B & ~ends_B
        if top is not None:
            new = score(state.logits_BV, token_B, top)
            outputs = outputs.replace(
                scores=jax.tree.map(lambda all, one: all.at[:, i].set(one), outputs.scores, new)
            )
        counts_B = emits_B.astype(jnp.int32)
        x_BTD, cache = next_features(params, token_B[:, None], state.cache, config, compute, counts_B)
        next_BV = logits(params.lm_head, x_BTD[:, 0], config.softcap)
        outputs = outputs.replace(
            tokens_BN=outputs.tokens_BN.at[:, i].set(jnp.where(active_B, token_B, -1)),
            forced_BN=outputs.forced_BN.at[:, i].set(is_forced_B),
            ended_B=outputs.ended_B | ends_B,
            done_B=outputs.done_B | ends_B | (cache.lengths_B >= rows.limit_B),
            called_B=outputs.called_B | (emits_B & ~is_forced_B & rows.tool_B & (token_B == program.call)),
            used_B=outputs.used_B + (emits_B & is_forced_B),
        )
        state = state.replace(cache=cache, logits_BV=jnp.where(emits_B[:, None], next_BV, state.logits_BV))
        return i + 1, state, outputs

    # Rows that don't run get length 0, so that attention need not read their keys and values.
    lengths_B = jnp.where(inputs.active_B, state.cache.lengths_B, 0)
    state = state.replace(cache=state.cache.replace(lengths_B=lengths_B))
    outputs = empty_outputs(inputs, top)
    _, state, outputs = lax.while_loop(more, step, (jnp.zeros((), jnp.int32), state, outputs))
    return state, outputs


def empty_outputs(inputs: DecodeInputs, top: int | None) -> DecodeOutputs:
    """Create DecodeOutputs without tokens. top: number of likeliest tokens in Scores; None: no Scores."""
    zeros_BN = jnp.zeros((len(inputs.active_B), MAX_DECODE_STEPS))
    scores = None
    if top is not None:
        zeros_BNK = jnp.zeros((*zeros_BN.shape, top))
        scores = Scores(zeros_BN, zeros_BNK.astype(jnp.int32), zeros_BNK)
    none_B = jnp.zeros(len(zeros_BN), bool)
    return DecodeOutputs(
        tokens_BN=jnp.full(zeros_BN.shape, -1),
        forced_BN=zeros_BN.astype(bool),
        scores=scores,
        ended_B=none_B,
        done_B=~inputs.active_B,
        called_B=none_B,
        used_B=none_B.astype(jnp.int32),
    )


def empty_rows(count: int, vocab_size: int) -> Rows:
    """Return the Rows (sampling settings) of `count` empty slots, as NumPy arrays."""

    def full(value, dtype, *more):
        return np.full((count, *more), value, dtype)

    return Rows(
        seed_B=full(0, np.uint32),
        sample_B=full(0, np.int32),
        temperature_B=full(0, np.float32),
        top_k_B=full(0, np.int32),
        top_p_B=full(1, np.float32),
        min_p_B=full(0, np.float32),
        first_end_B=full(0, np.int32),
        limit_B=full(0, np.int32),
        ends_BE=full(vocab_size, np.int32, 2 + MAX_STOP_TOKENS),
        tool_B=full(False, bool),
    )


@partial(jax.jit, static_argnames=("dtype", "vocab_size", "single_row"))
def for_decoding(params: Params, dtype: str, vocab_size: int, single_row: bool = False) -> Params:
    """Prepare weights for decoding: split them into one array per layer, and convert them to `dtype`.

    The embedding keeps its dtype. Columns of lm_head beyond the vocabulary are dropped.
    single_row: lay out the weights for model/one_row.py, which decodes a single row.
    """
    head_DV = params.lm_head[:, :vocab_size].astype(dtype)
    blocks = layers_of(params.blocks, dtype)
    blocks = tuple(map(one_row.by_result, blocks)) if single_row else blocks
    return params.replace(blocks=blocks, lm_head=head_DV)
