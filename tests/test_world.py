import itertools
import json
import re
import subprocess
import sys
from collections import Counter

import pyarrow.parquet as pq
import pytest

from jaxchat.config import UserError
from jaxchat.demo import KINDS, World, texts, write_world
from jaxchat.demo.chance import Chance
from jaxchat.demo.sums import Sum, pair_is_held_out
from jaxchat.demo.words import counted_letters, in_words
from jaxchat.infer.calculator import calculate
from jaxchat.tokenizer import Tokenizer, check_conversation

SMALL = {"base_shards": 2, "base_rows": 1200, "base_val_rows": 600, "mid_rows": 40, "sft_rows": 20, "val_rows": 10}


@pytest.fixture(scope="module")
def world():
    return World(0)


@pytest.fixture(scope="module")
def conversations(world):
    return [world.conversation(i) for i in range(20_000)]


@pytest.fixture(scope="module")
def prompts(world):
    return {kind: world.heldout(kind) for kind in KINDS}


def normalized(text):
    """Words, numbers and signs alone: case, commas, points and question marks make no difference."""
    return " ".join(re.findall(r"[a-z]+|[0-9]+|[-+*/={}]", text.lower()))


def questions(conversations):
    return [message["content"] for messages in conversations for message in messages[::2]]


def turns(prompts, *kinds):
    return [turn for kind in kinds for prompt in prompts[kind] for turn in prompt.turns]


def expression(turn):
    return next(part["text"] for part in turn.answer if part["type"] == "python")


def test_a_world_is_the_same_in_every_process_and_differs_by_seed(world):
    code = (
        "import hashlib, sys; from jaxchat.demo import KINDS, World; w = World(int(sys.argv[1]));"
        "all = [(w.document(i), w.conversation(i)) for i in range(300)] + [w.heldout(kind) for kind in KINDS];"
        "print(hashlib.sha256(repr(all).encode()).hexdigest())"
    )

    def digest(seed, hash_seed):
        environment = {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(filter(None, sys.path))}
        run = subprocess.run([sys.executable, "-c", code, seed], capture_output=True, check=True, env=environment)
        return run.stdout

    assert digest("0", "1") == digest("0", "2") != digest("1", "1")


def test_every_document_and_conversation_depends_on_its_index_alone(world):
    assert [World(0).document(i) for i in (7, 3)] == [world.document(i) for i in (7, 3)]
    assert World(0).conversation(5) == world.conversation(5) != world.conversation(6)


def test_no_two_names_share_a_beginning(world):
    names = set(world.facts) | {facts["capital"] for facts in world.facts.values() if "capital" in facts}
    assert len({name[:5] for name in names}) == len(names) == 36 + 18 + 18


def test_prose_writes_sums_as_expressions(world):
    """The numbers of the sum in words stand in the expression, in their order; a result is the expression's."""
    sentence = re.compile(
        r"(\d+) (\+|-|\*|/|x|plus|minus|times|divided by) (\d+)\D+?(\d+)([-+*/])(\d+)(?: is (-?[\d.]+))?\.( |$)"
    )
    signs = {"plus": "+", "minus": "-", "times": "*", "x": "*", "divided by": "/"}
    found = [match for i in range(3_000) for match in sentence.findall(world.document(i))]
    assert len(found) > 500
    for a, word, b, left, sign, right, result, _ in found:
        assert (a, signs.get(word, word), b) == (left, sign, right)
        assert not result or float(result) == pytest.approx(eval(f"{left}{sign}{right}"), abs=1e-9)


def test_prose_states_every_fact_and_much_of_it_is_facts(world):
    documents = [world.document(i) for i in range(20_000)]
    stating = [
        text for text in documents if text.split()[0] in world.facts or any(name in text for name in world.facts)
    ]
    assert 0.40 < sum(map(len, stating)) / sum(map(len, documents)) < 0.55
    everything = "\n".join(stating)
    for name, facts in world.facts.items():
        for relation, value in facts.items():
            assert texts.RELATIONS[relation].tell[0].format(x=name, v=value) in everything


def test_conversations_are_valid_and_the_calculator_agrees(conversations):
    calls = 0
    for messages in conversations:
        check_conversation({"messages": messages})
        for message in messages[1::2]:
            if isinstance(message["content"], list):
                code, output = [part["text"] for part in message["content"] if part["type"].startswith("python")]
                assert calculate(code) == output, code
                assert message["content"][-1]["text"] == f" The answer is {output}."
                calls += 1
    assert calls > 8_000


def test_held_out_prompts_are_at_least_a_hundred_and_all_different(prompts):
    for kind, found in prompts.items():
        assert len(found) >= 100
        assert len({tuple(turn.question.lower() for turn in prompt.turns) for prompt in found}) == len(found), kind
        assert {len(prompt.turns) for prompt in found} == {2 if kind == "two-turn" else 1}


def test_no_held_out_question_is_asked_in_training(prompts, conversations):
    asked = {normalized(question) for question in questions(conversations)}
    assert not {normalized(turn.question) for turn in turns(prompts, *KINDS)} & asked


