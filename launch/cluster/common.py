"""Code that launchers share: checking flags, and running or printing commands."""

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
    """Split `text`, the value of --secrets, at commas into names of environment variables.

    Raises UserError if a name is invalid, or if `here` is true and a variable is not set in this environment.
    """
    names = [name for name in text.split(",") if name]
    for name in names:
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise UserError(f"--secrets={text}: {name!r} is not the name of an environment variable")
        if here and not os.environ.get(name):
            raise UserError(f"--secrets={name}: {name} is not set here; set it first: export {name}=…")
    return names


def check_name(name: str):
    """Raise UserError unless `name`, given as --name, is a valid name for machines, pods and jobs."""
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", name):
        allowed = "at most 40 characters of a-z, 0-9 and -, beginning with a letter"
        raise UserError(f"--name={name}; it must be {allowed}")


def submit(file: str, text: str, words: list[str], dry_run: bool):
    """Print a file's text and a command. Unless `dry_run`, write the file and run the command."""
    print(f"# {file}\n{text}", flush=True)
    if not dry_run:
        Path(file).write_text(text, encoding="utf-8")
    perform(words, dry_run)


def perform(words: list[str], dry_run: bool, check: bool = True) -> int:
    """Print a command, run it unless `dry_run`, and return its exit code.

    Raises UserError if the program does not exist or, when `check` is true, if the exit code is not 0.
    """
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
