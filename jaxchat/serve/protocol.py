"""Parse requests to OpenAI's API, with errors that name the invalid field. Uses neither JAX nor HTTP.

Unsupported fields are errors, unless their values have no effect. Unknown fields are ignored.
"""

import dataclasses
import json
import math
from typing import Any

from jaxchat.infer.scheduler import MAX_LOGPROBS, MAX_STOP_TOKENS
from jaxchat.tokenizer import PART_TYPES

MAX_ANSWERS = 16  # largest value of the field n
MAX_PROMPTS = 128  # prompts of one request to /v1/completions
MAX_STOPS, MAX_STOP_CHARS = 16, 1000
COMPLETION_TOKENS = 16  # default max_tokens of /v1/completions, as OpenAI's
TOOL_DISPLAYS = ("hidden", "inline", "events")

# Unsupported fields, each with the values accepted because they change nothing; null is accepted too.
ASKS_NOTHING = {
    "suffix": [""],
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "functions": [[]],
    "function_call": ["none", "auto"],
    "response_format": [{"type": "text"}],
    "logit_bias": [{}],
    "frequency_penalty": [0],
    "presence_penalty": [0],
    "repetition_penalty": [1],
    "use_beam_search": [False],
    "typical_p": [1],
    "do_sample": [True],
    "max_new_tokens": [],
    "structured_outputs": [],
    "guided_json": [],
    "guided_choice": [],
    "guided_regex": [],
    "guided_grammar": [],
    "modalities": [["text"]],
    "audio": [],
    "prediction": [],
    "web_search_options": [],
}
HINTS = {"max_new_tokens": "max_tokens", "do_sample": "temperature: 0"}  # what to send instead
IGNORED = {
    "user", "metadata", "store", "service_tier", "parallel_tool_calls", "reasoning_effort", "verbosity",
    "prompt_cache_key", "safety_identifier",
}  # fmt: skip

KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error response in OpenAI's form. retry: value of the header Retry-After in seconds; 0: no header."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry: int = 0
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {"retry-after": str(retry)} if retry else {}
        if status == 401:
            self.headers["www-authenticate"] = "Bearer"

    def body(self) -> dict:
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def wrong(param: str, expected: str, got: Any) -> ApiError:
    """Return the error for a field `param` with value `got`. expected: phrase for the allowed values."""
    shown = json.dumps(got)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}…"
    return ApiError(400, f"{param}: expected {expected}; got {shown}", param=param)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """The fields that chat and completion requests share."""

    model: str
    n: int  # number of answers to each prompt
    max_tokens: int | None  # None: not given
    seed: int | None  # None: not given
    settings: dict  # fields of the engine's Request, without those left to the server's defaults
    stop: tuple[str, ...]  # stop strings
    stream: bool
    include_usage: bool  # end the stream with the numbers of tokens
    top: int | None  # number of alternatives reported with each token; None: no log-probabilities
    tool_display: str  # one of TOOL_DISPLAYS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat(Sampling):
    """A request to /v1/chat/completions."""

    messages: list[dict]  # {"role": "system" | "user" | "assistant", "content": text or a list of parts}
    continue_last: bool  # the last message is the assistant's and is to be continued


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion(Sampling):
    """A request to /v1/completions."""

    prompts: list[str | list[int]]
    add_bos: bool  # put <|bos|> before prompts that are text
    echo: bool  # begin the answer with the prompt


