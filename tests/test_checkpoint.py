"""Checkpoints: what is saved comes back on any mesh, the last few stay, and the right one is found."""

import dataclasses
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import grain
import jax
import numpy as np
import pytest
from conftest import ROOT, model_on

from jaxchat import checkpoint, seal, sharding, store
from jaxchat.config import STAGES, ModelConfig, UserError
from jaxchat.data.order import Division, Order
from jaxchat.data.streams import PackedRows
from jaxchat.model import params as model_params
from jaxchat.store import Checkpoints
from jaxchat.tokenizer import Tokenizer
from jaxchat.train.optimizer import make_optimizer
from jaxchat.train.state import abstract_state, init_state

MODEL = ModelConfig(sequence_len=8, vocab_size=16, n_layer=1, n_head=2, n_kv_head=2, n_embd=16)


def batches() -> grain.DatasetIterator:
    documents = [np.arange(n, dtype=np.int32) for n in (3, 9, 4, 7)]
    division = Division(Order([4], 0), rows=2)
    return iter(PackedRows(lambda rows: [(documents[i], None) for i in rows], division, micro_batches=1, time=4))


def test_everything_comes_back_on_another_mesh(tmp_path, devices):
    optimizer = make_optimizer(MODEL)
    state = init_state(0, model_on(sharding.make_mesh(devices), MODEL), optimizer)
    data, checkpoints = batches(), Checkpoints(tmp_path)
    for _ in range(3):
        next(data)
    checkpoints.save(3, params=state.params, optimizer={"opt": state.opt_state}, batches=data, meta={"a": [1, "x"]})
    checkpoints.close()
    assert checkpoint.read_meta(tmp_path, 3) == {"a": [1, "x"], "metrics": {}}

    mesh = jax.sharding.Mesh(np.array(devices[:4]).reshape(1, 2, 2), sharding.AXES)
    target, fresh = abstract_state(model_on(mesh, MODEL), optimizer), batches()
    again = Checkpoints(tmp_path)
    params, rest = again.restore(3, params=target.params, optimizer={"opt": target.opt_state}, batches=fresh)
    again.close()
    jax.tree.map(np.testing.assert_array_equal, params, state.params)
    jax.tree.map(np.testing.assert_array_equal, rest["opt"], state.opt_state)
    assert all(
        a.sharding == t.sharding for a, t in zip(jax.tree.leaves(params), jax.tree.leaves(target.params), strict=True)
    )
    np.testing.assert_array_equal(next(fresh)["inputs"], next(data)["inputs"])


def test_the_last_three_stay(tmp_path):
    optimizer = make_optimizer(MODEL)
    params = init_state(0, model_on(sharding.make_mesh(jax.devices()[:1]), MODEL), optimizer).params
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 5, 9, 10, 20):
        checkpoints.save(step, params=params, optimizer=None, batches=None, meta={"step": step})
    checkpoints.close()
    assert checkpoint.steps_in(tmp_path) == [9, 10, 20]
    assert {p.name for p in (tmp_path / "20").iterdir() if p.is_dir()} == {"params", "meta"}

    # A save that failed may go on writing after its folder was deleted; the next one sweeps.
    (tmp_path / "21.orbax-checkpoint-tmp/params").mkdir(parents=True)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(22, params=params, optimizer=None, batches=None, meta={})
    (tmp_path / "21.orbax-checkpoint-tmp/params").mkdir(parents=True)  # or, at the latest, when it is whole
    checkpoints.close()
    assert checkpoint.steps_in(tmp_path) == [10, 20, 22] and not list(tmp_path.glob("*tmp*"))


def test_a_kill_that_leaves_an_old_one_half_deleted(tmp_path, monkeypatch):
    """What is left of it is no checkpoint, and gone with the next start."""
    for step in range(1, 5):
        for part in ("params/d/1", "meta/metadata"):
            (tmp_path / str(step) / part).parent.mkdir(parents=True)
            (tmp_path / str(step) / part).write_text("x")
    checkpoints, saved = Checkpoints(tmp_path), SimpleNamespace(wait_until_finished=lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, **how: os.rename(path / "meta", path / "gone"))
        checkpoints._complete(saved, 4)
    assert checkpoint.steps_in(tmp_path) == [2, 3, 4]
    checkpoints.lock([2, 3, 4])
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [store.LOCK, "2", "3", "4"]


