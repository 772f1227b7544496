"""Advantages and policy weights against enumeration of all sequences and float64 autodiff of the published losses."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat.rl.advantages import advantages, mixed_groups
from jaxchat.rl.weights import LogProbs, Policy, clipped_share, policy_weights, row_scales

# A policy over sequences of at most 3 tokens of a vocabulary of 3: token 0 ends a sequence, and after token 2 a tool
# forces token 1. One table of logits, by position and token before.
VOCABULARY, LONGEST, END, CALL, RESULT = 3, 3, 0, 2, 1


def sequences():
    """All (tokens, which of them were forced): 15 without a tool."""
    found = []

    def extend(tokens, forced):
        if tokens and (tokens[-1] == END or len(tokens) == LONGEST):
            found.append((tokens, forced))
        elif tokens and tokens[-1] == CALL and not forced[-1]:
            extend([*tokens, RESULT], [*forced, True])
        else:
            for token in range(VOCABULARY):
                extend([*tokens, token], [*forced, False])

    extend([], [])
    return found


def scores(table, tokens, forced):
    """-> (log-probability of the sampled tokens, ∇log π of each position [T, *table.shape])."""
    total, gradients, before = 0.0, np.zeros((LONGEST, *table.shape)), 1
    for t, (token, is_forced) in enumerate(zip(tokens, forced, strict=True)):
        p = np.exp(table[t, before]) / np.exp(table[t, before]).sum()
        if not is_forced:
            total += np.log(p[token])
        gradients[t, t, before] = -p
        gradients[t, t, before, token] += 1
        before = token
    return total, gradients


@pytest.fixture(scope="module")
def enumerated():
    """Every sequence's probability, rewards, mask [S, T] and gradients [S, T, …]; and ∇J."""
    random = np.random.default_rng(0)
    table, every = random.normal(0, 1, (LONGEST, VOCABULARY, VOCABULARY)), sequences()
    found = [scores(table, *one) for one in every]
    p_S = np.exp([total for total, _ in found])
    np.testing.assert_allclose(p_S.sum(), 1, atol=1e-14)
    mask_ST = np.array([[t < len(tokens) and not forced[t] for t in range(LONGEST)] for tokens, forced in every])
    assert any(any(forced) for _, forced in every) and any(tokens[-1] == END for tokens, _ in every)
    gradients = np.stack([gradient for _, gradient in found])
    rewards_S = random.integers(0, 2, len(every)).astype(float)
    exact = np.einsum("s,s,st,st...->...", p_S, rewards_S, mask_ST, gradients)
    return p_S, rewards_S, mask_ST, gradients, exact


def expectation(enumerated, kind, norm, group=2):
    """The expected gradient of −loss over all groups of `group` sequences, by the functions under test."""
    p_S, rewards_S, mask_ST, gradients, _ = enumerated
    total = 0.0
    for chosen in map(list, itertools.product(range(len(p_S)), repeat=group)):
        a_R = advantages(rewards_S[chosen][None], kind)[0]
        mixed_R = np.full(group, mixed_groups(rewards_S[chosen][None])[0])
        scales = row_scales(norm, mask_ST[chosen], mixed_R, max_tokens=1)
        w_RT = policy_weights(Policy(), a_R, mask_ST[chosen] & mixed_R[:, None], LogProbs(), scales)
        total = total + p_S[chosen].prod() * np.einsum("rt,rt...->...", w_RT, gradients[chosen])
    return total


@pytest.mark.parametrize("kind, factor", [("mean", 1 - 1 / 2), ("loo", 1.0)])
def test_the_expected_gradient_is_the_policy_gradient(enumerated, kind, factor):
    """With the constant normaliser (rows × 1), over all 121 pairs: sign, baseline, mask, end and forced tokens."""
    np.testing.assert_allclose(expectation(enumerated, kind, "constant"), factor * enumerated[-1], atol=1e-12)


def test_the_expected_gradient_of_three(enumerated):
    found = expectation(enumerated, "loo", "constant", group=3)
    np.testing.assert_allclose(found, enumerated[-1], atol=1e-12)


@pytest.mark.parametrize("norm", ["tokens", "all_tokens", "rows"])
def test_a_normaliser_that_is_sampled_too(enumerated, norm):
    """A ratio of two random numbers is biased: compared with that very ratio, written out pair by pair."""
    p_S, rewards_S, mask_ST, gradients, _ = enumerated
    sums_S, lengths_S = np.einsum("st,st...->s...", mask_ST, gradients), mask_ST.sum(1)
    want = 0.0
    for i, j in itertools.product(range(len(p_S)), repeat=2):
        a = (rewards_S[i] - rewards_S[j]) / 2
        if a == 0:
            continue
        if norm == "rows":
            pair = a * (sums_S[i] / lengths_S[i] - sums_S[j] / lengths_S[j]) / 2
        else:
            pair = a * (sums_S[i] - sums_S[j]) / (lengths_S[i] + lengths_S[j])
        want = want + p_S[i] * p_S[j] * pair
    np.testing.assert_allclose(expectation(enumerated, "mean", norm), want, atol=1e-12)


