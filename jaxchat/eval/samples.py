"""Seven beginnings that a base model continues while it trains: to see by eye what it knows by now."""

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


def show_samples(engine: Engine, max_tokens: int = 16) -> dict[str, float]:
    """Print the likeliest continuation of each prompt. -> no numbers."""
    tokenizer = engine.tokenizer
    room = max(1, engine.config.sequence_len - max_tokens)
    prompts = [[tokenizer.bos, *tokenizer.encode(text)][-room:] for text in PROMPTS]
    for text, found in zip(PROMPTS, engine.generate(prompts, max_tokens=max_tokens, temperature=0.0), strict=True):
        print(f"  {text} …{tokenizer.decode(found.tokens)!r}", flush=True)
    return {}
