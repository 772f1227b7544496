"""launch.cluster local: the processes it starts, how it tells how they ended, and what it does about it."""

import os
import re
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from jaxchat.config import UserError
from jaxchat.hosts import Place, detect
from launch.cluster import local as launcher


def local(*flags, shell, hangup=signal.SIG_DFL, **kwargs):
    """The launcher itself, as a process; the command is bash. hangup: how it takes SIGHUP."""
    command = [sys.executable, "-m", "launch.cluster", "local", *flags, "--", "bash", "-c", shell]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    # As in a terminal, though the tests may run under nohup or in the background, where SIGHUP and SIGINT are ignored.
    # (A preexec_fn would fork, which JAX warns of.)
    how = {signal.SIGHUP: hangup, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in how.items()}
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env, **kwargs)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


PLACE = '"$JAX_COORDINATOR_ADDRESS" $JAXCHAT_NUM_PROCESSES $JAXCHAT_PROCESS_ID $CUDA_VISIBLE_DEVICES'


def test_local_gives_each_process_its_number_and_its_gpus():
    out, _ = local("--processes=3", "--gpus_per_process=2", shell=f"echo {PLACE}").communicate()
    lines = sorted(out.splitlines(), key=lambda line: line.split()[2])
    port = re.match(r"localhost:(\d+) ", lines[0])[1]
    assert lines == [f"localhost:{port} 3 {i} {2 * i},{2 * i + 1}" for i in range(3)]
    env = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAXCHAT_NUM_PROCESSES": "3", "JAXCHAT_PROCESS_ID": "1"}
    assert detect(environ=env) == Place("environment", f"localhost:{port}", 3, 1)


def test_local_divides_the_gpus_there_are(monkeypatch):
    def seen(gpus, **flags):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
        lines = launcher.commands(launcher.Config(**flags), ["x"], 1)
        return [word.partition("=")[2] for line in lines for word in line if word.startswith("CUDA_VISIBLE")]

    assert seen("0,1,2,3") == ["0,1", "2,3"] and seen("4,GPU-a,7", processes=3) == ["4", "GPU-a", "7"]
    assert seen("0,1,2,3", processes=3) == ["0", "1", "2"] and seen("") == [] and seen("0,1", gpus_per_process=0) == []
    assert seen("5,6", gpus_per_process=1) == ["5", "6"] and seen("", gpus_per_process=2) == ["0,1", "2,3"]
    assert seen("5", gpus_per_process=2, dry_run=True) == ["0,1", "2,3"]
    with pytest.raises(UserError, match="--gpus_per_process=2 × --processes=2 is more than the 1 GPU here"):
        seen("5", gpus_per_process=2)
    with pytest.raises(UserError, match="--processes=3 is more than the 2 GPUs"):
        seen("0,1", processes=3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert all(gpu.isdigit() for gpu in launcher.visible_gpus())


def test_local_shows_what_it_would_run(capsys):
    launcher.run(launcher.Config(gpus_per_process=1, dry_run=True), ["echo", "a b"])
    lines = capsys.readouterr().out.splitlines()
    for index, line in enumerate(lines):
        told = f" JAXCHAT_NUM_PROCESSES=2 JAXCHAT_PROCESS_ID={index} CUDA_VISIBLE_DEVICES={index} echo 'a b'"
        assert re.sub(r"^env JAX_COORDINATOR_ADDRESS=localhost:\d+", "", line) == told
    assert len(lines) == 2


@pytest.mark.parametrize(
    "first, code, turns",
    [("exit 75", 75, 3), ("exit 1", 1, 1), ("kill -KILL $$", 137, 3), ("kill -ABRT $$", 134, 3), ("exit 0", 0, 1)],
)
def test_local_starts_again(tmp_path, first, code, turns):
    """Process 1 fails at once; process 0 ends with 134 when 1 is gone: the first to fail gives the exit code."""
    shell = f"""
        echo turn; cd {tmp_path}; pid=pid-${{JAX_COORDINATOR_ADDRESS#*:}}
        if [ $JAXCHAT_PROCESS_ID = 1 ]; then echo $$ > $pid.new; mv $pid.new $pid; {first}; fi
        while [ ! -e $pid ] || kill -0 $(cat $pid) 2> {os.devnull}; do sleep 0.01; done
        exit {134 if code else 0}"""
    process = local("--restarts=2", shell=shell)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == code and out.splitlines().count("turn") == 2 * turns


def test_local_kills_what_does_not_end():
    process = local("--grace=0.5", shell="if [ $JAXCHAT_PROCESS_ID = 1 ]; then exit 2; fi; sleep 600 & wait")
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 2 and "process 1 ended with exit code 2" in out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_local_passes_signals_on_and_then_starts_nothing(number):
    shell = "trap 'echo told; exit 75' TERM INT; echo up; while :; do sleep 0.05; done"
    process = local("--restarts=5", shell=shell)
    for _ in range(2):
        assert process.stdout.readline() == "up\n"
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 75 and out.splitlines().count("told") == 2 and "up" not in out


def test_local_under_nohup_goes_on():
    process = local(shell="echo up; read; echo down", stdin=subprocess.PIPE, hangup=signal.SIG_IGN)
    for _ in range(2):
        assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGHUP)
    out, _ = process.communicate("go\ngo\n", timeout=30)
    assert process.returncode == 0 and out == "down\ndown\n"


def test_local_kills_what_does_not_heed_a_signal():
    process = local("--restarts=5", "--grace=0.5", shell="trap '' TERM; echo up; while :; do sleep 0.05; done")
    for _ in range(2):
        assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30) == ("", None) and process.returncode == 137


def test_local_hears_a_signal_while_it_starts_processes(monkeypatch):
    started, popen = [], subprocess.Popen

    def start(*args, **kwargs):
        started.append(popen(*args, **kwargs))
        if len(started) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return started[-1]

    monkeypatch.setattr(launcher.subprocess, "Popen", start)
    assert launcher.run(launcher.Config(restarts=5), ["sleep", "600"]) == 128 + signal.SIGTERM
    assert [process.returncode for process in started] == [-signal.SIGTERM] * 2


def test_local_hears_a_signal_between_two_turns(monkeypatch):
    turns = []
    monkeypatch.setattr(launcher, "run_once", lambda *_: turns.append(1) or 75)
    monkeypatch.setattr(launcher, "print", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM), raising=False)
    assert launcher.run(launcher.Config(restarts=5), ["true"]) == 75 and turns == [1]
