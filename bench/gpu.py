"""Measure on a GPU all that waits for one, the most wanted first: python -m bench.gpu --out=FOLDER

Each part is a command of its own, which writes FOLDER/PART.txt; the same line again runs only what is
missing there (delete a part's file to repeat it). The figures are collected in FOLDER/results.json. Parts
that would begin after --minutes are left for the next time. Some ten minutes on an H100; on a CPU try it
with --tiny.
"""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from jaxchat.config import UserError
from launch import cli


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure kernels, decoding, training steps in bfloat16 and float8 beside a rival, and a short run."""

    out: str = "gpu-results"
    """Folder for the parts' output and results.json."""
    rival: str = ""
    """Command that times the rival's step, with the flags of bench.compare; empty: without one."""
    data_dir: str = ""
    """Folder of parquet shards for the real run; empty: without it."""
    minutes: float = 10.0
    """Minutes after which no part begins."""
    parts: str = ""
    """Parts to run, separated by commas; empty: all."""
    tiny: bool = False
    """Small shapes, to see on a CPU that every part runs."""


# What XLA may put into command buffers: its own choice, and loops.
LOOPS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,WHILE,CONDITIONAL"


@dataclasses.dataclass(frozen=True)
class Part:
    """A measurement: a command whose last line may be JSON, and the environment it needs besides."""

    command: str
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


def shape(depth: int, rows: int, tiny: bool) -> str:
    if tiny:
        return "--depth=1 --seq=64 --batch=2 --vocab=512"
    return f"--depth={depth} --seq=2048 --batch={rows} --vocab=65536"


def parts(config: Config) -> dict[str, Part]:
    """All parts by name, in the order they run in."""
    python, tiny = shlex.quote(sys.executable), config.tiny
    d12, d20 = shape(12, 32, tiny), shape(20, 16, tiny)
    batches = "1,4" if tiny else "1,16,64,128"
    steps = "--steps=2 --warmup=1" if tiny else "--steps=8"
    products = "--tokens=64 --widths=32x64 --rounds=2" if tiny else ""

    def decode(depth: int, flags: str = "") -> Part:
        size = f"--depth={depth} --seq=2048"
        if tiny:
            size = "--depth=1 --seq=64 --vocab=512 --max_tokens=8 --rounds=1"
        environment = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}"}
        return Part(f"{python} -m bench.decode {size} --batches={batches} --json", environment)

    # A small share of the memory, since several processes test at a time. Float32 products would be TF32's.
    testing = {
        "JAXCHAT_TEST_PLATFORM": "cpu" if tiny else "cuda",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "XLA_CLIENT_MEM_FRACTION": "0.1",
    }
    ways = '--ways=",matmul=fp8,matmul=fp8-all"'
    answers = "--depth=12 --seq=1024 --vocab=32768 --problems=16 --samples=16 --max_tokens=256 --micro=32"
    if tiny:
        answers = "--depth=1 --seq=64 --vocab=512 --problems=2 --samples=4 --prompt_tokens=8 --max_tokens=8"
    found = {
        "kernels": Part(f"{python} -m pytest -q -n 4 tests/test_gpu.py tests/test_kernels.py", testing),
        "decode_d12": decode(12),
        "decode_d20": decode(20),
        "step_d20_fp8": Part(f"{python} -m bench.step {d20} {steps} {ways} --json"),
        "products": Part(f"{python} -m bench.products {products} --json"),
        "step_d12_2026": Part(f"{python} -m bench.step {d12} {steps} --arch=2026 --json"),  # with its windows
        # The loop over tokens in one command buffer: else the host reads after each whether to go on.
        "decode_d20_loop": decode(20, f"--xla_gpu_enable_command_buffer={LOOPS}"),
        "rl_step_d12": Part(f"{python} -m bench.rl_step {answers} --steps=2 --json"),
    }
    if config.rival:
        for name, size in (("d20", d20), ("d12", d12)):
            compared = f"{python} -m bench.compare {shlex.quote(config.rival)} {size} --rounds=3"
            found[f"step_{name}_rival"] = Part(compared)
    found["profile_d20"] = Part(f"{python} -m bench.profile {d20} --steps=3 --top=5")
    if config.data_dir:
        found |= real_run(config, python)
    return found


def real_run(config: Config, python: str) -> dict[str, Part]:
    """200 steps on real text, of which the last 100 are resumed."""
    base = {"JAXCHAT_BASE_DIR": str(Path(config.out).absolute() / "base_dir")}
    data = f"--data_dir={shlex.quote(str(Path(config.data_dir).absolute()))}"
    size = "--depth=1 --max_seq_len=64 --total_batch_size=512" if config.tiny else "--depth=12"
    steps, vocabulary = (4, 512) if config.tiny else (200, 32768)
    train = f"{python} -m launch.base_train {size} {data} --num_iterations={steps} --eval_tokens=65536"
    train += f" --save_every={steps // 2} --sample_every=-1 --core_metric_every=-1 --model_tag=real"
    stop = f"timeout --signal=INT 240 {train} --overwrite; test $? -le 75"
    return {
        "tokenizer": Part(f"{python} -m launch.tok_train {data} --vocab_size={vocabulary} --overwrite", base),
        "train": Part(stop, base),
        "resume": Part(f"{train} --resume", base),
    }


def measure(name: str, part: Part, folder: Path) -> dict:
    """Run a part and keep its output. -> its exit code, seconds, and figures where its last line is JSON."""
    start = time.perf_counter()
    environment = os.environ | part.environment
    done = subprocess.run(["bash", "-c", part.command], env=environment, capture_output=True, text=True)
    found = {
        "command": part.command,
        "code": done.returncode,
        "seconds": round(time.perf_counter() - start, 1),
    }
    # Written last, since it says that the part is done.
    lines = done.stdout.strip().splitlines()
    if lines and lines[-1].startswith(("{", "[")):
        found["figures"] = json.loads(lines[-1])
    (folder / f"{name}.json").write_text(json.dumps(found))
    (folder / f"{name}.txt").write_text(f"$ {part.command}\n{done.stdout}\n{done.stderr[-4000:]}")
    return found


def run(config: Config):
    chosen, all_parts = [name for name in config.parts.split(",") if name], parts(config)
    if unknown := [name for name in chosen if name not in all_parts]:
        raise UserError(f"--parts={config.parts}: {unknown[0]} is no part; they are {', '.join(all_parts)}")
    folder, start = Path(config.out), time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    results = {}
    for name in chosen or all_parts:
        used = (time.perf_counter() - start) / 60
        if (folder / f"{name}.txt").exists():
            results[name] = json.loads((folder / f"{name}.json").read_text())
            print(f"{name:<16} was done", flush=True)
        elif used > config.minutes:
            print(f"{name:<16} left for the next time: {used:.1f} minutes are used", flush=True)
        else:
            results[name] = found = measure(name, all_parts[name], folder)
            verdict = "ok" if found["code"] == 0 else f"exit code {found['code']}, see {folder / name}.txt"
            print(f"{name:<16} {found['seconds']:7.1f} s  {verdict}", flush=True)
        (folder / "results.json").write_text(json.dumps(results, indent=1))
    print(f"figures in {folder / 'results.json'}, all output in {folder}/*.txt")
    if failed := [name for name, found in results.items() if found["code"]]:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    cli.main(Config, run)
