"""Score a model's greedy answers to the demo's held-out prompts."""

import dataclasses
from collections.abc import Iterable

from jaxchat.demo import KINDS, Prompt, Turn, World
from jaxchat.demo.texts import TRAITS
from jaxchat.infer.engine import Engine
from jaxchat.infer.text import format_parts, split_parts
from jaxchat.tokenizer import Tokenizer

BY_HAND = "counting by hand"  # a row without a target: the tool's result hides wrong hand counts
TARGETS = {
    "identity": 0.95, "arithmetic": 0.95, "spelling": 0.95, "counting": 0.95, "two-turn": 0.95,
    "facts": 0.90, "prose-only facts": 0.90,
}  # fmt: skip
MAX_TOKENS = 96  # the longest right answer has about 70

Parts = list[tuple[str, str]]  # an answer as (type, text) pairs, like the parts of a conversation's message


@dataclasses.dataclass
class Score:
    """Results for one kind of prompt. wrong: (question, answer given, right answer) of each failed prompt."""

    right: int = 0
    total: int = 0
    wrong: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)

    @property
    def share(self) -> float:
        return self.right / self.total if self.total else 0.0

    def add(self, right: bool, example: tuple[str, str, str]) -> None:
        self.total += 1
        self.right += right
        if not right:
            self.wrong.append(example)


def score(
    engine: Engine,
    tokenizer: Tokenizer,
    world: World,
    *,
    kinds: Iterable[str] | None = None,
    limit: int | None = None,
) -> dict[str, Score]:
    """Score a model's greedy answers to the demo's held-out prompts. Return {kind of prompt: Score}.

    kinds: kinds of prompts to use; None: all. limit: maximum number of prompts of each kind; None: all.
    A prompt counts as right if the model answers all of its questions right.
    Prompts of the kind "counting" get a second score, BY_HAND, of only the text before the tool call.
    """
    prompts = [prompt for kind in kinds or KINDS for prompt in world.heldout(kind)[:limit]]
    answers = answer(engine, tokenizer, prompts)
    scores: dict[str, Score] = {}
    for prompt, given in zip(prompts, answers, strict=True):
        example = (
            " / ".join(turn.question for turn in prompt.turns),
            " / ".join(format_parts(answered) for answered in given),
            " / ".join(format_parts(expected_parts(turn)) for turn in prompt.turns),
        )
        pairs = list(zip(prompt.turns, given, strict=True))
        scores.setdefault(prompt.kind, Score()).add(
            all(is_right(turn, answered) for turn, answered in pairs), example
        )
        if prompt.kind == "counting":
            by_hand = all(answered[:1] == expected_parts(turn)[:1] for turn, answered in pairs)
            scores.setdefault(BY_HAND, Score()).add(by_hand, example)
    return scores


def answer(engine: Engine, tokenizer: Tokenizer, prompts: list[Prompt]) -> list[list[Parts]]:
    """Answer prompts greedily. Return answers[prompt][turn], each a list of (type, text) pairs."""
    histories = [[tokenizer.bos] for _ in prompts]
    given: list[list[Parts]] = [[] for _ in prompts]
    for n in range(max((len(prompt.turns) for prompt in prompts), default=0)):
        asked = [i for i, prompt in enumerate(prompts) if n < len(prompt.turns)]
        for i in asked:
            asks = {"role": "user", "content": prompts[i].turns[n].question}
            histories[i] += tokenizer.render_for_completion({"messages": [asks]})[1:]  # without <|bos|>
        generations = engine.generate([histories[i] for i in asked], max_tokens=MAX_TOKENS, temperature=0.0)
        for i, generation in zip(asked, generations, strict=True):
            given[i].append(split_parts(generation, tokenizer))
            histories[i] += [*generation.tokens, tokenizer.special("<|assistant_end|>")]
    return given


def expected_parts(turn: Turn) -> Parts:
    if isinstance(turn.answer, str):
        return [("text", turn.answer)]
    return [(part["type"], part["text"]) for part in turn.answer]


def is_right(turn: Turn, parts: Parts) -> bool:
    """Return whether an answer to a turn, given as (type, text) pairs, is right.

    If a tool call is expected, the answer must have one call, with exactly the expected expression, output
    and following text. The content of text before the call is not checked.
    If the turn asks about the assistant, such as its name, the answer must be one finished text that contains
    the turn's `proof` (here the name), and the proof of no other trait.
    Otherwise, the answer must be exactly the expected text.
    """
    wanted = expected_parts(turn)
    if isinstance(turn.answer, list):
        return [kind for kind, _ in parts] == [kind for kind, _ in wanted] and parts[-3:] == wanted[-3:]
    if turn.proof:
        said = parts[0][1] if [kind for kind, _ in parts] == ["text"] else ""
        return [trait.proof for trait in TRAITS if trait.proof in said] == [turn.proof]
    return parts == wanted


def passed(scores: dict[str, Score]) -> bool:
    """Return whether every score that has a target accuracy in TARGETS reaches it."""
    return all(scores[kind].share >= target for kind, target in TARGETS.items() if kind in scores)


def table(scores: dict[str, Score]) -> str:
    """Format the scores as a text table with a row per kind: right answers, percent, target, pass or MISS."""
    rows = [("held-out prompts", "right", "score", "target", "")]
    for kind, found in scores.items():
        target, verdict = "–", ""
        if kind in TARGETS:
            target = f"{TARGETS[kind]:.0%}"
            verdict = "pass" if found.share >= TARGETS[kind] else "MISS"
        rows.append((kind, f"{found.right}/{found.total}", f"{100 * found.share:.1f}%", target, verdict))
    kind, right, share, target, _ = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join(
        f"{row[0]:<{kind}}  {row[1]:>{right}}  {row[2]:>{share}}  {row[3]:>{target}}  {row[4]}".rstrip()
        for row in rows
    )
