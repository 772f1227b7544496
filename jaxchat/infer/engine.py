"""Generation with a key/value cache: many prompts at once, decoded on the device, with the calculator tool.

There is a fixed number of slots. A row that is done leaves its slot to a prompt that waits. The device decodes in
stretches; the host steps in where rows have called the tool (their results are forced into their streams) or are done.
A prompt is read in a batch whose shape depends on the prompt alone, and all slots are decoded in one shape: so what a
row says does not depend on what else is there, and few shapes are ever compiled.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxchat.config import Compute, ModelConfig, UserError
from jaxchat.infer.calculator import calculate
from jaxchat.infer.sampling import sample
from jaxchat.model.attention_cpu import SLOT_BLOCK
from jaxchat.model.cache import KVCache
from jaxchat.model.gpt import features_cached, logits
from jaxchat.model.params import Params
from jaxchat.sharding import constrain

STRETCH = 64  # tokens decoded before the host looks, at most
FORCED = 64  # the most tokens that one tool call can force
EXPRESSION = 256  # the most tokens that a tool's expression may have
SHORTEST = 16  # tokens of the shortest rows in which prompts are read


@dataclasses.dataclass
class Generation:
    """What was generated after a prompt, without the token that ended it."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    forced: list[bool] = dataclasses.field(default_factory=list)  # which tokens the tool put in
    finished: bool = False  # ended by itself, not by a limit


def bucket(n: int, smallest: int, largest: int) -> int:
    """The least power of two ≥ n and ≥ smallest, at most largest."""
    return min(largest, max(smallest, 1 << (n - 1).bit_length()))


@partial(jax.jit, static_argnames=("config", "compute", "count", "length"))
def empty_slots(config: ModelConfig, compute: Compute, count: int, length: int):
    """(logits_BV, cache) of slots that hold nothing; on a mesh every device has all."""
    empty = jnp.zeros((count, config.vocab_size)), KVCache.empty(config, count, length, jnp.dtype(compute.dtype))
    return on_every_device(empty, compute)


def on_every_device(tree, compute: Compute):
    return constrain(tree, jax.tree.map(lambda _: P(), tree), compute.mesh)


@partial(jax.jit, static_argnames=("config", "compute"), donate_argnames=("logits_BV", "cache"))
def read_prompts(
    params, logits_BV, cache: KVCache, tokens_PT, lengths_P, slots_P, config: ModelConfig, compute: Compute
):
    """(logits_BV, cache) with prompts, padded at the end, read into their slots; a slot beyond the last is none."""
    dtype = jnp.dtype(compute.dtype)
    empty = KVCache.empty(config, *tokens_PT.shape, dtype)
    x_PTD, own = features_cached(params, tokens_PT, empty, config, compute, counts_B=lengths_P)
    last_PD = jnp.take_along_axis(x_PTD, (lengths_P - 1)[:, None, None], axis=1)[:, 0]
    logits_BV = logits_BV.at[slots_P].set(logits(params.lm_head, last_PD, config.softcap), mode="drop")
    return on_every_device((logits_BV, cache.place(own, slots_P)), compute)


