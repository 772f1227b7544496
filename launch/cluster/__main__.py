"""Start a command on many machines, or in many processes: python -m launch.cluster slurm --nodes=4 -- COMMAND …"""

import dataclasses
import sys

from jaxchat.config import UserError
from launch import cli
from launch.cluster import gke, local, slurm, tpu_vm

LAUNCHERS = {"slurm": slurm, "tpu_vm": tpu_vm, "gke": gke, "local": local}


@dataclasses.dataclass(frozen=True)
class Config:
    """Start a command on many machines, or in many processes of this one. The command stands after a lone --, and is
    the same on all of them:

    python -m launch.cluster local --processes=2 -- python -m launch.base_train --depth=4 --save_every=100 --resume

    Launchers: slurm, tpu_vm, gke, local; each has its own --help, and with --dry_run prints what it would write and
    run, and does nothing. A run that was told to end (exit code 75), that lost a peer (76) or that was killed (137) is
    started again, so give the trainers --save_every and --resume.

    Secrets, such as WANDB_API_KEY, never go onto a command line: name them with --secrets, and set them where the
    launcher's --help says.
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
            raise UserError(f"{given}; it is one of {', '.join(LAUNCHERS)} (--help tells more)")
        if not command and "run" in getattr(config, "steps", "run"):
            raise UserError(f"what to run? give it after a lone --: python -m launch.cluster {name} … -- COMMAND …")
        return launcher.run(config, command)

    run.command = f"launch.cluster {name}".strip()
    cli.main(launcher.Config if launcher else Config, run, own if launcher or not name else [])


if __name__ == "__main__":
    main()
