"""Processes that find one another, and that end together: where they stand, who prints, what a lost one leads to."""

import os
import signal
import socket
import subprocess
import sys

import pytest
from conftest import ROOT, xla_flags

from jaxchat import devices, hosts
from jaxchat.config import TrainConfig, UserError
from jaxchat.hosts import RESTARTED, Place, detect
from launch import cli

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


@pytest.mark.parametrize(
    "environ, place",
    [
        ({"KUBERNETES_SERVICE_HOST": "x", "JOB_COMPLETION_INDEX": "0"}, Place("tpu")),
        # As in a container without GKE's variables: jax.distributed would find no other host, and raise.
        ({"TPU_SKIP_MDS_QUERY": "1"}, None),
        ({"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "a,b"}, Place("tpu")),
    ],
)
def test_detection_on_a_tpu(monkeypatch, environ, place):
    monkeypatch.setattr(hosts, "_has_tpu", lambda: True)
    assert detect(environ=environ) == place


GKE = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0", "JOB_COMPLETION_INDEX": "0"}


@pytest.mark.parametrize(
    "environ, metadata, first, on_cpu",
    [
        ({}, None, True, False),
        (SLURM, None, False, False),
        (SLURM | {"SLURM_PROCID": "0"}, None, True, False),
        (OMPI, None, False, False),
        (JOBSET, None, False, False),
        (JOBSET | {"JOB_COMPLETION_INDEX": "0"}, None, True, False),
        ({"KUBERNETES_SERVICE_HOST": "x", "JOB_COMPLETION_INDEX": "0"}, None, True, False),  # of how many is not known
        ({}, {"agent-worker-number": "0", "worker-network-endpoints": "a:b:c"}, True, False),
        ({}, {"agent-worker-number": "0", "worker-network-endpoints": "a:b:c,d:e:f"}, True, True),
        ({}, {"agent-worker-number": "1", "worker-network-endpoints": "a:b:c,d:e:f"}, False, True),
        ({}, {}, True, False),  # nobody answers
        (GKE, {}, True, True),
        (GKE | {"MEGASCALE_SLICE_ID": "1"}, {}, False, True),
        (GKE | {"JOB_COMPLETION_INDEX": "1"}, {}, False, True),
    ],
)
def test_the_process_of_a_command_for_one(monkeypatch, environ, metadata, first, on_cpu):
    """metadata: what Google's server knows of this host, where it has TPUs."""
    monkeypatch.setattr(hosts, "_has_tpu", lambda: metadata is not None)
    monkeypatch.setattr(hosts, "_metadata", lambda name, environ: metadata.get(name, ""))
    environ = dict(environ)
    assert hosts.is_first(environ) == first
    assert (environ.get("JAX_PLATFORMS") == "cpu") == on_cpu


@pytest.mark.parametrize(
    "environ, metadata, alone",
    [
        ({}, None, True),
        (SLURM, None, False),
        (JOBSET, None, False),
        ({}, {"worker-network-endpoints": "a:b:c"}, True),  # v5litepod-8: one host with eight chips
        ({}, {"worker-network-endpoints": "a:b:c,d:e:f"}, False),
        (GKE, {}, False),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, {}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, {}, False),
    ],
)
def test_a_tpu_host_may_be_alone(monkeypatch, environ, metadata, alone):
    """launch.speedrun, which is for one host, runs on such a one."""
    monkeypatch.setattr(hosts, "_has_tpu", lambda: metadata is not None)
    monkeypatch.setattr(hosts, "_metadata", lambda name, environ: metadata.get(name, ""))
    assert hosts.is_alone(detect(environ=environ), environ) == alone


def test_a_command_for_one_runs_in_the_first(monkeypatch, capsys):
    calls = []
    for index in "01":
        monkeypatch.setenv("JAXCHAT_PROCESS_ID", index)
        cli.main(TrainConfig, lambda config: calls.append(config), ["--seed=3"])
        assert ("in the first process only" in capsys.readouterr().err) == (index == "1")
    assert [config.seed for config in calls] == [3]
    cli.main(TrainConfig, lambda config: calls.append(config), ["--seed=4"], several=True)
    assert [config.seed for config in calls] == [3, 4]


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


def test_a_command_for_one_connects_with_nobody(monkeypatch):
    """It runs in the first of several processes, and the others have left."""
    for name, value in (JOBSET | {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JOB_COMPLETION_INDEX": "0"}).items():
        monkeypatch.setenv(name, value)
    assert hosts.is_first() and devices.start_devices(TrainConfig(), alone=True).size == 8


def together(*flags, count=2, heartbeat=HEARTBEAT):
    """Start the processes; return when all have taken a step together. heartbeat: seconds after which a silent one is
    taken for lost."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = os.environ | {"XLA_FLAGS": xla_flags(1), "PYTHONPATH": str(ROOT)}
    flags = [f"--coordinator=localhost:{port}", f"--num_processes={count}", f"--heartbeat_timeout={heartbeat}", *flags]
    command = [sys.executable, ROOT / "tests/hosts_process.py", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([*command, f"--process_id={i}"], env=env, **pipes) for i in range(count)]
    while not (line := started[0].stdout.readline()).startswith("step 0"):
        assert line.startswith("[Gloo]"), started[0].communicate()
    return started


def ended(process, within):
    """(exit code, our error lines, our lines of stdout) of a process, which must end within that many seconds."""
    out, err = process.communicate(timeout=within)
    ours = [line for line in out.splitlines() if not line.startswith("[Gloo]")]  # which prints when it has connected
    return process.returncode, [line for line in err.splitlines() if line.startswith("error: ")], ours


@pytest.mark.parametrize("what, killed", [("work", 1), pytest.param("sleep", 1, marks=pytest.mark.slow), ("sleep", 0)])
def test_a_lost_process_ends_the_others_within_the_heartbeat(what, killed):
    """Amid a sum, which fails at once, and amid work of its own, which notices nothing; process 0 has jax's service."""
    processes = together(f"--what={what}")
    processes[killed].send_signal(signal.SIGKILL)
    _, err = processes[1 - killed].communicate(timeout=15 * HEARTBEAT)  # jax's own timeout is 25 times as long
    assert processes[1 - killed].returncode == -signal.SIGABRT and 128 + signal.SIGABRT in RESTARTED
    assert "another task died" in err
    processes[killed].communicate()


@pytest.mark.slow
def test_a_process_that_fails_does_not_wait_for_the_others():
    """jax ends the other, as it does when one is lost."""
    first, second = together("--what=refuse")
    assert ended(second, within=15 * HEARTBEAT) == (2, ["error: this cannot work"], [])
    assert ended(first, within=15 * HEARTBEAT)[0] == -signal.SIGABRT


def test_processes_that_fail_alike_all_say_so():
    """With their own exit code, on which nothing is started again. Only process 0 met the error itself."""
    for process in reversed(together("--what=refuse_all")):
        assert ended(process, within=15 * HEARTBEAT)[:2] == (2, ["error: this cannot work"])


def test_sigterm_ends_a_command_that_does_not_ask():
    processes = together("--what=evaluate")
    for process in reversed(processes):
        process.send_signal(signal.SIGTERM)
        assert ended(process, within=15 * HEARTBEAT)[0] == -signal.SIGTERM


def test_all_is_well_and_process_0_alone_prints():
    processes = together("--steps=3", heartbeat=100)  # a busy machine must not make one of them a lost one
    first, second = (ended(process, within=60) for process in processes)
    assert first == (0, [], ["step 1", "step 2"]) and second == (0, [], [])
