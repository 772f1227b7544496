"""Faults, one by one: a damaged checkpoint, a second run, a loss that is not finite, a disk that is full, a stop."""

import errno
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import warnings

import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import ROOT, THOROUGH, xla_flags

from jaxchat import checkpoint, seal, store
from jaxchat.config import STAGES, BaseConfig, SFTConfig, UserError
from jaxchat.demo import World, write_world
from jaxchat.train import loop, saving, signals, stages
from jaxchat.train import run as train_run
from jaxchat.train.signals import Stop
from launch import base_train, chat_sft, cli, tok_train

SMALL = {"base_shards": 2, "base_rows": 300, "base_val_rows": 30, "mid_rows": 1, "sft_rows": 60, "val_rows": 20}
STEPS = 6
DATA = "--data_dir=world/base_data"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, devices):
    """A base directory with a base run of STEPS steps, saved at 2, 4 and 6, and an SFT run on top of it."""
    folder = tmp_path_factory.mktemp("faults")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXCHAT_BASE_DIR", str(folder))
        patch.chdir(folder)  # the data's path is the same in every copy
        write_world(World(1), folder / "world", **SMALL)
        tok_train.main(["--vocab_size=280", DATA])
        base_train.main(base())
        chat_sft.main(sft())
    return folder


@pytest.fixture
def folder(trained, home, monkeypatch):
    shutil.copytree(trained, home, dirs_exist_ok=True)
    monkeypatch.chdir(home)
    return home


def base(*more):
    batch = ["--depth=1", "--max_seq_len=16", "--device_batch_size=1", "--total_batch_size=128", "--model_tag=run"]
    never = ["--eval_every=-1", "--sample_every=-1"]
    return [*batch, *never, DATA, f"--num_iterations={STEPS}", "--save_every=2", *more]


def sft(*more):
    batch = ["--source=base", "--device_batch_size=1", "--target_examples_per_step=8", "--packing=bestfit"]
    never = ["--eval_every=-1", "--eval_metrics_every=-1"]
    data = "--train_tasks=world/tasks/world_sft.jsonl"
    return [*batch, *never, data, f"--num_iterations={STEPS}", "--save_every=2", *more]


def ends(command, args, code):
    if code == 0:
        return command.main(args)
    with pytest.raises(SystemExit) as stop:
        command.main(args)
    assert stop.value.code == code


def losses(run):
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row]


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def turn_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def largest(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != seal.NAME)
    return max(files, key=lambda path: path.stat().st_size)


def test_a_damaged_checkpoint_is_passed_over(folder, capsys):
    run = folder / "base_checkpoints/run"
    assert not any(seal.damage(run / step) for step in "246")
    for spoil in (os.remove, turn_a_bit, truncate):
        shutil.copytree(run / "6", folder / "kept", dirs_exist_ok=True)
        spoil(largest(run / "6"))
        assert checkpoint.find("base", "run") == (run, 4)
        err = capsys.readouterr().err
        assert err.startswith(f"checkpoint {run / '6'} is damaged and skipped: ") and err.count("\n") == 1
        if spoil != truncate:  # the last one stays
            shutil.copytree(folder / "kept", run / "6", dirs_exist_ok=True)
            assert not seal.damage(run / "6")
    with pytest.raises(UserError, match="is damaged: .*take another step: 2, 4$"):
        checkpoint.find("base", "run", 6)
    wanted = losses(run)
    ends(base_train, base("--resume"), 0)
    assert "resumes     after step 4" in capsys.readouterr().out
    assert losses(run) == wanted and not seal.damage(run / "6")
    for step in "246":
        spoil(largest(run / step))
    with pytest.raises(UserError, match="all checkpoints in .* are damaged"):
        checkpoint.find("base", "run")
    ends(base_train, base("--resume"), 2)


