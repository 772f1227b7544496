"""The server's protocol, with a scripted engine: no JAX, a real uvicorn on a free port."""

import contextlib
import json
import socket
import time
from types import SimpleNamespace

import jax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serve_helpers import CONTEXT, FakeEngine, Running, events_of, open_request, until

pytest.importorskip("uvicorn", reason="needs the extra serve")

from jaxchat.serve import guard, protocol, replies, server  # noqa: E402
from jaxchat.serve.guard import Rules  # noqa: E402
from jaxchat.serve.protocol import Sampling  # noqa: E402
from jaxchat.tokenizer import Tokenizer  # noqa: E402

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "hi"}]
TEXT = "the cat é😀 and the hat"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(iter(["the cat and the hat, 12 + 34 = 46. é"] * 50), 280)


class Script:
    """What the engines say next: `tokens` for all requests, or what `say` gives for one."""

    def __init__(self, tokenizer):
        self.tokenizer, self.engines, self.reset = tokenizer, [], self._reset
        self._reset()

    def _reset(self):
        self.tokens = [(token, False) for token in self.tokenizer.encode(TEXT)]
        self.seconds, self.longest, self.broken = 0.0, 64, False  # seconds and tokens of an engine's step
        for engine in self.engines:
            engine.requests.clear()

    def say(self, request):
        if self.broken:
            raise RuntimeError("broken on purpose")
        return self.tokens

    def text(self, text: str):
        self.tokens = [(token, False) for token in self.tokenizer.encode(text)]

    @property
    def requests(self):
        return [request for engine in self.engines for request in engine.requests]

    @contextlib.contextmanager
    def open(self, on_progress):
        engine = FakeEngine(self)
        self.engines.append(engine)
        yield engine


@pytest.fixture(scope="module")
def shared(tokenizer):
    script = Script(tokenizer)
    with Running(tokenizer, script.open) as running:
        running.script = script
        yield running.wait_until_ok()


@pytest.fixture
def serving(shared):
    """A running server, and in `.script` what its engines say. When the test is over nothing is left of it."""
    shared.script.reset()
    yield shared
    until(lambda: shared.metric("num_requests_running") + shared.metric("num_requests_waiting") == 0)
    until(lambda: not shared.service.jobs)


@pytest.fixture
def another(tokenizer):
    """Start a server of one's own: another(rules=…). -> it, as `serving`"""
    with contextlib.ExitStack() as stack:

        def start(**options):
            script = Script(tokenizer)
            running = stack.enter_context(Running(tokenizer, script.open, **options))
            running.script = script
            return running.wait_until_ok()

        yield start


def contents(events, index=0):
    """The joined text of a chat's stream."""
    deltas = [choice["delta"] for event in events[:-1] for choice in event["choices"] if choice["index"] == index]
    return "".join(delta.get("content") or "" for delta in deltas)


