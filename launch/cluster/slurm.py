"""A Slurm batch job: one process a node, which drives all its GPUs."""

import dataclasses
import shlex
from pathlib import Path

from jaxchat.config import Flags, UserError, flag
from jaxchat.hosts import RESTARTED
from launch.cluster.common import secret_names, submit


@dataclasses.dataclass(frozen=True)
class Config(Flags):
    """Write <job_name>.sbatch here and submit it. One process a node drives all its GPUs; the nodes find one
    another.

    The job runs in this folder with this environment, so a secret that is set here is set there and is in no
    file. Two minutes before the time limit, and when the job is preempted, the run saves and ends; the job is
    then queued again, and continues if the command has --resume. JAXCHAT_BASE_DIR must be on a disk that all
    nodes share.
    """

    job_name: str = "jaxchat"
    """Name of the job and of the files <job_name>.sbatch and <job_name>-<id>.log."""
    nodes: int = flag(1, 1)
    """Number of machines."""
    gpus: int = flag(8, 0)
    """GPUs of each machine; 0: none."""
    time: str = "24:00:00"
    """Time limit, as hours:minutes:seconds or days-hours."""
    partition: str = ""
    """Partition to queue in; empty: the site's default."""
    account: str = ""
    """Account to charge; empty: your default."""
    cpus: int = flag(0, 0)
    """CPUs of each machine; 0: all, and the machine is not shared."""
    mem: str = "0"
    """Memory of each machine, such as 200G; 0: all."""
    directives: str = ""
    """More options of sbatch, separated by spaces: "--qos=high --constraint=h100"."""
    setup: str = ""
    """Shell commands for the job to run before the command: "module load cuda && source
    .venv/bin/activate"."""
    secrets: str = ""
    """Environment variables that the command needs, separated by commas: WANDB_API_KEY,HF_TOKEN. The launcher
    checks that they are set here; the job gets them with this environment."""
    restarts: int = flag(20, 0)
    """Largest number of times that the job is queued again."""
    dry_run: bool = False
    """Print the file and the command, and do nothing."""


def script(config: Config, command: list[str]) -> str:
    """The text of the sbatch file."""
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
        "signal": "TERM@120",  # to the processes, not to this script
        "export": "ALL" if config.secrets else "",
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value != ""]
    lines += ["#SBATCH --requeue", "#SBATCH --open-mode=append"]
    lines += [] if config.cpus else ["#SBATCH --exclusive"]
    lines += [f"#SBATCH {word}" for word in shlex.split(config.directives)]
    codes, cpus = "|".join(map(str, RESTARTED)), config.cpus or "$SLURM_CPUS_ON_NODE"
    return "\n".join(
        [
            "#!/bin/bash",
            *lines,
            "",
            f"cd {shlex.quote(str(Path.cwd()))} || exit 1",
            *([config.setup] if config.setup else []),
            # The processes notice by themselves that one failed; Slurm need not kill them. srun does not take
            # over --cpus-per-task from sbatch, and would bind the process to one core.
            f"srun --kill-on-bad-exit=0 --cpus-per-task={cpus} {shlex.join(command)}",
            "code=$?",
            "# Queue it again after one of these, unless it was cancelled.",
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
