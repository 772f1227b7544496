"""Meshes: the flag, the same training on any of them, and what the compiled step sends between devices."""

import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import THOROUGH, model_on
from jax.sharding import PartitionSpec as P

from jaxchat import sharding
from jaxchat.config import Compute, ModelConfig, UserError
from jaxchat.model import params as model_params
from jaxchat.model import parts
from jaxchat.model.flops import num_params
from jaxchat.model.matmul import E4M3, quantize
from jaxchat.plan import hlo
from jaxchat.train.loop import place_batch
from jaxchat.train.optimizer import make_optimizer
from jaxchat.train.state import abstract_state, init_state
from jaxchat.train.step import make_train_step

# Layers don't divide 8 devices; no two sizes are equal, so that a shape tells what it is the shape of.
L, V, T, ROWS = 3, 104, 12, 8
MODEL = ModelConfig(sequence_len=T, vocab_size=V, n_layer=L, n_head=8, n_kv_head=8, n_embd=64)
STAGES = {"base": 1.0, "mid": 0.0, "sft": 0.0}  # bound on the gradients' norm
STEPS = 10
slow = pytest.mark.slow


@pytest.mark.parametrize(
    "axes, devices, platform, want",
    [
        ("", 8, "cpu", (8, 1, 1)),
        ("", 1, "tpu", (1, 1, 1)),
        ("", 4, "tpu", (1, 4, 1)),
        ("", 256, "tpu", (32, 8, 1)),
        ("", 12, "gpu", (3, 4, 1)),
        ("fsdp=4", 8, "tpu", (2, 4, 1)),
        ("data=2,fsdp=-1,tensor=2", 16, "cpu", (2, 4, 2)),
        ("tensor=8,data=1", 8, "cpu", (1, 1, 8)),
    ],
)
def test_the_flag(axes, devices, platform, want):
    assert sharding.mesh_shape(axes, devices, platform) == want


@pytest.mark.parametrize(
    "axes, told",
    [
        ("fsdp=3", "fsdp=3 does not divide the number of devices here, 8"),
        ("fsdp=3,tensor=2", "fsdp=3 × tensor=2 = 6 does not divide the number of devices here, 8"),
        ("data=2,fsdp=2,tensor=1", "data=2 × fsdp=2 = 4 is not the number of devices here, 8"),
        ("data=-1,fsdp=-1", "only one axis can be -1 (what is left of the 8 devices)"),
        ("rows=2", "'rows=2' is not an axis; write data=-1,fsdp=1,tensor=1"),
        ("fsdp=0", "'fsdp=0' is not an axis"),
        ("fsdp", "'fsdp' is not an axis"),
        ("fsdp=²", "'fsdp=²' is not an axis"),
    ],
)
def test_an_impossible_flag(axes, told):
    with pytest.raises(UserError) as problem:
        sharding.mesh_shape(axes, 8)
    assert told in str(problem.value) and f"--mesh={axes}" in str(problem.value)


