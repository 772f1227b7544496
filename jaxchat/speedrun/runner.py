"""Run steps as subprocesses: skip those that are done, continue interrupted ones, stop at a failure."""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable

from jaxchat import files
from jaxchat.hosts import RESTARTED
from jaxchat.speedrun.state import State
from jaxchat.speedrun.steps import Step

LAST_LINES = 20  # of a failed step's output, to show
PAUSE = 1.0  # seconds before a step is restarted


class Running:
    """The subprocess of a running step. It holds the step's lock, and its output is logged.

    log: open text file. words: the command. lock: file descriptor of the lock. env: additional environment
    variables.
    """

    def __init__(self, step: Step, log, words: list[str], lock: int, env: dict):
        self.step, self.log, self.env = step, log, env
        self.began, self.last = time.monotonic(), deque(maxlen=LAST_LINES)
        # In a session of its own, the subprocess gets Ctrl-C once: from the Runner, not also from a terminal.
        self.process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[lock],  # the subprocess keeps the lock if this process is killed
            env=os.environ | env,
        )
        os.pwrite(lock, f"{self.process.pid}\n".encode(), 0)
        os.close(lock)

    def follow(self, show: Callable[[str], None]) -> int:
        """Log and show the output. Return the step's exit code, or 128 + n if signal n ended the step."""
        reader = threading.Thread(target=self.read, args=[show], daemon=True)
        reader.start()
        code = self.process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # subprocesses that it left behind
        reader.join()
        return code if code >= 0 else 128 - code

    def read(self, show: Callable[[str], None]):
        with self.process.stdout as output:
            for raw in output:
                line = raw.decode(errors="replace").rstrip("\n")
                self.last.append(line)
                with contextlib.suppress(OSError):  # on a full disk, the step reports the error
                    self.log.write(line + "\n")
                    self.log.flush()
                if not line.startswith("next: "):  # launch.speedrun prints the next command itself
                    show(line)


