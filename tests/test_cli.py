"""launch/cli.py: flags, one-line errors, exit codes, printing."""

import dataclasses
import errno
import os
import subprocess
import sys
import time
from typing import Annotated, Literal

import pytest
import tyro

from jaxchat.config import UserError
from launch import cli


@dataclasses.dataclass(frozen=True)
class Config:
    """Bake a loaf."""

    depth: int = 4
    """Layers of dough."""
    target_flops: float = -1.0
    """Kneading."""
    dry_run: bool = False
    """Eat nothing."""
    warm: bool = True
    """Serve warm."""
    top_k: int | None = None
    """Crumbs to keep."""
    shape: Literal["round", "long"] = "round"
    """Of the loaf."""
    prompt: Annotated[str, tyro.conf.arg(aliases=["-p"])] = ""
    """What to say."""


def exit_of(run, args, capsys):
    """(exit code, stdout, stderr) of a command whose work is `run`."""
    with pytest.raises(SystemExit) as stop:
        cli.main(Config, run, args)
    return stop.value.code, *capsys.readouterr()


def raising(error):
    def run(config):
        raise error

    return run


@pytest.mark.parametrize(
    "args, changed",
    [
        ([], {}),
        (["--depth=3"], {"depth": 3}),
        (["--depth", "3"], {"depth": 3}),
        (["--depth", "-1", "--target_flops=-1e18"], {"depth": -1, "target_flops": -1e18}),
        (["--depth=524_288"], {"depth": 524288}),
        (["--target-flops", "1e18"], {"target_flops": 1e18}),
        (["--target_flops=7"], {"target_flops": 7.0}),
        (["--depth=1", "--depth=2"], {"depth": 2}),
        (["--dry_run"], {"dry_run": True}),
        (["--dry-run", "--no-warm"], {"dry_run": True, "warm": False}),
        (["--no_warm"], {"warm": False}),
        (["--dry_run=1", "--warm=0"], {"dry_run": True, "warm": False}),
        (["--dry-run=True", "--warm=False"], {"dry_run": True, "warm": False}),
        (["--dry_run", "1", "--warm", "false", "--depth=2"], {"dry_run": True, "warm": False, "depth": 2}),
        (["--top_k=5"], {"top_k": 5}),
        (["--top-k", "None"], {"top_k": None}),
        (["--shape=long"], {"shape": "long"}),
        (["-p", "What is 23 * 7?"], {"prompt": "What is 23 * 7?"}),
        (["-p", "- one\n- two"], {"prompt": "- one\n- two"}),
        (["-p=-1", "--depth=2"], {"prompt": "-1", "depth": 2}),
        (["--prompt", "--what"], {"prompt": "--what"}),
        (["--prompt=a=b --c"], {"prompt": "a=b --c"}),
        (["--prompt="], {"prompt": ""}),
    ],
)
def test_flags(args, changed):
    assert cli.parse(Config, args) == dataclasses.replace(Config(), **changed)


@pytest.mark.parametrize(
    "args, message",
    [
        (["--dept", "3"], "unknown flag --dept; did you mean --depth? (--help lists all)"),
        (["--dry-runn=1"], "unknown flag --dry-runn; did you mean --dry_run? (--help lists all)"),
        (["-depth=3"], "unknown flag -depth; did you mean --depth? (--help lists all)"),
        (["--no_depth"], "unknown flag --no_depth; did you mean --depth? (--help lists all)"),
        (["--qqqq"], "unknown flag --qqqq (--help lists all)"),
        (["-x", "3"], "unknown flag -x (--help lists all)"),
        (["stray"], "unexpected 'stray': every argument is a flag, --name=value (--help lists all)"),
        (["--depth=twelve"], "--depth=twelve: expected a whole number"),
        (["--depth", "1.5"], "--depth=1.5: expected a whole number"),
        (["--depth="], "--depth=: expected a whole number"),
        (["--target_flops=lots"], "--target_flops=lots: expected a number"),
        (["--target_flops=nan"], "--target_flops=nan: expected a number"),
        (["--top_k=x"], "--top_k=x: expected a whole number"),
        (["--depth"], "--depth needs a value: --depth=INTEGER"),
        (["--prompt", "--depth=3"], "--prompt needs a value: --prompt=VALUE"),
        (["--dry_run=maybe"], "--dry_run=maybe: expected 1 or 0, true or false"),
    ],
)
def test_wrong_flags_give_one_line_and_exit_2(args, message, capsys):
    assert exit_of(raising(AssertionError("must not run")), args, capsys) == (2, "", f"error: {message}\n")


