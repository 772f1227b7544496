"""Code that all commands share: flags from a dataclass, one-line errors, exit codes, printed plans.

A command is a module in launch/ with a flags class, `run(config)` and `main(args)`. Modules that import jax,
Orbax or Grain are imported inside functions, so that --help and the error for a mistyped flag appear at once.

Exit codes. 0: success. 2: an error that the user can fix. 75: stopped by a signal (SIGTERM, SIGUSR1, SIGHUP,
Ctrl-C), after saving. 76: other processes cannot be reached. 134: another process was lost. 130: stopped by
Ctrl-C without saving. 141: stdout was closed by the program that read it. After 75, 76 and 134, run the
command again with --resume.
"""

import argparse
import ast
import contextlib
import dataclasses
import difflib
import errno
import inspect
import itertools
import math
import os
import re
import shlex
import shutil
import sys
import textwrap
import threading
import time
import traceback
import typing
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

from jaxchat import hosts
from jaxchat.config import Preempted, UserError, check_folder, check_local, no_platform

PATHS = {"data_dir", "tasks_dir", "eval_bundle", "train_tasks", "val_tasks", "sft_tasks", "to", "out", "path"}
FOLDERS = {"data_dir", "tasks_dir", "out", "path"}
BOOLEANS = {"1": True, "true": True, "0": False, "false": False}

# OSErrors that the user can fix, by their codes; any other is a bug of ours and keeps its traceback.
REMEDIES = {
    errno.ENOSPC: "free some space, or set JAXCHAT_BASE_DIR to a folder on a larger disk",
    errno.EDQUOT: "free some space, or set JAXCHAT_BASE_DIR to a folder with a larger quota",
    errno.EFBIG: "raise the limit on a file's size (ulimit -f)",
    errno.EACCES: "grant access to it, or set JAXCHAT_BASE_DIR to a folder of your own",
    errno.EPERM: "grant access to it, or set JAXCHAT_BASE_DIR to a folder of your own",
    errno.EROFS: "set JAXCHAT_BASE_DIR to a folder that can be written",
    errno.ENOTDIR: "a file is where a folder should be: move it, or set JAXCHAT_BASE_DIR to another folder",
    errno.EEXIST: "move the existing file, or set JAXCHAT_BASE_DIR to another folder",
    errno.ENAMETOOLONG: "give a shorter name, or set JAXCHAT_BASE_DIR to a folder with a shorter path",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
}


def main(config_class, run, args: list[str] | None = None, *, several: bool = False) -> None:
    """Parse flags into `config_class` (a frozen dataclass) and call `run(config)`.

    args: the arguments after the command's name; None: sys.argv[1:]. several: whether several processes may
    run the command together. If not, only the first of the processes that a launcher starts runs it.
    Returns if `run` returns None or 0. Otherwise raises SystemExit with an exit code: the value that `run`
    returned or, after an error, one that the module's docstring lists.
    """
    _open_streams()
    for stream in (sys.stdin, sys.stdout):  # an ASCII terminal shows ? for other characters
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    with hosts.together():
        _parse_and_run(config_class, run, sys.argv[1:] if args is None else args, several)


def command(config_class, run, *, several: bool = False) -> Callable[..., None]:
    """Return a function `main(args=None)` that calls cli.main() with `config_class`, `run` and `several`."""
    return lambda args=None: main(config_class, run, args, several=several)


