"""The endpoints, as an ASGI application: OpenAI's, tokens, health, metrics, and the page."""

import asyncio
import base64
import dataclasses
import hashlib
import json
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response
from starlette.routing import Route

from jaxchat.infer.scheduler import Request
from jaxchat.serve import protocol
from jaxchat.serve.guard import Farewell, Guard, Rules, read_body
from jaxchat.serve.loop import Job, Pool, Stopped, Worker
from jaxchat.serve.metrics import Metrics
from jaxchat.serve.protocol import ApiError, Chat, Completion, Fields
from jaxchat.serve.replies import Answer, Form, Piece
from jaxchat.tokenizer import SPECIAL_TOKENS

CLOSING = 5.0  # seconds to wait for an engine's last stretch
PING = 15.0  # seconds of silence after which a stream shows that it lives
LARGE = 20_000  # bytes of a body that is read in a thread, since the event loop never waits

log = logging.getLogger("jaxchat.serve")


@dataclasses.dataclass
class Served:
    """A model that is served. config: its ModelConfig; pool: its engines."""

    id: str
    stage: str
    tag: str
    step: int
    created: int  # seconds since 1970
    fingerprint: str
    only_continues: bool  # text: it knows no turns
    config: object
    tokenizer: object
    pool: Pool

    def about(self) -> dict:
        """The model in the form of /v1/models, with what only jaxchat has under "jaxchat"."""
        ours = {"stage": self.stage, "tag": self.tag, "step": self.step, "chat": not self.only_continues}
        ours |= {"sequence_len": self.config.sequence_len, "slots": self.pool.slots}
        common = {"id": self.id, "object": "model", "created": self.created, "owned_by": "jaxchat"}
        return common | {"max_model_len": self.config.sequence_len, "jaxchat": ours}


@dataclasses.dataclass(frozen=True)
class Defaults:
    """Settings of requests that have none of their own."""

    temperature: float = 0.6
    top_k: int = 50
    max_tokens: int | None = None  # of chats; None: what the context leaves


class Service:
    """All that the endpoints share. state: "loading", "ok" or "draining"."""

    def __init__(self, models: list[Served], defaults: Defaults, metrics: Metrics):
        """models: the first is the default."""
        self.models = {model.id: model for model in models}
        self.defaults, self.metrics = defaults, metrics
        self.state = "loading"
        self.jobs: set[Job] = set()  # that are being answered
        self._unknown, self._made = set(), time.monotonic()
        metrics.watch({model.id: model.pool for model in models})

    @property
    def workers(self) -> list[Worker]:
        return [worker for model in self.models.values() for worker in model.pool.workers]

    def progress(self) -> str:
        """How many shapes are compiled, and how long the others may take."""
        done, total = (sum(getattr(one, name) for one in self.workers) for name in ("compiled", "to_compile"))
        left = f", about {(time.monotonic() - self._made) * (total / done - 1):.0f} s to go" if done else ""
        return f"{done} of {total} shapes compiled{left}" if total else "loading"

    async def close(self):
        """Stop the engines; one that is compiling is left to itself."""
        for worker in self.workers:
            worker.stop()
        for worker in self.workers:
            if worker.is_alive():
                await asyncio.to_thread(worker.join, CLOSING)

    def model(self, name: str) -> Served:
        """The model of a name; "": the first. ApiError: there is none."""
        if not name:
            return next(iter(self.models.values()))
        if name not in self.models:
            message = f"no model {name[:80]!r} here; there are: {', '.join(self.models)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return self.models[name]

    def check_open(self):
        """Raise ApiError unless answers are generated now."""
        if self.state == "loading":
            raise ApiError(503, "the model is being loaded; try again later", retry=5)
        if self.state == "draining":
            raise ApiError(503, "the server is shutting down", retry=10)

    def note_unknown(self, names: list[str]):
        """Log the first of each field that nobody knows."""
        for name in names:
            if name not in self._unknown and len(self._unknown) < 1000:
                self._unknown.add(name)
                log.info("a request has the unknown field %.80r, which is ignored", name)

    async def drain(self, seconds: float):
        """Answer what has begun, for so long at most; then end what is left with an error."""
        self.state, end = "draining", time.monotonic() + seconds
        while self.jobs and time.monotonic() < end:
            await asyncio.sleep(0.05)
        for job in [*self.jobs]:
            job.stop("the server is shutting down")


