"""The architecture of 2026 on meshes: the same training as on one device, and no table that is gathered."""

import dataclasses
import functools
from collections import Counter

import jax
import numpy as np
import optax
import pytest
from conftest import model_on

from jaxchat import sharding
from jaxchat.config import ARCHITECTURES, ModelConfig
from jaxchat.plan import hlo
from jaxchat.train.loop import place_batch
from jaxchat.train.optimizer import make_optimizer, table_2026
from jaxchat.train.state import abstract_state, init_state
from jaxchat.train.step import make_train_step

# No two of these are equal, so that a shape shows what it is the shape of. Three layers are no whole period.
V, T, ROWS, HEADS, WIDTH = 104, 12, 8, 8, 128
MODEL = ModelConfig(
    sequence_len=T, vocab_size=V, n_layer=3, n_head=HEADS, n_kv_head=HEADS, n_embd=WIDTH, short_window=5
)
MODEL = dataclasses.replace(MODEL, **(ARCHITECTURES["2026"] | {"vocab_multiple": 1, "window_pattern": "SL"}))
MESHES = ["data=2,fsdp=2,tensor=2", "fsdp=8", "data=2,fsdp=4"]
RTOL = 1e-5  # the most seen: 1e-7 of losses and gradient norms, 1.4e-6 of updates
# For gradients: Polar Express lets rounding grow, by 4e-5 of the loss after one step.
SGD = optax.sgd(0.1)


def mesh_of(axes: str):
    return sharding.make_mesh(jax.devices()[: 1 if axes == "1" else 8], "" if axes == "1" else axes)


@functools.cache
def compiled(axes: str):
    """(model, batch, compiled step) on a mesh."""
    model = model_on(mesh_of(axes), MODEL, remat="dots", loss_chunk_tokens=4)
    random = np.random.default_rng(3)
    batch = {name: random.integers(0, V, (2, ROWS, T), dtype=np.int32) for name in ("inputs", "targets")}
    batch = place_batch(batch | {"weights": np.ones((2, ROWS, T), np.float32)}, model.mesh)
    args = abstract_state(model, SGD), batch, np.float32(1.0)
    return model, batch, make_train_step(model, SGD).lower(*args).compile()


@functools.cache
def losses(axes: str) -> np.ndarray:
    model, batch, step = compiled(axes)
    state, found = init_state(0, model, SGD), []
    for _ in range(3):
        state, metrics = step(state, batch, np.float32(1.0))
        found.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return np.array(found)


@functools.cache
def updates(axes: str) -> dict[str, np.ndarray]:
    """What two steps of 2026's optimizer make of random gradients, by weight."""
    mesh = mesh_of(axes)
    optimizer = make_optimizer(MODEL, table=table_2026(MODEL), mesh=mesh)
    state = init_state(0, model_on(mesh, MODEL), optimizer)
    random = np.random.default_rng(4)
    update = jax.jit(optimizer.update)
    opt_state = state.opt_state
    for _ in range(2):
        grads = jax.tree.map(
            lambda w: jax.device_put(random.normal(size=w.shape).astype(w.dtype), w.sharding), state.params
        )
        found, opt_state = update(grads, opt_state, state.params)
    leaves = jax.tree_util.tree_leaves_with_path(found)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@pytest.mark.slow
@pytest.mark.parametrize("axes", MESHES)
def test_training_is_one_devices(devices, axes):
    """Losses and gradient norms of three steps, to rounding."""
    np.testing.assert_allclose(losses(axes), losses("1"), rtol=RTOL)
    assert losses("1")[-1, 0] < losses("1")[0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("axes", MESHES)
def test_the_optimizer_is_one_devices(devices, axes):
    """Each weight's update, as a fraction of its norm, to rounding."""
    for name, want in updates("1").items():
        error = np.linalg.norm(updates(axes)[name] - want) / np.linalg.norm(want)
        assert error < RTOL, name


@pytest.mark.slow
@pytest.mark.parametrize("axes", MESHES)
def test_no_value_table_is_gathered(devices, axes):
    """Nothing that crosses devices is as large as a device's heads of a table of value embeddings, all features."""
    model, _, step = compiled(axes)
    whole = Counter((V, HEADS // model.mesh.shape["tensor"], MODEL.head_dim))
    shapes = [dims for c in hlo.read(step.as_text()).collectives if c.group > 1 for _, dims in c.shapes]
    assert any(V in dims for dims in shapes)  # of the token embedding, so this reads what it should
    assert [dims for dims in shapes if whole <= Counter(dims)] == []
