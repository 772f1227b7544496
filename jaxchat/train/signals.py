"""Notice requests to stop: Ctrl-C, a lost terminal, a scheduler's signal, or a notice of preemption."""

import contextlib
import os
import signal
import threading

import jax
from jax.experimental import multihost_utils

# Schedulers send SIGTERM or SIGUSR1 before they take a machine away, terminals SIGINT (Ctrl-C) and SIGHUP
# (closed).
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


class BrokenOff(BaseException):
    """Raised in Stop.breaks_off by a signal to stop, new or earlier. `except Exception` does not catch it."""


class Stop:
    """A context in which the signals in SIGNALS don't end the process; asked() says if one has arrived.

    A second Ctrl-C ends the process at once. A signal that is ignored at the start (SIGHUP under nohup) stays
    ignored. With several processes, JAX's preemption service listens for SIGTERM and chooses the step at
    which all processes stop.
    """

    def __init__(self):
        self.signal = ""
        self._before = {}
        self._asked = 0
        self._breaks_off = False

    @contextlib.contextmanager
    def breaks_off(self):
        """Context manager that raises BrokenOff if a signal arrives in the context, or on entry if one has.

        With several processes it has no effect, because the others would wait for this one.
        """
        self._breaks_off = jax.process_count() == 1
        try:
            if self._breaks_off and self.signal:
                raise BrokenOff
            yield
        finally:
            self._breaks_off = False

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
        if self._breaks_off:
            self._breaks_off = False  # raise once only
            raise BrokenOff

    def asked(self) -> bool:
        """Return whether the run is to stop after this step: the same answer on all processes.

        All processes must call this equally often, at the same points of the run.
        """
        self._asked += 1  # not the run's step: jax wants consecutive numbers that are equal on all processes
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(self._asked):
            self.signal = "a notice of preemption"
        return bool(self.signal)

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)
