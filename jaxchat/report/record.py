"""Record each start of a trainer for the report, as a line of runs.jsonl beside the checkpoints."""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from pathlib import Path

import jax

from jaxchat import files, sharding
from jaxchat.train.loop import Run

FILE = "runs.jsonl"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tiktoken")


def begin() -> dict:
    """Return the start time, machine, versions and commit as a dict. Wall time is measured from this call."""
    return {
        "began": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "clock": time.monotonic(),
        "machine": machine(),
        "versions": versions(),
        "git": git_state(),
    }


@contextlib.contextmanager
def recorded(run: Run, began: dict, plan: list[tuple[str, str]]):
    """Append a record of the run to runs.jsonl when the `with` block ends, even by an exception.

    began: the result of `begin`. plan: the (name, value) lines that the trainer printed.
    A dry run writes no record.
    """
    ended = "done"
    try:
        yield
    except BaseException as problem:
        ended = type(problem).__name__
        raise
    finally:
        if run.checkpoints and jax.process_index() == 0:
            append(run, began, plan, ended)


def append(run: Run, began: dict, plan: list[tuple[str, str]], ended: str) -> None:
    flags, defaults = dataclasses.asdict(run.stage.flags), dataclasses.asdict(type(run.stage.flags)())
    facts = {name: value for name, value in began.items() if name != "clock"} | {
        "seconds": time.monotonic() - began["clock"],
        "ended": ended,
        "steps": [run.first_step, *run.checkpoints.steps()[-1:]],
        "devices": sharding.describe(run.stage.model.mesh),
        "flags": {name: value for name, value in flags.items() if value != defaults[name]},
        "plan": plan,
    }
    with contextlib.suppress(OSError):  # a record that cannot be written must not fail the run
        files.append_line(run.checkpoints.folder / FILE, facts)


def machine() -> str:
    """Describe the system, processors and memory: "Linux x86_64, 2 × AMD EPYC, 23 GiB"."""
    cpuinfo, text = Path("/proc/cpuinfo"), ""
    if cpuinfo.exists():
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    named = re.search(r"^model name\s*: (.*)$", text, re.M)
    model = named[1].strip() if named else platform.processor() or platform.machine()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} × {model}, {memory:.0f} GiB"


def versions() -> str:
    """List the versions of Python and of packages for training: "Python 3.11.7, jax 0.10.2, …"."""
    found = []
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join([f"Python {platform.python_version()}", *found])


def git_state() -> str:
    """Return commit, branch and number of changed files of jaxchat's Git checkout; "" if there is none."""
    root = Path(__file__).resolve().parents[2]

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *args],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=True,
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root:  # another project's checkout contains jaxchat
            return ""
        changed = len(git("status", "--porcelain").splitlines())
        branch = git("rev-parse", "--abbrev-ref", "HEAD")
        more = f", {changed} files changed" if changed else ""
        return f"{git('rev-parse', '--short=12', 'HEAD')} on {branch}{more}"
    except (OSError, subprocess.CalledProcessError):
        return ""
