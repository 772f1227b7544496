"""Checkpoints to PyTorch and back, by the command: what opens, what is refused, and every bit on the way."""

import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")  # of the extra `convert`; CI has it (see conftest)
transformers = pytest.importorskip("transformers")

import safetensors.torch  # noqa: E402 (after the skips)

from jaxchat import checkpoint  # noqa: E402
from jaxchat.config import Compute, ModelConfig  # noqa: E402
from jaxchat.convert import hugging_face, nanochat, tokens  # noqa: E402
from jaxchat.model import params as model_params  # noqa: E402
from jaxchat.model.gpt import forward  # noqa: E402
from jaxchat.tokenizer import Tokenizer  # noqa: E402
from launch import chat_cli, convert, mid_train  # noqa: E402

CONFIG = ModelConfig(sequence_len=64, vocab_size=280, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)
TEXT = "It is 12 o'clock and all is well, said the watchman. " * 20


def random_params(config):
    random = np.random.default_rng(3)
    return jax.tree.map(
        lambda w: jax.numpy.asarray(0.2 * random.standard_normal(w.shape), "float32"), model_params.declare(config)
    )


def write_checkpoint(source: str, tag: str, config=CONFIG, tokenizer=True) -> dict:
    """A checkpoint of random weights, as a stage would leave it; -> its weights as NumPy arrays."""
    params = random_params(config)
    checkpoints = checkpoint.Checkpoints(checkpoint.run_folder(source, tag))
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
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in safetensors.torch.load_file(file).items()}


def assert_same_tensors(a: dict, b: dict):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name


@pytest.mark.parametrize("source", ["base", "mid", "sft"])
def test_transformers_opens_what_is_exported(source, home, capsys):
    params = write_checkpoint(source, "d2")
    convert.main([f"--source={source}", "--to=hf", f"--out={home / 'out'}"])
    said = capsys.readouterr().out
    assert "8/8" in said and "ETA" in said and "next: " in said
    model = transformers.AutoModelForCausalLM.from_pretrained(home / "out")
    ids = np.random.default_rng(0).integers(0, 280, (2, 30), dtype=np.int32)
    want = forward(jax.tree.map(jax.numpy.asarray, params), ids, CONFIG, Compute())
    with torch.no_grad():
        np.testing.assert_allclose(model(torch.from_numpy(ids).long()).logits, want, atol=2e-5, rtol=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(home / "out")
    ours = checkpoint.open_model(source).tokenizer
    assert tokenizer("It is 12").input_ids == ours.encode("It is 12") and len(tokenizer) == 280
    end = ours.special("<|assistant_end|>")
    assert model.generation_config.eos_token_id == ([end, ours.bos] if source != "base" else ours.bos)
    assert bool(tokenizer.chat_template) == (source != "base")
    card = (home / "out/README.md").read_text()
    assert "val_bpb | 1.2500" in card and "step 7" in card and "`depth` = 2" in card


def test_round_trip_through_hugging_face(home):
    params = write_checkpoint("base", "d2")
    convert.main(["--source=base", "--to=hf", f"--out={home / 'one'}"])
    convert.main(["--from=hf", f"--path={home / 'one'}", "--as=base", "--model_tag=again"])
    found = checkpoint.open_model("base", "again")
    mesh = checkpoint.sharding.make_mesh(jax.local_devices()[:1])
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, found.load(mesh)), params)
    convert.main(["--source=base", "--model_tag=again", "--to=hf", f"--out={home / 'two'}"])
    assert_same_tensors(hf_tensors(home / "one"), hf_tensors(home / "two"))
    for name, mark in (
        *(("resid_lambdas", "resid_lambdas"), ("x0_lambdas", "x0_lambdas"), ("value_embeds.1.weight", "value_embed")),
        *(
            ("transformer.h.1.attn.ve_gate.weight", "ve_gate"),
            ("smear_gate.weight", "smear"),
            ("smear_lambda", "smear"),
        ),
        ("backout_lambda", "backout"),
    ):
        assert f"nanochat checkpoint of 2026 (it has {mark})" in told(extra={name: torch.zeros(2)})
    assert "2026 (it has window_pattern)" in told(told={"window_pattern": "SSSL"})
    assert "also has transformer.h.0.attn.bias" in told(extra={"transformer.h.0.attn.bias": torch.zeros(2)})
    assert "'step' is a int, not a tensor" in told(extra={"step": 3})
    assert "is torch.float64" in told(dtypes={"lm_head.weight": torch.float64})
    assert "weight is [280, 32], its configuration wants [512, 32]" in told(told={"vocab_size": 512})
    assert "n_mixers" in told(told={"n_mixers": 3})


