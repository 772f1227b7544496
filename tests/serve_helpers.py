"""A server in this process with a scripted engine, launch.serve in another, and plain clients of them."""

import asyncio
import contextlib
import dataclasses
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from conftest import ROOT, random_params, xla_flags

from jaxchat.config import ModelConfig
from jaxchat.infer.scheduler import CANCELLED, LENGTH, STOP, Event, Generation, Request, Scheduler
from jaxchat.serve import server
from jaxchat.serve.app import make_app
from jaxchat.serve.guard import Rules
from jaxchat.serve.loop import Pool, Worker
from jaxchat.serve.metrics import Metrics
from jaxchat.serve.service import Defaults, Served, Service
from jaxchat.tokenizer import Tokenizer

CONTEXT = 96


class FakeEngine:
    """What an Engine is to a server.

    script: .say(request) gives the tokens of an answer, as (token, forced) pairs; .seconds and .longest are the
    seconds and the largest number of tokens of a step.
    """

    def __init__(self, script, *, slots: int = 4):
        self._script, self.tokenizer = script, script.tokenizer
        self.scheduler = Scheduler(CONTEXT, slots=slots, prefill_batch=slots)
        self._left, self._ended, self.requests = {}, [], []

    @property
    def busy(self):
        return bool(self.scheduler.waiting or self.scheduler.running or self._ended)

    def submit(self, request: Request) -> int:
        self.requests.append(request)
        return self.scheduler.submit(request)

    def cancel(self, id: int):
        if id in self.scheduler.waiting or id in self.scheduler.running:
            self._end(id, Generation(finish=CANCELLED))

    def _end(self, id, last):
        self.scheduler.remove(id)
        self._left.pop(id, None)
        self._ended.append(Event(id, last))

    def step(self, decode_steps: int = 64, full_batches: bool = False):
        events = []
        for id in self.scheduler.admit():
            request = self.scheduler.running[id]
            self._left[id] = list(self._script.say(request))[: self.scheduler.max_length(request) - len(request.prompt)]
            whole = len(self._left[id]) == len(list(self._script.say(request)))
            self._left[id].append(STOP if whole else LENGTH)
            if request.prompt_logprobs:
                events.append(Event(id, self._scored(Generation(), request, "prompt_", request.prompt[1:])))
        time.sleep(self._script.seconds)
        for id, left in [*self._left.items()]:
            request, said = self.scheduler.running[id], []
            while len(said) < min(decode_steps, self._script.longest) and isinstance(left[0], tuple):
                said.append(left.pop(0))
            new = Generation([token for token, _ in said], [forced for _, forced in said])
            if request.logprobs is not None:
                self._scored(new, request, "", new.tokens)
            if isinstance(left[0], str):
                new.finish = left[0]
                if new.finish == STOP:
                    new.end = (
                        self.tokenizer.special("<|assistant_end|>"),
                        -0.5 if request.logprobs is not None else None,
                    )
                self._end(id, new)
            else:
                events.append(Event(id, new))
        events, self._ended = events + self._ended, []
        return events

    def _scored(self, new, request, prefix, tokens):
        """Each token is the second likeliest, with a number of its own."""
        setattr(new, f"{prefix}logprobs", [-1.0 - token / 1000 for token in tokens])
        top = [[(0, -0.25), (token, -1.0 - token / 1000)][: request.logprobs] for token in tokens]
        setattr(new, f"{prefix}top", top)
        return new


