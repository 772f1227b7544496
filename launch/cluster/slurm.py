"""Submit a Slurm batch job that runs one process per node, on all GPUs of the node."""

import dataclasses
import shlex
from pathlib import Path

from jaxchat.config import Flags, UserError, flag
from jaxchat.hosts import RESTARTED
from launch.cluster.common import secret_names, submit


@dataclasses.dataclass(frozen=True)
class Config(Flags):
    """Write <job_name>.sbatch to the current folder and submit it. Each node runs one process, which uses all
    GPUs that the job has on the node. The processes find one another by themselves.

    The job runs in the current folder and inherits this environment, including secrets, which are written to
    no file. Two minutes before the time limit, and when the job is preempted, the run saves and ends, and the
    job is requeued. Give trainers --resume, so that they continue. JAXCHAT_BASE_DIR must be on a disk that
    all nodes share.
    """

    job_name: str = "jaxchat"
    """Name of the job and of the files <job_name>.sbatch and <job_name>-<id>.log."""
    nodes: int = flag(1, 1)
    """Number of machines."""
    gpus: int = flag(8, 0)
    """Number of GPUs of each machine; 0: none."""
    time: str = "24:00:00"
    """Time limit, as hours:minutes:seconds or days-hours."""
    partition: str = ""
    """Partition to queue in; empty: the site's default."""
    account: str = ""
    """Account to charge; empty: your default."""
    cpus: int = flag(0, 0)
    """Number of CPUs of each machine; 0: all, with no other jobs on the machine."""
    mem: str = "0"
    """Memory of each machine, such as 200G; 0: all."""
    directives: str = ""
    """Further options of sbatch, separated by spaces, as in "--qos=high --constraint=h100"."""
    setup: str = ""
    """Shell commands to run before the command, as in "module load cuda && source .venv/bin/activate"."""
    secrets: str = ""
    """Environment variables that the job needs, separated by commas, as in WANDB_API_KEY,HF_TOKEN. Nothing is
    submitted if one is not set here."""
    restarts: int = flag(20, 0)
    """Maximum number of times that the job is requeued after exit code 75, 76, 134 or 137."""
    dry_run: bool = False
    """Only print the batch script and the sbatch command; submit nothing."""


def script(config: Config, command: list[str]) -> str:
    """Return the text of the sbatch file, which runs `command`."""
    options = {
        "job-name": config.job_name,
        "nodes": config.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": config.gpus or "",
        "cpus-per-task": config.cpus or "",
        "mem": config.mem,
        "time": config.time,
        "partition": config.partition,
        "account": config.account,
        "output": f"{config.job_name}-%j.log",
        "signal": "TERM@120",  # sent to the processes, not to this script
        "export": "ALL" if config.secrets else "",
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value != ""]
    lines += ["#SBATCH --requeue", "#SBATCH --open-mode=append"]
    lines += [] if config.cpus else ["#SBATCH --exclusive"]
    for word in shlex.split(config.directives):
        name, equals, value = word.partition("=")
        lines.append(f"#SBATCH {name}{equals}{value and shlex.quote(value)}")
    codes, cpus = "|".join(map(str, RESTARTED)), config.cpus or "$SLURM_CPUS_ON_NODE"
    return "\n".join(
        [
            "#!/bin/bash",
            *lines,
            "",
            f"cd {shlex.quote(str(Path.cwd()))} || exit 1",
            *([config.setup] if config.setup else []),
            # The other processes notice by themselves that one failed, so Slurm need not kill them. srun does
            # not inherit --cpus-per-task from sbatch: without it, the process would be bound to one core.
            f"srun --kill-on-bad-exit=0 --cpus-per-task={cpus} {shlex.join(command)}",
            "code=$?",
            "# Requeue the job after one of these exit codes, unless it was cancelled.",
            'state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)',
            f"again=$(( ${{SLURM_RESTART_COUNT:-0}} < {config.restarts} ))",
            f"if [[ $code =~ ^({codes})$ && $state == RUNNING && $again == 1 ]]",
            'then scontrol requeue "$SLURM_JOB_ID"',
            "fi",
            "exit $code",
            "",
        ]
    )


def run(config: Config, command: list[str]):
    for word in shlex.split(config.directives):
        if not word.startswith("--"):
            raise UserError(f"--directives: {word!r} is not an option of the form --name or --name=value")
    for name in ("job_name", "time", "partition", "account", "mem"):
        value = getattr(config, name)
        if any(c.isspace() or c in "/'\"" for c in value):
            raise UserError(f"--{name}={value!r}; it must not contain spaces, quotes or slashes")
    secret_names(config.secrets, here=True)
    file = f"{config.job_name}.sbatch"
    submit(file, script(config, command), ["sbatch", file], config.dry_run)
