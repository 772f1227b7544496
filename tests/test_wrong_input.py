"""Everything a user can get wrong: one line with the numbers and the remedy, exit code 2, nothing written."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT

from jaxchat import checkpoint
from jaxchat.config import BaseConfig
from jaxchat.tokenizer import Tokenizer
from jaxchat.train import metrics
from jaxchat.train.run import tokenizer_for
from launch import base_train, chat_cli, chat_sft, mid_train, tok_train

TEXTS = [f"number {i} is the one after {i - 1}, and the words go on." for i in range(1, 300)]
TALK = [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "hi"}]
BATCH = ["--device_batch_size=1", "--total_batch_size=128", "--eval_every=-1"]
BASE = ["--depth=1", "--max_seq_len=16", "--sample_every=-1", "--num_iterations=2", *BATCH]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_shards(folder, count=2):
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        pq.write_table(pa.table({"text": TEXTS}), folder / f"{n}.parquet")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, devices):
    """A base directory with data, a tokenizer, and base and mid checkpoints of 2 steps with the tag d1."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXCHAT_BASE_DIR", str(folder))
        write_shards(folder / "base_data")
        tasks = [f"--train_tasks={write_lines(folder / 'talk.jsonl', [TALK] * 40)}"]
        tok_train.main(["--vocab_size=280"])
        base_train.main(BASE)
        mid_train.main([*BATCH, *tasks, "--num_iterations=2"])
    return folder


@pytest.fixture
def folder(trained, home):
    shutil.copytree(trained, home, dirs_exist_ok=True)
    return home


@pytest.fixture
def older(folder):
    """As a version before checkpoints kept their tokenizer left it: there is the base directory's only."""
    for own in folder.glob("*_checkpoints/*/tokenizer"):
        shutil.rmtree(own)
    return folder


