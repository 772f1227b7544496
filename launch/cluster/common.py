"""Code that all launchers share: checks of flags, and running or printing a command."""

import os
import re
import shlex
import subprocess
from pathlib import Path

from jaxchat.config import UserError

# Options of gcsfuse. A checkpoint is completed by renaming its folder, but gcsfuse refuses by default to
# rename folders with files.
MOUNTED = ("implicit-dirs", "rename-dir-limit=200000")


def secret_names(text: str, *, here: bool) -> list[str]:
    """Parse --secrets into a list of names. UserError: a name is invalid.

    here: also raise UserError if a name is not set in this environment.
    """
    names = [name for name in text.split(",") if name]
    for name in names:
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise UserError(f"--secrets={text}: {name!r} is not the name of an environment variable")
        if here and not os.environ.get(name):
            raise UserError(f"--secrets={name}: {name} is not set here; set it first: export {name}=…")
    return names


def check_name(name: str):
    """Raise UserError unless --name is valid for machines, pods and jobs: at most 40 of a-z, 0-9 and -."""
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", name):
        allowed = "at most 40 characters of a-z, 0-9 and -, beginning with a letter"
        raise UserError(f"--name={name}; it must be {allowed}")


def submit(file: str, text: str, words: list[str], dry_run: bool):
    """Print a file, write it to the current folder, and run the command `words`. dry_run: only print both."""
    print(f"# {file}\n{text}", flush=True)
    if not dry_run:
        Path(file).write_text(text, encoding="utf-8")
    perform(words, dry_run)


def perform(words: list[str], dry_run: bool, check: bool = True) -> int:
    """Print a command, run it unless `dry_run`, and return the exit code. check: raise UserError if not 0."""
    print(shlex.join(words), flush=True)
    if dry_run:
        return 0
    try:
        code = subprocess.run(words).returncode
    except FileNotFoundError:
        remedy = "install it, or print the commands with --dry_run"
        raise UserError(f"there is no {words[0]} here; {remedy}") from None
    if code and check:
        raise UserError(f"{words[0]} failed with exit code {code}; its own message is above")
    return code
