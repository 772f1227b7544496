"""Run several processes of one training run on this machine, to rehearse a run on several hosts."""

import contextlib
import dataclasses
import itertools
import os
import shlex
import signal
import socket
import subprocess
import time
from pathlib import Path

from jaxchat.config import Flags, UserError, counted, flag
from jaxchat.hosts import RESTARTED
from jaxchat.speedrun.runner import handle_signals


@dataclasses.dataclass(frozen=True)
class Config(Flags):
    """Run the command in several processes on this machine. They find one another by the environment
    variables JAX_COORDINATOR_ADDRESS, JAXCHAT_NUM_PROCESSES and JAXCHAT_PROCESS_ID. Process 0 prints its
    progress. The other processes print only errors. All inherit this environment, including secrets.

    SIGTERM and Ctrl-C are passed on to the processes. After a signal, or when a process fails, the processes
    have --grace seconds to end before they are killed. After exit code 75 (stopped and saved), 76 (processes
    cannot reach one another), 134 (another process was lost) or 137 (killed), all are restarted, up to
    --restarts times. After a signal to this launcher, none is restarted. The launcher's exit code is that of
    the first process that failed.
    """

    processes: int = flag(2, 1)
    """Number of processes."""
    gpus_per_process: int = flag(-1, -1)
    """Number of GPUs per process; -1: an equal share of all GPUs; 0: each process sees all GPUs."""
    restarts: int = flag(0, 0)
    """Maximum number of restarts after exit code 75, 76, 134 or 137."""
    grace: float = flag(120.0, 0)
    """Seconds that the processes have to end after a signal or a failure, before they are killed. Set it
    above the command's --heartbeat_timeout, which is 100 by default."""
    dry_run: bool = False
    """Only print the commands."""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def visible_gpus() -> list[str]:
    """Return the GPUs that subprocesses can use, as names or indices for CUDA_VISIBLE_DEVICES."""
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return list(itertools.takewhile(lambda name: name not in ("", "-1"), given.split(",")))
    return [str(index) for index, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]


def shares(gpus: list[str], count: int, flag: str) -> list[dict[str, str]]:
    """Divide `gpus` equally among `count` programs. Return the environment variables of each program.

    Without GPUs, each program gets {}. Raises UserError if there are fewer GPUs than programs. flag: name of
    the flag that sets `count`, for the error message.
    """
    each = len(gpus) // count
    if gpus and not each:
        raise UserError(f"--{flag}={count} is more than the {counted(len(gpus), 'GPU')} here")
    parts = [",".join(gpus[i * each : (i + 1) * each]) for i in range(count)]
    return [{"CUDA_VISIBLE_DEVICES": part} if part else {} for part in parts]


def commands(config: Config, command: list[str], port: int) -> list[list[str]]:
    """Return a command for each process: the program env, NAME=value words, and the words of `command`."""
    gpus, wanted = visible_gpus(), config.gpus_per_process * config.processes
    if wanted > len(gpus) > 0 and not config.dry_run:
        product = f"--gpus_per_process={config.gpus_per_process} × --processes={config.processes}"
        raise UserError(f"{product} is more than the {counted(len(gpus), 'GPU')} here; lower one of them")
    # There may be fewer GPUs here: a dry run may be for another machine, and WSL does not list its GPUs.
    if wanted >= 0:
        gpus = gpus[:wanted] if len(gpus) >= wanted else list(map(str, range(wanted)))
    lines = []
    for index, share in enumerate(shares(gpus, config.processes, "processes")):
        place = [f"JAX_COORDINATOR_ADDRESS=localhost:{port}", f"JAXCHAT_NUM_PROCESSES={config.processes}"]
        place += [f"JAXCHAT_PROCESS_ID={index}", *(f"{name}={value}" for name, value in share.items())]
        lines.append(["env", *place, *command])
    return lines


def run_once(config: Config, command: list[str], signals: list[int]) -> int:
    """Run all processes until they end. Return 0, or the exit code (as in a shell) of the first that failed.

    If none failed but some were killed after --grace, return 137. signals: signals to pass on to the
    processes. The caller may append to this list during the call.
    """
    processes, ended = [], set()
    failed, deadline, sent = 0, None, 0
    try:
        for line in commands(config, command, free_port()):
            processes.append(subprocess.Popen(line, start_new_session=True))
        while len(ended) < len(processes):
            while sent < len(signals):
                for process in processes:
                    process.send_signal(signals[sent])  # does nothing if it has ended
                sent += 1
            for index, process in enumerate(processes):
                if index in ended or process.poll() is None:
                    continue
                ended.add(index)
                if process.returncode and not failed:
                    failed = process.returncode if process.returncode > 0 else 128 - process.returncode
                    deadline = deadline or time.monotonic() + config.grace
                    if len(ended) < len(processes):
                        outcome = f"process {index} ended with exit code {failed}"
                        print(f"{outcome}; waiting for the others to end", flush=True)
            if signals:
                deadline = deadline or time.monotonic() + config.grace
            if deadline and time.monotonic() > deadline:
                return failed or 128 + signal.SIGKILL
            time.sleep(0.1)
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with its tokenizing workers
            process.wait()
    return failed


def run(config: Config, command: list[str]):
    if config.dry_run:
        for line in commands(config, command, free_port()):
            print(shlex.join(line))
        return 0
    code, signals = 128 + signal.SIGTERM, []
    with handle_signals(signals.append):
        for left in reversed(range(config.restarts + 1)):
            if signals:
                return code
            code = run_once(config, command, signals)
            if code not in RESTARTED or signals or not left:
                return code
            print(f"exit code {code}: starting again, {left} restarts left", flush=True)