class Fields:
    """Reader of a JSON object's fields. The methods raise an ApiError if a field's value is invalid."""

    def __init__(self, body: dict):
        self._body, self._read = body, set(IGNORED)

    def get(self, name: str) -> Any:
        self._read.add(name)
        return self._body.get(name)

    def unknown(self) -> list[str]:
        """Return the names of the fields that no method has read, except those in IGNORED."""
        return [name for name in self._body if name not in self._read]

    def integer(self, name: str, default, least: int, most: float = math.inf):
        return self.number(name, default, least, most, whole=True)

    def number(self, name: str, default, least: float, most: float = math.inf, *, above=False, whole=False):
        """Return the number in field `name`, or `default` if the field is absent or null.

        The number must be from `least` to `most`. above: exclude `least`. whole: require a whole number.
        """
        value = self.get(name)
        if value is None:
            return default
        number = type(value) in (int, float) and least <= value <= most and not (above and value == least)
        if not number or value == math.inf or (whole and value != int(value)):
            bound = f"above {least}" if above else f"at least {least}"
            kind = "a whole number" if whole else "a number"
            raise wrong(name, f"{kind} {bound}" + (f" and at most {most}" if most < math.inf else ""), value)
        return int(value) if whole else float(value)

    def switch(self, name: str, default: bool = False) -> bool:
        value = self.get(name)
        if value is not None and type(value) is not bool:
            raise wrong(name, "true or false", value)
        return default if value is None else value

    def text(self, name: str) -> str:
        value = self.get(name)
        if value is not None and not isinstance(value, str):
            raise wrong(name, "a string", value)
        return "" if value is None else value

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        value = self.get(name)
        if value is not None and value not in choices:
            raise wrong(name, " or ".join(map(json.dumps, choices)), value)
        return choices[0] if value is None else value

    def refuse_unsupported(self):
        """Raise ApiError if a field asks for something that this server does not support."""
        for name, nothing in ASKS_NOTHING.items():
            value = self.get(name)
            if value is not None and value not in nothing:
                allowed = " or ".join(json.dumps(one) for one in nothing)
                message = f"{name} is not supported by this server; leave it out"
                message += f", or send {allowed}" if allowed else ""
                message += f"; use {HINTS[name]} instead" if name in HINTS else ""
                raise ApiError(400, message, param=name, code="unsupported_parameter")


def read_json(body: bytes) -> dict:
    """Parse a request's body. Raises ApiError if the body is not a JSON object in UTF-8."""
    try:
        found = json.loads(body.decode("utf-8"))
    except UnicodeDecodeError as problem:
        raise ApiError(400, f"the body is not UTF-8: {problem.reason} at byte {problem.start}") from None
    except (ValueError, RecursionError) as problem:
        raise ApiError(400, f"the body is not JSON: {str(problem)[:200] or 'nested too deeply'}") from None
    if not isinstance(found, dict):
        raise ApiError(400, f"the body must be a JSON object, not {type(found).__name__}")
    return found


