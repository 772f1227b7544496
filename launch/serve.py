"""Serve a trained model by OpenAI's API, with a page to chat: python -m launch.serve"""

import contextlib
import dataclasses
import importlib.util
import os
import sys
import time

from jaxchat.config import STAGES, Compute, Flags, TrainConfig, UserError, flag
from launch import cli

LIBRARIES = ("starlette", "uvicorn", "prometheus_client")


@dataclasses.dataclass(frozen=True)
class Config(Flags):
    """Serve one or several stages of a model over HTTP: OpenAI's API under /v1, a page to chat under /.

    Many requests are answered at a time. SIGTERM or Ctrl-C lets the answers that have begun finish; a second
    one ends them.
    """

    source: str = flag("sft", alias="-i")
    """Stages to serve, separated by commas, as in base,sft; requests choose by model, and the first is the
    default. A base model only continues text."""
    model_tag: str = flag("", alias="-g")
    """Tag of the model; empty: the deepest d<N>, or else the newest."""
    step: int = flag(-1, 0, special=-1, alias="-s")
    """Step of the checkpoint, of a single stage; -1: the last."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0: all addresses of this machine."""
    port: int = flag(8000, 0, 65535)
    """Port to listen on; 0: any that is free."""
    api_key: str = ""
    """Keys that clients may use, separated by commas; empty: $JAXCHAT_API_KEY, or else none is needed. The
    page and /health need none."""
    cors_origins: str = ""
    """Origins of other sites' pages that may use the server, separated by commas, as in
    https://chat.example.com; *: all. Their hosts are also accepted as names of this server."""
    slots: int = flag(-1, 1, special=-1)
    """Answers that a device generates at a time for each model; -1: 8 on a CPU, 64 elsewhere. Each holds
    memory for a whole context."""
    max_waiting: int = flag(256, 0)
    """Answers that may wait for a slot; more are refused with status 429."""
    max_tokens: int = flag(-1, 1, special=-1)
    """Largest number of tokens in a chat's answer whose request has no max_tokens; -1: what the context
    leaves."""
    temperature: float = flag(0.6, 0.0, 2.0, alias="-t")
    """Sampling temperature of requests that have none; 0: always the likeliest token."""
    top_k: int = flag(50, 0, 2**31 - 1, special=-1, alias="-k")
    """Number of likeliest tokens to sample from, for requests without top_k; 0 or -1: all."""
    drain: float = flag(30.0, 0)
    """Seconds that running answers get to finish when the server is asked to stop."""
    open_browser: bool = False
    """Open the page in a browser once the model is ready."""
    device_type: str = flag("", choices=("", "cpu", "cuda", "tpu"))
    """Kind of device to compute on: cpu, cuda or tpu; empty: the best one found. With several devices each
    has its own copy of the model."""
    dtype: str = flag("auto", choices=("auto", "float32", "bfloat16"))
    """Number format of the computation: float32 or bfloat16; auto: float32 on a CPU, bfloat16 elsewhere."""


def run(config: Config):
    check_installed()
    stages = stages_of(config)
    import asyncio

    from jaxchat import checkpoint
    from jaxchat.devices import start_devices
    from jaxchat.serve.server import listen

    found = {stage: checkpoint.open_model(stage, config.model_tag, config.step) for stage in stages}
    sock = listen(config.host, config.port)
    mesh = start_devices(TrainConfig(device_type=config.device_type, dtype=config.dtype), alone=True)
    devices = [*mesh.devices.flat]
    address = address_of(config.host, sock.getsockname()[1])
    compute = Compute.for_backend(config.dtype)
    slots = config.slots if config.slots > 0 else 8 if devices[0].platform == "cpu" else 64
    rows = [(name_of(model), str(model.path)) for model in found.values()]
    rows += [
        ("devices", f"{len(devices)} × {devices[0].device_kind}, compute in {compute.dtype}"),
        ("slots", f"{slots} a device and model, {config.max_waiting} more answers may wait"),
        ("address", address),
    ]
    cli.print_plan("Serve " + ", ".join(map(name_of, found.values())), rows)
    if not keys_of(config) and not is_loopback(config.host):
        print(f"warning: everybody who reaches {config.host}:{config.port} can use the model; --api_key=… or "
              "$JAXCHAT_API_KEY asks for a key", file=sys.stderr, flush=True)  # fmt: skip
    asyncio.run(serve(config, found, devices, compute, slots, sock))
    print("stopped", flush=True)