def test_a_chat(serving):
    found = serving.chat("hello", seed=5, max_tokens=40).json
    assert found["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": TEXT, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert found["object"] == "chat.completion" and found["model"] == "toy-sft" and found["id"].startswith("chatcmpl-")
    tokens, prompt = len(serving.script.tokens), serving.script.requests[0].prompt
    assert found["usage"]["completion_tokens"] == tokens and found["usage"]["prompt_tokens"] == len(prompt)
    assert found["usage"]["total_tokens"] == tokens + len(prompt)
    rendered = serving.script.tokenizer.render_for_completion({"messages": [{"role": "user", "content": "hello"}]})
    assert prompt == rendered and serving.script.requests[0].seed == 5
    assert found["jaxchat"]["seed"] == 5 and set(found["jaxchat"]["timings"]) == {
        "queue_ms", "prefill_ms", "decode_ms", "tokens_per_second",
    }  # fmt: skip


def test_a_stream_is_the_whole_in_parts(serving):
    reply = serving.chat(stream=True, stream_options={"include_usage": True}, n=3, seed=9)
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.headers["cache-control"] == "no-cache" and reply.headers["x-accel-buffering"] == "no"
    events = events_of(reply.body)
    assert events[-1] == "[DONE]"
    for i in range(3):  # the roles first, in order
        assert events[i]["choices"][0]["index"] == i
        assert events[i]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert len({(event["id"], event["created"], event["object"]) for event in events[:-1]}) == 1
    chunks = events[:-2]
    assert all(len(chunk["choices"]) == 1 and chunk["usage"] is None for chunk in chunks)
    for i in range(3):
        ends = [chunk["choices"][0]["finish_reason"] for chunk in chunks if chunk["choices"][0]["index"] == i]
        assert ends[-1] == "stop" and set(ends[:-1]) == {None}
        assert contents(events, i) == TEXT
    assert events[-2]["choices"] == [] and events[-2]["usage"]["completion_tokens"] == 3 * len(serving.script.tokens)
    assert events[0]["jaxchat"] == {"seed": 9} and chunks[-1]["jaxchat"]["seed"] == 9
    assert [request.sample for request in serving.script.requests] == [0, 1, 2]
    whole = serving.chat(n=3).json
    assert [choice["message"]["content"] for choice in whole["choices"]] == [TEXT] * 3
    assert "usage" not in events_of(serving.chat(stream=True).body)[0]


def test_completions(serving):
    ids = [[7, 8, 9], [10, 11]]
    found = serving.complete(ids, n=2, max_tokens=4).json
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3] and found["object"] == "text_completion"
    assert [[*request.prompt] for request in serving.script.requests] == [ids[0], ids[0], ids[1], ids[1]]
    assert found["usage"] == {
        "prompt_tokens": 5, "completion_tokens": 16, "total_tokens": 21,
        "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip
    assert {choice["finish_reason"] for choice in found["choices"]} == {"length"}
    said = serving.script.tokenizer.decode([token for token, _ in serving.script.tokens[:4]])
    assert {choice["text"] for choice in found["choices"]} == {said}
    events = events_of(serving.complete("hi", stream=True, max_tokens=40).body)
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == TEXT
    tokenizer = serving.script.tokenizer
    assert [*serving.script.requests[-1].prompt] == [tokenizer.bos, *tokenizer.encode("hi")]
    assert serving.complete("hi", add_special_tokens=False).status == 200
    assert [*serving.script.requests[-1].prompt] == tokenizer.encode("hi")
    assert serving.script.requests[-1].max_tokens == 16


def test_what_requests_ask_for_reaches_the_engine(serving):
    assert serving.chat().status == 200
    assert serving.chat(
        temperature=1.5, top_p=0.5, top_k=7, min_p=0.25, seed=-1, min_tokens=2, stop_token_ids=[5], ignore_eos=True,
        max_completion_tokens=9, logprobs=True, top_logprobs=3,
    ).status == 200  # fmt: skip
    plain, request = serving.script.requests
    assert (plain.temperature, plain.top_k, plain.top_p, plain.logprobs) == (0.6, 50, 1.0, None)
    assert plain.max_tokens == CONTEXT - len(plain.prompt)
    assert (request.temperature, request.top_p, request.top_k, request.min_p) == (1.5, 0.5, 7, 0.25)
    assert (request.seed, request.min_tokens, request.stop_tokens) == (2**32 - 1, 2, (5,))
    assert request.ignore_end and request.max_tokens == 9 and request.logprobs == 3
    seeds = {serving.chat().json["jaxchat"]["seed"] for _ in range(3)}
    assert len(seeds) == 3 and seeds == {request.seed for request in serving.script.requests[-3:]}


WRONG = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ({"messages": [*USER, {"role": "assistant", "content": "a"}]}, "messages"),
    ({"messages": USER * 2}, "messages[1]"),
    ({"messages": USER, "continue_final_message": True}, "messages"),
    ({"messages": [{"role": "user", "content": "the cat " * 200}]}, "messages"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": "9"}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 10**4000}, "max_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
    ({"max_tokens": CONTEXT}, "messages"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": float("inf")}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": -1}, "min_p"),
    ({"n": 17}, "n"),
    ({"n": 0}, "n"),
    ({"seed": 2**70}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": ["a"] * 10**6}, "stop"),
    ({"stop": [["a"]]}, "stop"),
    ({"stop": "a" * 1001}, "stop"),
    ({"stop_token_ids": [1.5]}, "stop_token_ids"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": []}, "stream_options"),
    ({"logprobs": 3}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"frequency_penalty": 0.5}, "frequency_penalty"),
    ({"presence_penalty": -1}, "presence_penalty"),
    ({"functions": [{}]}, "functions"),
    ({"guided_json": {}}, "guided_json"),
    ({"guided_choice": ["a"]}, "guided_choice"),
    ({"guided_regex": "a"}, "guided_regex"),
    ({"structured_outputs": {"choice": ["a"]}}, "structured_outputs"),
    ({"typical_p": 0.5}, "typical_p"),
    ({"do_sample": False}, "do_sample"),
    ({"max_new_tokens": 5}, "max_new_tokens"),
    ({"best_of": 2}, "best_of"),
    ({"echo": True}, "echo"),
    ({"stop_token_ids": [280]}, "stop_token_ids"),
    ({"messages": [{"role": "system", "content": "a"}] * 2 + USER}, "messages[1]"),
    ({"tool_display": "loud"}, "tool_display"),
    ({"model": 5}, "model"),
]
WRONG_COMPLETIONS = [
    ({}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": ["a", [1]]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [280]}, "prompt"),
    ({"prompt": ["a"] * 129}, "prompt"),
    ({"prompt": "", "add_special_tokens": False}, "prompt"),
    ({"prompt": [5] * 90, "max_tokens": 7}, "prompt"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "a", "logprobs": True}, "logprobs"),
    ({"prompt": "a", "suffix": "b"}, "suffix"),
    ({"prompt": "a", "best_of": 2}, "best_of"),
]


@pytest.mark.parametrize(
    "path, body, param",
    [(CHAT, {"messages": USER} | body, param) for body, param in WRONG]
    + [(COMPLETIONS, body, param) for body, param in WRONG_COMPLETIONS],
)
def test_wrong_requests_name_the_field(serving, path, body, param):
    reply = serving.ask("POST", path, body)
    error = reply.json["error"]
    assert (reply.status, error["param"], error["type"]) == (400, param, "invalid_request_error"), error
    assert set(error) == {"message", "type", "param", "code"} and param.split("[")[0] in error["message"]
    assert len(error["message"]) < 400 and reply.headers["x-request-id"]
    assert serving.script.requests == []


def test_a_prompt_that_is_too_long(serving):
    for reply in (serving.complete([5] * 90, max_tokens=7), serving.chat("x" * 3_000_000)):
        assert reply.status == 400 and reply.json["error"]["code"] == "context_length_exceeded"
    assert serving.complete([5] * 90, max_tokens=6).status == 200
    assert serving.chat("a" * 80).status == 200 and serving.script.requests[-1].max_tokens > 0


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"n": ' + b"9" * 5000 + b"}", b'"\\ud800"']
)
def test_bodies_that_are_no_objects(serving, body):
    reply = serving.ask("POST", CHAT, body)
    assert reply.status == 400 and "body" in reply.json["error"]["message"]


