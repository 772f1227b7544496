"""Time decoding beside what the memory allows: python -m bench.decode --depth=12 --batches=1,8,16,64,128

With random weights. A token of a batch has to read all weights but the embedding once, and the keys and
values of every row: the share of that in the time a token takes, at the speed of a large copy, is the MBU
(memory bandwidth utilization) of a device. --rival names another program to time in turn; it takes --depth
--seq --vocab --batch --prompt_tokens --max_tokens, and its last line is a JSON object with tokens_per_s.
"""

import dataclasses
import json
import math
import shlex
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from bench.compare import run as run_rival
from bench.eval import random_params, timed
from bench.step import parse_way
from jaxchat import sharding
from jaxchat.config import Compute, Flags, ModelConfig, UserError, flag
from jaxchat.infer.engine import Engine
from jaxchat.infer.scheduler import MAX_DECODE_STEPS, Request
from jaxchat.model.flops import num_params
from launch import cli


@dataclasses.dataclass(frozen=True)
class Config(Flags):
    """Time the decoding of a random model, whose answers go on to their limit."""

    depth: int = flag(12, 1)
    """Depth of the model."""
    seq: int = flag(2048, 32)
    """Longest context, in tokens."""
    vocab: int = flag(65536, 300)
    """Size of the vocabulary."""
    batches: str = "1,8,16,64,128"
    """Rows decoded at a time, separated by commas."""
    prompt_tokens: int = flag(16, 1)
    """Tokens of each prompt."""
    max_tokens: int = flag(256, 2)
    """Tokens generated after each."""
    temperature: float = flag(1.0, 0.0)
    """Randomness; 0: always the likeliest token."""
    top_k: int = flag(0, 0)
    """Draw from this many likeliest tokens; 0: from all."""
    devices: int = flag(1, 1)
    """Devices that rows are spread over, at most one a row. A CPU is cut into as many: each attends by one
    thread, so one a core is faster for many rows."""
    way: str = ""
    """Fields of Compute that differ from this device's defaults, as in "attention=xla dtype=float32"."""
    rounds: int = flag(3, 1)
    """Times that each batch is measured; the medians are printed."""
    rival: str = ""
    """Command of another program, timed in turn with ours; empty: none."""
    json: bool = False
    """Print a last line of JSON: a list with an object a batch."""


class NoText:
    """A tokenizer whose specials are the last ids: a random model's tokens mean nothing."""

    def __init__(self, vocab: int):
        self._vocab = vocab

    def special(self, name: str) -> int:
        return (
            self._vocab
            - 1
            - ("<|python_end|>", "<|assistant_end|>", "<|bos|>", "<|python_start|>").index(name)
        )

    def decode(self, tokens) -> str:
        return ""


