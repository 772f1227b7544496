"""README.md and docs/: every command parses or runs dry, every name, flag, file, link and picture exists."""

import argparse
import ast
import importlib
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from launch import cli
from launch.cluster import __main__ as cluster

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {path.relative_to(ROOT).as_posix(): path.read_text() for path in PAGES}

# Which tests run each command on a small model and small data; here its lines are only parsed, or run with --dry_run.
RUN_BY = {
    "launch.base_eval": "tests/test_eval_commands.py",
    "launch.base_train": "tests/test_commands.py",
    "launch.chat_cli": "tests/test_commands.py",
    "launch.chat_eval": "tests/test_eval_commands.py",
    "launch.chat_rl": "tests/test_rl_stage.py",
    "launch.chat_sft": "tests/test_commands.py",
    "launch.check": "tests/test_check.py",
    "launch.cluster": "tests/test_local_training.py",
    "launch.compile_check": "tests/test_compile_check.py",
    "launch.convert": "tests/test_convert.py",
    "launch.demo": "tests/test_commands.py",
    "launch.download": "tests/test_download.py",
    "launch.mid_train": "tests/test_commands.py",
    "launch.miniseries": "tests/test_miniseries.py",
    "launch.report": "tests/test_commands.py",
    "launch.serve": "tests/test_serve_command.py",
    "launch.speedrun": "tests/test_speedrun.py",
    "launch.tok_eval": "tests/test_commands.py",
    "launch.tok_train": "tests/test_commands.py",
}
PYTHONS = ("python", "python3", ".venv/bin/python")
# Not ours: only their quoting is checked.
OTHERS = ("cd", "curl", "docker", "gcloud", "git", "kubectl", "source", "sudo", "uv")


def blocks(kind: str) -> list[tuple[str, str]]:
    """(page, text) of every fenced block of a kind such as "sh"."""
    return [(page, body) for page, text in TEXT.items() for body in re.findall(rf"```{kind}\n(.*?)```", text, re.S)]


def commands() -> list[tuple[str, str]]:
    lines = [(page, line) for page, body in blocks("sh") for line in body.replace("\\\n", " ").splitlines()]
    return [(page, line) for page, line in lines if shlex.split(line, comments=True)]


def command_modules() -> set[str]:
    """The modules of launch/ that are commands: those with a `main`."""
    files = [*ROOT.glob("launch/*.py"), *ROOT.glob("launch/*/__main__.py")]
    having = [
        path for path in files if re.search(r"^(def main\(|main = )", path.read_text(), re.M) and path.stem != "cli"
    ]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__") for path in having}


class Parsed(Exception):
    """The flags were read, and nothing ran."""


def parse_flags(module: str, args: list[str], monkeypatch):
    """Let a command read its flags, by its own `main`, and stop it there."""

    def parse_only(config_class, run, args=None, **_):
        cli.parse(config_class, sys.argv[1:] if args is None else args)
        raise Parsed

    def argparse_only(parser, *_):
        known, rest = parser.parse_known_args(sys.argv[1:])
        assert not rest, rest
        raise Parsed

    with monkeypatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(cli, "main", parse_only)
        patch.setattr(argparse.ArgumentParser, "parse_args", argparse_only)
        patch.setattr(sys, "argv", [module, *args])
        if hasattr(imported := importlib.import_module(module), "main"):
            imported.main()
        else:
            runpy.run_path(imported.__file__, run_name="__main__")


def check(words: list[str], monkeypatch):
    """Parse one command, with its own parser; launchers run with --dry_run, and what they start is checked too."""
    first, *rest = words
    if "=" in first.partition("/")[0] and rest:  # NAME=value in front
        check(rest, monkeypatch)
    elif first in PYTHONS and rest[:1] == ["-m"]:
        check_module(rest[1], rest[2:], monkeypatch)
    elif first in PYTHONS:
        assert rest[0] == "-c", "nothing but python -m and python -c"
        ast.parse(rest[1])
    elif first == "make":
        subprocess.run(["make", "-n", "-C", ROOT, *rest], check=True, capture_output=True)
        check_extras(re.findall(r"EXTRAS=(\S+)", " ".join(rest)))
    elif first == "pip":
        assert rest[:4] == ["install", "-c", "constraints.txt", "-e"], "what is installed is pinned"
        check_extras(re.findall(r"\.\[(.*)\]", rest[4]))
    elif first == "bash":
        subprocess.run(["bash", "-n", ROOT / rest[0]], check=True)
    else:
        assert first in OTHERS, f"nothing checks {first!r}"


def check_extras(lists: list[str]):
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {name for names in lists for name in names.split(",")} <= set(known)


