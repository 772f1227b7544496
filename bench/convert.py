"""Peak memory and time of every conversion, each in a process of its own: python -m bench.convert --depth=20

A checkpoint of random weights is made first (not measured), with a tokenizer of made-up pieces. Peak memory is the
whole process's high-water mark, Python, jax and torch included; the ratio is to the float32 parameters.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from jaxchat import checkpoint, store
from jaxchat.config import ModelConfig
from jaxchat.model import params as model_params
from jaxchat.model.flops import num_params
from jaxchat.tokenizer import SPECIAL_TOKENS, Tokenizer


def make_checkpoint(config: ModelConfig):
    pieces = [bytes([b]) for b in range(256)] + [bytes([a, b]) for a in range(256) for b in range(256)]
    tokenizer = Tokenizer({piece: i for i, piece in enumerate(pieces[: config.vocab_size - len(SPECIAL_TOKENS)])})
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda s: random.standard_normal(s.shape, dtype=np.float32), model_params.shapes(config))
    checkpoints = store.Checkpoints(checkpoint.run_folder("base", "bench"))
    checkpoints.keep_tokenizer(tokenizer)
    meta = {"stage": "base", "step": 1, "model": config.__dict__, "tokenizer_hash": tokenizer.hash}
    checkpoints.save(1, params=params, optimizer=None, batches=None, meta=meta)
    checkpoints.close()


def measure(*args: str) -> tuple[float, int]:
    """(seconds, peak bytes) of one command."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "launch.convert", *args], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"launch.convert {' '.join(args)} exited {process.returncode}")
    return time.perf_counter() - start, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--vocab", type=int, default=65536)
    flags = parser.parse_args()
    config = ModelConfig.from_depth(flags.depth, sequence_len=2048, vocab_size=flags.vocab)
    size = num_params(config) * 4
    print(f"depth {flags.depth}, vocabulary {flags.vocab:,}: {size / 1e9:.2f} GB of float32 parameters")
    with tempfile.TemporaryDirectory() as base:
        os.environ["JAXCHAT_BASE_DIR"] = base
        if os.fork() == 0:  # so that this process, whose size its children begin with, stays small
            make_checkpoint(config)
            os._exit(0)
        if os.wait()[1]:
            raise SystemExit("the checkpoint could not be made")
        hf, nano = Path(base, "hf"), Path(base, "nanochat")
        for name, *args in (
            ("to hf", "--source=base", "--to=hf", f"--out={hf}"),
            ("from hf", "--from=hf", f"--path={hf}", "--as=base", "--model_tag=a"),
            ("to nanochat", "--source=base", "--model_tag=bench", "--to=nanochat", f"--out={nano}"),
            ("from nanochat", "--from=nanochat", f"--path={nano}", "--as=base", "--model_tag=b"),
        ):
            seconds, peak = measure(*args)
            print(
                f"{name:<14} {seconds:6.1f} s  peak {peak / 1e9:5.2f} GB = {peak / size:.2f} x parameters", flush=True
            )


if __name__ == "__main__":
    main()
