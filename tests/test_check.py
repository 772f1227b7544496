"""launch.check: a line for each thing that a run needs, with numbers, and commands for what is missing."""

import re
import shlex
import shutil
from collections import namedtuple

import jax
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_eval_commands import TEXTS, write_bundle, write_lines, write_tasks

from jaxchat import devices
from jaxchat.config import STAGES, BaseConfig, UserError
from jaxchat.data.sources import ParquetText, find_shards
from jaxchat.eval import sandbox
from jaxchat.model.flops import num_params, scaling_params
from jaxchat.tokenizer import Tokenizer
from jaxchat.train import fit
from jaxchat.train.stages import base_model
from launch import base_train, check, cli, download, tok_train

FLAGS = ["--depth=1", "--max_seq_len=32", "--total_batch_size=256", "--num_iterations=2"]
TASKS = {"SmolTalk", "MMLU", "GSM8K", "identity", "SimpleSpelling", "SpellingBee", "HumanEval"}
TASKS |= {"ARC-Easy", "ARC-Challenge"}


def write_shards(home, shards):
    for i, texts in enumerate(shards):
        pq.write_table(pa.table({"text": texts}), home / f"base_data/shard_{i:05}.parquet")


@pytest.fixture(scope="module")
def complete(tmp_path_factory, request):
    """A base directory with all that a run needs, but checkpoints."""
    request.getfixturevalue("devices")  # there must be 8
    home = tmp_path_factory.mktemp("complete")
    (home / "base_data").mkdir()
    write_shards(home, [TEXTS[:50], TEXTS[50:100], TEXTS[100:150]])
    tasks = home / "tasks"
    write_tasks(tasks)
    for name in ("arc/ARC-Easy", "arc/ARC-Challenge", "gsm8k/main"):
        shutil.copy(tasks / name / "test.parquet", tasks / name / "train.parquet")
    shutil.copy(tasks / "mmlu/all/test.parquet", tasks / "mmlu/all/auxiliary_train.parquet")
    talk = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello!"}]
    (tasks / "smoltalk/data").mkdir(parents=True)
    for split, rows in (("train", 7), ("test", 3)):
        pq.write_table(pa.table({"messages": [talk] * rows}), tasks / f"smoltalk/data/{split}.parquet")
    write_lines(tasks / "identity/identity_conversations.jsonl", [talk, talk])
    write_bundle(home / "eval_bundle")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXCHAT_BASE_DIR", str(home))
        tok_train.main(["--vocab_size=300"])
    return home


@pytest.fixture
def here(complete, home, monkeypatch):
    """A copy of it as base directory, on a machine without a GPU whose kernel has the sandbox."""
    monkeypatch.setattr(sandbox, "missing", lambda: [])
    monkeypatch.setattr(devices, "DRIVER", home / "no driver")
    return shutil.copytree(complete, home, dirs_exist_ok=True)


@pytest.fixture
def checked(capsys):
    """checked(*flags) returns (exit code, {name: (state, text)}, the last line)."""

    def run(*flags):
        code = 0
        try:
            check.main([*FLAGS, *flags])
        except SystemExit as stop:
            code = stop.code
        title, *lines, last = capsys.readouterr().out.splitlines()
        assert title.startswith("Check of ")
        if not last.startswith("next: "):
            lines, last = [*lines, last], ""
        found = [re.fullmatch(r"  (ok|warning|missing) +(\S+(?: \S+)?)  +(.*)", line) for line in lines]
        return code, {line[2]: (line[1], line[3]) for line in found}, last

    return run


def states(lines):
    return {name: state for name, (state, _) in lines.items() if state != "ok"}


