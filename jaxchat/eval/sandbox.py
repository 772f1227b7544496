"""Run an untrusted Python program, such as one that a model wrote, without harm to the machine.

Each program gets a Python process of its own, with no environment, no arguments, an empty stdin and no open
files of ours, in a new temporary folder. Before the program begins, sandbox_child.py restricts that process:

- Files, by Landlock: it reads Python's own files and the system's libraries, and writes plain files in its
  folder only.
- Everything else, by seccomp: a short list of system calls. So no network, no other processes, no signals.
- Limits: CPU and wall time, memory, threads, size and number of files, open files. Its output is dropped.

Neither needs root, a container or namespaces, and threads are bound too. If this process ends, the kernel
kills the program. Where the kernel lacks one of the two (`missing`), `run` refuses.

A program passes by running to its end. One that exits early (sys.exit, os._exit, a crash) does not pass. One
written to cheat can, because it shares its process with its test: this guards the machine, not the score.
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
THREADS = 64
STARTING = 30.0  # seconds for Python itself, on a machine that is busy
GLANCE = 0.02  # seconds between looks at the folder and the threads
NEWEST_LANDLOCK = 6  # the newest version to use; tests lower it


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a program ended: whether it ran to its end, and if not, why, such as "AssertionError: 1"."""

    passed: bool
    reason: str


def missing() -> list[str]:
    """Parts of the sandbox that this machine's kernel lacks; [] if none. UserError: not on Linux."""
    if platform.system() != "Linux":
        needs, remedy = "needs Linux (Landlock, seccomp)", "evaluate on Linux, or leave HumanEval out"
        raise UserError(f"the sandbox {needs}, and this is {platform.system()}; {remedy}")
    return sandbox_child.missing()


def check():
    """Raise UserError where programs can't be run: no Linux, or the kernel lacks a part of the sandbox."""
    if lacks := missing():
        raise UserError(
            f"this kernel lacks {' and '.join(lacks)}, which the sandbox for programs that a model wrote "
            "needs; use a newer kernel, or leave HumanEval out"
        )


def run(program: str, *, seconds: float = 5.0) -> Outcome:
    """Run a Python program for at most `seconds` of wall time and of CPU time; several threads may do so."""
    check()
    arguments = [str(math.ceil(seconds)), str(NEWEST_LANDLOCK)]
    nonce = secrets.token_hex(16).encode()  # the child alone knows it, and returns it after the program's end
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
            os.killpg(child.pid, signal.SIGKILL)  # it has not been waited for, so the id is still its own
            child.wait()
            child.stdout.close()
    if not answer.startswith(b"+"):  # written before the program begins, so it cannot withhold it
        raise RuntimeError(f"the sandbox could not be set up: {answer.decode(errors='replace') or problem}")
    if answer == b"+" + nonce:
        return Outcome(True, "passed")
    return Outcome(False, problem or answer[1:].decode(errors="replace") or "it ended before its test did")


def _watch(child: subprocess.Popen, folder: Path, seconds: float) -> tuple[bytes, str]:
    """Wait until the child has answered, ended or broken a limit: (its answer, what else went wrong)."""
    answer, end = b"", time.monotonic() + STARTING
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while time.monotonic() < end:
            if selector.select(GLANCE):
                piece = os.read(child.stdout.fileno(), 1000)
                if not answer:  # it begins
                    end = time.monotonic() + seconds
                answer += piece
                if not piece or len(answer) > 1000:
                    return answer, _ending(child)
            if _threads_of(child) > THREADS:
                return answer, f"its threads were more than {THREADS}"
            if _holds_too_much(folder):
                return answer, f"its files were more than {FOLDER_FILES} or larger than {FOLDER_SIZE:,} bytes"
    return answer, f"took longer than {seconds:g} s"


def _ending(child: subprocess.Popen) -> str:
    """Describe the signal that the child died by, if one. It is not reaped, so that its id stays its own."""
    for _ in range(20):  # its pipe closes a moment before it is dead; a program can close it and live on
        died = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if died:
            break
        time.sleep(0.01)
    if died is None or died.si_code == os.CLD_EXITED:
        return ""
    if died.si_status == signal.SIGXCPU:
        return "took more CPU time than it has"
    return f"killed by {signal.Signals(died.si_status).name}"


def _threads_of(child: subprocess.Popen) -> int:
    """Number of threads of a child; 0 once it has ended. (RLIMIT_NPROC does not bind root.)"""
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
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                size += entry.stat(follow_symlinks=False).st_blocks * 512
    return size > FOLDER_SIZE
