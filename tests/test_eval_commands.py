"""base_eval and chat_eval as a user calls them, tiny: what they print, what they leave beside the checkpoint."""

import contextlib
import csv
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import sandbox_is_whole

from jaxchat import files
from jaxchat.config import UserError
from jaxchat.eval import sandbox, scoring
from launch import base_eval, base_train, chat_eval, tok_train

TEXTS = [f"number {i} is the one after {i - 1}, and the words go on." for i in range(1, 300)]
BATCH = ["--device_batch_size=1", "--total_batch_size=256", "--eval_every=-1"]
BASE = ["--depth=1", "--max_seq_len=32", "--sample_every=-1", "--num_iterations=2", *BATCH]
META = "Eval Task,Random baseline\nchoices,25\nstories,50\nends,0\n"
YAML = """
icl_tasks:
- label: choices
  dataset_uri: a/c.jsonl
  num_fewshot: [2]
  icl_task_type: multiple_choice
  continuation_delimiter: ": "
- {label: stories, dataset_uri: s.jsonl, num_fewshot: [0], icl_task_type: schema}
- {label: ends, dataset_uri: l.jsonl, num_fewshot: [1], icl_task_type: language_modeling}
"""


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_bundle(folder):
    data = folder / "eval_data"
    options = ["one", "two", "three", "four"]
    write_lines(data / "a/c.jsonl", [{"query": f"what is {i}", "choices": options, "gold": i % 4} for i in range(6)])
    stories = [{"context_options": ["he", "she"], "continuation": f"went {i}", "gold": i % 2} for i in range(6)]
    write_lines(data / "s.jsonl", stories)
    write_lines(data / "l.jsonl", [{"context": f"number {i} is ", "continuation": "the one"} for i in range(6)])
    (folder / "core.yaml").write_text(YAML)
    (folder / "eval_meta_data.csv").write_text(META)


def write_tasks(folder):
    """Five problems of each chat task, in the hub's shapes."""
    options = ["red", "blue", "green", "grey"]
    choices = {"text": options, "label": list("ABCD")}
    arc = [{"question": f"colour {i}", "choices": choices, "answerKey": "ABCD"[i % 4]} for i in range(5)]
    add = {"prompt": "def add(a, b):\n", "canonical_solution": "    return a + b\n", "entry_point": "add"}
    for path, rows in {
        "arc/ARC-Easy/test.parquet": arc,
        "arc/ARC-Challenge/test.parquet": arc,
        "mmlu/all/test.parquet": [{"question": f"q {i}", "choices": options, "answer": i % 4} for i in range(5)],
        "gsm8k/main/test.parquet": [{"question": f"{i} + 1", "answer": f"#### {i + 1}"} for i in range(5)],
        "humaneval/openai_humaneval/test-0.parquet": [
            add | {"test": f"def check(f):\n    assert f({i}, 1) == {i + 1}\n"} for i in range(5)
        ],
    }.items():
        (folder / path).parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / path)
    (folder / "words").mkdir()
    (folder / "words/words_alpha.txt").write_text("\n".join(f"word{'abcdefghij'[i % 10] * (i + 1)}" for i in range(60)))


