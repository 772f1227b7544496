"""Start a command on several machines, or in several processes on this one."""

import dataclasses
import sys

from jaxchat.config import UserError
from launch import cli
from launch.cluster import gke, local, slurm, tpu_vm

LAUNCHERS = {"slurm": slurm, "tpu_vm": tpu_vm, "gke": gke, "local": local}


@dataclasses.dataclass(frozen=True)
class Config:
    """Start a command on several machines, or in several processes on this one. Give the command after a --:
    python -m launch.cluster local --processes=2 -- python -m launch.base_train --depth=4 --resume

    The launchers are slurm, tpu_vm, gke and local. Each has its own --help, and with --dry_run only prints
    its files and commands. The command is started again after exit code 75 (stopped and saved), 76 (processes
    cannot reach one another), 134 (another process was lost) or 137 (killed), so give trainers --resume.
    Commands for one process, such as launch.download, tok_train or report, run in the first process only.

    Never put secrets such as WANDB_API_KEY on a command line. Each launcher's --help says how to pass them.
    """


def main(args: list[str] | None = None):
    args = list(sys.argv[1:] if args is None else args)
    end = args.index("--") if "--" in args else len(args)
    own, command = args[:end], args[end + 1 :]
    name = own.pop(0) if own and not own[0].startswith("-") else ""
    launcher = LAUNCHERS.get(name)

    def run(config):
        if launcher is None:
            given = f"there is no launcher {name!r}" if name else "which launcher?"
            raise UserError(f"{given}; it is one of {', '.join(LAUNCHERS)} (see --help)")
        if not command and "run" in getattr(config, "steps", "run"):
            raise UserError(f"no command given: python -m launch.cluster {name} FLAGS -- COMMAND")
        return launcher.run(config, command)

    run.command = f"launch.cluster {name}".strip()
    cli.main(launcher.Config if launcher else Config, run, own if launcher or not name else [], several=True)


if __name__ == "__main__":
    main()
