"""launch.download against a fake hub with faults: files arrive complete or not at all, and only what belongs there."""

import errno
import fcntl
import io
import os
import socket
import subprocess
import sys
import threading
import time
import zipfile
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from fake_hub import COMMITS, FakeHub

from jaxchat.data import hub
from jaxchat.data.sources import SOURCE, file_fingerprint
from jaxchat.tokenizer import Tokenizer
from launch import download

FINEWEB, CLIMBMIX = "karpathy/fineweb-edu-100b-shuffle", "karpathy/climbmix-400b-shuffle"


def shards(count=3, size=300_000):
    random = np.random.default_rng(0)
    return {
        FINEWEB: {"README.txt": b"hello"} | {f"shard_{i:05d}.parquet": random.bytes(size + i) for i in range(count)}
    }


@pytest.fixture
def slept(monkeypatch) -> list[float]:
    """Pauses take no time; -> how long they would have been."""
    found = []
    monkeypatch.setattr(hub.time, "sleep", found.append)
    return found


@pytest.fixture
def fetch(home, monkeypatch, capsys, slept):
    """fetch(server, *args): the command against that hub. -> (exit code, stdout, stderr)."""

    def run(server, *args):
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"  # both are read when it is imported
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        capsys.readouterr()
        code = 0
        try:
            download.main([*args])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name[0] != ".")


def assert_complete(folder, files, count):
    assert names(folder) == [f"shard_{i:05d}.parquet" for i in range(count)]
    for name in names(folder):
        assert (folder / name).read_bytes() == files[name]


@pytest.mark.parametrize("faults", [["drop", "drop"], ["503"] * 3, ["429"] * 8, ["garbage"]], ids=lambda f: f[0])
def test_every_fault_is_survived(fetch, home, faults):
    """Eight 429 without Retry-After are more than the library waits for."""
    files, broken = shards(), "shard_00001.parquet"
    with FakeHub(files, {broken: [*faults], "api": ["503"]}) as server:
        code, out, _ = fetch(server, "fineweb-edu", "--shards=3")
        assert code == 0 and "all files are complete" in out, out
        assert_complete(home / "base_data", files[FINEWEB], 3)
        assert (home / "base_data" / SOURCE).read_text() == f"{FINEWEB} 3 {COMMITS[0]}\n"
        assert server.asked.count(broken) == len(faults) + 1
        asked = len(server.asked)
        code, out, _ = fetch(server, "fineweb-edu", "--shards=3")
        assert code == 0 and "3 of 3 files" in out and len(server.asked) == asked


def test_a_server_that_never_recovers(fetch, home, slept, monkeypatch):
    """One line at the end; the other files are there. What can't be is not tried again."""
    files = shards()
    with FakeHub(files, {"shard_00001.parquet": ["garbage"] * 99}) as server:
        code, _, err = fetch(server, "fineweb-edu", "--shards=3")
        assert code == 2 and "differ from the hub's (shard_00001.parquet) (10 attempts)" in err.splitlines()[-1]
        assert names(home / "base_data") == ["shard_00000.parquet", "shard_00002.parquet"]
        assert sum(slept) > 300
        slept.clear()
        code, _, err = fetch(server, "climbmix", f"--to={home / 'other'}")
        assert code == 2 and "HF_ENDPOINT" in err and not slept
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        code, _, err = fetch(server, "gsm8k")
        assert code == 2 and "HF_HUB_OFFLINE" in err and not slept