def test_all_is_there(here, checked):
    code, lines, last = checked()
    assert (code, states(lines)) == (0, {})
    texts = ParquetText(find_shards(None, "train"))
    tokens = sum(1 + len(Tokenizer.load().encode(texts[i])) for i in range(100))
    assert lines["text"][1] == (
        f"2 shards and one for validation, about {tokens:,} tokens; base reads 512: {512 / tokens:.2g} epochs"
    )
    assert lines["tokenizer"][1] == "300 tokens, trained on these shards"
    assert "8 × cpu" in lines["devices"][1] and "no NVIDIA driver" in lines["driver"][1]
    assert lines["base batch"][1].startswith("1 row × 8 devices × 1 accumulated = 8 rows × 32 = 256 tokens")
    assert lines["mid batch"][1].startswith("32 rows × 8 devices × 64 accumulated")
    embedding, layers = 2 * 300 * 64, 12 * 64 * 64  # with two moments, and with one
    size = 12 * embedding + 8 * layers + 20  # and a few counters
    for stage, count in (("base", 4), ("mid", 7), ("SFT", 10)):
        text = f"3 checkpoints of {size / 1e6:.2f} MB, one more while saving; up to this stage "
        text += f"in all {count * size / 1e6:.2f} MB of"
        assert text in lines[f"{stage} disk"][1]
    assert f"weights and optimizer take {size / 1e6:.2f} MB" in lines["memory"][1]
    assert lines["SmolTalk"][1] == "SmolTalk/train 7 (mid), SmolTalk/test 3 (mid)"
    assert lines["MMLU"][1] == "MMLU/auxiliary_train 5 (mid), MMLU/test 5 (mid)"
    assert lines["ARC-Easy"][1] == "ARC-Easy/train 5 (SFT), ARC-Easy/test 5 (chat_eval)"
    assert "SpellingBee/train 80,000 (mid)" in lines["SpellingBee"][1]
    assert lines["CORE"][1].startswith("3 tasks") and set(lines) > TASKS


def test_the_next_command_is_base_train_with_the_same_flags(here, checked):
    last = checked("--core_metric_max_per_task=5", f"--data_dir={here}/base_data", "--run=two words")[2]
    words = shlex.split(last.removeprefix("next: "))
    assert words[1:3] == ["-m", "launch.base_train"]
    given = [*FLAGS, "--core_metric_max_per_task=5", f"--data_dir={here}/base_data", "--run=two words"]
    assert cli.parse(BaseConfig, words[3:]) == cli.parse(BaseConfig, given)


def test_nothing_is_there(home, checked, monkeypatch):
    """All commands that bring it run as printed, in one line, to the folders that were given."""
    data, tasks = home / "my data", home / "my tasks"
    code, lines, last = checked(f"--data_dir={data}", f"--tasks_dir={tasks}")
    assert code == 2
    missing = {name for name, state in states(lines).items() if state == "missing"}
    assert missing == {"text", "tokenizer", *TASKS} and lines["CORE"][0] == "warning"
    assert "launch.download core-bundle" in lines["CORE"][1]
    configs = []
    monkeypatch.setattr(cli, "main", lambda kind, run, args, **_: configs.append(cli.parse(kind, args)))
    for command in last.removeprefix("next: ").split(" && "):
        words = shlex.split(command)
        {"launch.download": download, "launch.tok_train": tok_train}[words[2]].main(words[3:])
    text, tokenizer, tasks_of_all = configs
    assert (text.what, text.shards, text.to) == ("fineweb-edu", 2, str(data))
    assert tokenizer.data_dir == str(data)
    assert tasks_of_all.to == str(tasks) and set(download.names_in(tasks_of_all.what)) == set(download.TASKS)


def test_downloads_are_one_command():
    """Those to one place; the commands between keep their place."""
    commands = ["python -m launch.download fineweb-edu --shards=9", "python -m launch.tok_train"]
    commands += [f"python -m launch.download {name}" for name in ("arc", "arc", "words")]
    commands += ["python -m launch.download arc --to='my tasks'"]
    joined = "python -m launch.download fineweb-edu arc words --shards=9"
    assert check.merge_commands(commands) == [joined, commands[1], "python -m launch.download arc '--to=my tasks'"]


COMMANDS = {  # what brings a thing back
    "text": ("base_data", "launch.download fineweb-edu --shards=2"),
    "tokenizer": ("tokenizer", "launch.tok_train"),
    "CORE": ("eval_bundle", "launch.download core-bundle"),
    "SmolTalk": ("tasks/smoltalk/data/test.parquet", "launch.download smoltalk"),
    "MMLU": ("tasks/mmlu/all/auxiliary_train.parquet", "launch.download mmlu"),
    "GSM8K": ("tasks/gsm8k", "launch.download gsm8k"),
    "ARC-Challenge": ("tasks/arc/ARC-Challenge/train.parquet", "launch.download arc"),
    "HumanEval": ("tasks/humaneval", "launch.download humaneval"),
    "identity": ("tasks/identity", "launch.download identity"),
}


