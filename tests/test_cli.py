"""launch/cli.py: flags, one-line errors, exit codes, printing."""

import dataclasses
import errno
import importlib
import io
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from conftest import ROOT

from jaxchat import devices, sharding
from jaxchat.config import BaseConfig, MidConfig, RLConfig, UserError
from launch import base_eval, chat_cli, chat_eval, check, cli, compile_check, tok_train
from launch.cluster import __main__ as cluster

LAUNCH = Path(cli.__file__).parent
COMMANDS = [
    f"launch.{path.stem}"
    for path in sorted(LAUNCH.glob("*.py"))
    if path.stem != "compile_check" and "__main__" in path.read_text()
]
HEAVY = {"jax", "flax", "optax", "orbax", "grain", "pyarrow", "tiktoken", "matplotlib", "torch", "transformers"}


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
    shape: str = dataclasses.field(default="round", metadata={"name": "as"})
    """Of the loaf."""
    prompt: str = dataclasses.field(default="", metadata={"alias": "-p"})
    """What to say, 100% of it."""

    def __post_init__(self):
        if self.depth > 999_999:
            raise UserError(f"--depth={self.depth}; the oven takes 999999")


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
        (["--as=long"], {"shape": "long"}),
        (["-p", "What is 23 * 7?"], {"prompt": "What is 23 * 7?"}),
        (["-p", "- one\n- two"], {"prompt": "- one\n- two"}),
        (["-p=-1", "--depth=2"], {"prompt": "-1", "depth": 2}),
        (["--prompt=--what-not"], {"prompt": "--what-not"}),
        (["--prompt=a=b --c-d"], {"prompt": "a=b --c-d"}),
        (["--prompt", "a-b"], {"prompt": "a-b"}),
        (["--prompt="], {"prompt": ""}),
    ],
)
def test_flags(args, changed):
    assert cli.parse(Config, args) == dataclasses.replace(Config(), **changed)


@pytest.mark.parametrize(
    "args, message",
    [
        (["--dept", "3"], "unknown flag --dept; did you mean --depth? (--help lists all)"),
        (["--shape=long"], "unknown flag --shape (--help lists all)"),
        (["--dry-runn=1"], "unknown flag --dry_runn; did you mean --dry_run? (--help lists all)"),
        (["-depth=3"], "unknown flag -depth; did you mean --depth? (--help lists all)"),
        (["--no_depth"], "unknown flag --no_depth; did you mean --depth? (--help lists all)"),
        (["--qqqq"], "unknown flag --qqqq (--help lists all)"),
        (["-x", "3"], "unknown flag -x (--help lists all)"),
        (["stray"], "unexpected 'stray': every argument is a flag, --name=value (--help lists all)"),
        (["--depth=twelve"], "--depth: expected a whole number, not 'twelve'"),
        (["--depth", "1.5"], "--depth: expected a whole number, not '1.5'"),
        (["--depth="], "--depth: expected a whole number, not ''"),
        (["--target_flops=lots"], "--target_flops: expected a number, not 'lots'"),
        (["--target_flops=nan"], "--target_flops: expected a number, not 'nan'"),
        (["--depth"], "--depth: expected one argument"),
        (["--prompt", "--depth=3"], "--prompt/-p: expected one argument"),
        (["--dry_run=maybe"], "--dry_run: expected 1 or 0, true or false, not 'maybe'"),
        (["--no_warm=1"], "--no_warm: ignored explicit argument '1'"),
        (["--depth=1000000"], "--depth=1000000; the oven takes 999999"),
    ],
)
def test_wrong_flags_give_one_line_and_exit_2(args, message, capsys):
    assert exit_of(raising(AssertionError("must not run")), args, capsys) == (2, "", f"error: {message}\n")


def test_help_shows_description_and_field_docstrings(capsys):
    code, out, err = exit_of(raising(AssertionError("must not run")), ["--help"], capsys)
    assert (code, err) == (0, "")
    for words in ("Bake a loaf.", "--target_flops NUMBER", "Kneading.", "-p TEXT", "test_cli", "100% of it", "4)"):
        assert words in out
    assert "Serve warm. (default: 1)" in out
    assert "--no_warm" not in out and "--as" in out and "--shape" not in out


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


@pytest.mark.parametrize("python", ["python", None])
def test_commands_in_an_error_run_this_python(python, capsys, monkeypatch):
    """Also one that was made ready to paste before."""
    monkeypatch.setattr(
        cli.shutil, "which", lambda name: python and os.path.join(os.path.dirname(sys.executable), name)
    )
    ready = cli.runnable("python -m launch.download arc")
    err = exit_of(raising(UserError(f"no arc: python -m launch.download arc; or {ready}")), [], capsys)[2]
    assert err == f"error: no arc: {ready}; or {ready}\n" and (python or ready.split()[0] != "python")


@pytest.mark.parametrize(
    "error", [ValueError("ours"), OSError(errno.EIO, "ours"), BrokenPipeError(errno.EPIPE, "a worker's")]
)
def test_other_errors_keep_their_traceback(error):
    with pytest.raises(type(error)) as caught:
        cli.main(Config, raising(error), [])
    assert caught.value is error