def check_module(module: str, args: list[str], monkeypatch):
    if module == "launch.cluster":
        cluster.main([args[0], "--dry_run", *args[1:]])
        while "--" in args:  # several commands run in turn
            args = args[args.index("--") + 1 :]
            check(args[: args.index("--")] if "--" in args else args, monkeypatch)
    elif module.startswith(("launch.", "bench.")):
        parse_flags(module, args, monkeypatch)
    else:
        assert module in ("venv", "scripts.base_train")  # the second is nanochat's


@pytest.mark.parametrize("page, line", commands())
def test_command(page, line, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)  # nothing is written, or else not here
    monkeypatch.setenv("JAXCHAT_BASE_DIR", str(tmp_path))
    check(shlex.split(line, comments=True), monkeypatch)
    assert not list(tmp_path.iterdir())


def test_a_wrong_command_is_found(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for line in (
        "python -m launch.base_train --deepth=4",
        "python -m launch.no_such_command",
        "python -m launch.cluster local --processes=2 -- python -m launch.base_train --deepth=4",
        "make nothing",
        "make setup EXTRAS=cuda99",
        "pip install jaxchat",
        "bash bench/nothing.sh",
        "rm -rf .",
    ):
        with pytest.raises(Exception):  # noqa: B017 - each its own kind
            check(shlex.split(line), monkeypatch)


def test_every_command_is_documented_and_run_by_a_test():
    assert set(RUN_BY) == command_modules()
    used = {word for _, line in commands() for word in shlex.split(line, comments=True) if word.startswith("launch.")}
    assert set(RUN_BY) - used == {"launch.demo"}  # make demo
    assert [name for name in RUN_BY if f"`{name}`" not in TEXT["README.md"]] == []
    for module, path in RUN_BY.items():
        name = module.removeprefix("launch.")
        assert re.search(rf"launch\.{name}|from launch import .*\b{name}\b", (ROOT / path).read_text()), path


def test_setup_installs_extras_that_are_asked_for_later(tmp_path):
    """`make demo` installs the extra dev; `make setup EXTRAS=cuda13` after it has something to do."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / ".installed-dev").touch()
    for extras, installs in (("dev", False), ("cuda13", True)):
        words = ["make", "-n", "-C", ROOT, "setup", f"VENV={tmp_path}", f"PYTHON={sys.executable}", f"EXTRAS={extras}"]
        done = subprocess.run(words, check=True, capture_output=True, text=True)
        assert (f".[{extras}]" in done.stdout) == installs


def test_python_blocks_parse():
    for page, body in blocks("python"):
        compile(body, page, "exec")


def all_flags() -> set[str]:
    """The names of all flags: fields of every configuration, and of argparse's in bench/."""
    flags = set()
    for path in [*ROOT.glob("jaxchat/config.py"), *ROOT.glob("launch/**/*.py"), *ROOT.glob("bench/*.py")]:
        text = path.read_text()
        flags |= set(re.findall(r"^    (\w+): ", text, re.M)) | set(re.findall(r'name"?[=:] ?"(\w+)"', text))
        flags |= set(re.findall(r'"--(\w+)"', text))
    return flags | {"help"}


@pytest.mark.parametrize("page", TEXT)
def test_flags_and_files_that_the_text_names_exist(page):
    text = TEXT[page]
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    code = [words for words in re.findall(r"`([^`\n]+)`", prose) if words.split()[0] not in OTHERS]
    flags = {name for words in code for name in re.findall(r"(?<![\w-])--(\w+)", words)}
    assert flags - all_flags() == set()
    for words in code:
        if found := re.fullmatch(r"((?:jaxchat|launch|tests|bench|docs|dev)/[\w/.]*)(?:: (\w+))?", words):
            path, name = ROOT / found[1], found[2]
            assert path.exists(), f"{page} names {words}"
            assert not name or re.search(rf"^(def|class) {name}\b|^{name}\b.*=", path.read_text(), re.M), words
        if found := re.fullmatch(r"(?:python -m )?((?:launch|bench)\.\w+)", words):
            assert (ROOT / (found[1].replace(".", "/") + ".py")).exists() or (
                ROOT / found[1].replace(".", "/")
            ).is_dir()
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("https://") or (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"


def test_pictures_are_shown():
    linked = {target.rpartition("/")[2] for text in TEXT.values() for target in re.findall(r"\]\((\S+\.png)\)", text)}
    assert linked == {path.name for path in (ROOT / "docs").glob("*.png")}


def test_the_readme_is_short():
    assert len(TEXT["README.md"].splitlines()) <= 130


def test_each_page_begins_with_its_command():
    for page, text in TEXT.items():
        if page.startswith("docs/"):
            assert re.match(r"# .+\n\n```sh\n(make|python -m|pip) ", text), page
