"""Generation with a key/value cache: many prompts at once, decoded on the device, with the calculator tool.

The device decodes in stretches. The host steps in only where a row has called the tool: it calculates, and the result
is forced into that row's stream. Prompt lengths, cache lengths and batch sizes go to powers of two, so that few shapes
are ever compiled.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxchat.config import Compute, ModelConfig, UserError
from jaxchat.infer.calculator import calculate
from jaxchat.infer.sampling import sample
from jaxchat.model.cache import KVCache
from jaxchat.model.gpt import features, logits
from jaxchat.model.params import Params

STRETCH = 128  # tokens decoded before the host looks
FORCED = 64  # the most tokens that one tool call can force
EXPRESSION = 256  # the most tokens that a tool's expression may have


@dataclasses.dataclass
class Generation:
    """What was generated after a prompt, without the token that ended it."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    forced: list[bool] = dataclasses.field(default_factory=list)  # which tokens the tool put in
    finished: bool = False  # ended by itself, not by a limit


def bucket(n: int, smallest: int, largest: int) -> int:
    """The least power of two ≥ n and ≥ smallest, at most largest."""
    return min(largest, max(smallest, 1 << (n - 1).bit_length()))


@partial(jax.jit, static_argnames=("config", "compute", "cache_len"))
def prefill(params, tokens_BT, lengths_B, config: ModelConfig, compute: Compute, cache_len: int):
    """(logits_BV after each row's last token, cache) of prompts padded at the end."""
    cache = KVCache.empty(config, tokens_BT.shape[0], cache_len, jnp.dtype(compute.dtype))
    x_BTD, cache = features(params, tokens_BT, config, compute, cache)
    last_BD = jnp.take_along_axis(x_BTD, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
    return logits(params.lm_head, last_BD), cache.replace(lengths_B=lengths_B)


@partial(
    jax.jit,
    static_argnames=("config", "compute", "greedy", "top_k", "stretch", "specials"),
    donate_argnames=("logits_BV", "cache"),
)
def decode(
    params, logits_BV, cache, rows_B, limits_B, done_B, forced_BF, num_forced_B, seed, temperature,
    *, config, compute, greedy, top_k, stretch, specials,
):  # fmt: skip
    """Decode up to `stretch` tokens a row, until a row calls the tool or all are done.

    -> (logits_BV, cache, done_B, ended_B, tokens_BN, was_forced_BN, number of forced tokens used, steps N' taken);
    tokens are −1 where a row emitted nothing. specials: ids of (python_end, assistant_end, bos).
    """
    python_end, assistant_end, bos = specials
    batch = logits_BV.shape[0]

    def more(carry):
        i, _, _, done_B, _, _, _, _, called = carry
        return (i < stretch) & ~called & ~jnp.all(done_B)

    def step(carry):
        i, logits_BV, cache, done_B, ended_B, tokens_BN, forced_BN, used_B, _ = carry
        sampled_B = sample(logits_BV, rows_B, cache.lengths_B, seed, temperature, greedy=greedy, top_k=top_k)
        is_forced_B = used_B < num_forced_B
        next_forced_B = jnp.take_along_axis(forced_BF, jnp.minimum(used_B, FORCED - 1)[:, None], axis=1)[:, 0]
        token_B = jnp.where(is_forced_B, next_forced_B, sampled_B)
        ends_B = ~done_B & ~is_forced_B & ((token_B == assistant_end) | (token_B == bos))
        emits_B = ~done_B & ~ends_B
        tokens_BN = tokens_BN.at[:, i].set(jnp.where(emits_B, token_B, -1))
        forced_BN = forced_BN.at[:, i].set(emits_B & is_forced_B)
        x_BTD, fed = features(params, token_B[:, None], config, compute, cache)
        cache = fed.replace(lengths_B=jnp.where(emits_B, fed.lengths_B, cache.lengths_B))
        logits_BV = jnp.where(emits_B[:, None], logits(params.lm_head, x_BTD[:, 0]), logits_BV)
        called = jnp.any(emits_B & ~is_forced_B & (token_B == python_end))
        done_B = done_B | ends_B | (cache.lengths_B >= limits_B)
        used_B = used_B + (emits_B & is_forced_B)
        return i + 1, logits_BV, cache, done_B, ended_B | ends_B, tokens_BN, forced_BN, used_B, called

    carry = (
        jnp.zeros((), jnp.int32), logits_BV, cache, done_B, jnp.zeros(batch, bool),
        jnp.full((batch, stretch), -1, jnp.int32), jnp.zeros((batch, stretch), bool),
        jnp.zeros(batch, jnp.int32), jnp.zeros((), bool),
    )  # fmt: skip
    i, logits_BV, cache, done_B, ended_B, tokens_BN, forced_BN, used_B, _ = lax.while_loop(more, step, carry)
    return logits_BV, cache, done_B, ended_B, tokens_BN, forced_BN, used_B, i


class Engine:
    """Generates with one model. Making one is cheap; compiled shapes are shared by all."""

    def __init__(
        self, params: Params, config: ModelConfig, tokenizer, compute: Compute | None = None, *, batch_size: int = 64
    ):
        self.params, self.config, self.tokenizer, self.batch_size = params, config, tokenizer, batch_size
        self.compute = compute or Compute.for_backend()

    def generate(
        self,
        prompts: list[list[int]],
        *,
        max_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 0,
        num_samples: int = 1,
    ) -> list[Generation]:
        """num_samples continuations of every prompt (those of one prompt stand together)."""
        rows = [prompt for prompt in prompts for _ in range(num_samples)]
        results = [Generation() for _ in rows]
        # Rows of like length share a batch: little padding, and few shapes.
        order = sorted(range(len(rows)), key=lambda r: len(rows[r]))
        for first in range(0, len(rows), self.batch_size):
            chosen = order[first : first + self.batch_size]
            for _ in self._run(rows, chosen, results, max_tokens, temperature, top_k, seed, STRETCH):
                pass
        return results

    def stream(
        self, prompt: list[int], *, max_tokens: int, temperature: float = 1.0, top_k: int | None = None, seed: int = 0
    ) -> Iterator[tuple[int, bool]]:
        """The (token, whether the tool forced it) of one continuation as they come; the same as `generate`'s first."""
        results, told = [Generation()], 0
        for _ in self._run([prompt], [0], results, max_tokens, temperature, top_k, seed, 4):
            new = results[0]
            yield from zip(new.tokens[told:], new.forced[told:], strict=True)
            told = len(new.tokens)

    def _padded(self, prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        longest, limit = max(map(len, prompts)), self.config.sequence_len
        if longest > limit or min(map(len, prompts)) < 1:
            raise UserError(f"a prompt of {longest} tokens; this model takes 1 to {limit}")
        batch = bucket(len(prompts), 1, max(self.batch_size, len(prompts)))
        tokens_BT = np.zeros((batch, bucket(longest, 16, limit)), np.int32)
        lengths_B = np.ones(batch, np.int32)
        for b, prompt in enumerate(prompts):
            tokens_BT[b, : len(prompt)] = prompt
            lengths_B[b] = len(prompt)
        return tokens_BT, lengths_B

    def _run(self, rows, chosen, results, max_tokens, temperature, top_k, seed, stretch) -> Iterator[None]:
        """Generate for the chosen rows into results; gives way after every stretch."""
        special = self.tokenizer.special
        specials = (special("<|python_end|>"), special("<|assistant_end|>"), special("<|bos|>"))
        tokens_BT, lengths_B = self._padded([rows[r] for r in chosen])
        batch = len(lengths_B)
        limits_B = np.minimum(lengths_B + max_tokens, self.config.sequence_len)
        cache_len = max(tokens_BT.shape[1], bucket(int(limits_B.max()), 64, self.config.sequence_len))
        rows_B = np.zeros(batch, np.int32)
        rows_B[: len(chosen)] = chosen
        done_B = lengths_B >= limits_B
        done_B[len(chosen) :] = True
        forced_BF, num_forced_B = np.zeros((batch, FORCED), np.int32), np.zeros(batch, np.int32)
        logits_BV, cache = prefill(self.params, tokens_BT, lengths_B, self.config, self.compute, cache_len)
        while not done_B.all():
            logits_BV, cache, done, ended, tokens_BN, forced_BN, used_B, steps = decode(
                self.params, logits_BV, cache, rows_B, limits_B, done_B, forced_BF, num_forced_B,
                np.uint32(seed), np.float32(temperature or 1.0), config=self.config, compute=self.compute,
                greedy=temperature == 0, top_k=top_k, stretch=stretch, specials=specials,
            )  # fmt: skip
            done, ended, tokens_BN, forced_BN, used_B, steps = jax.device_get(
                (done, ended, tokens_BN, forced_BN, used_B, steps)
            )
            done_B = np.array(done)
            for b, r in enumerate(chosen):
                result = results[r]
                emitted = tokens_BN[b, :steps] >= 0
                result.tokens.extend(tokens_BN[b, :steps][emitted].tolist())
                result.forced.extend(forced_BN[b, :steps][emitted].tolist())
                result.finished |= bool(ended[b])
                left = forced_BF[b, used_B[b] : num_forced_B[b]].tolist()
                if steps and tokens_BN[b, steps - 1] == specials[0] and not forced_BN[b, steps - 1]:
                    left = self._tool_result(result.tokens)
                num_forced_B[b] = len(left)
                forced_BF[b, : len(left)] = left
            yield

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
        return [special("<|output_start|>"), *self.tokenizer.encode(value), special("<|output_end|>")]
