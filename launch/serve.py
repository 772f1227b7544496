"""Serve a trained model with an OpenAI-compatible API and a chat page: python -m launch.serve"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import sys
import threading
import time
from collections.abc import Callable

from jaxchat.config import STAGES, Compute, DeviceFlags, UserError, flag, how_to_install
from launch import cli

LIBRARIES = ("starlette", "uvicorn", "prometheus_client")


@dataclasses.dataclass(frozen=True)
class Config(DeviceFlags):
    """Serve one or several stages of a model over HTTP, with OpenAI's API under /v1 and a chat page under /.

    Many requests are answered at the same time; each device has its own copy of the model. After SIGTERM or
    Ctrl-C, running answers may finish within --drain seconds; a second signal ends them.
    """

    source: str = flag("sft", alias="-i")
    """Stages to serve, separated by commas, as in base,sft: any of rl, sft, mid and base. The field `model`
    of a request selects one of them; the default is the first. A base model only continues text."""
    model_tag: str = flag("", alias="-g")
    """Tag of the model; empty: the deepest model tagged d<N>, or else the newest model."""
    step: int = flag(-1, 0, special=-1, alias="-s")
    """Step of the checkpoint, if a single stage is served; -1: the last."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0: all addresses of this machine."""
    port: int = flag(8000, 0, 65535)
    """Port to listen on; 0: any free port."""
    api_key: str = ""
    """API keys that clients may use, separated by commas; empty: the keys in $JAXCHAT_API_KEY. If that is not
    set either, no key is needed. The chat page and /health never need a key."""
    cors_origins: str = ""
    """Origins of other sites whose pages may use the server, separated by commas, as in
    https://chat.example.com (without a path); *: all. Their hosts are also accepted in the Host header."""
    slots: int = flag(-1, 1, special=-1)
    """Number of answers that a device generates at a time for each model; -1: 8 on a CPU, 64 elsewhere. Each
    needs memory for a full context."""
    max_waiting: int = flag(256, 0)
    """Maximum number of answers of a model that wait to be generated; more are refused with status 429."""
    max_tokens: int = flag(-1, 1, special=-1)
    """Maximum number of tokens in an answer to a chat request without max_tokens; -1: as many as fit in the
    context."""
    temperature: float = flag(0.6, 0.0, 2.0, alias="-t")
    """Sampling temperature for requests without temperature; 0: always the likeliest token."""
    top_k: int = flag(50, 0, 2**31 - 1, special=-1, alias="-k")
    """Number of likeliest tokens to sample from, for requests without top_k; 0 or -1: all."""
    drain: float = flag(30.0, 0)
    """Seconds that running answers have to finish when the server is asked to stop."""
    open_browser: bool = False
    """Open the chat page in a browser once the model is ready."""


def run(config: Config):
    check_installed()
    stages, origins = stages_of(config), origins_of(config)
    import asyncio
    import logging

    from jaxchat import checkpoint
    from jaxchat.devices import start_devices
    from jaxchat.serve.guard import is_local
    from jaxchat.serve.server import listen

    first = checkpoint.open_model(stages[0], config.model_tag, config.step)
    found = [first, *(checkpoint.open_model(stage, first.tag) for stage in stages[1:])]
    sock = listen(config.host, config.port)
    devices = [*start_devices(config, alone=True).devices.flat]
    compute, slots = Compute.for_backend(config.dtype), slots_of(config, devices)
    rows = [(name_of(model), str(model.path)) for model in found]
    rows += [
        ("devices", f"{len(devices)} × {devices[0].device_kind}, compute in {compute.dtype}"),
        ("slots", f"{slots} a device and model, {config.max_waiting} more answers may wait"),
        ("shapes", shapes_of(found)),
        ("address", address_of(config.host, sock.getsockname()[1]) + reach_of(config.host)),
    ]
    cli.print_plan("Serve " + ", ".join(map(name_of, found)), rows)
    if not keys_of(config) and not is_local(config.host):
        who = f"everybody who reaches {config.host} can use the model"
        how = "to require a key, give --api_key=… or set $JAXCHAT_API_KEY"
        print(f"warning: {who}; {how}", file=sys.stderr, flush=True)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("jaxchat.serve").setLevel(logging.INFO)
    asyncio.run(serve(config, found, devices, compute, origins, sock))
    print("stopped", flush=True)
    if any(thread.name.startswith("engine of") for thread in threading.enumerate()):
        os._exit(0)  # an engine still compiles, which nothing can interrupt


