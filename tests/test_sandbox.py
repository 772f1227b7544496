"""The sandbox: right programs pass, wrong ones don't, and hostile ones change nothing outside and end in time."""

import contextlib
import ctypes
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import THOROUGH, sandbox_is_whole
from hostile import ATTACKS, LEAVERS, RUNAWAYS

from jaxchat.config import UserError
from jaxchat.eval import sandbox, sandbox_child

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(not sandbox_is_whole(), reason="this kernel has no Landlock or no seccomp")

SIGNALS = (signal.SIGUSR1, signal.SIGIO)


class Outside:
    """What a program could change or learn: files, listening sockets, our signals, our children."""

    def __init__(self, folder: Path):
        self.folder, self.signals = folder, []
        folder.mkdir()
        (folder / "kept").write_text("as it was")
        (folder / "inner").mkdir()
        (folder / "inner" / "secret").write_text("hidden")
        self.name = f"\0jaxchat-{os.getpid()}-{folder.name}"
        families = [
            (socket.AF_INET, ("127.0.0.1", 0)),
            (socket.AF_UNIX, self.name),
            (socket.AF_UNIX, f"{folder}/socket"),
        ]
        self.listening = [socket.socket(family) for family, _ in families]
        for listener, (_, address) in zip(self.listening, families, strict=True):
            listener.bind(address)
            listener.listen()
            listener.setblocking(False)
        self.datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.datagrams.bind(self.listening[0].getsockname())
        self.datagrams.setblocking(False)
        self.handlers = {number: signal.signal(number, lambda n, _: self.signals.append(n)) for number in SIGNALS}
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: whatever daemon is left becomes our child

    def close(self):
        ctypes.CDLL(None).prctl(36, 0, 0, 0, 0)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        for each in (*self.listening, self.datagrams):
            each.close()

    def program(self, attack: str) -> str:
        facts = {
            "parent": os.getpid(),
            "outside": str(self.folder),
            "port": self.listening[0].getsockname()[1],
            "name": self.name,
        }
        return "import ctypes, os, socket\n" + "".join(f"{k} = {v!r}\n" for k, v in facts.items()) + attack

    def state(self):
        """All that must stay as it is; what was sent to us is taken out of the sockets on the way."""
        files = {}
        for path in sorted(self.folder.rglob("*")):
            about = path.lstat()
            text = path.read_text() if path.is_file() else ""
            files[path] = (text, about.st_mode, about.st_uid, about.st_nlink, about.st_mtime_ns, about.st_ctime_ns)
        received = []
        for each in self.listening:
            with contextlib.suppress(BlockingIOError):
                each.accept()[0].close()
                received.append(each.getsockname())
        with contextlib.suppress(BlockingIOError):
            received.append(self.datagrams.recv(100))
        ours = os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0), resource.getrlimit(resource.RLIMIT_CORE)
        return files, received, list(self.signals), children(), *ours


def children() -> set[int]:
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == os.getpid():
            found.add(int(stat.parent.name))
    return found


