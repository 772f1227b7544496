"""Turn generated tokens into replies of OpenAI's API: text, log-probabilities and tool calls."""

import asyncio
import codecs
import dataclasses
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

from jaxchat.infer.scheduler import STOP, Generation
from jaxchat.infer.text import Delta, TextReader, Writer, last_call
from jaxchat.serve.loop import Stopped
from jaxchat.serve.protocol import ApiError, Completion, Sampling
from jaxchat.serve.service import ParsedRequest, Served, Service

LEAST_LOGPROB = -9999.0  # JSON has no −∞
LARGE = 20_000  # bytes from which JSON is read or written in a thread
ENTRY = 200  # approximate bytes of JSON for a token with its log-probability
PING = 15.0  # seconds of silence after which a stream sends a keep-alive comment


class Entry(NamedTuple):
    """A token and its log-probability, for the field `logprobs` of a reply."""

    token: int
    logprob: float | None
    top: list[tuple[int, float]]  # the likeliest tokens at its position and their log-probabilities
    offset: int  # number of characters of the answer before the token


@dataclasses.dataclass
class Update:
    """New content of an answer: text, log-probabilities of tokens, and tool calls."""

    text: str = ""
    entries: list[Entry] = dataclasses.field(default_factory=list)
    # Tool calls and tool outputs, as pairs (length of the update's text before it, event to send).
    tools: list[tuple[int, dict]] = dataclasses.field(default_factory=list)

    def extend(self, more: "Update"):
        self.tools += [(len(self.text) + at, tool) for at, tool in more.tools]
        self.text += more.text
        self.entries += more.entries


