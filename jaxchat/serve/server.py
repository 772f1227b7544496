"""The HTTP server: uvicorn with a time limit on headers, errors in OpenAI's form, and graceful shutdown."""

import asyncio
import contextlib
import json
import os
import signal
import socket
from collections.abc import Awaitable

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxchat.config import UserError
from jaxchat.serve.protocol import ApiError
from jaxchat.serve.service import Service

HEADER_SECONDS = 15.0  # time limit for a request's headers to arrive
CLOSE_SECONDS = 5  # time limit for connections to close after the last answer


class Protocol(H11Protocol):
    """The HTTP/1.1 protocol of uvicorn, with a time limit on a request's headers."""

    _headers_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport):
        super().connection_made(transport)
        self._watch_headers()

    def data_received(self, data: bytes):
        super().data_received(data)
        self._watch_headers()

    def connection_lost(self, exc):
        self._forget_headers()
        super().connection_lost(exc)

    def _watch_headers(self):
        """Start the time limit if headers are yet to arrive, and cancel it if they are complete."""
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._forget_headers()
        elif self._headers_due is None:
            self._headers_due = self.loop.call_later(HEADER_SECONDS, self._too_slow)

    def _forget_headers(self):
        if self._headers_due is not None:
            self._headers_due.cancel()
            self._headers_due = None

    def _too_slow(self):
        self._headers_due = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.close()

    def send_400_response(self, msg: str):
        body = json.dumps(ApiError(400, msg).body()).encode()
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            head = h11.Response(status_code=400, headers=headers)
            for part in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(part))
        self.transport.close()


class Server(uvicorn.Server):
    """A uvicorn server that does not handle signals, because stops_by_signal handles them."""

    @contextlib.contextmanager
    def capture_signals(self):
        yield


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket. Raises UserError if the address can't be used."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, *_, address = found[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as problem:
        known = (problem.errno or 0) > 0  # false if the name lookup failed; create_server extends strerror
        reason = os.strerror(problem.errno) if known else problem.strerror or problem
        hint = "give another --host, or another --port (0: any)"
        raise UserError(f"--host={host} --port={port}: {reason}; {hint}") from None


def stops_by_signal() -> asyncio.Queue:
    """Handle SIGTERM and SIGINT. Return a queue to which each of these signals adds an item."""
    stops, loop = asyncio.Queue(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stops.put_nowait, number)
    return stops


async def serve(
    app, service: Service, sock: socket.socket, load: Awaitable, drain: float, stops: asyncio.Queue
):
    """Serve `app` until `stops` has an item. Then let running answers finish, for at most `drain` seconds.

    load: awaitable that loads the models. Until done, /health reports "loading". Its exceptions are raised.
    stops: queue of requests to stop. A second item ends all answers at once.
    """
    config = uvicorn.Config(
        app, http=Protocol, ws="none", lifespan="off", log_config=None, access_log=False, server_header=False,
        timeout_keep_alive=75, timeout_graceful_shutdown=CLOSE_SECONDS, proxy_headers=False,
    )  # fmt: skip
    server = Server(config)
    running, loading = asyncio.create_task(server.serve(sockets=[sock])), asyncio.ensure_future(load)
    stop = asyncio.create_task(stops.get())
    try:
        await asyncio.wait([loading, stop, running], return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
            service.state = "ok"
            await asyncio.wait([stop, running], return_when=asyncio.FIRST_COMPLETED)
        again, draining = asyncio.create_task(stops.get()), asyncio.create_task(service.drain(drain))
        await asyncio.wait([again, draining], return_when=asyncio.FIRST_COMPLETED)
        again.cancel()
        draining.cancel()
        await service.drain(0)
    finally:
        loading.cancel()
        stop.cancel()
        server.should_exit = True
        await running