@dataclasses.dataclass
class Asked:
    """A request that can be given to a model."""

    model: Served
    fields: Chat | Completion
    requests: list[Request]
    seed: int

    @property
    def hasty(self) -> bool:
        return self.fields.stream or bool(self.fields.stop)


def prepare(service: Service, body: bytes, chat: bool) -> Asked:
    """Read a request's body. ApiError: it is wrong, and where."""
    fields = Fields(protocol.read_json(body))
    asked = protocol.read_chat(fields) if chat else protocol.read_completion(fields)
    service.note_unknown(fields.unknown())
    model = service.model(asked.model)
    param, context = "messages" if chat else "prompt", model.config.sequence_len
    longest_token = int(model.tokenizer.token_bytes.max())
    if (least := protocol.text_length(asked) // longest_token) > context:
        raise protocol.too_long(f"{param} has at least {least:,} tokens", context, param)
    if chat:
        prompts = [protocol.chat_prompt(model.tokenizer, asked, only_continues=model.only_continues)]
    else:
        prompts = protocol.completion_prompts(model.tokenizer, asked, model.config.vocab_size)
    seed = secrets.randbelow(2**32) if asked.seed is None else asked.seed
    requests = []
    for prompt in prompts:
        limit = room(service, asked, len(prompt), context, param)
        for _ in range(asked.n):
            own = {"prompt": prompt, "max_tokens": limit, "seed": seed, "sample": len(requests)}
            requests.append(_request(service.defaults, asked, **own))
    return Asked(model, asked, requests, seed)


def room(service: Service, asked: Chat | Completion, length: int, context: int, param: str) -> int:
    """Most tokens of an answer to a prompt of `length` tokens."""
    wanted = asked.max_tokens
    if length + (1 if wanted is None else wanted) > context:
        answer = "" if wanted is None else f" and max_tokens is {wanted:,}"
        raise protocol.too_long(f"{param} has {length:,} tokens{answer}", context, param)
    return min(context - length, service.defaults.max_tokens or context) if wanted is None else wanted


def _request(defaults: Defaults, asked: Chat | Completion, **fields) -> Request:
    """The engine's request for one answer. fields: those of Request that differ from answer to answer."""
    return Request(
        **fields,
        temperature=defaults.temperature if asked.temperature is None else asked.temperature,
        top_k=defaults.top_k if asked.top_k is None else asked.top_k,
        top_p=asked.top_p,
        min_p=asked.min_p,
        min_tokens=asked.min_tokens,
        stop_tokens=asked.stop_token_ids,
        ignore_end=asked.ignore_eos,
        logprobs=asked.top,
        prompt_logprobs=isinstance(asked, Completion) and asked.echo and asked.top is not None,
    )


class Reply:
    """One request on its way: its answers as they grow, and what is sent of them."""

    def __init__(self, service: Service, asked: Asked, chat: bool):
        model = asked.model
        self._service, self._asked, self.chat = service, asked, chat
        self.job = model.pool.submit(asked.requests, asked.hasty)
        service.jobs.add(self.job)
        id = ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12)
        self._form = Form(id, int(time.time()), model.id, model.fingerprint, asked.fields, model.tokenizer)
        self.answers = [
            Answer(row.index, asked.fields, model.tokenizer, [*row.request.prompt]) for row in self.job.rows
        ]

    def close(self):
        self.job.cancel()
        self._service.jobs.discard(self.job)

    async def pieces(self, seconds: float | None = None) -> AsyncIterator[tuple[Answer, Piece] | None]:
        """Yield what is new of each answer, till all have ended; None after `seconds` of silence."""
        open_answers = len(self.answers)
        while open_answers:
            news = await self.job.news(seconds)
            if not news:
                yield None
            for row, new in news:
                answer = self.answers[row.index]
                if answer.finish:
                    continue
                piece = answer.add(new)
                if answer.finish:
                    open_answers -= 1
                    self.job.cancel_row(row)  # which goes on after a stop string
                    self._service.metrics.ended(self._asked.model.id, row, answer)
                    self._asked.model.pool.took(row.last - row.began)
                yield answer, piece

    async def whole(self) -> dict:
        """The reply as one object."""
        found = [Piece() for _ in self.answers]
        async for one in self.pieces():
            answer, piece = one
            found[answer.index].extend(piece)
        return self._form.whole(self.answers, found, self._usage(), self._ours())

    async def chunks(self) -> AsyncIterator[bytes]:
        """The reply as server-sent events."""
        form = self._form
        if self.chat:
            for answer in self.answers:  # in order: clients number choices by it
                yield event(form.role(answer.index, jaxchat={"seed": self._asked.seed}))
        try:
            async for one in self.pieces(PING):
                if one is None:
                    yield b": ping\n\n"
                    continue
                answer, piece = one
                chunks = form.news(answer, piece)
                if answer.finish:
                    last = all(other.finish for other in self.answers)
                    chunks.append(form.last(answer, **({"jaxchat": self._ours()} if last else {})))
                if chunks:
                    yield b"".join(map(event, chunks))
            if self._asked.fields.include_usage:
                yield event(form.usage(self._usage()))
        except Stopped as stop:
            yield event(ApiError(503, str(stop)).body())
        yield b"data: [DONE]\n\n"

    def _usage(self) -> dict:
        asked = self._asked
        prompt = sum(len(request.prompt) for request in asked.requests[:: asked.fields.n])
        completion = sum(answer.sampled for answer in self.answers)
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }
        return usage | {"prompt_tokens_details": {"cached_tokens": 0}}

    def _ours(self) -> dict:
        """What only jaxchat sends: the seed, what the tool was asked, and times."""
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
        return {"seed": self._asked.seed, "tool_calls": calls, "forced_tokens": forced, "timings": timings}


