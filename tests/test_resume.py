"""Killed at a random step and resumed, a run computes the very losses of the run that was not: bit for bit."""

import json
import os
import random
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT, xla_flags

from jaxchat.checkpoint import steps_in
from jaxchat.config import STAGES
from jaxchat.demo import World, write_world
from launch import base_train, tok_train

STEPS = 90
SMALL = {"base_shards": 2, "base_rows": 800, "base_val_rows": 60, "mid_rows": 800, "sft_rows": 10, "val_rows": 20}


def flags(folder, stage):
    tasks = folder / "world/tasks"
    common = ["--device_batch_size=2", "--total_batch_size=128", f"--num_iterations={STEPS}", "--save_every=7"]
    common += ["--eval_every=-1"]
    if stage == "base":
        data = f"--data_dir={folder / 'world/base_data'}"
        return [*common, "--depth=1", "--max_seq_len=32", "--sample_every=-1", "--model_tag=run", data]
    return [*common, f"--train_tasks={tasks / 'world_mid.jsonl'}", f"--val_tasks={tasks / 'world_val.jsonl'}"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A base directory with data, a tokenizer, and a base checkpoint for mid."""
    folder = tmp_path_factory.mktemp("resume")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXCHAT_BASE_DIR", str(folder))
        write_world(World(1), folder / "world", **SMALL)
        tok_train.main(["--vocab_size=280", flags(folder, "base")[-1]])
        base_train.main(
            [*flags(folder, "base"), "--num_iterations=2", "--device_batch_size=1", "--total_batch_size=256"]
        )
    return folder


def losses(folder, stage):
    lines = (folder / STAGES[stage].folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [(row["step"], row["loss"], row["grad_norm"]) for row in map(json.loads, lines) if "loss" in row]


def start(module, args, home):
    env = os.environ | {"XLA_FLAGS": xla_flags(1), "JAXCHAT_BASE_DIR": str(home)}
    with (home / "log").open("a") as log:
        return subprocess.Popen([sys.executable, "-m", module, *args], cwd=ROOT, env=env, stdout=log, stderr=log)


@pytest.mark.parametrize("stage", ["base"])  # mid and SFT: test_chaos
def test_kill_and_resume(data, tmp_path, stage):
    module = f"launch.{stage}_train"
    runs = {}
    for name in ("whole", "killed"):
        runs[name] = home = tmp_path / name
        shutil.copytree(data, home)
        if stage == "base":
            shutil.rmtree(home / "base_checkpoints")
    args = {name: flags(home, stage) for name, home in runs.items()}
    whole = start(module, args["whole"], runs["whole"])
    assert whole.wait(timeout=300) == 0, (runs["whole"] / "log").read_text()[-3000:]

    # Not seeded: over many runs every step has its turn. By step 22 the checkpoint of step 14 is whole, and half of
    # the steps are left for the kill to come before the last.
    at = random.SystemRandom().randrange(22, STEPS // 2)
    print("kill after step", at)
    path = runs["killed"] / STAGES[stage].folder / "run" / "metrics.jsonl"
    process, deadline = start(module, args["killed"], runs["killed"]), time.monotonic() + 300
    while not (path.exists() and len(path.read_text().splitlines()) >= at):
        assert process.poll() is None and time.monotonic() < deadline, (runs["killed"] / "log").read_text()[-3000:]
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -9
    logged = len(losses(runs["killed"], stage))
    saved = steps_in(path.parent)
    assert saved and logged < STEPS, (saved, logged)

    resumed = start(module, [*args["killed"], "--resume"], runs["killed"])
    assert resumed.wait(timeout=300) == 0, (runs["killed"] / "log").read_text()[-3000:]
    assert losses(runs["killed"], stage) == losses(runs["whole"], stage)
    assert [step for step, _, _ in losses(runs["whole"], stage)] == list(range(1, STEPS + 1))