async def serve(config: Config, found: list, devices: list, compute: Compute, origins: tuple, sock):
    """Serve the checkpoints `found` on the socket `sock` until a signal asks to stop."""
    from jaxchat.serve import server
    from jaxchat.serve.app import make_app
    from jaxchat.serve.guard import Rules, is_local

    service = make_service(config, found, devices, compute)
    app = make_app(service, Rules(keys_of(config), origins, is_local(config.host)))
    loading = load(service, address_of(config.host, sock.getsockname()[1]), config.open_browser)
    try:
        await server.serve(app, service, sock, loading, config.drain, server.stops_by_signal())
    finally:
        await service.close()


async def load(service, address: str, open_browser: bool):
    """Load and compile all models, print `address` and, if `open_browser`, open it in a browser."""
    import asyncio

    began = time.perf_counter()
    sys.setswitchinterval(0.001)  # 1 ms, not 5: engines wait less for the event loop
    with cli.progress(service.progress, 5):
        for worker in service.workers:
            worker.start()
        await asyncio.gather(*(worker.ready for worker in service.workers))
    seconds = time.perf_counter() - began
    print(f"ready after {seconds:.0f} s: {address} (page), {address}/v1 (API)", flush=True)
    if open_browser:
        import webbrowser

        await asyncio.to_thread(webbrowser.open, address)


def make_service(config: Config, found: list, devices: list, compute: Compute):
    """Build the service for the checkpoints `found`.

    Its workers, one per model and device, are not started yet. Must be called in the event loop.
    """
    from jaxchat.serve.loop import Pool, Worker
    from jaxchat.serve.metrics import Metrics
    from jaxchat.serve.service import Defaults, Served, Service

    metrics, models, slots = Metrics(), [], slots_of(config, devices)
    locks = {device: threading.Lock() for device in devices}
    for model in found:
        openers = [engine_opener(model, device, compute, slots, locks[device]) for device in devices]
        workers = [Worker(opener, slots, metrics, name_of(model)) for opener in openers]
        served = Served(
            id=name_of(model),
            stage=model.meta["stage"],
            tag=model.tag,
            step=model.step,
            created=int(model.path.stat().st_mtime),
            fingerprint=fingerprint(model),
            only_continues=not STAGES[model.meta["stage"]].parents,
            config=model.config,
            tokenizer=model.tokenizer,
            pool=Pool(workers, model.config.sequence_len, config.max_waiting),
        )
        models.append(served)
    limit = config.max_tokens if config.max_tokens > 0 else None
    return Service(models, Defaults(config.temperature, max(0, config.top_k), limit), metrics)


def engine_opener(model, device, compute: Compute, slots: int, lock):
    """Return opened(on_progress), a context manager that gives a compiled Engine of the model on `device`.

    slots: number of answers that the engine generates at a time. lock: held while the engine compiles, so
    that models of the same shape compile only once.
    """

    @contextlib.contextmanager
    def opened(on_progress):
        import jax

        from jaxchat.eval.scoring import out_of_memory
        from jaxchat.infer.engine import Engine
        from jaxchat.sharding import make_mesh

        context = model.config.sequence_len
        options = {"batch_size": slots, "few_shapes": True}
        with jax.default_device(device):
            with lock, out_of_memory(f"give fewer than --slots={slots}, or serve fewer stages"):
                params = model.load(make_mesh([device]))
                engine = Engine(params, model.config, model.tokenizer, compute, **options)
                compile_shapes(engine, context, on_progress)
            yield engine

    return opened