@partial(
    jax.jit,
    static_argnames=("config", "compute", "greedy", "top_k", "stretch", "specials"),
    donate_argnames=("logits_BV", "cache"),
)
def decode(
    params, logits_BV, cache, rows_B, limits_B, done_B, forced_BF, num_forced_B, seed, temperature, count_done, enough,
    *, config, compute, greedy, top_k, stretch, specials,
):  # fmt: skip
    """Decode up to `stretch` tokens a row, until `enough` rows wait for the host or none is left to decode.

    A row waits when it has called the tool; one that is done counts as well if count_done.
    -> (logits_BV, cache, done_B, ended_B, called_B, tokens_BN, was_forced_BN, number of forced tokens used); tokens are
    −1 where a row emitted nothing. specials: ids of (python_end, assistant_end, bos).
    """
    python_end, assistant_end, bos = specials
    batch = logits_BV.shape[0]

    def more(carry):
        i, _, _, done_B, _, called_B, _, _, _ = carry
        waiting = jnp.sum(called_B) + jnp.where(count_done, jnp.sum(done_B), 0)
        return (i < stretch) & (waiting < enough) & ~jnp.all(done_B | called_B)

    def step(carry):
        i, logits_BV, cache, done_B, ended_B, called_B, tokens_BN, forced_BN, used_B = carry
        sampled_B = sample(logits_BV, rows_B, cache.lengths_B, seed, temperature, greedy=greedy, top_k=top_k)
        is_forced_B = used_B < num_forced_B
        # As a sum: for one row XLA makes of take_along_axis what its own compiler for GPUs then refuses.
        next_forced_B = jnp.sum(jnp.where(used_B[:, None] == jnp.arange(FORCED)[None], forced_BF, 0), axis=1)
        token_B = jnp.where(is_forced_B, next_forced_B, sampled_B)
        active_B = ~done_B & ~called_B
        ends_B = active_B & ~is_forced_B & ((token_B == assistant_end) | (token_B == bos))
        emits_B = active_B & ~ends_B
        tokens_BN = tokens_BN.at[:, i].set(jnp.where(emits_B, token_B, -1))
        forced_BN = forced_BN.at[:, i].set(emits_B & is_forced_B)
        counts_B = emits_B.astype(jnp.int32)
        x_BTD, cache = features_cached(params, token_B[:, None], cache, config, compute, counts_B)
        logits_BV = jnp.where(emits_B[:, None], logits(params.lm_head, x_BTD[:, 0], config.softcap), logits_BV)
        called_B = called_B | (emits_B & ~is_forced_B & (token_B == python_end))
        done_B = done_B | ends_B | (cache.lengths_B >= limits_B)
        used_B = used_B + (emits_B & is_forced_B)
        return i + 1, logits_BV, cache, done_B, ended_B | ends_B, called_B, tokens_BN, forced_BN, used_B

    none_B = jnp.zeros(batch, bool)
    cache = cache.cut(jnp.where(done_B, 0, cache.lengths_B))  # nobody waits for what they attend to
    carry = (
        jnp.zeros((), jnp.int32), logits_BV, cache, done_B, none_B, none_B,
        jnp.full((batch, stretch), -1, jnp.int32), jnp.zeros((batch, stretch), bool), jnp.zeros(batch, jnp.int32),
    )  # fmt: skip
    return on_every_device(lax.while_loop(more, step, carry)[1:], compute)


class Engine:
    """Generates with one model, in batch_size slots. Compiled shapes are shared by all; in bfloat16 each has a copy of
    the weights in it, but for the embedding, of which a token reads one row."""

    def __init__(
        self, params: Params, config: ModelConfig, tokenizer, compute: Compute | None = None, *, batch_size: int = 64
    ):
        self.config, self.tokenizer, self.batch_size = config, tokenizer, batch_size
        self.compute = compute or Compute.for_backend()
        # Every token needs all weights: they are read in the dtype they are used in, not cast anew each time.
        self.params = jax.tree.map(lambda a: a.astype(self.compute.dtype), params).replace(wte=params.wte)

    def generate(
        self,
        prompts: list[list[int]],
        *,
        max_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 0,
        num_samples: int = 1,
        told: Callable[[int], None] = lambda finished: None,
    ) -> list[Generation]:
        """num_samples continuations of every prompt (those of one prompt stand together).

        told: called with how many more are done, now and then.
        """
        rows = [prompt for prompt in prompts for _ in range(num_samples)]
        results = [Generation() for _ in rows]
        for finished in self._run(rows, results, max_tokens, temperature, top_k, seed, STRETCH):
            told(finished)
        return results

    def stream(
        self, prompt: list[int], *, max_tokens: int, temperature: float = 1.0, top_k: int | None = None, seed: int = 0
    ) -> Iterator[tuple[int, bool]]:
        """The (token, whether the tool forced it) of one continuation as they come; the same as `generate`'s first."""
        results, shown = [Generation()], 0
        for _ in self._run([prompt], results, max_tokens, temperature, top_k, seed, 4):
            new = results[0]
            yield from zip(new.tokens[shown:], new.forced[shown:], strict=True)
            shown = len(new.tokens)

    def _run(self, rows, results, max_tokens, temperature, top_k, seed, stretch) -> Iterator[int]:
        """Generate for all rows into results; gives how many have finished after every stretch."""
        slots = Slots(self, rows, max_tokens)
        special = self.tokenizer.special
        specials = (special("<|python_end|>"), special("<|assistant_end|>"), special("<|bos|>"))
        while slots.admit():
            slots.logits_BV, slots.cache, *found = decode(
                self.params, slots.logits_BV, slots.cache, slots.row_B.clip(0), slots.limit_B, slots.done_B,
                slots.forced_BF, slots.num_forced_B, np.uint32(seed), np.float32(temperature or 1.0),
                bool(slots.waiting), np.int32(slots.together), config=self.config, compute=self.compute,
                greedy=temperature == 0, top_k=top_k, stretch=stretch, specials=specials,
            )  # fmt: skip
            done_B, ended_B, called_B, tokens_BN, forced_BN, used_B = jax.device_get(found)
            finished = 0
            for b in np.flatnonzero(slots.row_B >= 0):
                result = results[slots.row_B[b]]
                emitted = tokens_BN[b] >= 0
                result.tokens.extend(tokens_BN[b][emitted].tolist())
                result.forced.extend(forced_BN[b][emitted].tolist())
                result.finished |= bool(ended_B[b])
                left = slots.forced_BF[b, used_B[b] : slots.num_forced_B[b]].tolist()
                slots.force(b, self._tool_result(result.tokens) if called_B[b] else left)
                if done_B[b]:
                    slots.free(b)
                    finished += 1
            yield finished

    def _tool_result(self, tokens: list[int]) -> list[int]:
        """The tokens to force after a python_end that was just emitted; none if its expression has no value."""
        special = self.tokenizer.special
        start = len(tokens) - 1
        while start >= 0 and tokens[start] != special("<|python_start|>"):
            start -= 1
        if start < 0 or len(tokens) - start > EXPRESSION:
            return []
        value = calculate(self.tokenizer.decode(tokens[start + 1 : -1]))
        if value is None:
            return []
        forced = [special("<|output_start|>"), *self.tokenizer.encode(value), special("<|output_end|>")]
        return forced if len(forced) <= FORCED else []


