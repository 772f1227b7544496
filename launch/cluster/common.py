"""What the launchers share: names of secrets, running or only showing commands, which exit codes start a run again."""

import os
import re
import shlex
import subprocess

from jaxchat.config import UserError

# Told to end and saved, a peer was lost, killed (by a preemption, or for memory): the same command goes on from there.
RESTARTED = (75, 76, 137)
# For gcsfuse. A checkpoint is finished by renaming its folder, which is refused by default where there are files in it.
MOUNTED = ("implicit-dirs", "rename-dir-limit=200000")


def secret_names(text: str, *, here: bool) -> list[str]:
    """The names of environment variables in `text`, with commas between. UserError: no such name, or, if they are to
    be set `here`, one that isn't."""
    names = [name for name in text.split(",") if name]
    for name in names:
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise UserError(f"--secrets takes names of environment variables, with commas between; {name!r} is none")
        if here and not os.environ.get(name):
            raise UserError(f"--secrets={name}: {name} is not set here; set it (export {name}=…) and start again")
    return names


def check_name(flag: str, value: str):
    """UserError unless `value` can name a machine, a pod or a job: a-z, 0-9 and -, at most 40 of them."""
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", value):
        raise UserError(f"--{flag}={value}: a name of at most 40 of a-z, 0-9 and -, which begins with a letter")


def check_at_least(config, **least: int):
    for name, low in least.items():
        if getattr(config, name) < low:
            raise UserError(f"--{name}={getattr(config, name)}; it must be at least {low}")


def perform(words: list[str], dry_run: bool, check: bool = True) -> int:
    """Show a command, and run it unless this is a dry run. -> its exit code; UserError: it failed, if `check`."""
    print(shlex.join(words), flush=True)
    if dry_run:
        return 0
    try:
        code = subprocess.run(words).returncode
    except FileNotFoundError:
        raise UserError(f"there is no {words[0]} here; install it, or see with --dry_run what would be run") from None
    if code and check:
        raise UserError(f"{words[0]} failed with exit code {code}; its own words are above")
    return code