async def serve(config: Config, found: dict, devices: list, compute: Compute, slots: int, sock):
    """Load the models while the server already says so, then answer until it is asked to stop."""
    import asyncio

    from jaxchat.serve import server
    from jaxchat.serve.app import Defaults, Served, Service, make_app
    from jaxchat.serve.guard import Rules
    from jaxchat.serve.loop import Pool, Worker
    from jaxchat.serve.metrics import Metrics

    metrics, models, began = Metrics(), {}, time.perf_counter()
    for stage, model in found.items():
        id = name_of(model)
        workers = [
            Worker(engine_opener(model, device, compute, slots), asyncio.get_running_loop(), metrics, id)
            for device in devices
        ]
        pool = Pool(workers, slots, model.config.sequence_len, config.max_waiting)
        models[id] = Served(
            id=id,
            stage=stage,
            step=model.step,
            created=int(model.path.stat().st_mtime),
            fingerprint=fingerprint(model),
            only_continues=not STAGES[stage].parents,
            config=model.config,
            tokenizer=model.tokenizer,
            pool=pool,
        )
    limit = config.max_tokens if config.max_tokens > 0 else None
    service = Service(models, Defaults(config.temperature, max(0, config.top_k), limit), metrics)
    origins = tuple(filter(None, config.cors_origins.split(",")))
    app = make_app(service, Rules(keys_of(config), origins, is_loopback(config.host)))
    workers = [worker for model in models.values() for worker in model.pool.workers]

    async def load():
        for worker in workers:
            worker.start()
        await asyncio.gather(*(worker.ready for worker in workers))
        address = address_of(config.host, sock.getsockname()[1])
        print(
            f"ready after {time.perf_counter() - began:.1f} s: {address} (page), {address}/v1 (API)",
            flush=True,
        )
        if config.open_browser:
            import webbrowser

            await asyncio.to_thread(webbrowser.open, address)

    try:
        await server.serve(app, service, sock, load(), config.drain, server.stops_by_signal())
    finally:
        for worker in workers:
            worker.stop()
        for worker in workers:
            if worker.is_alive():
                await asyncio.to_thread(worker.join, 10.0)


def engine_opener(model, device, compute: Compute, slots: int):
    """A function that opens the model's engine on a device, with its shapes compiled."""

    @contextlib.contextmanager
    def opened():
        import jax

        from jaxchat.infer.engine import Engine
        from jaxchat.sharding import make_mesh

        context = model.config.sequence_len
        # One length of the cache: a longer one would be compiled while somebody waits.
        options = {"batch_size": slots, "shortest_cache": context}
        with jax.default_device(device):
            params = model.load(make_mesh([device]))
            engine = Engine(params, model.config, model.tokenizer, compute, **options)
            compile_shapes(engine, context)
            yield engine

    return opened


def compile_shapes(engine, context: int):
    """Generate a token in each way that is common, so that nobody waits for a compilation."""
    from jaxchat.infer.scheduler import SHORTEST, bucket

    lengths = {bucket(n, SHORTEST, context) for n in range(1, context + 1)}
    for length in sorted(lengths):
        engine.generate([[0] * min(length, context - 1)], max_tokens=1, temperature=0.0)
    for settings in ({"temperature": 1.0}, {"temperature": 1.0, "top_k": 5}):
        engine.generate([[0]], max_tokens=2, **settings)


def check_installed():
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        how = "make setup EXTRAS=serve, or: pip install -c constraints.txt -e '.[serve]'"
        raise UserError(f"serving needs {', '.join(missing)}; install the extra serve: {how}")


def stages_of(config: Config) -> list[str]:
    stages = config.source.split(",")
    for stage in stages:
        if stage not in STAGES or stages.count(stage) > 1:
            raise UserError(
                f"--source={config.source}; it is one or several of {', '.join(STAGES)}, each once"
            )
    if config.step >= 0 and len(stages) > 1:
        raise UserError(
            f"--step={config.step} is of one stage, and --source={config.source} has {len(stages)}"
        )
    return stages


def name_of(model) -> str:
    """The model's id in requests: d20-sft."""
    return f"{model.tag}-{model.meta['stage']}"


def fingerprint(model) -> str:
    import hashlib
    from importlib.metadata import version

    about = f"{model.meta['stage']} {model.tag} {model.step} {model.meta['tokenizer_hash']}"
    return f"jaxchat-{version('jaxchat')}-{hashlib.sha256(about.encode()).hexdigest()[:8]}"


def keys_of(config: Config) -> tuple[str, ...]:
    keys = config.api_key or os.environ.get("JAXCHAT_API_KEY", "")
    return tuple(key.strip() for key in keys.split(",") if key.strip())


def is_loopback(host: str) -> bool:
    import ipaddress

    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def address_of(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def main(args: list[str] | None = None):
    cli.main(Config, run, args)


if __name__ == "__main__":
    main()