class Answer:
    """One answer while it is generated. Converts its tokens to text, log-probabilities and tool calls."""

    def __init__(self, index: int, asked: Sampling, tokenizer, prompt: list[int]):
        self.index, self.asked, self.prompt, self._tokenizer = index, asked, prompt, tokenizer
        self.finish = ""  # "stop" or "length" once the answer has ended
        self.sampled, self.forced, self.length = 0, 0, 0  # numbers of tokens; characters of text
        # Each has "id" and "code"; once there is an output, also "output" and "made_up"; and "incomplete" if
        # its code or output was cut off.
        self.tools: list[dict] = []
        if prompt and prompt[-1] == tokenizer.special("<|python_end|>"):  # a call without its result
            self.tools.append({"id": f"tool-{index}-0", "code": last_call(prompt, tokenizer) or ""})
        self._reader, self._writer = TextReader(tokenizer, asked.stop), Writer()
        self._all_tokens = isinstance(asked, Completion)  # log-probabilities of all tokens, not just text
        self._echoes = self._all_tokens and asked.echo
        self._waiting: list[Entry] = []  # held back until their text is complete
        self._part: Delta | None = None  # the tool call or output being read

    def add(self, new: Generation) -> Update:
        """Add new tokens from an engine. Return the Update that can be sent to the client."""
        update = Update()
        if self._echoes:
            self._echo(new, update)
        for i, (token, forced) in enumerate(zip(new.tokens, new.forced, strict=True)):
            if self.finish:
                break
            self.sampled, self.forced = self.sampled + (not forced), self.forced + forced
            scores = (new.logprobs[i], new.top[i]) if new.logprobs else None
            self._token(token, forced, scores, update)
            if self._reader.stopped:
                self._end(STOP, update)
        if new.finish and not self.finish:
            self._add_deltas(self._reader.end(), update)
            if new.end and self._all_tokens and self.asked.top is not None:
                token, logprob = new.end
                self._waiting.append(Entry(token, logprob, [], self.length))
            self._end(STOP if self._reader.stopped else new.finish, update)
        return update

    def _token(self, token: int, forced: bool, scores: tuple | None, update: Update):
        before, offset = self._reader.kind, self.length + len(self._reader.held)
        if token not in self._reader.unseen:
            self._add_deltas(self._reader.feed(token, forced), update)
        special = token in self._reader.marks or token in self._reader.unseen
        is_text = before == self._reader.kind == "text" and not special
        if scores and (self._all_tokens or is_text):
            self._waiting.append(Entry(token, *scores, offset))
        if not self._reader.waits and not self._reader.stopped:
            update.entries += self._waiting
            self._waiting = []

    def _add_deltas(self, deltas: list[Delta], update: Update):
        for delta in deltas:
            if delta.starts:
                self._end_part(update)
            if delta.kind != "text":
                text = self._part.text + delta.text if self._part else delta.text
                self._part = Delta(delta.kind, text, True)
            if self.asked.tool_display == "inline":
                self._add_text(self._writer.write([delta]), update)
            elif delta.kind == "text":
                self._add_text(delta.text, update)

    def _add_text(self, text: str, update: Update):
        update.text, self.length = update.text + text, self.length + len(text)

    def _end_part(self, update: Update, cut: bool = False):
        """Record the tool call or tool output that has just ended, if any.

        If the request asked for tool events, add one to `update`.
        cut: whether the answer ended in the middle of the call or output.
        """
        part, self._part = self._part, None
        if part is None:
            return
        incomplete = {"incomplete": True} if cut else {}
        if part.kind == "python":
            self.tools.append({"id": f"tool-{self.index}-{len(self.tools)}", "code": part.text} | incomplete)
            event = dict(self.tools[-1])
        else:
            if not self.tools or "output" in self.tools[-1]:  # the model wrote an output without a call
                self.tools.append({"id": f"tool-{self.index}-{len(self.tools)}", "code": ""})
            answer = {"output": part.text, "made_up": part.kind != "python_output"} | incomplete
            self.tools[-1] |= answer
            event = {"id": self.tools[-1]["id"]} | answer
        if self.asked.tool_display == "events":
            update.tools.append((len(update.text), event))

    def _end(self, finish: str, update: Update):
        cut = self._reader.kind != "text"  # cut off within a tool call or output
        self._end_part(update, cut)
        if self.asked.tool_display == "inline":
            self._add_text(self._writer.end(cut), update)
        # Of the tokens that overlap a stop string, report those whose text begins before it.
        stopped = self._reader.stopped
        update.entries += [entry for entry in self._waiting if not stopped or entry.offset < self.length]
        self._waiting, self.finish = [], finish

    def _echo(self, new: Generation, update: Update):
        """Add the prompt's text to `update`, and its tokens' log-probabilities if requested."""
        self._echoes, decoder = False, codecs.getincrementaldecoder("utf-8")("replace")
        unwritten = self.asked.add_bos and isinstance(self.asked.prompts[0], str)  # <|bos|> that we added
        logprobs, top = [None, *new.prompt_logprobs], [[], *new.prompt_top]
        for i, token in enumerate(self.prompt):
            if self.asked.top is not None:
                update.entries.append(Entry(token, logprobs[i], top[i], self.length))
            if i or not unwritten:
                self._add_text(decoder.decode(self._tokenizer.decode_bytes([token])), update)
        self._add_text(decoder.decode(b"", final=True), update)


def token_text(tokenizer, token: int) -> str:
    """Return a token's text, or its bytes as in "bytes:\\xe2\\x80" if they are not complete characters."""
    raw = tokenizer.decode_bytes([token])
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def completion_logprobs(tokenizer, entries: list[Entry]) -> dict:
    """Format entries as the field logprobs of /v1/completions. top_logprobs includes the token itself."""
    found = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for entry in entries:
        name, logprob = token_text(tokenizer, entry.token), entry.logprob
        found["tokens"].append(name)
        found["text_offset"].append(entry.offset)
        if logprob is None:  # the prompt's first token, which nothing predicts
            found["token_logprobs"].append(None)
            found["top_logprobs"].append(None)
            continue
        logprob, top = max(LEAST_LOGPROB, logprob), {}
        for token, other in entry.top:  # the likeliest first
            top.setdefault(token_text(tokenizer, token), max(LEAST_LOGPROB, other))
        found["token_logprobs"].append(logprob)
        found["top_logprobs"].append(top | {name: logprob})
    return found