@pytest.mark.parametrize("name, what", [("gsm8k", "openai/gsm8k"), ("words", "words_alpha.txt")])
def test_a_server_that_is_not_there(fetch, slept, monkeypatch, name, what):
    """Every attempt says what comes: the pause, the attempts that are left, and the longest wait in all."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        nobody = SimpleNamespace(url=f"http://localhost:{free.getsockname()[1]}")
        monkeypatch.setitem(download.SETS, "words", hub.Link(f"{nobody.url}/words", download.SETS["words"].path))
        code, _, err = fetch(nobody, name)
    *tries, end = err.splitlines()
    assert code == 2 and slept == [*hub.PAUSES] and len(tries) == len(slept)
    left = sum(slept)
    for number, (line, pause) in enumerate(zip(tries, slept, strict=True), 2):
        again = f"trying again in {pause} s (attempt {number} of 10, for {left} s at most)"
        assert line.startswith(f"{what}: ") and "refused" in line and line.endswith(again)
        left -= pause
    assert end.startswith(f"error: {what}: ") and "(10 attempts); check the network, HF_ENDPOINT" in end


def test_progress_of_a_link(tmp_path, monkeypatch, capsys):
    """Its size is not known; nothing is printed before something has come."""
    monkeypatch.setattr(hub, "SHOW", 0.01)
    path, part = tmp_path / "words", tmp_path / "words.part"

    def work():
        while "MB" not in (text := capsys.readouterr().out):
            part.write_bytes(bytes(20_000))
        assert text.startswith("0.02 MB, ")

    hub.show_progress(work, [], [path])


@pytest.mark.filterwarnings("ignore:flock not supported")
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_flock(fetch, home, monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with FakeHub(shards()) as server:
        assert fetch(server, "fineweb-edu", "--shards=2")[0] == 0


def test_killed_and_run_again(fetch, home, monkeypatch):
    """It continues with the files that are lacking."""
    files = shards(2, 6_000_000)
    with FakeHub(files, seconds_a_megabyte=0.1) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        command = [sys.executable, "-m", "launch.download", "fineweb-edu", "--shards=2", "--parallel=1"]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        while len(server.asked) < 2:
            assert process.poll() is None
            threading.Event().wait(0.02)
        process.kill()
        process.wait()
        assert names(home / "base_data") == ["shard_00000.parquet"]
        (partial,) = (home / "base_data").rglob("*.incomplete")
        os.utime(partial, (0, 0))
        server.pace = 0.0
        assert fetch(server, "fineweb-edu", "--shards=2")[0] == 0
        assert server.asked[2:] == ["shard_00001.parquet"] and not partial.exists()
        assert_complete(home / "base_data", files[FINEWEB], 2)


def test_a_later_run_takes_the_same_commit(fetch, home):
    """More shards, a damaged one: of the commit that is recorded, until --revision names another."""
    files = shards()
    with FakeHub(files) as server:
        fetch(server, "fineweb-edu", "--shards=2")
        server.newest = COMMITS[1]
        damaged = home / "base_data/shard_00001.parquet"
        damaged.write_bytes(b"x" * damaged.stat().st_size)
        later = time.time() + 60
        os.utime(damaged, (later, later))
        assert fetch(server, "fineweb-edu", "--shards=3")[0] == 0
        assert_complete(home / "base_data", files[FINEWEB], 3)
        assert server.asked.count("shard_00000.parquet") == 1
        assert (home / "base_data" / SOURCE).read_text().split()[1:] == ["3", COMMITS[0]]
        assert fetch(server, "fineweb-edu", "--shards=2", "--revision=main")[0] == 0
        assert (home / "base_data" / SOURCE).read_text().split()[1:] == ["2", COMMITS[1]]


def test_other_files_are_not_mixed_in(fetch, home):
    files = shards() | {CLIMBMIX: {"shard_00000.parquet": b"other", "shard_00001.parquet": b"ones"}}
    folder = home / "base_data"
    folder.mkdir()
    with FakeHub(files) as server:
        for name in ("mine.parquet", "shard_00000.parquet"):
            (folder / name).write_bytes(b"my own")
            code, _, err = fetch(server, "fineweb-edu", "--shards=2")
            assert code == 2 and f"1 files that are not of {FINEWEB} ({name})" in err
            (folder / name).unlink()
        (folder / "shard_00000.parquet").write_bytes(files[FINEWEB]["shard_00000.parquet"])  # the very same is kept
        (folder / "._shard_00000.parquet").write_bytes(b"macOS")
        assert fetch(server, "fineweb-edu", "--shards=2")[0] == 0
        assert server.asked == ["shard_00001.parquet"]
        code, _, err = fetch(server, "climbmix", "--shards=2")
        assert code == 2 and f"holds files of {FINEWEB}" in err
        assert fetch(server, "climbmix", "--shards=2", f"--to={home / 'mix'}")[0] == 0
        assert (home / "mix/shard_00001.parquet").read_bytes() == b"ones"


def test_a_full_disk(fetch, home, monkeypatch, slept):
    """It is refused beforehand, or ends at once."""
    with FakeHub(shards()) as server:
        monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 1000}))
        code, _, err = fetch(server, "fineweb-edu", "--shards=2")
        assert code == 2 and "needs 0.60 MB of disk space, and 0.00 MB are free there; free some, ask for fewer" in err
    with pytest.raises(OSError, match="No space left"):
        hub.retry("x", lambda: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
    assert not slept


def test_a_file_where_the_folder_should_be(fetch, home, slept):
    """What the network has no part in is not tried again."""
    (home / "taken").write_text("x")
    with FakeHub(shards()) as server:
        code, _, err = fetch(server, "words", f"--to={home / 'taken'}")
    assert code == 2 and "taken" in err and "trying again" not in err
    with pytest.raises(FileExistsError):
        hub.retry("x", (home / "taken").mkdir)
    assert not slept


TASK_FILES = {
    "HuggingFaceTB/smol-smoltalk": ["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"],
    "cais/mmlu": ["all/test-00000-of-00001.parquet", "abstract_algebra/test-00000-of-00001.parquet"],
    "openai/gsm8k": ["main/train-00000-of-00001.parquet", "socratic/train-00000-of-00001.parquet"],
    "allenai/ai2_arc": ["ARC-Easy/test-00000-of-00001.parquet", "ARC-Challenge/test-00000-of-00001.parquet"],
    "openai/openai_humaneval": ["openai_humaneval/test-00000-of-00001.parquet"],
}


def test_all_tasks_and_the_core_bundle(fetch, home, monkeypatch):
    """They are where the tasks look for them. A bundle is unpacked completely; an empty folder is none."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("eval_bundle/core.yaml", "icl_tasks: []\n" * 5000)
        archive.writestr("eval_bundle/eval_meta_data.csv", "Eval Task\n")
        archive.writestr("eval_bundle/eval_data/a.jsonl", "{}\n")
    plain = {
        "identity_conversations.jsonl": b"[]\n",
        "words_alpha.txt": b"word\n",
        "eval_bundle.zip": packed.getvalue(),
    }
    files = {repo: {path: path.encode() for path in paths} for repo, paths in TASK_FILES.items()} | {"": plain}
    faults = {"eval_bundle.zip": ["garbage", "drop"], "words_alpha.txt": ["503"]}
    (home / "eval_bundle").mkdir()
    with FakeHub(files, faults) as server:
        for name in ("identity", "words", "core-bundle"):
            link = download.SETS[name]
            here = hub.Link(f"{server.url}/plain/{link.url.rpartition('/')[2]}", link.path, link.needs)
            monkeypatch.setitem(download.SETS, name, here)
        assert fetch(server, "all-tasks", "core-bundle")[0] == 0
        paths = (path.relative_to(home) for path in home.rglob("*") if path.is_file() and path.name != SOURCE)
        assert {path.as_posix() for path in paths if ".cache" not in path.parts} == {
            *("tasks/smoltalk/data/train-00000-of-00001.parquet", "tasks/smoltalk/data/test-00000-of-00001.parquet"),
            *("tasks/mmlu/all/test-00000-of-00001.parquet", "tasks/gsm8k/main/train-00000-of-00001.parquet"),
            *("tasks/arc/ARC-Easy/test-00000-of-00001.parquet", "tasks/arc/ARC-Challenge/test-00000-of-00001.parquet"),
            "tasks/humaneval/openai_humaneval/test-00000-of-00001.parquet",
            *("tasks/identity/identity_conversations.jsonl", "tasks/words/words_alpha.txt"),
            *("eval_bundle/core.yaml", "eval_bundle/eval_meta_data.csv", "eval_bundle/eval_data/a.jsonl"),
        }
        assert (home / "tasks/words/words_alpha.txt").read_bytes() == b"word\n"
        assert (home / "tasks/mmlu" / SOURCE).read_text() == f"cais/mmlu 1 {download.SETS['mmlu'].commit}\n"
        asked = len(server.asked)
        code, out, _ = fetch(server, "all-tasks", "core-bundle")
        assert code == 0 and len(server.asked) == asked and "next:" not in out
        (home / "eval_bundle/core.yaml").unlink()
        code, _, err = fetch(server, "core-bundle")
        assert code == 2 and "eval_bundle is incomplete: it has no core.yaml" in err


