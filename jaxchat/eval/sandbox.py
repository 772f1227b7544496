"""Run an untrusted Python program, such as one that a model wrote, without harm to the machine.

Each program runs in a new Python process and a new temporary folder, with no environment, no arguments, an
empty stdin and none of jaxchat's open files. Its output is discarded. Before the program starts,
sandbox_child.py restricts it:

- Files, by Landlock: the program can read only Python's own files and the system's libraries, and can write
  plain files only in its folder.
- System calls, by seccomp: a short list is allowed. It excludes the network, other processes and signals.
- Limits: CPU and wall time, memory, threads, size and number of files, open files.

Landlock and seccomp need no root, containers or namespaces. If the kernel lacks them, `run` raises
UserError. If the parent process ends, the kernel kills the program.

A program passes if it runs to its end. A program that exits early (sys.exit, os._exit, a crash) fails. A
program written to cheat can pass, because it runs in the same process as its test: the sandbox protects the
machine, not the score.
"""

import contextlib
import dataclasses
import math
import os
import platform
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jaxchat.config import UserError
from jaxchat.eval import sandbox_child

FOLDER_SIZE, FOLDER_FILES = 64 * 2**20, 100
THREADS = 64  # counted here, since RLIMIT_NPROC exempts root
STARTING = 30.0  # seconds that Python may take to start, on a busy machine
GLANCE = 0.02  # seconds between checks of the folder and the threads
NEWEST_LANDLOCK = 6  # newest Landlock version to use; tests lower it


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Whether a program ran to its end (`passed`), and if not, the `reason`, such as "AssertionError: 1"."""

    passed: bool
    reason: str


def missing() -> list[str]:
    """Return the kernel features that this machine lacks for the sandbox; raise UserError if not on Linux."""
    if platform.system() != "Linux":
        needs, remedy = "needs Linux (Landlock, seccomp)", "evaluate on Linux, or leave HumanEval out"
        raise UserError(f"the sandbox {needs}, and this is {platform.system()}; {remedy}")
    return sandbox_child.missing()


def check():
    """Raise UserError if the sandbox cannot run on this machine."""
    if lacks := missing():
        raise UserError(
            f"this kernel lacks {' and '.join(lacks)}, which the sandbox for programs that a model wrote "
            "needs; use a newer kernel, or leave HumanEval out"
        )


def run(program: str, *, seconds: float = 5.0) -> Outcome:
    """Run a Python program in the sandbox, for at most `seconds` of wall time and CPU time. Thread-safe."""
    check()
    arguments = [str(math.ceil(seconds)), str(NEWEST_LANDLOCK)]
    nonce = secrets.token_hex(16).encode()  # known only to the child, which sends it after the program's end
    with tempfile.TemporaryDirectory(prefix="jaxchat-", ignore_cleanup_errors=True) as folder:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-X", "utf8", sandbox_child.__file__, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
            bufsize=0,
        )
        try:
            with contextlib.suppress(BrokenPipeError), child.stdin as stdin:
                stdin.write(nonce + b"\n" + program.encode(errors="replace"))
            answer, problem = _watch(child, Path(folder), seconds)
        finally:
            os.killpg(child.pid, signal.SIGKILL)  # it has not been waited for, so its id is not reused
            child.wait()
            child.stdout.close()
    if not answer.startswith(b"+"):  # the child sends "+" before the program begins
        raise RuntimeError(f"the sandbox could not be set up: {answer.decode(errors='replace') or problem}")
    if answer == b"+" + nonce:
        return Outcome(True, "passed")
    return Outcome(False, problem or answer[1:].decode(errors="replace") or "it exited before its test ended")


def _watch(child: subprocess.Popen, folder: Path, seconds: float) -> tuple[bytes, str]:
    """Wait until the child closes its output or exceeds a limit; return (output, reason of failure or "")."""
    answer, end = b"", time.monotonic() + STARTING
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while time.monotonic() < end:
            if selector.select(GLANCE):
                piece = os.read(child.stdout.fileno(), 1000)
                if not answer:  # the program begins
                    end = time.monotonic() + seconds
                answer += piece
                if not piece or len(answer) > 1000:
                    return answer, _ending(child)
            if _threads_of(child) > THREADS:
                return answer, f"it had more than {THREADS} threads"
            if _holds_too_much(folder):
                return answer, f"it had more than {FOLDER_FILES} files or {FOLDER_SIZE:,} bytes in files"
    return answer, f"took longer than {seconds:g} s"


def _ending(child: subprocess.Popen) -> str:
    """Describe the signal that killed the child, or return "" if none did. The child is not reaped."""
    for _ in range(20):  # the pipe closes shortly before the child ends; a program can close it and continue
        died = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if died:
            break
        time.sleep(0.01)
    if died is None or died.si_code == os.CLD_EXITED:
        return ""
    if died.si_status == signal.SIGXCPU:
        return "exceeded its limit of CPU time"
    return f"killed by {signal.Signals(died.si_status).name}"


def _threads_of(child: subprocess.Popen) -> int:
    try:
        return len(os.listdir(f"/proc/{child.pid}/task"))
    except OSError:
        return 0


def _holds_too_much(folder: Path) -> bool:
    size = 0
    with os.scandir(folder) as entries:
        for count, entry in enumerate(entries):
            if count == FOLDER_FILES:
                return True
            with contextlib.suppress(FileNotFoundError):  # deleted since it was listed
                size += entry.stat(follow_symlinks=False).st_blocks * 512
    return size > FOLDER_SIZE
