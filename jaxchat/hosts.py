"""Runs of several processes: connect them, print from the first only, and end them together.

If a process is lost, jax.distributed ends the others by SIGABRT (exit code 134) within --heartbeat_timeout
and prints which one was lost. Launchers restart runs that end with this code.
"""

import dataclasses
import importlib.util
import multiprocessing
import os
import re
import resource
import sys
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

from jaxchat.config import MeshFlags, UserError

TOGETHER = (None, 0, 75)  # exit codes that all processes have agreed on
UNREACHABLE = 76  # exit code: the processes cannot reach one another, though none is lost
# Exit codes after which every launcher restarts a run, with --resume. 75: it was stopped and has saved. 134:
# jax ended the process because another one was lost. 137: it was killed (preempted, or out of memory).
RESTARTED = (75, UNREACHABLE, 134, 137)
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
TPU_HOSTS = {"TPU_PROCESS_ADDRESSES_PATH", "TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"}  # set on GKE
METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"

_connected: tuple[int, int] | None = None  # (process index, --heartbeat_timeout) if there are several


@dataclasses.dataclass(frozen=True)
class Place:
    """How this process joins a run. jax detects the values that are None."""

    found_by: str  # flags, environment, slurm, ompi, kubernetes or tpu
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    alone_on_host: bool = True  # it uses all devices; under Slurm and Open MPI jax would give it only one


