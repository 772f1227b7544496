"""The report: right numbers of a synthetic run, missing parts named, a page that needs no other and obeys no markup."""

import json
import math
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxchat import sharding
from jaxchat.config import STAGES, MidConfig, ModelConfig, Preempted, UserError
from jaxchat.model.flops import flops_per_token, num_params
from jaxchat.report import compare, document, record
from jaxchat.report.gather import gather, read_lines
from jaxchat.report.plots import by_tokens, curves, smoothed
from jaxchat.report.samples import Samples
from launch import report

MODEL = ModelConfig(sequence_len=32, vocab_size=300, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)
NASTY = "<script>alert(1)</script> | `x` ![i](http://a.b/c.png) ````\n```\n# title <img src='http://a.b'> &amp; \x1b[0m"


def write_stage(home, source, tag="d2", steps=40, seconds=0.5, tokens=1000, **meta):
    """A stage's folder as a trainer leaves it, without weights."""
    folder = home / STAGES[source].folder / tag
    about = {"stage": source, "step": steps, "model": vars(MODEL), "metrics": {"val_bpb": 1.5}, **meta}
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as writer:
        writer.save(folder.absolute() / str(steps) / "meta", about)
    rows = [{"step": 0, "val_bpb": 3.25}]
    for step in range(1, steps + 1):
        row = {"step": step, "loss": 4.0 - step / 20, "lr_multiplier": 1.0, "step_seconds": seconds}
        rows.append(row | {"tokens_per_s": tokens / seconds, "data_wait_seconds": 0.1 * seconds})
    rows.append({"step": steps, "val_bpb": 1.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 41, "los')
    return folder


def write_record(folder, seconds=36.0, **facts):
    about = {"began": "2026-11-01T10:00:00+00:00", "seconds": seconds, "machine": "a machine", "versions": "jax 9.9"}
    about |= {"git": "abc on main", "devices": "1 × cpu", "flags": {"depth": 2}, "plan": [["batch", "8 rows"]], **facts}
    with (folder / record.FILE).open("a") as file:
        file.write(json.dumps(about) + "\n")


def row_of(text, name):
    [line] = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_reinforcement_learning(home):
    """A column of its own, rewards instead of a loss, the answers that were compared."""
    for source in ("sft", "rl"):
        folder = write_stage(home, source)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()[:-1]]
    for row in rows:
        if "loss" in row:
            row |= {"reward": row["step"] / 40, "groups_mixed": 0.5, "rollout_seconds": 0.25, "data_wait_seconds": 0.0}
        else:
            row |= {"evaluation": "problems", "val_reward": 0.25, "pass@1": 0.25}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = [{"text": NASTY, "reward": 1.0, "advantage": 0.5}, {"text": "wrong", "reward": 0.0, "advantage": -0.5}]
    asked = [{"role": "user", "content": NASTY}, {"role": "assistant", "content": "right"}]
    sample = {"step": 1, "problem": "x", "messages": asked, "answers": answers}
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample | {"step": n}) + "\n" for n in (1, 21, 41)))
    run = gather("d2")
    images = curves([run])
    assert {"reward.png", "groups.png"} <= set(images)
    text = document.markdown(run, images, None)
    assert row_of(text, "pass@1") == ["–", "0.2500"] and row_of(text, "loss")[1] == "–"
    assert row_of(text, "reward") == ["–", f"{np.mean(np.arange(21, 41)) / 40:.4f}"]
    assert row_of(text, "sampling answers") == ["–", "50.0%", ""]
    assert (
        "  0.00  -0.50  wrong" in text
        and "After step 0:" in text
        and "After step 40:" in text
        and "After step 20" not in text
    )
    assert "<script>" not in document.as_html("x", text, images)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(run, its images) of three stages with evaluations, one of which cannot be read."""
    home = tmp_path_factory.mktemp("whole")
    for source, parent in zip(("base", "mid", "sft"), (None, "base d2 40", "mid d2 40"), strict=True):
        folder = write_stage(home, source, tokenizer_hash="f00", **({"parent": parent} if parent else {}))
        write_record(folder, git="def on main" if source == "mid" else "abc on main")
        write_record(folder, git="def on main" if source == "mid" else "abc on main")
    (home / STAGES["base"].folder / "d2" / "40" / "core.json").write_text(
        '{"metrics": {"CORE": 0.21, "arc|easy": 0.5}}'
    )
    tasks = {"hellaswag": {"accuracy": 0.3, "centered": 0.0667, "items": 10}}
    for step, bpb in ((40, 1.25), (20, 0.9999)):
        told = {"source": "base", "step": step, "values": {"train_bpb": bpb}, "tasks": tasks, "samples": [["a", "b"]]}
        told |= {"seconds": 54.0, "settings": {"max_per_task": 10, "eval_tokens": 1000}}
        (home / STAGES["base"].folder / "d2" / f"base_eval_{step}.json").write_text(json.dumps(told))
    (home / STAGES["sft"].folder / "d2" / "40" / "chat_eval.json").write_text(
        '{"metrics": {"ChatCORE": 0.08, "n": "x"}}'
    )
    (home / STAGES["sft"].folder / "d2" / "broken.json").write_text("{")
    (home / "tokenizer").mkdir()
    texts = {"val": {"bytes": 9, "tokens": 2, "bytes_per_token": 4.5, "cl100k_base_bytes_per_token": 5.25}}
    measured = {"tokenizer_hash": "f00", "texts": texts}
    (home / "tokenizer" / "tok_eval.json").write_text(json.dumps(measured))
    (home / "tokenizer" / "tokenizer.json").write_text('{"hash": "f00", "training_seconds": 36.0}')
    (home / STAGES["mid"].folder / "d2" / "odd.json").write_text(json.dumps({"metrics": {NASTY: 0.5}}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXCHAT_BASE_DIR", str(home))
        run = gather()
    return run, curves([run])


def test_numbers(whole):
    text = document.markdown(*whole, None, price_per_hour=10.0)
    parameters, tokens = num_params(MODEL), 40 * 1000
    assert f"{parameters:,} parameters" in text
    assert row_of(text, "tokens") == ["40,000", "40,000", "40,000", "120,000"]
    ratio = f"{tokens / parameters:.2f}"
    assert row_of(text, "tokens : parameters") == [ratio, ratio, ratio, f"{3 * tokens / parameters:.2f}"]
    flops = tokens * flops_per_token(MODEL)
    assert row_of(text, "FLOPs") == [f"{flops:.2e}"] * 3 + [f"{3 * flops:.2e}"]
    assert row_of(text, "tokens/s, median") == ["2,000", "2,000", "2,000", ""]
    assert [document.number(value) for value in (792.7953, 99.5, -0.05561)] == ["793", "99.5000", "-0.0556"]
    assert text.count("Only a sample of the items was measured for base: CORE, at most 10 a task.") == 1
    assert text.count("Only a sample") == 1 and text.count("guessing is 0, all right is 1") == 1
    assert text.index("| train_bpb") < text.index("| hellaswag") and text.index("| val_") < text.index("| hellaswag")
    assert row_of(text, "waiting for data") == ["10.0%"] * 3 + [""]
    # Each stage ran twice, for 36 s: 72 s are 0.02 hours, of 10 each. Base's evaluations took 108 s.
    assert row_of(text, "training") == ["1m12s"] * 3 + ["3m36s"]
    assert row_of(text, "evaluations") == ["1m48s", "–", "–", "1m48s"]
    assert row_of(text, "wall time") == ["3m00s", "1m12s", "1m12s", "6m00s"]
    assert row_of(text, "cost, at 10 an hour") == ["0.50", "0.20", "0.20", "1.00"]
    assert "36s for the tokenizer" in text
    assert row_of(text, "starts from") == ["random weights", "base d2 40", "mid d2 40", ""]
    # The losses of steps 21 to 40 are 4 − step/20: their mean is 4 − 30.5/20.
    assert row_of(text, "loss") == [f"{4 - 30.5 / 20:.4f}"] * 3
    assert row_of(text, "val_bpb") == ["1.5000"] * 3
    assert row_of(text, "CORE") == ["0.2100", "–", "–"] and row_of(text, "ChatCORE") == ["–", "–", "0.0800"]
    assert r"| arc\|easy | 0.5000 | – | – |" in text and "| n |" not in text
    assert "Left out of SFT: broken.json, which cannot be read." in text
    assert row_of(text, "train_bpb") == ["1.2500", "–", "–"] and row_of(text, "hellaswag") == ["0.3000", "–", "–"]
    assert "base_eval_20" not in text and "0.9999" not in text  # measured anew since
    assert "|  | ours | cl100k_base |" in text and row_of(text, "val") == ["4.5000", "5.2500"]
    assert "- Machine: a machine\n" in text and "- Code: abc on main (base, SFT); def on main (mid)" in text
    assert "flags: --depth=2" in text and "the last of 2 times" in text and "left out: base" not in text


def test_flops_are_those_that_steps_tell(home):
    """Rows may be shorter than the model's context; logs of old don't tell (test_numbers)."""
    folder = write_stage(home, "sft", steps=2)
    row = {"step_seconds": 0.5, "tokens_per_s": 2000.0}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row | {"step_flops": n}) + "\n" for n in (5e9, 7e9)))
    assert gather().stages["sft"].flops == 12e9


def test_missing_stages_are_left_out_and_named(home, capsys):
    metrics = {"val_bpb": 1.5, "lost": None, "told": "x"}
    folder = write_stage(home, "mid", tag="odd", imported={"from": "elsewhere"}, metrics=metrics)
    (folder / "metrics.jsonl").unlink()
    (home / "tokenizer").mkdir()
    measured = {"tokenizer_hash": "another's", "texts": {"val": {"bytes_per_token": 4.5}}}
    (home / "tokenizer" / "tok_eval.json").write_text(json.dumps(measured))
    report.main(["--model_tag=odd", "--no_samples"])
    text = (home / "report" / "odd" / "report.md").read_text()
    assert "No checkpoint with this tag, so left out: base, SFT." in text
    assert "No step was logged." in text and "Not recorded for mid" in text and "cost" not in text
    assert row_of(text, "starts from") == ["imported", ""] and "lost" not in text and "told" not in text
    assert "## Tokenizer" not in text  # another tokenizer's
    assert row_of(text, "val_bpb") == ["1.5000"] and "| tokens" not in text and "wall time" not in text
    said = capsys.readouterr().out
    assert said.count("no checkpoint, left out") == 2 and not list((home / "report" / "odd").glob("*.png"))


def test_evaluations_with_other_settings_are_left_out(home):
    """As results.save_results names them: the most items decide, whichever was made first; other tasks add theirs."""
    folder = write_stage(home, "sft")
    settings = {"max_problems": -1, "dtype": "bfloat16"}
    files = {
        "": (settings | {"tasks": ["MMLU"], "max_problems": 20}, {"MMLU": 0.9, "ChatCORE": 0.9}, 20),
        "_00f": (settings | {"tasks": ["MMLU", "GSM8K"]}, {"MMLU": 0.4, "GSM8K": 0.1, "ChatCORE": 0.2}, 1000),
        "_ff0": (settings | {"tasks": ["ARC-Easy"]}, {"ARC-Easy": 0.5, "ChatCORE": 0.5}, 300),
    }
    for end, (own, values, items) in files.items():
        tasks = {own["tasks"][0]: {"accuracy": values[own["tasks"][0]], "items": items}}
        about = {"step": 40, "settings": own, "values": values, "tasks": tasks}
        (folder / f"chat_eval_40{end}.json").write_text(json.dumps(about))
    stage = gather().stages["sft"]
    assert stage.left_out == ["chat_eval_40.json, made with max_problems=20 (not -1)"]
    del stage.measured["loss"], stage.measured["val_bpb"]
    assert stage.measured == {"MMLU": 0.4, "GSM8K": 0.1, "ARC-Easy": 0.5, "ChatCORE": 0.2}


def test_what_an_evaluation_could_not_measure_is_said(home):
    """Prompts that were cropped, and a validation shard that was trained on: its bits per byte are no result."""
    folder = write_stage(home, "base")
    about = {"step": 40, "settings": {}, "values": {"train_bpb": 1.0, "val_bpb": 0.5, "core": 0.25}}
    about |= {"warning": "1.parquet was trained on", "cropped": {"squad": 3, "coqa": 1}}
    (folder / "base_eval_40.json").write_text(json.dumps(about))
    stage = gather().stages["base"]
    assert stage.measured["core"] == 0.25 and stage.measured["val_bpb"] != 0.5
    assert stage.left_out == [
        "val_bpb of base_eval_40.json: 1.parquet was trained on",
        "the beginnings of CORE's longest prompts, in squad (3 items), coqa (1 items)",
    ]


def test_an_evaluation_of_an_older_step_is_named_until_there_is_a_newer(home):
    folder = write_stage(home, "base")
    (folder / "base_eval_20.json").write_text('{"step": 20, "values": {"core": 0.1}}')
    assert gather().stages["base"].left_out == ["base_eval_20.json, of step 20"]
    (folder / "base_eval_40.json").write_text('{"step": 40, "values": {"core": 0.2}}')
    assert gather().stages["base"].left_out == [] and gather().stages["base"].measured["core"] == 0.2


def test_no_run(home):
    with pytest.raises(UserError, match="launch.base_train"):
        gather()
    write_stage(home, "base")
    with pytest.raises(UserError, match="no checkpoint of any stage is named d3; there are: d2"):
        gather("d3")


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def test_the_page_stands_alone_and_shows_markup_as_text(whole):
    run, images = whole
    samples = Samples([(NASTY, NASTY)], [(NASTY, {"mid": NASTY, "sft": "[python 1+1][output 2]"})])
    text = document.markdown(run, images, samples)
    page = Page(document.as_html(NASTY, text, images))
    links = [value for name, value in page.attributes if name in ("src", "href", "srcset", "data", "action")]
    assert len(links) == len(images) == page.tags.count("img") == 4
    assert all(link.startswith("data:image/png;base64,iVBOR") for link in links)
    assert not {"script", "link", "iframe", "a", "object"} & {*page.tags}
    style = document.STYLE
    assert "url(" not in style and "@import" not in style
    shown = NASTY.replace("\x1b", "\N{REPLACEMENT CHARACTER}")
    assert page.text.count(shown) == 4  # the beginning, its continuation, the question, mid's answer
    assert " ".join(shown.split()) in page.text  # the metric's name
    assert "[python 1+1][output 2]" in page.text


def test_curves_are_of_what_there_is(whole):
    _, images = whole
    assert list(images) == ["loss.png", "lr.png", "bpb.png", "tokens_per_s.png"]
    for _, png in images.values():
        width, height = (int.from_bytes(png[at : at + 4]) for at in (16, 20))
        assert png.startswith(b"\x89PNG") and (width, round(height, -1)) == (1440, 390)


def test_smoothing_keeps_lines_and_means():
    line = np.stack([np.arange(500.0), 3 - 0.5 * np.arange(500.0)], axis=1)
    np.testing.assert_allclose(smoothed(line), line, rtol=0, atol=1e-9)  # sums up to 6e4, in float64
    noise = line + np.random.default_rng(0).normal(size=(500, 1)) * [0, 1]
    assert np.std(smoothed(noise)[20:-20] - line[20:-20]) < 0.5  # of 11 values each: 1/√11 is 0.3


def test_every_run_is_recorded_however_it_ends(tmp_path, devices):
    mesh, checkpoints = sharding.make_mesh(devices[:2]), SimpleNamespace(folder=tmp_path, steps=lambda: [3, 5])
    stage = SimpleNamespace(flags=MidConfig(num_iterations=9), model=SimpleNamespace(mesh=mesh))
    run, plan = SimpleNamespace(stage=stage, checkpoints=checkpoints, first_step=3), [("batch", "8 rows")]
    with pytest.raises(Preempted), record.recorded(run, record.begin(), plan):
        raise Preempted("stopped")
    with record.recorded(run, record.begin(), plan):
        pass
    first, second = read_lines(tmp_path / record.FILE)
    assert (first["ended"], second["ended"]) == ("Preempted", "done") and first["seconds"] >= 0
    assert first["steps"] == [3, 5] and first["flags"] == {"num_iterations": 9} and first["devices"].startswith("2 × ")
    checkpoints.folder = tmp_path / "gone"  # no disk, no folder: not worth a run
    with record.recorded(run, record.begin(), plan):
        pass
    run.checkpoints = None  # a dry run leaves nothing
    with record.recorded(run, record.begin(), plan):
        pass
    assert len(read_lines(tmp_path / record.FILE)) == 2


def test_record_tells_what_runs():
    began = record.begin()
    assert began["versions"].startswith("Python 3.") and "jax 0." in began["versions"]
    assert "GiB" in began["machine"] and math.isfinite(began["clock"])
    assert began["git"] == record.git_state()


def test_runs_side_by_side(home, capsys):
    """A column a run, stages that one lacks named, flags in which they differ, all runs on one axis."""
    for tag, steps, parent in (("d2", 40, "base d2 40"), ("d4", 20, "base d4 20")):
        write_record(write_stage(home, "base", tag, steps=steps), flags={"depth": int(tag[1]), "seed": 7})
        if tag == "d2":
            write_stage(home, "mid", tag, parent=parent)
    told = {"step": 20, "values": {"core": 0.1}, "settings": {"max_per_task": 5}}
    (home / STAGES["base"].folder / "d4" / "base_eval_20.json").write_text(json.dumps(told))
    report.main(["--model_tag=d2,d4", "--no_samples", "--price_per_hour=3600"])
    folder = home / "report/d2+d4"
    assert f"written: {folder / 'report.md'}" in capsys.readouterr().out
    text = (folder / "report.md").read_text()
    base = text[text.index("## base") : text.index("## mid")]
    assert row_of(base, "last checkpoint") == ["step 40", "step 20"]
    assert row_of(base, "tokens") == ["40,000", "20,000"]
    assert row_of(base, "loss") == [f"{4 - 30.5 / 20:.4f}", f"{4 - 10.5 / 20:.4f}"]  # means of the last 20 steps
    assert row_of(base, "--depth") == ["2", "4"] and "--seed" not in base
    assert row_of(base, "core") == ["–", "0.1000"] and text.count("measured for d4: CORE, at most 5 a task.") == 1
    assert row_of(base, "cost, at 3600 an hour") == ["36.00", "36.00"]
    assert "Without a checkpoint: d4." in text[text.index("## mid") :] and "## SFT" not in text
    assert {path.name for path in folder.iterdir()} >= {"report.html", "loss.png", "bpb.png", "tokens_per_s.png"}
    xy = by_tokens(gather("d4").stages["base"], "val_bpb")
    assert xy.tolist() == [[0, 3.25], [20_000, 1.5]]
    said = {"d2": Samples([("The", "cat")], [("Hi?", {"mid": "Hello."})]), "d4": Samples([("The", "dog")], [])}
    shown = "\n".join(compare.samples_text(said))
    assert "The …\nd2: cat\nd4: dog" in shown and "user: Hi?\nd2, mid: Hello." in shown