def event(content: dict) -> bytes:
    """A server-sent event. In ASCII: some clients take other line ends in Unicode for their own."""
    return b"data: " + json_bytes(content) + b"\n\n"


def json_bytes(content: dict) -> bytes:
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode()


def json_response(content: dict, status: int = 200, headers: dict | None = None) -> Response:
    return Response(json_bytes(content), status, headers, media_type="application/json")


def error_response(error: ApiError) -> Response:
    kind = Farewell if error.status in (408, 413) else Response
    return kind(json_bytes(error.body()), error.status, error.headers, media_type="application/json")


async def while_there(receive: Callable, work: Awaitable):
    """The result of `work`, which is cancelled when the client goes away: None then."""

    async def gone():
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return await tasks[0] if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class EventStream:
    """A response of server-sent events, which ends when the client goes away."""

    HEADERS = (
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),
    )

    def __init__(self, reply: Reply):
        self._reply = reply

    async def __call__(self, scope, receive, send):
        async def work():
            await send({"type": "http.response.start", "status": 200, "headers": [*self.HEADERS]})
            async for chunk in self._reply.chunks():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await while_there(receive, work())
        finally:
            self._reply.close()


class Endpoints:
    """The functions behind the routes."""

    def __init__(self, service: Service, page: Path):
        self._service = service
        html = page.read_bytes()
        self._html, self._tag = html, f'"{hashlib.sha256(html).hexdigest()[:32]}"'
        self._page_headers = page_headers(html) | {"etag": self._tag}

    async def models(self, request: HTTPRequest) -> Response:
        return json_response(
            {"object": "list", "data": [one.about() for one in self._service.models.values()]}
        )

    async def model(self, request: HTTPRequest) -> Response:
        return json_response(self._service.model(request.path_params["id"]).about())

    async def chat(self, request: HTTPRequest) -> Response:
        return await self._generate(request, chat=True)

    async def completions(self, request: HTTPRequest) -> Response:
        return await self._generate(request, chat=False)

    async def _generate(self, request: HTTPRequest, chat: bool) -> Response:
        service = self._service
        service.check_open()
        body = await read_body(request)
        asked = await _aside(len(body), prepare, service, body, chat)
        service.check_open()
        reply = Reply(service, asked, chat)
        if asked.fields.stream:
            return EventStream(reply)
        try:
            found = await while_there(request.receive, reply.whole())
        except Stopped as stop:
            raise ApiError(503, str(stop), retry=10) from None
        finally:
            reply.close()
        return Response(status_code=499) if found is None else json_response(found)

    async def tokenize(self, request: HTTPRequest) -> Response:
        body = await read_body(request)
        return json_response(await _aside(len(body), tokenized, self._service, body))

    async def detokenize(self, request: HTTPRequest) -> Response:
        body = await read_body(request)
        return json_response(await _aside(len(body), detokenized, self._service, body))

    async def tokenizer_info(self, request: HTTPRequest) -> Response:
        model = self._service.model(request.query_params.get("model", ""))
        names = {"bos_token": "<|bos|>", "eos_token": "<|assistant_end|>", "pad_token": "<|assistant_end|>"}
        info = {"tokenizer_class": "jaxchat", "vocab_size": model.config.vocab_size, "chat_template": None}
        return json_response(
            names | info | {"model_max_length": model.config.sequence_len, "add_bos_token": True}
        )

    async def health(self, request: HTTPRequest) -> Response:
        state = self._service.state
        if any(model.pool.failed for model in self._service.models.values()):
            return json_response({"status": "failed"}, 500)
        return json_response({"status": state}, 200 if state == "ok" else 503)

    async def metrics(self, request: HTTPRequest) -> Response:
        return Response(self._service.metrics.text(), media_type="text/plain; version=0.0.4")

    async def page(self, request: HTTPRequest) -> Response:
        if self._tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=self._page_headers)
        return Response(self._html, headers=self._page_headers, media_type="text/html")


