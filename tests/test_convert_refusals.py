"""What conversion refuses: hostile, damaged and odd files, requests that cannot be met: nothing runs or is lost."""

import io
import json
import os
import shutil
import subprocess
import sys

import pytest
from convert_helpers import THEIR_SHAPE, refusal, their_checkpoint, torch, write_checkpoint

from jaxchat.convert import weights
from launch import convert


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
    assert "is refused" in line and ("nothing in it was run" in line and "system" in line or legacy)
    assert not (home / "it-ran").exists() and not (home / "base_checkpoints/x").exists()
    torch.load(path, weights_only=False)
    assert (home / "it-ran").exists()  # it is a weapon indeed


def test_what_no_generation_of_nanochat_wrote_is_refused(home, capsys):
    def refused(**changes):
        shutil.rmtree(home / "x", ignore_errors=True)
        their_checkpoint(home / "x", **changes)
        return refusal(capsys, "--from=nanochat", f"--path={home / 'x'}", "--as=base", "--model_tag=x")

    gate = {"transformer.h.1.attn.ve_gate.weight": torch.zeros(1, 12)}
    scales = {"resid_lambdas": torch.zeros(2), "x0_lambdas": torch.zeros(2)}
    assert "lacks x0_lambdas" in refused(extra={"resid_lambdas": torch.zeros(2)})
    for name in ("x0_lambdas", "value_embeds.1.weight", "smear_lambda", "backout_lambda"):
        assert f"also has {name}" in refused(extra={name: torch.zeros(2)})
    assert "also has transformer.h.1.attn.ve_gate.weight" in refused(extra=gate)
    # Those that had these padded the vocabulary to a multiple of 64.
    tables = {"value_embeds.1.weight": torch.zeros(280, 16)}
    assert "is [280, 32], its configuration wants [320, 32]" in refused(extra=scales | gate | tables)
    assert "has bigram_lambdas: nanochat had it for 3 days" in refused(extra={"bigram_lambdas": torch.zeros(2)})
    assert "window_pattern without resid_lambdas" in refused(more_config={"window_pattern": "SSSL"})
    assert "also has transformer.h.0.attn.bias" in refused(extra={"transformer.h.0.attn.bias": torch.zeros(2)})
    assert "'step' is a int, not a tensor" in refused(extra={"step": 3})
    assert "is torch.float64" in refused(dtypes={"lm_head.weight": torch.float64})
    assert "weight is [280, 32], its configuration wants [512, 32]" in refused(more_config={"vocab_size": 512})
    assert "n_mixers" in refused(more_config={"n_mixers": 3})


def test_bad_requests(home, capsys):
    assert "give either --to" in refusal(capsys)
    assert "--to=onnx; it is hf or nanochat" in refusal(capsys, "--to=onnx")
    assert "no sft checkpoint in" in refusal(capsys, "--to=hf", "--out=x")
    assert "needs --path" in refusal(capsys, "--from=hf")
    assert "did you mean --from?" in refusal(capsys, "--fro=hf")
    write_checkpoint("base", "d2")
    assert "--out=x does not go with --from" in refusal(capsys, "--from=hf", "--out=x")
    assert "--step=3 does not go with --from=hf" in refusal(capsys, "--from=hf", "--step=3")
    assert "--path=x does not go with --to" in refusal(capsys, "--to=hf", "--path=x")
    assert "needs --out" in refusal(capsys, "--to=hf", "--source=base")
    out = home / "out"
    convert.main(["--source=base", "--to=hf", f"--out={out}"])
    convert.main(["--source=base", "--to=nanochat", f"--out={home / 'nano'}"])
    assert "exists" in refusal(capsys, "--source=base", "--to=hf", f"--out={out}")
    assert "exists" in refusal(capsys, "--source=base", "--to=nanochat", f"--out={home / 'nano'}")
    take = ["--from=hf", f"--path={out}", "--as=base"]
    assert "exists; choose" in refusal(capsys, *take, "--model_tag=d2")
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
    assert "rotary embedding" in changed("rope_parameters", {"rope_type": "yarn", "factor": 2.0})
    assert "lacks model.layers.2" in changed("num_hidden_layers", 3)
    assert "weight is [280, 32], its configuration wants [290, 32]" in changed("vocab_size", 290)
    whole = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors cannot be read" in refusal(capsys, *take, "--model_tag=x")
    assert not (home / "base_checkpoints/x").exists() and list(home.rglob("*.part")) == []


def test_a_full_disk_is_refused_before_anything_is_written(home, capsys, monkeypatch):
    write_checkpoint("base", "d2")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    for kind in ("hf", "nanochat"):
        line = refusal(capsys, "--source=base", f"--to={kind}", f"--out={home / 'out'}")
        assert "of disk space, and 0.00 MB are free there" in line and not (home / "out").exists()


