"""Talk to a trained model: python -m launch.chat_cli -p "What is 23 * 7?" """

import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import Callable

from jaxchat.config import HOTTEST, STAGES, Compute, DeviceFlags, base_dir, flag
from launch import cli


@dataclasses.dataclass(frozen=True)
class Config(DeviceFlags):
    """Chat with a model in the terminal. Enter /clear to begin a new conversation and /quit to exit. Ctrl-C
    stops an answer."""

    source: str = flag("sft", choices=tuple(STAGES), alias="-i")
    """Stage of the model to talk to: rl, sft, mid or base (a base model only continues text)."""
    model_tag: str = flag("", alias="-g")
    """Tag of the model; empty: the deepest model tagged d<N>, or else the newest model."""
    step: int = flag(-1, 0, special=-1, alias="-s")
    """Step of the checkpoint; -1: the last."""
    prompt: str = flag("", alias="-p")
    """A single prompt to answer; empty: chat in the terminal."""
    temperature: float = flag(0.6, 0, HOTTEST, alias="-t")
    """Sampling temperature of the answers; 0: always the likeliest token."""
    top_k: int = flag(50, 0, 2**31 - 1, special=-1, alias="-k")
    """Number of likeliest tokens to sample from; 0 or -1: all."""
    max_tokens: int = flag(256, 1)
    """Maximum number of tokens in an answer."""
    seed: int = flag(0, 0, 2**32 - 1)
    """Random seed of the first answer; it increases by 1 with each further answer."""


COMMANDS = "/clear begins a new conversation, /quit exits"


class Conversation:
    """A conversation as tokens. Its oldest exchanges are dropped to keep space for an answer."""

    def __init__(self, bos: int, context: int, max_tokens: int):
        self.reserved = min(max_tokens, context // 2)  # tokens for an answer
        self.prompt_limit = context - self.reserved
        self._bos, self._exchanges = bos, []

    @property
    def tokens(self) -> list[int]:
        return [self._bos, *(token for exchange in self._exchanges for token in exchange)]

    def ask(self, turn: list[int]) -> int:
        """Add the user's turn.

        Return how many of the oldest exchanges were dropped to keep space for an answer.
        """
        self._exchanges.append(list(turn))
        before = len(self._exchanges)
        while len(self._exchanges) > 1 and len(self.tokens) > self.prompt_limit:
            self._exchanges.pop(0)
        return before - len(self._exchanges)

    def add(self, token: int):
        """Add a token of the answer."""
        self._exchanges[-1].append(token)

    def clear(self):
        self._exchanges.clear()


def run(config: Config):
    from jaxchat import checkpoint
    from jaxchat.devices import start_devices
    from jaxchat.infer.engine import Engine

    mesh = start_devices(config, alone=True)
    compute = Compute.for_backend(config.dtype)
    model = checkpoint.open_model(config.source, config.model_tag, config.step)
    device = f"{mesh.devices.flat[0].device_kind}, compute in {compute.dtype}"
    rows = [("model", str(model.path)), ("device", device)]
    cli.print_plan(f"Chat with {model.tag} ({config.source})", rows)
    if config.source == "base":
        print("this is a base model: it continues text, it doesn't answer\n")
    engine = Engine(model.load(), model.config, model.tokenizer, compute, batch_size=1)
    conversation = Conversation(model.tokenizer.bos, model.config.sequence_len, config.max_tokens)
    if config.prompt:
        conversation.ask(encode_turn(config.prompt, config.source, model.tokenizer))
        answer(engine, conversation, config, config.seed)
    else:
        with contextlib.ExitStack() as stack:
            stack.callback(edit_lines())
            signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C now stops an answer
            talk(engine, conversation, config)


def talk(engine, conversation: Conversation, config: Config):
    """Answer each line of stdin, until stdin ends or the user enters /quit."""
    print(COMMANDS)
    tokenizer, seed = engine.tokenizer, config.seed
    while True:
        try:
            text = input("you: ").strip()
        except EOFError:
            print()
            return
        if text == "/quit":
            return
        if text == "/clear":
            conversation.clear()
        elif text.startswith("/"):
            print(COMMANDS)
        if not text or text.startswith("/"):
            continue
        turn = encode_turn(text, config.source, tokenizer)
        if 1 + len(turn) > conversation.prompt_limit:
            tokens = f"{1 + len(turn):,} tokens; there is room for {conversation.prompt_limit:,}"
            print(f"(that is {tokens}, since {conversation.reserved:,} are kept for the answer)")
            continue
        if left := conversation.ask(turn):
            exchanges = "exchange is" if left == 1 else f"{left} exchanges are"
            print(f"(the context is full: the oldest {exchanges} forgotten)")
        print("model: ", end="")
        try:
            answer(engine, conversation, config, seed)
        except KeyboardInterrupt:
            print(" … (stopped)", flush=True)
        if config.source != "base":
            conversation.add(tokenizer.special("<|assistant_end|>"))
        seed = (seed + 1) % 2**32


def encode_turn(text: str, source: str, tokenizer) -> list[int]:
    """Return the tokens that precede the answer to the user's `text`, without <|bos|>.

    If `source`, the model's stage, is "base", these are the tokens of the text alone.
    """
    if source == "base":
        return tokenizer.encode(text)
    return tokenizer.render_for_completion({"messages": [{"role": "user", "content": text}]})[1:]


def answer(engine, conversation: Conversation, config: Config, seed: int):
    """Print the model's answer as it is sampled, and add it to the conversation."""
    from jaxchat.infer.text import TextReader, Writer

    prompt, reader, writer = conversation.tokens, TextReader(engine.tokenizer), Writer()
    settings = {"temperature": config.temperature, "top_k": max(0, config.top_k), "seed": seed}
    stream = engine.stream(prompt, max_tokens=config.max_tokens, **settings)
    with contextlib.closing(stream):
        for token, forced in stream:
            print(writer.write(reader.feed(token, forced)), end="", flush=True)
            conversation.add(token)
    said = len(conversation.tokens) - len(prompt)
    cut = said >= min(config.max_tokens, engine.config.sequence_len - len(prompt))
    print(writer.write(reader.end()) + writer.end(cut), flush=True)


def edit_lines() -> Callable[[], None]:
    """In a terminal, give input() line editing and a history. Return a function that saves the history."""
    if not sys.stdin.isatty():
        return lambda: None
    try:
        import readline
    except ImportError:
        return lambda: None
    history = base_dir() / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(history)
    readline.set_history_length(1000)
    if "libedit" not in (readline.__doc__ or ""):
        readline.parse_and_bind("set enable-bracketed-paste on")  # a paste of several lines is one message

    def keep():
        with contextlib.suppress(OSError):
            readline.write_history_file(history)

    return keep


def leave(*_):
    """Handle SIGINT (Ctrl-C) by exiting at once with code 130."""
    # A KeyboardInterrupt might be swallowed by an import or a compiler.
    os.write(2, b"interrupted\n")
    os._exit(130)


main = cli.command(Config, run)

if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # unless SIGINT is ignored
        signal.signal(signal.SIGINT, leave)
    try:
        main()
    except SystemExit as stop:
        if stop.code != 130:
            raise
        sys.stdout.flush()
        os._exit(130)  # threads of JAX that still compute may crash while Python shuts down
