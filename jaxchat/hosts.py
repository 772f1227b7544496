"""Several processes that train together: finding one another, process 0 alone printing, and ending together.

jax.distributed connects them, and ends every process with SIGABRT and a page of C++ when one is lost. Here they end
with one line and an exit code that the launchers start again on: each tells the others that it lives, counting in the
store that all of them share, and one that falls silent for --heartbeat_timeout is lost.
"""

import atexit
import ctypes
import dataclasses
import importlib.util
import itertools
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import contextmanager, suppress

import jax
from jax._src import cloud_tpu_init  # there is no public way to ask whether this is a TPU VM, nor
from jax._src.distributed import global_state  # to the store

from jaxchat.config import TrainConfig, UserError

LOST = 76  # exit code: a peer was lost; start again with --resume
TOGETHER = (0, 75)  # exit codes that all processes have agreed on, which nobody need be told
STORE = "jaxchat/processes/"
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process stands among others. What is None, jax finds out by itself."""

    found_by: str  # flags, environment, slurm, ompi, kubernetes or tpu
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    alone_on_host: bool = True  # it takes all the devices of its host; jax would give it one under Slurm and Open MPI


def detect(coordinator: str = "", num_processes: int = 0, process_id: int = -1, environ=os.environ) -> Place | None:
    """This process's place, by flags (which come first), or by what a launcher has set in `environ`; None: it is alone.

    UserError: only a part is known, or it does not fit.
    """
    found = _by_environment(environ)
    if not coordinator and num_processes == 0 and process_id == -1:
        return found
    flags = {
        "coordinator": coordinator or None,
        "num_processes": num_processes or None,
        "process_id": process_id if process_id != -1 else None,
    }
    given = {name: value for name, value in flags.items() if value is not None}
    own = dataclasses.replace(found or Place("flags"), **given)
    if missing := [f"--{name}" for name in flags if getattr(own, name) is None]:
        raise UserError(f"--coordinator, --num_processes and --process_id go together; {missing[0]} is missing")
    if not own.coordinator.rpartition(":")[0] or not own.coordinator.rpartition(":")[2].isdigit():
        raise UserError(f"--coordinator={own.coordinator}; it is process 0's HOST:PORT")
    if not 0 <= own.process_id < own.num_processes:
        raise UserError(f"--process_id={own.process_id} is not from 0 to {own.num_processes - 1}")
    return own


def _by_environment(environ) -> Place | None:
    address, count = environ.get("JAX_COORDINATOR_ADDRESS"), environ.get("JAXCHAT_NUM_PROCESSES")
    index = environ.get("JAXCHAT_PROCESS_ID", environ.get("JOB_COMPLETION_INDEX"))
    if count is not None:
        if int(count) == 1:
            return None
        if address is None or index is None:
            raise UserError("JAXCHAT_NUM_PROCESSES needs JAX_COORDINATOR_ADDRESS and JAXCHAT_PROCESS_ID beside it")
        return Place("environment", address, int(count), int(index))
    if all(name in environ for name in SLURM):
        tasks, hosts = int(environ["SLURM_NTASKS"]), int(environ.get("SLURM_STEP_NUM_NODES", "1"))
        found = Place("slurm", None, tasks, int(environ["SLURM_PROCID"]), alone_on_host=tasks == hosts)
        return found if tasks > 1 else None
    if int(environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        alone = environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
        rank = int(environ["OMPI_COMM_WORLD_RANK"])
        return Place("ompi", None, int(environ["OMPI_COMM_WORLD_SIZE"]), rank, alone_on_host=alone)
    if cloud_tpu_init.running_in_cloud_tpu_vm and _tpu_hosts_are_told(environ):
        return Place("tpu")
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        if importlib.util.find_spec("kubernetes") is None:
            raise UserError(
                "this is a pod of an indexed Job, of how many is not known: set JAX_COORDINATOR_ADDRESS (pod 0's "
                "HOST:PORT) and JAXCHAT_NUM_PROCESSES (1: it is alone), or pip install kubernetes"
            )
        return Place("kubernetes")
    return None


def _tpu_hosts_are_told(environ) -> bool:
    """Whether jax can find a TPU slice's hosts: by these variables, as on GKE, or by asking Google's metadata server,
    unless it is told not to. Else it would raise; such a host (a plain container, say) is alone."""
    named = ("TPU_PROCESS_ADDRESSES_PATH", "TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
    return "TPU_SKIP_MDS_QUERY" not in environ or any(name in environ for name in named)


def start(config: TrainConfig, *, asks: bool = True):
    """Connect with the other processes, if there are any. To be called before the first use of a device.

    From then on, only process 0 prints to stdout; a lost process ends all with exit code 76 and a line on stderr.
    asks: whether the command asks at every step if it is to stop (train.signals), as training does. Then SIGTERM is
    only noted; where nobody asks, it ends the process.
    """
    place = detect(config.coordinator, config.num_processes, config.process_id)
    if place is None or jax.distributed.is_initialized():
        return
    if place.found_by == "ompi" and not place.coordinator and "OMPI_MCA_orte_hnp_uri" not in os.environ:
        raise UserError("Open MPI 5 does not tell where process 0 is: give --coordinator=HOST:PORT")
    method = "deactivate" if place.coordinator else place.found_by if place.found_by in ("slurm", "ompi") else None
    own_device = not place.alone_on_host and bool(place.coordinator)
    local = os.environ.get("SLURM_LOCALID", os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK"))
    _watch_aborts(place)
    if not asks:  # jax's service would catch SIGTERM, and keep it to itself
        jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        place.coordinator,
        place.num_processes,
        place.process_id,
        local_device_ids=[int(local)] if own_device and local else None,
        cluster_detection_method=method,
        heartbeat_timeout_seconds=2 * config.heartbeat_timeout,  # ours comes first, with its one line
    )
    if place.alone_on_host and method in ("slurm", "ompi"):
        jax.config.update("jax_cuda_visible_devices", "all")
        jax.config.update("jax_rocm_visible_devices", "all")
    if global_state.num_processes == 1:
        return
    if global_state.process_id:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    _Watch.running = _Watch(config.heartbeat_timeout)


class _Watch(threading.Thread):
    """Tells the other processes that this one lives, sees that they do, and ends this one when one doesn't."""

    running: "_Watch | None" = None

    def __init__(self, timeout: float):
        super().__init__(daemon=True, name="watch")
        self._client, self._me = global_state.client, global_state.process_id
        self._timeout, self.period = timeout, min(5.0, timeout / 10)
        self._stopped = threading.Event()
        self._seen = {index: ("", time.monotonic()) for index in range(global_state.num_processes)}
        self.start()
        atexit.register(self.done)  # comes before jax's own, which waits for the others

    def tell(self, what: str):
        self._client.key_value_set(f"{STORE}{self._me}", what, allow_overwrite=True)

    def run(self):
        try:
            for beat in itertools.count():
                self.tell(f"beat {beat}")
                self._look(dict(self._client.key_value_dir_get(STORE)))
                if self._stopped.wait(self.period):
                    return
        except jax.errors.JaxRuntimeError:
            if not self._stopped.is_set():
                self._end(LOST, "process 0 is lost: it has ended, or cannot be reached")

    def _look(self, values: dict[str, str]):
        now = time.monotonic()
        for name, value in values.items():
            index = int(name.rpartition("/")[2])
            if value != self._seen[index][0]:
                self._seen[index] = (value, now)
        for index, (value, since) in self._seen.items():
            what, _, rest = value.partition(" ")
            if index == self._me or what == "done":
                continue
            if what == "failed":
                code, _, why = rest.partition(" ")
                self._end(int(code), why)
            # What is seen now may be a period old, and is looked at a period later.
            elif now - since > self._timeout - 2 * self.period:
                self._end(LOST, f"process {index} is lost: it gave no sign of life for {self._timeout:g} seconds")

    def _end(self, code: int, why: str):
        if self._me == 0:  # the store is here, and goes with this process: the others shall read first
            self.tell(f"failed {code} {why}")
            time.sleep(2 * self.period)
        _end(code, why)

    def done(self):
        """All went well: the others need not miss this process while they do the same."""
        self._stopped.set()
        self.join()
        with suppress(jax.errors.JaxRuntimeError):  # process 0 may have left already
            self.tell("done")

    def failed(self, code: int):
        """Tell the others, and end at once: jax would wait for them, and they wait for this process."""
        self._stopped.set()
        self.join()
        with suppress(jax.errors.JaxRuntimeError):  # process 0 may be gone: this one shall end even so
            self.tell(f"failed {code} process {self._me} failed with exit code {code}")
        if self._me == 0:
            time.sleep(2 * self.period)
        _end(code)

    def wait(self):
        """Give the watch the time to find out whether a peer is lost; it then ends this process."""
        time.sleep(self._timeout + self.period)