def test_without_the_extra(home):
    """It says what to install; and nothing else of jaxchat imports torch, whether it is there or not."""
    hide = """
import sys
class Hidden:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "safetensors"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden)
"""
    for code, message in (
        ("from launch import convert; convert.main(['--to=hf', '--out=x'])", "make setup EXTRAS=convert"),
        ("from launch import demo, base_train, mid_train, chat_sft, chat_cli, tok_eval; print('fine')", "fine"),
    ):
        done = subprocess.run([sys.executable, "-c", hide + code], capture_output=True, text=True)
        assert message in done.stdout + done.stderr, done.stderr


def test_damaged_and_odd_files(home, capsys):
    """What a hostile or careless hand may leave: one line each, nothing written, no stranger's folder touched."""
    write_checkpoint("base", "d2")
    out, theirs = home / "out", home / "theirs"
    convert.main(["--source=base", "--to=hf", f"--out={out}"])
    take = ["--from=hf", f"--path={out}", "--as=base", "--model_tag=x"]
    whole = json.loads((out / "config.json").read_text())
    for change in (
        *({"vocab_size": 280.0}, {"vocab_size": "280"}, {"max_position_embeddings": 256.5}, {"hidden_size": 10**12}),
        *(
            {"rope_parameters": "x"},
            {"rms_norm_eps": "small"},
            {"rms_norm_eps": float("nan")},
            {"num_hidden_layers": None},
        ),
    ):
        (out / "config.json").write_text(json.dumps(whole | change))
        refusal(capsys, *take)
    (out / "config.json").write_text("[" * 200_000)
    assert "cannot be read as JSON" in refusal(capsys, *take)
    (out / "config.json").write_text(json.dumps(whole))
    single = (out / "model.safetensors").rename(out / "other.safetensors")
    for weight_map in (None, [], {"x": 3}, {"x": "../other.safetensors"}, {"x": "/etc/passwd"}):
        (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        assert "does not name files of its folder" in refusal(capsys, *take)
    single.rename(out / "model.safetensors")  # it goes before the index, as in transformers

    take_nano = ["--from=nanochat", f"--path={theirs}", "--as=base", "--model_tag=x"]
    their_checkpoint(theirs)
    path, meta = theirs / "model_000021.pt", theirs / "meta_000021.json"
    good, described = path.read_bytes(), json.loads(meta.read_text())
    for config in (None, [], 3, {}, THEIR_SHAPE | {"n_layer": 2.0}, {"n_layer": 2}):
        meta.write_text(json.dumps(described | {"model_config": config}))
        refusal(capsys, *take_nano)
    meta.write_text(json.dumps(described))
    for odd in (torch.zeros(2).to_sparse(), torch.zeros(2, device="meta")):
        torch.save(torch.load(path, weights_only=True) | {"lm_head.weight": odd}, path)
        assert "not a plain tensor" in refusal(capsys, *take_nano)
        path.write_bytes(good)
    torch.save(torch.load(path, weights_only=True) | {"_orig_mod.lm_head.weight": torch.zeros(280, 32)}, path)
    assert "both with and without" in refusal(capsys, *take_nano)
    path.write_bytes(good[:3000] + bytes([good[3000] ^ 1]) + good[3001:])
    assert "is damaged: " in refusal(capsys, *take_nano)
    path.write_bytes(good[:3000])
    assert "is damaged, or in torch's format before 2020" in refusal(capsys, *take_nano)
    torch.save({k: torch.nn.Parameter(v) for k, v in torch.load(io.BytesIO(good)).items()}, path)  # no harm
    convert.main(take_nano)

    (home / "out2.new").mkdir()
    (home / "out2.new/thesis.txt").write_text("mine")
    convert.main(["--source=base", "--model_tag=d2", "--to=hf", f"--out={home / 'out2'}"])
    assert (home / "out2.new/thesis.txt").read_text() == "mine"
    (home / "empty").mkdir()
    (home / "link").symlink_to(home / "empty")
    convert.main(["--source=base", "--model_tag=d2", "--to=hf", f"--out={home / 'link'}"])
    assert (home / "empty/config.json").exists()
    (home / "file").write_text("")
    line = refusal(capsys, "--source=base", "--model_tag=d2", "--to=hf", f"--out={home / 'file/sub'}")
    assert "give another --out" in line or "--out another folder" in line
    assert list(home.rglob("*.part")) == []


def test_an_import_that_fails_leaves_nothing(home, capsys, monkeypatch):
    their_checkpoint(home / "theirs")
    monkeypatch.setattr(weights, "to_stack", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert.main(["--from=nanochat", f"--path={home / 'theirs'}", "--as=base", "--model_tag=x"])
    assert not (home / "base_checkpoints/x").exists()
