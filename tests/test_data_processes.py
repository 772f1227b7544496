"""Batches are the same, bit for bit, whatever the number of processes and workers; real processes, at 200 steps."""

import contextlib
import functools
import json
import os
import re
import select
import shutil
import socket
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, THOROUGH, xla_flags

from jaxchat import sharding
from jaxchat.config import UserError
from jaxchat.data.sources import ParquetText
from jaxchat.tokenizer import Tokenizer
from launch import base_train

STEPS, SAVE_AT = 200, 77
MICRO_ROWS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory, shared_data):
    """Real text in four shards of unequal sizes with small row groups, conversations, and a tokenizer."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "base_data").mkdir()
    texts = ParquetText([shared_data / "pretrain" / "shard_00002.parquet"])
    texts = [texts[i][: 200 + 97 * i % 3000] for i in range(600)]
    for n, (first, end) in enumerate([(0, 13), (13, 300), (300, 310), (310, 600)]):
        table = pa.table({"text": texts[first:end] + [""] * 3})
        pq.write_table(table, folder / f"base_data/{n}.parquet", row_group_size=40)
    rows = pq.read_table(shared_data / "smoltalk/data/test-00000.parquet")["messages"].to_pylist()[:350]
    lines = [json.dumps(row) for row in rows] + [json.dumps(text[:500]) for text in texts[:100]]
    (folder / "talk.jsonl").write_text("\n".join(lines))
    Tokenizer.train(iter(texts), 700).save(folder / "tokenizer")
    return folder


class Processes:
    """Real processes that make batches. They start when they are needed, and take one order after another."""

    def __init__(self, folder):
        self.folder, self._running, self._stack = folder, [], contextlib.ExitStack()

    def _start(self):
        command = [sys.executable, str(ROOT / "tests/data_process.py")]
        env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        errors = self._stack.enter_context((self.folder / f"errors-{len(self._running)}.txt").open("w+"))
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors, "text": True}
        process = self._stack.enter_context(subprocess.Popen(command, cwd=ROOT, env=env, **pipes))
        self._running.append((process, errors))

    def make(self, specs: list[dict]):
        """Let each process make the batches of one spec, at the same time."""
        while len(self._running) < len(specs):
            self._start()
        for (process, _), spec in zip(self._running, specs, strict=False):
            process.stdin.write(json.dumps(spec) + "\n")
            process.stdin.flush()
        for process, errors in self._running[: len(specs)]:
            said, _, _ = select.select([process.stdout], [], [], 240)
            if not said or process.stdout.readline() != "done\n":
                process.kill()
                errors.seek(0)
                pytest.fail(errors.read()[-3000:] or "no batches within 240 seconds")

    def close(self):
        self._stack.close()  # at the end of its stdin a process ends


@pytest.fixture(scope="module")
def processes(folder):
    with contextlib.closing(Processes(folder)) as running:
        yield running


def run(processes, pipeline, count, workers, *, steps=STEPS, state=None):
    """-> (the arrays of all processes put together by name, the state after SAVE_AT steps of all of them)."""
    specs, outs = [], []
    for process in range(count):
        share = [process * MICRO_ROWS // count, (process + 1) * MICRO_ROWS // count]
        outs.append(processes.folder / f"{pipeline}-{count}-{workers}-{process}-{steps}.npz")
        spec = {"pipeline": pipeline, "folder": str(processes.folder), "share": share, "workers": workers}
        specs.append(spec | {"steps": steps, "state": state, "save_at": SAVE_AT, "out": str(outs[-1])})
    processes.make(specs)
    parts = [np.load(out) for out in outs]
    arrays = {}
    for name in parts[0].files:
        arrays[name] = np.concatenate([part[name] for part in parts], axis=1)
        if ".total_" in name:
            arrays[name] = arrays[name].sum()
    states = [json.loads(out.with_suffix(".json").read_text()) or {} for out in outs]
    return arrays, {name: value for state in states for name, value in state.items()}


@pytest.fixture(scope="module")
def alone(processes):
    """alone(pipeline): what run returns for one process without workers, computed once."""
    return functools.cache(lambda pipeline: run(processes, pipeline, 1, 0))


def assert_same(got, want, *, later=0):
    """The steps of `got` are those of `want`, `later` steps on."""
    for name, array in got.items():
        step, _, what = name.partition(".")
        np.testing.assert_array_equal(array, want[f"{int(step) + later}.{what}"], strict=True, err_msg=name)


# Each worker imports Grain, so CI has few of them: base with workers is test_two_processes_with_a_worker_each, and of
# the others one goes on with workers, one begins with them.
ALL = [(processes, workers) for processes in (1, 2, 4) for workers in (0, 1, 2)][1:]
SPLITS = {"base": ALL, "bestfit": [(2, 1), (4, 0)], "mid": ALL} if THOROUGH else {"bestfit": [(4, 0)], "mid": [(1, 2)]}
SPLITS |= {name: [(2, 0), (4, 0)] if THOROUGH else [(4, 0)] for name in ("sft", "sft_packed")}
AFTERWARDS = dict.fromkeys(SPLITS, [(1, 0), (4, 0), (2, 1)] if THOROUGH else [(2, 0)]) | {"bestfit": [(2, 1)]}


@pytest.mark.slow
def test_two_processes_with_a_worker_each(processes, alone):
    """The next test for base, in the fast suite."""
    want, state = alone("base")
    got, other = run(processes, "base", 2, 1)
    assert got.keys() == want.keys() and other == state
    assert_same(got, want)
    resumed, _ = run(processes, "base", 4, 0, steps=30, state=state)
    assert_same(resumed, want, later=SAVE_AT)


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", SPLITS)
def test_the_same_on_any_number_of_processes_and_workers(processes, alone, folder, pipeline):
    want, state = alone(pipeline)
    assert len(json.dumps(state)) < 64 * 1024
    for count, workers in SPLITS[pipeline]:
        got, other = run(processes, pipeline, count, workers)
        assert got.keys() == want.keys()
        assert_same(got, want)
        assert other == state
    for count, workers in AFTERWARDS[pipeline]:
        resumed, _ = run(processes, pipeline, count, workers, steps=30, state=state)
        assert_same(resumed, want, later=SAVE_AT)
    if pipeline == "mid":
        left = [want[f"{step}.total_left"] for step in range(STEPS)]
        assert left[0] > 0 and left[-1] == 0, "the steps are to go over the end of the pass"
        assert want[f"{STEPS - 1}.total_targets"] == 0
        assert_one_pass(folder, want)


def assert_one_pass(folder, arrays):
    """The targets are the tokens of all rows of the file, each once, but for the first of each of the 12 streams."""
    tokenizer = Tokenizer.load(folder / "tokenizer")
    tokens = []
    for row in map(json.loads, (folder / "talk.jsonl").read_text().split("\n")):
        if isinstance(row, str):
            tokens += [tokenizer.bos, *tokenizer.encode(row)]
        else:
            tokens += tokenizer.render_conversation({"messages": row})[0]
    targets = [arrays[f"{step}.targets"][arrays[f"{step}.weights"] > 0] for step in range(STEPS)]
    missing = np.bincount(tokens, minlength=tokenizer.vocab_size)
    missing -= np.bincount(np.concatenate(targets), minlength=tokenizer.vocab_size)
    assert missing[tokenizer.bos] == 12 and missing.sum() == 12


class Elsewhere:
    """A second process, which was given other facts."""

    def __init__(self, monkeypatch, **others):
        monkeypatch.setattr(sharding, "gather_json", lambda facts: [facts, facts, facts | others])


@pytest.mark.parametrize(
    "facts, others, words",
    [
        (
            {"data": {"0.parquet": "ab", "1.parquet": "cd"}},
            {"data": {"0.parquet": "ab"}},
            "1.parquet=cd (process 2 has None)",
        ),
        ({"data": {"1. GSM8K": "7 rows"}}, {"data": {"1. GSM8K": "8 rows"}}, "1. GSM8K=7 rows (process 2 has 8 rows)"),
        ({"tokenizers": "abc"}, {"tokenizers": "abd"}, "different tokenizers: process 0 has abc (process 2 has abd)"),
        (
            {"flags": {"seed": 0, "depth": 4}},
            {"flags": {"seed": 1, "depth": 4}},
            "different flags: process 0 has seed=0 (",
        ),
        ({"data": dict.fromkeys("abcde", 1)}, {"data": {}}, "c=1 (process 2 has None) and 2 more; give all"),
    ],
)
def test_what_differs_between_processes_is_named(monkeypatch, facts, others, words):
    sharding.check_same(**facts)
    Elsewhere(monkeypatch)
    sharding.check_same(**facts)
    Elsewhere(monkeypatch, **others)
    with pytest.raises(UserError, match=re.escape(words)) as problem:
        sharding.check_same(**facts)
    assert "\n" not in str(problem.value)


BASE = ["--depth=1", "--max_seq_len=32", "--sample_every=-1", "--device_batch_size=1", "--total_batch_size=64"]
BASE += ["--num_iterations=2", "--eval_every=-1"]


def ended(homes):
    """Train base by two processes, each with its base directory; return their (exit code, stderr)."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    running = []
    for process in range(2):
        place = [f"--coordinator=localhost:{port}", "--num_processes=2", f"--process_id={process}"]
        env = os.environ | {"XLA_FLAGS": xla_flags(1), "JAXCHAT_BASE_DIR": str(homes[process]), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "launch.base_train", *BASE, *place]
        running.append(subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True))
    return [(process.returncode, err) for process in running for _, err in [process.communicate(timeout=240)]]


