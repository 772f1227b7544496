"""Processes that find one another, and that end together: where they stand, who prints, what a lost one leads to."""

import os
import signal
import socket
import subprocess
import sys
import time
import types

import jax
import pytest
from conftest import ROOT, xla_flags
from jax._src.clusters import cloud_tpu_cluster

from jaxchat import hosts
from jaxchat.config import TrainConfig, UserError
from jaxchat.hosts import Place, detect

SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-4]", "SLURM_NTASKS": "4", "SLURM_PROCID": "3"}
SLURM |= {"SLURM_LOCALID": "0", "SLURM_STEP_NUM_NODES": "4"}
OMPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
JOBSET = {"JAX_COORDINATOR_ADDRESS": "a-0:1", "JAXCHAT_NUM_PROCESSES": "8", "JOB_COMPLETION_INDEX": "5"}
HEARTBEAT = 4


@pytest.mark.parametrize(
    "environ, place",
    [
        ({}, None),
        (SLURM, Place("slurm", None, 4, 3)),
        (SLURM | {"SLURM_STEP_NUM_NODES": "1"}, Place("slurm", None, 4, 3, alone_on_host=False)),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        ({name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"}, None),  # sbatch without srun
        (OMPI, Place("ompi", None, 2, 1)),
        (OMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, Place("ompi", None, 2, 1, alone_on_host=False)),
        (OMPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        (JOBSET, Place("environment", "a-0:1", 8, 5)),
        (JOBSET | {"JAXCHAT_PROCESS_ID": "6"}, Place("environment", "a-0:1", 8, 6)),
        (JOBSET | {"JAXCHAT_NUM_PROCESSES": "1"}, None),
        ({"KUBERNETES_SERVICE_HOST": "x"}, None),  # a pod that is no part of an indexed Job
    ],
)
def test_detection(environ, place):
    assert detect(environ=environ) == place


def test_detection_on_a_tpu(monkeypatch):
    monkeypatch.setattr(hosts.cloud_tpu_init, "running_in_cloud_tpu_vm", True)
    assert detect(environ={"KUBERNETES_SERVICE_HOST": "x", "JOB_COMPLETION_INDEX": "0"}) == Place("tpu")


@pytest.mark.parametrize("named, place", [({}, None), ({"TPU_WORKER_HOSTNAMES": "a,b"}, Place("tpu"))])
def test_a_tpu_host_whose_slice_nobody_tells_is_alone(monkeypatch, named, place):
    """As in a container without GKE's variables: jax.distributed would find no coordinator, and raise."""
    monkeypatch.setattr(hosts.cloud_tpu_init, "running_in_cloud_tpu_vm", True)
    assert detect(environ={"TPU_SKIP_MDS_QUERY": "1"} | named) == place
    for name, value in ({"TPU_SKIP_MDS_QUERY": "1"} | named).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    clusters = (cloud_tpu_cluster.GkeTpuCluster, cloud_tpu_cluster.GceTpuCluster)
    assert any(cluster.is_env_present() for cluster in clusters) == (place is not None)  # as jax sees it


def test_flags_come_first():
    assert detect("h:1", 2, 0, environ={}) == Place("flags", "h:1", 2, 0)
    assert detect("h:1", environ=OMPI) == Place("ompi", "h:1", 2, 1)
    assert detect("h:1", 2, 0, environ=SLURM) == Place("slurm", "h:1", 2, 0)


@pytest.mark.parametrize(
    "flags, environ, words",
    [
        (("h:1",), {}, "--num_processes is missing"),
        (("", 2), {}, "--coordinator is missing"),
        (("h:1", 2), {}, "--process_id is missing"),
        (("", 0, 0), {}, "--coordinator is missing"),
        (("h", 2, 0), {}, "HOST:PORT"),
        (("h:1", 2, 2), {}, "--process_id=2 is not from 0 to 1"),
        (("h:1", 2, -2), {}, "--process_id=-2 is not from 0 to 1"),
        (("h:1", -2, 0), {}, "is not from 0"),
        ((), {"JAXCHAT_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS"),
        ((), {"KUBERNETES_SERVICE_HOST": "x", "JOB_COMPLETION_INDEX": "0"}, "JAXCHAT_NUM_PROCESSES"),
    ],
)
def test_half_of_it_is_refused(flags, environ, words):
    with pytest.raises(UserError, match=words):
        detect(*flags, environ=environ)


def test_a_command_refuses_before_it_connects():
    with pytest.raises(UserError, match="--process_id is missing"):
        hosts.start(TrainConfig(coordinator="localhost:1", num_processes=2))
    with pytest.raises(UserError, match="--heartbeat_timeout=1"):
        TrainConfig(heartbeat_timeout=1)


def together(*flags, count=2):
    """Start the processes; return when all have taken a step together."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = os.environ | {"XLA_FLAGS": xla_flags(1), "PYTHONPATH": str(ROOT)}
    flags = [f"--coordinator=localhost:{port}", f"--num_processes={count}", f"--heartbeat_timeout={HEARTBEAT}", *flags]
    command = [sys.executable, ROOT / "tests/hosts_process.py", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([*command, f"--process_id={i}"], env=env, **pipes) for i in range(count)]
    while not (line := started[0].stdout.readline()).startswith("step 0"):
        assert line.startswith("[Gloo]"), started[0].communicate()
    return started


def ended(process, within):
    """(exit code, the error lines that are ours, stdout) of a process that ends in so many seconds."""
    out, err = process.communicate(timeout=within)
    return process.returncode, [line for line in err.splitlines() if line.startswith("error: ")], out


@pytest.mark.parametrize("what, killed", [("work", 1), pytest.param("sleep", 1, marks=pytest.mark.slow), ("sleep", 0)])
def test_a_lost_process_ends_the_others_within_the_heartbeat(what, killed):
    """Amid a sum, which fails at once, and amid work of its own, which knows nothing; process 0 has jax's store."""
    processes = together(f"--what={what}")
    processes[killed].send_signal(signal.SIGKILL)
    begun = time.monotonic()
    code, lines, _ = ended(processes[1 - killed], within=HEARTBEAT + 20)
    # Process 0, the others' store, stays for two beats of a tenth each, for them to read; the rest is the machine's.
    assert time.monotonic() - begun < 1.2 * HEARTBEAT + 1
    assert code == hosts.LOST == 76
    (line,) = lines
    assert line.startswith(f"error: process {killed} is lost") and "--resume" in line
    processes[killed].communicate()


def test_a_process_that_fails_ends_the_others_with_its_code():
    processes = together("--what=refuse")
    begun = time.monotonic()
    first, second = (ended(process, within=HEARTBEAT + 20) for process in processes)
    assert first[:2] == (2, ["error: process 1 failed with exit code 2"])
    assert second == (2, ["error: this cannot work"], "") and time.monotonic() - begun < HEARTBEAT


def test_a_process_that_fails_ends_where_nobody_can_be_told(monkeypatch):
    class Client:
        def key_value_set(self, key, what, allow_overwrite):
            if what.startswith("failed"):
                raise jax.errors.JaxRuntimeError("UNAVAILABLE")

        def key_value_dir_get(self, key):
            return []

    codes = []
    monkeypatch.setattr(hosts, "global_state", types.SimpleNamespace(client=Client(), process_id=1, num_processes=2))
    monkeypatch.setattr(hosts, "_end", lambda code, why="": codes.append(code))
    hosts._Watch(timeout=100).failed(3)
    assert codes == [3]


def test_sigterm_ends_a_command_that_does_not_ask():
    processes = together("--what=evaluate")
    for process in reversed(processes):
        process.send_signal(signal.SIGTERM)
        assert ended(process, within=HEARTBEAT)[0] == -signal.SIGTERM


def test_all_is_well_and_process_0_alone_prints():
    first, second = (ended(process, within=60) for process in together("--steps=3"))
    assert first == (0, [], "step 1\nstep 2\n") and second == (0, [], "")
