"""Generate samples from a run's models: the base model continues texts, chat models answer questions."""

import dataclasses
from collections.abc import Sequence

from jaxchat import checkpoint
from jaxchat.config import STAGES
from jaxchat.eval import samples
from jaxchat.infer.engine import Engine
from jaxchat.report.gather import Run


@dataclasses.dataclass(frozen=True)
class Samples:
    """A run's samples: pairs (text, continuation) for base, (question, {stage: answer}) for later stages."""

    continued: list[tuple[str, str]]
    answered: list[tuple[str, dict[str, str]]]


def sample(run: Run, texts: Sequence[str], questions: Sequence[str]) -> Samples:
    """Generate greedy samples. The base model continues `texts`, and later models answer `questions`."""
    continued, answered = [], {}
    for name, stage in run.stages.items():
        found = checkpoint.open_model(name, run.tag, stage.step)
        chats = bool(STAGES[name].parents)
        asked = questions if chats else texts
        engine = Engine(found.load(), found.config, found.tokenizer, batch_size=len(asked))
        if chats:
            for question, answer in zip(questions, samples.answers(engine, questions), strict=True):
                answered.setdefault(question, {})[name] = answer
        else:
            continued = list(zip(texts, samples.continuations(engine, texts, 32), strict=True))
    return Samples(continued, list(answered.items()))
