"""Checkpoints to PyTorch and back, by the command: what opens, what is refused, and every bit on the way."""

import dataclasses
import json
import zipfile

import jax
import numpy as np
import pytest
from convert_helpers import (
    CONFIG,
    TEXT,
    THEIR_SHAPE,
    assert_same_tensors,
    assert_same_weights,
    hf_tensors,
    their_checkpoint,
    torch,
    transformers,
    write_checkpoint,
)

from jaxchat import checkpoint
from jaxchat.config import Compute, ModelConfig
from jaxchat.convert import hugging_face, nanochat, tokens
from jaxchat.infer.engine import Engine
from jaxchat.model.gpt import forward
from jaxchat.tokenizer import Tokenizer
from launch import chat_cli, convert, mid_train


@pytest.mark.parametrize("source", ["base", "sft"])
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
    # Padding that is no end would be masked wherever it stands in a prompt, as <|bos|> does at its beginning;
    # here with the ends that the README gives.
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id == (end if source != "base" else ours.bos)
    prompt = torch.tensor([[ours.bos, *ours.encode("It is 12")]])
    ends = [ours.special("<|python_end|>"), end] if source != "base" else ours.bos
    how = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    seen = [
        model.generate(prompt, eos_token_id=ends, **how, **mask)
        for mask in ({}, {"attention_mask": torch.ones_like(prompt)})
    ]
    assert torch.equal(seen[0].logits[0], seen[1].logits[0])
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


def test_the_constants_of_an_imported_model(home):
    """Rotary base, softcap and epsilon of config.json are computed with."""
    write_checkpoint("base", "d2")
    convert.main(["--source=base", "--to=hf", f"--out={home / 'out'}"])
    path = home / "out/config.json"
    rope = {"rope_type": "default", "rope_theta": 500.0}
    changed = {"rope_parameters": rope, "final_logit_softcapping": 3.0, "rms_norm_eps": 1e-2}
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    convert.main(["--from=hf", f"--path={home / 'out'}", "--as=base", "--model_tag=other"])
    found = checkpoint.open_model("base", "other")
    ids = np.random.default_rng(0).integers(0, 280, (1, 30), dtype=np.int32)
    model = transformers.AutoModelForCausalLM.from_pretrained(home / "out")
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids).long()).logits
    np.testing.assert_allclose(forward(found.load(), ids, found.config, Compute()), theirs, atol=2e-5, rtol=0)
    assert found.config.rotary_base == 500 and abs(theirs).max() > 1
    with pytest.raises(SystemExit):
        convert.main(["--source=base", "--model_tag=other", "--to=nanochat", f"--out={home / 'nano'}"])


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
    assert meta["model_config"] == THEIR_SHAPE and meta["step"] == 21 and meta["val_bpb"] == 0.9
    assert meta["user_config"] == {"depth": 2} and meta["device_batch_size"] == 8
    assert tokens.read_pickle(home / "ours/tokenizer/tokenizer.pkl").hash == tokenizer.hash
    token_bytes = torch.load(home / "ours/tokenizer/token_bytes.pt", weights_only=True)
    assert token_bytes.dtype == torch.int32 and torch.equal(token_bytes, torch.from_numpy(tokenizer.token_bytes))


@pytest.mark.slow
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
    """Odd shapes, and weights alone: any vocabulary, heads, length; with a warning and what to do."""
    odd = ModelConfig(sequence_len=37, vocab_size=301, n_layer=1, n_head=3, n_kv_head=3, n_embd=42)
    params = write_checkpoint("mid", "odd", odd, tokenizer=False)
    convert.main(["--source=mid", f"--to={kind}", f"--out={home / 'out'}"])
    convert.main([f"--from={kind}", f"--path={home / 'out'}", "--as=mid", "--model_tag=back"])
    said = capsys.readouterr().out
    assert said.count("there is no tokenizer; only the weights are converted") == 2
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


@pytest.mark.slow
def test_the_pages_example(home, monkeypatch, capsys):
    """The chat under transformers that docs/pytorch.md shows, as it stands there, says what our engine says."""
    readme = (nanochat.Path(__file__).parent.parent / "docs/pytorch.md").read_text()
    code = readme.split("```python\n")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line.strip() and "import" not in line]) <= 20
    config = dataclasses.replace(CONFIG, sequence_len=512)
    params = jax.tree.map(jax.numpy.asarray, write_checkpoint("sft", "d2", config))
    convert.main(["--to=hf", f"--out={home / 'my-model'}"])
    monkeypatch.chdir(home)
    questions = ["Who are you?", "What is 12 + 7?"]
    said = iter([*questions, ""])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(said))
    namespace = {}
    exec(compile(code, "docs/pytorch.md", "exec"), namespace)
    theirs = namespace["ids"][0].tolist()

    tokenizer = checkpoint.open_model("sft").tokenizer
    engine = Engine(params, config, tokenizer, Compute())
    start, stop = tokenizer.special("<|assistant_start|>"), tokenizer.special("<|assistant_end|>")
    ours = []
    for question in questions:
        turn = tokenizer.render_for_completion({"messages": [{"role": "user", "content": question}]})
        ours += turn[1:] if ours else turn
        (answer,) = engine.generate([ours], max_tokens=100, temperature=0)
        ours += answer.tokens + [stop] * answer.finished
    # The page's loop lets each call of the tool have 100 tokens more; up to the first call they are equal.
    call = tokenizer.special("<|python_end|>")
    length = min((ids.index(call) for ids in (ours, theirs) if call in ids), default=len(ours))
    assert length > theirs.index(start) + 20 and theirs[:length] == ours[:length]
