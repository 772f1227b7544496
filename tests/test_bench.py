"""The benchmarks start, run, and print what they say they print; what they measure is not judged here."""

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

BENCHES = sorted(path.stem for path in (ROOT / "bench").glob("*.py"))
TINY = ["--depth=1", "--seq=32", "--batch=2", "--vocab=300", "--steps=2"]


@pytest.mark.slow
def test_every_bench_starts():
    """It imports all that it needs, and --help describes it."""
    script = f"""
import runpy, sys
for name in {BENCHES}:
    sys.argv = [name, "--help"]
    try:
        runpy.run_module("bench." + name, run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, name
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") == len(BENCHES)


@pytest.mark.slow
def test_step_beside_a_rival(run_command):
    """bench.compare with bench.step as its own rival: what the rival has to print is what bench.step prints."""
    rival = f"{sys.executable} -m bench.step --json"
    out = run_command("bench.compare", rival, "--rounds=1", *TINY).stdout
    assert "ours / rival, tokens/s: " in out and "ours / rival, memory: " in out


@pytest.mark.slow
def test_decoding_beside_what_the_memory_allows(run_command, tmp_path):
    rival = tmp_path / "rival.py"
    rival.write_text("import sys\nassert '--batch=4' in sys.argv\nprint('{\"tokens_per_s\": 0.5}')")
    tiny = ["--depth=1", "--seq=64", "--vocab=300", "--batches=4", "--max_tokens=8", "--rounds=1", "--json"]
    *_, line, last = run_command("bench.decode", *tiny, f"--rival={sys.executable} {rival}").stdout.splitlines()
    assert re.search("batch +4 .* tokens/s, .* first tokens after .* MBU .*; rival 0 tokens/s, ours / rival", line)
    (found,) = json.loads(last)
    assert found["batch"] == 4 and found["ratio"] == pytest.approx(2 * found["tokens_per_s"])
    assert found["token_s"] > 0 and found["ttft_s"] > 0 and 0 < found["mbu"] < 1
