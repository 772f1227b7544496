"""The training step: its loss weighs tokens alike however they are split, over micro-batches or devices."""

from functools import cache

import jax
import numpy as np
import optax
import pytest
from conftest import model_on

from jaxchat import sharding
from jaxchat.config import Compute, ModelConfig
from jaxchat.model.gpt import forward
from jaxchat.train.loop import place_batch
from jaxchat.train.optimizer import make_optimizer
from jaxchat.train.state import abstract_state, init_state
from jaxchat.train.step import make_train_step, split_micro_batches

CONFIG = ModelConfig(sequence_len=16, vocab_size=40, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
# SGD instead of Muon where weights are compared: Newton–Schulz brings the directions that hold only rounding up to
# the size of all others, and would compare noise. It moves weights by 0.1 × gradient, so gradients are compared.
SGD = optax.sgd(0.1)


def batch_of(weights_BT, seed=0):
    random = np.random.default_rng(seed)
    shape = (8, 16)
    return {
        "inputs": random.integers(0, 40, shape, dtype=np.int32),
        "targets": random.integers(0, 40, shape, dtype=np.int32),
        "weights": np.broadcast_to(np.asarray(weights_BT, np.float32), shape),
    }


def uneven_weights():
    """Most rows with few supervised tokens, some with none: micro-batches of very different weight."""
    random = np.random.default_rng(7)
    return (random.random((8, 16)) < np.array([0.05, 0.0, 0.9, 0.1, 0.0, 0.0, 1.0, 0.3])[:, None]).astype(np.float32)


@cache  # so that each shape is compiled once
def mesh_and_step(num_devices, optimizer, micro_tokens=0):
    mesh = sharding.make_mesh(jax.devices()[:num_devices])
    return mesh, make_train_step(model_on(mesh, CONFIG, micro_tokens=micro_tokens), optimizer)


def run(batch, *, micro=1, devices=1, optimizer=SGD, steps=2, micro_tokens=0):
    """-> (weights, metrics of the last step) after `steps` steps on the same batch, cut into micro-batches."""
    mesh, step = mesh_and_step(devices, optimizer, micro_tokens)
    state = init_state(0, model_on(mesh, CONFIG), optimizer)
    cut = {name: a.reshape(micro, 8 // micro, 16) for name, a in batch.items()}
    for _ in range(steps):
        state, metrics = step(state, place_batch(cut, mesh), np.float32(1.0))
    return jax.device_get(state), jax.device_get(metrics)


def same(a, b, rtol=2e-6):
    """Equal to float32 rounding: within 2e-6 of the largest of each weight (3e-7 was seen)."""
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=rtol * max(1e-3, np.abs(y).max())), a, b)


def test_accumulation_weighs_tokens_not_micro_batches():
    batch = batch_of(uneven_weights())
    whole, metrics = run(batch)
    assert metrics["weight"] == uneven_weights().sum()
    for micro in (2, 8):
        split, split_metrics = run(batch, micro=micro)
        same(split.params, whole.params)
        np.testing.assert_allclose(split_metrics["loss"], metrics["loss"], rtol=1e-6)


def test_a_bound_on_tokens_cuts_micro_batches():
    """At most 2 rows of 16 at a time: bit for bit what 4 micro-batches of 2 are; on two devices, 2 rows of each."""
    batch = batch_of(uneven_weights())
    split, bounded = run(batch, micro=4), run(batch, micro_tokens=47)
    jax.tree.map(np.testing.assert_array_equal, bounded, split)
    same(run(batch, micro_tokens=47, devices=2)[0].params, split[0].params)
    rows = np.arange(8)[None, :, None] + np.zeros((1, 8, 16), np.int32)
    for micro_tokens, devices, want in (
        (0, 1, [range(8)]),
        (16, 2, [[0, 4], [1, 5], [2, 6], [3, 7]]),
        (1, 8, [range(8)]),
    ):
        compute = Compute(mesh=sharding.make_mesh(jax.devices()[:devices]), micro_tokens=micro_tokens)
        got = split_micro_batches({"inputs": rows}, compute)["inputs"]
        assert got[:, :, 0].tolist() == [list(part) for part in want]


def test_loss_is_the_mean_over_what_is_supervised():
    """Against log-probabilities of the whole logits in float64; initial loss is ln V since the head is zero."""
    batch = batch_of(uneven_weights())
    first = run(batch, steps=1)[1]
    np.testing.assert_allclose(first["loss"], np.log(40), rtol=1e-6)
    state, _ = run(batch, steps=3)
    logits = jax.jit(forward, static_argnums=(2, 3))(state.params, batch["inputs"], CONFIG, Compute())
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
    want = (nll * batch["weights"]).sum() / batch["weights"].sum()
    np.testing.assert_allclose(run(batch, steps=4)[1]["loss"], want, rtol=1e-5)


def test_what_is_not_supervised_is_not_learnt():
    batch = batch_of(uneven_weights())
    other = batch | {"targets": np.where(batch["weights"] > 0, batch["targets"], (batch["targets"] + 1) % 40)}
    jax.tree.map(np.testing.assert_array_equal, run(batch)[0], run(other)[0])
    supervised_too = run(batch | {"weights": np.ones((8, 16), np.float32)})[0]
    assert np.abs(supervised_too.params.lm_head - run(batch)[0].params.lm_head).max() > 1e-3


def test_signed_weights_over_a_count_of_their_own():
    """Weights may sum to 0, as centred advantages do. The gradient is linear in them: that of +w plus that of −w."""
    signs = np.where(np.arange(8)[:, None] % 2, 1.0, -1.0) * np.ones((8, 16))
    counts = np.zeros((8, 16), np.float32)
    counts[3, 5] = 64.0  # where it stands makes no difference

    def moved(weights):
        batch = batch_of(weights) | {"counts": counts}
        state, metrics = run(batch, micro=4, steps=1)
        assert metrics["weight"] == 64 and metrics["empty_steps"] == 0
        start = jax.device_get(init_state(0, model_on(mesh_and_step(1, SGD)[0], CONFIG), SGD).params)
        return jax.tree.map(lambda a, b: a - b, state.params, start)

    parts = moved(np.maximum(signs, 0)), moved(np.minimum(signs, 0))
    assert np.abs(moved(signs).lm_head).max() > 1e-4
    # Weights of about 1 hold steps of 0.01 to 6e-8.
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(a, b + c, atol=3e-7), moved(signs), *parts)


