"""Detect requests to stop: Ctrl-C, a lost terminal, a scheduler's signal, or a notice of preemption."""

import contextlib
import os
import signal
import threading

import jax
from jax.experimental import multihost_utils

# Schedulers send SIGTERM or SIGUSR1 before they take a machine away. Terminals send SIGINT for Ctrl-C and
# SIGHUP when they are closed.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


class Interrupted(BaseException):
    """Raised in Stop.interruptible by a signal to stop. `except Exception` does not catch it."""


class Stop:
    """Context manager that keeps the signals in SIGNALS from ending the process; requested() reports them.

    A second Ctrl-C ends the process at once. A signal that was ignored before (SIGHUP under nohup) stays
    ignored. With several processes, JAX's preemption service listens for SIGTERM and chooses the step after
    which all of them stop.
    """

    def __init__(self):
        self.signal = ""
        self._before = {}
        self._calls = 0
        self._interruptible = False

    @contextlib.contextmanager
    def interruptible(self):
        """Context manager in which a signal to stop raises Interrupted. An earlier signal raises it on entry.

        In a run of several processes no signal raises it, because the others would wait for this one.
        """
        self._interruptible = jax.process_count() == 1
        try:
            if self._interruptible and self.signal:
                raise Interrupted
            yield
        finally:
            self._interruptible = False

    def __enter__(self):
        if threading.current_thread() is not threading.main_thread():  # other threads get no signals
            return self
        for number in SIGNALS if jax.process_count() == 1 else SIGNALS[1:]:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number, frame):
        if number == signal.SIGINT:
            os.write(2, b"stopping and saving; Ctrl-C again ends at once\n")
            # The system's handler, since Python's would wait for native code to return.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)  # JAX's service handles it
        else:
            self.signal = signal.Signals(number).name
        if self._interruptible:
            self._interruptible = False  # raise once only
            raise Interrupted

    def requested(self) -> bool:
        """Return whether the run is to stop after this step. The answer is the same on all processes.

        All processes must call this equally often, at the same points of the run.
        """
        self._calls += 1  # not the run's step: jax wants consecutive numbers that are equal on all processes
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(self._calls):
            self.signal = "a notice of preemption"
        return bool(self.signal)

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)