def test_one_that_was_never_finished(folder, capsys):
    """Its run ended between the last rename and the seal, and the machine with it, perhaps."""
    run = folder / "base_checkpoints/run"
    (run / "6" / seal.NAME).unlink()
    assert checkpoint.find("base", "run") == (run, 4)
    assert capsys.readouterr().err == f"checkpoint {run / '6'} is damaged and skipped: it was never finished\n"
    assert checkpoint.find("base", "run", 6) == (run, 6)
    for step in "24":
        (run / step / seal.NAME).unlink()  # as of an older version: none has a seal
    assert checkpoint.find("base", "run") == (run, 6)
    for path in (run / "6").rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)
    ends(base_train, base("--resume"), 2)
    printed = capsys.readouterr().err
    assert f"{run / '6'} can't be read" in printed and "move it away" in printed and printed.count("\n") == 1


def two_processes(folder, fault, *more):
    """Base training by two processes with a fault put in. -> their exit codes, and (stdout, stderr) of each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = os.environ | {"XLA_FLAGS": xla_flags(4), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests/chaos_process.py"), fault, "launch.base_train"]
    command += base(
        "--model_tag=two", *more, f"--coordinator=localhost:{port}", "--num_processes=2", "--heartbeat_timeout=20"
    )
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([*command, f"--process_id={n}"], env=env, cwd=folder, **piped) for n in range(2)]
    printed = [process.communicate(timeout=240) for process in both]
    return [process.returncode for process in both], printed


@pytest.mark.slow
def test_one_of_two_processes_cannot_read_its_rows(folder):
    """Both save the step before and end, each with one line; resumed, they train on as if nothing had been."""
    codes, printed = two_processes(folder, "data=4")
    assert codes == [2, 2], printed
    assert "step 3 is saved: continue from it with --resume" in printed[0][0]
    (first,), (second,) = ([line for line in err.splitlines() if "error" in line] for _, err in printed)
    assert first == "error: another process can't read its rows of step 4; its own message says why"
    assert second == "error: a shard can't be read"
    run = folder / "base_checkpoints/two"
    assert checkpoint.steps_in(run) == [2, 3] and not seal.damage(run / "3")
    assert [row[0] for row in losses(run)] == [1, 2, 3]
    codes, printed = two_processes(folder, "none", "--resume")
    assert codes == [0, 0] and "resumes     after step 3" in printed[0][0], printed
    # The same rows on the same 8 devices, summed by two processes: to rounding.
    for got, want in zip(losses(run), losses(folder / "base_checkpoints/run"), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("at", [3, 1][: 2 if THOROUGH else 1])
def test_a_save_that_fails_on_one_of_two_processes(folder, at):
    """Both know it and neither waits for the other; at the end of the run (the third save) it is tried again."""
    wanted, run = losses(folder / "base_checkpoints/run"), folder / "base_checkpoints/two"
    codes, printed = two_processes(folder, f"seal={at}")
    assert codes == [0, 0], printed
    assert ("training continues" if at == 1 else "saving step 6 failed: ") in printed[0][0] and not printed[1][0]
    assert not seal.damage(run / "6") and (run / "6" / seal.NAME).exists()
    # The same rows on the same 8 devices, summed by two processes: to rounding.
    for got, want in zip(losses(run), wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5)


def test_a_spoilt_seal_and_none(folder):
    step = folder / "base_checkpoints/run/6"
    for content in ("{", "[1]", '{"meta": 3}', ""):
        (step / seal.NAME).write_text(content)
        assert "cannot be read" in seal.damage(step), content
    (step / seal.NAME).unlink()  # of an older version
    assert seal.damage(step) == ""


def test_two_runs_cannot_write_one_folder(folder, capsys):
    run = folder / "base_checkpoints/run"
    held = store.lock(run)
    before = sorted(run.rglob("*"))
    for more in ("--resume", "--overwrite"):
        ends(base_train, base(more), 2)
        printed = capsys.readouterr().err
        assert f"{run} is being written by process {os.getpid()} on " in printed and printed.count("\n") == 1
    assert sorted(run.rglob("*")) == before
    os.close(held)
    ends(base_train, base("--resume"), 0)


@pytest.mark.parametrize("how", ["stop", "skip"])
def test_a_loss_that_is_not_finite(folder, how, capsys):
    """Learning rates of 10^38 ruin the weights at the first step; the loss is not finite from the second on."""
    huge = ["--matrix_lr=1e38", "--embedding_lr=1e38", "--unembedding_lr=1e38"]
    args = base(*huge, f"--on_nonfinite={how}", "--model_tag=huge", "--save_every=1")
    with warnings.catch_warnings():  # of NumPy, where ours are errors
        warnings.simplefilter("ignore", RuntimeWarning)
        ends(base_train, args, 2 if how == "stop" else 0)
    out, err = capsys.readouterr()
    run = folder / "base_checkpoints/huge"
    if how == "stop":
        assert "error: step 2: loss nan" in err and "documents of the data read" in err and "--on_nonfinite=skip" in err
        assert checkpoint.steps_in(run) == [1, 2]  # as it is with the step left out
        assert checkpoint.read_meta(run, 2)["metrics"].keys() == checkpoint.read_meta(run, 1)["metrics"].keys()
        return
    assert [f"step {step}: loss nan" in out for step in range(1, 7)] == [False] + 5 * [True]
    assert out.count("not finite: skipped") == 5 and "skipped 5" in out
    assert [row["nonfinite"] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())] == [
        0,
        1,
        1,
        1,
        1,
        1,
    ]


class FullDisk:
    """Orbax, for whose first saves the disk is full."""

    def __init__(self, monkeypatch, times):
        self.times, self.tried, self.save = times, 0, ocp.AsyncCheckpointer.save
        monkeypatch.setattr(ocp.AsyncCheckpointer, "save", lambda *args, **how: self(*args, **how))
        monkeypatch.setattr(saving.time, "sleep", lambda seconds: None)

    def __call__(self, writer, path, *args, **how):
        self.tried += 1
        if self.tried > self.times:
            return self.save(writer, path, *args, **how)
        half = path.with_name(f"{path.name}.orbax-checkpoint-tmp")
        half.mkdir()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(half))


def test_a_failed_save_is_told_and_tried_again(folder, monkeypatch, capsys):
    FullDisk(monkeypatch, times=2)
    wanted = losses(folder / "base_checkpoints/run")
    ends(base_train, base("--model_tag=full"), 0)
    run, out = folder / "base_checkpoints/full", capsys.readouterr().out
    assert "saving failed: " in out and "No space left on device; training continues, next attempt after step 3" in out
    assert out.count("saving failed: ") == 2 and "next attempt after step 5" in out
    assert checkpoint.steps_in(run) == [4, 6]  # at 2 and 3 it failed
    assert losses(run) == wanted and not list(run.glob("*tmp*"))


def test_saves_that_all_fail(folder, monkeypatch, capsys):
    """The run trains to its end, and then says that it is lost, and what is not."""
    disk = FullDisk(monkeypatch, times=10**9)
    shutil.rmtree(folder / "base_checkpoints/run/6")
    shutil.rmtree(folder / "base_checkpoints/run/4")
    ends(base_train, base("--resume"), 2)
    out, err = capsys.readouterr()
    assert "base_checkpoints/run/6 could not be saved: " in err and "continue with --resume from step 2" in err
    assert "next attempt after step 5" in out and disk.tried > saving.LAST_ATTEMPTS
    run = folder / "base_checkpoints/run"
    assert checkpoint.steps_in(run) == [2] and not list(run.glob("*tmp*"))


@pytest.mark.parametrize(
    "command, flags, stage, number", [(base_train, base, "base", signal.SIGINT), (chat_sft, sft, "sft", signal.SIGHUP)]
)
def test_a_stop_saves_and_can_be_resumed(folder, monkeypatch, capsys, command, flags, stage, number):
    """Asked to stop amid step 3, a run saves after it, leaves with 75, and ends as an uninterrupted run."""
    run, count, place = folder / STAGES[stage].folder / "run", 0, loop.place_batch

    def stopping(batch, mesh):
        nonlocal count
        count += 1
        if count == 3:
            os.kill(os.getpid(), number)
        return place(batch, mesh)

    before = signal.signal(number, signal.SIG_DFL)  # under nohup, or in the background, it may be ignored
    wanted, handler = losses(run), signal.getsignal(number)
    monkeypatch.setattr(loop, "place_batch", stopping)
    ends(command, flags("--overwrite"), 75)
    printed = capsys.readouterr().err
    assert f"stopped by {number.name} after step 3; saved in {run / '3'}" in printed and "--resume" in printed
    assert signal.getsignal(number) == handler
    signal.signal(number, before)
    assert checkpoint.steps_in(run) == [2, 3] and [row[0] for row in losses(run)] == [1, 2, 3]
    ends(command, flags("--resume"), 0)
    assert losses(run) == wanted and checkpoint.steps_in(run)[-1] == STEPS


def test_finetuning_for_chat_keeps_the_momentum(folder, monkeypatch):
    """Base warms Muon's momentum up over 300 steps; SFT, of a few hundred, starts with all of it."""
    asked, make = [], stages.make_optimizer

    def noted(*args, **how):
        asked.append([float(how["table"]["matrix"].momentum(count)) for count in (0, 300)])
        return make(*args, **how)

    monkeypatch.setattr(stages, "make_optimizer", noted)
    base_train.stage_for(cli.parse(BaseConfig, base()))
    chat_sft.stage_for(cli.parse(SFTConfig, sft()))
    np.testing.assert_allclose(asked, [[0.85, 0.95], [0.95, 0.95]])


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_every_signal_is_noted(number):
    """SIGTERM and SIGUSR1 of schedulers, SIGINT and SIGHUP of terminals; afterwards they do what they did before."""
    before = signal.signal(number, signal.SIG_DFL)  # under nohup, or in the background, it may be ignored
    try:
        with Stop() as stop:
            assert not stop.requested()
            os.kill(os.getpid(), number)
            assert stop.requested() and stop.signal == number.name
            # The signal may come during the step before an evaluation.
            with pytest.raises(signals.Interrupted), stop.interruptible():
                raise AssertionError("an evaluation began after the signal")
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_ctrl_c_twice_and_nohup(capfd):
    """The second Ctrl-C ends the process by the system's own handler; what was ignored stays ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested() and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.requested() and stop.signal == "SIGINT" and signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGHUP, before)
        signal.signal(signal.SIGINT, ours)
    assert capfd.readouterr().err == "stopping and saving; Ctrl-C again ends at once\n"


def test_saves_by_the_clock(folder, monkeypatch, capsys):
    """It goes 10 minutes a step, so at step 3 it is time; all processes know that a step later."""
    monkeypatch.setattr(saving, "clock", itertools.count(0, 600).__next__)
    base_train.main(base("--model_tag=clock", "--save_every=-1"))
    assert checkpoint.steps_in(folder / "base_checkpoints/clock") == [4, STEPS]
    assert "<step>, every 30 minutes, and at the end" in capsys.readouterr().out


def test_an_error_saves_before_it_ends_the_run(folder, monkeypatch, capsys):
    """A row that can't be read after three steps: they are saved, and training continues when it can be."""
    next_batch, run = stages.DataBatches.next_batch, folder / "base_checkpoints/run"
    wanted = losses(run)

    def failing(self, params, step):
        if step == 3:
            raise UserError("row 95 can't be read")
        return next_batch(self, params, step)

    monkeypatch.setattr(stages.DataBatches, "next_batch", failing)
    ends(base_train, base("--overwrite", "--save_every=-1"), 2)
    out, err = capsys.readouterr()
    assert "step 3 is saved: continue from it with --resume" in out and "error: row 95 can't be read" in err
    assert checkpoint.steps_in(run) == [3] and [row[0] for row in losses(run)] == [1, 2, 3]
    monkeypatch.setattr(stages.DataBatches, "next_batch", next_batch)
    base_train.main(base("--resume", "--save_every=-1"))
    assert losses(run) == wanted