@pytest.mark.parametrize("names", [[*COMMANDS][::2], [*COMMANDS][1::2]], ids=lambda names: names[0])
def test_some_things_are_missing(names, here, checked):
    """They are named, each with its command, and nothing else is; two shards are enough."""
    (here / "base_data/shard_00001.parquet").unlink()
    for name in names:
        path = here / COMMANDS[name][0]
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    code, lines, last = checked()
    wanted = {name: "warning" if name == "CORE" else "missing" for name in names}
    assert (code, states(lines)) == (2, wanted)
    for name in names:
        assert COMMANDS[name][1] in lines[name][1]


def test_a_single_shard(here, checked):
    for i in (1, 2):
        (here / f"base_data/shard_{i:05}.parquet").unlink()
    code, lines, _ = checked()
    assert code == 2 and lines["text"][0] == "missing" and "at least two" in lines["text"][1]
    assert "launch.download fineweb-edu --shards=2" in lines["text"][1]
    assert "launch.download climbmix --shards=2" in checked("--arch=2026")[1]["text"][1]


def test_text_that_is_repeated_and_a_tokenizer_of_other_text(here, checked):
    (here / "base_data/.source").write_text("karpathy/climbmix-400b-shuffle 3 abc\n")
    write_shards(here, [[f"{i} " + "abc" * 500] * 9 for i in range(3)])
    code, lines, last = checked("--num_iterations=1000")
    assert code == 0 and states(lines) == {"text": "warning", "tokenizer": "warning"} and "base_train" in last
    found = re.search(r"about ([\d,]+) tokens; base reads 256,000: ([\d.]+) epochs", lines["text"][1])
    there = int(found[1].replace(",", ""))
    assert float(found[2]) == float(f"{256_000 / there:.2g}")
    shards = -(-2 * 256_000 // there) + 1  # of the size of the two that are there
    assert abs(int(re.search(r"launch.download climbmix --shards=(\d+)$", lines["text"][1])[1]) - shards) <= 1
    assert lines["tokenizer"][1].endswith("launch.tok_train")
    (here / "base_data/.source").unlink()
    assert re.search(r"to repeat no text: \d+ shards$", checked("--num_iterations=1000")[1]["text"][1])


def test_the_tokens_of_2026_are_counted_by_its_own_rule(here, checked):
    """12 for each weight of matrices and head, not for each of all weights."""
    flags = ["--arch=2026", "--num_iterations=-1"]
    lines = checked(*flags)[1]
    config = cli.parse(BaseConfig, [*FLAGS, *flags])
    model = base_model(config, 300)
    tokens = 12 * scaling_params(model) // 256 * 256
    assert f"base reads {tokens:,}:" in lines["text"][1] and tokens < 10 * num_params(model)


def test_tokens_without_a_tokenizer_are_estimated_from_bytes(here, checked):
    shutil.rmtree(here / "tokenizer")
    text = "".join(chr(97 + i % 26) for i in range(10_000))
    write_shards(here, [[f"{i}{j}{text}" for j in range(48)] for i in range(3)])
    about = int(re.search(r"about ([\d,]+) tokens", checked()[1]["text"][1])[1].replace(",", ""))
    assert about == pytest.approx(2 * 48 * 10_000 / 4.8, rel=0.02)  # and what parquet adds to a row


def test_devices_memory_disk_and_kernel(here, checked, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: namedtuple("usage", "free")(5_000_000))
        assert states(checked()[1]) == {"mid disk": "missing", "SFT disk": "missing"}
    with monkeypatch.context() as patch:
        patch.setattr(fit, "device_memory", lambda mesh: 500_000)
        code, lines, last = checked()
        assert (code, states(lines), last) == (2, {"memory": "missing"}, "")
    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "missing", lambda: ["Landlock"])
        code, lines, _ = checked()
        assert (code, states(lines)) == (0, {"sandbox": "warning"}) and "Landlock" in lines["sandbox"][1]

    def no_devices(*_, **__):
        raise UserError("no cuda device can be used here")

    monkeypatch.setattr("jaxchat.devices.start_devices", no_devices)
    before = jax.config.jax_platforms
    code, lines, _ = checked()
    jax.config.update("jax_platforms", before)
    assert (code, states(lines)) == (2, {"devices": "missing"})


