"""What the tests of conversion share: checkpoints of ours and of nanochat's, with random weights."""

import json

import jax
import numpy as np
import pytest

from jaxchat import checkpoint, sharding, store
from jaxchat.config import ModelConfig
from jaxchat.model import params as model_params
from jaxchat.tokenizer import Tokenizer
from launch import convert

# Of the extra `convert`: without it the tests that import this module skip; CI has it (see conftest).
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
load_safetensors = pytest.importorskip("safetensors.torch").load_file

CONFIG = ModelConfig(sequence_len=64, vocab_size=280, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)
# nanochat's model_config, as it was in November 2025
THEIR_SHAPE = {"sequence_len": 64, "vocab_size": 280, "n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 32}
TEXT = "It is 12 o'clock and all is well, said the watchman. " * 20


def random_params(config):
    random = np.random.default_rng(3)
    return jax.tree.map(
        lambda w: jax.numpy.asarray(0.2 * random.standard_normal(w.shape), "float32"), model_params.declare(config)
    )


def write_checkpoint(source: str, tag: str, config=CONFIG, tokenizer=True) -> dict:
    """A checkpoint of random weights, as a stage would leave it; -> its weights as NumPy arrays."""
    params = random_params(config)
    checkpoints = store.Checkpoints(checkpoint.run_folder(source, tag))
    made = Tokenizer.train(iter([TEXT]), 280) if tokenizer else None
    if made:
        checkpoints.keep_tokenizer(made)
    meta = {"stage": source, "step": 7, "model": config.__dict__, "tokenizer_hash": made.hash if made else None}
    meta |= {"metrics": {"val_bpb": 1.25}, "settings": {"depth": 2}, "device_batch_size": 4}
    checkpoints.save(7, params=params, optimizer=None, batches=None, meta=meta)
    checkpoints.close()
    return jax.tree.map(np.asarray, params)


def refusal(capsys, *args) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        convert.main([str(arg) for arg in args])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def hf_tensors(folder) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_safetensors(file).items()}


def assert_same_tensors(a: dict, b: dict):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name


def assert_same_weights(found, params):
    loaded = found.load(sharding.make_mesh(jax.local_devices()[:1]))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, loaded), params)


def their_checkpoint(folder, *, prefix="", dtypes=None, extra=None, more_config=None):
    """Write a checkpoint of nanochat: random tensors, the embedding in bfloat16 as a CUDA run leaves it."""
    config = CONFIG
    kv, d = config.n_kv_head * config.head_dim, config.n_embd
    shapes = {"transformer.wte.weight": (config.vocab_size, d), "lm_head.weight": (config.vocab_size, d)}
    for i in range(config.n_layer):
        for name, shape in (
            *(("attn.c_q", (d, d)), ("attn.c_k", (kv, d)), ("attn.c_v", (kv, d)), ("attn.c_proj", (d, d))),
            *(("mlp.c_fc", (4 * d, d)), ("mlp.c_proj", (d, 4 * d))),
        ):
            shapes[f"transformer.h.{i}.{name}.weight"] = shape
    torch.manual_seed(0)
    dtypes = {"transformer.wte.weight": torch.bfloat16} if dtypes is None else dtypes
    tensors = {name: torch.randn(shape).to(dtypes.get(name, torch.float32)) for name, shape in shapes.items()}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({prefix + k: v for k, v in tensors.items()} | (extra or {}), folder / "model_000021.pt")
    meta = {"step": 21, "val_bpb": 0.9, "model_config": THEIR_SHAPE | (more_config or {}), "user_config": {"depth": 2}}
    (folder / "meta_000021.json").write_text(json.dumps(meta | {"device_batch_size": 8}))
    return tensors