def detect(
    coordinator: str = "", num_processes: int = 0, process_id: int = -1, environ=os.environ
) -> Place | None:
    """Return how this process joins a run of several processes, or None if it is the only one.

    coordinator, num_processes, process_id: values of the flags. Those not given are taken from the
        environment of Slurm, Open MPI, Kubernetes or a TPU host.
    Raises UserError if a value is missing, or if values contradict each other.
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
        raise UserError(
            f"--coordinator, --num_processes and --process_id must be given together; {missing[0]} is missing"
        )
    if not own.coordinator.rpartition(":")[0] or not own.coordinator.rpartition(":")[2].isdigit():
        raise UserError(f"--coordinator={own.coordinator}; it must be the HOST:PORT of process 0")
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
            raise UserError(
                "JAXCHAT_NUM_PROCESSES needs JAX_COORDINATOR_ADDRESS and JAXCHAT_PROCESS_ID to be set too"
            )
        return Place("environment", address, int(count), int(index))
    if all(name in environ for name in SLURM):
        tasks, hosts = int(environ["SLURM_NTASKS"]), int(environ.get("SLURM_STEP_NUM_NODES", "1"))
        found = Place("slurm", None, tasks, int(environ["SLURM_PROCID"]), alone_on_host=tasks == hosts)
        return found if tasks > 1 else None
    if int(environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        alone = environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
        rank = int(environ["OMPI_COMM_WORLD_RANK"])
        return Place("ompi", None, int(environ["OMPI_COMM_WORLD_SIZE"]), rank, alone_on_host=alone)
    if _has_tpu() and ("TPU_SKIP_MDS_QUERY" not in environ or TPU_HOSTS & environ.keys()):
        return Place("tpu")  # else, as in a plain container, jax would find no other hosts, and raise
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        if importlib.util.find_spec("kubernetes") is None:
            raise UserError(
                "this is a pod of an indexed Job with an unknown number of pods: set JAX_COORDINATOR_ADDRESS "
                "(HOST:PORT of pod 0) and JAXCHAT_NUM_PROCESSES (1: only this pod), or pip install kubernetes"
            )
        return Place("kubernetes")
    return None


def _has_tpu() -> bool:
    devices = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    return bool(devices) and importlib.util.find_spec("libtpu") is not None


def is_first(environ=os.environ) -> bool:
    """Return whether this process is the first that a launcher started.

    Used by commands that run only in the first process. On a TPU slice with several hosts, also set
    JAX_PLATFORMS=cpu, unless it has a value, because libtpu would wait for all hosts.
    """
    on_tpu = _has_tpu()
    index = environ.get("JAXCHAT_PROCESS_ID", environ.get("JOB_COMPLETION_INDEX"))
    if index is None:
        place = detect(environ=environ)
        index = place.process_id if place else None
    if index is None and on_tpu:
        index = environ.get("TPU_WORKER_ID") or _metadata("agent-worker-number", environ)
    if on_tpu and _several_tpu_hosts(environ):
        environ.setdefault("JAX_PLATFORMS", "cpu")
    return int(index or 0) == int(environ.get("MEGASCALE_SLICE_ID", 0)) == 0


def is_alone(place: Place | None, environ=os.environ) -> bool:
    """Return whether this process is the only one of its run. place: the result of `detect`."""
    if place is None or place.found_by != "tpu":
        return place is None
    return int(environ.get("MEGASCALE_NUM_SLICES", 1)) == 1 and not _several_tpu_hosts(environ)


def _several_tpu_hosts(environ) -> bool:
    return "," in (environ.get("TPU_WORKER_HOSTNAMES") or _metadata("worker-network-endpoints", environ))


def _metadata(name: str, environ) -> str:
    """Return an attribute of this TPU host from Google's metadata server; "" if there is no server."""
    if "TPU_SKIP_MDS_QUERY" in environ:
        return ""
    import urllib.request  # here, since few commands need it

    request = urllib.request.Request(METADATA + name, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read().decode().strip()
    except OSError:
        return ""


def start(config: MeshFlags, *, asks: bool = True):
    """Connect to the other processes of the run, if any, before the first use of a device.

    Afterwards only process 0 prints to stdout.
    asks: whether the command asks after every step if it must stop (train.signals). If so, and if there are
        several processes, jax records SIGTERM for the command, and the process does not end.
    """
    import jax

    place = detect(config.coordinator, config.num_processes, config.process_id)
    if place is None or jax.distributed.is_initialized():
        return
    if place.found_by == "ompi" and not place.coordinator and "OMPI_MCA_orte_hnp_uri" not in os.environ:
        raise UserError("Open MPI 5 does not give the address of process 0: give --coordinator=HOST:PORT")
    method = place.found_by if place.found_by in ("slurm", "ompi") else None
    method = "deactivate" if place.coordinator else method
    own_device = not place.alone_on_host and bool(place.coordinator)
    local = os.environ.get("SLURM_LOCALID", os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK"))
    if not asks:  # jax's preemption service would catch SIGTERM, so that it had no effect
        jax.config.update("jax_enable_preemption_service", False)
    # Write no core file when jax ends the process by SIGABRT.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.num_processes,
            place.process_id,
            local_device_ids=[int(local)] if own_device and local else None,
            cluster_detection_method=method,
            heartbeat_timeout_seconds=config.heartbeat_timeout,
        )
    except ValueError as problem:
        remedy = "name them with --coordinator, --num_processes and --process_id"
        raise UserError(f"the other processes cannot be found ({problem}); {remedy}") from problem
    except RuntimeError as problem:  # timeout, for example since some still run the previous command
        print(f"error: not all processes have connected: {problem}", file=sys.stderr, flush=True)
        raise SystemExit(UNREACHABLE) from None
    if place.alone_on_host and method in ("slurm", "ompi"):
        jax.config.update("jax_cuda_visible_devices", "all")
        jax.config.update("jax_rocm_visible_devices", "all")
    if place.process_id is None:  # jax has detected it
        place = dataclasses.replace(place, num_processes=jax.process_count(), process_id=jax.process_index())
    if place.num_processes == 1:
        return
    if place.process_id:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    global _connected
    _connected = (place.process_id, config.heartbeat_timeout)


@contextmanager
def together():
    """Context manager in which a process that fails exits without waiting for the other processes.

    The others notice the exit within --heartbeat_timeout. After a network error, this process first waits for
    1.5 times as long. If another process was lost, jax ends this one during the wait. Otherwise this one
    exits with code UNREACHABLE.
    """
    try:
        yield
    except BaseException as problem:
        code = problem.code if isinstance(problem, SystemExit) else 1
        if not _connected or code in TOGETHER:
            raise
        process, timeout = _connected
        if not isinstance(problem, SystemExit):
            traceback.print_exc()
        sys.stderr.flush()
        sys.stdout.flush()
        if _may_be_others_fault(problem):
            time.sleep(1.5 * timeout)
            code = UNREACHABLE
        elif process == 0:  # it serves all connections: first let others print the same error and exit
            time.sleep(min(10, timeout / 10))
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(code)


def _may_be_others_fault(problem: BaseException | None) -> bool:
    """Return whether an error, or one of its causes, may mean that another process is unreachable."""
    unreachable = "(ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION|INTERNAL|UNAVAILABLE|UNKNOWN): "
    while problem and not re.match(unreachable, str(problem)):
        problem = problem.__cause__ or problem.__context__
    return problem is not None
