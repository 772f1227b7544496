"""Stages under kills, notices to stop, damaged checkpoints and a full disk: the same losses, bit for bit.

RL is among them if JAXCHAT_THOROUGH.
JAXCHAT_CHAOS_ROUNDS: rounds in all (6). One round is one start of a command with one fault; JAXCHAT_CHAOS_SEED draws.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, THOROUGH, xla_flags

from jaxchat.checkpoint import steps_in
from jaxchat.config import STAGES
from jaxchat.demo import World, write_world
from launch import base_train, tok_train

ROUNDS = int(os.environ.get("JAXCHAT_CHAOS_ROUNDS", "6"))
SEED = int(os.environ.get("JAXCHAT_CHAOS_SEED", "0"))
MODULES = {"base": "launch.base_train", "mid": "launch.mid_train", "sft": "launch.chat_sft", "rl": "launch.chat_rl"}
SMALL = {"base_shards": 2, "base_rows": 800, "base_val_rows": 60, "mid_rows": 800, "sft_rows": 200, "val_rows": 20}
EVERY = 5
FAULTS = ("kill", "term", "kill in a save", "truncate", "flip", "full")


def flags(home, stage, steps):
    tasks = home / "world/tasks"
    args = ["--device_batch_size=2", f"--num_iterations={steps}", f"--save_every={EVERY}", "--eval_every=-1"]
    if stage == "base":
        args += ["--depth=1", "--max_seq_len=32", "--sample_every=-1", "--model_tag=run", "--total_batch_size=128"]
        return [*args, f"--data_dir={home / 'world/base_data'}"]
    if stage == "mid":
        return [*args, "--total_batch_size=128", f"--train_tasks={tasks / 'world_mid.jsonl'}"]
    if stage == "rl":
        rl = ["--source=base", "--examples_per_step=2", "--num_samples=4", "--max_new_tokens=8", "--reward=finished"]
        return [*args, *rl, "--min_groups=1", "--init_lr_frac=0.01", f"--train_tasks={tasks / 'world_sft.jsonl'}"]
    sft = ["--source=base", "--target_examples_per_step=2", "--eval_metrics_every=-1", "--packing=bestfit"]
    return [*args, *sft, f"--train_tasks={tasks / 'world_sft.jsonl'}"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A base directory with data, a tokenizer, and a base checkpoint for mid and SFT."""
    folder = tmp_path_factory.mktemp("chaos")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXCHAT_BASE_DIR", str(folder))
        write_world(World(1), folder / "world", **SMALL)
        tok_train.main(["--vocab_size=280", f"--data_dir={folder / 'world/base_data'}"])
        base_train.main([*flags(folder, "base", 2), "--device_batch_size=1", "--total_batch_size=256"])
    return folder


@pytest.fixture
def disk():
    """disk(folder): an empty disk of 8 MB there, ten checkpoints', where we may mount one; else an empty folder."""
    mounted = []

    def mount(folder):
        folder.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", "size=8m", "chaos", folder]
        if shutil.which("mount") and subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0:
            mounted.append(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


def losses(run):
    """{step: what it computed}, of whole lines."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return {row["step"]: (row["loss"], row["grad_norm"], row["lr_multiplier"]) for row in rows if "loss" in row}


class Run:
    """One stage's run, in a base directory of its own."""

    def __init__(self, data, home, stage, steps):
        shutil.copytree(data, home)
        if stage == "base":
            shutil.rmtree(home / "base_checkpoints")
        self.home, self.stage, self.steps = home, stage, steps
        self.folder = home / STAGES[stage].folder / "run"
        self.logs = []  # of each start

    def start(self, fault="none"):
        env = os.environ | {"XLA_FLAGS": xla_flags(1), "JAXCHAT_BASE_DIR": str(self.home), "PYTHONUNBUFFERED": "1"}
        env["PYTHONPATH"] = str(ROOT)
        args = [fault, MODULES[self.stage], *flags(self.home, self.stage, self.steps), "--resume"]
        command = [sys.executable, str(ROOT / "tests/chaos_process.py"), *args]
        self.logs.append(self.home / f"log-{len(self.logs)}")
        with self.logs[-1].open("w") as log:
            return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)

    def log(self):
        return "".join(path.read_text() for path in self.logs)

    def began(self):
        """The step after which each start continued, as its plan says."""
        resumed = [re.search(r"^  resumes +after step (\d+)$", path.read_text(), re.M) for path in self.logs]
        return [int(found[1]) if found else 0 for found in resumed]

    def forget(self, step):
        """Drop the metrics of later steps, as the next start will, so that what appears is of that start."""
        path = self.folder / "metrics.jsonl"
        if path.exists():
            rows = path.read_text().splitlines(keepends=True)
            path.write_text("".join(row for row in rows if row.endswith("\n") and json.loads(row)["step"] <= step))

    def ends(self, process):
        """The exit code."""
        return process.wait(timeout=240)

    def reaches(self, process, step):
        """Wait until so many steps are logged. -> whether the process still runs."""
        deadline = time.monotonic() + 240
        while process.poll() is None and max(losses(self.folder), default=0) < step:
            assert time.monotonic() < deadline, self.log()[-3000:]
            time.sleep(0.002)
        return process.poll() is None


