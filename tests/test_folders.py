"""Where files are kept: addresses and a missing home are refused, and what a kill left in the compilation cache."""

import subprocess
import sys
from pathlib import Path

import jax
import pytest
from conftest import ROOT

from jaxchat import sharding
from jaxchat.config import BaseConfig, MidConfig, UserError, base_dir, check_local
from jaxchat.data.sources import find_shards, open_parquet
from jaxchat.data.tasks import load_task
from jaxchat.eval.core import load_bundle
from launch import base_eval, chat_cli, chat_eval, check, cli, convert, download, tok_eval, tok_train


@pytest.mark.parametrize(
    "path, advice",
    [("gs://bucket/x", "mount it.*gcsfuse.* bucket FOLDER"), ("gs:/bucket/x", "gcsfuse.* bucket FOLDER")]
    + [("tasks/a,gs://b/c", "gcsfuse.* b FOLDER"), ("s3://b", "mount it or copy it"), (" hf://datasets/x", "copy it")]
    + [("file:///data", "give the path after it alone"), ("https://x.org/a", "mount it or copy it")]
    + [("dbfs:/mnt/x", "mount it or copy it"), ("hdfs:/x", "copy it"), ("FILE:/x", "give the path after it alone")],
)
def test_an_address_is_no_folder(monkeypatch, path, advice):
    with pytest.raises(UserError, match=f"--data_dir=.*{advice}"):
        check_local("--data_dir", path)
    if "," not in path:
        monkeypatch.setenv("JAXCHAT_BASE_DIR", path)
        with pytest.raises(UserError, match=f"JAXCHAT_BASE_DIR=.*{advice}"):
            base_dir()


def test_a_path_that_is_not_utf8(monkeypatch):
    monkeypatch.setenv("JAXCHAT_BASE_DIR", "/tmp/b\udcff")
    with pytest.raises(UserError, match="JAXCHAT_BASE_DIR=.*not UTF-8.*rename it"):
        base_dir()
    for flag in ("data_dir", "tasks_dir", "train_tasks"):
        with pytest.raises(UserError, match=f"--{flag}=.*not UTF-8.*rename it"):
            cli.parse(BaseConfig if flag == "data_dir" else MidConfig, [f"--{flag}=/tmp/b\udcff"])
    with pytest.raises(UserError, match="file='/tmp/b.*not UTF-8.*rename it"):
        open_parquet(Path("/tmp/b\udcff.parquet"), ["text"])


@pytest.mark.parametrize(
    "config, flag",
    [(BaseConfig, "data_dir"), (BaseConfig, "eval_bundle"), (MidConfig, "train_tasks"), (MidConfig, "val_tasks")]
    + [(chat_eval.Config, "tasks_dir"), (download.Config, "to"), (convert.Config, "out"), (convert.Config, "path")],
)
def test_flags_that_name_paths_refuse_addresses(config, flag):
    with pytest.raises(UserError, match=f"--{flag}=gs://b/x: an address"):
        cli.parse(config, [f"--{flag}=gs://b/x"])


def test_other_flags_take_addresses():
    assert cli.parse(chat_cli.Config, ["-p", "what is https://x.org ?"]).prompt == "what is https://x.org ?"


@pytest.mark.parametrize("path", ["", "C:/x", "/mnt/gs:/x", "a:3,b.jsonl", "my models [1] 50% é"])
def test_folders_are_taken(path):
    check_local("--data_dir", path)


def test_no_home(monkeypatch):
    monkeypatch.delenv("JAXCHAT_BASE_DIR", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])
    with pytest.raises(UserError, match="set HOME, or JAXCHAT_BASE_DIR"):
        base_dir()


COMPILE = """
import jax
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
from jaxchat.sharding import keep_compiled
keep_compiled()
jax.jit(lambda x: x * 3 + 1)(1.0)
"""