@pytest.mark.parametrize("at", [3, pytest.param(STEPS, marks=pytest.mark.slow)])
def test_an_evaluation_costs_no_step(folder, monkeypatch, capsys, at):
    """The save that is due begins before it, so it may fail; a stop breaks it off, and it is made after --resume."""
    run = folder / "base_checkpoints/run"

    def evaluate(name, values):
        evaluation = loop.Evaluation(name, at, values)
        made = loop.Loop
        monkeypatch.setattr(loop, "Loop", lambda run, others, *rest: made(run, [*others, evaluation], *rest))

    evaluate("failing", lambda params: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        base_train.main(base("--overwrite", f"--save_every={at}"))
    assert checkpoint.whole_steps(run) == [at] and (run / str(at) / seal.NAME).exists()

    def undo():
        monkeypatch.undo()
        monkeypatch.chdir(folder)
        monkeypatch.setenv("JAXCHAT_BASE_DIR", str(folder))

    undo()
    measured = []
    evaluate("failing", lambda params: measured.append(1) or {"late": 4.0})
    for _ in range(2):  # what was due when it failed happens when the run is resumed, once
        base_train.main(base("--resume", f"--save_every={at}"))
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert [row["step"] for row in rows if row.get("evaluation") == "failing"] == list(range(at, STEPS + 1, at))
    assert len(measured) == STEPS // at
    undo()
    asked = iter([True])  # to stop, once
    evaluate("second", lambda params: (next(asked, False) and os.kill(os.getpid(), signal.SIGTERM)) or {"second": 2.0})
    evaluate("first", lambda params: {"first": 1.0})
    ends(base_train, base("--overwrite", "--save_every=2"), 75)
    assert f"stopped by SIGTERM after step {at}; saved in" in capsys.readouterr().err
    if at < STEPS:
        assert checkpoint.read_meta(run, at)["metrics"] == {"first": 1.0}
    base_train.main(base("--resume", "--save_every=2"))
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    measured = [(row["evaluation"], row["step"]) for row in rows if row.get("evaluation") in ("first", "second")]
    assert measured == [(name, step) for step in range(at, STEPS + 1, at) for name in ("first", "second")]


def test_a_run_is_not_resumed_beyond_its_end(folder, monkeypatch, capsys):
    """As of an imported checkpoint, whose settings are not compared: it would never end."""
    monkeypatch.setattr(train_run, "check_same_run", lambda *_: None)
    ends(base_train, base("--resume", f"--num_iterations={STEPS - 1}"), 2)
    assert (
        f"is at step {STEPS}, but this run ends after step {STEPS - 1}; give a larger --num_it"
        in capsys.readouterr().err
    )
    assert checkpoint.steps_in(folder / "base_checkpoints/run") == [2, 4, STEPS]


def test_a_finished_sft_run_holds_weights_only(folder, capsys):
    run = folder / "chatsft_checkpoints/run"
    assert (run / "4/optimizer").is_dir() and not (run / "6/optimizer").exists()
    ends(chat_sft, sft("--resume"), 0)  # nothing is left to do
    shutil.rmtree(run / "4")
    ends(chat_sft, sft("--resume", f"--num_iterations={STEPS + 1}"), 2)
    assert "error: " in capsys.readouterr().err


def test_a_full_disk_cuts_no_line_of_metrics(tmp_path, monkeypatch):
    """What did not fit is written when there is room."""
    from jaxchat.train.metrics import MetricsLog

    log = MetricsLog(tmp_path, {}, resume_step=0, run="dummy", tensorboard=False)
    log.write(1, {"loss": 1.0})

    class Full:
        def __init__(self, file):
            self.file, self.fileno, self.close = file, file.fileno, file.close

        def write(self, content):
            return self.file.write(content[: len(content) // 2])

    file, log._file = log._file, Full(log._file)
    log.write(2, {"loss": float(np.nan)})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.0}\n'
    log._file = file
    log.write(3, {"loss": 3.0})
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, None), (3, 3.0)]
