"""The seven tasks, from small files in the hub's shapes and from the real ones; mixtures and their mistakes."""

import codecs
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxchat.config import MidConfig, SFTConfig, UserError
from jaxchat.data import pipelines
from jaxchat.data.sources import file_fingerprint
from jaxchat.data.tasks import Mixture, load_mixture, load_task, spelling
from jaxchat.data.tasks.hub import answer_parts, choice_conversation, suspects
from jaxchat.infer.calculator import calculate
from jaxchat.tokenizer import check_conversation
from jaxchat.train.stages import data_row


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


def questions(spec, folder):
    task = load_task(spec, folder)
    return [task[i]["messages"][0]["content"] for i in range(len(task))]


@pytest.mark.parametrize("name", ["SimpleSpelling", "SpellingBee"])
def test_generated_rows_depend_on_their_number_alone(folder, name):
    few, more = load_task(f"{name}:50", folder), load_task(f"{name}:5000", folder)
    assert len(few) == 50 and len(more) == 5000 and [few[i] for i in (9, 4)] == [more[i] for i in (9, 4)]
    assert len(load_task(name, folder)) == 1000, "a sensible number without :rows"
    assert not set(questions(f"{name}/train:500", folder)) & set(questions(f"{name}/test:500", folder))


def test_questions_of_spelling_vary(folder):
    """Dozens of phrasings, of which the test split shares none with training; quotes, capitals, marks left out."""
    for phrasings, spec, least in ((spelling.COUNT, "SpellingBee", 40), (spelling.SPELL, "SimpleSpelling", 20)):
        plain = {split: {p.lower().rstrip(" ?.!") for p in of} for split, of in phrasings.items()}
        assert len(plain["train"]) >= least and len(plain["test"]) >= 9 and not plain["train"] & plain["test"]
        asked = questions(f"{spec}:1000", folder)
        assert len(set(asked)) > 900
        for mark in ("'", '"', "`", "“", "?"):
            assert 20 < sum(mark in text for text in asked) < 980, mark
        assert 100 < sum(any(word.strip("'\"`“”?.,:").isupper() for word in text.split()) for text in asked) < 500
        assert 50 < sum(text == text.lower() for text in asked) < 500


def test_answers_of_spelling(folder):
    bee = load_task("SpellingBee:300", folder)
    for i in range(300):
        text, python, output, end = bee[i]["messages"][1]["content"]
        assert calculate(python["text"]) == output["text"]
        assert end["text"].endswith(f"#### {output['text']}") and f"makes {output['text']}." in text["text"]
        word = python["text"].split("'")[1]
        assert word == word.lower() and word in bee[i]["messages"][0]["content"].lower()
        assert [line[2:3] for line in text["text"].splitlines()[1:-1]] == list(word)
    word, letters = load_task("SimpleSpelling", folder)[0]["messages"][1]["content"].split(":")
    assert letters == ",".join(word)


def test_a_number_of_rows_is_a_fixed_draw(folder, shared_data):
    """Files are sorted by subject or source: what is taken of them must not be."""
    rows = [{"question": f"{i}?", "choices": ["a", "b"], "answer": 0, "subject": f"s{i // 10}"} for i in range(570)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "mmlu/all/validation.parquet")
    task, again = load_task("MMLU/validation:200", folder), load_task("MMLU/validation:200", folder)
    asked = [task[i]["messages"][0]["content"] for i in range(200)]
    assert asked == [again[i]["messages"][0]["content"] for i in range(200)] and len(set(asked)) == 200
    numbers = [int(text.split("?")[0].split()[-1]) for text in asked]
    assert len({n // 10 for n in numbers}) > 50 and numbers != sorted(numbers)
    everything = load_task("MMLU/validation:570", folder)  # all, so in order, as without a number
    assert everything[7]["messages"][0]["content"] == load_task("MMLU/validation", folder)[7]["messages"][0]["content"]
    real = load_task("MMLU/test:5200", shared_data)
    subjects = pq.read_table(shared_data / "mmlu/all/test.parquet", columns=["subject"])["subject"].to_pylist()
    assert len(real) == 5200 and len({subjects[i] for i in real._drawn}) == 57


def test_another_draw_is_other_data(folder):
    """So a run that learnt from the first rows of a file does not go on, on --resume, with drawn ones."""
    prints = [load_mixture(spec, folder).fingerprint for spec in ("identity", "identity:2", "SpellingBee:2")]
    files = [file_fingerprint(p)[:8] for p in (folder / "identity/identity_conversations.jsonl",)] * 2
    files += [file_fingerprint(folder / "words/words_alpha.txt")[:8]]
    assert [list(of.values())[0] for of in prints] == [
        f"3 rows of {files[0]}", f"2 rows of {files[1]}, shuffled", f"2 rows of {files[2]}-2",
    ]  # fmt: skip


TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def talks(path, rows, kind=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"messages": pa.array(rows, kind)}), path)