@pytest.fixture
def outside(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCHAT_SECRET", "hidden")
    with contextlib.closing(Outside(tmp_path / "outside")) as made:
        yield made


RIGHT = """
import collections, decimal, hashlib, heapq, itertools, json, math, random, re, string, tempfile, threading, typing
assert hashlib.md5(b"a").hexdigest() == "0cc175b9c0f1b6a831c399e269772661"
numbers = []
threads = [threading.Thread(target=numbers.append, args=(n,)) for n in range(4)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
assert sorted(numbers) == [0, 1, 2, 3]
with open("mine", "w") as file:
    file.write("text")
import os
os.rename("mine", "own")
assert open("own").read() == "text" and os.listdir() == ["own"]
os.remove("own")
with tempfile.TemporaryFile() as file:
    file.write(b"text")
print("a line that nobody sees")
assert __name__ == "__main__"
threading.Thread(target=lambda: __import__("time").sleep(60)).start()  # left behind
"""


def test_a_right_program_passes():
    assert sandbox.run(RIGHT) == sandbox.Outcome(True, "passed")


@pytest.mark.parametrize(
    "program, reason",
    [
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("x = (", "SyntaxError: '(' was never closed (program, line 1)"),
        ("\0", "SyntaxError: source code string cannot contain null bytes"),
        ("a = [0] * 10**10", "MemoryError"),
        ("input()", "EOFError: EOF when reading a line"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("import os; os._exit(0)", "it exited before its test ended"),
        ("import ctypes; ctypes.string_at(0)", "killed by SIGSEGV"),
        ("while True: pass", "took longer than 0.5 s"),
        ("for n in range(200): open(str(n), 'w').close()\nwhile True: pass", "it had more than 100 files"),
    ],
)
def test_reasons(program, reason):
    outcome = sandbox.run(program, seconds=0.5)
    assert not outcome.passed and outcome.reason.startswith(reason)


@pytest.mark.parametrize("newest", [6, 1])
def test_hostile_programs_change_nothing_outside(outside, monkeypatch, newest):
    """An attack comes to its end only if it got what it was after, so none may pass; on Linux 5.13 (Landlock 1) too."""
    assert len(ATTACKS) + len(RUNAWAYS) + len(LEAVERS) >= 40
    monkeypatch.setattr(sandbox, "NEWEST_LANDLOCK", newest)
    before = outside.state()
    for attack in ATTACKS if newest == 6 else [attack for attack in ATTACKS if "outside}" in attack]:
        outcome = sandbox.run(outside.program(attack), seconds=5)
        assert not outcome.passed, attack
        assert outcome.reason.split(":")[0] not in ("NameError", "SyntaxError", "TypeError"), (attack, outcome)
        assert outside.state() == before, attack


@pytest.mark.parametrize("newest, refused", [(1, True), (2, True), (3, True), (1, False)])
def test_what_may_be_read_cannot_be_emptied(tmp_path, monkeypatch, newest, refused):
    """Landlock guards truncation from version 3 on; before, seccomp does it alone, as is seen where it does not."""
    library = tmp_path / "library"
    library.mkdir()
    source = Path(sandbox_child.__file__).read_text().replace('"/lib64",', f'"/lib64", {str(library)!r},')
    if not refused:
        source = source.replace("(ANY_BIT, 1, 0, os.O_TRUNC)", "(ANY_BIT, 0, 0, os.O_TRUNC)")
    (tmp_path / "child.py").write_text(source)
    monkeypatch.setattr(sandbox_child, "__file__", str(tmp_path / "child.py"))
    monkeypatch.setattr(sandbox, "NEWEST_LANDLOCK", newest)
    for flags in ("os.O_RDONLY", "3"):
        (library / "kept").write_text("as it was")
        kept = f"{str(library / 'kept')!r}"
        outcome = sandbox.run(f"import os\nassert open({kept}).read()\nos.open({kept}, {flags} | os.O_TRUNC)")
        assert outcome.passed != refused and (library / "kept").read_text() == ("as it was" if refused else "")
    assert not sandbox.run(f"open({kept}, 'w')").passed
    assert sandbox.run("import os; open('a', 'w').write('x'); os.close(os.open('a', os.O_RDWR | os.O_TRUNC))").passed


def test_threads_are_few(monkeypatch):
    """Counted from outside, and bounded by RLIMIT_NPROC, which root is exempt from."""
    bomb = next(program for program in RUNAWAYS if "stack_size" in program)
    assert sandbox.run(bomb).reason == "it had more than 64 threads"
    code = (
        "from jaxchat.eval import sandbox_child as c; import resource; c._machine_threads = lambda: 1000; c.limit(5); "
    )
    code += "print(resource.getrlimit(resource.RLIMIT_NPROC)[0])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 1000 + sandbox_child.PROCESSES


def test_the_same_attacks_succeed_without_a_sandbox(tmp_path):
    """So the test above tests something."""
    tried = [attack for attack in ATTACKS if "# not outside" not in attack]
    assert len(tried) >= 40
    for n, attack in enumerate(tried):
        with contextlib.closing(Outside(tmp_path / str(n))) as outside:
            command = [sys.executable, "-I", "-S", "-c", outside.program(attack)]
            done = subprocess.run(command, input="a line", capture_output=True, text=True, cwd=tmp_path)
            assert done.returncode == 0, (attack, done.stderr)
            assert outside.signals or "SIGUSR1" not in attack


def test_hostile_programs_end_in_time_and_do_not_pass(outside):
    def timed(program):
        began = time.monotonic()
        return sandbox.run(outside.program(program), seconds=0.5), time.monotonic() - began

    before = outside.state()
    with ThreadPoolExecutor(4) as pool:
        ended = dict(zip(RUNAWAYS + LEAVERS, pool.map(timed, RUNAWAYS + LEAVERS), strict=True))
    assert {program: outcome for program, (outcome, _) in ended.items() if outcome.passed} == {}
    # 0.5 s, Python's start, and what a busy machine adds
    assert {program: seconds for program, (_, seconds) in ended.items() if seconds > 10} == {}
    assert outside.state() == before


def test_the_program_dies_with_us(tmp_path):
    code = "from jaxchat.eval import sandbox; sandbox.run('while True: pass', seconds=60)"
    ours = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)

    def programs():
        found = [p for p in Path("/proc").glob("[0-9]*/stat") if f") R {ours.pid} " in _text(p)]
        return [p for p in found if "sandbox_child" in _text(p.parent / "cmdline")]

    end = time.monotonic() + 60
    while not programs():
        assert time.monotonic() < end
        time.sleep(0.05)
    [program] = programs()
    ours.kill()
    ours.wait()
    while "sandbox_child" in _text(program.parent / "cmdline"):
        assert time.monotonic() < end
        time.sleep(0.05)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(sandbox_child, "missing", lambda: ["Landlock (Linux 5.13 or newer, enabled)"])
    with pytest.raises(UserError, match="this kernel lacks Landlock .* leave HumanEval out"):
        sandbox.run("pass")
    monkeypatch.setattr(sandbox.platform, "system", lambda: "Darwin")
    with pytest.raises(UserError, match="this is Darwin"):
        sandbox.run("pass")


def test_what_is_missing_is_seen():
    """Within the sandbox neither part can be had, so there both must be found missing."""
    source = Path(sandbox_child.__file__).read_text().replace('if __name__ == "__main__"', "if False")
    outcome = sandbox.run(source + "assert [part.split()[0] for part in missing()] == ['Landlock', 'seccomp']\n")
    assert outcome.passed, outcome


@pytest.mark.slow
def test_humaneval(shared_data):
    """Every canonical solution passes; with its results wrapped in a list, or its body left out, none does.

    As CI has it, of every fourth problem."""
    tasks = pq.read_table(shared_data / "humaneval" / "test.parquet").to_pylist()
    assert len(tasks) == 164

    def program(task, solution, after=""):
        return f"{task['prompt']}{solution}\n{after}\n{task['test']}\ncheck({task['entry_point']})\n"

    def wrapped(task):
        name = task["entry_point"]
        return program(task, task["canonical_solution"], f"{name} = lambda *given, right={name}: [right(*given)]")

    with ThreadPoolExecutor(2) as pool:
        right = list(pool.map(sandbox.run, (program(task, task["canonical_solution"]) for task in tasks)))
        some = tasks[:: 1 if THOROUGH else 4]
        wrong = list(pool.map(sandbox.run, map(wrapped, some)))
        empty = list(pool.map(sandbox.run, (program(task, "    return None\n") for task in some)))
    assert {task["task_id"]: found.reason for task, found in zip(tasks, right, strict=True) if not found.passed} == {}
    for broken in (wrong, empty):
        assert [task["task_id"] for task, found in zip(some, broken, strict=True) if found.passed] == []
