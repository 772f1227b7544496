"""Being asked to stop: SIGTERM, SIGUSR1, or a notice of preemption."""

import os
import signal
import threading

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # schedulers send one or the other before they take a machine away


class Stop:
    """A context in which these signals don't end the process but are told by `asked`.

    Where several processes run, jax's own service listens for SIGTERM, and agrees on the step at which all stop.
    """

    def __init__(self):
        self.signal = ""
        self._before = {}
        self._asked = 0

    def __enter__(self):
        if threading.current_thread() is not threading.main_thread():  # signals are the main thread's alone
            return self
        for number in SIGNALS if jax.process_count() == 1 else SIGNALS[1:]:
            self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number, frame):
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)  # to jax's service
        else:
            self.signal = signal.Signals(number).name

    def asked(self) -> bool:
        """Whether to stop now; the same on all processes, which all must ask at every step."""
        self._asked += 1  # counts alike on all; jax wants every number in turn, and a resumed run begins late
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(self._asked):
            self.signal = "a notice of preemption"
        return bool(self.signal)

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)