@pytest.mark.parametrize("micro, weights", [pytest.param(1, 0.0, marks=pytest.mark.slow), (4, 0.0), (4, np.inf)])
def test_a_step_with_nothing_supervised_or_not_finite_changes_nothing(micro, weights):
    optimizer = make_optimizer(CONFIG, grad_clip=1.0)
    mesh = sharding.make_mesh(jax.devices()[:1])
    before = jax.device_get(init_state(0, model_on(mesh, CONFIG), optimizer))
    after, metrics = run(batch_of(weights), micro=micro, optimizer=optimizer, steps=1)
    assert after.step == 1 and metrics["nonfinite"] == (weights > 0) and metrics["empty_steps"] == (weights == 0)
    assert weights > 0 or metrics["loss"] == 0.0
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, before.opt_state)


def test_eight_devices_compute_what_one_does(devices):
    batch = batch_of(uneven_weights())
    one, metrics = run(batch)
    eight, metrics8 = run(batch, devices=len(devices))
    same(eight.params, one.params)
    np.testing.assert_allclose(metrics8["loss"], metrics["loss"], rtol=1e-6)


def test_learning_rate_multiplier_scales_the_step():
    optimizer = make_optimizer(CONFIG)
    mesh = sharding.make_mesh(jax.devices()[:1])
    step = make_train_step(model_on(mesh, CONFIG), optimizer)
    start = jax.device_get(init_state(0, model_on(mesh, CONFIG), optimizer).params)
    moved = {}
    cut = {name: a[None] for name, a in batch_of(1.0).items()}
    for multiplier in (0.0, 0.5, 1.0):
        state, _ = step(
            init_state(0, model_on(mesh, CONFIG), optimizer), place_batch(cut, mesh), np.float32(multiplier)
        )
        moved[multiplier] = jax.tree.map(lambda a, b: np.asarray(a) - b, state.params, start)
    assert not any(np.any(a) for a in jax.tree.leaves(moved[0.0]))
    # Weights of about 1 hold steps of 0.01 to 6e-8.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b / 2, atol=2e-7), moved[0.5], moved[1.0])
    assert step._cache_size() == 1  # a new multiplier is no new compilation


def test_state_lies_as_its_specs_say(devices):
    """On a mesh with fsdp and tensor axes every weight is cut over them, and Muon's momentum with its weight."""
    mesh = jax.sharding.Mesh(np.array(devices).reshape(2, 2, 2), sharding.AXES)
    optimizer = make_optimizer(CONFIG, grad_clip=1.0)
    state = init_state(0, model_on(mesh, CONFIG), optimizer)
    target = abstract_state(model_on(mesh, CONFIG), optimizer)
    jax.tree.map(lambda a, t: a.sharding == t.sharding or pytest.fail(f"{a.sharding} {t.sharding}"), state, target)
    for leaf in jax.tree.leaves(state.params):
        assert leaf.addressable_shards[0].data.size * 4 == leaf.size
    large = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.size > 100]
    assert len(large) == 6 + 2 * 2  # Muon's momenta; AdamW's two moments of embedding and head
    assert all(leaf.addressable_shards[0].data.size * 4 == leaf.size for leaf in large)
    one = init_state(0, model_on(sharding.make_mesh(devices[:1]), CONFIG), optimizer)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), jax.device_get(one.params))