def spoil(folder, how, rng):
    """Truncate a file of the last checkpoint, or turn a bit of it."""
    last = folder / str(steps_in(folder)[-1])
    path = rng.choice(sorted(p for p in last.rglob("*") if p.is_file() and p.stat().st_size and p.name != "seal.json"))
    content = bytearray(path.read_bytes())
    at = rng.randrange(len(content))
    if how == "flip":
        content[at] ^= 1 << rng.randrange(8)
    path.write_bytes(content[:at] if how == "truncate" else content)


def disturb(run, fault, rng):
    """One start of the run under a fault. -> the least step that the next start may go on from."""
    base = max(steps_in(run.folder), default=0)
    run.forget(base)
    if fault == "kill in a save":
        process = run.start("kill=2")
        assert run.ends(process) == -9, run.log()[-3000:]
        return run.began()[-1] // EVERY * EVERY + EVERY  # the first save was waited for
    stopped = fault in ("term", "full")
    process = run.start(f"full={rng.randrange(500)}" if fault == "full" else "none")  # a checkpoint has 700 kB
    at = base + rng.randrange(*((EVERY + 4, 2 * EVERY + 3) if fault == "full" else (1, 3 * EVERY)))
    assert run.reaches(process, at), run.log()[-3000:]
    process.send_signal(rng.choice((signal.SIGTERM, signal.SIGINT, signal.SIGHUP)) if stopped else signal.SIGKILL)
    assert run.ends(process) == (75 if stopped else -9), run.log()[-3000:]
    whole = steps_in(run.folder)
    if stopped:
        told = run.logs[-1].read_text()
        assert whole[-1] >= at and f"after step {whole[-1]}; saved in" in told
        if fault == "full":
            assert len(re.findall("^saving .*failed: .*run: (?:No space left|File too large)", told, re.M)) == 2, told
            assert not list(run.folder.glob("*tmp*"))
        return whole[-1]
    # A save begun at a multiple of EVERY is whole when the next one begins, which follows the last line of metrics.
    least = max(run.began()[-1], ((max(losses(run.folder), default=1) - 1) // EVERY - 1) * EVERY)
    if fault in ("truncate", "flip") and len(whole) > 1 and (run.folder / str(whole[-1]) / "seal.json").exists():
        spoil(run.folder, fault, rng)
        return min(least, whole[-2])
    return least


@pytest.mark.slow
@pytest.mark.parametrize("stage", list(MODULES)[: 4 if THOROUGH else 3])
def test_chaos(data, disk, tmp_path, stage):
    index = list(MODULES).index(stage)
    rounds = ROUNDS // 3 + (index < ROUNDS % 3)
    steps, rng = 20 * rounds + 20, random.Random(1000 * SEED + index)
    whole = Run(data, tmp_path / "whole", stage, steps)
    assert whole.ends(whole.start()) == 0, whole.log()[-3000:]
    run = Run(data, tmp_path / "disturbed", stage, steps)
    disk(run.folder)
    # Every fault has its turn over the stages; which comes when is drawn.
    order = [FAULTS[(i + 2 * index) % len(FAULTS)] for i in range(rounds)]
    rng.shuffle(order)
    least = [0]
    for fault in order:
        before = losses(run.folder)
        least.append(disturb(run, fault, rng))
        now = losses(run.folder)
        print(stage, fault, "from", run.began()[-1], "to", max(now), "; the next start from at least", least[-1])
        assert all(now[step] == before[step] for step in before.keys() & now.keys())
    assert run.ends(run.start()) == 0, run.log()[-3000:]
    assert losses(run.folder) == losses(whole.folder) and sorted(losses(run.folder)) == list(range(1, steps + 1))
    assert steps_in(run.folder)[-1] == steps
    began = run.began()
    assert len(began) == len(least) and all(b >= n for b, n in zip(began, least, strict=True)), (began, least)
