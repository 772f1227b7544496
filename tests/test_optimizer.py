"""Muon and AdamW against plain float64 ones; the schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxchat.config import ModelConfig
from jaxchat.model import params as model_params
from jaxchat.train.optimizer import make_optimizer, orthogonalize
from jaxchat.train.schedule import lr_multiplier

CONFIG = ModelConfig(sequence_len=8, vocab_size=20, n_layer=2, n_head=2, n_kv_head=1, n_embd=16)


def gradients(seed):
    leaves, tree = jax.tree.flatten(model_params.shapes(CONFIG))
    random = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [random.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])


def plain_newton_schulz(g):
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / np.linalg.norm(x)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if g.shape[0] > g.shape[1] else x


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 16, 64), (2, 64, 16)])
def test_orthogonalize(shape):
    g = np.random.default_rng(0).normal(size=shape)
    got = orthogonalize(jnp.asarray(g, jnp.float32))
    want = np.stack([plain_newton_schulz(matrix) for matrix in g])
    np.testing.assert_allclose(got, want, atol=2e-5)  # float32 against float64 over 15 products of about 1
    # The five steps leave singular values between about 0.7 and 1.2.
    assert np.all((np.linalg.svd(got)[1] > 0.6) & (np.linalg.svd(got)[1] < 1.3))


def test_five_steps_of_all_three_groups():
    """Each weight after five steps is what the formulas of spec.md give in float64."""
    optimizer = make_optimizer(CONFIG, matrix_lr=0.02, embedding_lr=0.2, unembedding_lr=0.004, weight_decay=0.01)
    params = jax.tree.map(jnp.asarray, gradients(99))
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for step in range(5):
        updates, state = update(gradients(step), state, params)
        params = optax.apply_updates(params, updates)

    width = (CONFIG.n_embd / 768) ** -0.5
    fans = {"wq": (16, 16), "wk": (16, 8), "wv": (16, 8), "wo": (16, 16), "w_up": (16, 64), "w_down": (64, 16)}

    def series(pick):
        return [np.asarray(pick(gradients(seed)), np.float64) for seed in [99, *range(5)]]

    for pick, lr in [(lambda p: p.wte, 0.2), (lambda p: p.lm_head, 0.004)]:
        weight, *grads = series(pick)
        m = v = 0
        for t, g in enumerate(grads, 1):
            m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
            step = (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-10)
            weight = weight - lr * width * (step + 0.01 * weight)
        np.testing.assert_allclose(pick(params), weight, atol=2e-5)
    for name, (fan_in, fan_out) in fans.items():
        weight, *grads = series(lambda p, name=name: getattr(p.blocks, name))
        shape, buf = weight.shape, 0
        for t, g in enumerate(grads):
            momentum = 0.85 + 0.10 * min(t / 300, 1)
            buf = buf * momentum + g * (1 - momentum)
            nesterov = (g * (1 - momentum) + buf * momentum).reshape(2, fan_in, fan_out)
            direction = np.stack([plain_newton_schulz(u) for u in nesterov]).reshape(shape)
            weight = weight - 0.02 * max(1, fan_out / fan_in) ** 0.5 * direction
        np.testing.assert_allclose(getattr(params.blocks, name), weight, atol=2e-5, err_msg=name)


def test_clipping_bounds_the_norm_over_all_weights():
    """Only AdamW's eps sees the scale of a gradient, so the clipped gradient is read from its first moment."""
    params = jax.tree.map(jnp.asarray, gradients(0))
    grads = gradients(1)
    norm = optax.tree.norm(grads)
    moments = {}
    for clip in (0.0, 1.0, 1e9):
        optimizer = make_optimizer(CONFIG, grad_clip=clip)
        state = jax.jit(optimizer.update)(grads, optimizer.init(params), params)[1]
        found = [s for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu")]
        moments[clip] = found[0].mu.wte if not isinstance(found[0].mu.wte, optax.MaskedNode) else found[1].mu.wte
    np.testing.assert_array_equal(moments[0.0], moments[1e9])
    np.testing.assert_allclose(moments[1.0], moments[0.0] / norm, rtol=1e-5)


def test_schedules_of_the_three_stages():
    def base(done):
        return lr_multiplier(done / 100, 0.01, warmup_ratio=0.0, warmdown_ratio=0.2, final_lr_frac=0.0)

    assert base(0) == base(79) == 1.0 and base(80) == pytest.approx(1.0)
    assert base(90) == pytest.approx(0.5) and base(99) == pytest.approx(0.05)

    def warm(done):
        return lr_multiplier(done / 100, 0.01, warmup_ratio=0.1, warmdown_ratio=0.5, final_lr_frac=0.1)

    assert warm(0) == pytest.approx(0.1) and warm(9) == pytest.approx(1.0) and warm(75) == pytest.approx(0.55)
    assert warm(100) == pytest.approx(0.1)

    def sft(done):
        return lr_multiplier(done / 100, 0.01, warmup_ratio=0.0, warmdown_ratio=1.0, final_lr_frac=0.0)

    assert [sft(0), sft(25)] == [1.0, 0.75]
