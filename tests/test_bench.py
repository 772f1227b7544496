"""The benchmarks start, run, and print what they say they print; what they measure is not judged here."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT

from bench import scaling
from jaxchat.plan import roofline, topologies
from jaxchat.plan import step as plan_step

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


def test_scaling_compares_computing_with_sending(monkeypatch, capsys):
    """On plans of which nothing is compiled: 60 + 20 ms of computing, 20 of sending for each 8 devices."""

    class Plan:
        batch, accumulated = 4, 2

        def __init__(self, config):
            self.devices = len(topologies.devices_of(config.topology)[0])
            assert config.total_batch_size == 100 * self.devices

        def fit(self, batch):
            return SimpleNamespace(program=None if self.devices == 32 else "compiled", remat="step")

        def bounds(self, done):
            seconds = {"mlp": 0.06, "loss": 0.02, "collectives": 0.02 * self.devices / 8}
            return {name: roofline.Bound(value, "") for name, value in seconds.items()}

    monkeypatch.setattr(plan_step, "StepPlan", Plan)
    monkeypatch.setattr(topologies, "compile_only", lambda: None)
    monkeypatch.setattr(topologies, "devices_of", lambda name: ([None] * int(name.partition(":")[2]), "gpu", 0))
    scaling.run(scaling.Config(topologies="h100:8,h100:16,h100:32", device_tokens=100, json=True))
    *lines, figures = capsys.readouterr().out.splitlines()
    assert [row["efficiency"] for row in json.loads(figures)] == [pytest.approx(0.8), pytest.approx(2 / 3)]
    assert [line.split()[-1] for line in lines[1:]] == ["80%", "67%", "fit"]