# What a fault on purpose would do to the test above: each must be far from ∇J.
FAULTS = {
    "sign": lambda a, m, forced: (-a, m),
    "no baseline": lambda a, m, forced: (a - a.min(), m),
    "forced tokens learnt": lambda a, m, forced: (a, m | forced),
    "end not learnt": lambda a, m, forced: (a, m & (np.cumsum(m[:, ::-1], 1)[:, ::-1] > 1)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_noticed_by_enumeration(enumerated, monkeypatch, fault):
    p_S, rewards_S, mask_ST, gradients, exact = enumerated
    forced_ST = np.array([[t < len(f) and f[t] for t in range(LONGEST)] for _, f in sequences()])
    total = 0.0
    for chosen in map(list, itertools.product(range(len(p_S)), repeat=2)):
        a_R, m_RT = advantages(rewards_S[chosen][None], "loo")[0], mask_ST[chosen]
        a_R, m_RT = FAULTS[fault](a_R, m_RT, forced_ST[chosen])
        w_RT = policy_weights(Policy(), a_R, m_RT, LogProbs(), np.full((2, 1), 0.5))
        total = total + p_S[chosen].prod() * np.einsum("rt,rt...->...", w_RT, gradients[chosen])
    assert np.abs(total - exact).max() > 1e-3


def test_advantages_by_hand():
    rewards = np.array([[1.0, 2, 3, 4, 5, 6], [2, 2, 2, 2, 2, 2]])
    np.testing.assert_array_equal(advantages(rewards, "mean")[0], [-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    np.testing.assert_allclose(advantages(rewards, "loo")[0], [-3, -1.8, -0.6, 0.6, 1.8, 3])
    np.testing.assert_allclose(advantages(rewards, "std")[0], rewards[0] / 3.5**0.5 - 3.5 / 3.5**0.5, rtol=1e-6)
    spread = np.concatenate([*rewards]).std()
    np.testing.assert_allclose(advantages(rewards, "batch_std")[0, 0], -2.5 / spread, rtol=1e-6)
    for kind in ("mean", "loo", "std", "batch_std"):
        assert not advantages(rewards, kind)[1].any()
        alike = advantages(np.full((1, 3), 0.1), kind)  # whose mean is not 0.1
        np.testing.assert_array_equal(alike, 0)
        np.testing.assert_array_equal(advantages(rewards + 64, kind), advantages(rewards, kind))
    assert mixed_groups(rewards).tolist() == [True, False]


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def case(seed, rows=6, time=5):
    random = np.random.default_rng(seed)
    now = random.normal(-1, 0.5, (rows, time))
    old, sampler, reference = (now + random.normal(0, 0.4, (rows, time)) for _ in range(3))
    mask = random.random((rows, time)) < 0.8
    mask[:, 0] = True
    advantage = random.normal(0, 1, rows)
    # At both edges of the clip, on either side by a hair, for either sign of the advantage, and beyond dual clip's.
    for t, ratio in enumerate((1.28 + 1e-9, 1.28 - 1e-9, 0.8 + 1e-9, 0.8 - 1e-9, 3 + 1e-9)):
        old[:2, t] = now[:2, t] - np.log(ratio)
    advantage[:2], mask[:2] = (1.0, -1.0), True
    return LogProbs(now, old, sampler, reference), mask, advantage


def surrogates(kind, log: LogProbs, m, a, policy):
    """The published losses, each as it is written in its paper, of log-probabilities [R, T] "now"."""
    tokens, rows = m.sum(), len(m)

    def ppo(now):  # Schulman et al. 2017
        ratio = jnp.exp(now - log.old)
        return (
            -(m * jnp.minimum(ratio * a, jnp.clip(ratio, 1 - policy.clip_low, 1 + policy.clip_high) * a)).sum() / tokens
        )

    def dual(now):  # Ye et al. 2019
        ratio = jnp.exp(now - log.old)
        plain = jnp.minimum(ratio * a, jnp.clip(ratio, 1 - policy.clip_low, 1 + policy.clip_high) * a)
        return -(m * jnp.where(a < 0, jnp.maximum(plain, policy.dual_clip * a), plain)).sum() / tokens

    def cispo(now):  # MiniMax-M1
        ratio = jax.lax.stop_gradient(jnp.minimum(jnp.exp(now - log.old), 1 + policy.clip_high))
        return -(m * ratio * a * now).sum() / tokens

    def gspo(now):  # Zheng et al. 2025
        s = jnp.exp((m * (now - log.old)).sum(1, keepdims=True) / m.sum(1, keepdims=True))
        return -jnp.minimum(s * a, jnp.clip(s, 1 - policy.clip_low, 1 + policy.clip_high) * a).sum() / rows

    def reinforce(now):
        return -(m * a * now).sum() / tokens

    def tis(now):  # Yao et al. 2025: the sampler's factor is a constant
        return -(m * jnp.minimum(jnp.exp(log.old - log.sampler), policy.tis) * a * now).sum() / tokens

    def kl(now):  # k2 in Schulman's note
        return reinforce(now) + policy.kl_coef * (m * 0.5 * (now - log.reference) ** 2).sum() / tokens

    return locals()[kind]


CASES = {
    "reinforce": Policy(),
    "ppo": Policy("ppo", dual_clip=0.0),
    "dual": Policy("ppo"),
    "cispo": Policy("cispo", clip_high=0.3),
    "gspo": Policy("gspo", clip_low=0.05, clip_high=0.1),
    "tis": Policy(tis=1.2),
    "kl": Policy(kl_coef=0.1),
}


@pytest.mark.parametrize("kind", CASES)
def test_weights_are_the_gradients_of_the_published_losses(x64, kind):
    """∂loss/∂log π = −w, by autodiff in float64, at 20 random points."""
    policy, unclipped = CASES[kind], 0
    for seed in range(20):
        log, m, a = case(seed)
        norm = row_scales("rows" if kind == "gspo" else "tokens", m, np.ones(len(m), bool), 1)
        weights = policy_weights(policy, a, m, log, norm)
        gradient = jax.grad(surrogates(kind, log, m, a[:, None], policy))(jnp.asarray(log.now))
        np.testing.assert_allclose(weights, -gradient, rtol=1e-12, atol=1e-15)
        unclipped += np.count_nonzero(weights)
        if kind != "kl":  # whose own gradient hides what is clipped
            share = (m & (np.asarray(gradient) == 0)).sum() / m.sum()
            assert clipped_share(policy, a, m, log) == share
            assert clipped_share(dataclasses.replace(policy, kl_coef=0.1), a, m, log) == share
            assert clipped_share(policy, 0 * a, m, log) == 0  # without an advantage, nothing is clipped
    assert (unclipped < 20 * m.size * 0.8) == (kind in ("ppo", "dual", "gspo")), "some are clipped, some are not"


def test_the_kl_weights_have_the_gradient_of_the_kl(x64, enumerated):
    """In expectation, by enumeration: −E[w·∇log π] = ∇KL(π ‖ reference) of each token's distribution, over the states
    that the policy visits (what a token changes of later ones is in no per-token penalty)."""
    p_S, _, mask_ST, gradients, _ = enumerated
    every, random = sequences(), np.random.default_rng(0)
    table = random.normal(0, 1, (LONGEST, VOCABULARY, VOCABULARY))  # as in enumerated
    other = table + np.random.default_rng(5).normal(0, 0.5, table.shape)
    befores = np.array([[1, *tokens, *[0] * LONGEST][:LONGEST] for tokens, _ in every])
    tokens_ST = np.array([[*tokens, *[0] * LONGEST][:LONGEST] for tokens, _ in every])
    places = np.arange(LONGEST)[None]

    def log_softmax_ST(table):
        return jax.nn.log_softmax(jnp.asarray(table), axis=-1)[places, befores]  # [S, T, V]

    def kl(table):
        log_p, log_q = log_softmax_ST(table), log_softmax_ST(other)
        return (p_S[:, None] * mask_ST * (jnp.exp(log_p) * (log_p - log_q)).sum(-1)).sum()

    now, reference = (
        np.take_along_axis(np.array(log_softmax_ST(t)), tokens_ST[..., None], -1)[..., 0] for t in (table, other)
    )
    log, ones = LogProbs(now=now, reference=reference), np.ones((len(every), 1))
    weights = policy_weights(Policy(kl_coef=1.0), np.zeros(len(every)), mask_ST, log, ones)
    found = -np.einsum("s,st,st...->...", p_S, weights, gradients)
    np.testing.assert_allclose(found, jax.grad(kl)(jnp.asarray(table)), atol=1e-12)