async def _aside(size: int, function: Callable, *args):
    """function(*args), in a thread if it may take long."""
    return function(*args) if size < LARGE else await asyncio.to_thread(function, *args)


def tokenized(service: Service, body: bytes) -> dict:
    """The tokens of {"prompt": text} or {"messages": […]}.

    A text that is nothing but the name of a special token is that token: so clients learn its id.
    """
    fields = Fields(protocol.read_json(body))
    model = service.model(fields.text("model"))
    if fields.get("messages") is not None:
        chat = protocol.read_chat(fields)
        tokens = protocol.chat_prompt(model.tokenizer, chat, only_continues=model.only_continues)
    else:
        text = fields.get("prompt")
        if not isinstance(text, str):
            raise protocol.wrong("prompt", "a string", text)
        known = [model.tokenizer.special(text)] if text in SPECIAL_TOKENS else model.tokenizer.encode(text)
        tokens = [model.tokenizer.bos] * fields.switch("add_special_tokens", True) + known
    return {"count": len(tokens), "max_model_len": model.config.sequence_len, "tokens": tokens}


def detokenized(service: Service, body: bytes) -> dict:
    fields = Fields(protocol.read_json(body))
    model, tokens = service.model(fields.text("model")), fields.get("tokens")
    whole = isinstance(tokens, list) and all(type(token) is int for token in tokens)
    if not whole or (tokens and not 0 <= min(tokens) <= max(tokens) < model.config.vocab_size):
        raise protocol.wrong("tokens", f"a list of token ids from 0 to {model.config.vocab_size - 1}", tokens)
    return {"prompt": model.tokenizer.decode(tokens)}


def page_headers(html: bytes) -> dict[str, str]:
    """Headers that let the page run its own script and style, connect here, and do nothing else."""

    def hashes(tag: bytes) -> str:
        blocks = re.findall(rb"<%b(?:\s[^>]*)?>(.*?)</%b>" % (tag, tag), html, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(block).digest()).decode() for block in blocks]
        return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"

    policy = (
        f"default-src 'none'; script-src {hashes(b'script')}; style-src {hashes(b'style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }


def make_app(service: Service, rules: Rules):
    """The ASGI application."""
    endpoints = Endpoints(service, Path(__file__).with_name("page.html"))
    routes = [
        Route("/", endpoints.page),
        Route("/health", endpoints.health),
        Route("/metrics", endpoints.metrics),
    ]
    for path, function, method in (
        ("/models", endpoints.models, "GET"),
        ("/models/{id}", endpoints.model, "GET"),
        ("/chat/completions", endpoints.chat, "POST"),
        ("/completions", endpoints.completions, "POST"),
        ("/tokenize", endpoints.tokenize, "POST"),
        ("/detokenize", endpoints.detokenize, "POST"),
        ("/tokenizer_info", endpoints.tokenizer_info, "GET"),
    ):
        routes += [Route(prefix + path, function, methods=[method]) for prefix in ("/v1", "")]
    paths = sorted({route.path for route in routes if not route.path.startswith("/v1/")} - {"/"})

    async def refused(request: HTTPRequest, problem: HTTPException) -> Response:
        if problem.status_code == 405:
            error = ApiError(405, f"{request.method} is not possible here; it is {problem.headers['Allow']}")
            error.headers["allow"] = problem.headers["Allow"]
        else:
            error = ApiError(
                404, f"nothing at {request.url.path[:80]}; there are: {', '.join(paths)} (also under /v1)"
            )
        return error_response(error)

    async def wrong(request: HTTPRequest, error: ApiError) -> Response:
        return error_response(error)

    app = Starlette(routes=routes, exception_handlers={HTTPException: refused, ApiError: wrong})
    app.router.redirect_slashes = False
    return Guard(app, rules, service.metrics, error_response)
