"""Compile time of the training step at several depths: python -m bench.compile --depths=4,8,16,32

The layers are looped over (lax.scan), as they are on TPUs, so depth should hardly matter. Each depth also in
a second process, from the persistent compilation cache: what a second start of a run waits for.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

from bench.step import Shape, prepare
from jaxchat.train.state import abstract_state


def seconds(depth: int) -> tuple[float, float]:
    """Seconds to trace and to compile the step of a model of this depth."""
    shape = Shape(depth=depth, seq=128, batch=2, vocab=1024)
    # From shapes alone: the 20 GB of a model of depth 32 would slow what is timed.
    step, state, batch, _ = prepare(shape, {"unroll": False, "remat": "none"}, shape.batch, abstract_state)
    start = time.perf_counter()
    lowered = step.lower(state, batch, np.float32(1.0))
    traced = time.perf_counter()
    lowered.compile()
    return traced - start, time.perf_counter() - traced


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", default="4,8,16,32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", type=int, default=0, help=argparse.SUPPRESS)  # of a process of our own
    flags = parser.parse_args()
    if flags.one:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        print(*seconds(flags.one))
        return
    depths = [int(depth) for depth in flags.depths.split(",")]
    found = {name: {depth: [] for depth in depths} for name in ("new", "cached")}
    for _ in range(flags.rounds):
        for depth in depths:
            with tempfile.TemporaryDirectory() as cache:
                env = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
                command = [sys.executable, "-m", "bench.compile", f"--one={depth}"]
                for times in found.values():
                    printed = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
                    times[depth].append([float(part) for part in printed.split()[-2:]])
    least = min(statistics.median(sum(t) for t in times) for times in found["new"].values())
    print(f"jax {jax.__version__}; medians of {flags.rounds}")
    for depth in depths:
        trace, compiling = (statistics.median(part) for part in zip(*found["new"][depth], strict=True))
        again = statistics.median(part for _, part in found["cached"][depth])
        total = statistics.median(sum(t) for t in found["new"][depth])
        print(
            f"depth {depth:>3}: tracing {trace:5.2f} s, compiling {compiling:5.2f} s, {total / least:.2f} × the "
            f"least; from the cache {again:.2f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