@pytest.mark.parametrize("tensor", [3, 12])
def test_tensor_stays_within_a_process(tensor):
    devices = [types.SimpleNamespace(process_index=i // 4, id=i, platform="cpu") for i in range(12)]
    with pytest.raises(UserError, match=f"tensor={tensor} does not divide a process's 4 devices"):
        sharding.make_mesh(devices, f"tensor={tensor}")


@pytest.mark.parametrize(
    "shape, axes, told",
    [
        ((6, 6, 768, 512), "tensor=4", "tensor=4 does not divide the model's query heads, 6; it may be 1, 2"),
        ((8, 2, 512, 512), "tensor=4", "tensor=4 does not divide the model's key/value heads, 2; it may be 1, 2"),
        ((8, 8, 512, 509), "tensor=2", "tensor=2 does not divide the model's vocabulary, 509; it may be 1"),
        ((3, 3, 12, 512), "fsdp=8", "fsdp=8 does not divide the model's width, 12; it may be 1, 2, 4"),
    ],
)
def test_a_mesh_that_does_not_fit_the_model(devices, shape, axes, told):
    n_head, n_kv_head, width, vocabulary = shape
    model = ModelConfig(16, vocabulary, 1, n_head, n_kv_head, width)
    with pytest.raises(UserError, match=told):
        sharding.check_fits(model, sharding.make_mesh(devices, axes))


@pytest.mark.parametrize("size", [(4, 2, 1), (2, 4, 1), (2, 2, 2), (2, 2, 1), (4, 4, 1)])
def test_rings_along_links(size):
    """Hosts of 2 × 2 TPUs: neighbours in a ring are one link apart, and those of a host are side by side."""
    found = [types.SimpleNamespace(coords=(x, y, z), process_index=(x // 2, y // 2, z))
             for x in range(size[0]) for y in range(size[1]) for z in range(size[2])]  # fmt: skip
    found.sort(key=lambda device: device.process_index)
    ring = sharding.along_links(found)
    assert sorted(map(id, ring)) == sorted(map(id, found))
    hops = [np.abs(np.subtract(a.coords, b.coords)).sum() for a, b in zip(ring, ring[1:] + ring[:1], strict=True)]
    assert hops == [1] * len(ring)
    hosts = [host for host, _ in itertools.groupby(ring, lambda device: device.process_index)]
    assert len(hosts) == len(set(hosts))


def test_no_ring():
    """Three in a row have none, and 32 are not searched."""
    row = [types.SimpleNamespace(coords=(x, 0, 0), process_index=0) for x in range(32)]
    assert sharding.along_links(row[:3]) == row[:3]
    assert sharding.along_links(row) == row


def test_a_trainer_refuses_an_impossible_mesh(run_command):
    done = run_command("launch.base_train", "--mesh=fsdp=3", "--device_type=cpu", devices=2, check=False)
    assert done.returncode == 2
    words = "fsdp=3 does not divide the number of devices here, 2; --mesh=data=-1 uses all of them"
    assert done.stderr.strip() == f"error: --mesh=fsdp=3: {words}"


def batch_of(stage: str) -> dict[str, np.ndarray]:
    """{inputs, targets, weights[, segments]} [A, B, T]: two micro-batches as the stage makes them, SFT's packed."""
    random = np.random.default_rng(3)
    shape = (2, ROWS, T)
    batch = {name: random.integers(0, V, shape, dtype=np.int32) for name in ("inputs", "targets")}
    if stage != "sft":
        return batch | {"weights": np.ones(shape, np.float32)}
    supervised = random.random(shape) < random.choice([0.0, 0.1, 0.9], (2, ROWS, 1))
    segments = np.broadcast_to(np.arange(T) // 5, shape).astype(np.int32)
    return batch | {"weights": supervised.astype(np.float32), "segments": segments}


@functools.cache  # compilation is the cost: one a mesh and stage
def compiled(axes: str, stage: str):
    """(mesh, optimizer, the stage's step compiled for it), computed as on accelerators. axes "1": one device."""
    mesh = sharding.make_mesh(jax.devices()[:1]) if axes == "1" else sharding.make_mesh(jax.devices()[:8], axes)
    model = model_on(mesh, MODEL, remat="dots", loss_chunk_tokens=4)
    optimizer = make_optimizer(MODEL, grad_clip=STAGES[stage], mesh=mesh)
    batch = place_batch(batch_of(stage), mesh)
    step = make_train_step(model, optimizer)
    return mesh, optimizer, step.lower(abstract_state(model, optimizer), batch, np.float32(1.0)).compile()


def losses(axes: str, stage: str, change=lambda batch: batch) -> np.ndarray:
    mesh, optimizer, step = compiled(axes, stage)
    state = init_state(0, model_on(mesh, MODEL), optimizer)
    batch, seen = place_batch(change(batch_of(stage)), mesh), []
    for _ in range(STEPS):
        state, metrics = step(state, batch, np.float32(1.0))
        seen.append(float(metrics["loss"]))
    return np.array(seen)


@functools.cache
def rounding(stage: str) -> float:
    """How much float32 rounding alone changes the losses of ten steps: the most that another order of the rows does.

    In exact arithmetic the order changes nothing; in float32 it changes sums in their last bits (6e-8), which Muon lets
    grow: five Newton–Schulz steps multiply a small singular value by up to 3.4445⁵ = 485.
    """
    want = losses("1", stage)

    def reordered(seed):
        order = np.random.default_rng(seed).permutation(2 * ROWS)
        return lambda batch: {name: a.reshape(-1, T)[order].reshape(a.shape) for name, a in batch.items()}

    return max(np.abs(losses("1", stage, reordered(seed)) / want - 1).max() for seed in range(4))


def check_agreement(axes: str, stage: str):
    """Within 4 × what rounding does on one device: a mesh sums in yet another order, of which four were tried."""
    tolerance = 4 * rounding(stage)
    assert 0 < tolerance < 1e-3
    want = losses("1", stage)
    assert want[-1] < 0.8 * want[0]  # it learns

    def one_token_less(batch):
        weights = batch["weights"].copy()
        weights[tuple(np.argwhere(weights)[0])] = 0
        return batch | {"weights": weights}

    wrong = np.abs(losses("1", stage, one_token_less) / want - 1).max()
    got = np.abs(losses(axes, stage) / want - 1).max()
    print(f"{stage} {axes}: {got:.1e}, tolerance {tolerance:.1e}, one token of {want.size} less {wrong:.1e}")
    assert got <= tolerance < wrong / 4


MESHES = ["data=8", "fsdp=8", "data=2,fsdp=2,tensor=2", "tensor=8"]


# Mid's batch is of base's shape, and its step is base's without clipping: one mesh does.
RUNS = [(a, s) for a in MESHES for s in STAGES if s == "base" or "," in a or (s == "sft" and THOROUGH)]


@pytest.mark.parametrize(
    "axes, stage", [pytest.param(*r, marks=[] if r == (MESHES[2], "base") else slow) for r in RUNS]
)
def test_ten_steps_agree_with_one_device(devices, axes, stage):
    check_agreement(axes, stage)


CROSSED = [m for m in MESHES if THOROUGH or "fsdp" in m]


@pytest.mark.parametrize("axes", [pytest.param(m, marks=[] if "," in m else slow) for m in CROSSED])
def test_what_crosses_devices(devices, axes):
    """Never logits, and weights a layer at a time, unless each device holds all of them anyway."""
    mesh, _, step = compiled(axes, "base")
    program = hlo.read(step.as_text())
    stacks = {w.shape[1:] for w in jax.tree.leaves(model_params.shapes(MODEL).blocks)} | {(64, 64)}
    seen = 0
    for c in program.collectives:
        for _, dims in c.shapes:
            seen += c.group > 1
            assert V not in dims or set(dims) <= {V, MODEL.n_embd, mesh.shape["fsdp"]}, f"logits: {c}"
            if c.kind == "all-gather" and c.group > 1 and mesh.shape["data"] < 8:
                assert not (dims[0] >= L and dims[1:] in stacks), f"a whole stack: {c}"
    assert seen >= 8
    # Gradients and updates of all weights cross at least once, so this reads what it should.
    assert sum(program.sent().values()) > 4 * num_params(MODEL) / 8


MERGED = ["fsdp=8", "data=2,fsdp=4"]


@pytest.mark.parametrize("axes", [pytest.param(MERGED[0], marks=slow), MERGED[1]])
def test_gradients_cross_once_a_step(devices, axes):
    """--remat=step with four micro-batches of packed conversations: the loss and gradients of --remat=full on one
    device, to rounding. What crosses is twice the weights (gathered in both passes) and once the gradients, and no
    more with more micro-batches.

    Gradients are sums of 4 × 8 × 12 tokens' in another order: 1e-5 of their norm was seen, by full as well.
    """
    random = np.random.default_rng(3)
    shape = (4, ROWS, T)
    batch = {name: random.integers(0, V, shape, dtype=np.int32) for name in ("inputs", "targets")}
    supervised = random.random(shape) < random.choice([0.0, 0.1, 0.9], (4, ROWS, 1))
    batch |= {"weights": supervised.astype(np.float32)}
    batch |= {"segments": np.broadcast_to(np.arange(T) // 5, shape).astype(np.int32)}
    sgd, found = optax.sgd(1.0), []
    for remat, mesh in (("full", sharding.make_mesh(devices[:1])), ("step", sharding.make_mesh(devices, axes))):
        model, placed = model_on(mesh, MODEL, remat=remat, loss_chunk_tokens=4), place_batch(batch, mesh)
        step = make_train_step(model, sgd).lower(abstract_state(model, sgd), placed, np.float32(1.0)).compile()
        state = init_state(0, model, sgd)
        noise = jax.tree.map(lambda w: 0.05 * np.cos(np.arange(w.size)).reshape(w.shape), state.params)
        state = state.replace(params=jax.tree.map(lambda w, n: jax.device_put(w + n, w.sharding), state.params, noise))
        before = jax.tree.map(np.asarray, state.params)
        state, metrics = step(state, placed, np.float32(1.0))
        moved = jax.tree.map(lambda new, old: np.asarray(new, np.float64) - old, state.params, before)
        found.append((float(metrics["loss"]), jax.tree.leaves(moved)))
    (loss, gradients), (got_loss, got) = found
    assert got_loss == pytest.approx(loss, rel=1e-6)
    errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(got, gradients, strict=True)]
    assert max(errors) < 5e-5, errors
    assert sum(hlo.read(step.as_text()).sent().values()) < 3.5 * 4 * num_params(MODEL)


def test_float8_weights_cross_as_float8(devices):
    """--remat=step sends the weights of float8 products in a byte each. The product rounds them again, and finds the
    same numbers as in the complete float32 weights: those with its scale, others with half of it (224, 225)."""
    mesh = sharding.make_mesh(devices[:4], "fsdp=4")
    for axis, spec in enumerate((P("fsdp"), P(None, "fsdp"))):
        send = jax.jit(sharding.per_device(functools.partial(parts.gather, axis=axis, dtype=E4M3), mesh, (spec,), P()))
        for largest in (1.0, 224.0, 225.0, 400.0, 448.0):
            w = largest * np.random.default_rng(0).uniform(-1, 1, (8, 12)).astype(np.float32)
            w[5, 7] = largest
            (rounded, scale), (again, its_scale) = quantize(w, E4M3), quantize(send(w), E4M3)
            want = np.asarray(rounded, np.float32) * scale
            np.testing.assert_array_equal(np.asarray(again, np.float32) * its_scale, want)
    names = ("wq", "wk", "wv", "wo", "w_up", "w_down")
    for matmul, sent in (("", set()), ("fp8", {"w_up", "w_down"}), ("fp8-all", set(names))):
        assert {name for name in names if parts.gather_dtype(name, Compute(matmul=matmul)) == E4M3} == sent


def test_newton_schulz_is_divided(devices):
    """On n devices each orthogonalises L/n layers, rounded up: of 3 layers 3, 2 and 1. And the results are equal."""
    D, F = MODEL.n_embd, 4 * MODEL.n_embd
    square = 5 * 3 * 2 * D**3  # steps × x·xᵀ, its square, and times x
    wide = 4 * 2 * D * D * F + 14 * 2 * D**3  # x·xᵀ and times x, twice; 14 products of D × D
    layer = 4 * square + 2 * wide
    results = []
    for axes, used, layers in (("", 1, 3), ("fsdp=2", 2, 2), ("data=4,tensor=2", 8, 1)):
        mesh = sharding.make_mesh(devices[:used], axes)
        optimizer = make_optimizer(MODEL, mesh=mesh)
        grads = init_state(1, model_on(mesh, MODEL), optimizer).params  # as good as any
        state = abstract_state(model_on(mesh, MODEL), optimizer)
        update = jax.jit(optimizer.update).lower(state.params, state.opt_state, state.params).compile()
        assert hlo.read(update.as_text()).flops == layers * layer, axes
        opt_state = init_state(0, model_on(mesh, MODEL), optimizer).opt_state
        results.append(jax.device_get(update(grads, opt_state, grads)[0].blocks))
    for result in results[1:]:  # the same products of the same matrices: only their Frobenius norms sum differently
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), result, results[0])


def test_scans_are_counted_as_often_as_they_run():
    """7 × 3 products of [5, 16] and [16, 16] in nested loops, which XLA's own analysis counts once."""

    def step(x, _):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=3)[0], None

    w = jnp.ones((16, 16))
    program = jax.jit(lambda x: jax.lax.scan(step, x, None, length=7)[0]).lower(jnp.ones((5, 16))).compile()
    assert hlo.read(program.as_text()).flops == 21 * 2 * 5 * 16 * 16