def chat_logprobs(tokenizer, entries: list[Entry]) -> dict:
    def one(token: int, logprob: float) -> dict:
        text, raw = token_text(tokenizer, token), [*tokenizer.decode_bytes([token])]
        return {"token": text, "logprob": max(LEAST_LOGPROB, logprob), "bytes": raw}

    content = []
    for entry in entries:
        top = sorted(entry.top, key=lambda pair, own=entry.token: (-pair[1], pair[0] != own))
        content.append(one(entry.token, entry.logprob) | {"top_logprobs": [one(*pair) for pair in top]})
    return {"content": content, "refusal": None}


class Form:
    """Builder of a reply's JSON objects: one complete object, or many chunks of a stream."""

    def __init__(self, model: Served, asked: Sampling):
        self.chat = not isinstance(asked, Completion)
        self._asked, self._tokenizer = asked, model.tokenizer
        name, prefix = ("chat.completion", "chatcmpl") if self.chat else ("text_completion", "cmpl")
        self._common = {"id": f"{prefix}-{secrets.token_hex(12)}", "object": name}
        self._common |= {"created": int(time.time()), "model": model.id}
        self._common["system_fingerprint"] = model.fingerprint

    def complete(self, answers: list[Answer], updates: list[Update], usage: dict, extra: dict) -> dict:
        choices = []
        for answer, update in zip(answers, updates, strict=True):
            choice: dict[str, Any] = {"index": answer.index}
            if self.chat:
                choice["message"] = {"role": "assistant", "content": update.text, "refusal": None}
            else:
                choice["text"] = update.text
            choices.append(choice | {"logprobs": self._logprobs(update), "finish_reason": answer.finish})
        return self._common | {"choices": choices, "usage": usage, "jaxchat": extra}

    def role(self, index: int, **extra) -> dict:
        delta = {"role": "assistant", "content": ""}
        return self._chunk(index, {"delta": delta, "logprobs": None}, None, extra)

    def new_chunks(self, answer: Answer, update: Update) -> list[dict]:
        """Build the chunks of a stream for an update: text and tool calls, in order."""
        chunks, done = [], 0
        if self.chat:
            for at, tool in update.tools:
                if at > done:
                    delta = {"delta": {"content": update.text[done:at]}, "logprobs": None}
                    chunks.append(self._chunk(answer.index, delta, None, {}))
                delta = {"delta": {"jaxchat": {"tool": tool}}, "logprobs": None}
                chunks.append(self._chunk(answer.index, delta, None, {}))
                done = at
        rest = update.text[done:]
        if rest or update.entries:
            text = {"delta": {"content": rest}} if self.chat else {"text": rest}
            chunks.append(self._chunk(answer.index, text | {"logprobs": self._logprobs(update)}, None, {}))
        return chunks

    def last(self, answer: Answer, **extra) -> dict:
        nothing = {"delta": {}} if self.chat else {"text": ""}
        return self._chunk(answer.index, nothing | {"logprobs": None}, answer.finish, extra)

    def usage(self, usage: dict) -> dict:
        return self._stream_common() | {"choices": [], "usage": usage}

    def _chunk(self, index: int, content: dict, finish: str | None, extra: dict) -> dict:
        choice = {"index": index} | content | {"finish_reason": finish}
        usage = {"usage": None} if self._asked.include_usage else {}
        return self._stream_common() | {"choices": [choice]} | usage | extra

    def _stream_common(self) -> dict:
        return self._common | ({"object": "chat.completion.chunk"} if self.chat else {})

    def _logprobs(self, update: Update) -> dict | None:
        if self._asked.top is None:
            return None
        return (chat_logprobs if self.chat else completion_logprobs)(self._tokenizer, update.entries)


