"""Generation by two processes of two devices each: all get what one device says."""

import json
import os
import socket
import subprocess
import sys

import generate_process
import pytest
from conftest import ROOT, xla_flags


@pytest.mark.slow
def test_processes_share_the_rows():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = os.environ | {"XLA_FLAGS": xla_flags(2)}
    env["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    command = [sys.executable, ROOT / "tests/generate_process.py", str(port), "2"]
    running = [
        subprocess.Popen([*command, str(index)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for index in range(2)
    ]
    ended = [process.communicate(timeout=600) for process in running]
    assert [process.returncode for process in running] == [0, 0], ended
    want = generate_process.generate()
    assert len({one["finish"] for one in want}) == 2
    for out, _ in ended:
        assert json.loads(out.splitlines()[-1]) == want
