"""Samples of a base model: its continuations of seven fixed prompts, printed while it trains."""

from jaxchat.infer.engine import Engine

PROMPTS = (
    "Paris is the capital of",
    "Water is made of hydrogen and",
    "The day after Monday is",
    "Big is the opposite of",
    "The colours of the rainbow are",
    "In my free time I like to",
    "Three times four is",
)


def continuations(engine: Engine, max_tokens: int = 16) -> list[tuple[str, str]]:
    """The likeliest continuation of each prompt, as (prompt, continuation)."""
    tokenizer = engine.tokenizer
    room = max(1, engine.config.sequence_len - max_tokens)
    prompts = [[tokenizer.bos, *tokenizer.encode(text)][-room:] for text in PROMPTS]
    found = engine.generate(prompts, max_tokens=max_tokens, temperature=0.0)
    return [(text, tokenizer.decode(one.tokens)) for text, one in zip(PROMPTS, found, strict=True)]


def show_samples(engine: Engine) -> list[tuple[str, str]]:
    """Print and return the likeliest continuation of each prompt."""
    print("continuations:")
    samples = continuations(engine)
    for text, found in samples:
        print(f"  {text} …{found!r}", flush=True)
    return samples
