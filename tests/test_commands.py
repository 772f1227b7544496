"""Every command once, tiny, as a user calls it; then what the whole run must hold: devices, compilations, chat."""

import contextlib
import csv
import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
from conftest import ROOT, THOROUGH

import jaxchat.demo.score
from jaxchat import checkpoint, sharding, store
from jaxchat.config import STAGES, BaseConfig, MidConfig, SFTConfig, UserError
from jaxchat.data.conversations import length_buckets
from jaxchat.data.sources import ParquetText, find_shards
from jaxchat.demo import World, write_world
from jaxchat.demo.score import score
from jaxchat.infer.engine import Engine
from jaxchat.tokenizer import Tokenizer
from jaxchat.train import fit, loop, run
from launch import base_train, chat_cli, chat_sft, cli, demo, mid_train, report, tok_eval, tok_train

SMALL = {"base_shards": 2, "base_rows": 600, "base_val_rows": 300, "mid_rows": 600, "sft_rows": 300, "val_rows": 40}
LENGTH = 96  # long enough for two length buckets in SFT: 64 and 96
STEPS = 10
TAG = "d2"


def flags(folder, devices=8):
    """The flags of the three trainers: 8 rows a step, on any number of devices."""
    tasks = folder / "world/tasks"
    batch = [f"--device_batch_size={8 // devices}", f"--total_batch_size={8 * LENGTH}"]
    common = ["--eval_every=5", f"--num_iterations={STEPS}", "--seed=3"]
    mixtures = [f"--val_tasks={tasks / 'world_val.jsonl'}", f"--model_tag={TAG}"]
    base = [*batch, *common, "--depth=2", f"--max_seq_len={LENGTH}", "--eval_tokens=600"]
    mid = [
        *batch,
        *common,
        *mixtures,
        f"--tasks_dir={tasks}",
        f"--train_tasks={tasks / 'world_mid.jsonl'}",
        "--eval_tokens=600",
    ]
    sft = [f"--device_batch_size={8 // devices}", "--target_examples_per_step=8", "--eval_steps=2", *common, *mixtures]
    sft += [f"--train_tasks={tasks / 'world_sft.jsonl'}", "--eval_metrics_every=-1", "--init_lr_frac=0.2"]
    return [*base, "--sample_every=5", f"--data_dir={folder / 'world/base_data'}"], mid, sft


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory, devices):
    """A base directory in which all stages have run on 8 devices, and what they printed."""
    folder, printed = tmp_path_factory.mktemp("pipeline"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXCHAT_BASE_DIR", str(folder))
        write_world(World(0), folder / "world", **SMALL)
        commands = zip((base_train, mid_train, chat_sft), flags(folder), strict=True)
        for command, args in [(tok_train, ["--vocab_size=300", flags(folder)[0][-1]]), *commands]:
            printed[command.__name__.split(".")[-1]] = said(command, args)
    return folder, printed


def said(command, args):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        command.main(args)
    return out.getvalue()


def train(command, config, evaluations=()):
    """Train as a command does, with other evaluations."""
    stage = command.stage_for(config)
    with run.open_run(stage, run.find_start(stage)) as ready:
        loop.train(ready, list(evaluations))


@pytest.fixture
def here(pipeline, monkeypatch):
    monkeypatch.setenv("JAXCHAT_BASE_DIR", str(pipeline[0]))
    return pipeline[0]


def metrics(folder, stage):
    lines = (folder / STAGES[stage].folder / TAG / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(folder, stage):
    return [(row["step"], row["loss"]) for row in metrics(folder, stage) if "loss" in row]


@pytest.mark.parametrize("name", ["base_train", "mid_train", "chat_sft"])
def test_a_stage_tells_its_plan_its_steps_and_what_comes_next(pipeline, name):
    text = pipeline[1][name]
    after = {"base_train": "launch.mid_train", "mid_train": "launch.chat_sft", "chat_sft": "launch.chat_cli"}[name]
    for words in ("8 × cpu", "8 devices × 1 accumulated", f"step {STEPS:>6}/{STEPS}", "tokens/s", "ETA", "saves"):
        assert words in text, words
    kept = f" --tasks_dir={pipeline[0] / 'world/tasks'}" if name == "mid_train" else ""
    assert text.splitlines()[-1].endswith(f"python -m {after} --model_tag={TAG}{kept}")


def test_metrics_and_checkpoints_are_whole(here):
    for stage, measured in [("base", "val_bpb"), ("mid", "val_bpb"), ("sft", "val_loss")]:
        rows = metrics(here, stage)
        assert [step for step, _ in losses(here, stage)] == list(range(1, STEPS + 1))
        assert all(np.isfinite(loss) for _, loss in losses(here, stage))
        for row in (row for row in rows if "loss" in row):
            assert row["data_wait_seconds"] >= 0 and row["step_seconds"] > 0 and row["tokens_per_s"] > 0
            assert row["peak_bytes"] > 1e8  # Python and jax alone
        steps = [row for row in rows if "step_flops" in row]
        per_token = {round(row["step_flops"] / (row["tokens_per_s"] * row["step_seconds"])) for row in steps}
        assert len(steps) == STEPS and (len(per_token) > 1) == (stage == "sft")  # whose rows are as long as needed
        found = {row["step"]: row[measured] for row in rows if measured in row}
        assert sorted(found) == [0, 5, STEPS]
        assert found[STEPS] < found[0]
        meta = checkpoint.read_meta(here / STAGES[stage].folder / TAG, STEPS)
        assert meta["metrics"][measured] == found[STEPS] and meta["step"] == STEPS
        items = {path.name for path in (here / STAGES[stage].folder / TAG / str(STEPS)).iterdir()}
        assert ("optimizer" in items and "data" in items) == (stage != "sft") and "params" in items


def test_a_report_of_all_stages(here):
    """What the trainers left is all there, the samples too, and the evaluations' files beside the checkpoints."""
    folder = here / STAGES["sft"].folder / TAG / str(STEPS)
    (folder / "chat_eval.json").write_text(json.dumps({"metrics": {"ChatCORE": 0.125}}))
    text = said(report, [f"--model_tag={TAG}", "--price_per_hour=3600"])
    assert f"written: {here / 'report' / TAG / 'report.md'}" in text
    told = (here / "report" / TAG / "report.md").read_text()
    for stage, name in [("base", "val_bpb"), ("mid", "val_bpb"), ("sft", "val_loss")]:
        value = [row[name] for row in metrics(here, stage) if name in row][-1]
        assert f" {value:.4f} |" in told
        [ran] = map(json.loads, (here / STAGES[stage].folder / TAG / "runs.jsonl").read_text().splitlines())
        assert ran["seconds"] > sum(row.get("step_seconds", 0) for row in metrics(here, stage))
        assert ran["steps"] == [0, STEPS] and ran["flags"]["num_iterations"] == STEPS and ran["devices"] in told
    assert "| ChatCORE | – | – | 0.1250 |" in told and f"jax {jax.__version__}" in told
    assert told.count("\nuser: ") == told.count("\nSFT:  ") == told.count("\nmid:  ") == 5
    assert "Not recorded" not in told and "missing" not in told


def test_samples_are_shown(pipeline):
    assert pipeline[1]["base_train"].count("continuations:") == 2  # after 5 steps and 10


def test_tok_eval(here, monkeypatch):
    """Beside a reference that knows bytes only: as many tokens as bytes."""
    bytes_only = tiktoken.Encoding(
        "b", pat_str=r"[\s\S]", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: bytes_only)
    text = said(tok_eval, [flags(here)[0][-1], "--references=gpt2"])
    row = next(line.split() for line in text.splitlines() if line.startswith("val"))
    size, tokens = (int(cell.replace(",", "")) for cell in row[1:3])
    assert float(row[3]) == pytest.approx(size / tokens, abs=5e-4) and size / tokens > 1.2
    assert row[4] == "1.000" and row[5] == f"({tokens / size - 1:+.0%})"
    found = json.loads((here / "tokenizer/tok_eval.json").read_text())
    told = {"bytes": size, "tokens": tokens, "bytes_per_token": size / tokens, "gpt2_bytes_per_token": 1.0}
    assert found["texts"]["val"] == told and [*found["texts"]] == ["train", "val", "code", "maths", "languages"]
    assert found["tokenizer_hash"] == Tokenizer.load().hash
    rows = list(csv.DictReader((here / "tokenizer/tok_eval.csv").read_text().splitlines()))
    assert {row.pop("text"): {k: float(v) for k, v in row.items()} for row in rows} == found["texts"]
    assert f"saved {here / 'tokenizer/tok_eval.json'} and .csv" in text
    assert text.endswith(f"-m launch.base_train --depth=12 {flags(here)[0][-1]}\n")


@pytest.mark.parametrize(
    "max_chars, doc_cap, wanted",
    [(-1, -1, ["one", "", "three"]), (5, -1, ["one", "", "th"]), (-1, 2, ["on", "", "th"]), (2, 3, ["on"])],
)
def test_documents_up_to_a_number_of_characters(max_chars, doc_cap, wanted):
    """-1: all of them."""
    assert [*tok_train.documents(["one", "", "three"], max_chars, doc_cap)] == wanted


def test_tok_train_says_how_far_it_is(here, tmp_path, monkeypatch):
    """And keeps in the tokenizer which shards it has read."""
    monkeypatch.setattr(tok_train, "REPORT_SECONDS", 0.001)
    data = flags(here)[0][-1]
    monkeypatch.setenv("JAXCHAT_BASE_DIR", str(tmp_path))
    text = said(tok_train, ["--vocab_size=300", data, "--max_chars=-1", "--doc_cap=-1"])
    assert "  reading: " in text and text.endswith(f"-m launch.base_train --depth=12 {data}\n")
    read = ParquetText(find_shards(data.removeprefix("--data_dir="), "train"))
    assert f"{sum(map(len, read)):,} characters read" in text
    tokenizer = Tokenizer.load()
    assert tokenizer.trained_on == read.fingerprint and tokenizer.knows(read.fingerprint)
    assert not tokenizer.knows({"shard_00000.parquet": "of other content"})
    assert base_train.about_tokenizer(BaseConfig(), tokenizer, read.fingerprint) == []
    other = {"shard_00000.parquet": "of other content"}
    [(name, text)] = base_train.about_tokenizer(BaseConfig(data_dir="there"), tokenizer, other)
    assert name == "warning" and text.endswith("launch.tok_train --data_dir=there")


@pytest.mark.parametrize("source", ["base", "mid", "sft"])
def test_chat(here, source):
    args = ["--source", source, "--model_tag", TAG, "-p", "What is 3 * 4?", "-t", "0", "--max_tokens=8"]
    text = said(chat_cli, args)
    assert f"{TAG}/{STEPS}" in text and said(chat_cli, args) == text


def test_stages_are_found_by_tag_and_step(here):
    assert checkpoint.find("base") == (here / "base_checkpoints" / TAG, STEPS)
    assert checkpoint.open_model("mid", TAG, STEPS).meta["parent"] == f"base {TAG} {STEPS}"
    assert checkpoint.open_model("sft").meta["parent"] == f"mid {TAG} {STEPS}"


def test_the_step_compiles_once_or_once_a_bucket(here, home):
    """Base and mid have one shape of batch; SFT, which is trained here to see it, as many programs as buckets."""
    shutil.copytree(here, home, dirs_exist_ok=True)
    base, mid, sft = flags(home)
    parsed = [cli.parse(BaseConfig, base), cli.parse(MidConfig, mid), cli.parse(SFTConfig, sft)]
    assert length_buckets(LENGTH) == [64, 96]
    for command, config, most in zip((base_train, mid_train, chat_sft), parsed, (1, 1, 2), strict=True):
        stage = command.stage_for(dataclasses.replace(config, overwrite=True))
        began = stage.batches.get_state()
        shapes = {stage.batches.next_batch(None, step)["inputs"].shape for step in range(stage.num_steps)}
        assert len(shapes) <= most
        stage.batches.set_state(began)
    with run.open_run(stage, run.find_start(stage)) as ready:
        loop.train(ready, [])
        assert ready.step_fn._cache_size() == len(shapes)


def test_a_device_that_tells_its_memory(here, home, monkeypatch, capsys):
    """SFT is measured by its longest rows; a step too large is refused before anything is deleted."""
    shutil.copytree(here, home, dirs_exist_ok=True)
    short = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    (home / "short.jsonl").write_text(f"{json.dumps(short)}\n" * 16)
    config = cli.parse(SFTConfig, [*flags(home)[2], f"--train_tasks={home / 'short.jsonl'}"])
    config = dataclasses.replace(config, overwrite=True, num_iterations=1)
    assert chat_sft.stage_for(config).batches.peek()["inputs"].shape[-1] < LENGTH
    lengths, first_that_fits = set(), fit.first_that_fits

    def noted(steps, mesh, state, batch, multiplier):
        lengths.update(a.shape[-1] for a in batch.values())
        return first_that_fits(steps, mesh, state, batch, multiplier)

    monkeypatch.setattr(fit, "device_memory", lambda mesh: 50e6)
    monkeypatch.setattr(fit, "first_that_fits", noted)
    train(chat_sft, config)
    assert "a step with --remat=none needs" in capsys.readouterr().out
    assert lengths == {LENGTH}
    folder = checkpoint.run_folder("sft", TAG)
    assert checkpoint.steps_in(folder) == [1] and checkpoint.read_meta(folder, 1)["remat"] == "none"
    monkeypatch.setattr(fit, "device_memory", lambda mesh: 1e6)
    with pytest.raises(UserError, match="--remat=full needs .* of a device's 0.0 GB; lower --device_batch_size"):
        train(chat_sft, config)
    assert checkpoint.whole_steps(folder) == [1]


def test_a_resumed_run_keeps_its_remat(here, home, monkeypatch):
    """To go on to the bit; what was less did not fit. A run from before it was written down had this default."""
    shutil.copytree(here, home, dirs_exist_ok=True)
    config = cli.parse(BaseConfig, flags(home)[0])
    monkeypatch.setattr(fit, "device_memory", lambda mesh: 50e6)
    meta = store.Checkpoints.meta
    told = {}
    monkeypatch.setattr(store.Checkpoints, "meta", lambda self, step: meta(self, step) | told)
    for resumed, remat, order in ((1, "dots", "dots full"), (1, "full", "full"), (0, "dots", "none dots full")):
        told["remat"] = remat
        stage = base_train.stage_for(dataclasses.replace(config, resume=bool(resumed), overwrite=not resumed))
        steps = run.step_functions(stage, run.find_start(stage), stage.batches.peek())
        assert list(steps) == order.split()


def test_dry_run_writes_nothing(here):
    before = sorted(path.relative_to(here) for path in here.rglob("*"))
    for command, args in zip((base_train, mid_train, chat_sft), flags(here), strict=True):
        assert "nothing (dry run)" in said(command, [*args, "--dry_run", "--num_iterations=2"])
    assert sorted(path.relative_to(here) for path in here.rglob("*")) == before


def test_a_process_with_other_tasks_is_refused(here, monkeypatch, capsys):
    """As if it had none: mid and SFT name the file."""
    gather = sharding.gather_json
    everyone = lambda facts: [facts, facts | {"data": {}}] if "data" in facts else gather(facts)  # noqa: E731
    monkeypatch.setattr(sharding, "gather_json", everyone)
    for command, args, name in zip((mid_train, chat_sft), flags(here)[1:], ("world_mid", "world_sft"), strict=True):
        with pytest.raises(SystemExit, match="2"):
            command.main([*args, "--dry_run"])
        assert re.search(f"with different data: process 0 has .*{name}.jsonl", capsys.readouterr().err)


def test_multiple_choice_while_finetuning(here, home):
    """MMLU and ARC-Easy from files in the hub's shapes; 3 rows of which the letters are all the same."""
    shutil.copytree(here, home, dirs_exist_ok=True)
    mmlu = {"question": ["one?", "two?", "three?"], "choices": [["x", "y"]] * 3, "answer": [1, 1, 1]}
    arc = {"question": mmlu["question"], "choices": [{"text": ["x", "y"], "label": ["1", "2"]}] * 3}
    for name, columns in (("mmlu/all", mmlu), ("arc/ARC-Easy", arc | {"answerKey": ["2"] * 3})):
        (home / "tasks" / name).mkdir(parents=True)
        pq.write_table(pa.table(columns), home / "tasks" / name / "test-00000-of-00001.parquet")
    chat_sft.main([*flags(home)[2], "--overwrite", "--eval_metrics_every=5", "--num_iterations=5"])
    (row,) = [row for row in metrics(home, "sft") if "MMLU_acc" in row]
    assert row["step"] == 5 and {row["MMLU_acc"], row["ARC-Easy_acc"]} <= {0.0, 1 / 3, 2 / 3, 1.0}


def test_a_conversation_in_the_terminal(here, monkeypatch):
    """Two turns, an empty line, a fresh start, and the end; the second turn sees the first."""
    seen, lines = [], iter(["hello there", "", "/help", "x" * 999, "and now?", "/clear", "again", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    stream = Engine.stream

    def watched(engine, conversation, **kwargs):
        seen.append(list(conversation))
        return stream(engine, conversation, **kwargs)

    monkeypatch.setattr(Engine, "stream", watched)
    text = said(chat_cli, ["--model_tag", TAG, "-t", "0", "--max_tokens=4"])
    assert text.count("model: ") == 3 and len(seen) == 3
    assert text.count("/clear begins") == 2 and f"there is room for {LENGTH - 4}, since 4" in text
    assert seen[1][: len(seen[0])] == seen[0] and len(seen[1]) > len(seen[0]) + 4
    tokenizer = checkpoint.open_model("sft").tokenizer
    assert seen[2] == tokenizer.render_for_completion({"messages": [{"role": "user", "content": "again"}]})


@pytest.mark.slow
def test_the_demo_from_end_to_end(home, monkeypatch):
    """The demo itself with two steps a stage: all commands run, and what is not learnt is told."""
    monkeypatch.setattr(jaxchat.demo, "write_world", lambda world, folder: write_world(world, folder, **SMALL))
    monkeypatch.setattr(jaxchat.demo.score, "score", lambda *args: score(*args, limit=2))
    args = ["--base_steps=2", "--mid_steps=2", "--sft_steps=2", "--device_batch_size=1"]  # 8 rows on 8 devices
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stop:
        demo.main(args)
    assert stop.value.code == 1
    *_, table, end = out.getvalue().split("\n\n")
    assert table.startswith("held-out prompts") and table.count("MISS") == 7
    page = home / "demo" / "report" / "demo" / "report.html"
    assert f"and {page} to open" in out.getvalue() and "world: two-turn" in page.read_text()
    total, following, page = end.splitlines()
    assert page.endswith("-m launch.serve --open_browser")
    assert total.startswith("in all ") and following.endswith('-m launch.chat_cli -p "What is 23 * 7?"')
    # All that it wrote is in its own base directory, which the printed command names.
    assert {path.name for path in home.iterdir()} == {"demo"} and f"JAXCHAT_BASE_DIR={home / 'demo'} " in following
    line = following.removeprefix("next: ") + " --max_tokens=4"
    chat = subprocess.run(line, shell=True, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert chat.returncode == 0 and "Chat with demo" in chat.stdout, chat.stderr
    # A client of OpenAI's API, served by this model.
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k"]
    words += ["openai or llm" if THOROUGH else "across_tokens", "tests/test_serve_engine.py"]
    env = os.environ | {"JAXCHAT_TEST_BASE_DIR": str(home / "demo")}
    clients = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    assert clients.returncode == 0 and "skipped" not in clients.stdout, clients.stdout
