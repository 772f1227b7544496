"""What every command shares: flags from a frozen dataclass, errors in one line, exit codes, a few ways to print.

Exit codes: 0 done, 2 something the user gave cannot work, 75 asked to stop (SIGTERM, SIGUSR1) and saved: start again
with --resume, 130 interrupted, 141 whoever read our output went away.
Nothing here imports jax, so that --help and a mistyped flag answer at once.
"""

import contextlib
import dataclasses
import difflib
import errno
import io
import math
import os
import shutil
import sys
import types
import typing

import tyro

from jaxchat.config import Preempted, UserError

BOOLEANS = {"1": True, "true": True, "0": False, "false": False}

# An OSError with one of these is something the user can mend; any other is ours, and keeps its traceback.
REMEDIES = {
    errno.ENOSPC: "free some space, or set JAXCHAT_BASE_DIR to a folder on a larger disk",
    errno.EDQUOT: "free some space, or set JAXCHAT_BASE_DIR to a folder with a larger quota",
    errno.EFBIG: "raise the limit on a file's size (ulimit -f)",
    errno.EACCES: "grant access to it, or set JAXCHAT_BASE_DIR to a folder of your own",
    errno.EPERM: "grant access to it, or set JAXCHAT_BASE_DIR to a folder of your own",
    errno.EROFS: "set JAXCHAT_BASE_DIR to a folder that can be written",
    errno.ENOTDIR: "a file is where a folder should be: move it, or set JAXCHAT_BASE_DIR to another folder",
    errno.EEXIST: "move what is there, or set JAXCHAT_BASE_DIR to another folder",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
}


def main(config_class, run, args: list[str] | None = None) -> None:
    """Parse flags into `config_class` (a frozen dataclass), then call `run(config)`.

    args: the command line after the command's name; None: the process's own. Field docstrings are the flags' help, the
    class docstring is the description. Returns normally when `run` returns None or 0; raises SystemExit with one of
    the exit codes above, or with what `run` returned, otherwise.
    """
    try:
        code = run(parse(config_class, sys.argv[1:] if args is None else args, _prog(run)))
        sys.stdout.flush()  # here, so that a reader who has gone away is noticed where it is handled
    except UserError as error:
        _fail(" ".join(str(error).split()), 2)
    except Preempted as told:
        _fail(str(told), os.EX_TEMPFAIL)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            raise SystemExit(141) from None
        if error.errno not in REMEDIES:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror}; {REMEDIES[error.errno]}", 2)
    if code:
        raise SystemExit(code)


def parse(config_class, args: list[str], prog: str = "command"):
    """The `config_class` that `args` describe. UserError: unknown flag, missing or unusable value."""
    plain = _plain_flags(config_class, args)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(config_class, prog=prog, args=plain, use_underscores=True)
    except SystemExit as stop:
        if not stop.code:
            raise  # --help
        words = "".join(c if c.isprintable() and not "\u2500" <= c <= "\u257f" else " " for c in said.getvalue())
        raise UserError(" ".join(words.split())) from None


def print_plan(title: str, rows: list[tuple[str, str]]) -> None:
    """Print `title`, then a line per (name, value), the values below one another."""
    width = max((len(name) for name, _ in rows), default=0)
    print(title, *(f"  {name:<{width}}  {value}" for name, value in rows), sep="\n", flush=True)


def next_step(command: str) -> None:
    """Print the command to run next, e.g. next_step("python -m launch.mid_train"), so that it runs as printed."""
    found = shutil.which("python")
    if not found or os.path.dirname(found) != os.path.dirname(sys.executable):  # `python` would be another one
        near = os.path.relpath(sys.executable)
        command = command.replace("python", sys.executable if near.startswith("..") else near, 1)
    print(f"next: {command}", flush=True)