@pytest.mark.parametrize(
    "others, words",
    [
        ({"data": {"0.parquet": "another"}}, "different data: process 0 has 0.parquet="),
        ({"tokenizers": "another"}, "different tokenizers: process 0 has {tokenizer} (process 2 has another)"),
        ({"parents": "base d1 2"}, "different parents: process 0 has None (process 2 has base d1 2)"),
        ({"flags": {}}, "different flags: process 0 has "),
    ],
)
def test_the_trainers_compare_what_they_are_given(folder, monkeypatch, capsys, others, words):
    """As if another process had other shards: refused in one line, before anything is written."""
    monkeypatch.setenv("JAXCHAT_BASE_DIR", str(folder))
    Elsewhere(monkeypatch, **others)
    with pytest.raises(SystemExit) as stop:
        base_train.main([*BASE, "--total_batch_size=256"])
    error = capsys.readouterr().err
    words = words.format(tokenizer=Tokenizer.load(folder / "tokenizer").hash)
    assert stop.value.code == 2 and error.count("\n") == 1 and words in error
    assert not (folder / "base_checkpoints").exists()


@pytest.mark.slow
def test_two_processes_that_were_given_different_things(folder, tmp_path):
    """Both end in one line that names the difference."""
    homes = [tmp_path / "a", tmp_path / "b"]
    for home in homes:
        shutil.copytree(folder, home)
    pq.write_table(pa.table({"text": ["another document"]}), homes[1] / "base_data/1.parquet")
    results = ended(homes)
    said = "".join(err for _, err in results)
    assert [code for code, _ in results] == [2, 2], said
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert lines and all("the processes were started with different data: " in line for line in lines), said
    assert "1.parquet=" in lines[0] and "Traceback" not in said
