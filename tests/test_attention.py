"""Attention by blocks against the definition in float64, values and gradients, over block borders and grouped heads."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxchat.config import ModelConfig
from jaxchat.model.attention import (
    causal_attention,
    decoding_kernel_for,
    gpu_decoding_attention,
    kernel_for,
    splash_attention,
    splash_block,
    tpu_decoding_attention,
)  # fmt: skip
from jaxchat.model.attention_cpu import QUERY_BLOCK, block_causal_attention
from jaxchat.model.gpt import rms_norm


def plain_attention(q_BTNH, k_BTKH, v_BTKH):
    """Softmax over the keys at or before each query, one query at a time, in float64."""
    q, k, v = (np.asarray(a, np.float64) for a in (q_BTNH, k_BTKH, v_BTKH))
    k, v = (np.repeat(a, q.shape[2] // k.shape[2], axis=2) for a in (k, v))
    y = np.empty_like(q)
    for t in range(q.shape[1]):
        scores_BNS = np.einsum("bnh,bsnh->bns", q[:, t], k[:, : t + 1]) / np.sqrt(q.shape[-1])
        weights_BNS = np.exp(scores_BNS - scores_BNS.max(-1, keepdims=True))
        weights_BNS /= weights_BNS.sum(-1, keepdims=True)
        y[:, t] = np.einsum("bns,bsnh->bnh", weights_BNS, v[:, : t + 1])
    return y


def inputs(time, kv_heads, dtype=jnp.float32, heads=4, head_dim=16):
    keys = jax.random.split(jax.random.key(time), 3)
    shapes = [(2, time, n, head_dim) for n in (heads, kv_heads, kv_heads)]
    q, k, v = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    return [a.astype(dtype) for a in (rms_norm(q, 1e-7), rms_norm(k, 1e-7), v)]


@pytest.mark.parametrize("time, kv_heads", [(5, 4), (QUERY_BLOCK, 2), (2 * QUERY_BLOCK + 7, 1)])
def test_blocks_are_the_definition(time, kv_heads):
    """Values below 4; sums of up to 263 rounded terms were seen to differ by 1e-6. A key too many differs by 0.01."""
    q, k, v = inputs(time, kv_heads)
    np.testing.assert_allclose(block_causal_attention(q, k, v), plain_attention(q, k, v), atol=1e-5)


def test_gradients_are_those_of_the_library():
    """Against jax.nn's attention, by another road: one softmax over all keys, with the maximum taken off."""
    arrays = inputs(QUERY_BLOCK + 9, 2)

    def squares(implementation):
        return jax.jit(jax.grad(lambda a: jnp.sum(causal_attention(*a, implementation) ** 2)))(arrays)

    for got, want in zip(squares("blocks"), squares("xla"), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5 * float(jnp.abs(want).max()))


def test_the_largest_scores_do_not_overflow():
    """Equal normed queries and keys of head dimension 128 score √128, the most there can be; all weights are equal."""
    q = jnp.ones((1, 300, 1, 128))
    v = jax.random.normal(jax.random.key(0), (1, 300, 1, 128))
    y = block_causal_attention(q, q, v)
    np.testing.assert_allclose(y[0, -1, 0], v[0, :, 0].mean(0), atol=1e-5)


def test_bfloat16_stays_near():
    """bfloat16 keeps 8 bits: 0.4 % of values up to 4 for each of v, the weights and the result."""
    q, k, v = inputs(QUERY_BLOCK + 1, 2, jnp.bfloat16)
    got = block_causal_attention(q, k, v)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), plain_attention(q, k, v), atol=3 * 0.004 * 4)


@pytest.mark.parametrize("implementation", ["blocks", "xla"])
@pytest.mark.parametrize("time, kv_heads", [(7, 4), (QUERY_BLOCK + 9, 2), (2 * QUERY_BLOCK + 7, 1)])
def test_segments_do_not_see_each_other(implementation, time, kv_heads):
    """Each segment by itself, in float64. Borders lie within blocks and on them; the last segment is padding."""
    q, k, v = inputs(time, kv_heads)
    borders = [[0, 2, 3, time], [0, min(QUERY_BLOCK, 5), time - 1, time]]
    segments_BT = np.zeros((2, time), np.int32)
    want = np.zeros(q.shape)
    for b, row in enumerate(borders):
        for number, (start, end) in enumerate(zip(row, row[1:], strict=False), 1):
            segments_BT[b, start:end] = number % (len(row) - 1)
            part = (slice(b, b + 1), slice(start, end))
            want[part] = plain_attention(q[part], k[part], v[part])
    got = causal_attention(q, k, v, implementation, segments_BT)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.abs(np.asarray(causal_attention(q, k, v, implementation)) - want).max() > 0.01


def test_gradients_with_segments_are_those_of_the_library():
    arrays, segments_BT = inputs(QUERY_BLOCK + 9, 2), np.arange(2 * (QUERY_BLOCK + 9)).reshape(2, -1) // 50

    def squares(implementation):
        return jax.jit(jax.grad(lambda a: jnp.sum(causal_attention(*a, implementation, segments_BT) ** 2)))(arrays)

    for got, want in zip(squares("blocks"), squares("xla"), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5 * float(jnp.abs(want).max()))