def read_chat(fields: Fields) -> Chat:
    last = fields.switch("continue_final_message")
    if last and fields.switch("add_generation_prompt"):
        raise ApiError(400, "continue_final_message and add_generation_prompt exclude each other",
                       param="continue_final_message")  # fmt: skip
    fields.switch("add_generation_prompt", True)
    logprobs, top = fields.switch("logprobs"), fields.integer("top_logprobs", None, 0, MAX_LOGPROBS)
    if top and not logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise wrong("messages", "a list with at least one message", messages)
    messages = [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    if last != (messages[-1]["role"] == "assistant"):
        expected = "the assistant's, since continue_final_message is true"
        if not last:
            expected = "the user's; to continue one of the assistant's, send continue_final_message: true"
        raise ApiError(400, f"messages: the last message must be {expected}", param="messages")
    common = _sampling(fields, least=1)
    if fields.switch("echo"):
        raise ApiError(400, "echo is for completions only; leave it out, or send false", param="echo")
    return Chat(messages=messages, continue_last=last, top=(top or 0) if logprobs else None, **common)


def read_completion(fields: Fields) -> Completion:
    echo = fields.switch("echo")
    common = _sampling(fields, least=0 if echo else 1)
    if common["max_tokens"] is None:
        common["max_tokens"] = COMPLETION_TOKENS
    return Completion(
        prompts=read_prompts(fields.get("prompt")),
        add_bos=fields.switch("add_special_tokens", True),
        echo=echo,
        top=fields.integer("logprobs", None, 0, MAX_LOGPROBS),
        **common,
    )


def _sampling(fields: Fields, least: int) -> dict:
    """Read the fields that chats and completions share, except for log-probabilities.

    Return {field of Sampling: value}. least: smallest allowed max_tokens.
    """
    fields.refuse_unsupported()
    longest = fields.integer("max_tokens", None, least, 2**31 - 1)
    other = fields.integer("max_completion_tokens", None, least, 2**31 - 1)
    if None not in (longest, other) and longest != other:
        message = f"max_tokens is {longest} and max_completion_tokens {other}; send one of them"
        raise ApiError(400, message, param="max_completion_tokens")
    stream, options = fields.switch("stream"), fields.get("stream_options")
    if options is not None and not (isinstance(options, dict) and stream):
        raise ApiError(400, "stream_options must be an object, with stream: true", param="stream_options")
    seed = fields.integer("seed", None, -(2**63), 2**64 - 1)
    n = fields.integer("n", 1, 1, MAX_ANSWERS)
    if fields.integer("best_of", None, 1) not in (None, n):
        raise ApiError(400, f"best_of must be equal to n, which is {n}, or left out", param="best_of")
    top_k = fields.integer("top_k", None, -1, 2**31 - 1)
    settings = {
        "temperature": fields.number("temperature", None, 0, 2),
        "top_p": fields.number("top_p", 1.0, 0, 1, above=True),
        "top_k": 0 if top_k == -1 else top_k,  # vLLM's way of writing "all"
        "min_p": fields.number("min_p", 0.0, 0, 1),
        "stop_tokens": _stop_tokens(fields.get("stop_token_ids")),
        "ignore_end": fields.switch("ignore_eos"),
        "min_tokens": fields.integer("min_tokens", 0, 0, 2**31 - 1),
    }
    return {
        "model": fields.text("model"),
        "n": n,
        "max_tokens": other if longest is None else longest,
        "seed": None if seed is None else seed % 2**32,
        "settings": {name: value for name, value in settings.items() if value is not None},
        "stop": read_stop(fields.get("stop")),
        "stream": stream,
        "include_usage": stream and Fields(options or {}).switch("include_usage"),
        "tool_display": fields.choice("tool_display", TOOL_DISPLAYS),
    }


def read_stop(value) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    expected = f"a string, or a list of at most {MAX_STOPS}, each of 1 to {MAX_STOP_CHARS} characters"
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise wrong("stop", expected, value)
    for stop in stops:
        if not isinstance(stop, str) or not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise wrong("stop", expected, stop)
    return tuple(stops)


def _stop_tokens(value) -> tuple[int, ...]:
    ids = [] if value is None else value
    if not isinstance(ids, list) or len(ids) > MAX_STOP_TOKENS:
        raise wrong("stop_token_ids", f"a list of at most {MAX_STOP_TOKENS} token ids", value)
    for id in ids:
        if type(id) is not int or not 0 <= id < 2**31:
            raise wrong("stop_token_ids", "token ids", id)
    return tuple(ids)


def read_prompts(value) -> list[str | list[int]]:
    """Return the field `prompt`, one prompt or several, as a list. Raises ApiError if it is invalid."""
    expected = "a string, a list of strings, a list of token ids, or a list of such lists, none of them empty"
    prompts = value if isinstance(value, list) and value and isinstance(value[0], str | list) else [value]
    if len(prompts) > MAX_PROMPTS:
        message = f"prompt: {len(prompts)} prompts; at most {MAX_PROMPTS} are allowed"
        raise ApiError(400, message, param="prompt")
    for prompt in prompts:
        ids = isinstance(prompt, list) and prompt and all(type(id) is int for id in prompt)
        if not (ids or isinstance(prompt, str)) or type(prompt) is not type(prompts[0]):
            raise wrong("prompt", expected, value)
    return prompts


def _message(message, at: str) -> dict:
    if not isinstance(message, dict):
        raise wrong(at, "an object with role and content", message)
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "developer", "user", "assistant"):
        raise wrong(f"{at}.role", "system, developer, user or assistant", role)
    for name in ("tool_calls", "function_call"):
        if message.get(name):
            raise ApiError(400, f"{at}.{name} is not supported by this server", param=f"{at}.{name}")
    if role == "assistant" and content is None:
        content = ""
    if isinstance(content, list):
        known = PART_TYPES if role == "assistant" else ("text",)
        for i, part in enumerate(content):
            kind = part.get("type") if isinstance(part, dict) else part
            if not isinstance(kind, str) or kind not in known:
                raise wrong(f"{at}.content[{i}].type", " or ".join(known), kind)
            if not isinstance(part.get("text"), str):
                raise wrong(f"{at}.content[{i}].text", "a string", part.get("text"))
        if role != "assistant":
            content = "".join(part["text"] for part in content)
    elif not isinstance(content, str):
        raise wrong(f"{at}.content", "a string or a list of parts", content)
    return {"role": "system" if role == "developer" else role, "content": content}