@pytest.mark.parametrize("bounded", [True, False])
def test_an_entry_without_its_time_stamp_stops_no_caching(home, monkeypatch, bounded):
    """What a kill or a full disk leaves in the compilation cache; a cache without a bound has no time stamps at all."""
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_MAX_SIZE"):
        monkeypatch.delenv(name)
    if not bounded:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(home / "compiled"))
    (home / "compiled").mkdir()
    (home / "compiled/broken-cache").write_bytes(b"x")
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, check=True, capture_output=True, text=True)
    names = {path.name for path in (home / "compiled").iterdir()}
    assert ("broken-cache" in names) != bounded and not done.stderr
    assert any(name.endswith("-atime") for name in names) == bounded and any("jit" in name for name in names)


def test_damaged_entries_are_replaced(home, monkeypatch):
    """A power cut leaves them empty or cut short, with their time stamps; a folder may have such a name too."""
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_MAX_SIZE"):
        monkeypatch.delenv(name)
    compiled = home / "compiled"
    compiled.symlink_to(home / "elsewhere")  # a folder that is not there
    (home / "elsewhere/folder-cache").mkdir(parents=True)
    script = f"{COMPILE}\nfrom pathlib import Path\npaths = [*Path({str(compiled)!r}).glob('jit*-cache')]\n"
    script += "for n, path in enumerate(paths):\n    path.write_bytes(path.read_bytes()[:9 * n])\n"
    script += "jax.clear_caches()\njax.jit(lambda x: x * 3 + 1)(1.0)\n"
    script += "assert paths and all(path.stat().st_size > 99 for path in paths)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and compiled.is_dir()


def test_a_cache_that_cannot_be_written_is_left_out(home, capfd):
    (home / "compiled").touch()
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(home / "compiled"))
    try:
        sharding.keep_compiled()
        assert not jax.config.jax_enable_compilation_cache
        assert "cannot be kept in" in (err := capfd.readouterr().err) and err.count("\n") == 1
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        jax.config.update("jax_enable_compilation_cache", True)


@pytest.mark.parametrize("home", ["", "somewhere"])
@pytest.mark.parametrize(
    "asked",
    [base_dir, lambda: find_shards("~/text", "val"), lambda: load_task("~/mine.jsonl"), lambda: load_bundle("~/core")]
    + [lambda: load_task("GSM8K", "~/tasks"), lambda: download.place("tasks", "~/x")],
)
def test_a_home_that_is_no_full_path(monkeypatch, home, asked):
    """Else an empty HOME would make ~/.cache the folder /.cache."""
    monkeypatch.delenv("JAXCHAT_BASE_DIR", raising=False)
    monkeypatch.setenv("HOME", home)
    with pytest.raises(UserError, match=f"^~/.*: HOME='{home}' is not an absolute path; set HOME, or JAXCHAT_BASE_DIR"):
        asked()


@pytest.mark.parametrize(
    "config, flag",
    [(BaseConfig, "data_dir"), (MidConfig, "tasks_dir"), (chat_eval.Config, "tasks_dir"), (check.Config, "tasks_dir")]
    + [(tok_train.Config, "data_dir"), (tok_eval.Config, "data_dir"), (base_eval.Config, "data_dir")]
    + [(convert.Config, "out"), (convert.Config, "path")],
)
def test_a_file_is_no_folder(tmp_path, monkeypatch, config, flag):
    (tmp_path / "x.parquet").touch()
    monkeypatch.chdir(tmp_path)
    for path, parent in ((tmp_path / "x.parquet", tmp_path), ("x.parquet", ".")):
        with pytest.raises(UserError, match=rf"^--{flag}={path} is a file; give a folder, .*: --{flag}={parent}$"):
            cli.parse(config, [f"--{flag}={path}"])
    with pytest.raises(UserError, match=r"--to=x.parquet is a file"):
        cli.parse(download.Config, ["--what=words", "--to=x.parquet"])
    monkeypatch.setenv("JAXCHAT_BASE_DIR", "x.parquet")
    with pytest.raises(UserError, match=r"JAXCHAT_BASE_DIR=x.parquet is a file"):
        base_dir()
