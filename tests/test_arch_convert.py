"""nanochat's checkpoints of 2026: each generation's constants, and every bit on the way in and out."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params
from convert_helpers import refusal, torch

from jaxchat import checkpoint, store
from jaxchat.config import ARCHITECTURES, ModelConfig
from jaxchat.convert import optimizer
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
        matrices = to_matrices(weight, np.asarray(leaf))
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
        assert "the checkpoint's softcap is known" in refusal(capsys, *take, "--softcap=15")
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


def with_optimizer(tag: str, count: int, skipped: int = 0) -> tuple[ModelConfig, dict]:
    """A base checkpoint of --arch=2026 with random weights and optimizer state; -> its configuration and state.

    skipped: steps, of the `count`, that changed nothing because their loss was not finite."""
    config = ModelConfig.from_depth(3, sequence_len=64, vocab_size=70, arch="2026")
    random = np.random.default_rng(1)

    def fill(leaf):
        full = np.asarray(random.random(leaf.shape), np.float32)
        return jnp.asarray(count - skipped if leaf.dtype == jnp.int32 else full, leaf.dtype)

    state = jax.tree.map(fill, optimizer.empty_state(config))
    state |= {"step": jnp.int32(count), "empty_steps": jnp.int32(0)}
    settings = {"total_batch_size": 2**17, "embedding_lr": 0.3, "unembedding_lr": 0.008, "matrix_lr": 0.03}
    meta = {"stage": "base", "step": count, "model": dataclasses.asdict(config), "tokenizer_hash": None}
    checkpoints = store.Checkpoints(checkpoint.run_folder("base", tag))
    params = random_params(config, 0, 0.1)
    checkpoints.save(count, params=params, optimizer=state, batches=None, meta=meta | {"settings": settings})
    checkpoints.close()
    return config, state


def test_the_optimizers_state_out_and_in(home, capsys):
    """spec-2026, 5.3: groups, numbers and shapes as torch's optimizer has them; and every bit comes back."""
    config, state = with_optimizer("d3", 9)
    convert.main(["--source=base", "--to=nanochat", f"--out={home / 'out'}"])
    folder = home / "out/base_checkpoints/d3"
    content = torch.load(folder / "optim_000009_rank0.pt", weights_only=True)
    groups, D, H, V = content["param_groups"], 256, 2, 128
    assert [n for group in groups for n in group["params"]] == list(range(9 + 3 * 6 + 2))
    assert [len(group["params"]) for group in groups] == [1, 1, 2, 1, 1, 3, 2, 3 * 4, 3, 3]
    width = (D / 768) ** -0.5 * 0.5  # and the root of a batch of a quarter
    assert [group["initial_lr"] for group in groups] == pytest.approx(
        [0.008 * width, 0.3 * width, 0.15 * width, 0.0025, 0.25, 0.2, *[0.015] * 4]
    )
    assert [group["betas"] for group in groups[:6]] == [(0.8, b) for b in (0.96, 0.995, 0.995, 0.95)] + [
        (0.96, 0.95), (0.8, 0.95),
    ]  # fmt: skip
    assert [group["weight_decay"] for group in groups[:6]] == [0.01, 0.001, 0.01, 0.05, 0, 0]
    have = content["state"]
    assert set(have) == {*range(9), 9, 11, 23, 26} and have[3]["exp_avg"].shape == (V, D) and have[0]["step"] == 9
    shapes = [(2, H, 12), (12, D, D), (3, D, 4 * D), (3, 4 * D, D)]  # gates, square, down, up
    second = [(2, 1, 12), (12, D, 1), (3, 1, 4 * D), (3, 4 * D, 1)]
    for first, shape, small in zip((9, 11, 23, 26), shapes, second, strict=True):
        assert have[first]["momentum_buffer"].shape == shape and have[first]["second_momentum_buffer"].shape == small
    muon = state["opt_state"][1].inner_states["matrix"].inner_state[0]
    wk = np.asarray(muon.momentum.blocks.wk[1]).reshape(D, D)
    np.testing.assert_array_equal(have[11]["momentum_buffer"][4 + 1], wk.T)
    neurons = np.asarray(muon.second.blocks.wk[1]).ravel()
    np.testing.assert_array_equal(have[11]["second_momentum_buffer"][4 + 1, :, 0], neurons)
    meta = json.loads((folder / "meta_000009.json").read_text())
    assert {"dataloader_state_dict", "loop_state", "val_bpb"} <= meta.keys() and meta["total_batch_size"] == 2**17

    take = ["--from=nanochat", f"--path={folder}", "--as=base", "--model_tag=back"]
    convert.main(take)
    assert "--resume continues from it" in capsys.readouterr().out
    found = checkpoint.open_model("base", "back", needs_tokenizer=False)
    again = optimizer.restore(found)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), again, state)
    assert optimizer.peak_rates(found.meta) == optimizer.peak_rates(
        checkpoint.open_model("base", "d3", needs_tokenizer=False).meta
    )

    with_optimizer("d3s", 9, skipped=2)
    convert.main(["--source=base", "--to=nanochat", "--model_tag=d3s", f"--out={home / 'out'}"])
    skipped = torch.load(home / "out/base_checkpoints/d3s/optim_000009_rank0.pt", weights_only=True)
    assert skipped["state"][0]["step"] == 7  # updates, not steps

    (folder / "optim_000009_rank1.pt").write_bytes(b"")
    convert.main([*take[:-1], "--model_tag=two"])
    assert "not converted: it is sharded over 2 devices" in capsys.readouterr().out
    (folder / "optim_000009_rank1.pt").unlink()
    torch.save({"state": {0: {}}}, folder / "optim_000009_rank0.pt")
    assert "is not the optimizer state of this model" in refusal(capsys, *take[:-1], "--model_tag=three")
