"""Muon and AdamW against plain float64 ones; the schedule."""

import dataclasses
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxchat.config import ModelConfig
from jaxchat.model import params as model_params
from jaxchat.train.optimizer import Muon, MuonState, make_optimizer, orthogonalize
from jaxchat.train.schedule import lr_multiplier

CONFIG = ModelConfig(sequence_len=8, vocab_size=20, n_layer=2, n_head=2, n_kv_head=1, n_embd=16)
ADAMW = {"wte": 0.2, "lm_head": 0.004}  # learning rates
FANS = {"wq": (16, 16), "wk": (16, 8), "wv": (16, 8), "wo": (16, 16), "w_up": (16, 64), "w_down": (64, 16)}
PICK = {name: operator.attrgetter(name if name in ADAMW else f"blocks.{name}") for name in (*ADAMW, *FANS)}


def gradients(seed):
    leaves, tree = jax.tree.flatten(model_params.shapes(CONFIG))
    random = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [random.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])


def scaled_gradients(step):
    """Of the size of the weights' own, or much smaller, in turn."""
    return jax.tree.map(lambda g: g * np.float32([1.0, 0.3, 0.01][step % 3]), gradients(step))


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
    got = orthogonalize(jnp.asarray(g, jnp.float32), jnp.float32, Muon(lr=0.0, momentum=None))
    want = np.stack([plain_newton_schulz(matrix) for matrix in g])
    np.testing.assert_allclose(got, want, atol=2e-5)  # float32 against float64 over 15 products of about 1
    # The five steps leave singular values between about 0.7 and 1.2.
    assert np.all((np.linalg.svd(got)[1] > 0.6) & (np.linalg.svd(got)[1] < 1.3))


def test_twenty_steps_of_all_three_groups():
    """Twenty steps give the weights of the formulas in float64, to 1e-5 of their norms (4e-7 is seen).

    With everything on: clipping (some steps' gradients are above the bound, some below), weight decay, a schedule.
    """
    steps, clip, decay = 20, 40.0, 0.01
    optimizer = make_optimizer(CONFIG, weight_decay=decay, grad_clip=clip, momentum_warmup=15)
    params = jax.tree.map(lambda w: jnp.asarray(0.01 * w), gradients(99))  # small: the updates are most of the result
    start = params
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    multipliers = np.linspace(1.0, 0.2, steps, dtype=np.float32)
    for step in range(steps):
        updates, state = update(scaled_gradients(step), state, params)
        params = optax.apply_updates(params, optax.tree.scale(multipliers[step], updates))

    def in_float64(tree):
        return {name: np.asarray(pick(tree), np.float64) for name, pick in PICK.items()}

    weights, buffers = in_float64(start), dict.fromkeys(PICK, 0.0)
    squares = dict.fromkeys(ADAMW, 0.0)
    clipped = 0
    for step in range(steps):
        grads = in_float64(scaled_gradients(step))
        norm = np.sqrt(sum(np.sum(g * g) for g in grads.values()))
        clipped += norm > clip
        momentum = 0.85 + 0.10 * min(step / 15, 1)
        for name, g in grads.items():
            g, w = g * min(1.0, clip / norm), weights[name]
            if name in ADAMW:
                lr = ADAMW[name] * (CONFIG.n_embd / 768) ** -0.5
                buffers[name] = 0.8 * buffers[name] + 0.2 * g
                squares[name] = 0.95 * squares[name] + 0.05 * g * g
                mean, square = buffers[name] / (1 - 0.8 ** (step + 1)), squares[name] / (1 - 0.95 ** (step + 1))
                weights[name] = w - multipliers[step] * lr * (mean / (np.sqrt(square) + 1e-10) + decay * w)
            else:
                fan_in, fan_out = FANS[name]
                buffers[name] = momentum * buffers[name] + (1 - momentum) * g
                nesterov = (1 - momentum) * g + momentum * buffers[name]
                layers = nesterov.reshape(CONFIG.n_layer, fan_in, fan_out)
                direction = np.stack([plain_newton_schulz(layer) for layer in layers]).reshape(w.shape)
                weights[name] = w - multipliers[step] * 0.02 * max(1, fan_out / fan_in) ** 0.5 * direction
    assert 0 < clipped < steps
    errors = {name: np.linalg.norm(PICK[name](params) - w) / np.linalg.norm(w) for name, w in weights.items()}
    print({name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("options, first", [({}, 0.85), ({"momentum_warmup": 0}, 0.95)])
def test_the_momentum_of_the_first_update(options, first):
    optimizer = make_optimizer(CONFIG, **options)
    grads = gradients(0)
    state = jax.jit(optimizer.update)(grads, optimizer.init(grads), grads)[1]
    [muon] = [s for s in jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, MuonState)) if isinstance(s, MuonState)]
    np.testing.assert_allclose(muon.momentum.blocks.wq, (1 - first) * grads.blocks.wq, rtol=1e-5)


def test_a_weight_without_a_rule_is_refused(monkeypatch):
    declared = model_params.declare(CONFIG)
    strange = declared.replace(wte=dataclasses.replace(declared.wte, group="gate"))
    monkeypatch.setattr("jaxchat.train.optimizer.declare", lambda config: strange)
    with pytest.raises(ValueError, match="gate"):
        make_optimizer(CONFIG).init(gradients(0))


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_the_state_of_older_checkpoints(clip):
    """Checkpoints restore by these names: another tree would not open what earlier versions saved."""
    muon, adam = "1.inner_states.matrix.inner_state.0", "1.inner_states.{}.inner_state.0.{}"
    names = [f"{muon}.momentum.blocks.{name}" for name in FANS] + [f"{muon}.count"]
    for group, weight in (("embedding", "wte"), ("head", "lm_head")):
        names += [adam.format(group, part) for part in ("count", f"mu.{weight}", f"nu.{weight}")]
    state = jax.eval_shape(make_optimizer(CONFIG, grad_clip=clip).init, model_params.shapes(CONFIG))
    found = jax.tree_util.tree_leaves_with_path(state)
    assert {jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in found} == set(names)


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
