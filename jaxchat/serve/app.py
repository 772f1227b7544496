"""The ASGI application and its endpoints: OpenAI's API, tokenization, health, metrics and the chat page."""

import asyncio
import base64
import hashlib
import re
from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response
from starlette.routing import Route

from jaxchat.serve import protocol
from jaxchat.serve.guard import ClosingResponse, Guard, Rules, read_body
from jaxchat.serve.loop import Stopped
from jaxchat.serve.protocol import ApiError, Fields
from jaxchat.serve.replies import Reply, in_thread_if_large, json_bytes
from jaxchat.serve.service import Service, prepare
from jaxchat.tokenizer import SPECIAL_TOKENS

MAX_TEXT = 2**20  # bytes of a body to tokenize: tokenizing holds the GIL, which delays all streams


def json_response(content: dict | bytes, status: int = 200) -> Response:
    body = content if isinstance(content, bytes) else json_bytes(content)
    return Response(body, status, media_type="application/json")


def error_response(error: ApiError) -> Response:
    kind = ClosingResponse if error.status in (408, 413) else Response
    return kind(json_bytes(error.body()), error.status, error.headers, media_type="application/json")


async def until_disconnect(receive: Callable, work: Awaitable):
    """Return the result of `work`. If the client disconnects first, cancel `work` and return None."""

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
    """ASGI response that streams a Reply as server-sent events, until the client disconnects."""

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
            await until_disconnect(receive, work())
        finally:
            self._reply.close()


class Endpoints:
    """Handlers of the HTTP routes."""

    def __init__(self, service: Service, page: Path):
        self._service = service
        html = page.read_bytes()
        self._html, self._tag = html, f'"{hashlib.sha256(html).hexdigest()[:32]}"'
        self._page_headers = page_headers(html) | {"etag": self._tag}

    async def models(self, request: HTTPRequest) -> Response:
        models = [model.about() for model in self._service.models.values()]
        return json_response({"object": "list", "data": models})

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
        parsed = await in_thread_if_large(len(body), prepare, service, body, chat)
        service.check_open()
        reply = Reply(service, parsed)
        if parsed.fields.stream:
            return EventStream(reply)
        try:
            found = await until_disconnect(request.receive, reply.complete())
        except Stopped as stop:
            raise ApiError(503, str(stop), retry=10) from None
        finally:
            reply.close()
        return Response(status_code=499) if found is None else json_response(found)

    async def tokenize(self, request: HTTPRequest) -> Response:
        body = await read_body(request)
        if len(body) > MAX_TEXT:
            given = f"the body has {len(body):,} bytes"
            raise ApiError(413, f"{given}; at most {MAX_TEXT:,} can be tokenized at a time")
        return json_response(await in_thread_if_large(len(body), tokenized, self._service, body))

    async def detokenize(self, request: HTTPRequest) -> Response:
        body = await read_body(request)
        return json_response(await in_thread_if_large(len(body), detokenized, self._service, body))

    async def tokenizer_info(self, request: HTTPRequest) -> Response:
        model = self._service.model(request.query_params.get("model", ""))
        names = {"bos_token": "<|bos|>", "eos_token": "<|assistant_end|>", "pad_token": "<|assistant_end|>"}
        info = {"tokenizer_class": "jaxchat", "vocab_size": model.config.vocab_size, "chat_template": None}
        info |= {"model_max_length": model.config.sequence_len, "add_bos_token": True}
        return json_response(names | info)

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


def tokenized(service: Service, body: bytes) -> bytes:
    """Tokenize a request's body, {"prompt": text} or {"messages": […]}, and return the tokens as JSON.

    A prompt that is exactly the name of a special token becomes that token, so clients can look up its id.
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
    found = {"count": len(tokens), "max_model_len": model.config.sequence_len, "tokens": tokens}
    return json_bytes(found)


def detokenized(service: Service, body: bytes) -> bytes:
    fields = Fields(protocol.read_json(body))
    model, tokens = service.model(fields.text("model")), fields.get("tokens")
    expected = f"a list of token ids from 0 to {model.config.vocab_size - 1}"
    if not isinstance(tokens, list):
        raise protocol.wrong("tokens", expected, tokens)
    for token in tokens:
        if type(token) is not int or not 0 <= token < model.config.vocab_size:
            raise protocol.wrong("tokens", expected, token)
    return json_bytes({"prompt": model.tokenizer.decode(tokens)})


def page_headers(html: bytes) -> dict[str, str]:
    """Return HTTP headers that allow the page `html` only its own scripts and requests to its own server."""

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
    endpoints = Endpoints(service, Path(__file__).with_name("page.html"))
    own = {"/": endpoints.page, "/health": endpoints.health, "/metrics": endpoints.metrics}
    routes = [Route(path, function) for path, function in own.items()]
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
            error = ApiError(405, f"{request.method} is not allowed here; use {problem.headers['Allow']}")
            error.headers["allow"] = problem.headers["Allow"]
        else:
            there = f"the endpoints are {', '.join(paths)} (also under /v1)"
            error = ApiError(404, f"no endpoint at {request.url.path[:80]}; {there}")
        return error_response(error)

    async def wrong(request: HTTPRequest, error: ApiError) -> Response:
        return error_response(error)

    app = Starlette(routes=routes, exception_handlers={HTTPException: refused, ApiError: wrong})
    app.router.redirect_slashes = False
    return Guard(app, rules, service.metrics, error_response)