def test_a_link_that_leads_to_something_else(fetch, home, monkeypatch):
    """An empty file, or another archive: neither is kept, nor called complete."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("eval_bundle/readme", "moved")
    with FakeHub({"": {"words": b"", "core-bundle": packed.getvalue()}}) as server:
        for name, words in (
            ("words", "sent an empty file"),
            ("core-bundle", "is not the expected archive: it has no core.yaml"),
        ):
            link = download.SETS[name]
            monkeypatch.setitem(download.SETS, name, hub.Link(f"{server.url}/plain/{name}", link.path, link.needs))
            code, out, err = fetch(server, name)
            assert code == 2 and f"{words} (10 attempts)" in err.splitlines()[-1] and "all files" not in out
            assert not [path for path in home.rglob("*") if path.is_file()]


def test_the_next_command(fetch, home):
    """base_train only with a tokenizer that was trained on this text."""
    shard, folder = io.BytesIO(), home / "my text"
    pq.write_table(pa.table({"text": ["some text"]}), shard)
    tokenizer = Tokenizer({bytes([byte]): byte for byte in range(256)})
    with FakeHub({FINEWEB: {f"shard_{i:05d}.parquet": shard.getvalue() for i in range(2)}}) as server:

        def hint() -> str:
            return fetch(server, "fineweb-edu", "--shards=2", f"--to={folder}")[1]

        assert f"-m launch.tok_train --data_dir='{folder}'\n" in hint()
        for other in ({}, {"shard_00000.parquet": "0123"}):  # not recorded; the demo's, say
            tokenizer.trained_on = other
            tokenizer.save()
            assert "was not trained on this text" in (out := hint()) and "-m launch.tok_train" in out
        tokenizer.trained_on = {"x": file_fingerprint(folder / "shard_00000.parquet")}
        tokenizer.save()
        assert f"-m launch.base_train --data_dir='{folder}'\n" in hint()


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "no data set was named"),
        (["fineweb"], "did you mean fineweb-edu"),
        (["fineweb-edu", "climbmix"], "shards of the same names"),
        (["fineweb-edu", "--shards=1"], "--shards=1; it must be at least 2"),
        (["all-tasks", "--revision=main"], "--revision=main needs one data set"),
        (["words", "--revision=main"], "--revision=main needs one data set"),
    ],
)
def test_wrong_flags(home, args, message, capsys):
    with pytest.raises(SystemExit) as stop:
        download.main(args)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize("path", ["../../outside.parquet", "/tmp/outside.parquet", "data/../../outside.parquet"])
def test_a_hub_that_names_files_outside_is_not_trusted(fetch, path):
    with FakeHub({FINEWEB: {path: b"x"}}) as server:
        code, _, err = fetch(server, "fineweb-edu", "--shards=2")
        assert code == 2 and "outside of its folder" in err