class Runner:
    """Run steps as subprocesses, each as soon as its inputs exist. Downloads run beside the other steps.

    restarts: maximum number of restarts per step. places: dicts of environment variables. Each step that uses
    the devices takes one of them while it runs. At most len(places) such steps run at the same time.
    """

    def __init__(self, steps: list[Step], state: State, *, restarts: int, places: tuple[dict, ...] = ({},)):
        self.steps, self.state, self.restarts = steps, state, restarts
        self.free = {"devices": list(places), "network": [{}]}
        self.parallel = len(places)
        self.waiting, self.running = list(steps), {}
        self.tries = dict.fromkeys((step.name for step in steps), 0)
        self.done: dict[str, float] = {}  # {name: seconds that the step took in all starts}
        self.events: queue.SimpleQueue = queue.SimpleQueue()
        self.stopped = self.failed = 0  # number of the signal to stop; exit code of the failed step
        self.on_progress = lambda changed: None  # changed: a step has started or ended

    def run(self) -> int:
        """Run all steps. Return 0, 75 if a signal stopped the run, or the exit code of the failed step."""
        with handle_signals(self.stop):
            try:
                self.start_ready()
                while self.running:
                    self.wait()
                    self.start_ready()
            except BaseException:  # such as changed inputs: the other running steps must save and end
                self.failed = 1
                self.send(signal.SIGTERM)
                while self.running:
                    self.wait()
                raise
        return os.EX_TEMPFAIL if self.stopped else self.failed

    def wait(self):
        """Wait up to half a second for a step to end. If one ends, record its time and exit code."""
        try:
            name, code = self.events.get(timeout=0.5)
        except queue.Empty:
            return self.on_progress(False)
        self.ended(self.running.pop(name), code)

    def start_ready(self):
        """Start the waiting steps whose inputs exist and whose devices or network are free.

        A step that is done is skipped.
        """
        for step in list(self.waiting):
            if self.stopped or self.failed:
                return
            ahead = self.waiting[: self.waiting.index(step)]
            ahead = [*ahead, *(running.step for running in self.running.values())]
            blocked = {artifact for other in ahead for artifact in other.makes} & set(step.needs)
            if blocked or not self.free[step.lane]:
                continue
            why = self.state.why_to_do(step)
            self.waiting.remove(step)
            if why is None:
                self.done[step.name] = self.state.record(step.name).get("seconds", 0.0)
            else:
                self.start(step)
            self.on_progress(True)

    def start(self, step: Step):
        lock = self.claim(step)
        if self.stopped:
            return None if lock is None else os.close(lock)
        self.state.begin(step)
        words = [*step.argv, *(["--resume"] if step.resumes else [])]
        log = self.state.path(step.name, "log").open("a", encoding="utf-8")
        log.write(f"$ {' '.join(words)}\n")
        show(f"step {step.name}: {step.shown}")
        self.running[step.name] = running = Running(step, log, words, lock, self.free[step.lane].pop(0))
        if self.stopped:  # the signal came while it started
            running.process.send_signal(signal.SIGTERM)
        threading.Thread(target=self.follow, args=[running], daemon=True).start()

    def claim(self, step: Step) -> int | None:
        """Lock a step and return the file descriptor of the lock, or None if a signal to stop comes first.

        If a process of an earlier, killed run still holds the lock, send it SIGTERM and wait until it ends.
        """
        asked = ""
        while not self.stopped:
            try:
                return files.lock(self.state.path(step.name, "lock"), "")
            except files.Held as other:
                if (pid := str(other)).isdigit() and pid != asked:
                    asked = pid
                    show(f"step {step.name}: waiting for process {pid} of an earlier run to save and end")
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGTERM)
                time.sleep(0.05)
        return None

    def follow(self, running: Running):
        prefix = f"[{running.step.name}] " if self.parallel > 1 or running.step.lane == "network" else ""
        code = running.follow(lambda line: show(prefix + line))
        self.events.put((running.step.name, code))

    def ended(self, running: Running, code: int):
        """Record a step's time and exit code. After a failure, restart the step or end the run."""
        step, seconds = running.step, time.monotonic() - running.began
        running.log.close()
        lacking = [] if code else [made.title for made in step.makes if not made.found()]
        if lacking:
            code = 1
            show(f"step {step.name} ended with exit code 0, but {lacking[0]} is missing")
        self.state.end(step, seconds, code)
        self.free[step.lane].append(running.env)
        if not code:
            self.done[step.name] = self.state.record(step.name)["seconds"]
        elif self.stopped or self.failed:
            pass
        elif code in RESTARTED and self.tries[step.name] < self.restarts:
            self.tries[step.name] += 1
            left = self.restarts - self.tries[step.name]
            show(f"step {step.name} ended with exit code {code}: starting again, {left} restarts left")
            time.sleep(PAUSE)
            self.waiting.insert(0, step)
        else:
            self.failed = code
            lines = "\n".join(f"  | {line}" for line in running.last)
            show(f"step {step.name} failed with exit code {code}; its last lines:\n{lines}")
            show(f"its complete output is in {self.state.path(step.name, 'log')}")
            self.send(signal.SIGTERM)
        self.on_progress(True)

    def send(self, number: int):
        for running in list(self.running.values()):
            running.process.send_signal(number)  # does nothing if the process has ended

    def stop(self, number: int):
        """Send signal `number` to the running steps, and start no more steps."""
        self.stopped = number
        self.send(number)


@contextlib.contextmanager
def handle_signals(on_signal: Callable[[int], None]):
    """Call on_signal(number) after each SIGTERM, SIGUSR1, SIGINT or SIGHUP while the context is open.

    number: SIGINT after SIGINT, or SIGTERM after any of the others. Signals that were ignored before stay
    ignored. Outside the main thread, the context has no effect.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread can set handlers
        yield
        return

    def handler(number, frame):
        on_signal(number if number == signal.SIGINT else signal.SIGTERM)

    numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP]  # the same ones stop trainers
    numbers = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


def show(line: str):
    print(line, flush=True)


def python(module: str, *flags: str) -> tuple[str, ...]:
    """Return a command, as a tuple of words, that runs a module with this Python interpreter."""
    return (sys.executable, "-m", module, *flags)
