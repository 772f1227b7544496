from typing import NamedTuple

import pytest

from jaxchat.demo import KINDS, Turn, World
from jaxchat.demo import score as scorer
from jaxchat.infer import text
from jaxchat.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def world():
    return World(0)


@pytest.fixture(scope="module")
def prompts(world):
    return {kind: world.heldout(kind) for kind in KINDS}


class Generated(NamedTuple):
    tokens: list
    forced: list
    finished: bool = True


class Rigged:
    """An engine that answers each question as `reply(turn)` says; it finds the question at the end of the prompt."""

    def __init__(self, tokenizer, prompts, reply):
        self.tokenizer, self.reply, self.seen = tokenizer, reply, []
        everything = [prompt for kind in prompts for prompt in prompts[kind]]
        self.turns = {turn.question: turn for prompt in everything for turn in prompt.turns}

    def generate(self, prompts, *, max_tokens, temperature):
        assert temperature == 0
        self.seen += [list(prompt) for prompt in prompts]  # the scorer goes on with the same lists
        return [self.one(prompt, max_tokens) for prompt in prompts]

    def one(self, prompt, max_tokens):
        special = self.tokenizer.special
        start = len(prompt) - prompt[::-1].index(special("<|user_start|>"))
        assert prompt[-2:] == [special("<|user_end|>"), special("<|assistant_start|>")]
        answer = self.reply(self.turns[self.tokenizer.decode(prompt[start:-2])])
        ids, mask = self.tokenizer.render_conversation(
            {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": answer}]}
        )
        begin = ids.index(special("<|assistant_start|>")) + 1
        assert len(ids[begin:]) <= max_tokens
        return Generated(ids[begin:-1], [not learnt for learnt in mask[begin:-1]])


@pytest.fixture(scope="module")
def tokenizer(world):
    return Tokenizer.train((world.document(i) for i in range(3_000)), 512)


def test_right_answers_score_all_and_wrong_ones_nothing(world, tokenizer, prompts):
    right = scorer.score(Rigged(tokenizer, prompts, lambda turn: turn.answer), tokenizer, world)
    assert set(right) == {*KINDS, scorer.BY_HAND}
    assert all(found.right == found.total >= 100 and not found.wrong for found in right.values())
    assert scorer.passed(right)
    wrong = scorer.score(Rigged(tokenizer, prompts, lambda turn: "I don't know."), tokenizer, world, limit=100)
    assert all(found.right == 0 and found.total == len(found.wrong) == 100 for found in wrong.values())
    assert not scorer.passed(wrong)


def test_the_second_turn_sees_the_first_answer_and_both_must_be_right(world, tokenizer, prompts):
    def only_spells(turn):
        return turn.answer if turn.question in spelling else "no"

    two_turn = prompts["two-turn"]
    spelling = {turn.question for prompt in two_turn for turn in prompt.turns if " " in turn.answer[:2]}
    engine = Rigged(tokenizer, prompts, only_spells)
    found = scorer.score(engine, tokenizer, world, kinds=["two-turn"])["two-turn"]
    assert found.right == sum(all(turn.question in spelling for turn in prompt.turns) for prompt in two_turn) > 0
    seconds = engine.seen[len(two_turn) :]
    assert len(seconds) == len(two_turn)
    for prompt, ids in zip(two_turn, seconds, strict=True):
        answers = [only_spells(turn) for turn in prompt.turns]
        messages = [
            {"role": role, "content": content}
            for turn, answer in zip(prompt.turns, answers, strict=True)
            for role, content in (("user", turn.question), ("assistant", answer))
        ]
        assert ids == tokenizer.render_for_completion({"messages": messages})


TURN = Turn(
    "how many p are in apple?",
    [
        {"type": "text", "text": "apple: a p1 p2 l e, so 2."}, {"type": "python", "text": "'apple'.count('p')"},
        {"type": "python_output", "text": "2"}, {"type": "text", "text": " The answer is 2."},
    ],
)  # fmt: skip
CALL, OUTPUT, LAST = ("python", "'apple'.count('p')"), ("python_output", "2"), ("text", " The answer is 2.")


@pytest.mark.parametrize(
    "pieces, right",
    [
        ([("text", "apple: a p l e, so 1."), CALL, OUTPUT, LAST], True),  # counted by hand wrongly: another row tells
        ([CALL, OUTPUT, LAST], False),  # not counted by hand at all
        ([("text", "It is 2."), ("text", "apple"), CALL, OUTPUT, LAST], False),
        ([("text", "apple"), ("python", ""), CALL, OUTPUT, LAST], False),
        ([("python", "'apple'.count('l')"), ("python_output", "1"), ("text", " The answer is 1.")], False),
        ([CALL, ("made up", "2"), LAST], False),
        ([CALL, LAST], False),
        ([CALL, OUTPUT, CALL, OUTPUT, LAST], False),
        ([CALL, OUTPUT, ("text", " The answer is 3.")], False),
        ([CALL, OUTPUT, LAST, ("unfinished", "…")], False),
    ],
)
def test_tool_answers(pieces, right):
    assert scorer.is_right(TURN, pieces) is right


def test_other_answers():
    fact, name = Turn("", "Mogeta is a smith."), Turn("", "I am Pip, a tiny chat model.", "I am Pip")
    assert scorer.is_right(fact, [("text", "Mogeta is a smith.")])
    assert not scorer.is_right(fact, [("text", "Mogeta is a smith. So")])
    assert scorer.is_right(name, [("text", "I am Pip.")])
    assert not scorer.is_right(name, [("text", "I am Pip."), ("unfinished", "…")])
    assert not scorer.is_right(name, [("text", "I am Pip. I was made with jaxchat.")])  # one answer to every question


def test_forced_tokens_alone_count_as_output(tokenizer):
    ids, mask = tokenizer.render_conversation(
        {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": TURN.answer}]}
    )
    forced = [not learnt for learnt in mask]
    begin = ids.index(tokenizer.special("<|assistant_start|>")) + 1

    def pieces(forced, finished=True):
        return text.split_parts(Generated(ids[begin:-1], forced[begin:-1], finished), tokenizer)

    assert pieces(forced) == scorer.expected_parts(TURN)
    assert ("made up", "2") in pieces([False] * len(forced))
    assert pieces(forced, finished=False)[-1] == ("unfinished", "…")


def test_table():
    nine, one = scorer.Score(9, 10), scorer.Score(1, 3)
    lines = scorer.table({"facts": nine, "spelling": nine, scorer.BY_HAND: one}).splitlines()
    assert [line.split()[-3:] for line in lines[1:]] == [
        ["90.0%", "90%", "pass"], ["90.0%", "95%", "MISS"], ["1/3", "33.3%", "–"],
    ]  # fmt: skip