def test_input_that_is_not_utf_8_is_read(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8"))
    cli.main(Config, lambda config: print(ascii(input())), [])
    assert capsys.readouterr().out == r"'caf\ufffd'" + "\n"


def test_closed_streams():
    """Input has ended and output is lost, but no file of ours takes their place."""
    script = """
import dataclasses, sys
from launch import cli

@dataclasses.dataclass(frozen=True)
class Config:
    "Write a file."

def run(config):
    print("Plan"), print("lost", file=sys.stderr)
    with open(sys.argv[1], "w") as file:
        file.write(f"{file.fileno() > 2} {sys.stdin.read()!r}")

cli.main(Config, run, [])
"""
    with tempfile.NamedTemporaryFile("r") as file:
        command = 'exec "$@" <&- >&- 2>&-'
        subprocess.run(["sh", "-c", command, "sh", sys.executable, "-c", script, file.name], cwd=ROOT, check=True)
        assert file.read() == "True ''"


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


def test_next_step_gives_the_flags_on(capsys, tmp_path, monkeypatch):
    """Those that are not empty; and the base directory, inside base_directory()."""
    monkeypatch.setenv("JAXCHAT_BASE_DIR", "outer")
    cli.next_step("python -m launch.eat --at=1", data_dir="two words", tasks_dir="")
    assert capsys.readouterr().out.endswith(" -m launch.eat --at=1 --data_dir='two words'\n")
    with cli.base_directory(tmp_path):
        assert os.environ["JAXCHAT_BASE_DIR"] == str(tmp_path)
        cli.next_step("python -m launch.eat")
    assert capsys.readouterr().out.startswith(f"next: JAXCHAT_BASE_DIR={tmp_path} ")
    assert os.environ["JAXCHAT_BASE_DIR"] == "outer"


def test_progress(capsys):
    ready = threading.Event()
    with cli.progress(lambda: ready.set() or "half", 0.001):
        ready.wait()
    assert capsys.readouterr().out.startswith("  half, 0 s\n")


def test_help_of_every_command_imports_nothing_heavy():
    """--help and a mistyped flag answer before jax, Orbax, Grain and their like are imported."""
    script = f"""
import contextlib, importlib, io, sys

for name in {[*COMMANDS, "launch.cluster.__main__"]}:
    for flag, code in (("--help", 0), ("--mistyped", 2)):
        try:
            with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
                importlib.import_module(name).main([flag])
        except SystemExit as stop:
            assert (stop.code or 0) == code, (name, flag, stop.code)
        assert ("usage: " if code == 0 else "unknown flag --mistyped") in out.getvalue() + err.getvalue(), (name, flag)
    heavy = {HEAVY} & set(sys.modules)
    assert not heavy, (name, heavy)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_number_has_its_range(monkeypatch):
    """Flags checks it, for every command; a value outside is one line, whatever the command."""
    classes = [launcher.Config for launcher in cluster.LAUNCHERS.values()]
    monkeypatch.setattr(cli, "main", lambda config_class, *_, **__: classes.append(config_class))
    for name in COMMANDS:
        importlib.import_module(name).main([])
    assert len(classes) == len(COMMANDS) + 4
    for config_class in classes:
        numbers = [field for field in dataclasses.fields(config_class) if field.type in (int, float)]
        assert [field.name for field in numbers if field.metadata.get("least") is None] == [], config_class
        for field in numbers:
            with pytest.raises(UserError, match=rf"--{field.name}=-7(\.0)?; it must be"):
                cli.parse(config_class, [f"--{field.name}=-7"])


@pytest.mark.parametrize(
    "config, flag, most",
    [(command.Config, "temperature=1e300", "100.0") for command in (chat_cli, chat_eval)]
    + [(config, "total_batch_size=1099511627776", "2147483647") for config in (BaseConfig, MidConfig)]
    + [(RLConfig, "temperature=1e300", "100.0")]
    + [(command.Config, "vocab_size=1000000000000", "16777216") for command in (tok_train, check, compile_check)],
)
def test_numbers_that_no_library_takes(config, flag, most):
    with pytest.raises(UserError, match=rf"--{flag.split('=')[0]}=.*; it must be from .* to {most}"):
        cli.parse(config, [f"--{flag}"])


def test_a_terminal_that_lacks_a_character():
    """What it cannot show is replaced: a plan is printed all the same."""
    script = "from launch import cli\nfrom jaxchat.config import MidConfig\n"
    script += "cli.main(MidConfig, lambda config: cli.print_plan('Plan', [('batch', '2 × 3 → 6')]), [])"
    environ = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environ)
    assert (done.stdout, done.stderr) == ("Plan\n  batch  2 ? 3 ? 6\n", "")


def test_a_platform_that_is_not_here(capsys, monkeypatch):
    """JAX_PLATFORMS=cuda where there is no GPU: jax raises in its xla_bridge; any other error of ours stays one."""
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")

    def run(config):
        exec(compile("raise AssertionError", "somewhere/xla_bridge.py", "exec"), {})

    code, out, err = exit_of(run, [], capsys)
    assert (code, out, err.count("\n")) == (2, "", 1) and "JAX_PLATFORMS=cuda" in err and "JAX_PLATFORMS=cpu" in err
    with pytest.raises(AssertionError):
        cli.main(Config, raising(AssertionError("ours")), [])
    monkeypatch.delenv("JAX_PLATFORMS")
    with pytest.raises(AssertionError):
        cli.main(Config, run, [])


@pytest.mark.parametrize("config", [BaseConfig, base_eval.Config, chat_eval.Config, chat_cli.Config, check.Config])
def test_a_platform_that_is_not_here_in_every_command(config, monkeypatch):
    """Where devices are started, the variable is named unless a flag chose the kind of device."""

    def no_devices(**_):
        raise RuntimeError("Unable to initialize backend 'tpu'")

    monkeypatch.setattr(sharding, "make_mesh", no_devices)
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    with pytest.raises(UserError, match="^JAX_PLATFORMS=tpu: no such device can be used here"):
        devices.start_devices(config(), alone=True)
    with pytest.raises(UserError, match="^no cpu device can be used here"):
        devices.start_devices(config(device_type="cpu"), alone=True)
