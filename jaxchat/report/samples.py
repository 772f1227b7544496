"""What the models of a run say: continuations by the first stage, conversations by those that chat."""

import dataclasses

from jaxchat import checkpoint
from jaxchat.checkpoint import Found
from jaxchat.config import STAGES
from jaxchat.infer.engine import Engine
from jaxchat.infer.text import pieces, shown
from jaxchat.report.gather import Run

BEGINNINGS = (
    "Paris is the capital of",
    "Water is made of hydrogen and",
    "The day after Monday is",
    "The colours of the rainbow are",
    "In my free time I like to",
)
QUESTIONS = (
    "Hello! Who are you?",
    "What is 23 * 7?",
    "How many r are in strawberry?",
    "What is the capital of France?",
    "Why is the sky blue?",
)


@dataclasses.dataclass(frozen=True)
class Samples:
    """continued: (beginning, {stage: what follows}); answered: (question, {stage: answer, tool calls in brackets})."""

    continued: list[tuple[str, dict[str, str]]]
    answered: list[tuple[str, dict[str, str]]]


def sample(run: Run, beginnings=BEGINNINGS, questions=QUESTIONS, max_tokens: int = 128) -> Samples:
    """Let the last checkpoint of each stage go on greedily, the first stage with texts, the others in conversations."""
    first, *others = STAGES
    continued = [(text, {}) for text in beginnings]
    answered = [(question, {}) for question in questions]
    for name, stage in run.stages.items():
        model = checkpoint.open_model(name, run.tag, stage.step)
        asked, tell = (answered, answer) if name in others else (continued, go_on)
        for (_, said), text in zip(asked, tell(model, [text for text, _ in asked], max_tokens), strict=True):
            said[name] = text
    return Samples(continued if first in run.stages else [], answered if {*others} & {*run.stages} else [])


def go_on(model: Found, texts: list[str], max_tokens: int) -> list[str]:
    tokenizer, most = model.tokenizer, min(max_tokens // 4, model.config.sequence_len // 2)
    room = model.config.sequence_len - most
    prompts = [[tokenizer.bos, *tokenizer.encode(text)][-room:] for text in texts]
    engine = Engine(model.load(), model.config, tokenizer, batch_size=len(prompts))
    return [tokenizer.decode(found.tokens) for found in engine.generate(prompts, max_tokens=most, temperature=0.0)]


def answer(model: Found, questions: list[str], max_tokens: int) -> list[str]:
    tokenizer, most = model.tokenizer, min(max_tokens, model.config.sequence_len // 2)
    room = model.config.sequence_len - most
    talks = [[{"role": "user", "content": question}, {"role": "assistant", "content": ""}] for question in questions]
    prompts = [tokenizer.render_for_completion({"messages": talk})[-room:] for talk in talks]
    engine = Engine(model.load(), model.config, tokenizer, batch_size=len(prompts))
    found = engine.generate(prompts, max_tokens=most, temperature=0.0)
    return [shown(pieces(generation, tokenizer)) for generation in found]