@pytest.mark.slow
def test_the_kernel_for_tpus():
    """Run by XLA operations here; its lanes are filled up: 140 tokens to 256, 16 features to 64. Grouped heads."""
    arrays, segments_BT = inputs(140, 2), np.arange(2 * 140, dtype=np.int32).reshape(2, -1) // 50

    def splash(*a):
        return splash_attention(*a, interpret=True)

    np.testing.assert_allclose(jax.jit(splash)(*arrays), plain_attention(*arrays), atol=1e-5)

    def squares(attend):
        return jax.jit(jax.value_and_grad(lambda a: jnp.sum(attend(*a, segments_BT) ** 2)))(arrays)

    (value, got), (want_value, want) = squares(splash), squares(block_causal_attention)
    np.testing.assert_allclose(value, want_value, rtol=1e-5)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))


def test_shapes_that_cudnn_refuses():
    """Head dimension 68 and an odd time run even here, where there is no cuDNN."""
    for arrays in (inputs(4, 2, jnp.bfloat16, head_dim=68), inputs(5, 2, jnp.bfloat16)):
        got, want = (causal_attention(*arrays, kernel) for kernel in ("cudnn", "xla"))
        np.testing.assert_array_equal(got, want)


def test_every_depth_has_heads_that_cudnn_takes():
    for depth in range(1, 65):
        model = ModelConfig.from_depth(depth, sequence_len=8, vocab_size=8)
        assert model.head_dim % 8 == 0 and model.head_dim <= 128, depth
        assert kernel_for("cudnn", model.head_dim, 8) == "cudnn"
    heads = {5: 80, 12: 128, 17: 64, 19: 64, 20: 128, 23: 64, 25: 80}
    assert {d: ModelConfig.from_depth(d, sequence_len=8, vocab_size=8).head_dim for d in heads} == heads


@pytest.mark.parametrize("capability, largest", [("8.0", 128), ("9.0", 256), ("10.3", 256)])
def test_the_largest_head_of_a_gpu(monkeypatch, capability, largest):
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(compute_capability=capability)])
    assert [kernel_for("cudnn", head_dim, 8) for head_dim in (largest, largest + 8)] == ["cudnn", "xla"]
    assert [kernel_for("cudnn", 64, time) for time in (8, 9)] == ["cudnn", "xla"]


@pytest.mark.parametrize("kernel, window", [("gpu", None), ("gpu", 50), ("tpu", None)])
def test_decoding_kernels_read_what_a_row_sees(kernel, window):
    """Run by XLA operations here; against the row's attention in float64. What it must not see is poison.

    A row may stand beyond the last slot: it is done, and its token is not written.
    """
    time, head_dim = 192, 128 if kernel == "tpu" else 16
    q, k, v = inputs(time, 2, heads=2, head_dim=head_dim)
    positions_B = np.array([70, time])
    q_B1NH = q[np.arange(2), np.minimum(positions_B, time - 1)][:, None]
    first_B = np.maximum(positions_B - (window or time), 0)
    slots_1S = np.arange(time)[None]
    hidden_BS = (slots_1S > positions_B[:, None]) | (slots_1S < first_B[:, None])
    k_BKSH, v_BKSH = (jnp.swapaxes(jnp.where(hidden_BS[..., None, None], 1e4, a), 1, 2) for a in (k, v))
    if kernel == "gpu":
        got = gpu_decoding_attention(q_B1NH, k_BKSH, v_BKSH, positions_B, window, interpret=True)
    else:
        with pltpu.force_tpu_interpret_mode():
            got = tpu_decoding_attention(q_B1NH, k_BKSH, v_BKSH, jnp.asarray(positions_B, jnp.int32))
    # A TPU's products round their operands to bfloat16: 0.4 % of values below 0.4; a key too few changes 0.01.
    atol = 1e-5 if kernel == "gpu" else 4e-3
    for b in range(2):
        seen = slice(first_B[b], min(positions_B[b], time - 1) + 1)
        want = plain_attention(*(a[b : b + 1, seen] for a in (q, k, v)))[0, -1]
        np.testing.assert_allclose(got[b, 0], want, atol=atol)


def test_blocks_of_splash():
    """A quarter of what a query sees, from 256 to 1,024, or less where that does not divide the time."""
    sizes = {(512, None): 256, (2048, None): 512, (8192, None): 1024, (2048, 1024): 256, (384, None): 128}
    assert {case: splash_block(*case) for case in sizes} == sizes


def test_heads_that_decoding_kernels_have_no_tiles_for():
    found = {
        name: [decoding_kernel_for(name, h, None) for h in (64, 80, 128)] for name in ("cudnn", "splash", "blocks")
    }
    assert found["cudnn"] == ["cudnn", "xla", "cudnn"]
    assert found["splash"] == ["xla", "xla", "splash"] and found["blocks"] == ["blocks"] * 3
    assert [decoding_kernel_for(name, 128, 50) for name in found] == ["cudnn", "xla", "blocks"]
