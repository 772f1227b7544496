"""base_eval and chat_eval as a user calls them, tiny: what they print, what they leave beside the checkpoint."""

import contextlib
import csv
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launch import base_eval, base_train, tok_train

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
        for n in range(2):
            pq.write_table(pa.table({"text": TEXTS}), folder / "base_data" / f"{n}.parquet")
        write_bundle(folder / "eval_bundle")
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
    assert "next: " in text and "launch.mid_train --model_tag=d1" in text
    # The training measured the same of the same weights.
    assert "3 tasks every 2 steps" in trained[1]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["core"] for row in metrics if "core" in row] == [found["values"]["core"]]
    # All items, without bits per byte; what was there is replaced.
    said(base_eval, ["--eval_tokens=0"])
    found = json.loads((run / "base_eval_2.json").read_text())
    assert set(found["values"]) == {"core"} and [task["items"] for task in found["tasks"].values()] == [6, 6, 6]
    assert "at least 3 a task" in refused(capsys, base_eval, ["--max_per_task=2"])
    assert "download core-bundle" in refused(capsys, base_eval, [f"--eval_bundle={here / 'base_data'}"])


def test_training_goes_on_without_a_bundle(here, tmp_path, capsys):
    args = [*BASE, "--num_iterations=1", "--model_tag=none"]
    assert "download core-bundle" in refused(capsys, base_train, [*args, f"--eval_bundle={tmp_path}"])
    bundle = here / "eval_bundle"
    bundle.rename(tmp_path / "away")
    try:
        assert "not measured: no CORE bundle" in said(base_train, args)
    finally:
        (tmp_path / "away").rename(bundle)
