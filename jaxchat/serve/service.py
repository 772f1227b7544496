"""The served models, the state of the server, and the preparation of requests."""

import asyncio
import dataclasses
import logging
import secrets
import time

from jaxchat.infer.scheduler import Request
from jaxchat.serve import protocol
from jaxchat.serve.loop import Job, Pool, Worker
from jaxchat.serve.metrics import Metrics
from jaxchat.serve.protocol import ApiError, Chat, Completion, Fields

CLOSING = 5.0  # seconds to wait for an engine to stop

log = logging.getLogger("jaxchat.serve")


@dataclasses.dataclass
class Served:
    """A model that is served."""

    id: str  # name by which requests select the model
    stage: str
    tag: str
    step: int
    created: int  # seconds since 1970
    fingerprint: str
    only_continues: bool  # a base model, which does not know the turns of a chat
    config: object  # the ModelConfig
    tokenizer: object
    pool: Pool  # the engines that run the model

    def about(self) -> dict:
        """Describe the model in the form of /v1/models, with jaxchat's additions under "jaxchat"."""
        ours = {"stage": self.stage, "tag": self.tag, "step": self.step, "chat": not self.only_continues}
        ours |= {"sequence_len": self.config.sequence_len, "slots": self.pool.slots}
        common = {"id": self.id, "object": "model", "created": self.created, "owned_by": "jaxchat"}
        return common | {"max_model_len": self.config.sequence_len, "jaxchat": ours}


@dataclasses.dataclass(frozen=True)
class Defaults:
    """Values of the fields that a request leaves out."""

    temperature: float = 0.6
    top_k: int = 50
    max_tokens: int | None = None  # for chats only; None: as many as fit in the context


class Service:
    """State shared by the endpoints: the models, the requests being answered, and the metrics."""

    def __init__(self, models: list[Served], defaults: Defaults, metrics: Metrics):
        """Create a Service. The first of `models` answers requests that name no model."""
        self.models = {model.id: model for model in models}
        self.defaults, self.metrics = defaults, metrics
        self.state = "loading"  # "loading", "ok" or "draining"
        self.jobs: set[Job] = set()  # of the requests being answered
        self._unknown, self._made = set(), time.monotonic()
        metrics.watch({model.id: model.pool for model in models})

    @property
    def workers(self) -> list[Worker]:
        return [worker for model in self.models.values() for worker in model.pool.workers]

    def progress(self) -> str:
        """Return "loading" or a phrase such as "3 of 8 shapes compiled, about 20 s to go"."""
        done, total = (sum(getattr(one, name) for one in self.workers) for name in ("compiled", "to_compile"))
        left = f", about {(time.monotonic() - self._made) * (total / done - 1):.0f} s to go" if done else ""
        return f"{done} of {total} shapes compiled{left}" if total else "loading"

    async def close(self):
        """Stop the engines. Wait at most CLOSING seconds for each, since it may still be compiling."""
        for worker in self.workers:
            worker.stop()
        for worker in self.workers:
            if worker.is_alive():
                await asyncio.to_thread(worker.join, CLOSING)

    def model(self, name: str) -> Served:
        """Return the model called `name`, or the first model for "". Raises ApiError for an unknown name."""
        if not name:
            return next(iter(self.models.values()))
        if name not in self.models:
            message = f"no model {name[:80]!r}; this server has: {', '.join(self.models)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return self.models[name]

    def check_open(self):
        """Raise ApiError while the server is loading or draining."""
        if self.state == "loading":
            raise ApiError(503, "the model is still being loaded", retry=5)
        if self.state == "draining":
            raise ApiError(503, "the server is shutting down", retry=10)

    def log_unknown(self, names: list[str]):
        """Log the names of a request's unknown fields, except those logged before."""
        for name in {name[:80] for name in names} - self._unknown:
            if len(self._unknown) < 1000:
                self._unknown.add(name)
                log.info("a request has the unknown field %r, which is ignored", name)

    async def drain(self, seconds: float):
        """Let running answers finish for at most `seconds`. Then end the remaining answers with an error."""
        self.state, end = "draining", time.monotonic() + seconds
        while self.jobs and time.monotonic() < end:
            await asyncio.sleep(0.05)
        for job in [*self.jobs]:
            job.stop("the server is shutting down")


@dataclasses.dataclass
class ParsedRequest:
    """A parsed HTTP request."""

    model: Served
    fields: Chat | Completion
    requests: list[Request]  # one for each answer to generate
    seed: int

    @property
    def low_latency(self) -> bool:
        """Whether new tokens are needed often, because the reply is streamed or searched for stop strings."""
        return self.fields.stream or bool(self.fields.stop)


def prepare(service: Service, body: bytes, chat: bool) -> ParsedRequest:
    """Parse a request's body and tokenize the prompts. Raises ApiError if the request is invalid.

    chat: whether the request is to /v1/chat/completions rather than /v1/completions.
    """
    fields = Fields(protocol.read_json(body))
    asked = protocol.read_chat(fields) if chat else protocol.read_completion(fields)
    service.log_unknown(fields.unknown())
    model = service.model(asked.model)
    param, context = "messages" if chat else "prompt", model.config.sequence_len
    protocol.check_stop_tokens(asked, model.config.vocab_size)
    longest_token = int(model.tokenizer.token_bytes.max())
    if (least := protocol.text_length(asked) // longest_token) > context:
        raise protocol.too_long(f"{param} has at least {least:,} tokens", context, param)
    if chat:
        prompts = [protocol.chat_prompt(model.tokenizer, asked, only_continues=model.only_continues)]
    else:
        prompts = protocol.completion_prompts(model.tokenizer, asked, model.config.vocab_size)
    seed = secrets.randbelow(2**32) if asked.seed is None else asked.seed
    defaults = {"temperature": service.defaults.temperature, "top_k": service.defaults.top_k}
    settings = defaults | asked.settings | {"seed": seed, "logprobs": asked.top}
    settings["prompt_logprobs"] = isinstance(asked, Completion) and asked.echo and asked.top is not None
    requests = []
    for prompt in prompts:
        limit = answer_limit(service, asked, len(prompt), context, param)
        for _ in range(asked.n):
            requests.append(Request(prompt, limit, sample=len(requests), **settings))
    return ParsedRequest(model, asked, requests, seed)


def answer_limit(service: Service, asked: Chat | Completion, length: int, context: int, param: str) -> int:
    """Return the maximum number of tokens in an answer to a prompt of `length` tokens.

    Raises ApiError if prompt and answer don't fit in `context` tokens. param: name of the prompt's field.
    """
    wanted, given = asked.max_tokens, f"{param} has {length:,} tokens"
    if wanted is None:
        if length >= context:
            raise protocol.too_long(given, context, param)
        return min(context - length, service.defaults.max_tokens or context)
    if length + wanted > context:
        given += f" and max_tokens is {wanted:,}"
        raise protocol.too_long(given, context, param, ", or lower max_tokens")
    return wanted
