"""Sampling of the next token on the device, with separate settings for each row."""

import math

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

# Kinds of sampling, each compiled once. A row gets the same token from every kind that supports its settings.
GREEDY = "greedy"  # every row takes the likeliest token
PLAIN = "plain"  # each row has a temperature, which may be 0
FILTERED = "filtered"  # each row also has top_k, top_p, min_p and min_tokens

BLOCK, LANES = 512, 64  # on a CPU the argmax is by blocks: tokens of a block, and vector lanes


@struct.dataclass
class Rows:
    """The sampling settings of every row: fields of scheduler.Request, as arrays."""

    seed_B: jax.Array  # uint32
    sample_B: jax.Array
    temperature_B: jax.Array  # float32
    top_k_B: jax.Array
    top_p_B: jax.Array  # float32
    min_p_B: jax.Array  # float32
    first_end_B: jax.Array  # first position at which the row may end by itself
    limit_B: jax.Array  # maximum tokens of the row, prompt included
    ends_BE: jax.Array  # tokens that end the row, padded with ids beyond the vocabulary
    tool_B: jax.Array  # bool: the row may call the calculator


def sample(logits_BV, rows: Rows, positions_B, kind: str):
    """Sample every row's next token, int32 [B], from softmax(logits / temperature).

    A row's token does not depend on other rows.
    kind: the settings to support. GREEDY supports only temperature 0, PLAIN any temperature, and FILTERED
    also top_k, top_p, min_p and min_tokens.
    """
    if kind == GREEDY:
        return _largest(logits_BV)
    cold_B1 = rows.temperature_B[:, None] == 0
    noise_BV = jax.vmap(_noise, (0, 0, 0, None))(rows.seed_B, rows.sample_B, positions_B, logits_BV.shape[1])
    if kind == FILTERED:
        logits_BV = keep_only(_without_ends(logits_BV, rows, positions_B), rows)
    drawn_BV = logits_BV / jnp.where(cold_B1, 1.0, rows.temperature_B[:, None]) + noise_BV
    return _largest(jnp.where(cold_B1, logits_BV, drawn_BV))


def _largest(x_BV):
    """Return the index of each row's largest number, int32 [B]. If several are largest, take the first."""

    def by_blocks(x_BV):
        # Vector instructions find each block's maximum, lane by lane; one block is searched for the index.
        (B, V), block = x_BV.shape, math.gcd(x_BV.shape[1], BLOCK)
        lanes_BNiL = x_BV.reshape(B, V // block, -1, math.gcd(block, LANES))
        first_B = jnp.argmax(lanes_BNiL.max(2).max(2), axis=1)
        own_Bn = jnp.take_along_axis(x_BV.reshape(B, -1, block), first_B[:, None, None], axis=1)[:, 0]
        return (first_B * block + jnp.argmax(own_Bn, axis=1)).astype(jnp.int32)

    def by_argmax(x_BV):
        return jnp.argmax(x_BV, axis=-1).astype(jnp.int32)

    return lax.platform_dependent(x_BV, cpu=by_blocks, default=by_argmax)


def _noise(seed, sample, position, size: int):
    """Generate the Gumbel noise, float32 [size], that jax.random.categorical would add to the logits."""
    # Elementwise operations are faster than jax.random on a CPU, and need no separate kernel on a GPU.
    zero = jnp.uint32(0)
    key = _threefry((zero, seed), zero, sample.astype(jnp.uint32))
    key = _threefry(key, zero, position.astype(jnp.uint32))
    numbers_V = lax.iota(jnp.uint32, size)
    a_V, b_V = _threefry(key, jnp.zeros_like(numbers_V), numbers_V)
    mantissa_V = ((a_V ^ b_V) >> 9) | jnp.uint32(0x3F800000)  # bits of a float32 in [1, 2)
    uniform_V = lax.bitcast_convert_type(mantissa_V, jnp.float32) - 1.0
    return -jnp.log(-jnp.log(jnp.maximum(uniform_V, jnp.finfo(jnp.float32).tiny)))


def _threefry(key, a, b):
    """Encrypt the uint32 pair (a, b) by Threefry-2x32 (Salmon et al. 2011). key: a pair of uint32 numbers."""
    keys = (*key, key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA))
    a, b = a + keys[0], b + keys[1]
    for i in range(5):
        for distance in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
            a = a + b
            b = a ^ ((b << distance) | (b >> (32 - distance)))
        a, b = a + keys[(i + 1) % 3], b + keys[(i + 2) % 3] + jnp.uint32(i + 1)
    return a, b


def _without_ends(logits_BV, rows: Rows, positions_B):
    """Set the logits of end tokens to −∞ in rows that have generated fewer than min_tokens tokens."""
    rows_B1 = jnp.arange(logits_BV.shape[0])[:, None]
    ends_BE = jnp.where((positions_B < rows.first_end_B)[:, None], rows.ends_BE, logits_BV.shape[1])
    return logits_BV.at[rows_B1, ends_BE].set(-jnp.inf, mode="drop")


def keep_only(logits_BV, rows: Rows):
    """Set the logits of the tokens that top_k, top_p or min_p excludes to −∞.

    Tokens tied with the least likely kept token are kept too. top_k is applied first. top_p and min_p then
    apply to the probabilities of the remaining tokens, at the row's temperature.
    """
    below = -jnp.inf
    largest_B1 = jnp.max(logits_BV, axis=1, keepdims=True)
    temperature_B1 = jnp.where(rows.temperature_B == 0, 1.0, rows.temperature_B)[:, None]

    def by_count(logits_BV):
        count_B = jnp.maximum(rows.top_k_B, 1).astype(jnp.float32)
        least_B = _threshold(logits_BV, jnp.ones_like(logits_BV), count_B)
        return jnp.where((rows.top_k_B[:, None] > 0) & (logits_BV < least_B[:, None]), below, logits_BV)

    def by_mass(logits_BV):
        p_BV = jnp.exp((logits_BV - largest_B1) / temperature_B1)
        least_B = _threshold(logits_BV, p_BV, rows.top_p_B * p_BV.sum(1))
        return jnp.where((rows.top_p_B[:, None] < 1) & (logits_BV < least_B[:, None]), below, logits_BV)

    logits_BV = lax.cond(jnp.any(rows.top_k_B > 0), by_count, lambda x: x, logits_BV)
    logits_BV = lax.cond(jnp.any(rows.top_p_B < 1), by_mass, lambda x: x, logits_BV)
    least_B1 = largest_B1 + jnp.log(rows.min_p_B[:, None]) * temperature_B1
    return jnp.where(logits_BV < least_B1, below, logits_BV)


def _threshold(x_BV, weights_BV, wanted_B):
    """Find each row's largest t, float32 [B], such that the weights where x ≥ t sum to at least `wanted`."""
    # Bisection over the 32 bits of a float32 is exact and avoids sorting the vocabulary.
    order_BV = _in_order(x_BV)

    def try_bit(i, found_B):
        tried_B = found_B | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        mass_B = jnp.sum(jnp.where(order_BV >= tried_B[:, None], weights_BV, 0.0), axis=1)
        return jnp.where(mass_B >= wanted_B, tried_B, found_B)

    found_B = lax.fori_loop(0, 32, try_bit, jnp.zeros(x_BV.shape[0], jnp.uint32))
    positive_B = found_B >= jnp.uint32(2**31)
    return lax.bitcast_convert_type(jnp.where(positive_B, found_B ^ jnp.uint32(2**31), ~found_B), jnp.float32)


def _in_order(x):
    """Map float32 numbers to uint32 numbers, preserving their order."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 0, bits | jnp.uint32(2**31), ~bits)