def copy_speed() -> float:
    """Bytes a second that a large copy reads and writes."""
    size = 2**28 if jax.default_backend() == "cpu" else 2**31
    array, double = jnp.ones(size // 4), jax.jit(lambda a: a + 1)
    seconds = [timed(lambda: jax.block_until_ready(double(array)))[1] for _ in range(10)]
    return 2 * size / statistics.median(seconds)


def weight_bytes(model: ModelConfig, compute: Compute) -> int:
    """Bytes of the weights that every token needs: all but the embedding."""
    return (num_params(model) - model.vocab_size * model.n_embd) * jnp.dtype(compute.dtype).itemsize


def row_bytes(model: ModelConfig, compute: Compute, tokens: float) -> float:
    """Bytes of the keys and values of a row that is so long."""
    return 2 * model.n_layer * model.n_kv_head * model.head_dim * tokens * jnp.dtype(compute.dtype).itemsize


def measure(engine: Engine, prompts: list[list[int]], config: Config) -> dict:
    """One batch from its first prompt to its last token: seconds to the first tokens, a token, in all."""
    began, last, first, token_seconds = time.perf_counter(), 0.0, 0.0, []
    for sample, prompt in enumerate(prompts):
        settings = {"temperature": config.temperature, "top_k": config.top_k, "sample": sample}
        engine.submit(Request(prompt, config.max_tokens, ignore_end=True, tool=False, **settings))
    tokens = 0
    while engine.busy:
        events = engine.step(MAX_DECODE_STEPS if first else 1, full_batches=True)
        now = time.perf_counter() - began
        tokens += sum(len(new.tokens) for _, new in events)
        if first:
            token_seconds.append((now - last) / max(len(new.tokens) for _, new in events))
        first, last = first or now, now
    return {"ttft_s": first, "token_s": statistics.median(token_seconds), "tokens_per_s": tokens / last}


def measure_in_turn(config: Config, model: ModelConfig, compute: Compute, params, batch: int) -> dict:
    """Medians of the rounds for one batch, of ours and, in turn with it, of a rival's."""
    devices = min(config.devices, batch)
    compute = dataclasses.replace(compute, mesh=sharding.make_mesh(jax.devices()[:devices]))
    slots = math.ceil(batch / devices)
    engine = Engine(params, model, NoText(model.vocab_size), compute, batch_size=slots)
    shape = (batch, config.prompt_tokens)
    prompts = np.random.default_rng(0).integers(0, model.vocab_size - 9, shape).tolist()
    _, compiled = timed(lambda: measure(engine, prompts, config))
    command = [
        f"--{name}={getattr(config, name)}"
        for name in ("depth", "seq", "vocab", "prompt_tokens", "max_tokens")
    ]
    command = [*shlex.split(config.rival), *command, f"--batch={batch}"]
    ours, rivals = [], []
    for round_ in range(config.rounds):
        for turn in (0, 1) if round_ % 2 else (1, 0):
            if turn == 0:
                ours.append(measure(engine, prompts, config))
            elif config.rival:
                rivals.append(run_rival(command)["tokens_per_s"])
    found = {name: statistics.median(one[name] for one in ours) for name in ours[0]} | {"batch": batch}
    found["first_time_s"] = compiled
    middle = min(config.prompt_tokens + config.max_tokens / 2, model.sequence_len)
    found["read_bytes"] = weight_bytes(model, compute) + slots * row_bytes(model, compute, middle)
    if rivals:
        found["rival_tokens_per_s"] = statistics.median(rivals)
        pairs = zip(ours, rivals, strict=True)
        found["ratio"] = statistics.median(one["tokens_per_s"] / rival for one, rival in pairs)
    return found


def run(config: Config):
    sharding.keep_compiled()
    sharding.take_memory()
    jax.config.update("jax_num_cpu_devices", config.devices)
    if jax.device_count() < config.devices:
        raise UserError(f"--devices={config.devices}: there are {jax.device_count()} here")
    mesh = sharding.make_mesh(jax.devices()[: config.devices])
    model = ModelConfig.from_depth(config.depth, sequence_len=config.seq, vocab_size=config.vocab)
    compute, params = Compute.for_backend(mesh=mesh, **parse_way(config.way)), random_params(model)
    weights, speed = weight_bytes(model, compute), copy_speed()
    floor = f"{weights / 1e9:.2f} GB of weights at {speed / 1e12:.2f} TB/s: "
    floor += f"{1e3 * weights / speed:.2f} ms a token"
    shape = f"{model.n_layer} layers × {model.n_embd}, vocabulary {model.vocab_size:,}, in {compute.dtype}"
    cli.print_plan("Decoding", [("model", shape), ("devices", sharding.describe(mesh)), ("floor", floor)])
    table = []
    for batch in map(int, config.batches.split(",")):
        found = measure_in_turn(config, model, compute, params, batch)
        found["mbu"] = found["read_bytes"] / speed / found["token_s"]
        line = f"batch {batch:>4}  {found['tokens_per_s']:10,.0f} tokens/s, "
        line += f"{1e3 * found['token_s']:.2f} ms a token, "
        line += f"first tokens after {1e3 * found['ttft_s']:.0f} ms, MBU {found['mbu']:.0%}"
        if config.rival:
            line += f"; rival {found['rival_tokens_per_s']:,.0f} tokens/s, ours / rival {found['ratio']:.2f}"
        print(line, flush=True)
        table.append(found)
    if config.json:
        print(json.dumps(table))


if __name__ == "__main__":
    cli.main(Config, run)