def compile_shapes(engine, context: int, on_progress: Callable[[int, int], None]):
    """Compile all programs of the engine in advance. on_progress: called with (number compiled, total)."""
    ways = warmup_settings(context)
    for done, settings in enumerate(ways):
        on_progress(done, len(ways))
        engine.generate(**settings, max_tokens=1)
    on_progress(len(ways), len(ways))


def warmup_settings(context: int) -> list[dict]:
    """Return arguments of Engine.generate, one dict per call, that together use all programs of an engine."""
    from jaxchat.infer.scheduler import SHORTEST, bucket

    lengths = sorted({bucket(n, SHORTEST, context) for n in range(1, context + 1)})
    prompts = [[[0] * min(length, context - 1)] for length in lengths]
    ways = [{"prompts": prompt, "temperature": 0.0} for prompt in prompts]
    ways += [{"prompts": [[0]], "temperature": 1.0, "top_k": top_k} for top_k in (0, 5)]
    return ways + [{"prompts": prompt, "logprobs": 0, "prompt_logprobs": True} for prompt in prompts]


def check_installed():
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"serving needs {', '.join(missing)}: {how_to_install('serve')}")


def stages_of(config: Config) -> list[str]:
    stages = [stage.strip() for stage in config.source.split(",")]
    for stage in stages:
        if stage not in STAGES or stages.count(stage) > 1:
            known = ", ".join(STAGES)
            raise UserError(f"--source={config.source}; it must be one or several of {known}, each once")
    if config.step >= 0 and len(stages) > 1:
        count = len(stages)
        raise UserError(f"--step={config.step} needs a single stage; --source={config.source} has {count}")
    return stages


def shapes_of(found: list) -> str:
    configs = {model.config for model in found}  # models of the same shape compile once
    count = sum(len(warmup_settings(config.sequence_len)) for config in configs)
    return f"{count} a device to compile at the first start; later starts read them from disk"


def slots_of(config: Config, devices: list) -> int:
    return config.slots if config.slots > 0 else 8 if devices[0].platform == "cpu" else 64


def name_of(model) -> str:
    """Return the name by which requests select the model, such as d20-sft."""
    return f"{model.tag}-{model.meta['stage']}"


def fingerprint(model) -> str:
    """Return the `system_fingerprint` of replies: jaxchat's version and a hash of stage, tag, step and
    tokenizer."""
    about = f"{model.meta['stage']} {model.tag} {model.step} {model.meta['tokenizer_hash']}"
    return f"jaxchat-{importlib.metadata.version('jaxchat')}-{hashlib.sha256(about.encode()).hexdigest()[:8]}"


def keys_of(config: Config) -> tuple[str, ...]:
    keys = config.api_key or os.environ.get("JAXCHAT_API_KEY", "")
    return tuple(key.strip() for key in keys.split(",") if key.strip())


def origins_of(config: Config) -> tuple[str, ...]:
    """Return the origins in --cors_origins, in lower case. Raise UserError if an item is not an origin."""
    origins = [origin.strip().lower() for origin in config.cors_origins.split(",") if origin.strip()]
    for origin in origins:
        if origin != "*" and not re.fullmatch(
            r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[^\s/:?#@\[\]]+)(:\d+)?", origin
        ):
            expected = "give scheme://host or scheme://host:port, without a path, or * for all"
            raise UserError(f"--cors_origins={config.cors_origins}: {origin!r} is not an origin; {expected}")
    return tuple(origins)


def address_of(host: str, port: int) -> str:
    """Return the URL of the chat page."""
    host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def reach_of(host: str) -> str:
    return " (it listens on all addresses of this machine)" if host in ("", "0.0.0.0", "::") else ""


main = cli.command(Config, run)

if __name__ == "__main__":
    main()
