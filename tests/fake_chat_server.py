"""A chat server without a model: it serves the page and answers as a test says, cut where the test says."""

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "jaxchat" / "serve" / "page.html"
STAGES = ("base", "mid", "sft", "rl")


def security_policy(page: str) -> str:
    """The header that the real server sends with the page: its one script and its one style may run."""

    def digest(tag: str) -> str:
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    rules = [
        "default-src 'none'",
        f"script-src {digest('script')}",
        f"style-src {digest('style')}",
        "connect-src 'self'",
    ]
    return "; ".join([*rules, "img-src data:", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"])


def chunk(delta: dict | None = None, finish: str | None = None, **extra) -> dict:
    """A chunk of a stream, as the real server sends it."""
    choice = {"index": 0, "delta": delta or {}, "logprobs": None, "finish_reason": finish}
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [choice], "usage": None} | extra


def answer(*parts: str | dict, finish: str = "stop", seed: int = 7, tokens: int = 12) -> list[dict]:
    """The chunks of a complete answer. parts: text, or what the tool was asked or said."""
    deltas = [{"content": part} if isinstance(part, str) else {"jaxchat": {"tool": part}} for part in parts]
    timings = {"tokens_per_second": 80.0}
    usage = {"prompt_tokens": 5, "completion_tokens": tokens, "total_tokens": 5 + tokens}
    first, last = {"seed": seed}, {"seed": seed, "tool_calls": [], "timings": timings}
    return [
        chunk({"role": "assistant", "content": ""}, jaxchat=first),
        *[chunk(delta) for delta in deltas],
        chunk(finish=finish, jaxchat=last),
        chunk() | {"choices": [], "usage": usage},
    ]


def stream(chunks: Iterable[dict], done: bool = True) -> bytes:
    """Chunks as the bytes of a stream of server-sent events."""
    lines = [f"data: {json.dumps(one, ensure_ascii=False)}\n\n" for one in chunks]
    return "".join([*lines, "data: [DONE]\n\n" if done else ""]).encode()


class Error(Exception):
    """What a reply raises to answer with an error in OpenAI's form."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict | None = None):
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        self.body = {"error": {"message": message, "type": "error", "param": None, "code": code}}


class FakeChatServer:
    """reply: takes a request's JSON, returns bytes to send, seconds to wait (float) and events to wait for.

    count: takes a request's JSON, returns its tokens; the context is 256. health: what /health says.
    requests: the bodies of all requests for answers so far; counted: of those to count tokens.
    gone: set when a client has closed its connection early.
    """

    def __init__(self, port: int = 0):
        self.reply: Callable[[dict], Iterable[bytes | float | threading.Event]] = lambda body: [
            stream(answer("Hello."))
        ]
        self.models, self.key = [f"d12-{stage}" for stage in STAGES], ""
        self.count: Callable[[dict], int] = lambda body: 5
        self.health = "ok"
        self.requests: list[dict] = []
        self.counted: list[dict] = []
        self.gone, self._open = threading.Event(), set()
        self._start(port)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _start(self, port: int):
        self._server = ThreadingHTTPServer(("127.0.0.1", port), _handler(self))
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def stop(self):
        """Break all connections, as a server does that is killed."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        for connection in list(self._open):
            with contextlib.suppress(OSError):  # it may have ended just now
                connection.shutdown(socket.SHUT_RDWR)

    def restart(self):
        self._start(self.port)


def _handler(fake: FakeChatServer):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self):
            super().setup()
            fake._open.add(self.connection)

        def finish(self):
            fake._open.discard(self.connection)
            super().finish()

        def log_message(self, *_):
            pass

        def handle(self):
            with contextlib.suppress(OSError, ValueError):  # the connection was broken, by either side
                super().handle()

        def do_GET(self):
            if self.path == "/":
                page = PAGE.read_text()
                return self._send(200, page.encode(), "text/html; charset=utf-8", security_policy(page))
            if self.path == "/health":
                body = json.dumps({"status": fake.health}).encode()
                return self._send(200 if fake.health == "ok" else 503, body)
            if self.path != "/v1/models":
                return self._send(404, b"{}")
            if not self._may():
                return None
            entries = [{"id": id, "object": "model", "created": 1, "owned_by": "jaxchat"} for id in fake.models]
            for entry in entries:
                tag, stage = entry["id"].rsplit("-", 1)
                entry["jaxchat"] = {"stage": stage, "tag": tag, "step": 600, "sequence_len": 256}
            return self._send(200, json.dumps({"object": "list", "data": entries}).encode())

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            counts = self.path == "/v1/tokenize"
            (fake.counted if counts else fake.requests).append(body)
            if not self._may():
                return None
            if counts:
                return self._send(200, json.dumps({"count": fake.count(body), "max_model_len": 256}).encode())
            try:
                pieces = fake.reply(body)
            except Error as problem:
                return self._send(problem.status, json.dumps(problem.body).encode(), headers=problem.headers)
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream; charset=utf-8")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            try:
                for piece in pieces:
                    if isinstance(piece, float):
                        time.sleep(piece)
                    elif isinstance(piece, threading.Event):
                        piece.wait(60)
                    else:
                        self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
                self.wfile.write(b"0\r\n\r\n")
            except OSError:
                fake.gone.set()
                raise

        def _may(self) -> bool:
            if fake.key and self.headers.get("Authorization") != f"Bearer {fake.key}":
                self._send(401, json.dumps(Error(401, "wrong API key").body).encode())
                return False
            return True

        def _send(self, status, body, kind="application/json", policy=None, headers=None):
            self.send_response(status)
            extra = {"Content-Security-Policy": policy} if policy else {}
            sent = {"Content-Type": kind, "Content-Length": str(len(body))} | extra | (headers or {})
            for name, value in sent.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    return Handler
