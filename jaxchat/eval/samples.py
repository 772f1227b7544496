"""Samples: a base model's continuations of fixed texts, and a chat model's answers to fixed questions."""

from collections.abc import Sequence

from jaxchat.infer.engine import Engine
from jaxchat.infer.text import format_parts, split_parts

PROMPTS = (
    "Paris is the capital of",
    "Water is made of hydrogen and",
    "The day after Monday is",
    "Big is the opposite of",
    "The colours of the rainbow are",
    "In my free time I like to",
    "Three times four is",
)
QUESTIONS = (
    "Hello! Who are you?",
    "What is 23 * 7?",
    "How many r are in strawberry?",
    "What is the capital of France?",
    "Why is the sky blue?",
)


def continuations(engine: Engine, texts: Sequence[str] = PROMPTS, max_tokens: int = 16) -> list[str]:
    """Return a greedy continuation of each text, of at most max_tokens tokens and without the text itself."""
    tokenizer = engine.tokenizer
    found = greedy(engine, [[tokenizer.bos, *tokenizer.encode(text)] for text in texts], max_tokens)
    return [tokenizer.decode(generation.tokens) for generation in found]


def answers(engine: Engine, questions: Sequence[str]) -> list[str]:
    """Return the text of a greedy answer to each question, with tool calls and their outputs in brackets."""
    tokenizer = engine.tokenizer
    talks = [{"messages": [{"role": "user", "content": question}]} for question in questions]
    prompts = [tokenizer.render_for_completion(talk) for talk in talks]
    return [format_parts(split_parts(generation, tokenizer)) for generation in greedy(engine, prompts, 128)]


def greedy(engine: Engine, prompts: list[list[int]], max_tokens: int) -> list:
    """Continue each prompt greedily by at most max_tokens tokens, or half of the context if that is less.

    Prompts that are too long for the rest of the context are cut at their start.
    """
    most = min(max_tokens, engine.config.sequence_len // 2)
    room = engine.config.sequence_len - most
    return engine.generate([prompt[-room:] for prompt in prompts], max_tokens=most, temperature=0.0)


def show_samples(engine: Engine) -> list[tuple[str, str]]:
    """Print a greedy continuation of each of PROMPTS; return the (prompt, continuation) pairs."""
    print("continuations:")
    samples = list(zip(PROMPTS, continuations(engine), strict=True))
    for text, continuation in samples:
        print(f"  {text} …{continuation!r}", flush=True)
    return samples
