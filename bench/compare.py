"""Compare our training step with a rival's, in turn: python -m bench.compare "python rival.py" --depth=4

The rival is a command that takes --depth --seq --batch --vocab --steps and whose last line is a JSON object
with framework, step_s, tokens_per_s and flops_per_s (on a GPU also peak_bytes), as bench/step.py --json
prints it. Each round runs both, each in a process of its own, the first to run changing from round to round;
the ratio is ours over the rival's in tokens/s, the median of the rounds' ratios, with their least and
largest. Memory is the process's high-water mark (on a GPU: what each says its device's peak was).
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile


def run(command: list[str]) -> dict:
    """The JSON object of the last line, with the process's high-water mark as process_bytes."""
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, stdout=out)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        lines = out.read().strip().splitlines()
    if process.returncode or not lines:
        raise SystemExit(f"error: {shlex.join(command)} exited {process.returncode}")
    return json.loads(lines[-1]) | {
        "process_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rival", help="the command, in quotes")
    parser.add_argument(
        "--ours", default=f"{shlex.quote(sys.executable)} -m bench.step --json", help="our command"
    )
    parser.add_argument("--rounds", type=int, default=3)
    for flag, default in (("depth", 4), ("seq", 512), ("batch", 8), ("vocab", 8192), ("steps", 10)):
        parser.add_argument(f"--{flag}", type=int, default=default)
    flags = parser.parse_args()
    shape = [f"--{name}={getattr(flags, name)}" for name in ("depth", "seq", "batch", "vocab", "steps")]
    commands = {"ours": shlex.split(flags.ours) + shape, "rival": shlex.split(flags.rival) + shape}
    ratios, memory = [], []
    print(" ".join(shape))
    for round_ in range(flags.rounds):
        order = list(commands) if round_ % 2 else list(commands)[::-1]
        got = {name: run(commands[name]) for name in order}
        ratios.append(got["ours"]["tokens_per_s"] / got["rival"]["tokens_per_s"])
        field = "process_bytes" if got["ours"]["device"] == "cpu" else "peak_bytes"
        memory.append(got["ours"][field] / got["rival"][field])
        for name in commands:
            shown = got[name]
            print(
                f"  {name:<5} {shown['framework']:<14} {1000 * shown['step_s']:9.1f} ms "
                f"{shown['tokens_per_s']:11,.0f} tokens/s  {shown['flops_per_s'] / 1e12:7.3f} TFLOP/s  "
                f"{shown[field] / 1e9:.2f} GB",
                flush=True,
            )
    for name, values in (("tokens/s", ratios), ("memory", memory)):
        spread = f"{min(values):.2f} to {max(values):.2f}"
        print(f"ours / rival, {name}: {statistics.median(values):.2f} ({spread}, {len(values)} rounds)")


if __name__ == "__main__":
    main()