def said(command, args):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        command.main(args)
    return out.getvalue()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, devices):
    """(base directory with data, a bundle, a base model of 2 steps, what its training printed)."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXCHAT_BASE_DIR", str(folder))
        (folder / "base_data").mkdir()
        for n in range(3):  # the last is for validation
            pq.write_table(pa.table({"text": TEXTS[n:]}), folder / "base_data" / f"{n}.parquet")
        write_bundle(folder / "eval_bundle")
        write_tasks(folder / "tasks")
        tok_train.main(["--vocab_size=280"])
        text = said(base_train, [*BASE, "--core_metric_every=2", "--core_metric_max_per_task=4"])
    return folder, text


@pytest.fixture
def here(trained, monkeypatch):
    monkeypatch.setenv("JAXCHAT_BASE_DIR", str(trained[0]))
    return trained[0]


def refused(capsys, command, args) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        command.main(args)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_base_eval(here, trained, capsys):
    run = here / "base_checkpoints/d1"
    bpb = ["--device_batch_size=1", "--eval_tokens=600"]
    text = said(base_eval, ["--max_per_task=4", *bpb])
    found = json.loads((run / "base_eval_2.json").read_text())
    assert (found["source"], found["tag"], found["step"]) == ("base", "d1", 2)
    assert set(found["values"]) == {"train_bpb", "val_bpb", "core"} and list(found["tasks"]) == [
        "choices", "stories", "ends",
    ]  # fmt: skip
    for (name, task), chance in zip(found["tasks"].items(), (0.25, 0.5, 0.0), strict=True):
        assert task["items"] == 4 and task["centered"] == pytest.approx((task["accuracy"] - chance) / (1 - chance))
        assert f"{name:<34}" in text
    assert found["values"]["core"] == pytest.approx(np.mean([task["centered"] for task in found["tasks"].values()]))
    assert len(found["samples"]) == 7 and found["samples"][0][0] == "Paris is the capital of"
    rows = list(csv.reader((run / "base_eval_2.csv").read_text().splitlines()))
    assert rows[0] == ["task", "accuracy", "centered", "items"] and [row[0] for row in rows[1:]][-1] == "core"
    assert float(rows[-1][2]) == found["values"]["core"] and float(rows[1][1]) == found["tasks"]["choices"]["accuracy"]
    assert "next: " in text and "launch.mid_train --model_tag=d1" in text and "WARNING" not in text
    # The training measured the same of the same weights.
    assert "3 tasks every 2 steps" in trained[1]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["core"] for row in metrics if "core" in row] == [found["values"]["core"]]
    # All items, without bits per byte: other settings, another file; the same again replaces it.
    for _ in range(2):
        said(base_eval, ["--eval_tokens=0"])
    assert json.loads((run / "base_eval_2.json").read_text()) == found
    (other,) = run.glob("base_eval_2_*.json")
    found = json.loads(other.read_text())
    assert set(found["values"]) == {"core"} and [task["items"] for task in found["tasks"].values()] == [6, 6, 6]
    assert "--max_per_task (base_eval) to at least 3" in refused(capsys, base_eval, ["--max_per_task=2"])
    assert "download core-bundle" in refused(capsys, base_eval, [f"--eval_bundle={here / 'base_data'}"])


def result_with(run, command, words):
    """The JSON of the one result file that has these words; it is deleted."""
    (path,) = [p for p in run.glob(f"{command}_2*.json") if words in p.read_text()]
    found = json.loads(path.read_text())
    path.unlink(), path.with_suffix(".csv").unlink()
    return found


def test_a_validation_shard_that_was_trained_on(here, trained, tmp_path):
    """With the last shard gone, one of training's takes its place; the checkpoint's fingerprints know it."""
    last = here / "base_data/2.parquet"
    last.rename(tmp_path / "away")
    try:
        text = said(base_eval, ["--max_per_task=3", "--device_batch_size=1", "--eval_tokens=300"])
    finally:
        (tmp_path / "away").rename(last)
    assert text.count("WARNING") == 2 and "1.parquet, now the last shard, is one that d1 was trained on" in text
    assert "1.parquet" in result_with(here / "base_checkpoints/d1", "base_eval", "warning")["warning"]


def test_base_eval_without_a_bundle(here, trained, tmp_path, capsys):
    """Bits per byte are measured, and CORE is said to be missing; a bundle that was named must be there."""
    bundle = here / "eval_bundle"
    bundle.rename(tmp_path / "away")
    try:
        text = said(base_eval, ["--max_per_task=5", "--device_batch_size=1", "--eval_tokens=300"])
        assert "download core-bundle" in refused(capsys, base_eval, ["--eval_tokens=0"])
        assert "download core-bundle" in refused(capsys, base_eval, [f"--eval_bundle={tmp_path}"])
    finally:
        (tmp_path / "away").rename(bundle)
    assert "val_bpb" in text and text.count("NOT measured: no CORE bundle") == 2
    found = result_with(here / "base_checkpoints/d1", "base_eval", '"max_per_task": 5')
    assert set(found["values"]) == {"train_bpb", "val_bpb"}


@pytest.mark.parametrize("command, args", [(base_eval, []), (chat_eval, ["-i", "base"])])
def test_a_folder_that_cannot_be_written_is_found_first(here, trained, monkeypatch, capsys, command, args):
    temporary = files.tempfile.NamedTemporaryFile

    def denied(dir, **how):
        if "base_checkpoints" in str(dir):
            raise PermissionError(13, "Permission denied", str(dir))
        return temporary(dir=dir, **how)

    monkeypatch.setattr(files.tempfile, "NamedTemporaryFile", denied)
    error = refused(capsys, command, args)
    assert "base_checkpoints/d1: Permission denied; grant access" in error and error.count("\n") == 1


@pytest.mark.parametrize("lacks", [["Landlock (Linux 5.13 or newer, enabled)"], UserError("this is Darwin")])
def test_chat_eval_without_a_sandbox(here, trained, monkeypatch, capsys, lacks):
    """HumanEval is left out loudly, ChatCORE says so, and HumanEval alone is refused."""

    def missing():
        if isinstance(lacks, list):
            return lacks
        raise lacks

    monkeypatch.setattr(sandbox, "missing", missing)
    assert "name other tasks" in refused(capsys, chat_eval, ["-i", "base", "-a", "HumanEval"])
    text = said(chat_eval, ["-i", "base", "-x", "2", "-m", "4"])
    assert text.count("HumanEval is NOT measured: this ") == 2
    values = result_with(here / "base_checkpoints/d1", "chat_eval", '"max_problems": 2')["values"]
    assert [*values][-2:] == ["ChatCORE without HumanEval", "ChatCORE without HumanEval, SpellingBee"]
    assert "ChatCORE without HumanEval " in text and "(over 5 tasks)" in text and "(over 4 tasks)" in text


def test_training_goes_on_without_a_bundle(here, tmp_path, capsys):
    args = [*BASE, "--num_iterations=1", "--model_tag=none"]
    assert "download core-bundle" in refused(capsys, base_train, [*args, f"--eval_bundle={tmp_path}"])
    bundle = here / "eval_bundle"
    bundle.rename(tmp_path / "away")
    try:
        assert "not measured: no CORE bundle" in said(base_train, args)
    finally:
        (tmp_path / "away").rename(bundle)


@pytest.mark.skipif(not sandbox_is_whole(), reason="this kernel has no Landlock or no seccomp")
def test_chat_eval(here, capsys, monkeypatch):
    run, titles = here / "base_checkpoints/d1", []
    monkeypatch.setattr(scoring.Progress, "add", lambda progress, amount: titles.append(progress._word))
    text = said(chat_eval, ["-i", "base", "-x", "3", "-m", "8"])
    assert {"MMLU, 3 of 6: scored", "GSM8K, 4 of 6: written"} <= {*titles}
    found = json.loads((run / "chat_eval_2.json").read_text())
    names = ["ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee"]
    assert list(found["tasks"]) == names
    assert [*found["values"]] == [*names, "ChatCORE", "ChatCORE without SpellingBee"]
    assert "(over 6 tasks)" in text and "(over 5 tasks)" in text and "64 a device at a time" in text
    for name, task in found["tasks"].items():
        chance = 0.25 if name in names[:3] else 0
        assert task["items"] == 3 and task["centered"] == pytest.approx((task["accuracy"] - chance) / (1 - chance))
        assert found["values"][name] == task["accuracy"] and f"{name:<34}" in text
    assert found["values"]["ChatCORE"] == pytest.approx(np.mean([task["centered"] for task in found["tasks"].values()]))
    assert (run / "chat_eval_2.csv").read_text().splitlines()[-1].startswith("ChatCORE,,")
    text = said(chat_eval, ["-i", "base", "-a", "GSM8K|MMLU", "-m", "8", "-n", "4", "-t", "1", "--batch_size=4"])
    (other,) = run.glob("chat_eval_2_*.json")
    found = json.loads(other.read_text())
    assert found["settings"]["num_samples"] == 4 and found["settings"]["temperature"] == 1.0
    assert found["values"]["GSM8K"] == found["values"]["GSM8K pass@1"]
    assert [*found["values"]] == ["GSM8K", "GSM8K pass@1", "GSM8K pass@2", "GSM8K pass@4", "MMLU"]
    assert found["tasks"]["MMLU"]["items"] == 5 and "4 a problem, at temperature 1" in text
    for args, message in (
        (["-a", "GSM9K"], "unknown task 'GSM9K'; it is one of ARC-Easy"),
        (["-n", "2"], "the same answer each time"),
        (["-x", "0"], "at least 1, or -1"),
        (["--seed=-1"], "--seed=-1; it must be from 0"),
        (["-t", "-1"], "--temperature=-1.0; it must be from 0 to 100.0"),
        (["-i", "mid"], "no mid checkpoint"),
    ):
        assert message in refused(capsys, chat_eval, ["-i", "base", *args])