def _end(code: int, why: str = ""):
    hint = "; start again with --resume" if code == LOST else ""
    if why:
        os.write(2, f"error: {why}{hint}\n".encode())
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


@contextmanager
def together():
    """Around a command: a process that fails tells the others, and all end, with its exit code.

    An error of the runtime may come of a lost peer: then that is told, after at most --heartbeat_timeout.
    """
    try:
        yield
    except BaseException as problem:
        watch = _Watch.running
        code = problem.code if isinstance(problem, SystemExit) else 1
        if watch is None or code in (None, *TOGETHER):
            raise
        if _of_the_runtime(problem):
            watch.wait()
        if not isinstance(problem, SystemExit):
            traceback.print_exc()
        sys.stderr.flush()
        sys.stdout.flush()
        watch.failed(code)


def _of_the_runtime(problem: BaseException | None) -> bool:
    """Whether an error, or one that it came of, is XLA's: a JaxRuntimeError, or one that begins with a status."""
    while problem:
        if isinstance(problem, jax.errors.JaxRuntimeError) or re.match("[A-Z_]+: ", str(problem)):
            return True
        problem = problem.__cause__ or problem.__context__
    return False


def _watch_aborts(place: Place):
    """Where process 0 is gone, jax aborts at once, before our watch can tell: turn that into our line and exit code.

    Any other abort stays one. Python's own handlers would not run: abort() does not come back to the interpreter.
    """

    def aborted(number):
        host, _, port = (global_state.coordinator_address or place.coordinator or "").rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=3).close()
        except (OSError, ValueError):
            _end(LOST, "process 0 is lost: it has ended, or cannot be reached")

    global _handler  # C holds only its address
    _handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)
    install = ctypes.CDLL(None).signal
    install.argtypes, install.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    install(signal.SIGABRT, ctypes.cast(_handler, ctypes.c_void_p))
