"""Time the server beside the engine alone: python -m bench.serve --model_tag=d20 --streams=64

Both in turn, in one process: `Engine.generate` of all prompts at once, and as many clients, in a process of
their own, that read streams of the same prompts. Texts must be the same. With --url: only the clients,
against any server that speaks OpenAI's API.
"""

import asyncio
import dataclasses
import json
import statistics
import sys
import time
from urllib.parse import urlsplit

from jaxchat.config import Compute, DeviceFlags, flag
from launch import cli, serve


@dataclasses.dataclass(frozen=True)
class Config(DeviceFlags):
    """Time streams of many clients of launch.serve, beside Engine.generate at the same batch."""

    source: str = "sft"
    """Stage to serve."""
    model_tag: str = ""
    """Tag of the model; empty: the deepest d<N>, or else the newest."""
    streams: int = flag(64, 1)
    """Clients at a time, and slots of the server."""
    prompt_tokens: int = flag(16, 1)
    """Tokens of each prompt."""
    max_tokens: int = flag(128, 1)
    """Tokens of each answer: none ends before."""
    rounds: int = flag(3, 1)
    """Times that both are measured, in turn; the medians are printed."""
    url: str = ""
    """Address of another server to measure alone, as in http://127.0.0.1:8000; empty: start one here."""


def prompts_of(config: Config, vocab: int = 256) -> list[list[int]]:
    return [[(31 * i + 7 * j) % vocab for j in range(config.prompt_tokens)] for i in range(config.streams)]


async def one_stream(url: str, prompt: list[int], config: Config) -> dict:
    """Read one answer. -> its text, and the seconds after its request at which parts of it came."""
    address = urlsplit(url)
    body = {"prompt": prompt, "max_tokens": config.max_tokens, "stream": True, "ignore_eos": True, "seed": 1}
    data = json.dumps(body | {"temperature": 1, "top_k": 0}).encode()
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {address.netloc}\r\ncontent-length: {len(data)}\r\n\r\n"
    began, times, text = time.perf_counter(), [], ""
    writer.write(head.encode() + data)
    while (line := await reader.readline()) != b"data: [DONE]\n":
        if not line:
            raise RuntimeError("the server closed a stream")
        if line.startswith(b"HTTP/1.1") and b"200" not in line:
            raise RuntimeError(f"the server answered {line.decode().strip()}")
        if line.startswith(b"data: ") and (new := json.loads(line[6:])["choices"][0]["text"]):
            times.append(time.perf_counter() - began)
            text += new
    writer.close()
    return {"text": text, "times": times}


async def all_streams(config: Config) -> dict:
    """Measure all streams at once."""
    began = time.perf_counter()
    found = await asyncio.gather(*(one_stream(config.url, prompt, config) for prompt in prompts_of(config)))
    seconds = time.perf_counter() - began
    gaps = [b - a for one in found for a, b in zip(one["times"], one["times"][1:], strict=False)]
    return {
        "tokens_per_s": config.streams * config.max_tokens / seconds,
        "first": sorted(one["times"][0] for one in found),
        "gap": statistics.median(gaps) if gaps else 0.0,
        "texts": [one["text"] for one in found],
    }


async def ask_from_outside(url: str, config: Config) -> dict:
    """all_streams in a process of its own, which shares no interpreter with the server."""
    words = [f"--{name}={getattr(config, name)}" for name in ("streams", "prompt_tokens", "max_tokens")]
    command = [sys.executable, "-m", "bench.serve", f"--url={url}", *words]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    return json.loads(out.splitlines()[-1])


async def measure(config: Config, devices: list, compute: Compute) -> None:
    """Serve, and time both in turn."""
    from jaxchat import checkpoint
    from jaxchat.infer.engine import Engine
    from jaxchat.serve import server
    from jaxchat.serve.app import make_app
    from jaxchat.serve.guard import Rules

    model = checkpoint.open_model(config.source, config.model_tag)
    service = serve.make_service(serve.Config(slots=config.streams), [model], devices, compute)
    stops, sock = asyncio.Queue(), server.listen("127.0.0.1", 0)
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    loading = serve.load(service, url, open_browser=False)
    serving = server.serve(make_app(service, Rules()), service, sock, loading, 5, stops)
    running = asyncio.create_task(serving)
    while service.state != "ok":
        await asyncio.wait([running], timeout=0.1)
        if running.done():
            return running.result()  # why it could not start
    options = {"batch_size": config.streams, "few_shapes": True}
    engine = Engine(model.load(), model.config, model.tokenizer, compute, **options)

    def generate():
        settings = {"max_tokens": config.max_tokens, "ignore_end": True, "seed": 1, "temperature": 1.0}
        began = time.perf_counter()
        # Each prompt is the first of its request, as the clients' are.
        found = engine.generate(prompts_of(config), sample=0, **settings)
        return config.streams * config.max_tokens / (time.perf_counter() - began), found

    await asyncio.to_thread(generate)  # compiles
    alone, served = [], []
    for _ in range(config.rounds):
        speed, found = await asyncio.to_thread(generate)
        alone.append(speed)
        served.append(await ask_from_outside(url, config))
    texts = [text_of(one, model.tokenizer) for one in found]
    stops.put_nowait("stop")
    await running
    await service.close()
    report(config, alone, served, texts)


def text_of(generation, tokenizer) -> str:
    """An answer's text as the server sends it: without special tokens and the tool's."""
    from jaxchat.infer.text import TextReader

    reader = TextReader(tokenizer)
    said = zip(generation.tokens, generation.forced, strict=True)
    deltas = [
        delta for token, forced in said if token not in reader.unseen for delta in reader.feed(token, forced)
    ]
    return "".join(delta.text for delta in [*deltas, *reader.end()] if delta.kind == "text")


def report(config: Config, alone: list[float], served: list[dict], texts: list[str]):
    ratios = [one["tokens_per_s"] / speed for one, speed in zip(served, alone, strict=True)]
    same = sum(text == want for one in served for text, want in zip(one["texts"], texts, strict=True))
    print(f"Engine.generate  {statistics.median(alone):10,.0f} tokens/s")
    print(f"served           {statistics.median(one['tokens_per_s'] for one in served):10,.0f} tokens/s")
    each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    print(f"ratio            {statistics.median(ratios):10.3f}   ({each})")
    print_latency([first for one in served for first in one["first"]], [one["gap"] for one in served])
    print(f"texts            {same} of {len(texts) * len(served)} are those of Engine.generate")


def print_latency(first: list[float], gaps: list[float]):
    p50, p99 = (sorted(first)[min(len(first) - 1, int(len(first) * part))] for part in (0.5, 0.99))
    print(f"first token      {1e3 * p50:10.0f} ms p50, {1e3 * p99:.0f} ms p99")
    print(f"between parts    {1e3 * statistics.median(gaps):10.0f} ms p50")


def run(config: Config):
    if config.url:
        found = asyncio.run(all_streams(config))
        print_latency(found["first"], [found["gap"]])
        print(json.dumps(found))
        return
    from jaxchat.devices import start_devices

    devices = [*start_devices(config, alone=True).devices.flat][:1]
    compute = Compute.for_backend(config.dtype)
    rows = [("streams", f"{config.streams}, each {config.prompt_tokens} + {config.max_tokens} tokens")]
    cli.print_plan("Serving", [*rows, ("device", devices[0].device_kind)])
    asyncio.run(measure(config, devices, compute))


if __name__ == "__main__":
    cli.main(Config, run)
