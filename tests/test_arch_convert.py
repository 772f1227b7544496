"""nanochat's checkpoints of 2026: each generation's constants, and every bit on the way in and out."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import random_params
from convert_helpers import refusal, torch

from jaxchat import checkpoint, store
from jaxchat.config import ARCHITECTURES, ModelConfig
from jaxchat.convert.nanochat import NAMES
from jaxchat.convert.weights import matrix_names, named, to_matrices
from launch import convert

SHAPE = ModelConfig(sequence_len=600, vocab_size=70, n_layer=3, n_head=2, n_kv_head=1, n_embd=64, vocab_multiple=64)
OLD = {"layer_scales": True, "window_pattern": "SSL", "short_window": 300}
GATES = OLD | {"value_gate_channels": 32, "value_gate_bound": 2.0}
NEWEST = ARCHITECTURES["2026"] | {"window_pattern": "SSL", "table_dtype": "bfloat16"}
ROUND_1 = {"short_window": 256, "qk_scale": 1.15, "smear_channels": 0, "backout": False}
GENERATIONS = {  # spec-2026, 1.8: rotary base, factor on queries, gates, windows, softcap
    "January 11": OLD,
    "January 11, no windows": {"layer_scales": True, "window_pattern": "L", "short_window": 300},
    "January 18": GATES,
    "March 2": GATES | {"softcap": 20.0},
    "March 9": NEWEST | ROUND_1,
    "March 14": NEWEST | {"short_window": 256},
}


def their_files(folder, config: ModelConfig) -> dict[str, torch.Tensor]:
    """Write a checkpoint as nanochat would: random tensors, tables in bfloat16 where the model says so."""
    params, tensors = random_params(config, 0, 0.2), {}
    for (name, weight), leaf in zip(named(config).items(), jax.tree.leaves(params), strict=True):
        matrices = to_matrices(name, weight, np.asarray(leaf))
        for theirs, matrix in zip(matrix_names(name, NAMES, config), matrices, strict=True):
            tensors[theirs] = torch.from_numpy(matrix).to(getattr(torch, weight.dtype))
    folder.mkdir(parents=True)
    torch.save(tensors, folder / "model_000003.pt")
    fields = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "window_pattern")
    shape = {name: getattr(config, name) for name in fields}
    (folder / "meta_000003.json").write_text(json.dumps({"step": 3, "model_config": shape}))
    return tensors


@pytest.mark.parametrize("when", GENERATIONS)
def test_each_generation(when, home, capsys):
    config = dataclasses.replace(SHAPE, **GENERATIONS[when])
    tensors = their_files(home / "theirs/d3", config)
    take = ["--from=nanochat", f"--path={home / 'theirs/d3'}", "--as=base", "--model_tag=d3"]
    if "value_gate_channels" in GENERATIONS[when] and config.value_gate_channels == 32:
        assert "give --softcap=15 or --softcap=20" in refusal(capsys, *take)
        take.append(f"--softcap={config.softcap:.0f}")
    else:
        assert "this checkpoint's is known" in refusal(capsys, *take, "--softcap=15")
    convert.main(take)
    found = checkpoint.open_model("base", "d3", needs_tokenizer=False)
    assert found.config == config
    out = ["--source=base", "--model_tag=d3", "--to=nanochat", f"--out={home / 'out'}"]
    if when != "March 14":  # nanochat would compute it with the constants of its head
        assert "it would compute something else" in refusal(capsys, *out)
        return
    convert.main(out)
    again = torch.load(home / "out/base_checkpoints/d3/model_000003.pt", weights_only=True)
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype and torch.equal(again[name], tensor), name
    meta = json.loads((home / "out/base_checkpoints/d3/meta_000003.json").read_text())
    assert meta["model_config"] == json.loads((home / "theirs/d3/meta_000003.json").read_text())["model_config"]
    line = refusal(capsys, "--source=base", "--model_tag=d3", "--to=hf", f"--out={home / 'hf'}")
    assert "qk_scale, window_pattern, value_gate_channels" in line and "--to=nanochat" in line


def test_ours_goes_out_as_nanochat_names_it(home):
    """A model of --arch=2026 with random weights; its tensors have the names and shapes of spec-2026, 5.1."""
    config = ModelConfig.from_depth(3, sequence_len=64, vocab_size=70, arch="2026")
    params = random_params(config, 0, 0.1)
    checkpoints = store.Checkpoints(checkpoint.run_folder("base", "d3"))
    meta = {"stage": "base", "step": 1, "model": dataclasses.asdict(config), "tokenizer_hash": None}
    checkpoints.save(1, params=params, optimizer=None, batches=None, meta=meta)
    checkpoints.close()
    convert.main(["--source=base", "--to=nanochat", f"--out={home / 'out'}"])
    tensors = torch.load(home / "out/base_checkpoints/d3/model_000001.pt", weights_only=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if ".h.1." not in name}
    D, V = 256, 128
    layer = {"c_q": (D, D), "c_k": (D, D), "c_v": (D, D), "c_proj": (D, D), "ve_gate": (2, 12)}
    want = {f"transformer.h.{i}.attn.{name}.weight": shape for i in (0, 2) for name, shape in layer.items()}
    want |= {f"transformer.h.{i}.mlp.c_fc.weight": (4 * D, D) for i in (0, 2)}
    want |= {f"transformer.h.{i}.mlp.c_proj.weight": (D, 4 * D) for i in (0, 2)}
    want |= {f"value_embeds.{i}.weight": (V, D) for i in (0, 2)}
    want |= {"transformer.wte.weight": (V, D), "lm_head.weight": (V, D), "smear_gate.weight": (1, 24)}
    want |= {"resid_lambdas": (3,), "x0_lambdas": (3,), "smear_lambda": (1,), "backout_lambda": (1,)}
    assert shapes == want
    np.testing.assert_array_equal(tensors["value_embeds.2.weight"], params.blocks.value_table[1].reshape(V, D))
    np.testing.assert_array_equal(tensors["transformer.h.2.attn.ve_gate.weight"], params.blocks.value_gate[1].T)
