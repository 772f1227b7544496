"""The seven tasks, from small files in the hub's shapes and from the real ones; mixtures and their mistakes."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxchat.config import MidConfig, SFTConfig, UserError
from jaxchat.data import pipelines
from jaxchat.data.tasks import load_mixture, load_task
from jaxchat.data.tasks.gsm8k import answer_parts
from jaxchat.infer.calculator import calculate
from jaxchat.tokenizer import check_conversation


@pytest.fixture
def folder(tmp_path):
    def parquet(path, rows):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / path)

    parquet(
        "mmlu/all/test.parquet", [{"question": "2+2?", "choices": ["3", "4", "5", "6"], "answer": 1, "subject": "m"}]
    )
    choices = {"text": ["sun", "moon", "sea"], "label": ["1", "2", "3"]}
    parquet(
        "arc/ARC-Easy/test.parquet", [{"question": "What shines?", "choices": choices, "answerKey": "1", "id": "q"}]
    )
    parquet("gsm8k/main/train.parquet", [{"question": "Half of 4?", "answer": "It is 4/2=<<4/2=2>>2.\n#### 2"}])
    (tmp_path / "words").mkdir()
    (tmp_path / "words/words_alpha.txt").write_text(
        "\n".join(f"{a}{b}{c}" for a in "bdf" for b in "aeiou" for c in "lmnrst")
    )
    (tmp_path / "identity").mkdir()
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    (tmp_path / "identity/identity_conversations.jsonl").write_text((json.dumps(talk) + "\n") * 3)
    return tmp_path


def test_multiple_choice(folder):
    mmlu, arc = load_task("MMLU/test", folder)[0], load_task("ARC-Easy/test", folder)[0]
    assert (mmlu["letters"], mmlu["messages"][1]["content"]) == (["A", "B", "C", "D"], "B")
    assert (arc["letters"], arc["messages"][1]["content"]) == (["A", "B", "C"], "A")  # labels 1, 2, 3 become letters
    question = mmlu["messages"][0]["content"]
    assert "2+2?" in question and all(
        f"{choice}={letter}\n" in question for choice, letter in zip("3456", "ABCD", strict=True)
    )


def test_sums_become_tool_calls(folder):
    answer = load_task("GSM8K/train", folder)[0]["messages"][1]["content"]
    assert answer == [
        {"type": "text", "text": "It is 4/2="},
        {"type": "python", "text": "4/2"},
        {"type": "python_output", "text": "2"},
        {"type": "text", "text": "2.\n#### 2"},
    ]
    assert answer_parts("<<1+1=2>><<2*2=4>>") == [
        {"type": kind, "text": text}
        for kind, text in [("python", "1+1"), ("python_output", "2"), ("python", "2*2"), ("python_output", "4")]
    ]
    assert answer_parts("no sum here") == [{"type": "text", "text": "no sum here"}]


def test_generated_tasks_depend_on_the_index_alone(folder):
    for name in ("SimpleSpelling", "SpellingBee"):
        task, again = load_task(f"{name}:50", folder), load_task(f"{name}:50", folder)
        assert len(task) == 50 and [task[i] for i in (9, 4)] == [again[i] for i in (9, 4)]
        words = {
            split: {
                row["messages"][0]["content"]
                for row in map(load_task(f"{name}/{split}:200", folder).__getitem__, range(200))
            }
            for split in ("train", "test")
        }
        assert words["train"] and words["test"] and not words["train"] & words["test"]
    bee = load_task("SpellingBee:300", folder)
    for i in range(300):
        text, python, output, end = bee[i]["messages"][1]["content"]
        assert calculate(python["text"]) == output["text"]
        assert end["text"].endswith(f"#### {output['text']}") and f"makes {output['text']}." in text["text"]
    spelled = load_task("SimpleSpelling", folder)[0]["messages"][1]["content"]
    word, letters = spelled.split(": ")
    assert letters == ",".join(word)


def test_mixtures(folder):
    mixture = load_mixture("identity, identity, GSM8K/train,SimpleSpelling:5", folder)
    assert len(mixture) == 3 + 3 + 1 + 5
    assert mixture[0] == mixture[3] and mixture[6]["messages"][0]["content"] == "Half of 4?"
    assert mixture.fingerprint != load_mixture("identity", folder).fingerprint
    with pytest.raises(IndexError):
        mixture[12]


@pytest.mark.parametrize(
    "spec, words",
    [
        ("Smoltalk/train", "unknown task 'Smoltalk'; it is one of SmolTalk, MMLU"),
        ("MMLU/auxiliary_train", r"no auxiliary_train\*.parquet in .*mmlu/all"),
        ("MMLU/test:many", "'many' is not a number of rows"),
        ("SimpleSpelling/validation", "no split 'validation'"),
        ("/nowhere/mine.jsonl", "no file /nowhere/mine.jsonl"),
    ],
)
def test_wrong_specs(folder, spec, words):
    with pytest.raises(UserError, match=words):
        load_task(spec, folder)


def test_empty_mixture(folder):
    with pytest.raises(UserError, match="--train_tasks=GSM8K/train:0 has no rows"):
        pipelines.load_tasks("GSM8K/train:0", folder, "train_tasks", documents=True)


@pytest.mark.parametrize(
    "line, words",
    [
        ("{", "line 2"),
        ('{"role": "user"}', "neither a JSON array"),
        ("[]", "no messages"),
        ('[{"role": "assistant", "content": "x"}]', "alternate"),
        ('[{"role": "robot", "content": "x"}]', "unknown role 'robot'"),
        (
            '[{"role":"user","content":"x"},{"role":"assistant","content":[{"type":"image","text":"x"}]}]',
            "unknown type",
        ),
    ],
)
def test_bad_lines_are_named(tmp_path, line, words):
    path = tmp_path / "mine.jsonl"
    path.write_text('[{"role": "user", "content": "x"}]\n' + line + "\n")
    with pytest.raises(UserError, match=f"mine.jsonl, line 2: .*{words}" if words != "line 2" else words):
        load_task(str(path))


def test_documents_are_for_mid_only(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('"plain text"\n[{"role": "user", "content": "x"}]\n')
    assert pipelines.load_tasks(str(path), tmp_path, "train_tasks", documents=True)[0] == {"text": "plain text"}
    with pytest.raises(UserError, match="plain documents"):
        pipelines.load_tasks(str(path), tmp_path, "train_tasks", documents=False)


def test_real_files_open_and_every_kind_of_row_is_valid(shared_data):
    specs = {
        spec
        for config in (MidConfig(), SFTConfig())
        for spec in (config.train_tasks + "," + config.val_tasks).split(",")
    }
    for spec in sorted(specs | {"MMLU/test", "ARC-Easy/test", "ARC-Challenge/test"}):
        task = load_task(spec, shared_data)
        assert len(task) > 0, spec
        for i in range(0, len(task), max(1, len(task) // 40)):
            check_conversation(task[i])