def test_what_asks_for_nothing_is_accepted_and_what_nobody_knows_ignored(serving):
    reply = serving.chat(
        tools=[], tool_choice="none", response_format={"type": "text"}, logit_bias={}, frequency_penalty=0,
        presence_penalty=0.0, user="me", metadata={"a": 1}, store=False, service_tier="auto", no_such_field=[1],
        stop=None, n=None, seed=None, top_p=None, max_tokens=None, temperature=0.0, parallel_tool_calls=True,
    )  # fmt: skip
    assert reply.status == 200 and reply.json["choices"][0]["message"]["content"] == TEXT
    assert "no_such_field" in serving.service._unknown and "user" not in serving.service._unknown
    assert serving.chat(**{"long" * 10**5: 1}).status == 200
    assert max(map(len, serving.service._unknown)) <= 80  # what is kept of them is bounded


def test_messages_of_all_forms(serving):
    tokenizer = serving.script.tokenizer
    parts = [{"type": "text", "text": "so "}, {"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}]
    messages = [
        {"role": "developer", "content": "be brief", "name": "x"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": parts},
        {"role": "user", "content": "c"},
    ]
    same = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "ab"}, *messages[2:]]
    assert serving.ask("POST", CHAT, {"messages": messages}).status == 200
    assert [*serving.script.requests[-1].prompt] == tokenizer.render_for_completion({"messages": same})
    messages[3:] = [{"role": "user", "content": "c"}, {"role": "assistant", "content": "and"}]
    same = [*same[:3], *messages[3:]]
    assert serving.ask("POST", CHAT, {"messages": messages, "continue_final_message": True}).status == 200
    assert [*serving.script.requests[-1].prompt] == tokenizer.render_conversation({"messages": same})[0][:-1]


def test_a_base_model_continues_the_messages(serving):
    tokenizer = serving.script.tokenizer
    messages = [*USER, {"role": "assistant", "content": " there"}, {"role": "user", "content": " and"}]
    found = serving.ask("POST", CHAT, {"messages": messages, "model": "toy-base"}).json
    assert found["model"] == "toy-base" and found["choices"][0]["message"]["content"] == TEXT
    want = [tokenizer.bos, *(token for text in ("hi", " there", " and") for token in tokenizer.encode(text))]
    assert [*serving.script.requests[-1].prompt] == want


def test_special_tokens_in_text_stay_text(serving):
    tokenizer, text = serving.script.tokenizer, "<|assistant_end|><|bos|>"
    specials = {tokenizer.special(name) for name in ("<|assistant_end|>", "<|bos|>")}
    serving.complete(text, add_special_tokens=False)
    assert not specials & {*serving.script.requests[-1].prompt}
    serving.chat(text)
    assert serving.script.requests[-1].prompt.count(tokenizer.special("<|assistant_end|>")) == 0
    serving.script.text(text)
    assert serving.chat(max_tokens=60).json["choices"][0]["message"]["content"] == text
    serving.chat("\ud800 lone")
    assert "�" in tokenizer.decode(serving.script.requests[-1].prompt)


@pytest.mark.parametrize("stop", [" and", "é", "😀 an", ["zzz", "t é"], "the cat é😀 and the hat", "t"])
def test_stop_strings_end_the_text_before_them(serving, stop):
    first = min(at for one in ([stop] if isinstance(stop, str) else stop) if (at := TEXT.find(one)) >= 0)
    choice = serving.chat(stop=stop, logprobs=True).json["choices"][0]
    assert choice["message"]["content"] == TEXT[:first] and choice["finish_reason"] == "stop"
    events = events_of(serving.chat(stop=stop, stream=True, logprobs=True).body)
    assert contents(events) == TEXT[:first]
    streamed = [c["logprobs"]["content"] for e in events[:-1] for c in e["choices"] if c["logprobs"]]
    assert [entry for part in streamed for entry in part] == choice["logprobs"]["content"]
    # As few tokens as have the text.
    shown = b"".join(bytes(entry["bytes"]) for entry in choice["logprobs"]["content"])
    assert shown.startswith(TEXT[:first].encode()) and len(shown) < len(TEXT[:first].encode()) + 8


def test_a_character_is_sent_when_it_is_complete(serving):
    ranks = serving.script.tokenizer.ranks
    serving.script.tokens = [(ranks[bytes([byte])], False) for byte in "é😀".encode()]
    serving.script.longest = 1  # each token is an event
    events = events_of(serving.chat(stream=True).body)
    parts = [event["choices"][0]["delta"].get("content") for event in events[:-1]]
    assert [part for part in parts if part] == ["é", "😀"]
    serving.script.tokens.pop()
    assert serving.chat().json["choices"][0]["message"]["content"] == "é\ufffd"


def test_log_probabilities_of_a_chat(serving):
    choice = serving.chat(logprobs=True, top_logprobs=2, n=2).json["choices"][1]
    entries = choice["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == TEXT
    for entry, (token, _) in zip(entries, serving.script.tokens, strict=True):
        assert entry["logprob"] == -1 - token / 1000
        assert [top["logprob"] for top in entry["top_logprobs"]] == [-0.25, entry["logprob"]]
    assert choice["message"]["content"] == TEXT and serving.chat().json["choices"][0]["logprobs"] is None
    none = serving.chat(logprobs=True).json["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in none] == [[]] * len(entries)


def test_log_probabilities_of_a_completion_with_its_prompt(serving):
    """In lm-evaluation-harness' way: the first has no number, the last is the one token generated."""
    tokenizer = serving.script.tokenizer
    prompt = [tokenizer.bos, *tokenizer.encode("the é cat")]
    choice = serving.complete(prompt, echo=True, logprobs=1, max_tokens=1, temperature=0).json["choices"][0]
    found = choice["logprobs"]
    assert len(found["tokens"]) == len(prompt) + 1 == len(found["token_logprobs"]) == len(found["top_logprobs"])
    assert found["token_logprobs"][0] is None is found["top_logprobs"][0]
    assert found["token_logprobs"][1:-1] == [-1 - token / 1000 for token in prompt[1:]]
    for name, logprob, top in list(zip(*[found[k] for k in ("tokens", "token_logprobs", "top_logprobs")], strict=True))[
        1:
    ]:
        assert top[name] == logprob  # the very number
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        assert token.startswith("bytes:") or choice["text"][offset:].startswith(token)
    assert choice["text"] == "<|bos|>the é cat" + tokenizer.decode([serving.script.tokens[0][0]])
    text = serving.complete("the é cat", echo=True, max_tokens=0).json["choices"][0]
    assert text["text"] == "the é cat" and text["logprobs"] is None and text["finish_reason"] == "length"
    serving.script.tokens = []  # it ends at once: that token is reported, so that there is one
    choice = serving.complete(prompt, echo=True, logprobs=1, max_tokens=1).json["choices"][0]
    assert len(choice["logprobs"]["tokens"]) == len(prompt) + 1 and choice["finish_reason"] == "stop"
    assert choice["logprobs"]["tokens"][-1] == "<|assistant_end|>" and choice["logprobs"]["token_logprobs"][-1] == -0.5
    events = events_of(serving.complete(prompt, echo=True, logprobs=1, max_tokens=1, stream=True).body)
    parts = [event["choices"][0]["logprobs"] for event in events[:-1] if event["choices"][0]["logprobs"]]
    assert {key: [one for part in parts for one in part[key]] for key in found} == choice["logprobs"]


def call(tokenizer, code, output, forced):
    special = tokenizer.special
    called = [special("<|python_start|>"), *tokenizer.encode(code), special("<|python_end|>")]
    result = [special("<|output_start|>"), *tokenizer.encode(output), special("<|output_end|>")]
    return [(token, False) for token in called] + [(token, forced) for token in result]


def test_tool_calls_are_shown_as_asked(serving):
    tokenizer = serving.script.tokenizer
    words = [[(token, False) for token in tokenizer.encode(text)] for text in ("so ", " then ", " it is 46")]
    real, made_up = call(tokenizer, "12+34", "46", True), call(tokenizer, "1+1", "3", False)
    serving.script.tokens = [*words[0], *real, *words[1], *made_up, *words[2]]
    hidden = serving.chat().json
    assert hidden["choices"][0]["message"]["content"] == "so  then  it is 46"
    calls = [{"code": "12+34", "output": "46", "made_up": False}, {"code": "1+1", "output": "3", "made_up": True}]
    assert hidden["jaxchat"]["tool_calls"] == [{"index": 0, "id": f"tool-0-{i}"} | one for i, one in enumerate(calls)]
    forced = sum(forced for _, forced in real)
    assert hidden["jaxchat"]["forced_tokens"] == forced
    assert hidden["usage"]["completion_tokens"] == len(serving.script.tokens) - forced
    inline = "so [python 12+34][output 46] then [python 1+1][output? 3] it is 46"
    assert serving.chat(tool_display="inline").json["choices"][0]["message"]["content"] == inline
    assert contents(events_of(serving.chat(tool_display="inline", stream=True).body)) == inline
    events = events_of(serving.chat(tool_display="events", stream=True).body)
    deltas = [event["choices"][0]["delta"] for event in events[:-1]]
    tools = [delta["jaxchat"]["tool"] for delta in deltas if "jaxchat" in delta]
    assert tools == [
        {"id": "tool-0-0", "code": "12+34"},
        {"id": "tool-0-0", "output": "46", "made_up": False},
        {"id": "tool-0-1", "code": "1+1"},
        {"id": "tool-0-1", "output": "3", "made_up": True},
    ]
    assert (
        contents(events) == "so  then  it is 46"
        and events[-2]["jaxchat"]["tool_calls"] == hidden["jaxchat"]["tool_calls"]
    )
    marked = ["#" if "jaxchat" in delta else delta.get("content", "") for delta in deltas]
    assert "".join(marked) == "so ## then ## it is 46"  # each where it was
    only_text = serving.chat(logprobs=True).json["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in only_text) == b"so  then  it is 46"


def test_a_call_that_was_cut_says_so(serving):
    tokenizer = serving.script.tokenizer
    serving.script.tokens = call(tokenizer, "12+34", "46", True)
    asked = next(
        i for i, (token, _) in enumerate(serving.script.tokens) if token == tokenizer.special("<|python_end|>")
    )
    (cut,) = serving.chat(max_tokens=asked).json["jaxchat"]["tool_calls"]
    assert (cut["code"], cut["output"], cut["incomplete"]) == ("12+34", None, True)
    (whole,) = serving.chat(max_tokens=asked + 1).json["jaxchat"]["tool_calls"]
    assert (whole["code"], whole["output"]) == ("12+34", None) and "incomplete" not in whole
    inline = serving.chat(max_tokens=asked, tool_display="inline").json["choices"][0]["message"]["content"]
    assert inline == "[python 12+34] … (cut)"
    events = events_of(serving.chat(max_tokens=asked, tool_display="events", stream=True).body)
    tools = [event["choices"][0]["delta"].get("jaxchat") for event in events[:-1]]
    assert {"tool": {"id": "tool-0-0", "code": "12+34", "incomplete": True}} in tools


def test_a_call_in_the_prompt_is_the_first_of_the_answer(serving):
    serving.script.tokens = call(serving.script.tokenizer, "1+1", "2", True)[-3:]  # the tool's output alone
    last = {"role": "assistant", "content": [{"type": "python", "text": "1+1"}]}
    (first,) = serving.ask("POST", CHAT, {"messages": [*USER, last], "continue_final_message": True}).json["jaxchat"][
        "tool_calls"
    ]
    assert (first["code"], first["output"], first["made_up"]) == ("1+1", "2", False)


def test_special_tokens_are_no_text(serving):
    tokenizer = serving.script.tokenizer
    marks = [(tokenizer.special(name), False) for name in ("<|user_end|>", "<|assistant_end|>", "<|bos|>")]
    serving.script.tokens = [*serving.script.tokens[:3], *marks, *serving.script.tokens[3:]]
    choice = serving.chat(ignore_eos=True, logprobs=True).json["choices"][0]
    assert choice["message"]["content"] == TEXT
    assert b"".join(bytes(entry["bytes"]) for entry in choice["logprobs"]["content"]).decode() == TEXT
    found = serving.complete(max_tokens=60, logprobs=1).json["choices"][0]
    assert found["text"] == TEXT and found["logprobs"]["tokens"][3] == "<|user_end|>"


def test_models(serving):
    listed = serving.ask("GET", "/v1/models").json
    assert listed["object"] == "list" and [one["id"] for one in listed["data"]] == ["toy-sft", "toy-base"]
    assert {"id", "object", "created", "owned_by"} <= set(listed["data"][0])
    assert listed["data"][1]["jaxchat"]["chat"] is False and listed["data"][0]["max_model_len"] == CONTEXT
    assert serving.ask("GET", "/models/toy-base").json == listed["data"][1]
    for reply in (serving.ask("GET", "/v1/models/gpt-4"), serving.chat(model="gpt-4")):
        assert reply.status == 404 and reply.json["error"]["code"] == "model_not_found"
        assert reply.json["error"]["param"] == "model" and "toy-sft" in reply.json["error"]["message"]
    assert serving.chat(model="").status == 200


def test_paths_and_methods(serving):
    assert serving.ask("POST", "/chat/completions", {"messages": USER}).status == 200
    missing = serving.ask("POST", "/v1/embeddings", {})
    assert missing.status == 404 and "/chat/completions" in missing.json["error"]["message"]
    wrong = serving.ask("GET", CHAT)
    assert wrong.status == 405 and wrong.headers["allow"] == "POST" and "error" in wrong.json
    for path in ("/", CHAT, "/v1/models", "/nothing"):
        assert serving.ask("OPTIONS", path).status == 204
    assert serving.ask("HEAD", "/v1/models").status == 200
    assert serving.ask("GET", "/health", headers={"x-request-id": "mine"}).headers["x-request-id"] == "mine"
    assert serving.ask("GET", "/health", headers={"x-request-id": "a b"}).headers["x-request-id"].startswith("req-")


def test_tokens_of_text_and_back(serving):
    tokenizer = serving.script.tokenizer
    found = serving.ask("POST", "/tokenize", {"prompt": "the <|bos|>"}).json
    assert found["tokens"] == [tokenizer.bos, *tokenizer.encode("the <|bos|>")] and found["count"] == len(
        found["tokens"]
    )
    for text, ids in (("the", tokenizer.encode("the")), ("<|bos|>", [tokenizer.bos])):
        plain = serving.ask("POST", "/v1/tokenize", {"prompt": text, "add_special_tokens": False}).json["tokens"]
        assert plain == ids
    chat = serving.ask("POST", "/tokenize", {"messages": USER}).json["tokens"]
    assert chat == tokenizer.render_for_completion({"messages": USER})
    assert serving.ask("POST", "/detokenize", {"tokens": tokenizer.encode("é a")}).json == {"prompt": "é a"}
    assert serving.ask("POST", "/detokenize", {"tokens": [280]}).status == 400
    assert serving.ask("POST", "/tokenize", {"prompt": [1]}).status == 400
    info = serving.ask("GET", "/tokenizer_info").json
    assert info["bos_token"] == "<|bos|>" and info["eos_token"] == "<|assistant_end|>"


def test_large_texts_do_not_hold_up_others(serving):
    """Beyond a limit they are refused; below it the event loop goes on."""
    reply = serving.ask("POST", "/tokenize", {"prompt": "a" * 2**20})
    assert reply.status == 413 and "1,048,576" in reply.json["error"]["message"]
    text = "the cat " * 100_000
    found = serving.ask("POST", "/tokenize", {"prompt": text, "add_special_tokens": False}).json
    assert serving.ask("POST", "/detokenize", {"tokens": found["tokens"]}).json["prompt"] == text
    whole = serving.complete("a", n=16, max_tokens=40, logprobs=20)  # its JSON is made in a thread
    assert whole.status == 400 or len(whole.json["choices"]) == 16


def test_the_page_may_only_do_what_it_must(serving):
    import base64
    import hashlib
    import re

    page = serving.ask("GET", "/")
    assert page.status == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'" and "unsafe" not in str(policy)
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        blocks = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", page.body.decode(), re.S)
        digests = [base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks]
        assert digests and policy[directive] == " ".join(f"'sha256-{digest}'" for digest in digests)
    assert page.headers["x-content-type-options"] == "nosniff" and page.headers["referrer-policy"] == "no-referrer"
    again = serving.ask("GET", "/", headers={"if-none-match": page.headers["etag"]})
    assert again.status == 304 and again.body == b"" and len(page.body) <= 60_000


def test_only_names_of_this_machine_and_its_own_pages(serving, another):
    assert serving.ask("GET", "/v1/models", headers={"host": "evil.example:80"}).status == 403
    for host in ("localhost:1", "127.0.0.1", "[::1]:9", "a.localhost"):
        assert serving.ask("GET", "/health", headers={"host": host}).status == 200
    own = {"host": "localhost:80", "origin": "http://localhost:80"}
    assert serving.ask("POST", CHAT, {"messages": USER}, own).status == 200
    assert serving.ask("POST", CHAT, {"messages": USER}, own | {"origin": "http://evil.example"}).status == 403
    null = serving.ask("POST", CHAT, {"messages": USER}, own | {"origin": "null"})
    assert null.status == 403 and "--cors_origins=null" not in null.json["error"]["message"]
    assert "access-control-allow-origin" not in serving.ask("GET", "/health", headers=own).headers
    open_ = another(rules=Rules(origins=("https://chat.example",)))
    asked = {"origin": "https://chat.example"}
    reply = open_.ask("POST", CHAT, {"messages": USER}, asked | {"host": "chat.example"})
    assert reply.status == 200 and reply.headers["access-control-allow-origin"] == "https://chat.example"
    preflight = asked | {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    assert open_.ask("OPTIONS", CHAT, headers=preflight).status == 200
    assert open_.ask("POST", CHAT, {"messages": USER}, {"origin": "https://other.example"}).status == 403


def test_keys(another):
    closed = another(rules=Rules(keys=("one", "zwei")))
    for path in ("/v1/models", "/models", "/metrics", "/tokenizer_info", "/nothing"):
        reply = closed.ask("GET", path)
        assert reply.status == 401 and reply.json["error"]["type"] == "authentication_error"
        assert reply.headers["www-authenticate"] == "Bearer"
    for key in ("Bearer three", "Bearer ", "Basic one", "one", "Bearer \xe9"):
        assert closed.ask("GET", "/v1/models", headers={"authorization": key.encode("latin-1")}).status == 401
    for key in ("Bearer one", "bearer zwei"):
        assert closed.ask("POST", CHAT, {"messages": USER}, {"authorization": key}).status == 200
    assert closed.ask("GET", "/").status == 200 == closed.ask("GET", "/health").status
    assert closed.ask("OPTIONS", CHAT).status == 204


def test_bodies_that_are_too_large_are_not_read(serving, monkeypatch):
    monkeypatch.setattr(guard, "LINGER", 0.2)
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\n"
    with socket.create_connection(("127.0.0.1", serving.port)) as client:
        client.sendall(f"{head}content-length: {10**9}\r\n\r\n".encode() + b"x" * 1000)
        assert client.recv(100).startswith(b"HTTP/1.1 413")
    with socket.create_connection(("127.0.0.1", serving.port)) as client:
        client.sendall(f"{head}transfer-encoding: chunked\r\n\r\n".encode())
        with contextlib.suppress(OSError):
            for _ in range(5):
                client.sendall(b"100000\r\n" + b"x" * 2**20 + b"\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 413")


def test_clients_that_are_too_slow(serving, monkeypatch):
    monkeypatch.setattr(server, "HEADER_SECONDS", 0.2)
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.2)
    monkeypatch.setattr(guard, "LINGER", 0.1)
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 50\r\n\r\n".encode()
    ok = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
    for sent, wanted in ((b"", b""), (head[:20], b""), (head + b"{", b"HTTP/1.1 408")):
        with socket.create_connection(("127.0.0.1", serving.port), timeout=20) as client:
            client.sendall(sent)
            assert client.recv(12) == wanted
            read_all(client)  # it is closed
    with socket.create_connection(("127.0.0.1", serving.port), timeout=20) as client:
        client.sendall(ok)
        assert client.recv(4096).startswith(b"HTTP/1.1 200")
        client.sendall(b"GET")
        assert read_all(client) in (b"", b'{"status":"ok"}')  # and it is closed
    with socket.create_connection(("127.0.0.1", serving.port), timeout=20) as client:
        client.sendall(b"nonsense\r\n\r\n")
        answer = read_all(client)
        assert answer.startswith(b"HTTP/1.1 400") and b'{"error"' in answer


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(serving, stream):
    serving.script.tokens, serving.script.seconds = [(5, False)] * 90, 0.05
    with open_request(serving.port, {"stream": stream, "n": 3}):
        until(lambda: serving.metric("num_requests_running", model_name="toy-sft") == 3)
    began = time.monotonic()
    until(lambda: serving.metric("num_requests_running") == 0)
    assert time.monotonic() - began < 3  # 90 tokens would take 4.5 s
    until(lambda: serving.script.engines[0].scheduler.slot_of == {} == serving.script.engines[1].scheduler.slot_of)
    assert serving.metric("request_success_total") == serving.metric("e2e_request_latency_seconds_count")


def test_more_than_can_wait_are_refused(serving):
    serving.script.tokens, serving.script.seconds = [(5, False)] * 90, 0.05
    clients = [open_request(serving.port, {"n": 4, "stream": True}) for _ in range(3)]  # 4 slots, 8 may wait
    until(lambda: serving.metric("num_requests_waiting") == 8)
    reply = serving.chat()
    assert reply.status == 429 and reply.json["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(reply.headers["retry-after"]) <= 60
    assert serving.chat(n=13).status == 400  # it never could
    assert serving.chat(model="toy-base", max_tokens=1).status == 200  # which has slots of its own
    for client in clients:
        client.close()
    until(lambda: serving.metric("num_requests_waiting") == 0)


def test_metrics_add_up_with_what_clients_saw(another, monkeypatch):
    device = SimpleNamespace(id=3, memory_stats=lambda: {"bytes_in_use": 2**20})
    monkeypatch.setattr(jax, "local_devices", lambda: [device, SimpleNamespace(id=4, memory_stats=lambda: None)])
    running = another()
    running.script.tokens += call(running.script.tokenizer, "1+1", "2", True)
    usages = [running.chat(n=2).json["usage"], running.complete("hi", max_tokens=3).json["usage"]]
    events = events_of(running.chat(stream=True, stream_options={"include_usage": True}, model="toy-base").body)
    usages.append(events[-2]["usage"])
    running.chat(temperature=9)
    assert running.metric("generation_tokens_total") == sum(usage["completion_tokens"] for usage in usages)
    assert running.metric("request_generation_tokens_sum") == running.metric("generation_tokens_total")
    assert running.metric("prompt_tokens_total") == sum(u["prompt_tokens"] for u in usages) + usages[0]["prompt_tokens"]
    assert running.metric("request_success_total", finished_reason="stop") == 3
    assert running.metric("request_success_total", finished_reason="length") == 1
    assert running.metric("tool_calls_total", result="value") == 3
    assert running.metric("requests_total", endpoint="chat", code="200") == 2
    assert running.metric("requests_total", endpoint="chat", code="400") == 1
    for name in ("time_to_first_token", "request_queue_time", "request_prefill_time", "e2e_request_latency"):
        assert running.metric(f"{name}_seconds_count") == 4, name
    parts = [running.metric(f"request_{name}_time_seconds_sum") for name in ("queue", "prefill", "decode")]
    assert sum(parts) == pytest.approx(running.metric("e2e_request_latency_seconds_sum"))
    text = running.ask("GET", "/metrics").body.decode()
    assert 'jaxchat_slots{model_name="toy-sft"} 4.0' in text and "jaxchat_build_info" in text
    assert 'jaxchat_device_memory_bytes{device="3"} 1.048576e+06' in text and 'device="4"' not in text


def test_streams_end_properly_when_the_server_stops(another):
    running = another(drain=0.5)
    running.script.tokens, running.script.seconds = [(5, False)] * 90, 0.05
    clients = [open_request(running.port, {"stream": True, "max_tokens": tokens}) for tokens in (3, 90, 90, 90, 90)]
    whole = open_request(running.port, {})
    until(lambda: len(running.service.jobs) == 6)
    running.stop()
    until(lambda: running.service.state == "draining")
    health = running.ask("GET", "/health")
    assert health.status == 503 and health.json == {"status": "draining"}
    refused = running.chat()
    assert refused.status == 503 and int(refused.headers["retry-after"]) > 0
    streams = [read_all(client) for client in clients]
    assert all(stream.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") for stream in streams)
    assert b"shutting down" not in streams[0] and b'"finish_reason":"length"' in streams[0]
    assert all(b'data: {"error":' in stream and b"shutting down" in stream for stream in streams[1:])
    assert read_all(whole).startswith(b"HTTP/1.1 503")
    running.thread.join(20)
    assert not running.thread.is_alive() and running.problem is None


def read_all(client: socket.socket) -> bytes:
    with client:
        found = b""
        while data := client.recv(65536):
            found += data
    return found


def test_an_engine_that_fails_says_so(another, capfd):
    running = another()
    running.script.seconds = 0.05
    with contextlib.closing(open_request(running.port, {"stream": True, "max_tokens": 20})) as client:
        until(lambda: running.metric("num_requests_running") == 1)
        running.script.broken = True
        assert running.chat().status == 503
        assert b"the engine failed" in (stream := read_all(client)) and stream.endswith(b"[DONE]\n\n\r\n0\r\n\r\n")
    assert running.ask("GET", "/health").status == 500 and running.chat().status == 500
    assert "broken on purpose" in capfd.readouterr().err


def test_while_it_loads_it_says_so(tokenizer):
    import threading

    goes_on, script = threading.Event(), Script(tokenizer)

    @contextlib.contextmanager
    def slowly(on_progress):
        goes_on.wait(60)
        with script.open(on_progress) as engine:
            yield engine

    with Running(tokenizer, slowly) as running:
        assert running.ask("GET", "/health").json == {"status": "loading"}
        reply = running.chat()
        assert reply.status == 503 and reply.headers["retry-after"]
        assert running.ask("GET", "/v1/models").status == 200
        goes_on.set()
        assert running.wait_until_ok().chat().status == 200


def test_a_silent_stream_shows_that_it_lives(serving, monkeypatch):
    monkeypatch.setattr(replies, "PING", 0.05)
    serving.script.seconds = 0.2
    body = serving.chat(stream=True, max_tokens=3).body
    assert b"\n\n: ping\n\n" in body and events_of(body)[-1] == "[DONE]"


def test_pipelined_requests(serving):
    wanted = b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n"
    last = wanted.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")
    with socket.create_connection(("127.0.0.1", serving.port), timeout=20) as client:
        client.sendall(wanted * 2 + last)
        assert read_all(client).count(b"HTTP/1.1 200") == 3


def test_what_it_keeps_of_bad_clients_is_nothing(serving):
    """Clients that leave at random moments, and readers that don't read: slots, jobs and tasks are as before."""
    import asyncio
    import random

    def tasks():
        return asyncio.run_coroutine_threadsafe(counted(), serving.loop).result(20)

    async def counted():
        return len(asyncio.all_tasks())

    before, chance = tasks(), random.Random(0)
    serving.script.tokens, serving.script.seconds = [(5, False)] * 80, 0.002
    slow = []
    for i in range(60):
        client = open_request(serving.port, {"stream": i % 3 > 0, "n": chance.randint(1, 4)})
        if i % 10:
            time.sleep(chance.random() * 0.01)
            client.close()
        else:
            slow.append(client)
    good = serving.chat(max_tokens=20)
    assert good.status == 429 or good.json["usage"]["completion_tokens"] == 20
    until(lambda: serving.metric("num_requests_running") + serving.metric("num_requests_waiting") == 0)
    for client in slow:
        client.close()
    until(lambda: not serving.service.jobs and tasks() <= before)
    assert all(engine.scheduler.slot_of == {} == engine.scheduler.waiting for engine in serving.script.engines)
    assert serving.chat(max_tokens=20).status == 200


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [*protocol.ASKS_NOTHING, *protocol.IGNORED, *Sampling.__dataclass_fields__] + [
    "messages", "prompt", "logprobs", "top_logprobs", "echo", "max_completion_tokens", "stream_options", "best_of",
    "continue_final_message", "add_special_tokens", "tokens", "", "temperature", "top_p", "top_k", "min_p",
    "stop_token_ids", "ignore_eos", "min_tokens",
]  # fmt: skip
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": st.text(max_size=9) | json_values}
    ),
    min_size=1, max_size=3,
)  # fmt: skip
BODIES = st.fixed_dictionaries(
    {}, optional={name: json_values for name in FIELDS} | {"messages": MESSAGES, "prompt": st.text() | json_values}
)


@pytest.mark.slow
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/tokenize", "/detokenize"])
def test_no_body_makes_an_error_of_the_server(serving, path):
    """Valid or not: an answer, or an error in OpenAI's form that is the client's."""

    @settings(max_examples=100, suppress_health_check=[*HealthCheck])
    @given(BODIES | json_values, st.booleans())
    def ask(body, whole):
        if isinstance(body, dict) and whole:  # most bodies have some field that is wrong: here, only one
            body = {"messages": USER, "prompt": "hi", "max_tokens": 5, "tokens": [1]} | dict([*body.items()][:1])
        reply = serving.ask("POST", path, json.dumps(body))
        if reply.status != 200:
            assert 400 <= reply.status < 500, reply.body
            assert set(reply.json["error"]) == {"message", "type", "param", "code"}

    ask()


@pytest.mark.slow
@settings(max_examples=100, suppress_health_check=[*HealthCheck])
@given(
    st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"]),
    st.text("abcdefghijklmnopqrstuvwxyz/{}%1~._-", max_size=20) | st.sampled_from(["v1/models/", "v1/", "/", "v1//"]),
    st.dictionaries(
        st.sampled_from(["host", "origin", "authorization", "content-type", "if-none-match", "accept"]),
        st.text("abc:/[]@*, 0%", max_size=9),
        max_size=3,
    ),
)
def test_no_path_and_no_header_makes_an_error_of_the_server(shared, method, path, headers):
    assert shared.ask(method, f"/{path}", headers=headers).status < 500