def _open_streams() -> None:
    """Open /dev/null in place of a closed stdin, stdout or stderr, so that no file gets its descriptor."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_RDWR)  # gets `number`, the lowest free descriptor
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115


def _parse_and_run(config_class, run, args: list[str], several: bool) -> None:
    try:
        config = parse(config_class, args, _prog(run))
        if not several and not hosts.is_first():
            why = "nothing to do here: this command runs in the first process only"
            return print(why, file=sys.stderr, flush=True)
        code = run(config)
        sys.stdout.flush()  # here, so that a broken pipe is raised inside this try
    except UserError as error:
        _fail(" ".join(str(error).split()), 2)
    except Preempted as stop:
        _fail(str(stop), os.EX_TEMPFAIL)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_has_left():
            raise SystemExit(141) from None
        if error.errno not in REMEDIES:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror}; {REMEDIES[error.errno]}", 2)
    except (RuntimeError, AssertionError) as error:  # which one depends on what is installed
        if not os.environ.get("JAX_PLATFORMS") or not _raised_in(error, "xla_bridge.py"):
            raise
        _fail(no_platform(), 2)
    if code:
        raise SystemExit(code)


def parse(config_class, args: list[str], prog: str = "command"):
    """Parse `args` into a `config_class`. prog: the command's name in --help.

    Flags are written --name=value or --name value; switches, also --name or --no_name.
    Raises UserError if a flag is unknown, or a value is missing or invalid.
    """
    parser = _Parser(prog, config_class)
    # Dashes become underscores in a flag's name only, not in its value.
    args = [re.sub(r"^--[^=]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), arg) for arg in args]
    values, rest = parser.parse_known_args(args)
    if rest and rest[0].startswith("-"):
        flag = rest[0].partition("=")[0]
        near = difflib.get_close_matches(flag.lstrip("-"), parser.names, n=1)
        hint = f"; did you mean --{near[0]}?" if near else ""
        raise UserError(f"unknown flag {flag}{hint} (--help lists all)")
    if rest:
        raise UserError(f"unexpected {rest[0]!r}: every argument is a flag, --name=value (--help lists all)")
    for name in PATHS & vars(values).keys():
        check_local(f"--{name}", getattr(values, name))
    for name in FOLDERS & vars(values).keys():
        check_folder(f"--{name}", getattr(values, name))
    return getattr(config_class, "given", config_class)(**vars(values))


def print_plan(title: str, rows: list[tuple[str, str]]) -> None:
    """Print `title`, and below it each row (name, value) on its own line, with the values aligned."""
    width = max((len(name) for name, _ in rows), default=0)
    print(title, *(f"  {name:<{width}}  {value}" for name, value in rows), sep="\n", flush=True)


def open_model(config, source: str, *, asks: bool = True):
    """Start the devices and open the checkpoint that the flags name. Return (checkpoint, model).

    source: stage of the checkpoint. asks: whether the command itself checks after every step for a signal to
    stop. If not, SIGTERM ends it at once.
    """
    from jaxchat import checkpoint, devices

    mesh = devices.start_devices(config, asks=asks)
    found = checkpoint.open_model(source, config.model_tag, config.step)
    return found, devices.model_for(config, found.config, mesh)


_base: list[str] = []  # base directories that base_directory() has set, the innermost last


def after_base(tag: str, plain: bool) -> None:
    """Print the command to run after pretraining: mid_train for --arch=2025 (`plain`), chat_sft for 2026."""
    next_step(f"python -m launch.{'mid_train' if plain else 'chat_sft --recipe=2026'} --model_tag={tag}")


def next_step(command: str, **flags: str) -> None:
    """Print the command to run next, ready to paste into a shell, with all `flags` that are not empty."""
    print("next:", runnable(command, **flags), flush=True)


def this_python() -> str:
    """Return "python" if a shell finds this Python by that name, else the path of this Python."""
    found = shutil.which("python")
    if found and os.path.dirname(found) == os.path.dirname(sys.executable):
        return "python"
    try:
        near = os.path.relpath(sys.executable)
    except OSError:  # the current folder was deleted
        near = ".."
    return shlex.quote(sys.executable if near.startswith("..") else near)


def runnable(command: str, **flags: str) -> str:
    """Return `command` ready to paste into a shell, with all `flags` that are not empty.

    It runs this Python. In a base_directory() context, it begins with JAXCHAT_BASE_DIR=<the context's
    folder>.
    """
    command = command.replace("python", this_python(), 1)
    before = [f"JAXCHAT_BASE_DIR={shlex.quote(folder)}" for folder in _base[-1:]]
    after = [f"--{name}={shlex.quote(value)}" for name, value in flags.items() if value]
    return " ".join([*before, command, *after])


@contextlib.contextmanager
def base_directory(folder: Path) -> Iterator[None]:
    """Return a context in which `folder` is the base directory.

    Commands that next_step() prints in it use the same base directory.
    """
    outer = os.environ.get("JAXCHAT_BASE_DIR")
    _base.append(str(folder))
    os.environ["JAXCHAT_BASE_DIR"] = str(folder)
    try:
        yield
    finally:
        _base.pop()
        os.environ.pop("JAXCHAT_BASE_DIR")
        if outer is not None:
            os.environ["JAXCHAT_BASE_DIR"] = outer


@contextlib.contextmanager
def progress(message: Callable[[], str], seconds: float) -> Iterator[None]:
    """Return a context that prints message() and the elapsed time every `seconds` seconds."""
    start, done = time.perf_counter(), threading.Event()

    def report():
        while not done.wait(seconds):
            print(f"  {message()}, {time.perf_counter() - start:.0f} s", flush=True)

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class _Parser(argparse.ArgumentParser):
    """Parser of a dataclass's flags. It raises UserErrors, and its --help groups inherited flags by class."""

    def __init__(self, prog: str, config_class):
        super().__init__(
            prog=prog,
            usage=f"{prog} [--name=value …]",
            description=inspect.cleandoc(config_class.__doc__),
            formatter_class=_Help,
            allow_abbrev=False,
        )
        self.names = []
        fields = {field.name: field for field in dataclasses.fields(config_class) if field.init}
        for cls in config_class.__mro__:
            names = fields.keys() & cls.__dict__.get("__annotations__", {}).keys()
            # An overridden field appears once, with the class that overrides it.
            own = [fields.pop(name) for name in list(fields) if name in names]
            if own:
                title = inspect.cleandoc(cls.__doc__).rstrip(".")  # argparse adds a colon
                group = self if cls is config_class else self.add_argument_group(title)
                docs = _field_docs(cls)
                for field in own:
                    self.add_flag(group, field, docs.get(field.name, ""))

    def add_flag(self, group, field: dataclasses.Field, text: str):
        name = field.metadata.get("name") or field.name
        self.names.append(name)
        value = int(field.default) if field.type is bool else field.default
        default = "" if value == "" or field.default is False else f" (default: {value})"
        shown = {
            "dest": field.name,
            "default": argparse.SUPPRESS,
            "help": (text + default).replace("%", "%%"),
        }
        kind, metavar = KINDS[field.type]
        metavar = "|".join(filter(None, field.metadata.get("choices") or ())) or metavar
        switch = {"nargs": "?", "const": True} if field.type is bool else {}
        alias = field.metadata.get("alias")
        group.add_argument(
            f"--{name}", *([alias] if alias else []), type=kind, metavar=metavar, **switch, **shown
        )
        if switch:
            group.add_argument(
                f"--no_{name}", action="store_const", const=False, **shown | {"help": argparse.SUPPRESS}
            )

    def error(self, message: str):
        raise UserError(message.removeprefix("argument "))


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help formatter that prints each flag on one line and its help text on the next."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=8, width=min(100, shutil.get_terminal_size().columns))

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)  # flags in examples stay in one piece


