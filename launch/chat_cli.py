"""Talk to a trained model: python -m launch.chat_cli -p "What is 23 * 7?" """

import dataclasses

from jaxchat.config import UserError
from launch import cli


@dataclasses.dataclass(frozen=True)
class Config:
    """Chat with a model in the terminal. /clear begins a new conversation, /quit leaves."""

    source: str = dataclasses.field(default="sft", metadata={"alias": "-i"})
    """sft, mid, or base (which only continues text)."""
    model_tag: str = dataclasses.field(default="", metadata={"alias": "-g"})
    """Which model; empty: the deepest d<N>, or else the newest."""
    step: int = dataclasses.field(default=-1, metadata={"alias": "-s"})
    """Which of its checkpoints; -1: the last."""
    prompt: str = dataclasses.field(default="", metadata={"alias": "-p"})
    """Answer this and leave."""
    temperature: float = dataclasses.field(default=0.6, metadata={"alias": "-t"})
    """0: always the likeliest token."""
    top_k: int = dataclasses.field(default=50, metadata={"alias": "-k"})
    """Draw from so many likeliest tokens."""
    max_tokens: int = 256
    """The longest answer."""
    seed: int = 0
    """Of the draws."""


COMMANDS = "/clear begins a new conversation, /quit leaves"


def run(config: Config):
    import jax

    from jaxchat import checkpoint, sharding
    from jaxchat.infer.engine import Engine
    from jaxchat.infer.text import TextReader, Writer

    for name, value, least in (("temperature", config.temperature, 0.0), ("max_tokens", config.max_tokens, 1)):
        if value < least:
            raise UserError(f"--{name}={value}; it must be at least {least}")
    sharding.keep_compiled()
    model = checkpoint.open_model(config.source, config.model_tag, config.step)
    tokenizer = model.tokenizer
    cli.print_plan(
        f"Chat with {model.tag} ({config.source})",
        [("model", str(model.path)), ("device", jax.devices()[0].device_kind)],
    )
    if config.source == "base":
        print("this is a base model: it continues text, it doesn't answer\n")
    if not config.prompt:
        print(COMMANDS)
    engine = Engine(model.load(), model.config, tokenizer, batch_size=1)
    special, room = tokenizer.special, model.config.sequence_len
    start, end = special("<|assistant_start|>"), special("<|assistant_end|>")
    conversation, seed = [tokenizer.bos], config.seed
    while True:
        try:
            text = config.prompt or input("you: ").strip()
        except EOFError:
            print()
            return
        if not config.prompt:
            if text == "/quit":
                return
            if text == "/clear":
                conversation = [tokenizer.bos]
            elif text.startswith("/"):
                print(COMMANDS)
            if not text or text.startswith("/"):
                continue
        turn = tokenizer.encode(text)
        if config.source != "base":
            turn = [special("<|user_start|>"), *turn, special("<|user_end|>"), start]
        if not config.prompt and 1 + len(turn) >= room:
            print(f"(that is {1 + len(turn):,} tokens; the model takes less than {room:,})")
            continue
        if len(conversation) > 1 and len(conversation) + len(turn) >= room:
            print(f"(the conversation has filled the model's {room} tokens; a new one begins)")
            conversation = [tokenizer.bos]
        conversation += turn
        reader, writer = TextReader(tokenizer), Writer()
        print("" if config.prompt else "model: ", end="")
        answer = engine.stream(
            conversation,
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            top_k=max(0, config.top_k),
            seed=seed,
        )
        told = 0
        for token, forced in answer:
            print(writer.write(reader.feed(token, forced)), end="", flush=True)
            conversation.append(token)
            told += 1
        cut = told >= config.max_tokens or len(conversation) >= room
        print(writer.write(reader.end()) + writer.end(cut), flush=True)
        if config.prompt:
            return
        if config.source != "base":
            conversation.append(end)
        seed += 1


def main(args: list[str] | None = None):
    cli.main(Config, run, args)


if __name__ == "__main__":
    main()