def chat_prompt(tokenizer, chat: Chat, *, only_continues: bool) -> list[int]:
    """Return the tokens of a chat as a prompt, which ends where the model's answer begins.

    only_continues: whether the model is a base model. Its prompt is <|bos|> and the messages' joined texts.
    """
    if only_continues:
        texts = [message["content"] for message in chat.messages]
        texts = [text if isinstance(text, str) else "".join(part["text"] for part in text) for text in texts]
        return [tokenizer.bos, *(token for text in texts for token in tokenizer.encode(text))]
    _check_turns(chat.messages)
    conversation = {"messages": chat.messages}
    if chat.continue_last:
        return tokenizer.render_conversation(conversation)[0][:-1]
    return tokenizer.render_for_completion(conversation)


def _check_turns(messages: list[dict]):
    """Raise ApiError unless the roles are, in order: system (optional), user, assistant, user, …"""
    first = int(messages[0]["role"] == "system")
    for i, message in enumerate(messages[first:], first):
        role, expected = message["role"], ("user", "assistant")[(i - first) % 2]
        if role != expected:
            rule = "user and assistant must alternate, and only the first message may be system"
            raise ApiError(
                400, f"messages[{i}]: expected role {expected}, got {role}; {rule}",
                param=f"messages[{i}]",
            )  # fmt: skip


def check_stop_tokens(asked: Sampling, vocab_size: int):
    for id in asked.settings["stop_tokens"]:
        if id >= vocab_size:
            raise wrong("stop_token_ids", f"token ids from 0 to {vocab_size - 1}", id)


def completion_prompts(tokenizer, completion: Completion, vocab_size: int) -> list[list[int]]:
    found = []
    for prompt in completion.prompts:
        if isinstance(prompt, str):
            prompt = [tokenizer.bos] * completion.add_bos + tokenizer.encode(prompt)
            if not prompt:
                raise ApiError(400, "prompt: an empty prompt needs add_special_tokens: true", param="prompt")
        elif not 0 <= min(prompt) <= max(prompt) < vocab_size:
            odd = min(prompt) if min(prompt) < 0 else max(prompt)
            raise wrong("prompt", f"token ids from 0 to {vocab_size - 1}", odd)
        found.append(prompt)
    return found


def text_length(asked: Chat | Completion) -> int:
    """Return the number of characters of a chat's messages, or of a completion's longest text prompt."""
    if isinstance(asked, Completion):
        return max((len(prompt) for prompt in asked.prompts if isinstance(prompt, str)), default=0)
    contents = [message["content"] for message in asked.messages]
    parts = [[{"text": text}] if isinstance(text, str) else text for text in contents]
    return sum(len(part["text"]) for each in parts for part in each)


def too_long(tokens: str, context: int, param: str, hint: str = "") -> ApiError:
    message = f"{tokens}, but this model's context is {context:,} tokens; shorten {param}{hint}"
    return ApiError(400, message, param=param, code="context_length_exceeded")
