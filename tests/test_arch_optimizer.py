"""The optimizer of 2026 against a plain float64 one, all groups over twenty steps; schedules; bfloat16 tables."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import random_params

from jaxchat.config import ARCHITECTURES, ModelConfig
from jaxchat.model import params as model_params
from jaxchat.train.horizon import decay_2026, momentum_2026
from jaxchat.train.optimizer import POLAR_EXPRESS, make_optimizer, table_2026

CONFIG = ModelConfig(sequence_len=8, vocab_size=20, n_layer=3, n_head=2, n_kv_head=1, n_embd=32, short_window=4)
CONFIG = dataclasses.replace(CONFIG, **(ARCHITECTURES["2026"] | {"vocab_multiple": 1}))
STEPS = 20
# lr, betas and decay of spec-2026, 2.1, times what they are scaled by
SCALE = (CONFIG.n_embd / 768) ** -0.5
ADAMW = {
    "lm_head": (0.008 * SCALE, 0.8, 0.96, 0.01),
    "wte": (0.3 * SCALE, 0.8, 0.995, 0.001),
    "blocks.value_table": (0.15 * SCALE, 0.8, 0.995, 0.01),
    "blocks.stream_scale": (0.005, 0.8, 0.95, 0.05),
    "blocks.embedding_scale": (0.5, 0.96, 0.95, 0.0),
    "smear_gate": (0.2, 0.8, 0.95, 0.0),
    "smear_scale": (0.2, 0.8, 0.95, 0.0),
    "backout_scale": (0.2, 0.8, 0.95, 0.0),
}


def plain_momentum(it, n):
    """spec-2026, 3.6, with n steps, of which the last 65 % cool down; a ramp of 8 steps instead of 400."""
    w = round(0.65 * n)
    if it < 8:
        return 0.85 + 0.12 * it / 8
    return 0.97 - 0.07 * (it - (n - w)) / w if it >= n - w else 0.97


def plain_muon(g, p, state, momentum, lr, decay):
    """2.2 to 2.3 of the page for one matrix, [out, in], in float64. -> the new matrix."""
    m, n = g.shape
    state["M"] = state.get("M", 0) + (1 - momentum) * (g - state.get("M", 0))
    x = g + momentum * (state["M"] - g)
    x = x * (np.linalg.norm(x) / np.sqrt(m)) / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-6)
    x = x / (1.01 * np.linalg.norm(x) + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        gram = x.T @ x if m > n else x @ x.T
        factor = b * gram + c * gram @ gram
        x = a * x + (x @ factor if m > n else factor @ x)
    x = x * np.sqrt(min(m, n)) / max(np.linalg.norm(x), 1e-6)
    axis = 1 if m >= n else 0
    v = np.mean(x * x, axis=axis, keepdims=True)
    state["V"] = state.get("V", 0) + 0.1 * (v - state.get("V", 0))
    r = np.maximum(state["V"], 1e-10) ** -0.5
    count = x.shape[axis]
    x = x * r * np.sqrt(count * v.sum()) / max(np.sqrt((count * v * r * r).sum()), 1e-10)
    eta = lr * np.sqrt(max(1, m / n))
    return p - eta * x - eta * decay * p * (x * p >= 0)


def test_twenty_steps_of_all_groups():
    """Each weight is what the page's formulas give in float64, to 1e-5 of its norm."""
    table = table_2026(
        CONFIG, momentum=momentum_2026(STEPS, round(0.65 * STEPS), warmup=8), decay=decay_2026(0.28, STEPS)
    )
    optimizer = make_optimizer(CONFIG, table=table)
    params = start = random_params(CONFIG, 99, 0.05)
    grads = [random_params(CONFIG, step, [1.0, 0.3, 0.01][step % 3]) for step in range(STEPS)]
    multipliers = np.linspace(1.0, 0.2, STEPS, dtype=np.float32)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for step in range(STEPS):
        updates, state = update(grads[step], state, params)
        params = optax.apply_updates(params, optax.tree.scale(multipliers[step], updates))

    def named(tree):
        leaves = zip(model_params.named(CONFIG), jax.tree.leaves(tree), strict=True)
        return {name: np.asarray(leaf, np.float64) for name, leaf in leaves}

    want, states = named(start), {}
    for it in range(STEPS):
        for name, g in named(grads[it]).items():
            weight = model_params.named(CONFIG)[name]
            if name in ADAMW:
                lr, b1, b2, wd = ADAMW[name]
                lr *= multipliers[it]
                m, v = states.get(name, (0, 0))
                states[name] = m, v = m + (1 - b1) * (g - m), v + (1 - b2) * (g * g - v)
                p = want[name] * (1 - lr * wd)
                want[name] = p - lr / (1 - b1 ** (it + 1)) * m / (np.sqrt(v / (1 - b2 ** (it + 1))) + 1e-10)
                continue
            decay = 0.28 * 0.5 * (1 + np.cos(np.pi * it / STEPS))
            new = []
            for i, (matrix, p) in enumerate(
                zip(*(a.reshape(-1, weight.fan_in, weight.fan_out) for a in (g, want[name])), strict=True)
            ):
                own = states.setdefault((name, i), {})
                lr = 0.02 * multipliers[it]
                new.append(plain_muon(matrix.T, p.T, own, plain_momentum(it, STEPS), lr, decay).T)
            want[name] = np.array(new).reshape(g.shape)
    found = named(params)
    errors = {name: np.linalg.norm(found[name] - w) / np.linalg.norm(w) for name, w in want.items()}
    print({name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.slow
def test_tables_in_bfloat16():
    """Weights, moments and gradients of the tables are bfloat16; a step is float32's, rounded once."""
    narrow = dataclasses.replace(CONFIG, table_dtype="bfloat16", n_layer=1)
    wide = dataclasses.replace(narrow, table_dtype="float32")
    shapes = model_params.shapes(narrow)
    assert {str(a.dtype) for a in (shapes.wte, shapes.blocks.value_table)} == {"bfloat16"}
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype(jnp.float32), random_params(wide, 0, 0.1))
    grads = random_params(wide, 1, 1.0)
    results = []
    for config in (narrow, wide):
        own = jax.tree.map(lambda p, s: p.astype(s.dtype), params, model_params.shapes(config))
        optimizer = make_optimizer(config, table=table_2026(config))
        state = optimizer.init(own)
        updates, new = jax.jit(optimizer.update)(grads, state, own)
        assert jax.tree.map(lambda a: a.dtype, new) == jax.tree.map(lambda a: a.dtype, state)
        results.append((updates, new))
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        near = 2**-8 if one.dtype == jnp.bfloat16 else 1e-6
        np.testing.assert_allclose(one.astype(np.float32), other, rtol=near, atol=1e-7)