def test_a_driver_that_is_too_old(here, checked, monkeypatch):
    make = "make setup EXTRAS=cuda12 VENV=.venv-cuda12"
    monkeypatch.setattr(devices, "about_driver", lambda: (f"NVIDIA driver 535, too old: {make}", "missing"))
    code, lines, last = checked()
    assert (code, states(lines), last) == (2, {"driver": "missing"}, f"next: {make}")


def test_a_download_that_is_not_finished(here, checked):
    (here / "base_data/.source").write_text("karpathy/climbmix-400b-shuffle 83 abc\n")
    code, lines, _ = checked()
    assert (code, states(lines)) == (2, {"text": "missing"}) and "3 of the 83 shards" in lines["text"][1]
    assert lines["text"][1].endswith("--shards=3") and lines["tokenizer"][1] == "300 tokens"


def test_a_bundle_that_was_named(here, checked):
    (here / "eval_bundle").rename(here / "kept")
    assert states(checked(f"--eval_bundle={here}/kept")[1]) == {}
    code, lines, last = checked(f"--eval_bundle={here}/else where/eval_bundle")
    assert (code, states(lines)) == (2, {"CORE": "missing"})
    assert shlex.split(last)[-2:] == ["core-bundle", f"--to={here}/else where"]


def test_a_step_that_the_devices_cannot_share(here, checked):
    code, lines, _ = checked("--total_batch_size=96")
    assert (code, states(lines)) == (2, {"base batch": "missing"})
    assert "8 devices cannot share" in lines["base batch"][1]
    code, lines, _ = checked("--max_seq_len=48", "--total_batch_size=384")
    assert (code, states(lines)) == (0, {"mid batch": "warning"}) and "give 524256" in lines["mid batch"][1]


def test_checkpoints_that_are_there(here, checked):
    for step in (5, 9):
        (here / STAGES["mid"].folder / f"d1/{step}/meta").mkdir(parents=True)
    code, lines, _ = checked()
    assert (code, states(lines)) == (0, {"mid disk": "warning"}) and "step 9 exists" in lines["mid disk"][1]
    texts = [lines[f"{stage} disk"][1] for stage in ("base", "mid", "SFT")]
    sizes = [re.search(r"in all ([\d.]+) MB", text)[1] for text in texts]
    assert [round(float(size) / 0.854) for size in sizes] == [4, 5, 8]  # two of mid's need no more room
    assert states(checked("--overwrite")[1]) == {}


@pytest.mark.parametrize(
    "version, plugins, state, words",
    [
        ("", (), "ok", "no NVIDIA driver, no CUDA plugin"),
        ("", (13,), "warning", "no NVIDIA driver, the plugin for CUDA 13"),
        ("Open Kernel Module for x86_64  580.95.05  Release Build", (13,), "ok", "driver 580, the plugin"),
        ("x86_64 Kernel Module  535.183.01  Sun May 12 2024", (12,), "ok", "driver 535"),
        ("x86_64 Kernel Module  535.183.01  Sun May 12 2024", (13,), "missing", "EXTRAS=cuda12 "),
        ("x86_64 Kernel Module  470.57.02  Tue Jul 13 16:14:05 UTC 2021", (12,), "missing", "525 or newer: update"),
        ("Open Kernel Module for aarch64  580.65.06  Release Build", (), "warning", "setup EXTRAS=cuda13 "),
        ("Open Kernel Module for x86_64  580.95.05  Release Build", (12, 13), "warning", "one is needed"),
    ],
)
def test_driver(version, plugins, state, words, tmp_path, monkeypatch):
    path = tmp_path / "version"
    path.write_text(f"NVRM version: NVIDIA UNIX {version}\nGCC version:  gcc 12.3.0\n")
    monkeypatch.setattr(devices, "DRIVER", path if version else tmp_path / "none")
    modules = {f"jax_cuda{cuda}_plugin" for cuda in plugins}
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: name in modules or None)
    text, found = devices.about_driver()
    assert found == state and words in text


def test_tokenizer_row_quotes_its_folder():
    tokenizer = type("Other", (), {"knows": lambda self, data: False})()
    [(_, text)] = base_train.about_tokenizer(BaseConfig(data_dir="two words"), tokenizer, {})
    assert text.endswith("--data_dir='two words'")
