"""Kill launch.speedrun at random moments, and compare its weights bit for bit with an undisturbed run's.

    python -m bench.speedrun_kills --kills=20 --out=DIR

Every second kill (SIGKILL) takes launch.speedrun and all that it started, the others only itself. After each
the same command is given again; the last is left alone. Checked: no step that was done is started again, each
training resumes from the last save or a later one, and the weights of all stages are those of the undisturbed
run. By default the run is the demo with few steps and without its score; --flags gives another. Both runs
need the same number of CPU cores: it changes how sums are rounded. Exit code 1 if anything differs.
"""

import argparse
import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from jaxchat import checkpoint
from jaxchat.config import STAGES
from jaxchat.files import read_json, read_lines
from launch.cli import base_directory

TAG = "demo"
FLAGS = [
    *["--preset=cpu", "--until=sft", "--base=--num_iterations=60 --save_every=5"],
    *[
        "--mid=--num_iterations=120 --save_every=10 --eval_every=40",
        "--sft=--num_iterations=50 --save_every=5",
    ],
]


def start(folder: Path, flags: list[str]) -> subprocess.Popen:
    with (folder / "launches.log").open("a") as log:
        words = [sys.executable, "-m", "launch.speedrun", *flags]
        return subprocess.Popen(
            words, env=os.environ | {"JAXCHAT_BASE_DIR": str(folder)}, stdout=log, stderr=log
        )


def family(pid: int) -> list[int]:
    """A process and all that it has started and that still run."""
    children = [n for file in Path(f"/proc/{pid}/task").glob("*/children") for n in file.read_text().split()]
    return [pid, *(found for child in children for found in family(int(child)))]


def resumes(folder: Path, stage: str) -> list[int | None]:
    """For each start of a stage the step after which it began to train; None: it did not come so far."""
    log = folder / f"demo/speedrun/{TAG}/{stage}.log"
    parts = re.split(r"(?m)^\$ ", log.read_text())[1:] if log.exists() else []
    found = [re.search(r"  resumes +after step ([\d,]+)", part) for part in parts]
    begun = ["  saves " in part for part in parts]  # the plan's last line
    return [
        int(at[1].replace(",", "")) if at else 0 if plan else None
        for at, plan in zip(found, begun, strict=True)
    ]


def seen(folder: Path) -> dict[str, tuple[int, bool, int, int]]:
    """By stage: how often it was started, whether it is done, its last save and its last trained step."""
    home, rows = folder / "demo", {}
    for stage in ("base", "mid", "sft"):
        run = home / STAGES[stage].folder / TAG
        saved = max(checkpoint.steps_in(run), default=0)
        trained = max((row["step"] for row in read_lines(run / "metrics.jsonl")), default=0)
        done = "outputs" in read_json(home / f"speedrun/{TAG}/{stage}.json")
        rows[stage] = len(resumes(folder, stage)), done, saved, trained
    return rows


def kill_at_random(folder: Path, flags: list[str], args) -> list[dict]:
    """Start and kill until all kills are done, then run to the end. -> what was there at each kill"""
    moments, kills = random.Random(args.seed), []
    while len(kills) < args.kills:
        process, wait = start(folder, flags), args.least + (args.most - args.least) * moments.random()
        try:
            code = process.wait(wait)
            print(f"ended with exit code {code} after {len(kills)} kills", flush=True)
            return kills
        except subprocess.TimeoutExpired:
            victims = family(process.pid) if len(kills) % 2 == 0 else [process.pid]
            for pid in victims:  # launch.speedrun first, which would start others again
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
        kills.append(seen(folder))
        at = ", ".join(
            f"{s} {t}{' done' if done else f' (saved {save})'}" for s, (n, done, save, t) in kills[-1].items()
        )
        print(f"kill {len(kills)} of {len(victims)} processes after {wait:.0f} s: {at}", flush=True)
    code = start(folder, flags).wait()
    print(f"left alone: exit code {code}", flush=True)
    return kills


def wrong(folder: Path, kills: list[dict]) -> list[str]:
    """What was started or trained again that need not have been."""
    found, again = [], 0
    for number, at in enumerate(kills, 1):
        for stage, (starts, done, saved, trained) in at.items():
            later = [step for step in resumes(folder, stage)[starts:] if step is not None]
            if done and later:
                found.append(f"kill {number}: {stage} was done and is started again")
            elif later:
                again += max(0, trained - later[0])
                if later[0] < saved:
                    found.append(
                        f"kill {number}: {stage} had saved step {saved} and resumes after {later[0]}"
                    )
    print(f"trained again after the last saves: {again} steps in {len(kills)} kills")
    return found


def weights(folder: Path, stage: str) -> list[np.ndarray]:
    with base_directory(folder / "demo"):
        return [np.asarray(leaf) for leaf in jax.tree.leaves(checkpoint.open_model(stage, TAG).load())]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="number of kills")
    parser.add_argument("--least", type=float, default=2, help="seconds from a start to its kill, at least")
    parser.add_argument("--most", type=float, default=40, help="seconds from a start to its kill, at most")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--out", type=Path, required=True, help="folder for both runs")
    parser.add_argument(
        "--reference", type=Path, help="base directory of an undisturbed run; default: makes one"
    )
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=FLAGS, help="flags of launch.speedrun")
    args = parser.parse_args()
    reference, folder = args.reference or args.out / "undisturbed", args.out / "killed"
    for path in [folder] if args.reference else [folder, reference]:
        path.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    if not args.reference:
        print(
            f"undisturbed: exit code {start(reference, args.flags).wait()}, {time.monotonic() - began:.0f} s",
            flush=True,
        )
    found = wrong(folder, kill_at_random(folder, args.flags, args))
    for stage in ("base", "mid", "sft"):
        pairs = list(zip(weights(reference, stage), weights(folder, stage), strict=True))
        same = all(a.tobytes() == b.tobytes() for a, b in pairs)
        outcome = "equal bit for bit" if same else "DIFFERENT"
        print(f"{stage}: {sum(a.size for a, _ in pairs):,} weights, {outcome}")
        found += [] if same else [f"{stage}'s weights differ"]
    print("\n".join(found) or "nothing is wrong")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