def messages_type(text, role_first=True):
    fields = [("role", text), ("content", text)]
    return pa.list_(pa.struct(fields if role_first else fields[::-1]))


def test_several_shards_in_whatever_layout(tmp_path):
    """Text as string or large_string, fields in either order: rows read in the order of the files, one by one."""
    kinds = [messages_type(pa.string()), messages_type(pa.large_string()), messages_type(pa.string(), role_first=False)]
    kinds += [pa.large_list(messages_type(pa.string()).value_type)]
    asked = []
    for n, kind in enumerate(kinds):
        rows = [[{**TALK[0], "content": f"{n}-{i}"}, TALK[1]] for i in range(3 + n)]
        asked += [row[0]["content"] for row in rows]
        talks(tmp_path / f"smoltalk/data/train-0000{n}-of-00004.parquet", rows, kind)
    (tmp_path / "smoltalk/data/._train-00000-of-00004.parquet").write_bytes(b"?")
    task = load_task("SmolTalk/train", tmp_path)
    assert [task[i]["messages"][0]["content"] for i in range(len(task))] == asked
    assert task[0]["messages"][1] == TALK[1] and task.summary == "SmolTalk/train 18"


@pytest.mark.parametrize(
    "names, words",
    [
        (["train", "train-00000-of-00001"], "holds train-00000-of-00001.parquet beside train.parquet, .* twice"),
        (["train-00000-of-00002", "train-00001-of-00002", "train-00000-of-00001"], "beside"),
        (["train-00000", "train-00000-of-00001"], "beside"),
        (
            ["train-00000-of-00003", "train-00002-of-00003"],
            "holds 2 files train-…-of-00003.* from 0 to 2.*launch.download",
        ),
        (["train-00000-of-00001-0123456789abcdef", "train-00000-of-00001-fedcba9876543210"], "not one each"),
        (["train-0", "train-1"], "is the same file as"),
    ],
)
def test_files_that_overlap_or_are_missing(tmp_path, names, words):
    for n, name in enumerate(names):
        same = "same file" in words
        talks(tmp_path / f"smoltalk/data/{name}.parquet", [[{**TALK[0], "content": "q" * (same or n + 1)}, TALK[1]]])
    with pytest.raises(UserError, match=words):
        load_task("SmolTalk/train", tmp_path)


def test_humaneval_in_two_folders_is_refused(tmp_path):
    rows = [{name: "x" for name in ("prompt", "canonical_solution", "test", "entry_point")}]
    for path in ("humaneval/openai_humaneval/test-00000-of-00001.parquet", "humaneval/test.parquet"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / path)
        if "openai" in path:
            assert len(load_task("HumanEval/test", tmp_path)) == 1
    with pytest.raises(UserError, match="holds openai_humaneval/.* beside test.parquet"):
        load_task("HumanEval/test", tmp_path)


