"""launch.download against a fake hub that drops, stalls, refuses, lies and is killed: all files arrive whole or not."""

import hashlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
import types
import zipfile

import numpy as np
import pytest
from conftest import ROOT
from fake_hub import FakeHub

from jaxchat.config import UserError
from jaxchat.data import hub
from launch import download

REPO = "karpathy/fineweb-edu-100b-shuffle"


def shards(count=4, size=3_000_000):
    random = np.random.default_rng(0)
    return {REPO: {"README.txt": b"hello"} | {f"shard_{i:05d}.parquet": random.bytes(size + i) for i in range(count)}}


@pytest.fixture
def fetch(run_command, home, monkeypatch):
    """fetch(hub, *args, check=True): the command against that hub, with short pauses. -> the CompletedProcess."""
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "1")
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "1")

    def run(server, *args, **how):
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        return run_command("launch.download", *args, **how)

    return run


def assert_whole(folder, files, names):
    assert sorted(path.name for path in folder.iterdir() if path.name[0] != ".") == sorted(names)
    for name in names:
        assert (folder / name).read_bytes() == files[name]


@pytest.mark.parametrize("faults", [["drop", "drop"], ["stall"], ["503", "503"], ["short"], ["long"], ["garbage"]])
def test_every_fault_is_survived(fetch, home, faults):
    files, broken = shards(), "shard_00001.parquet"
    with FakeHub(files, {broken: [*faults], "api": ["503"]}) as server:
        done = fetch(server, "fineweb-edu", "--shards=3")
        assert "all files are there and whole" in done.stdout and "next: " in done.stdout
        assert_whole(home / "base_data", files[REPO], [f"shard_{i:05d}.parquet" for i in range(3)])
        firsts = [first for path, first in server.asked if path == broken]
        assert len(firsts) == len(faults) + 1
        if faults[0] in ("drop", "stall", "short"):
            assert firsts[-1] > 0, "what had come is not asked for again"
        asked = len(server.asked)
        again = fetch(server, "fineweb-edu", "--shards=3")
        assert "3, of which 3 are there and whole" in again.stdout and len(server.asked) == asked


def test_a_range_that_is_ignored(fetch, home):
    files, broken = shards(2), "shard_00000.parquet"
    with FakeHub(files, {broken: ["drop", "whole"]}) as server:
        fetch(server, "fineweb-edu", "--shards=2")
        assert_whole(home / "base_data", files[REPO], [f"shard_{i:05d}.parquet" for i in range(2)])


def test_a_server_that_ignores_ranges_and_always_drops(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "PAUSE", 0.001)
    files, path = shards(1), "shard_00000.parquet"
    with FakeHub(files, {path: ["whole, drop"] * 99}) as server:
        file = hub.File(f"{server.url}/cdn/{REPO}//{path}", tmp_path / path, {}, size=3_000_000, digest="sha256:0")
        with pytest.raises(UserError, match=r"\(5 tries\)"):
            hub.fetch(file, threading.Event())
        assert [first > 0 for _, first in server.asked] == [False] + [True] * (hub.TRIES - 1)


def test_a_flaky_server_may_drop_more_often_than_we_try_without_progress(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "PAUSE", 0.001)
    files, path = shards(1, 9_000_000), "shard_00000.parquet"
    content = files[REPO][path]
    with FakeHub(files, {path: ["drop"] * (hub.TRIES + 1)}) as server:
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        file = hub.File(f"{server.url}/cdn/{REPO}//{path}", tmp_path / path, {}, size=len(content), digest=digest)
        monkeypatch.setattr(hub, "CHUNK", 1 << 10)
        hub.fetch(file, threading.Event())
        assert (tmp_path / path).read_bytes() == content and len(server.asked) == hub.TRIES + 2


def test_killed_and_run_again_it_goes_on_where_it_was(fetch, home, monkeypatch):
    files = shards(2, 24_000_000)
    with FakeHub(files, seconds_a_megabyte=0.05) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        command = [sys.executable, "-m", "launch.download", "fineweb-edu", "--shards=2"]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        part, deadline = home / "base_data/shard_00001.parquet.part", time.monotonic() + 60
        while not part.exists() or part.stat().st_size < 6_000_000:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (home / "base_data/shard_00001.parquet").exists()
        server.pace, before, had = 0.0, len(server.asked), part.stat().st_size
        fetch(server, "fineweb-edu", "--shards=2")
        assert ("shard_00001.parquet", had) in server.asked[before:]
        assert_whole(home / "base_data", files[REPO], ["shard_00000.parquet", "shard_00001.parquet"])


@pytest.mark.slow
def test_a_server_that_never_recovers_is_told_in_one_line(fetch, home):
    files = shards(3)
    with FakeHub(files, {"shard_00001.parquet": ["garbage"] * 99}) as server:
        done = fetch(server, "fineweb-edu", "--shards=3", check=False)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert "shard_00001.parquet: what came has another hash than the hub states (5 tries)" in done.stderr
        assert_whole(home / "base_data", files[REPO], ["shard_00000.parquet", "shard_00002.parquet"])
        done = fetch(server, "climbmix", f"--to={home / 'other'}", check=False)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "HF_ENDPOINT" in done.stderr


