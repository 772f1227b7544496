"""What every command shares: flags from a dataclass, one line for an error, how a plan is printed."""

import dataclasses
import difflib
import sys
from collections.abc import Callable, Sequence

import tyro

from jaxchat.config import UserError


def _canonical(args: Sequence[str], config_class) -> list[str]:
    """Flags with dashes or underscores, and bools as --flag, --flag=1 or --flag=false, as tyro reads them."""
    bools = {f.name for f in dataclasses.fields(config_class) if f.type in (bool, "bool")}
    out = []
    for arg in args:
        flag, equals, value = arg.partition("=")
        name = flag[2:].replace("-", "_")
        if not flag.startswith("--") or not name:
            out.append(arg)
        elif name in bools and equals:
            if value.lower() not in ("1", "true", "0", "false"):
                raise UserError(f"--{name}={value}: it is 1 or 0, true or false")
            out.append(f"--{name}" if value.lower() in ("1", "true") else f"--no_{name}")
        else:
            out.append(f"--{name}{equals}{value}")
    return out


def parse(config_class, args: Sequence[str] | None = None):
    """The config that the flags say."""
    args = _canonical(sys.argv[1:] if args is None else args, config_class)
    names = [f.name for f in dataclasses.fields(config_class)]
    known = set(names) | {f"no_{n}" for n in names} | {"help"}
    for arg in args:
        name = arg[2:].partition("=")[0]
        if arg.startswith("--") and name not in known:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean --{near[0]}?" if near else "there is no flag like it;"
            raise UserError(f"unknown flag --{name}; {hint} (--help lists all)")
    try:
        with _quiet() as said:
            return tyro.cli(config_class, args=args, use_underscores=True)
    except SystemExit as stopped:
        if stopped.code in (0, None):
            raise
        words = " ".join("".join(said).replace("│", " ").replace("─", " ").split())
        raise UserError(f"the flags cannot be read: {words[:300]}") from stopped


class _quiet:
    """Hold back what tyro writes about wrong flags, so that it can be said in one line."""

    def __enter__(self):
        self._stderr, sys.stderr = sys.stderr, self
        self._said: list[str] = []
        return self._said

    def __exit__(self, *_):
        sys.stderr = self._stderr

    def write(self, text: str):
        self._said.append(text)

    def flush(self):
        pass

    def isatty(self) -> bool:
        return False


def main(config_class, run: Callable, args: Sequence[str] | None = None) -> None:
    """Parse the flags and run. What the user can mend is said in one line on stderr, with exit code 2."""
    try:
        code = run(parse(config_class, args))
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    except OSError as problem:
        where = f" ({problem.filename})" if problem.filename else ""
        print(f"error: {problem.strerror or problem}{where}; nothing more was written", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    if code:
        sys.exit(code)


def print_plan(title: str, rows: list[tuple[str, str]]):
    """A title and aligned lines of what is about to be done."""
    width = max(len(name) for name, _ in rows)
    print(f"\n{title}")
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")
    print(flush=True)


def next_step(command: str):
    print(f"\nnext: {command}", flush=True)