def test_what_tyro_refuses_is_one_line_too(capsys):
    code, out, err = exit_of(raising(AssertionError("must not run")), ["--shape=square"], capsys)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ") and all(word in err for word in ("--shape", "square", "round", "long"))


def test_help_shows_description_and_field_docstrings(capsys):
    code, out, err = exit_of(raising(AssertionError("must not run")), ["--help"], capsys)
    assert (code, err) == (0, "")
    assert all(words in out for words in ("Bake a loaf.", "--target_flops FLOAT", "Kneading.", "-p STR", "test_cli"))


def test_result_is_the_exit_code(capsys):
    assert cli.main(Config, lambda config: None, []) is None
    assert cli.main(Config, lambda config: 0, []) is None
    assert exit_of(lambda config: 3, [], capsys) == (3, "", "")


def test_args_default_to_the_command_line(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "argv", ["bake", "--depth=9"])
    cli.main(Config, lambda config: seen.append(config))
    assert seen == [Config(depth=9)]


def test_user_error_is_one_line_and_exit_2(capsys):
    assert exit_of(raising(UserError("no flour;\n buy some")), [], capsys) == (2, "", "error: no flour; buy some\n")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_full_disk_and_missing_permission_name_file_and_remedy(number, capsys):
    code, out, err = exit_of(raising(OSError(number, "No flour left", "/shelf/flour")), [], capsys)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: /shelf/flour: No flour left; ") and "JAXCHAT_BASE_DIR" in err


@pytest.mark.parametrize(
    "error", [ValueError("ours"), OSError(errno.EIO, "ours"), BrokenPipeError(errno.EPIPE, "a worker's")]
)
def test_other_errors_keep_their_traceback(error):
    with pytest.raises(type(error)) as caught:
        cli.main(Config, raising(error), [])
    assert caught.value is error


def test_interrupted(capsys):
    assert exit_of(raising(KeyboardInterrupt()), [], capsys) == (130, "", "interrupted\n")


def test_reader_who_leaves_ends_it_quietly():
    script = """
import dataclasses
from launch import cli

@dataclasses.dataclass(frozen=True)
class Config:
    "Print much."

def run(config):
    for i in range(100_000):
        print(i)

cli.main(Config, run)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"0\n"
        process.stdout.close()
        assert (process.wait(timeout=60), process.stderr.read()) == (141, b"")


def test_plan_is_aligned(capsys):
    cli.print_plan("Plan", [("depth", "4"), ("tokens", "1,000")])
    assert capsys.readouterr().out == "Plan\n  depth   4\n  tokens  1,000\n"


@pytest.mark.parametrize("found, want", [(sys.executable, "python"), ("/elsewhere/python", None), (None, None)])
def test_next_step_runs_as_printed(found, want, capsys, monkeypatch):
    """`python` where that is this Python, else the path of this one."""
    monkeypatch.setattr(cli.shutil, "which", lambda name: found)
    cli.next_step("python -m launch.eat")
    path, rest = capsys.readouterr().out.removeprefix("next: ").split(" ", 1)
    assert rest == "-m launch.eat\n" and (path == want or want is None and os.path.samefile(path, sys.executable))


def test_imports_neither_jax_nor_torch_and_starts_fast():
    script = "import sys, launch.cli; print(sorted({'jax', 'torch', 'transformers'} & set(sys.modules)))"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert time.monotonic() - began < 5  # 0.2 s on an idle machine
