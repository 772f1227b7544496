"""launch.cluster local: the processes it starts, how it tells how they ended, and what it does about it."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT


def local(*flags, shell, **kwargs):
    """The launcher itself, as a process; the command is bash, to which the flags it adds are $1, $2 and $3."""
    command = [sys.executable, "-m", "launch.cluster", "local", *flags, "--", "bash", "-c", shell, "bash"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env, **kwargs)


def test_local_gives_each_process_its_number_and_its_gpus():
    out, _ = local("--processes=3", "--gpus_per_process=2", shell='echo "$@" $CUDA_VISIBLE_DEVICES').communicate()
    lines = sorted(out.splitlines(), key=lambda line: line.split()[2])
    port = re.match(r"--coordinator=localhost:(\d+) ", lines[0])[1]
    assert lines == [
        f"--coordinator=localhost:{port} --num_processes=3 --process_id={i} {2 * i},{2 * i + 1}" for i in range(3)
    ]


@pytest.mark.parametrize(
    "first, code, turns",
    [("exit 75", 75, 3), ("exit 1", 1, 1), ("kill -KILL $$", 137, 3), ("exit 0", 0, 1)],
)
def test_local_starts_again(first, code, turns):
    """Process 1 fails at once, process 0 notices and ends with 76: the first to fail tells how it ended."""
    shell = f"echo turn; if [ $3 = --process_id=1 ]; then {first}; fi; sleep 0.3; exit {76 if code else 0}"
    process = local("--restarts=2", shell=shell)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == code and out.splitlines().count("turn") == 2 * turns


def test_local_kills_what_does_not_end():
    begun = time.monotonic()
    process = local("--grace=0.5", shell="if [ $3 = --process_id=1 ]; then exit 2; fi; exec sleep 60")
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 2 and "process 1 ended with exit code 2" in out and time.monotonic() - begun < 20


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_local_passes_signals_on_and_then_starts_nothing(number):
    shell = "trap 'echo told; exit 75' TERM INT; echo up; while :; do sleep 0.05; done"
    process = local("--restarts=5", shell=shell)
    for _ in range(2):
        assert process.stdout.readline() == "up\n"
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 75 and out.splitlines().count("told") == 2 and "up" not in out
