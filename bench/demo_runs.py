"""Run the demo with several seeds and roundings and tabulate its scores: python -m bench.demo_runs

Whether a prompt is answered right can hang on how sums are rounded, which differs between machines. Computing
another number of rows at a time rounds differently on one machine, so each seed runs once for every
--device_batch_sizes. By default that is 12 runs, about two hours on two cores. Exit code 1 if a run misses a
target.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def demo(seed: int, rows: int, folder: Path) -> dict:
    """Run the demo once under `folder`. -> its exit code, minutes, and score (0 to 1) by kind of prompt."""
    command = [sys.executable, "-m", "launch.demo", f"--seed={seed}", f"--device_batch_size={rows}"]
    start = time.perf_counter()
    with (folder.parent / f"{folder.name}.log").open("w") as log:
        environment = os.environ | {"JAXCHAT_BASE_DIR": str(folder)}
        code = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
    minutes = (time.perf_counter() - start) / 60
    results = list(folder.rglob("world.json"))
    if not results:
        raise SystemExit(f"the demo ended with exit code {code} before it was scored: see {log.name}")
    scores = json.loads(results[0].read_text())["metrics"]
    return {"seed": seed, "rows": rows, "code": code, "minutes": minutes, "scores": scores}


def line(run: dict, width: int) -> str:
    scores = " ".join(f"{100 * score:{width}.1f}" for score in run["scores"].values())
    outcome = "MISS" if run["code"] else "ok"
    return f"{run['seed']:4} {run['rows']:4} {scores}  {run['minutes']:5.1f} min  {outcome}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seeds", default="0,1,2,3,4,5", help="seeds of the world, the weights and the data's order"
    )
    parser.add_argument(
        "--device_batch_sizes", default="2,4", help="rows computed at a time: each rounds differently"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at the same time; more than 1 spoils the minutes"
    )
    parser.add_argument(
        "--out", default="", help="folder to keep the runs and their logs in; default: a temporary one"
    )
    flags = parser.parse_args()
    cases = [(int(s), int(r)) for s in flags.seeds.split(",") for r in flags.device_batch_sizes.split(",")]
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(flags.jobs) as pool:
        out = Path(flags.out or temporary)
        out.mkdir(parents=True, exist_ok=True)
        print(f"{len(cases)} runs of the demo, {flags.jobs} at a time; logs in {out}", flush=True)
        runs = []
        for run in pool.map(lambda case: demo(*case, out / f"seed{case[0]}_rows{case[1]}"), cases):
            kinds = [name.removeprefix("world: ") for name in run["scores"]]
            width = max(map(len, kinds))
            if not runs:
                print(f"seed rows {' '.join(f'{kind:>{width}}' for kind in kinds)}")
            runs.append(run)
            print(line(run, width), flush=True)
    for name, statistic in ("mean", statistics.mean), ("least", min):
        values = [statistic(run["scores"][kind] for run in runs) for kind in runs[0]["scores"]]
        print(f"{name:>9} " + " ".join(f"{100 * value:{width}.1f}" for value in values))
    print(f"median {statistics.median(run['minutes'] for run in runs):.1f} min; every target met in "
          f"{sum(run['code'] == 0 for run in runs)} of {len(runs)} runs")  # fmt: skip
    return int(any(run["code"] for run in runs))


if __name__ == "__main__":
    sys.exit(main())