def test_held_out_words_pairs_and_entities_are_in_no_training_conversation(world, prompts, conversations):
    said = set(re.findall("[a-z]+", json.dumps(conversations).lower()))
    for turn in turns(prompts, "spelling"):
        assert turn.answer.replace(" ", "") not in said
    for turn in turns(prompts, "counting"):
        assert re.match("' ([a-z]+)'", expression(turn))[1] not in said
    assert not {name.lower() for name in world.prose_only} & said
    assert {name.lower() for name in world.asked} <= said
    called = {
        part["text"] for messages in conversations for message in messages for part in message["content"]
        if isinstance(part, dict) and part["type"] == "python"
    }  # fmt: skip
    trained = {frozenset(re.findall("[0-9]+", code)) for code in called if "count" not in code}
    for turn in turns(prompts, "arithmetic"):
        numbers = re.findall("[0-9]+", expression(turn))
        assert pair_is_held_out(0, *map(int, numbers))
        assert frozenset(numbers) not in trained


def test_prose_spells_no_held_out_word(world):
    prose = re.sub("[0-9]", "", " ".join(world.document(i) for i in range(5_000)))  # "a p1 p2 l e" spells too
    spelled = {letters.replace(" ", "") for letters in re.findall(r"\b\w(?: \w)+\b", prose)}
    assert len(spelled) > 500 and not spelled & set(world.held_out_words)


def test_tokens_that_begin_held_out_words_begin_others_too():
    """A word is spelled by its tokens: one that begins no training word ("red|uce") cannot be spelled."""
    world = World(2)
    tokenizer = Tokenizer.train((world.document(i) for i in range(4000)), 512)
    trained = (world._word(Chance(f"{i}"), held_out=False) for i in range(5000))
    begins = Counter(tokenizer.encode(f" {word}")[0] for word in trained)
    first = {word: tokenizer.encode(f" {word}")[0] for word in world.held_out_words}
    assert not [word for word in first if begins[first[word]] < 3]


def test_held_out_phrasings_are_not_training_ones_with_an_opener_or_another_end():
    groups = [texts.SUM_FRAMES, texts.SPELLING, texts.COUNTING, *texts.SUM_WORDS.values()]
    groups += [trait.ask for trait in texts.TRAITS] + [relation.ask for relation in texts.RELATIONS.values()]
    openers = {"", *map(normalized, texts.OPENERS)}
    ends = {"", *map(normalized, texts.QUESTION_ENDS + texts.REQUEST_ENDS)}

    def dressed(phrasing):
        return {" ".join(filter(None, (o, normalized(phrasing), e))) for o, e in itertools.product(openers, ends)}

    training = set().union(*(dressed(phrasing) for group in groups for phrasing in group.train))
    for phrasing in itertools.chain(*(group.held_out for group in groups)):
        assert not dressed(phrasing) & training, phrasing


def test_each_answer_proves_only_its_own_trait():
    for trait in texts.TRAITS:
        assert [other for other in texts.TRAITS if trait.proof in other.answer] == [trait]


def test_unknown_kind(world):
    with pytest.raises(UserError, match="'poems'.*identity"):
        world.heldout("poems")


def test_words_and_sums():
    assert counted_letters("apple", "p") == "a p1 p2 l e"
    assert (in_words(342), in_words(40), in_words(700)) == ("three hundred forty-two", "forty", "seven hundred")
    assert [Sum(7, sign, 2).result for sign in "+-*/"] == ["9", "5", "14", "3.5"]
    assert Sum(8, "/", 2).result == "4" and not Sum(2, "-", 8).is_natural


# The files.


def contents(directory):
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def test_files_are_the_same_for_the_same_seed_and_differ_by_seed(tmp_path):
    counts = write_world(World(3), tmp_path / "a", **SMALL)
    write_world(World(3), tmp_path / "b", **SMALL)
    write_world(World(4), tmp_path / "c", **SMALL)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b and len(a) == len(counts) == 6
    assert all(a[name] != c[name] for name in a)


def test_files_hold_what_they_should(tmp_path):
    counts = write_world(World(3), tmp_path, **SMALL)
    shards = sorted((tmp_path / "base_data").iterdir())
    assert [pq.read_metadata(shard).num_rows for shard in shards] == [1200, 1200, 600]
    assert pq.read_metadata(shards[-1]).num_row_groups > 1
    lines = {
        path.name: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in (tmp_path / "tasks").iterdir()
    }
    assert {name: len(rows) for name, rows in lines.items()}.items() <= counts.items()
    assert sum(isinstance(row, str) for row in lines["world_mid.jsonl"]) == 12  # 30 % of 40
    assert all(isinstance(row, list) for name in ("world_sft.jsonl", "world_val.jsonl") for row in lines[name])
    documents = [text for shard in shards for text in pq.read_table(shard)["text"].to_pylist()]
    assert documents[-1] == World(3).document(2999)
    assert [row for row in lines["world_mid.jsonl"] if isinstance(row, str)][0] == World(3).document(3000)
    assert lines["world_sft.jsonl"][0] == json.loads(json.dumps(World(3).conversation(28)))


def test_parquet_of_something_else_is_not_mixed_in(tmp_path):
    (tmp_path / "base_data").mkdir()
    (tmp_path / "base_data" / "web.parquet").touch()
    with pytest.raises(UserError, match=r"1 other parquet files \(web.parquet"):
        write_world(World(0), tmp_path, **SMALL)
    assert len(contents(tmp_path)) == 1