def test_a_whole_one_is_sealed_though_nobody_asks(tmp_path):
    """Several processes ask for the first time when the next save is due: a run that is killed by then keeps it."""
    params = init_state(0, model_on(sharding.make_mesh(jax.devices()[:1]), MODEL), make_optimizer(MODEL)).params
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, params=params, optimizer=None, batches=None, meta={})
    deadline = time.monotonic() + 30
    while not (tmp_path / "1" / seal.NAME).exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    checkpoints.close()
    assert not seal.damage(tmp_path / "1")


WIDE = dataclasses.replace(MODEL, vocab_size=272)  # holds a tokenizer's bytes and specials


def random_weights():
    return jax.tree.map(lambda w: jax.random.normal(jax.random.key(w.size), w.shape), model_params.shapes(WIDE))


def save_model(*steps):
    """Save a base model, its optimizer and the data's position at these steps. -> (its checkpoints, its weights)."""
    checkpoints = Checkpoints(checkpoint.run_folder("base", "d1"))
    tokenizer = Tokenizer({bytes([b]): b for b in range(256)})
    checkpoints.keep_tokenizer(tokenizer)
    weights, meta = random_weights(), {"stage": "base", "model": dataclasses.asdict(WIDE)}
    for step in steps:
        rest = {"optimizer": {"a": jax.numpy.ones(3)}, "batches": batches()}
        checkpoints.save(step, params=weights, **rest, meta=meta | {"tokenizer_hash": tokenizer.hash})
    checkpoints.close()
    return checkpoints, weights


def turn_a_bit(folder):
    path = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


OPENED = []
sys.addaudithook(lambda event, args: OPENED.append(str(args[0])) if event == "open" else None)


def test_a_model_is_opened_without_its_optimizer(home, capsys):
    """Nothing of the optimizer is read, so damage in it is found only where it would be trained on."""
    checkpoints, weights = save_model(3, 5)
    folder = checkpoints.folder
    for name in ("optimizer", "data"):
        turn_a_bit(folder / "5" / name)
    OPENED.clear()
    found = checkpoint.open_model("base")
    assert found.step == 5 and not [path for path in OPENED if "optimizer" in path or "/data" in path]
    assert [path for path in OPENED if "/5/params/" in path]  # the hook works: it sees what is hashed
    jax.tree.map(np.testing.assert_array_equal, found.load(), weights)
    assert capsys.readouterr().err == "" and checkpoint.whole_steps(folder) == [3]
    turn_a_bit(folder / "5/params")
    assert checkpoint.open_model("base").step == 3
    assert f"{folder / '5'} is damaged and skipped: params/" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["my models [1] 50% é", "a*b?c", "x%41 {y} #z $HOME 'q' \"r\" ~", "[", "a\\b", "日本"])
def test_every_name_of_a_folder(tmp_path, monkeypatch, name):
    """Saved, sealed, replaced, restored and opened below it; a neighbour that * would match is not touched."""
    (tmp_path / "aXbYc/base_checkpoints/d1/3/params/ocdbt.process_7").mkdir(parents=True)
    monkeypatch.setenv("JAXCHAT_BASE_DIR", str(tmp_path / name))
    checkpoints, weights = save_model(3, 4, 4)
    found = checkpoint.open_model("base")
    assert found.path == tmp_path / name / "base_checkpoints/d1/4" and not seal.damage(found.path)
    jax.tree.map(np.testing.assert_array_equal, found.load(), weights)
    shapes = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=w.sharding), weights)
    rest = {"a": jax.ShapeDtypeStruct((3,), "float32", sharding=weights.wte.sharding)}
    params, rest = checkpoints.restore(4, params=shapes, optimizer=rest, batches=batches())
    jax.tree.map(np.testing.assert_array_equal, (params, rest["a"]), (weights, np.ones(3)))


