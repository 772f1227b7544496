"""Choosing the next token: each row by its own settings, against distributions written as their definitions say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat.infer import sampling
from jaxchat.infer.decode import empty_rows
from jaxchat.infer.sampling import FILTERED, GREEDY, PLAIN, sample


def exact_distribution(logits_V, temperature, top_k, top_p, min_p):
    """Written as its definition says, one token after the other, from the likeliest."""
    order = np.argsort(-logits_V, kind="stable")
    order = order[:top_k] if top_k else order
    p = np.exp(logits_V[order] / temperature)
    p /= p.sum()
    kept = [n for n in range(len(order)) if p[:n].sum() < top_p and p[n] >= min_p * p[0]]
    out = np.zeros(len(logits_V))
    out[order[kept]] = p[kept] / p[kept].sum()
    return out


@pytest.mark.parametrize("seed", [0, 1])
def test_each_row_draws_from_its_own_distribution(seed):
    """χ² of 4,000 draws a row. With 12 tokens at most, χ² is beyond 33 with a probability of 0.0005."""
    random, count, vocab = np.random.default_rng(seed), 4000, 12
    settings = [(1.0, 0, 1.0, 0.0), (0.7, 4, 1.0, 0.0), (1.3, 0, 0.6, 0.0), (1.0, 0, 1.0, 0.2), (0.8, 7, 0.8, 0.05)]
    logits_RV = random.normal(size=(len(settings), vocab)).astype(np.float32)

    def column(n, dtype):
        return np.repeat(np.array([row[n] for row in settings], dtype), count)

    rows = empty_rows(len(settings) * count, vocab).replace(
        seed_B=np.full(len(settings) * count, seed, np.uint32),
        sample_B=np.arange(len(settings) * count, dtype=np.int32),
        temperature_B=column(0, np.float32), top_k_B=column(1, np.int32), top_p_B=column(2, np.float32),
        min_p_B=column(3, np.float32),
    )  # fmt: skip
    positions = np.zeros(len(settings) * count, np.int32)
    logits_BV = np.repeat(logits_RV, count, axis=0)
    drawn = np.asarray(jax.jit(sample, static_argnums=3)(logits_BV, rows, positions, FILTERED)).reshape(-1, count)
    for n, how in enumerate(settings):
        want = exact_distribution(logits_RV[n].astype(float), *how)
        got = np.bincount(drawn[n], minlength=vocab)
        assert got[want == 0].sum() == 0
        chi2 = ((got - count * want) ** 2 / np.where(want > 0, count * want, 1)).sum()
        assert chi2 < 33, how
    plain = np.asarray(jax.jit(sample, static_argnums=3)(logits_BV, rows, positions, PLAIN)).reshape(-1, count)
    assert (plain[0] == drawn[0]).all()  # the same draws in either kind


def test_a_draw_is_what_jax_draws():
    """Texts of earlier versions stay: key (seed, sample, position), jax.random.categorical, top_k by value."""
    logits_BV, sizes = jax.random.normal(jax.random.key(0), (6, 50)), np.array([0, 1, 3, 10, 49, 50], np.int32)
    rows = empty_rows(6, 50).replace(
        seed_B=~np.arange(6, dtype=np.uint32), sample_B=np.arange(6, dtype=np.int32),
        temperature_B=np.full(6, 0.8, np.float32), top_k_B=sizes,
    )  # fmt: skip
    got = sample(logits_BV, rows, np.arange(6), FILTERED)
    for b in range(6):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(rows.seed_B[b]), b), b)
        least = np.sort(logits_BV[b])[-sizes[b]] if sizes[b] else -np.inf
        want = jax.random.categorical(key, jnp.where(logits_BV[b] < least, -jnp.inf, logits_BV[b]) / np.float32(0.8))
        assert got[b] == want
        noise_V = sampling._noise(rows.seed_B[b], rows.sample_B[b], jnp.int32(b), 50)
        np.testing.assert_array_equal(noise_V, jax.random.gumbel(key, (50,)))


@pytest.mark.parametrize("vocab", [7, 280, 1536])
def test_the_first_of_equals(vocab):
    """Whatever the sizes of the blocks that a CPU searches; logits are often equal, at the bounds of the softcap."""
    logits_BV = np.random.default_rng(vocab).integers(0, 4, (20, vocab)).astype(np.float32)
    logits_BV[0], logits_BV[1, :] = -np.inf, np.arange(vocab)
    rows, positions = empty_rows(20, vocab), np.zeros(20, np.int32)
    for kind in (GREEDY, PLAIN):
        np.testing.assert_array_equal(sample(logits_BV, rows, positions, kind), logits_BV.argmax(1))