WRONG_TALKS = [
    [TALK[0], TALK[0]], [TALK[1]], [], None, [{"role": "system", "content": "s"}], [*TALK, None],
    [TALK[0], {"role": "assistant", "content": None}], [TALK[0], {"role": "Assistant", "content": "a"}],
    [{"role": None, "content": "q"}], [TALK[0], {"role": "system", "content": "s"}, TALK[1]],
]  # fmt: skip


@pytest.mark.parametrize("wrong", range(len(WRONG_TALKS)))
def test_a_wrong_row_late_in_a_table_is_left_out_and_counted(tmp_path, wrong):
    """Found when the table is opened, not by the step that draws it; the good ones beside it stay."""
    system = [{"role": "system", "content": "s"}, *TALK]
    rows = [TALK] * 93 + [system, WRONG_TALKS[wrong], [*TALK, TALK[0]]] + [TALK] * 10
    talks(tmp_path / "smoltalk/data/train.parquet", rows, messages_type(pa.string()))
    task = load_task("SmolTalk/train", tmp_path)
    assert len(task) == 105 and [len(task[i]["messages"]) for i in (92, 93, 94, 95)] == [2, 3, 3, 2]
    assert task.summary.startswith("SmolTalk/train 105 (1 left out, train.parquet, row 94: ")
    assert data_row(Mixture([task]))[1].startswith("105 rows: SmolTalk/train 105 (1 left out, ")  # as the plan has it
    batch = pa.RecordBatch.from_pydict({"messages": pa.array(rows, messages_type(pa.string()))})
    assert suspects(batch).tolist() == [94]


def test_many_wrong_rows_are_another_format(tmp_path):
    talks(tmp_path / "smoltalk/data/train.parquet", [TALK] * 90 + [[TALK[1]]] * 10)
    with pytest.raises(UserError, match="train.parquet, row 90: turn 0 is the assistant's.*10 of its 100 rows"):
        load_task("SmolTalk/train", tmp_path)


def test_mixtures(folder):
    mixture = load_mixture("identity, identity, GSM8K/train,SimpleSpelling:5", folder)
    assert len(mixture) == 3 + 3 + 1 + 5
    assert mixture[0] == mixture[3] and mixture[6]["messages"][0]["content"] == "Half of 4?"
    assert mixture.fingerprint != load_mixture("identity", folder).fingerprint
    assert data_row(mixture)[1].startswith(f"{len(mixture):,} rows: 2 × identity ")
    assert len(load_mixture("identity:1," * 99, folder)) == 99  # together longer than a file's name may be
    with pytest.raises(IndexError):
        mixture[12]


@pytest.mark.parametrize(
    "spec, words",
    [
        ("Smoltalk/train", "unknown task 'Smoltalk'; it is one of SmolTalk, MMLU"),
        ("MMLU/auxiliary_train", r"no auxiliary_train\*.parquet in .*mmlu/all, only test.parquet; choose a split"),
        ("MMLU/test:many", "'many' is not a number of rows"),
        ("SimpleSpelling/validation", "no split 'validation'"),
        ("/nowhere/mine.jsonl", "no file /nowhere/mine.jsonl"),
        ("{folder}/mine.csv", "unknown task '{folder}/mine.csv'; .* ends in .jsonl, .json, .ndjson"),
        ("GSM8K/test", r"no test\*.parquet in .*main, only train.parquet; .* fetch it: .* gsm8k --to={folder}$"),
        ("HumanEval/test", "launch.download humaneval --to={folder};"),
    ],
)
def test_wrong_specs(folder, spec, words):
    (folder / "mine.csv").touch()
    with pytest.raises(UserError, match=words.format(folder=folder)):
        load_task(spec.format(folder=folder), folder)