def everything(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def refusal(folder, command, args, capsys):
    """The one line on stderr of a command that must leave with 2 and write nothing."""
    before = everything(folder)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        command.main([str(arg) for arg in args])
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert everything(folder) == before
    return err


def test_no_shards_one_shard_no_text_unreadable(folder, capsys):
    for path in (folder / "base_data").glob("*"):
        path.unlink()
    for command, args in ((tok_train, []), (base_train, [*BASE, "--overwrite"])):
        assert "no .parquet file in" in refusal(folder, command, args, capsys)
        write_shards(folder / "base_data", 1)
        assert "only one .parquet file" in refusal(folder, command, args, capsys)
        pq.write_table(pa.table({"body": TEXTS}), folder / "base_data/0.parquet")
        write_shards(folder / "base_data/x", 1)
        shutil.copy(folder / "base_data/x/0.parquet", folder / "base_data/1.parquet")
        assert "0.parquet has no column `text`; it has: body" in refusal(folder, command, args, capsys)
        (folder / "base_data/0.parquet").write_bytes(b"PAR1 but not really")
        assert "0.parquet cannot be read as parquet" in refusal(folder, command, args, capsys)
        shutil.rmtree(folder / "base_data/x")
        for path in (folder / "base_data").glob("*.parquet"):
            path.unlink()


def test_empty_documents_alone(folder, capsys):
    for name in ("0", "1"):
        pq.write_table(pa.table({"text": [""] * 50}), folder / f"base_data/{name}.parquet")
    assert "empty" in refusal(folder, base_train, [*BASE, "--model_tag=new"], capsys)


def test_no_tokenizer(older, capsys):
    shutil.rmtree(older / "tokenizer")
    for command, args in ((base_train, []), (mid_train, []), (chat_sft, []), (chat_cli, ["--source=mid"])):
        line = refusal(older, command, [*args, "--model_tag=d1"], capsys)
        assert "no tokenizer in" in line and "launch.tok_train" in line


def test_another_tokenizer(older, capsys):
    Tokenizer.train(iter(["other text altogether, with words of its own " * 9]), 280).save(older / "tokenizer")
    for command in (mid_train, chat_sft):
        line = refusal(older, command, ["--model_tag=d1"], capsys)
        assert "was trained with tokenizer" in line and "restore the former" in line


def test_tok_train_does_not_replace_a_tokenizer_in_use(older, capsys):
    line = refusal(older, tok_train, ["--vocab_size=290"], capsys)
    assert "base_checkpoints/d1" in line and "--overwrite" in line
    tok_train.main(["--vocab_size=280"])  # the very same one is no harm


def test_a_lost_tokenizer_can_be_trained_again(older, capsys):
    """The remedy that "no tokenizer" names works: the very same tokenizer takes its place, no other does."""
    shutil.rmtree(older / "tokenizer")
    assert "was trained with another tokenizer" in refusal(older, tok_train, ["--vocab_size=290"], capsys)
    tok_train.main(["--vocab_size=280"])
    assert checkpoint.open_model("base").step == 2


def test_checkpoints_keep_their_tokenizer(folder, capsys):
    """Whatever tokenizer is trained later, what there is stays usable: mid, SFT, chat, and base's --resume."""
    tok_train.main(["--vocab_size=290"])
    assert checkpoint.open_model("base").tokenizer.vocab_size == 280
    base_train.main([*BASE, "--resume"])
    mid_train.main([*BATCH, f"--train_tasks={folder / 'talk.jsonl'}", "--num_iterations=1", "--overwrite"])
    assert checkpoint.open_model("mid").tokenizer.vocab_size == 280
    # A new base run takes the new one, and is another model.
    assert "tokenizer_hash" not in refusal(folder, base_train, BASE, capsys)
    base_train.main([*BASE, "--overwrite"])
    assert checkpoint.open_model("base").tokenizer.vocab_size == 290


def test_a_run_without_a_checkpoint_has_no_tokenizer_of_its_own(folder):
    """Its first attempt died early, and the tokenizer was trained anew since: --resume takes that one."""
    shutil.copytree(folder / "tokenizer", folder / "base_checkpoints/new/tokenizer")
    tok_train.main(["--vocab_size=290", "--overwrite"])
    resumed = BaseConfig(resume=True)
    assert tokenizer_for(resumed, "base", "new").vocab_size == 290
    assert tokenizer_for(resumed, "base", "d1").vocab_size == 280


def test_a_damaged_tokenizer_of_a_run(folder, capsys):
    """The remedy works: the base directory's is the same, and is taken."""
    own = folder / "base_checkpoints/d1/tokenizer"
    (own / "tokenizer.json").write_text("[]")
    line = refusal(folder, chat_cli, ["-i", "base"], capsys)
    assert f"delete this folder to use the tokenizer in {folder}/tokenizer" in line
    shutil.rmtree(own)
    assert checkpoint.open_model("base").step == 2
    (folder / "tokenizer/ranks.txt").write_text("")
    line = refusal(folder, base_train, [*BASE, "--model_tag=new"], capsys)
    assert "cannot be read" in line and re.search("; train it again: .*python -m launch.tok_train", line)


@pytest.mark.parametrize("tag", ["/elsewhere", "..", ".", "a/b"])
def test_a_tag_is_a_plain_name(folder, tag, capsys):
    for command, args in ((base_train, [*BASE, "--overwrite"]), (mid_train, [])):
        assert "must be a plain name" in refusal(folder, command, [*args, f"--model_tag={tag}"], capsys)


@pytest.mark.parametrize("flag", ["--run=mine", "--tensorboard"])
def test_a_logger_that_is_missing_costs_no_checkpoint(folder, flag, capsys, monkeypatch):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    assert "make setup EXTRAS=" in refusal(folder, base_train, [*BASE, "--overwrite", flag], capsys)


def test_only_overwrite_deletes(folder):
    """A run that was killed before its first checkpoint leaves a folder, which a new run must not sweep away."""
    (folder / "base_checkpoints/new").mkdir()
    (folder / "base_checkpoints/new/notes").write_text("mine")
    base_train.main([*BASE, "--model_tag=new"])
    assert (folder / "base_checkpoints/new/notes").read_text() == "mine"
    assert checkpoint.steps_in(folder / "base_checkpoints/new") == [2]


def test_a_bad_row_of_a_table_is_named(folder, capsys):
    (folder / "tasks/smoltalk/data").mkdir(parents=True)
    pq.write_table(pa.table({"messages": [TALK, TALK[:1] * 2]}), folder / "tasks/smoltalk/data/train-0.parquet")
    line = refusal(folder, chat_sft, ["--train_tasks=SmolTalk", "--eval_every=-1", "--eval_metrics_every=-1"], capsys)
    assert "train-0.parquet, row 1: turn" in line and "1 of its 2 rows cannot be used" in line


def test_missing_checkpoints(folder, capsys):
    line = refusal(folder, mid_train, ["--model_tag=d9"], capsys)
    assert "no base checkpoint named d9" in line and "there are: d1" in line
    assert "there are: 2" in refusal(folder, mid_train, ["--step=7"], capsys)
    assert "launch.chat_sft" in refusal(folder, chat_cli, ["-p", "hi"], capsys)
    shutil.rmtree(folder / "mid_checkpoints")
    assert "launch.mid_train" in refusal(folder, chat_sft, [], capsys)


def test_checkpoint_of_another_shape(folder, capsys):
    """The metadata tells of a wider model than the weights that lie beside it."""
    path = next((folder / "base_checkpoints/d1/2/meta").iterdir())
    meta = json.loads(path.read_text())
    meta["model"]["n_embd"] *= 2
    path.write_text(json.dumps(meta))
    (folder / "base_checkpoints/d1/2/seal.json").unlink()  # as one that was written before there were seals
    args = [*BATCH, f"--train_tasks={folder / 'talk.jsonl'}", "--num_iterations=2", "--overwrite"]
    line = refusal(folder, mid_train, args, capsys)
    assert "does not hold the weights" in line and "wte is [280, 64] and not [280, 128]" in line


def test_damaged_weights_without_a_seal(folder, capsys):
    """As of a checkpoint from before there were seals, whose damage only Orbax notices."""
    step = folder / "base_checkpoints/d1/2"
    (step / "seal.json").unlink()
    mid = [*BATCH, f"--train_tasks={folder / 'talk.jsonl'}", "--num_iterations=2", "--overwrite"]
    path = step / "params/_METADATA"
    kept = path.read_bytes()
    path.write_bytes(kept[:100])
    assert "does not hold the weights" in refusal(folder, mid_train, mid, capsys)
    with pytest.raises(SystemExit, match="2"):
        base_train.main([*BASE, "--resume"])
    err = capsys.readouterr().err
    assert f"{step} can't be read" in err and "move it away" in err and err.count("\n") == 1
    path.write_bytes(kept)

    # An array, in a process of its own: Orbax's reads of the others go on, and may print their errors at its end.
    array = max((step / "params").rglob("*"), key=lambda path: path.stat().st_size)
    array.write_bytes(array.read_bytes()[:100])
    done = subprocess.run([sys.executable, "-m", "launch.mid_train", *mid], capture_output=True, text=True, cwd=ROOT)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and "does not hold the weights" in errors[0], done.stderr


def test_checkpoints_are_neither_lost_nor_mixed(folder, capsys):
    line = refusal(folder, base_train, BASE, capsys)
    assert "up to step 2" in line and "--resume" in line and "--overwrite" in line
    line = refusal(folder, base_train, [*BASE, "--resume", "--matrix_lr=0.03"], capsys)
    assert "different settings: matrix_lr=0.02 (now 0.03)" in line
    line = refusal(folder, base_train, [*BASE, "--resume", "--depth=2", "--model_tag=d1"], capsys)
    assert "different settings" in line and "depth=1 (now 2)" in line


def test_a_step_that_cannot_be_cut(folder, capsys):
    args = ["--depth=1", "--max_seq_len=16", "--overwrite"]
    line = refusal(folder, base_train, [*args, "--total_batch_size=100"], capsys)
    assert "--total_batch_size=100 is not a multiple of the row length, 16; give 96" in line
    line = refusal(folder, base_train, [*args, "--total_batch_size=256", "--device_batch_size=3"], capsys)
    assert "--device_batch_size=3 on 8 devices does not divide the 16 rows" in line and "may be 1, 2, or -1" in line
    line = refusal(folder, base_train, [*args, "--total_batch_size=192"], capsys)
    assert "12 rows, which 8 devices cannot share evenly" in line


@pytest.mark.parametrize("flag", ["--remat=some", "--dtype=float16", "--on_nonfinite=hope", "--device_type=abacus"])
def test_no_such_choice(folder, flag, capsys):
    assert f"error: {flag}; it is " in refusal(folder, base_train, [*BASE, "--overwrite", flag], capsys)


def test_target_examples(folder, capsys):
    args = [f"--train_tasks={folder / 'talk.jsonl'}", "--device_batch_size=4", "--target_examples_per_step=40"]
    line = refusal(folder, chat_sft, args, capsys)
    assert "--device_batch_size=4 on 8 devices does not divide the 40 rows" in line and "may be 1, 5, or -1" in line


@pytest.mark.parametrize("command", [mid_train, chat_sft])
def test_tasks(folder, command, capsys):
    """What can be wrong with a line: test_tasks.py, test_bad_lines_are_named."""
    assert "unknown task 'Poems'" in refusal(folder, command, ["--train_tasks=Poems"], capsys)
    bad = write_lines(folder / "bad.jsonl", [TALK, [{"role": "robot", "content": "x"}]])
    line = refusal(folder, command, [f"--train_tasks={bad}"], capsys)
    assert "bad.jsonl, line 2" in line and "unknown role 'robot'" in line
    empty = write_lines(folder / "empty.jsonl", [])
    assert "empty.jsonl is empty" in refusal(folder, command, [f"--train_tasks={empty}"], capsys)


def test_nothing_to_learn(folder, capsys):
    """In training and in validation: no loss of 0.0000 is printed, and nothing is written."""
    mute = f"{write_lines(folder / 'mute.jsonl', [TALK[:1]] * 40)}"
    never = "--eval_metrics_every=-1"
    line = refusal(folder, chat_sft, [f"--train_tasks={mute}", "--eval_every=-1", never], capsys)
    assert "the assistant says nothing" in line and "the 40 training conversations; give other --train_tasks" in line
    args = [f"--train_tasks={folder / 'talk.jsonl'}", f"--val_tasks={mute}", never]
    line = refusal(folder, chat_sft, args, capsys)
    assert "the assistant says nothing" in line and "the 40 validation conversations; give other --val_tasks" in line


@pytest.mark.parametrize("command", [mid_train, chat_sft])
def test_rows_longer_than_the_model(folder, command, capsys):
    line = refusal(folder, command, ["--max_seq_len=17", f"--train_tasks={folder / 'talk.jsonl'}"], capsys)
    assert "--max_seq_len=17 is longer than the model's context of 16 tokens" in line


def test_prompt_longer_than_the_model(folder, capsys):
    line = refusal(folder, chat_cli, ["--source=mid", "-p", "hello " * 100], capsys)
    assert "this model takes 1 to 16" in line


def test_flags(folder, capsys):
    assert "did you mean --depth?" in refusal(folder, base_train, ["--dept=3"], capsys)
    assert "--source=rl; it is mid or base" in refusal(folder, chat_sft, ["--source=rl"], capsys)
    assert "--warmup_ratio=2.0; it must be from 0 to 1" in refusal(folder, base_train, ["--warmup_ratio=2"], capsys)
    line = refusal(folder, base_train, ["--warmup_ratio=0.5", "--warmdown_ratio=0.7"], capsys)
    assert "--warmup_ratio=0.5 and --warmdown_ratio=0.7 are 1.2 together" in line
    assert "--warmdown_ratio=0.2 are 1.1 together" in refusal(folder, base_train, ["--warmup_ratio=0.9"], capsys)
    assert "Name too long" in refusal(folder, base_train, [f"--model_tag={'x' * 300}"], capsys).replace("name", "Name")
    assert "--temperature=-1.0" in refusal(folder, chat_cli, ["-t", "-1"], capsys)
    assert "--max_tokens=0" in refusal(folder, chat_cli, ["--max_tokens=0"], capsys)
    for seed in (-1, 2**32):
        assert f"--seed={seed}; it must be from 0 to" in refusal(folder, chat_cli, [f"--seed={seed}"], capsys)
    assert "--device_type=gpu; it is cpu," in refusal(folder, chat_cli, ["--device_type=gpu"], capsys)
    assert "--seed=-1; it must be from 0 to 4294967295" in refusal(folder, base_train, ["--seed=-1"], capsys)
    assert "--eval_steps=0; it must be at least 1" in refusal(folder, chat_sft, ["--eval_steps=0"], capsys)
    assert "--device_batch_size=0; it must be" in refusal(folder, base_train, ["--device_batch_size=0"], capsys)
    for other in ("--overwrite", "--dry_run"):
        line = refusal(folder, mid_train, ["--resume", other], capsys)
        assert f"--resume and {other} contradict each other" in line
    assert "--depth=0; it must be at least 1" in refusal(folder, base_train, ["--depth=0"], capsys)
    line = refusal(folder, base_train, ["--depth=8", "--n_kv_head=3"], capsys)
    assert "--n_kv_head=3 does not divide the model's 4 heads; give a divisor" in line
    args = ["--target_param_data_ratio=-1", "--depth=1"]
    assert "how long to train?" in refusal(folder, base_train, [*BATCH, "--max_seq_len=16", *args], capsys)


def test_a_checkpoint_that_is_not_whole_is_invisible(folder):
    """What a kill leaves in the midst of saving has a temporary name, or lacks its metadata."""
    run = folder / "base_checkpoints/d1"
    (run / "3.orbax-checkpoint-tmp-123").mkdir()
    (run / "4/params").mkdir(parents=True)
    assert checkpoint.steps_in(run) == [2]
    assert checkpoint.find("base") == (run, 2)


def test_defaults_are_the_specs():
    from jaxchat.config import BaseConfig, MidConfig, SFTConfig

    base, mid, sft = (dataclasses.asdict(config()) for config in (BaseConfig, MidConfig, SFTConfig))
    common = {"embedding_lr": 0.2, "unembedding_lr": 0.004, "matrix_lr": 0.02, "weight_decay": 0.0}
    wanted = {
        **common, "depth": 20, "max_seq_len": 2048, "num_iterations": -1, "target_flops": -1.0,
        "target_param_data_ratio": 20, "device_batch_size": -1, "total_batch_size": 524288, "grad_clip": 1.0,
        "warmup_ratio": 0.0, "warmdown_ratio": 0.2, "final_lr_frac": 0.0, "eval_every": 250,
        "eval_tokens": 20 * 524288, "core_metric_every": 2000, "sample_every": 2000, "model_tag": "",
    }  # fmt: skip
    assert wanted.items() <= base.items()
    wanted = {**common, "device_batch_size": -1, "total_batch_size": 524288, "init_lr_frac": 1.0, "eval_every": 150}
    assert {**wanted, "eval_tokens": 20 * 524288, "dry_run": False, "num_iterations": -1}.items() <= mid.items()
    wanted = {
        **common, "source": "mid", "num_epochs": 1, "num_iterations": -1, "device_batch_size": -1, "init_lr_frac": 0.02,
        "target_examples_per_step": 32, "eval_every": 100, "eval_steps": 100, "eval_metrics_every": 200,
        "eval_metrics_max_problems": 1024,
    }  # fmt: skip
    assert wanted.items() <= sft.items()