def test_each_process_seals_what_it_wrote(tmp_path):
    own, shared = [tmp_path / "params" / f"ocdbt.process_{n}/d/x" for n in (0, 1)], tmp_path / "params/_METADATA"
    for path in (*own, shared):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"12345678")
    seal.seal(tmp_path)
    own[1].write_bytes(b"12345679")  # its hash is not known yet
    assert not seal.damage(tmp_path)
    seal.seal(tmp_path, 1)
    assert not seal.damage(tmp_path)
    for path in (*own, shared):
        path.write_bytes(b"12345670")
        assert seal.damage(tmp_path) == f"{path.relative_to(tmp_path)} is not what was written"
        assert not seal.damage(tmp_path, ["optimizer"])
        path.write_bytes(b"1234567")
        assert "has 7 bytes and not 8" in seal.damage(tmp_path, ["optimizer"])
        path.write_bytes(b"12345679" if path == own[1] else b"12345678")


def test_metrics_are_those_measured_by_then(tmp_path):
    rows = ['{"step": 0, "val_bpb": 3.5}', '{"step": 2, "loss": 3, "step_seconds": 1}', '{"step": 2, "val_bpb": 2.5}']
    rows += ['{"step": 2, "loss": null, "grad_norm": null, "progress": 0.5, "nonfinite": 1.0}']
    rows += ['{"step": 2, "CORE": null}', '{"step": 3, "val_bpb": 1.5}', '{"step": 1, "val_b', "[1]", "{}"]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    assert [checkpoint.measured(tmp_path, step) for step in (0, 1, 2)] == [{"val_bpb": x} for x in (3.5, 3.5, 2.5)]


def make_run(home, stage, tag, *steps, age=0.0):
    folder = home / STAGES[stage].folder / tag
    folder.mkdir(parents=True)
    for step in steps:
        (folder / str(step) / "meta").mkdir(parents=True)
    os.utime(folder, (1e9 - age, 1e9 - age))
    return folder


def test_the_deepest_model_is_found_or_else_the_newest(home):
    with pytest.raises(UserError, match="no base checkpoint in .*launch.base_train"):
        checkpoint.find("base")
    old, new = make_run(home, "base", "mine", 3, age=5), make_run(home, "base", "yours", 4, 12)
    assert checkpoint.find("base") == (new, 12)
    assert checkpoint.find("base", "mine") == (old, 3)
    make_run(home, "base", "d4", 100)
    deep = make_run(home, "base", "d12", 7, 20, age=100)
    make_run(home, "base", "d20")  # no checkpoint in it yet
    assert checkpoint.find("base") == (deep, 20) and checkpoint.find("base", step=7) == (deep, 7)
    assert {path.name for path in checkpoint.runs()} == {"mine", "yours", "d4", "d12"}
    with pytest.raises(UserError, match="no step 8 in .*there are: 7, 20"):
        checkpoint.find("base", "d12", 8)


@pytest.mark.parametrize("number", store.FULL)
def test_a_full_disk_is_told_as_one(tmp_path, number):
    """Orbax says it in a ValueError; other errors stay what they are."""

    class Full:
        def __init__(self, says):
            self.says = says

        def save(self, *_, **__):
            pass

        def wait_until_finished(self):
            raise ValueError(self.says)

    checkpoints = Checkpoints(tmp_path)
    checkpoints._writer = Full(f"RESOURCE_EXHAUSTED: Error writing …: {os.strerror(number)} [os_error_code='{number}']")
    checkpoints.save(3, params={}, optimizer=None, batches=None, meta={})
    with pytest.raises(OSError) as told:
        checkpoints.close()
    assert told.value.errno == number and told.value.filename == str(tmp_path)
    checkpoints.close()  # nothing is left that would raise once more
    checkpoints._writer = Full("shapes differ")
    checkpoints.save(3, params={}, optimizer=None, batches=None, meta={})
    with pytest.raises(ValueError, match="shapes differ"):
        checkpoints.close()


def test_a_chat_starts_without_the_libraries_of_training():
    """They take a second to import (dev/LOG.md): metadata is read without Orbax, which only weights need."""
    code = "import sys, jaxchat.devices, jaxchat.checkpoint, jaxchat.infer.engine; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"grain", "optax", "orbax", "pyarrow", "matplotlib"} & set(done.stdout.split())
