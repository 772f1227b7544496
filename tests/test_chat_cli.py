"""The terminal's conversation: room for answers, editing lines, one-line errors."""

import os
import pty
import select
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from launch.chat_cli import Conversation


def test_room_is_kept_for_an_answer():
    talk = Conversation(bos=0, context=32, max_tokens=10)
    assert talk.ask([1] * 9) == 0
    for token in range(2, 10):
        talk.add(token)
    assert talk.tokens == [0, *[1] * 9, *range(2, 10)]
    assert talk.ask([5] * 4) == 0 and len(talk.tokens) == 22 == talk.prompt_limit  # it just fits
    talk.add(6)
    assert talk.ask([7] * 17) == 2 and talk.tokens == [0, *[7] * 17]  # all that is older leaves
    assert Conversation(bos=0, context=32, max_tokens=1000).prompt_limit == 16
    talk.clear()
    assert talk.tokens == [0]


EDITOR = """
import sys
from launch import chat_cli
chat_cli.edit_lines()
print("ready", flush=True)
while True:
    print(repr(input("you: ")), flush=True)
"""


def test_lines_are_edited_recalled_and_of_any_length(home):
    """In a real terminal: an arrow key, a paste beyond the terminal's own 4,095 bytes, the line before."""
    pytest.importorskip("readline")
    parent, child = pty.openpty()
    env = os.environ | {"TERM": "xterm", "INPUTRC": os.devnull}
    process = subprocess.Popen(
        [sys.executable, "-c", EDITOR], cwd=ROOT, env=env, stdin=child, stdout=child, stderr=child
    )
    os.close(child)
    seen = b""

    def until(wanted: bytes):
        nonlocal seen
        end = time.monotonic() + 60
        while wanted not in seen and time.monotonic() < end:
            if select.select([parent], [], [], 1)[0]:
                seen += os.read(parent, 2**16)
        assert wanted in seen, seen[-500:]
        seen = b""

    try:
        until(b"you: ")
        os.write(parent, b"hllo\x1b[D\x1b[D\x1b[De\r")
        until(b"'hello'")
        for _ in range(9):
            os.write(parent, b"x" * 1000)  # slowly: the terminal's own buffer has an end
            time.sleep(0.02)
        os.write(parent, b"\r")
        until(b"'" + b"x" * 9000 + b"'")
        os.write(parent, b"\x1b[A\x1b[A!\r")
        until(b"'hello!'")
    finally:
        process.kill()
        process.wait()
        os.close(parent)


LEAVER = """
import os, signal
from launch import chat_cli
signal.signal(signal.SIGINT, chat_cli.leave)
try:
    os.kill(os.getpid(), signal.SIGINT)
    print("went on")
except BaseException:
    print("swallowed")
"""


def test_ctrl_c_while_it_starts_cannot_be_swallowed(home):
    done = subprocess.run([sys.executable, "-c", LEAVER], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_a_device_that_is_not_there_is_one_line(home):
    env = os.environ | {"JAX_PLATFORMS": "cuda", "JAXCHAT_BASE_DIR": str(home)}
    command = [sys.executable, "-m", "launch.chat_cli", "-p", "hi"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert done.returncode == 2 and len(lines) == 1 and "JAX_PLATFORMS=cuda: no such device" in lines[0]
    assert "Traceback" not in done.stderr