def test_bad_requests(home, capsys):
    assert "give either --to" in refusal(capsys)
    assert "--to=onnx; it is one of hf, nanochat" in refusal(capsys, "--to=onnx")
    assert "no sft checkpoint in" in refusal(capsys, "--to=hf", "--out=x")
    assert "needs --path" in refusal(capsys, "--from=hf")
    assert "did you mean --from?" in refusal(capsys, "--fro=hf")
    write_checkpoint("base", "d2")
    assert "needs --out" in refusal(capsys, "--to=hf", "--source=base")
    out = home / "out"
    convert.main(["--source=base", "--to=hf", f"--out={out}"])
    convert.main(["--source=base", "--to=nanochat", f"--out={home / 'nano'}"])
    assert "is there already" in refusal(capsys, "--source=base", "--to=hf", f"--out={out}")
    assert "is there already" in refusal(capsys, "--source=base", "--to=nanochat", f"--out={home / 'nano'}")
    take = ["--from=hf", f"--path={out}", "--as=base"]
    assert "has checkpoints already" in refusal(capsys, *take, "--model_tag=d2")
    assert "no folder" in refusal(capsys, "--from=hf", "--path=/nowhere", "--as=base", "--model_tag=x")
    assert "there is no" in refusal(capsys, "--from=hf", f"--path={home}", "--as=base", "--model_tag=x")
    assert "no model_<step>.pt in" in refusal(capsys, "--from=nanochat", f"--path={out}", "--as=mid", "--model_tag=x")
    nano = ["--from=nanochat", f"--path={home / 'nano'}", "--as=base", "--model_tag=x", "--step=3"]
    assert "there are steps 7" in refusal(capsys, *nano)

    def changed(name, value):
        config = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps(config | {name: value}))
        line = refusal(capsys, *take, "--model_tag=x")
        (out / "config.json").write_text(json.dumps(config))
        return line

    assert "model_type is 'llama'" in changed("model_type", "llama")
    assert "intermediate_size is 99; jaxchat opens 128 only" in changed("intermediate_size", 99)
    assert "rotary embedding" in changed("rope_parameters", {"rope_theta": 500000.0})
    assert "lacks model.layers.2" in changed("num_hidden_layers", 3)
    assert "weight is [280, 32], its configuration wants [290, 32]" in changed("vocab_size", 290)
    whole = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors cannot be read" in refusal(capsys, *take, "--model_tag=x")
    assert not (home / "base_checkpoints/x").exists() and list(home.rglob("*.new")) == []


def test_a_full_disk_is_told_before_anything_is_written(home, capsys, monkeypatch):
    write_checkpoint("base", "d2")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    for kind in ("hf", "nanochat"):
        line = refusal(capsys, "--source=base", f"--to={kind}", f"--out={home / 'out'}")
        assert "GB, and its disk has 0.00 GB free" in line and not (home / "out").exists()


def test_without_the_extra(home):
    """Told what to install; and nothing else of jaxchat imports torch, whether it is there or not."""
    hide = """
import sys
class Hidden:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "safetensors"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden)
"""
    for code, told in (
        ("from launch import convert; convert.main(['--to=hf', '--out=x'])", "pip install 'jaxchat[convert]'"),
        ("from launch import demo, base_train, mid_train, chat_sft, chat_cli, tok_eval; print('fine')", "fine"),
    ):
        done = subprocess.run([sys.executable, "-c", hide + code], capture_output=True, text=True)
        assert told in done.stdout + done.stderr, done.stderr


def test_the_readmes_example(home, monkeypatch, capsys):
    """The chat under transformers that the README shows, as it stands there, on a model whose answer we know."""
    readme = (nanochat.Path(__file__).parent.parent / "README.md").read_text()
    code = readme.split("```python\n")[1].split("```")[0]
    assert len(code.strip().splitlines()) <= 25 and '"my-model"' in code
    write_checkpoint("sft", "d2")
    convert.main(["--to=hf", f"--out={home / 'my-model'}"])
    monkeypatch.chdir(home)
    said = iter(["Who are you?", "What is 23 * 7?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(said))
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), {})
    assert next(said, "all was asked") == "all was asked"