class Slots:
    """The places that rows are decoded in, and the prompts that wait for one."""

    def __init__(self, engine: Engine, rows: list[list[int]], max_tokens: int):
        limit, count = engine.config.sequence_len, engine.batch_size
        longest, shortest = max(map(len, rows), default=1), min(map(len, rows), default=1)
        if longest > limit or shortest < 1:
            raise UserError(f"a prompt of {longest if longest > limit else 0} tokens; this model takes 1 to {limit}")
        self._engine, self._rows, self._max_tokens = engine, rows, max_tokens
        self.together = max(1, count // 8)  # prompts are read, and rows waited for, so many at a time
        # The longest first: rows that take long don't begin last.
        wanted = [r for r, row in enumerate(rows) if min(max_tokens, limit - len(row)) > 0]
        self.waiting = sorted(wanted, key=lambda r: len(rows[r]))
        self.row_B = np.full(count, -1)  # which row a slot holds; −1: none
        self.done_B = np.ones(count, bool)
        self.limit_B = np.zeros(count, np.int32)
        self.forced_BF, self.num_forced_B = np.zeros((count, FORCED), np.int32), np.zeros(count, np.int32)
        self.cache = self.logits_BV = None

    def free(self, b: int):
        self.row_B[b], self.done_B[b] = -1, True

    def force(self, b: int, tokens: list[int]):
        self.num_forced_B[b] = len(tokens)
        self.forced_BF[b, : len(tokens)] = tokens

    def admit(self) -> bool:
        """Give free slots to waiting prompts, where there are enough to read together. -> whether any slot is taken."""
        if self.waiting and self.cache is None:
            config, count = self._engine.config, len(self.row_B)
            length = -(-config.sequence_len // SLOT_BLOCK) * SLOT_BLOCK
            self.logits_BV, self.cache = empty_slots(config, self._engine.compute, count, length)
        while (free := np.flatnonzero(self.row_B < 0)).size >= min(self.together, len(self.waiting)) > 0:
            self._read(free)
        return bool((self.row_B >= 0).any())

    def _read(self, free: np.ndarray):
        """Read the longest waiting prompts, as many as have one length of batch, into free slots."""
        engine, rows, count = self._engine, self._rows, len(self.row_B)

        def length_of(r):
            return bucket(len(rows[r]), SHORTEST, engine.config.sequence_len)

        length = length_of(self.waiting[-1])
        tokens_PT = np.zeros((self.together, length), np.int32)
        lengths_P, slots_P = np.ones(self.together, np.int32), np.full(self.together, count, np.int32)
        for p, b in enumerate(free[: self.together]):
            if not self.waiting or length_of(self.waiting[-1]) != length:
                break
            r = self.waiting.pop()
            tokens_PT[p, : len(rows[r])] = rows[r]
            lengths_P[p], slots_P[p], self.row_B[b], self.done_B[b] = len(rows[r]), b, r, False
            self.limit_B[b] = min(len(rows[r]) + self._max_tokens, engine.config.sequence_len)
            self.force(b, [])
        self.logits_BV, self.cache = read_prompts(
            engine.params, self.logits_BV, self.cache, tokens_PT, lengths_P, slots_P, engine.config, engine.compute
        )
