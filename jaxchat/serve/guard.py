"""ASGI middleware that checks host, origin and API key, adds response headers, and logs requests."""

import asyncio
import contextlib
import dataclasses
import hashlib
import hmac
import ipaddress
import logging
import re
import secrets
import time
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from jaxchat.serve.protocol import ApiError

MAX_BODY = 4 * 2**20  # bytes
BODY_SECONDS = 30.0  # time limit for a body to arrive
LINGER = 2.0  # seconds to discard what a client still sends, so that it can read the response
OPEN = {"/", "/health"}  # paths that need no key

log = logging.getLogger("jaxchat.serve")


@dataclasses.dataclass(frozen=True)
class Rules:
    """Rules on who may use the server."""

    keys: tuple[str, ...] = ()  # valid API keys; (): no key is required
    origins: tuple[str, ...] = ()  # origins of other sites whose pages may use the server; "*": all sites
    local: bool = True  # whether the Host header must name localhost or the host of one of `origins`


def is_local(host: str) -> bool:
    """Return whether a host is localhost, a subdomain of localhost, or a loopback address."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return "?"  # matches no host


class Guard:
    """ASGI middleware that enforces Rules, adds request ids, logs requests, and catches exceptions."""

    def __init__(self, app, rules: Rules, metrics, error_response):
        self._rules, self._metrics, self._error_response = rules, metrics, error_response
        self._keys = [hashlib.sha256(key.encode()).digest() for key in rules.keys]
        self._inner, self._app = app, self._checked
        if rules.origins:
            self._app = CORSMiddleware(
                self._app, allow_origins=rules.origins, allow_methods=["*"], allow_headers=["*"],
                expose_headers=["x-request-id", "retry-after"],
            )  # fmt: skip

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self._inner(scope, receive, send)  # lifespan events
        given = Headers(scope=scope).get("x-request-id", "")
        id = given if re.fullmatch(r"[\x21-\x7e]{1,128}", given) else f"req-{secrets.token_hex(12)}"
        status, began = 0, time.monotonic()

        async def named(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = id
            await send(message)

        try:
            await self._app(scope, receive, named)
        except Exception:
            log.exception("request %s failed", id)
            if status:
                raise  # uvicorn closes the connection
            error = ApiError(500, f"internal server error; see {id} in the server's log")
            await self._error_response(error)(scope, receive, named)
        finally:
            endpoint = getattr(scope.get("endpoint"), "__name__", "none")  # set by the router
            self._metrics.requests.labels(endpoint, status).inc()
            level = logging.INFO if scope["method"] == "POST" or status >= 400 else logging.DEBUG
            path, seconds = scope["raw_path"].decode("ascii", "replace"), time.monotonic() - began
            log.log(level, "%s %s %.100s %d, %.3f s", id, scope["method"], path, status, seconds)

    async def _checked(self, scope, receive, send):
        try:
            response = self._refusal(scope)
        except ApiError as error:
            response = self._error_response(error)
        await (response or self._inner)(scope, receive, send)

    def _refusal(self, scope) -> Response | None:
        """Raise ApiError if a request is not allowed. Return a response for OPTIONS requests, else None."""
        headers = Headers(scope=scope)
        self._check_host(headers.get("host", ""))
        if scope["method"] == "OPTIONS":
            return Response(status_code=204, headers={"allow": "GET, HEAD, POST, OPTIONS"})
        self._check_origin(headers.get("origin"), headers.get("host", ""), scope["method"])
        if self._keys and scope["path"] not in OPEN:
            self._check_key(headers.get("authorization", ""))
        return None

    def _check_host(self, host: str):
        """Raise ApiError if rules.local is set and `host` is neither local nor the host of an allowed origin.

        This prevents DNS rebinding.
        """
        name = host_of(f"//{host}")  # "": no Host header, so not a browser
        allowed = {"", *map(host_of, self._rules.origins)}
        if self._rules.local and not (is_local(name) or name in allowed or "*" in self._rules.origins):
            message = f"this server doesn't answer for the host {name!r}"
            raise ApiError(403, f"{message}; --cors_origins=http://{name or 'HOST'} allows it")

    def _check_origin(self, origin: str | None, host: str, method: str):
        """Raise ApiError for a POST request from a page of another site, unless its origin is allowed."""
        same = origin is not None and origin.partition("://")[2] == host
        allowed = origin is None or same or {origin, "*"} & {*self._rules.origins}
        if method == "POST" and not allowed and origin == "null":
            why = "pages without an address (Origin: null, such as local files) may not use this server"
            raise ApiError(403, f"{why}; open the page over http, or allow all pages with --cors_origins=*")
        if method == "POST" and not allowed:
            why = f"pages of {origin} may not use this server"
            raise ApiError(403, f"{why}; --cors_origins={origin} allows it")

    def _check_key(self, authorization: str):
        kind, _, key = authorization.partition(" ")
        digest = hashlib.sha256(key.strip().encode()).digest()
        same = [hmac.compare_digest(digest, own) for own in self._keys]  # no early exit: constant time
        if kind.lower() != "bearer" or not any(same):
            message = "wrong API key" if key else "no API key; send the header Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key")


async def read_body(request: HTTPRequest) -> bytes:
    """Read a request's body. Raises ApiError if the body is too large, too slow or incomplete."""
    length, body, more = int(request.headers.get("content-length", "0")), bytearray(), True
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while more and max(length, len(body)) <= MAX_BODY:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ApiError(499, "the client disconnected before its request was complete")
                body += message.get("body", b"")
                more = message.get("more_body", False)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:.0f} seconds") from None
    if max(length, len(body)) > MAX_BODY:
        raise ApiError(413, f"the body is larger than {MAX_BODY:,} bytes")
    return bytes(body)


class ClosingResponse(Response):
    """A response that closes the connection, for a client that may still be sending its request's body.

    Before closing, discard the rest of the body for up to LINGER seconds. Else the response could be lost.
    """

    async def __call__(self, scope, receive, send):
        self.headers["connection"] = "close"
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER):
                while (await receive()).get("more_body"):
                    pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})
