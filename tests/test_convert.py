"""Checkpoints to PyTorch and back, by the command: what opens, what is refused, and every bit on the way."""

import json
import os
import shutil
import subprocess
import sys
import zipfile

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")  # of the extra `convert`; CI has it (see conftest)
transformers = pytest.importorskip("transformers")

import safetensors.torch  # noqa: E402 (after the skips)

from jaxchat import checkpoint, sharding  # noqa: E402
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


def assert_same_weights(found, params):
    loaded = found.load(sharding.make_mesh(jax.local_devices()[:1]))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, loaded), params)


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
    assert_same_weights(found, params)
    convert.main(["--source=base", "--model_tag=again", "--to=hf", f"--out={home / 'two'}"])
    assert_same_tensors(hf_tensors(home / "one"), hf_tensors(home / "two"))
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (home / "one" / name).read_bytes() == (home / "two" / name).read_bytes()


def their_checkpoint(folder, *, prefix="", config=CONFIG, dtypes=None, extra=None, told=None):
    """A file of nanochat's: random tensors, the embedding in bfloat16 as a CUDA run leaves it."""
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
    meta = {"step": 21, "val_bpb": 0.9, "model_config": config.__dict__ | (told or {}), "user_config": {"depth": 2}}
    (folder / "meta_000021.json").write_text(json.dumps(meta | {"device_batch_size": 8}))
    return tensors


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_round_trip_through_nanochat(prefix, home, capsys):
    """In, and out again: every tensor bit for bit, the bfloat16 embedding as bfloat16; tokenizer and metadata too."""
    theirs = home / "theirs"
    tensors = their_checkpoint(theirs / "base_checkpoints/d2", prefix=prefix)
    tokenizer = Tokenizer.train(iter([TEXT]), 280)
    (theirs / "tokenizer").mkdir()
    tokens.write_pickle(tokenizer, theirs / "tokenizer/tokenizer.pkl")
    convert.main(["--from=nanochat", f"--path={theirs}", "--as=base", "--model_tag=d2"])
    assert "launch.mid_train --model_tag=d2" in capsys.readouterr().out
    found = checkpoint.open_model("base", "d2")
    assert found.step == 21 and found.tokenizer.hash == tokenizer.hash and found.meta["metrics"] == {"val_bpb": 0.9}
    convert.main(["--source=base", "--to=nanochat", f"--out={home / 'ours'}"])
    folder = home / "ours/base_checkpoints/d2"
    assert zipfile.ZipFile(folder / "model_000021.pt").testzip() is None  # its checksums are right
    assert_same_tensors(torch.load(folder / "model_000021.pt", weights_only=True), tensors)
    meta = json.loads((folder / "meta_000021.json").read_text())
    assert meta["model_config"] == CONFIG.__dict__ and meta["step"] == 21 and meta["val_bpb"] == 0.9
    assert meta["user_config"] == {"depth": 2} and meta["device_batch_size"] == 8
    assert tokens.read_pickle(home / "ours/tokenizer/tokenizer.pkl").hash == tokenizer.hash
    token_bytes = torch.load(home / "ours/tokenizer/token_bytes.pt", weights_only=True)
    assert token_bytes.dtype == torch.int32 and torch.equal(token_bytes, torch.from_numpy(tokenizer.token_bytes))


def test_an_imported_model_trains_and_chats(home, capsys):
    write_checkpoint("base", "d2")
    convert.main(["--source=base", "--to=nanochat", f"--out={home / 'out'}"])
    convert.main(["--from=nanochat", f"--path={home / 'out'}", "--as=base", "--model_tag=theirs"])
    talk = home / "talk.jsonl"
    row = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "me"}]
    talk.write_text((json.dumps(row) + "\n") * 40)
    mid_train.main(
        ["--model_tag=theirs", f"--train_tasks={talk}", "--num_iterations=1", "--device_batch_size=1",
         "--total_batch_size=512", "--eval_every=-1"]
    )  # fmt: skip
    chat_cli.main(["--source=mid", "--model_tag=theirs", "-p", "who?", "--max_tokens=4"])
    assert "Chat with theirs (mid)" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["hf", "nanochat"])
def test_without_a_tokenizer(kind, home, capsys):
    """Odd shapes, and weights alone: any vocabulary, heads, length; with a warning, and told what to do."""
    odd = ModelConfig(sequence_len=37, vocab_size=301, n_layer=1, n_head=3, n_kv_head=3, n_embd=42)
    params = write_checkpoint("mid", "odd", odd, tokenizer=False)
    convert.main(["--source=mid", f"--to={kind}", f"--out={home / 'out'}"])
    convert.main([f"--from={kind}", f"--path={home / 'out'}", "--as=mid", "--model_tag=back"])
    said = capsys.readouterr().out
    assert said.count("there is no tokenizer: the weights alone are converted") == 2
    assert "copy its tokenizer folder" in said
    found = checkpoint.open_model("mid", "back", needs_tokenizer=False)
    assert found.config == odd and found.tokenizer is None
    assert_same_weights(found, params)
    with pytest.raises(SystemExit):
        chat_cli.main(["--source=mid", "--model_tag=back", "-p", "hi"])
    assert "was imported without a tokenizer; copy its tokenizer folder to" in capsys.readouterr().err
    # The vocabulary may be larger than the tokenizer's: its last ids are never text.
    Tokenizer.train(iter([TEXT]), 280).save(home / "mid_checkpoints/back/tokenizer")
    chat_cli.main(["--source=mid", "--model_tag=back", "-p", "hi", "--max_tokens=8", "--temperature=9"])


def test_several_shards(home, monkeypatch):
    params = write_checkpoint("base", "d2")
    monkeypatch.setattr(hugging_face, "SHARD_SIZE", "30KB")
    convert.main(["--source=base", "--to=hf", f"--out={home / 'out'}"])
    assert len(list((home / "out").glob("model-*.safetensors"))) > 3
    model = transformers.AutoModelForCausalLM.from_pretrained(home / "out")
    np.testing.assert_array_equal(model.lm_head.weight.detach(), params.lm_head.T)
    convert.main(["--from=hf", f"--path={home / 'out'}", "--as=base", "--model_tag=again"])
    assert_same_weights(checkpoint.open_model("base", "again"), params)


class Runs:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_pt_runs_nothing(legacy, home, capsys):
    their_checkpoint(home / "evil")
    path = home / "evil/model_000021.pt"
    tensors = torch.load(path)
    torch.save(tensors | {"x": Runs(f"touch {home / 'it-ran'}")}, path, _use_new_zipfile_serialization=not legacy)
    line = refusal(capsys, "--from=nanochat", f"--path={home / 'evil'}", "--as=base", "--model_tag=x")
    assert "refused, nothing in it was run" in line and ("system" in line or legacy)
    assert not (home / "it-ran").exists() and not (home / "base_checkpoints/x").exists()
    torch.load(path, weights_only=False)
    assert (home / "it-ran").exists()  # it is a weapon indeed


def test_what_nanochat_wrote_later_is_refused(home, capsys):
    def told(**changes):
        shutil.rmtree(home / "x", ignore_errors=True)
        their_checkpoint(home / "x", **changes)
        return refusal(capsys, "--from=nanochat", f"--path={home / 'x'}", "--as=base", "--model_tag=x")

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
import zipfile
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
