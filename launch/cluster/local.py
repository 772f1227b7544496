"""Several processes on this machine that train together: to try, on one machine, what a run on several will do."""

import dataclasses
import shlex
import signal
import socket
import subprocess
import time

from launch.cluster.common import RESTARTED, check_at_least


@dataclasses.dataclass(frozen=True)
class Config:
    """Run the command in several processes on this machine. JAX_COORDINATOR_ADDRESS, JAXCHAT_NUM_PROCESSES and
    JAXCHAT_PROCESS_ID in its environment tell each its place. The first one prints; the others tell only errors.

    SIGTERM and Ctrl-C are passed on. All have --grace seconds to end then, and the others have as many after one has
    failed; what still runs is killed. A run that was told to end (exit code 75), lost a peer (76) or was killed (137)
    is started again, up to --restarts times, unless it was this launcher that was told to end. The exit code is that of
    the process that ended first, of those that failed. Processes have this environment, secrets included.
    """

    processes: int = 2
    """How many."""
    gpus_per_process: int = 0
    """Give every process so many GPUs of its own; 0: all that are there, or none."""
    restarts: int = 0
    """How often at most to start again."""
    grace: float = 120.0
    """Seconds to end in, when told to or after another has failed; more than the trainers' --heartbeat_timeout."""
    dry_run: bool = False
    """Only print the commands."""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def commands(config: Config, command: list[str], port: int) -> list[list[str]]:
    """What each process runs."""
    lines = []
    for index in range(config.processes):
        place = [f"JAX_COORDINATOR_ADDRESS=localhost:{port}", f"JAXCHAT_NUM_PROCESSES={config.processes}"]
        place += [f"JAXCHAT_PROCESS_ID={index}"]
        if each := config.gpus_per_process:
            place += ["CUDA_VISIBLE_DEVICES=" + ",".join(map(str, range(index * each, (index + 1) * each)))]
        lines.append(["env", *place, *command])
    return lines


class Told:
    """Passes SIGTERM, SIGINT and (as SIGTERM) SIGHUP on to the processes; `at_all`: whether one came."""

    def __init__(self):
        self.at_all, self.processes = False, []

    def __enter__(self):
        heard = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # which nohup sets
            heard.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._pass_on) for number in heard}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _pass_on(self, number, frame):
        self.at_all = True
        self.send(signal.SIGTERM if number == signal.SIGHUP else number)

    def send(self, number: int):
        for process in self.processes:
            process.send_signal(number)  # does nothing where it has ended


def run_once(config: Config, command: list[str], told: Told) -> int:
    """-> the exit code of the process that failed first, as a shell tells it; 0 if all went well."""
    told.processes, ended = [], set()
    failed, deadline = 0, None
    try:
        for line in commands(config, command, free_port()):
            told.processes.append(subprocess.Popen(line, start_new_session=True))
        if told.at_all:  # while they were started, some were not among the processes yet
            told.send(signal.SIGTERM)
        while len(ended) < len(told.processes):
            for index, process in enumerate(told.processes):
                if index in ended or process.poll() is None:
                    continue
                ended.add(index)
                if process.returncode and not failed:
                    failed = process.returncode if process.returncode > 0 else 128 - process.returncode
                    deadline = deadline or time.monotonic() + config.grace
                    if len(ended) < len(told.processes):
                        print(f"process {index} ended with exit code {failed}; waiting for the others", flush=True)
            if told.at_all:
                deadline = deadline or time.monotonic() + config.grace
            if deadline and time.monotonic() > deadline:
                return failed or 128 + signal.SIGKILL
            time.sleep(0.1)
    finally:
        for process in told.processes:
            process.kill()
            process.wait()
    return failed


def run(config: Config, command: list[str]):
    check_at_least(config, processes=1, gpus_per_process=0, restarts=0, grace=0)
    if config.dry_run:
        for line in commands(config, command, free_port()):
            print(shlex.join(line))
        return 0
    code = 128 + signal.SIGTERM
    with Told() as told:
        for left in reversed(range(config.restarts + 1)):
            if told.at_all:
                return code
            code = run_once(config, command, told)
            if code not in RESTARTED or told.at_all or not left:
                return code
            print(f"exit code {code}: starting again, at most {left} times more", flush=True)