def _plain_flags(config_class, args: list[str]) -> list[str]:
    """`args` with every flag in the one form that leaves tyro nothing to guess: --a_b=value, --switch or --no_switch.

    So a value may begin with a dash (-p "- one"), and a switch may be given as --x, --no_x, --x=1 or --x false.
    """
    hints = typing.get_type_hints(config_class, include_extras=True)
    kinds = {field.name: hints[field.name] for field in dataclasses.fields(config_class) if field.init}
    spellings, shown = {}, {}  # shown: a flag named otherwise than its field, as --from must be
    for name, kind in kinds.items():
        extras = getattr(kind, "__metadata__", ())
        shown[name] = next((extra.name for extra in extras if getattr(extra, "name", None)), name)
        for flag in (
            f"--{shown[name]}",
            *(alias for extra in extras for alias in getattr(extra, "aliases", None) or ()),
        ):
            spellings[flag] = name

    def find(word: str) -> str | None:
        return spellings.get("--" + word[2:].replace("-", "_") if word.startswith("--") else word)

    plain, rest = [], list(args)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        name, negated = find(flag), find("--" + flag[5:]) if flag[:5] in ("--no-", "--no_") else None
        if flag in ("-h", "--help"):
            plain.append("--help")
        elif name and kinds[name] is bool:
            if not equals and rest and rest[0].lower() in BOOLEANS:
                equals, value = "=", rest.pop(0)
            if equals and value.lower() not in BOOLEANS:
                raise UserError(f"{word}: expected 1 or 0, true or false")
            plain.append(f"--{shown[name]}" if not equals or BOOLEANS[value.lower()] else f"--no_{shown[name]}")
        elif name:
            if not equals:
                if not rest or find(rest[0].partition("=")[0]):
                    raise UserError(f"{flag} needs a value: {flag}={_kind_name(kinds[name])}")
                value = rest.pop(0)
            _check_number(flag, kinds[name], value)
            plain.append(f"--{shown[name]}={value}")
        elif negated and kinds[negated] is bool and not equals:
            plain.append(f"--no_{shown[negated]}")
        elif flag.startswith("-"):
            near = difflib.get_close_matches(flag.lstrip("-").replace("-", "_"), shown.values(), n=1)
            hint = f"; did you mean --{near[0]}?" if near else ""
            raise UserError(f"unknown flag {flag}{hint} (--help lists all)")
        else:
            raise UserError(f"unexpected {word!r}: every argument is a flag, --name=value (--help lists all)")
    return plain


def _choices(kind) -> list:
    """The types a value of `kind` may have: [int] for int, [int, NoneType] for int | None."""
    while typing.get_origin(kind) is typing.Annotated:
        kind = kind.__origin__
    return list(typing.get_args(kind)) if isinstance(kind, types.UnionType) else [kind]


def _kind_name(kind) -> str:
    return {int: "INTEGER", float: "NUMBER"}.get(_choices(kind)[0], "VALUE")


def _check_number(flag: str, kind, value: str) -> None:
    choices = _choices(kind)
    if type(None) in choices and value == "None":
        return
    for number, expected in ((int, "a whole number"), (float, "a number")):
        if number in choices:
            try:
                if math.isfinite(number(value)):
                    return
            except ValueError:
                pass
            raise UserError(f"{flag}={value}: expected {expected}")


def _prog(run) -> str:
    """How the command is called: python -m launch.base_train, or what `run.command` says."""
    if command := getattr(run, "command", None):
        return f"python -m {command}"
    spec = sys.modules[run.__module__].__spec__
    return f"python -m {spec.name}" if spec else sys.argv[0]


def _fail(message: str, code: int) -> typing.NoReturn:
    print(f"error: {message}" if code == 2 else message, file=sys.stderr, flush=True)
    raise SystemExit(code) from None


def _reader_is_gone() -> bool:
    """Whether stdout is the broken pipe (and not, say, one to a worker). If so, silence what is still buffered."""
    try:
        print(flush=True)  # a flush alone has nothing left to write
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False
