"""Every command once, tiny, as a user calls it; then what the whole run must hold: devices, compilations, chat."""

import contextlib
import dataclasses
import io
import json
import shutil

import numpy as np
import pytest

from jaxchat import checkpoint
from jaxchat.config import BaseConfig, MidConfig, SFTConfig
from jaxchat.data.packing import length_buckets
from jaxchat.data.world import World, write_world
from jaxchat.train import loop, stages
from launch import base_train, chat_cli, chat_sft, cli, mid_train, tok_eval, tok_train

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
    mid = [*batch, *common, *mixtures, f"--train_tasks={tasks / 'world_mid.jsonl'}", "--eval_tokens=600"]
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


@pytest.fixture
def here(pipeline, monkeypatch):
    monkeypatch.setenv("JAXCHAT_BASE_DIR", str(pipeline[0]))
    return pipeline[0]


def metrics(folder, stage):
    lines = (folder / checkpoint.FOLDERS[stage] / TAG / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(folder, stage):
    return [(row["step"], row["loss"]) for row in metrics(folder, stage) if "loss" in row]


@pytest.mark.parametrize("name", ["base_train", "mid_train", "chat_sft"])
def test_a_stage_tells_its_plan_its_steps_and_what_comes_next(pipeline, name):
    text = pipeline[1][name]
    after = {"base_train": "launch.mid_train", "mid_train": "launch.chat_sft", "chat_sft": "launch.chat_cli"}[name]
    for words in ("8 × cpu", "8 devices × 1 accumulated", f"step {STEPS:>6}/{STEPS}", "tokens/s", "ETA", "saves"):
        assert words in text, words
    assert text.splitlines()[-1] == f"next: python -m {after} --model_tag={TAG}"


def test_metrics_and_checkpoints_are_whole(here):
    for stage, measured in [("base", "val_bpb"), ("mid", "val_bpb"), ("sft", "val_loss")]:
        rows = metrics(here, stage)
        assert [step for step, _ in losses(here, stage)] == list(range(1, STEPS + 1))
        assert all(np.isfinite(loss) for _, loss in losses(here, stage))
        found = {row["step"]: row[measured] for row in rows if measured in row}
        assert sorted(found) == [0, 5, STEPS]
        assert found[STEPS] < found[0]
        meta = checkpoint.read_meta(here / checkpoint.FOLDERS[stage] / TAG, STEPS)
        assert meta["metrics"][measured] == found[STEPS] and meta["step"] == STEPS
        items = {path.name for path in (here / checkpoint.FOLDERS[stage] / TAG / str(STEPS)).iterdir()}
        assert ("optimizer" in items and "data" in items) == (stage != "sft") and "params" in items


def test_samples_are_shown(pipeline):
    assert pipeline[1]["base_train"].count("continuations:") == 2  # after 5 steps and 10


def test_tok_eval(here):
    text = said(tok_eval, [flags(here)[0][-1], "--references="])
    row = next(line.split() for line in text.splitlines() if line.startswith("val"))
    size, tokens = (int(cell.replace(",", "")) for cell in row[1:3])
    assert float(row[3]) == pytest.approx(size / tokens, abs=5e-4) and size / tokens > 1.2


@pytest.mark.parametrize("source", ["base", "mid", "sft"])
def test_chat(here, source):
    args = ["--source", source, "--model_tag", TAG, "-p", "What is 3 * 4?", "-t", "0", "--max_tokens=8"]
    text = said(chat_cli, args)
    assert f"{TAG}/{STEPS}" in text and said(chat_cli, args) == text


def test_stages_are_found_by_tag_and_step(here):
    assert checkpoint.find("base") == (here / "base_checkpoints" / TAG, STEPS)
    assert checkpoint.open_model("mid", TAG, STEPS).meta["parent"] == f"base {TAG} {STEPS}"
    assert checkpoint.open_model("sft").meta["parent"] == f"mid {TAG} {STEPS}"


def test_one_device_computes_what_eight_do(here, home, run_command):
    """All three stages again on one device, each from the very checkpoint that the eight started from.

    Both sum the same numbers in another order. A difference of one rounding grows from step to step: Newton–Schulz
    brings small directions of a gradient up to the size of the large. After 10 steps 1e-5 was seen.
    """
    for part in ("world", "tokenizer", "base_checkpoints", "mid_checkpoints"):
        shutil.copytree(here / part, home / part)
    commands = ["base_train", "mid_train", "chat_sft"]
    for stage, command, args in zip(("base", "mid", "sft"), commands, flags(home, devices=1), strict=True):
        tag = [f"--model_tag={TAG}"] if stage == "base" else []
        if stage == "base":
            shutil.rmtree(home / "base_checkpoints")
        run_command(f"launch.{command}", *args, *tag, "--overwrite", devices=1)
        one, eight = losses(home, stage), losses(here, stage)
        assert [step for step, _ in one] == [step for step, _ in eight]
        np.testing.assert_allclose([x for _, x in one], [x for _, x in eight], rtol=1e-4, err_msg=stage)
        if stage != "sft":  # the next stage is to start from the same weights
            shutil.rmtree(home / checkpoint.FOLDERS[stage])
            shutil.copytree(here / checkpoint.FOLDERS[stage], home / checkpoint.FOLDERS[stage])


def test_the_step_compiles_once_or_once_a_bucket(here, home):
    shutil.copytree(here, home, dirs_exist_ok=True)
    base, mid, sft = flags(home)
    parsed = [cli.parse(BaseConfig, base), cli.parse(MidConfig, mid), cli.parse(SFTConfig, sft)]
    buckets = length_buckets(LENGTH)
    assert buckets == [64, 96]
    for make, config, shapes in zip((stages.base, stages.mid, stages.sft), parsed, (1, 1, 2), strict=True):
        stage, _ = make(dataclasses.replace(config, overwrite=True))
        loop.train(stage, [])
        assert stage.step_fn._cache_size() == shapes


def test_dry_run_writes_nothing(here):
    before = sorted(path.relative_to(here) for path in here.rglob("*"))
    _, mid, sft = flags(here)
    for command, args in ((mid_train, mid), (chat_sft, sft)):
        assert "nothing (dry run)" in said(command, [*args, "--dry_run"])
    assert sorted(path.relative_to(here) for path in here.rglob("*")) == before