class Running:
    """A running server with one model a stage. open_engine: see Worker; options: those of OPTIONS."""

    OPTIONS = {
        "stages": ("sft", "base"), "engines": 1, "slots": 4, "max_waiting": 8, "context": CONTEXT, "vocab_size": None,
        "rules": Rules(), "drain": 5.0,
    }  # fmt: skip

    def __init__(self, tokenizer, open_engine, **options):
        assert options.keys() <= self.OPTIONS.keys()
        self.options = SimpleNamespace(**self.OPTIONS | options)
        self._tokenizer, self._open = tokenizer, open_engine
        self._started, self.problem = threading.Event(), None
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self):
        try:
            asyncio.run(self._serve())
        except BaseException as problem:
            self.problem = problem
        finally:
            self._started.set()

    async def _serve(self):
        self.loop, self.stops, metrics, options = asyncio.get_running_loop(), asyncio.Queue(), Metrics(), self.options
        vocab_size = options.vocab_size or self._tokenizer.vocab_size
        models = []
        for stage in options.stages:
            id = f"toy-{stage}"
            workers = [Worker(self._open, options.slots, metrics, id) for _ in range(options.engines)]
            served = Served(
                id=id, stage=stage, tag="toy", step=7, created=1, fingerprint="jaxchat-test",
                only_continues=stage == "base", tokenizer=self._tokenizer,
                config=SimpleNamespace(sequence_len=options.context, vocab_size=vocab_size),
                pool=Pool(workers, options.context, options.max_waiting),
            )  # fmt: skip
            models.append(served)
        self.service = Service(models, Defaults(), metrics)
        sock = server.listen("127.0.0.1", 0)
        self.port = sock.getsockname()[1]

        async def load():
            for worker in self.service.workers:
                worker.start()
            await asyncio.gather(*(worker.ready for worker in self.service.workers))

        self._started.set()
        try:
            app = make_app(self.service, options.rules)
            await server.serve(app, self.service, sock, load(), options.drain, self.stops)
        finally:
            await self.service.close()

    def __enter__(self):
        self.thread.start()
        self._started.wait(60)
        return self

    def __exit__(self, *_):
        if self.thread.is_alive():
            self.stop()
        self.thread.join(60)
        assert not self.thread.is_alive()

    def stop(self):
        self.loop.call_soon_threadsafe(self.stops.put_nowait, "stop")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_until_ok(self) -> "Running":
        until(lambda: self.ask("GET", "/health").status == 200)
        return self

    def ask(self, method: str, path: str, body=None, headers=(), timeout: float = 60):
        """One request. -> .status, .headers, .body (bytes), .json"""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        with contextlib.closing(connection):
            data = body if isinstance(body, bytes | str | None) else json.dumps(body, separators=(",", ":"))
            connection.request(method, path, data, dict(headers))
            return received(connection.getresponse())

    def chat(self, text: str = "hi", **fields):
        return self.ask("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": text}]} | fields)

    def complete(self, prompt="hi", **fields):
        return self.ask("POST", "/v1/completions", {"prompt": prompt} | fields)

    def metric(self, name: str, **labels) -> float:
        """The sum of a metric's samples that have these labels."""
        found = 0.0
        for family in self.service.metrics.registry.collect():
            for sample in family.samples:
                if sample.name == f"jaxchat_{name}" and labels.items() <= sample.labels.items():
                    found += sample.value
        return found


def save_models(home, *stages: str):
    """Write a small model of each stage into the base directory `home`. Its tag is d1."""
    from jaxchat import checkpoint
    from jaxchat.store import Checkpoints

    tokenizer = Tokenizer.train(iter(["the cat and the hat, 12 + 34 = 46. "] * 50), 280)
    config = ModelConfig(64, tokenizer.vocab_size, n_layer=1, n_head=2, n_kv_head=1, n_embd=32)
    meta = {"model": dataclasses.asdict(config), "tokenizer_hash": tokenizer.hash}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXCHAT_BASE_DIR", str(home))
        for seed, stage in enumerate(stages):
            checkpoints = Checkpoints(checkpoint.run_folder(stage, "d1"))
            checkpoints.keep_tokenizer(tokenizer)
            params = random_params(config, seed, scale=0.4)
            checkpoints.save(3, params=params, optimizer=None, batches=None, meta=meta | {"stage": stage})
            checkpoints.close()


@contextlib.contextmanager
def serve_command(home, *args, devices: int = 1, port: int = 0):
    """Start launch.serve for the models in `home`. -> (process, port), once it is ready"""
    env = os.environ | {"JAXCHAT_BASE_DIR": str(home), "XLA_FLAGS": xla_flags(devices)}
    words = [sys.executable, "-m", "launch.serve", f"--port={port}", "--slots=2", *args]
    with subprocess.Popen(
        words, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            seen = ""
            while not (ready := re.search(r"ready after .*http://127.0.0.1:(\d+) ", seen)):
                line = process.stdout.readline()
                assert line, seen
                seen += line
            yield process, int(ready[1])
        finally:
            if process.poll() is None:
                process.kill()


def open_request(port: int, body: dict) -> socket.socket:
    """Send a request for a chat and read nothing."""
    data = json.dumps({"messages": [{"role": "user", "content": "hi"}]} | body).encode()
    client = socket.create_connection(("127.0.0.1", port), timeout=60)
    head = [
        "POST /v1/chat/completions HTTP/1.1",
        "host: localhost",
        "connection: close",
        f"content-length: {len(data)}",
    ]
    client.sendall("\r\n".join([*head, "", ""]).encode() + data)
    return client


def received(response):
    body = response.read()
    found = SimpleNamespace(status=response.status, headers=response.headers, body=body)
    if body and "json" in (response.headers["content-type"] or ""):
        found.json = json.loads(body)
    return found


def events_of(body: bytes) -> list:
    """The JSON of a stream's events; its last, "[DONE]", as a string. Comments are left out."""
    assert body.endswith(b"\n\n")
    lines = [line for line in body.decode().split("\n\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines)
    return [line[6:] if line[6:] == "[DONE]" else json.loads(line[6:]) for line in lines]


def until(condition, seconds: float = 120.0):
    """Wait until condition() holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)
