"""What the backward pass computes again: as little as fits into a device's memory, known before the first step."""

import math
import os
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import model_on

from jaxchat import sharding
from jaxchat.config import REMATS, ModelConfig, UserError
from jaxchat.train import fit
from jaxchat.train.fit import FILL, first_that_fits, fits, memory_needed, memory_refused
from jaxchat.train.state import abstract_state
from jaxchat.train.step import make_train_step


def test_what_a_compiler_says_of_memory():
    for message, needed in (
        ("RESOURCE_EXHAUSTED: E1000: ... (55.5G) exceeds available HBM (15.75G)", 55.5 * 2**30),
        ("Ran out of memory in memory space hbm. Used 512.0M of 15.75G hbm.", 512 * 2**20),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 85899345920 bytes.", math.inf),
    ):
        assert memory_refused(jax.errors.JaxRuntimeError(message)) == needed
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        memory_refused(jax.errors.JaxRuntimeError("INTERNAL: something else of 3 hbm"))


@pytest.fixture(scope="module")
def steps():
    """(mesh, {remat: step}, their arguments, {remat: bytes}) of a model whose activations outweigh its weights."""
    model = ModelConfig(sequence_len=256, vocab_size=40, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
    mesh, optimizer = sharding.make_mesh(jax.devices()[:1]), optax.sgd(0.1)
    made = {remat: make_train_step(model_on(mesh, model, remat=remat), optimizer) for remat in REMATS}
    kinds = {"inputs": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    batch = {name: jax.ShapeDtypeStruct((1, 4, 256), kind) for name, kind in kinds.items()}
    args = (abstract_state(model_on(mesh, model), optimizer), batch, jax.ShapeDtypeStruct((), jnp.float32))
    needed = {remat: memory_needed(step.lower(*args).compile()) for remat, step in made.items()}
    return mesh, made, args, needed


def test_the_first_that_fits(steps, monkeypatch, capsys):
    mesh, made, args, needed = steps
    assert needed["none"] > needed["dots"] > needed["full"]
    for remat in REMATS:  # the last may take all there is
        enough = needed[remat] if remat == "full" else needed[remat] / FILL + 1
        monkeypatch.setattr(fit, "device_memory", lambda mesh, enough=enough: enough)
        assert first_that_fits(made, mesh, *args) == remat
        *refused, taken = capsys.readouterr().out.splitlines()
        assert len(refused) == REMATS.index(remat) and all(line.endswith(": more than 95%") for line in refused)
        assert (
            taken == f"a step with --remat={remat} needs 0.0 GB (by the compiler's count) of a device's 0.0 GB: it fits"
        )


@pytest.mark.parametrize(
    "axes, shape, more, want",
    [
        ("fsdp=8", (2, 64, 2048), (), "none dots step full"),
        ("fsdp=8", (2, 16, 2048), (), "step none dots full"),
        ("data=8", (2, 8, 64), (), "step none dots full"),
        ("fsdp=8", (1, 16, 2048), (), "none dots full"),
        ("fsdp=4,tensor=2", (2, 16, 2048), (), "none dots full"),
        ("fsdp=8", (2, 12, 2048), (), "none dots full"),
        ("fsdp=8", (2, 16, 2048), ("sampler",), "none dots full"),
    ],
)
def test_which_remats_are_tried(devices, axes, shape, more, want):
    """`step` with several micro-batches on several devices; before all others where they have few tokens."""
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in ("inputs", *more)}
    assert fit.remats_to_try(batch, sharding.make_mesh(devices, axes)) == tuple(want.split())
    assert fit.remats_to_try(batch, sharding.make_mesh(devices[:1])) == REMATS


def test_a_tpu_is_not_compared(monkeypatch, capsys):
    """18.9 GB, by a count of its own, that compiled for 16.9."""
    m = dict.fromkeys(("argument", "output", "alias", "generated_code"), 0) | {"temp": 18.9e9}
    compiled = SimpleNamespace(
        memory_analysis=lambda: SimpleNamespace(**{f"{name}_size_in_bytes": size for name, size in m.items()})
    )
    step = SimpleNamespace(lower=lambda: SimpleNamespace(compile=lambda: compiled))
    mesh = SimpleNamespace(devices=np.array([SimpleNamespace(platform="tpu")]))
    monkeypatch.setattr(fit, "device_memory", lambda mesh: 16.9e9)
    assert first_that_fits({"none": step, "full": step}, mesh) == "none"
    told = capsys.readouterr().out
    assert "needs 18.9 GB" in told and told.endswith("it compiled, so it fits\n") and "16.9" not in told


def test_none_fits(steps, monkeypatch):
    mesh, made, args, needed = steps
    monkeypatch.setattr(fit, "device_memory", lambda mesh: needed["full"] - 1)
    with pytest.raises(UserError, match=r"a step with --remat=full needs .*; lower --device_batch_size$"):
        first_that_fits(made, mesh, *args)
    with pytest.raises(UserError, match="--remat=dots needs .*; lower --device_batch_size, or give --remat=full$"):
        first_that_fits({"dots": made["dots"]}, mesh, *args)


def test_a_compiler_that_refuses(steps, monkeypatch):
    """As libtpu does where memory is too small, or a GPU's while it tries kernels."""
    mesh, made, args, _ = steps

    class Refused:
        def lower(self, *args):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory.")

    monkeypatch.setattr(fit, "device_memory", lambda mesh: 16e9)
    assert first_that_fits({"none": Refused(), "dots": made["dots"]}, mesh, *args) == "dots"
    with pytest.raises(UserError, match="needs more than all .* of a device's 16.0 GB; lower --device_batch_size$"):
        first_that_fits({"full": Refused()}, mesh, *args)


def test_where_devices_do_not_tell(steps):
    mesh, made, _, _ = steps
    assert fit.device_memory(mesh) is None
    assert first_that_fits(made, mesh) == "none"


SHARES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


@pytest.mark.parametrize("named", [None, *SHARES])
def test_the_share_of_a_gpu(named, monkeypatch):
    """The one that the user named, under either name: JAX refuses both at once."""
    for name in SHARES:
        monkeypatch.setenv(name, "0.5")
        if name != named:
            monkeypatch.delenv(name)
    sharding.take_memory()
    assert [os.environ.get(name) for name in SHARES] == {
        None: ["0.92", None], SHARES[0]: ["0.5", None], SHARES[1]: [None, "0.5"]
    }[named]  # fmt: skip


@pytest.mark.parametrize(
    "platform, needed, last, enough",
    [("gpu", 96, False, False), ("gpu", 96, True, True), ("gpu", 101, True, False), ("tpu", 112, False, True)],
)
def test_fits(platform, needed, last, enough):
    """libtpu compiles only what fits, whatever it says of it."""
    assert fits(needed, 100, platform, last) == enough