class Reply:
    """The reply to one HTTP request. Creating a Reply queues its answers for generation."""

    def __init__(self, service: Service, parsed: ParsedRequest):
        model = parsed.model
        self._service, self._parsed = service, parsed
        self.job = model.pool.submit(parsed.requests, parsed.low_latency)
        service.jobs.add(self.job)
        self._form = Form(model, parsed.fields)
        rows, tokenizer = self.job.rows, model.tokenizer
        self.answers = [Answer(i, parsed.fields, tokenizer, row.request.prompt) for i, row in enumerate(rows)]

    def close(self):
        self.job.cancel()
        self._service.jobs.discard(self.job)

    async def updates(self, timeout: float | None = None) -> AsyncIterator[tuple[Answer, Update] | None]:
        """Yield (answer, Update) for each update, until all answers have ended.

        Whenever `timeout` seconds pass without an update, yield None and continue.
        """
        open_answers = len(self.answers)
        while open_answers:
            outputs = await self.job.new_tokens(timeout)
            if not outputs:
                yield None
            for row, new in outputs:
                answer = self.answers[row.index]
                if answer.finish:
                    continue
                update = answer.add(new)
                if answer.finish:
                    open_answers -= 1
                    self.job.cancel_row(row)  # the engine would continue after a stop string
                    self._service.metrics.ended(self._parsed.model.id, row, answer)
                    self._parsed.model.pool.record_duration(row.last - row.began)
                yield answer, update

    async def complete(self) -> bytes:
        """Wait for all answers to end. Return the reply as one JSON object."""
        found = [Update() for _ in self.answers]
        async for answer, update in self.updates():
            found[answer.index].extend(update)
        size = sum(len(update.text) + ENTRY * len(update.entries) for update in found)
        usage, extra = self._usage(), self._extra()
        return await in_thread_if_large(
            size, lambda: json_bytes(self._form.complete(self.answers, found, usage, extra))
        )

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the reply as server-sent events."""
        form = self._form
        if form.chat:
            for answer in self.answers:  # in order of index, by which clients number choices
                yield event(form.role(answer.index, jaxchat={"seed": self._parsed.seed}))
        try:
            async for one in self.updates(PING):
                if one is None:
                    yield b": ping\n\n"
                    continue
                answer, update = one
                chunks = form.new_chunks(answer, update)
                if answer.finish:
                    last = all(other.finish for other in self.answers)
                    chunks.append(form.last(answer, **({"jaxchat": self._extra()} if last else {})))
                if chunks:
                    yield b"".join(map(event, chunks))
            if self._parsed.fields.include_usage:
                yield event(form.usage(self._usage()))
        except Stopped as stop:
            yield event(ApiError(503, str(stop)).body())
        yield b"data: [DONE]\n\n"

    def _usage(self) -> dict:
        parsed = self._parsed
        prompt = sum(len(request.prompt) for request in parsed.requests[:: parsed.fields.n])
        completion = sum(answer.sampled for answer in self.answers)
        usage = {"prompt_tokens": prompt, "completion_tokens": completion}
        return usage | {"total_tokens": prompt + completion, "prompt_tokens_details": {"cached_tokens": 0}}

    def _extra(self) -> dict:
        """Build the reply's field "jaxchat", with seed, tool_calls, forced_tokens and timings."""
        rows, sampled = self.job.rows, sum(answer.sampled for answer in self.answers)
        asked, began = rows[0].asked, min(row.began for row in rows)
        first, last = min(row.first or row.last for row in rows), max(row.last for row in rows)
        times = {"queue_ms": began - asked, "prefill_ms": first - began, "decode_ms": last - first}
        timings = {name: round(1000 * seconds, 2) for name, seconds in times.items()}
        timings["tokens_per_second"] = round(sampled / max(last - began, 1e-6), 2)
        calls = [
            {"index": answer.index, "output": None, "made_up": False} | tool
            for answer in self.answers
            for tool in answer.tools
        ]
        forced = sum(answer.forced for answer in self.answers)
        return {"seed": self._parsed.seed, "tool_calls": calls, "forced_tokens": forced, "timings": timings}


def event(content: dict) -> bytes:
    """Format `content` as a server-sent event."""
    # In ASCII, since some clients break lines at Unicode line separators.
    return b"data: " + json_bytes(content) + b"\n\n"


async def in_thread_if_large(size: int, function: Callable, *args):
    """Return function(*args). Run it in a thread if it handles LARGE bytes or more. size: number of bytes."""
    return function(*args) if size < LARGE else await asyncio.to_thread(function, *args)


def json_bytes(content: dict) -> bytes:
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode()