def test_damaged_files_are_fetched_anew_and_other_shards_kept(fetch, home):
    files = shards(3)
    files["karpathy/climbmix-400b-shuffle"] = {"shard_00000.parquet": b"other", "shard_00001.parquet": b"ones"}
    with FakeHub(files) as server:
        fetch(server, "fineweb-edu", "--shards=3")
        damaged = home / "base_data/shard_00002.parquet"
        damaged.write_bytes(b"x" * damaged.stat().st_size)
        done = fetch(server, "fineweb-edu", "--shards=3")
        assert "fetched anew  1 that are not what the hub states: shard_00002.parquet" in done.stdout
        assert_whole(home / "base_data", files[REPO], [f"shard_{i:05d}.parquet" for i in range(3)])
        done = fetch(server, "climbmix", "--shards=2", check=False)
        assert done.returncode == 2 and f"holds shards of {REPO}" in done.stderr
        fetch(server, "climbmix", "--shards=2", f"--to={home / 'mix'}")
        assert (home / "mix/shard_00001.parquet").read_bytes() == b"ones"


def test_a_full_disk(fetch, home):
    """/dev/full takes nothing, as a full disk does; and a data set larger than the disk is refused beforehand."""
    with FakeHub(shards(2)) as server:
        (home / "base_data").mkdir()
        (home / "base_data/shard_00001.parquet.part").symlink_to("/dev/full")
        done = fetch(server, "fineweb-edu", "--shards=2", check=False)
        assert done.returncode == 2 and "No space left on device; free some space" in done.stderr
        assert done.stderr.count("\n") == 1 and not (home / "base_data/shard_00001.parquet").exists()
    with pytest.raises(UserError, match=r"1000000.00 GB are still to be fetched .* are free there"):
        hub.check_room([hub.File("", home / "x/y", {}, size=10**15)])


TASK_FILES = {
    "HuggingFaceTB/smol-smoltalk": ["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"],
    "cais/mmlu": ["all/test-00000-of-00001.parquet", "abstract_algebra/test-00000-of-00001.parquet"],
    "openai/gsm8k": ["main/train-00000-of-00001.parquet", "socratic/train-00000-of-00001.parquet"],
    "allenai/ai2_arc": ["ARC-Easy/test-00000-of-00001.parquet", "ARC-Challenge/test-00000-of-00001.parquet"],
    "openai/openai_humaneval": ["openai_humaneval/test-00000-of-00001.parquet"],
}


def test_all_tasks_and_the_core_bundle(home, monkeypatch, capsys):
    """They lie where the tasks look for them; the archive is unpacked, whole or not at all."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("eval_bundle/core.yaml", "icl_tasks: []\n" * 5000)
    plain = {
        "identity_conversations.jsonl": b"[]\n",
        "words_alpha.txt": b"word\n",
        "eval_bundle.zip": packed.getvalue(),
    }
    files = {repo: {path: path.encode() for path in paths} for repo, paths in TASK_FILES.items()} | {"": plain}
    faults = {"eval_bundle.zip": ["garbage", "drop"], "words_alpha.txt": ["503"]}
    with FakeHub(files, faults) as server:
        monkeypatch.setattr(hub, "PAUSE", 0.01)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"  # both are read when it is imported
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        for name in ("identity", "words", "core-bundle"):
            (link,) = download.SETS[name]
            here = hub.Link(f"{server.url}/plain/{link.url.rpartition('/')[2]}", link.path)
            monkeypatch.setitem(download.SETS, name, [here])
        download.main(["all-tasks", "core-bundle"])
        found = {str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()}
        assert found == {
            *("tasks/smoltalk/data/train-00000-of-00001.parquet", "tasks/smoltalk/data/test-00000-of-00001.parquet"),
            *("tasks/mmlu/all/test-00000-of-00001.parquet", "tasks/gsm8k/main/train-00000-of-00001.parquet"),
            *("tasks/arc/ARC-Easy/test-00000-of-00001.parquet", "tasks/arc/ARC-Challenge/test-00000-of-00001.parquet"),
            "tasks/humaneval/openai_humaneval/test-00000-of-00001.parquet",
            *("tasks/identity/identity_conversations.jsonl", "tasks/words/words_alpha.txt", "eval_bundle/core.yaml"),
        }
        assert (home / "tasks/words/words_alpha.txt").read_bytes() == b"word\n"
        asked = len(server.asked)
        download.main(["all-tasks", "core-bundle"])
        assert len(server.asked) == asked


@pytest.mark.parametrize(
    "args, told",
    [
        ([], "what to fetch"),
        (["fineweb"], "did you mean fineweb-edu"),
        (["fineweb-edu", "climbmix"], "name their shards alike"),
        (["fineweb-edu", "--shards=1"], "--shards=1; it must be at least 2"),
    ],
)
def test_wrong_flags(home, args, told, capsys):
    with pytest.raises(SystemExit) as stop:
        download.main(args)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and told in err and err.count("\n") == 1


@pytest.mark.parametrize("path", ["../../outside.parquet", "/tmp/outside.parquet", "data/../../outside.parquet"])
def test_a_hub_that_names_files_outside_is_not_trusted(path, tmp_path, monkeypatch):
    class Api:
        def repo_info(self, *args, **kwargs):
            return types.SimpleNamespace(sha="0" * 40)

        def list_repo_tree(self, *args, **kwargs):
            return [types.SimpleNamespace(path=path, size=1, lfs=None, blob_id="0")]

    monkeypatch.setattr(hub, "HfApi", Api)
    with pytest.raises(UserError, match="outside of its folder"):
        hub.listed(hub.Repo("some/data", ("*.parquet",), "base_data"), tmp_path, 1)
