"""The fused kernels against autodiff of the formulas that they replace."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params
from jax.sharding import PartitionSpec as P

from jaxchat import sharding
from jaxchat.config import Compute, ModelConfig
from jaxchat.model import gpt, kernels
from jaxchat.model import params as model_params
from jaxchat.train.loss import loss_sums

ROUNDING = {"float32": 0.0, "bfloat16": 2**-8}  # the one at the end, of each number
EPS = 1.1920929e-07
NOISE = 2e-6  # float32's, of the largest
INTERPRET = jax.default_backend() != "gpu"


def normal(seed: int, shape, dtype="float32"):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def check(ours, theirs, x, dy, dtype):
    """A function and its gradient against another's in float32, at numbers rounded to the dtype."""
    x, dy = jax.tree.map(lambda a: a.astype(dtype), (x, dy))

    @partial(jax.jit, static_argnums=0)
    def run(f, x, dy):
        y, pull = jax.vjp(f, x)
        return jax.tree.leaves((y, pull(dy)))

    found, wanted = run(ours, x, dy), run(theirs, *jax.tree.map(jnp.float32, (x, dy)))
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(np.float32(a), b, rtol=ROUNDING[dtype], atol=NOISE * abs(b).max())


# Neither heads nor tiles need be powers of two, and the last program's rows may end anywhere.
@pytest.mark.parametrize(
    "B, T, N, H, dtype",
    [(2, 16, 2, 64, "float32"), (1, 33, 1, 128, "bfloat16"), (2, 23, 3, 72, "bfloat16"), (3, 7, 2, 72, "float32")],
)
def test_rotate_norm(B, T, N, H, dtype):
    tables = gpt.rotary_tables(3 + jnp.arange(T)[None], H, 10_000.0)
    x_BTNH, dy_BTNH = normal(1, (B, T, N, H)), normal(2, (B, T, N, H))
    ours = partial(kernels.rotate_norm, tables=tables, eps=EPS, interpret=INTERPRET)
    check(ours, partial(gpt.rotate_norm, tables=tables, eps=EPS), x_BTNH, dy_BTNH, dtype)


@pytest.mark.parametrize(
    "B, T, D, dtype", [(1, 3, 768, "float32"), (2, 33, 96, "float32"), (3, 5, 96, "bfloat16"), (1, 2, 4096, "bfloat16")]
)
def test_residual_norm(B, T, D, dtype):
    x_BTD, *dy = (normal(seed, (B, T, D)) for seed in range(3))
    ours = partial(kernels.residual_norm, eps=EPS, interpret=INTERPRET)
    check(ours, partial(gpt.residual_norm, eps=EPS), x_BTD, tuple(dy), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_residual_norm_of_a_sum(dtype):
    x_BTD, y_BTD, *dy = (normal(seed, (2, 33, 96)) for seed in range(4))

    def ours(xy):
        return kernels.residual_norm(*xy, eps=EPS, interpret=INTERPRET)

    def theirs(xy):  # rounded as a sum of numbers of the dtype is
        x = sum(xy)
        x = x + jax.lax.stop_gradient(x.astype(dtype).astype(jnp.float32) - x)
        return gpt.residual_norm(x, eps=EPS)

    check(ours, theirs, (x_BTD, y_BTD), tuple(dy), dtype)


@pytest.mark.parametrize("M, V, dtype", [(3, 5000, "float32"), (2, 300, "bfloat16")])
def test_softcap_exp(M, V, dtype):
    u_MV = normal(0, (M, V), dtype) * 20  # to ±80: the softcap is flat there
    z_MV = 15 * np.tanh(np.float64(u_MV) / 15)
    d_MV, sum_M = kernels.softcap_exp(u_MV, 15.0, interpret=INTERPRET)
    assert d_MV.dtype == u_MV.dtype
    wanted = np.exp(z_MV) * (1 - (z_MV / 15) ** 2)
    np.testing.assert_allclose(np.float64(d_MV), wanted, rtol=ROUNDING[dtype], atol=NOISE * np.exp(z_MV.max()))
    np.testing.assert_allclose(sum_M, np.exp(z_MV).sum(1), rtol=1e-5)


@pytest.mark.parametrize("B", [4, 3])  # 3 rows can't be cut over the 4: each device has all
def test_on_a_mesh(B, devices):
    """The same numbers, and no device sends another anything."""
    mesh = sharding.make_mesh(devices, "data=2,fsdp=2,tensor=2")
    tables = gpt.rotary_tables(jnp.arange(6)[None], 64, 10_000.0)

    @partial(jax.jit, static_argnums=2)
    def run(x, dy, mesh):
        def both(x_BTNH, x_BTD):
            y_BTNH = kernels.rotate_norm(x_BTNH, tables, EPS, mesh, INTERPRET)
            return y_BTNH, *kernels.residual_norm(x_BTD, None, EPS, mesh, INTERPRET)

        y, pull = jax.vjp(both, *x)
        return *y, *pull(dy)

    BTNH, BTD = (B, 6, 4, 64), (B, 6, 96)
    x, dy = (normal(1, BTNH), normal(2, BTD)), (normal(3, BTNH), normal(4, BTD), normal(5, BTD))
    rows = sharding.row_axes(mesh, B)
    heads, features = P(rows, None, "tensor"), P(rows)
    placed = jax.device_put((x, dy), sharding.named(mesh, ((heads, features), (heads, features, features))))
    compiled = run.lower(*placed, mesh).compile()
    assert not re.search("all-reduce|all-gather|all-to-all|permute", compiled.as_text())
    for found, wanted in zip(compiled(*placed), run(x, dy, None), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("axes, remat, unroll", [("", "none", True), ("data=2,fsdp=2,tensor=2", "dots", False)])
def test_the_whole_loss(axes, remat, unroll, devices, monkeypatch):
    """Grouped heads, a width and a vocabulary that are no powers of two, some weights zero: the same with kernels."""
    call = kernels.pl.pallas_call
    monkeypatch.setattr(kernels.pl, "pallas_call", lambda *args, **rest: call(*args, **rest | {"interpret": INTERPRET}))
    model = ModelConfig(sequence_len=24, vocab_size=304, n_layer=2, n_head=4, n_kv_head=2, n_embd=96)
    params = random_params(model, 0, 0.3)
    random = np.random.default_rng(0)
    batch = {name: random.integers(0, 304, (4, 24), dtype=np.int32) for name in ("inputs_BT", "targets_BT")}
    batch["weights_BT"] = (random.random((4, 24)) < 0.6).astype(np.float32)
    mesh = sharding.make_mesh(devices if axes else devices[:1], axes)
    params = jax.device_put(params, sharding.named(mesh, model_params.specs(model)))

    def run(**changes):
        compute = Compute(mesh=mesh, remat=remat, unroll=unroll, loss_chunk_tokens=16, **changes)
        return jax.jit(jax.value_and_grad(lambda params: loss_sums(params, batch, model, compute)[0]))(params)

    (nll, gradients), (plain_nll, plain_gradients) = run(kernels=True), run()
    np.testing.assert_allclose(nll, plain_nll, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(plain_gradients), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * abs(b).max())
