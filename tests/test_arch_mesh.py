"""The architecture of 2026 on meshes: the same training as on one device, and no table that is gathered."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from conftest import model_on

from jaxchat import sharding
from jaxchat.config import ARCHITECTURES, ModelConfig
from jaxchat.plan import hlo
from jaxchat.train.loop import place_batch
from jaxchat.train.optimizer import make_optimizer, table_2026
from jaxchat.train.state import abstract_state, init_state
from jaxchat.train.step import make_train_step

# No two sizes are equal, so that a shape tells what it is the shape of. Three layers in no whole period: written out.
L, V, T, ROWS, STEPS = 3, 104, 12, 8, 5
MODEL = ModelConfig(sequence_len=T, vocab_size=V, n_layer=L, n_head=8, n_kv_head=8, n_embd=64, short_window=5)
MODEL = dataclasses.replace(MODEL, **(ARCHITECTURES["2026"] | {"vocab_multiple": 1, "window_pattern": "SL"}))
MESHES = ["data=2,fsdp=2,tensor=2", "data=8", "fsdp=8", "tensor=8", "data=2,fsdp=4"]


def batch(seed=3):
    random = np.random.default_rng(seed)
    made = {name: random.integers(0, V, (2, ROWS, T), dtype=np.int32) for name in ("inputs", "targets")}
    return made | {"weights": np.ones((2, ROWS, T), np.float32)}


@functools.cache
def compiled(axes: str):
    devices = jax.devices()[: 1 if axes == "1" else 8]
    mesh = sharding.make_mesh(devices, "" if axes == "1" else axes)
    model = model_on(mesh, MODEL, remat="dots", loss_chunk_tokens=4)
    optimizer = make_optimizer(MODEL, table=table_2026(MODEL), mesh=mesh)
    step = make_train_step(model, optimizer)
    args = abstract_state(model, optimizer), place_batch(batch(), mesh), np.float32(1.0)
    return mesh, optimizer, step.lower(*args).compile()


def losses(axes: str, order=None) -> np.ndarray:
    mesh, optimizer, step = compiled(axes)
    state, seen = init_state(0, model_on(mesh, MODEL), optimizer), []
    given = batch()
    if order is not None:
        given = {name: a.reshape(-1, T)[order].reshape(a.shape) for name, a in given.items()}
    given = place_batch(given, mesh)
    for _ in range(STEPS):
        state, metrics = step(state, given, np.float32(1.0))
        seen.append(float(metrics["loss"]))
    return np.array(seen)


@pytest.mark.parametrize("axes", [pytest.param(m, marks=pytest.mark.slow) for m in MESHES])
def test_five_steps_agree_with_one_device(devices, axes):
    """Within 8 × what another order of the rows does on one device: rounding, which Polar Express lets grow."""
    want = losses("1")
    orders = [np.random.default_rng(seed).permutation(2 * ROWS) for seed in range(3)]
    rounding = max(np.abs(losses("1", order) / want - 1).max() for order in orders)
    got = np.abs(losses(axes) / want - 1).max()
    print(f"{axes}: {got:.1e}, another order {rounding:.1e}")
    assert got <= 8 * rounding < 1e-3 and want[-1] < 0.9 * want[0]


@pytest.mark.slow
@pytest.mark.parametrize("axes", [m for m in MESHES if "fsdp" in m])
def test_no_table_is_gathered(devices, axes):
    """No collective has an operand or a result with the vocabulary and all features of a value embedding."""
    mesh, _, step = compiled(axes)
    K, H = MODEL.n_kv_head // mesh.shape["tensor"], MODEL.head_dim
    program, shapes = hlo.read(step.as_text()), set()
    for c in program.collectives:
        shapes |= {dims for _, dims in c.shapes if c.group > 1}
    assert any(V in dims for dims in shapes)  # the token embedding's, so this reads what it should
    for dims in shapes:
        whole = V in dims and H in dims and K in dims
        assert not whole or (c.kind == "all-reduce" and mesh.shape["fsdp"] == 1), dims
