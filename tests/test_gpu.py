"""On a GPU only: what is computed there in bfloat16, by cuDNN too, beside float32.

JAXCHAT_TEST_PLATFORM=cuda python -m pytest tests/test_gpu.py; elsewhere these skip.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat.config import Compute, Model, ModelConfig
from jaxchat.model import gpt, kernels
from jaxchat.model.attention import causal_attention, kernel_for
from jaxchat.train.loss import Chunking, weighted_nll
from jaxchat.train.optimizer import make_optimizer
from jaxchat.train.state import init_state
from jaxchat.train.step import make_train_step

# Relative to the norm. bfloat16 keeps 8 bits, so one rounding is off by 2^-9 = 0.002 at most; what is compared here has
# gone through a few of them, one after the other.
BFLOAT16 = 1e-2


@pytest.fixture(autouse=True)
def on_gpu():
    if jax.default_backend() != "gpu":
        pytest.skip("needs a GPU")
    with jax.default_matmul_precision("highest"):  # else float32 products are TF32's, with 11 bits
        yield


def normal(seed: int, *shape, dtype=jnp.bfloat16):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def off(found, expected) -> float:
    """‖found − expected‖ / ‖expected‖; NaN is never near."""
    found, expected = (np.asarray(jax.device_get(a), np.float64) for a in (found, expected))
    assert np.isfinite(found).all()
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("time, heads, kv_heads, head_dim", [(256, 6, 6, 128), (130, 8, 2, 64), (64, 3, 3, 72)])
def test_cudnn_attention(time, heads, kv_heads, head_dim, segments):
    assert kernel_for("cudnn", head_dim, time) == "cudnn"
    q, k = (normal(i, 2, time, n, head_dim) for i, n in enumerate((heads, kv_heads)))
    v, dy = normal(2, 2, time, kv_heads, head_dim), normal(3, 2, time, heads, head_dim)
    segments_BT = jnp.cumsum(jax.random.bernoulli(jax.random.key(4), 0.03, (2, time)), axis=1) if segments else None

    def with_gradients(implementation, *qkv):
        def attend(q, k, v):
            return causal_attention(q, k, v, implementation, segments_BT)

        y, back = jax.vjp(attend, *qkv)
        return y, *back(dy.astype(y.dtype))

    found = jax.jit(with_gradients, static_argnums=0)("cudnn", q, k, v)
    expected = jax.jit(with_gradients, static_argnums=0)("xla", *(a.astype(jnp.float32) for a in (q, k, v)))
    for name, a, b in zip(("y", "dq", "dk", "dv"), found, expected, strict=True):
        assert off(a, b) < BFLOAT16, name


@pytest.mark.parametrize("heads, head_dim, width", [(6, 128, 768), (3, 72, 1280), (1, 64, 96)])
def test_norm_kernels(heads, head_dim, width):
    """As gpt.py's own functions, in bfloat16 as in float32."""
    x, dy = normal(0, 2, 130, heads, head_dim), normal(1, 2, 130, heads, head_dim)
    wide, dwide, dh = (normal(2 + i, 2, 130, width) for i in range(3))
    tables, eps = gpt.rotary_tables(jnp.arange(130)[None], head_dim, 10_000.0), 1.1920929e-07

    @partial(jax.jit, static_argnums=0)
    def with_gradients(form, x, dy, wide, dwide, dh):
        y, back = jax.vjp(lambda x: form.rotate_norm(x, tables, eps), x)
        (same, h), norm_back = jax.vjp(lambda x: form.residual_norm(x, eps=eps), wide)
        return y, *back(dy), same, h, *norm_back((dwide, dh))

    arrays = (x, dy, wide, dwide, dh)
    found = with_gradients(kernels, *arrays)
    expected = with_gradients(gpt, *(a.astype(jnp.float32) for a in arrays))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == jnp.bfloat16 and off(a, b) < BFLOAT16


@pytest.mark.parametrize("by_kernel", [True, False])
def test_loss(by_kernel):
    x, head = normal(0, 4, 256, 256), normal(1, 256, 5000) / 4  # logits to ±15
    targets = jax.random.randint(jax.random.key(2), (4, 256), 0, 5000)
    weights = jax.random.bernoulli(jax.random.key(3), 0.5, (4, 256)).astype(jnp.float32)

    @partial(jax.jit, static_argnums=2)
    def with_gradients(x, head, by_kernel):
        def nll(x, head):
            return weighted_nll(x, head, targets, weights, Chunking(64, 15.0, None, by_kernel))

        return jax.value_and_grad(nll, (0, 1))(x, head)

    nll, gradients = with_gradients(x, head, by_kernel)
    expected, expected_gradients = with_gradients(x.astype(jnp.float32), head.astype(jnp.float32), False)
    assert off(nll, expected) < 1e-3  # errors of a thousand tokens even out
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert off(a, b) < BFLOAT16


def test_training_goes_as_in_float32():
    model = ModelConfig(sequence_len=128, vocab_size=512, n_layer=3, n_head=2, n_kv_head=2, n_embd=128)
    tokens = np.random.default_rng(0).integers(0, 512, (1, 8, 128), dtype=np.int32)
    batch = {"inputs": tokens, "targets": np.roll(tokens, -1, axis=2), "weights": np.ones((1, 8, 128), np.float32)}
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), ("data", "fsdp", "tensor"))
    losses = {}
    for name, compute in {
        "bfloat16": Compute.for_backend(mesh=mesh, remat="none"),
        "float32": Compute.for_backend("float32", mesh=mesh, remat="none", kernels=False),
    }.items():
        optimizer = make_optimizer(model, grad_clip=1.0, muon_dtype=jnp.dtype(compute.dtype), mesh=mesh)
        bundle = Model(model, compute)
        step, state = make_train_step(bundle, optimizer), init_state(0, bundle, optimizer)
        losses[name] = []
        for _ in range(20):
            state, metrics = step(state, batch, np.float32(1.0))
            losses[name].append(float(metrics["loss"]))
    assert losses["float32"][-1] < losses["float32"][0] - 1
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=0.03)