def test_all_tasks_that_cannot_be_opened_are_named(folder):
    """Those without any file by one command; a wrong split keeps its own reason."""
    fetch = f"python -m launch.download humaneval words --to={folder}; or name --tasks_dir"
    missing = f"no files of HumanEval/test, SpellingBee:5 in {folder}; fetch them: {fetch}"
    shutil.rmtree(folder / "words")
    with pytest.raises(UserError) as refused:
        load_mixture("identity,GSM8K/tset,HumanEval/test,/nowhere/mine.jsonl:3,SpellingBee:5", folder)
    message = str(refused.value)
    assert "only train.parquet; choose a split with Name/split" in message and "no file /nowhere/mine.jsonl" in message
    assert message.endswith(f"; {missing}") and message.count("HumanEval") == 1
    flag = f"^--val_tasks: {missing}; or turn this evaluation off: --eval_every=-1$"
    with pytest.raises(UserError, match=flag):
        pipelines.load_tasks("HumanEval/test,SpellingBee:5", folder, "val_tasks", documents=False)


def test_empty_mixture(folder):
    with pytest.raises(UserError, match="--train_tasks=GSM8K/train:0 has no rows"):
        pipelines.load_tasks("GSM8K/train:0", folder, "train_tasks", documents=True)


@pytest.mark.parametrize(
    "line, words",
    [
        ("{", "line 2"),
        (json.dumps({"messages": '[{"role": "user", "content": "x"}]'}), "it must be a JSON array of messages"),
        ('{"role": "user"}', "it must be a JSON array of messages, an object with `messages`"),
        (
            '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": 0}]}',
            "weight",
        ),
        ('{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [{}]}]}', "calls tools"),
        ('{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "parts that are not text"),
        ("[]", "no messages"),
        ('[{"role": "assistant", "content": "x"}]', "alternate"),
        ('[{"role": "robot", "content": "x"}]', "unknown role 'robot'"),
        ('[{"role":"user","content":"x"},{"role":"user","content":"x"}]', "alternate"),
        ('[{"role":"user","content":"x"},{"role":"assistant","content":[{"type":"text"}]}]', "without a `text`"),
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


HI = [{"role": "user", "content": "hé"}, {"role": "assistant", "content": "a"}]
OPENAI = {
    "messages": [{"role": "developer", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "q"}]}]
}


@pytest.mark.parametrize(
    "data",
    [
        json.dumps(HI, ensure_ascii=False).encode("utf-8-sig"),
        (json.dumps(HI, ensure_ascii=False) + "\r\n").encode("utf-16"),
        codecs.BOM_UTF16_BE + json.dumps(HI, ensure_ascii=False).encode("utf-16-be"),
        json.dumps(HI, ensure_ascii=False).encode("utf-16-le"),
        json.dumps(HI, ensure_ascii=False).encode("utf-32"),
        json.dumps({"messages": HI, "source": "x"}).encode(),
        b"\r\n" + json.dumps(HI).encode() + b"\r",
    ],
)
def test_files_as_programs_write_them(tmp_path, data):
    """A byte order mark, UTF-16, OpenAI's objects, ends of lines of other systems; a path with colon and comma."""
    (tmp_path / "a:b, c").mkdir()
    path = tmp_path / "a:b, c" / "my,talks:2.jsonl"
    path.write_bytes(data)
    assert load_task(str(path))[0] == {"messages": HI}
    mixture = load_mixture(f"{path}, {path}:1,{path}")
    assert [len(task) for task in mixture.tasks] == [1, 1, 1] and mixture[2] == {"messages": HI}


@pytest.mark.parametrize("end", ["jsonl", "json", "JSONL", "ndjson"])
@pytest.mark.parametrize(
    "rows, text",
    [
        (2, json.dumps([HI, HI], indent=2)),
        (2, json.dumps([{"messages": HI}, {"messages": HI}], indent=2)),
        (2, json.dumps([HI, HI])),
        (2, json.dumps([{"messages": HI}] * 2) + "\n"),
        (1, json.dumps(HI, indent=2)),
        (2, "\n".join(json.dumps({"messages": HI}, indent=2) for _ in range(2))),
        (2, json.dumps(HI) + "\n\n" + json.dumps({"messages": HI})),
    ],
)
def test_json_that_is_not_a_row_a_line(tmp_path, rows, text, end):
    """An array of rows, or rows that go over several lines; an array of messages is one row, as on a line."""
    path = tmp_path / f"mine.{end}"
    path.write_text(text)
    task = load_task(str(path))
    assert len(task) == rows and all(task[i] == {"messages": HI} for i in range(rows))
    assert len(load_task(f"{path}:1")) == 1


@pytest.mark.parametrize(
    "text, words",
    [
        (json.dumps([HI, [{"role": "robot", "content": "x"}]], indent=1), "row 2: .*unknown role 'robot'"),
        (json.dumps([HI, 3]), "row 2: it must be a JSON array of messages"),
        ('{"data": ' + json.dumps([HI], indent=1) + "}", "row 1: it must be a JSON array of messages"),
        ("question,answer\nx,y\n", r"line 1: it is not JSON \(Expecting value, column 1\); it should hold"),
        (json.dumps([HI, HI], indent=1)[:-9], "line 1: it is not JSON"),
        (json.dumps(HI) + '\n{"a": ', "line 2: it is not JSON"),
        ("[" * 100_000, "line 1: it is nested too deeply"),
    ],
)
def test_files_that_hold_something_else(tmp_path, text, words):
    path = tmp_path / "mine.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=f"mine.jsonl, {words}"):
        load_task(str(path))


def test_files_without_a_row_and_put_together(tmp_path):
    path, line = tmp_path / "mine.jsonl", json.dumps(HI).encode()
    for data in (b"", codecs.BOM_UTF8, b"\n \r\n"):
        path.write_bytes(data)
        with pytest.raises(UserError, match="mine.jsonl is empty; it should hold, on each line"):
            load_task(str(path))
    path.write_bytes(b"\n".join([codecs.BOM_UTF8 + line] * 2))
    assert len(load_task(str(path))) == 2


def test_bytes_in_a_table_are_text(tmp_path):
    rows = [[{key: value.encode() for key, value in message.items()} for message in TALK]]
    talks(tmp_path / "smoltalk/data/train.parquet", rows, messages_type(pa.binary()))
    assert load_task("SmolTalk/train", tmp_path)[0] == {"messages": TALK}


@pytest.mark.parametrize(
    "path, columns",
    [
        ("smoltalk/data", {"messages": [json.dumps(TALK)]}),
        ("smoltalk/data", {"messages": [{"role": ["user"], "content": ["q"]}]}),
        ("arc/ARC-Easy", {"question": ["q"], "choices": [[{"text": "a", "label": "A"}]], "answerKey": ["A"]}),
        ("mmlu/all", {"question": ["q"], "choices": ["['a', 'b']"], "answer": [1]}),
    ],
)
def test_columns_of_another_shape_are_named(tmp_path, path, columns):
    (tmp_path / path).mkdir(parents=True)
    pq.write_table(pa.table(columns), tmp_path / path / "train.parquet")
    name = {"smoltalk": "SmolTalk", "arc": "ARC-Easy", "mmlu": "MMLU"}[path.split("/")[0]]
    with pytest.raises(UserError, match="row 0: (its columns have other types than exp|.* not a list of texts)"):
        load_task(f"{name}/train", tmp_path)


def test_choices_without_letters(tmp_path):
    with pytest.raises(UserError, match="11 choices; there are letters for 10"):
        choice_conversation("q", list("abcdefghijk"), 0)
    (tmp_path / "arc/ARC-Easy").mkdir(parents=True)
    row = {"question": "q", "choices": {"text": ["a", "b", "c"], "label": ["A", "B"]}, "answerKey": "A"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "arc/ARC-Easy/train.parquet")
    with pytest.raises(UserError, match="row 0: it has 2 labels for 3 choices"):
        load_task("ARC-Easy/train", tmp_path)


def test_openai_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(OPENAI) + "\n" + json.dumps({"text": "a document"}) + "\n")
    task = load_task(str(tmp_path / "a.jsonl"))
    assert task[0]["messages"] == [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    assert task[1] == {"text": "a document"} and task.has_documents


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