def _field_docs(cls) -> dict[str, str]:
    """Return {field name: docstring below the field} of a class; {} if the source is not available."""
    body = _class_bodies(sys.modules[cls.__module__]).get(cls.__name__, [])
    return {
        field.target.id: " ".join(below.value.value.split())
        for field, below in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
    }


@cache  # a command's flags inherit from several classes of jaxchat.config
def _class_bodies(module) -> dict[str, list[ast.stmt]]:
    """Return {class name: statements in its body} of a module; {} if the source is not available."""
    try:
        tree = ast.parse(inspect.getsource(module))
    except (OSError, TypeError):
        return {}
    return {node.name: node.body for node in tree.body if isinstance(node, ast.ClassDef)}


def _read(convert: Callable, expected: str, text: str):
    """Return convert(text). Raise ArgumentTypeError, which says what was `expected`, if that fails."""
    try:
        return convert(text)
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"expected {expected}, not {text!r}") from None


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError
    return value


# {type of a field: (how to parse a value, what --help calls the value)}
KINDS = {
    str: (str, "TEXT"),
    int: (partial(_read, int, "a whole number"), "INTEGER"),
    float: (partial(_read, _finite, "a number"), "NUMBER"),
    bool: (partial(_read, lambda text: BOOLEANS[text.lower()], "1 or 0, true or false"), "0|1"),
}


def _prog(run) -> str:
    """Return the command's name for messages, such as "python -m launch.base_train"."""
    if command := getattr(run, "command", None):
        return f"python -m {command}"
    spec = sys.modules[run.__module__].__spec__
    return f"python -m {spec.name}" if spec else sys.argv[0]


def _fail(message: str, code: int) -> typing.NoReturn:
    if code == 2:  # commands to run, in the message, call this Python
        message = "error: " + re.sub(r"(?<![\w./-])python(?= -m )", lambda _: this_python(), message)
    print(message, file=sys.stderr, flush=True)
    raise SystemExit(code) from None


def _raised_in(error: Exception, file: str) -> bool:
    """Return whether the innermost frame of an error's traceback is in `file`."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return os.path.basename(frame.f_code.co_filename) == file


def _reader_has_left() -> bool:
    """Return whether the program that reads stdout has closed it. If so, discard further output."""
    try:
        print(flush=True)  # with a newline, because a flush of an empty buffer writes nothing
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False
