"""The benchmarks of reinforcement learning: one case of what it learns, and a step's time beside a rival's."""

import json
import re
import sys

import pytest


@pytest.mark.slow
def test_digits_are_learnt(run_command):
    """By a base model that has read sequences and no conversation; all by the commands."""
    *_, line, last = run_command("bench.rl_learning", "--cases=digits", "--seeds=0", "--json").stdout.splitlines()
    (found,) = json.loads(last)
    assert found["before"] < 0.5 and found["after"] >= 0.9 and found["passed"]
    assert re.match(r"digits +0 +\d+\.\d% +\d+\.\d%  90% to 100% ", line)


@pytest.mark.slow
def test_a_step_beside_a_rival(run_command, tmp_path):
    rival = tmp_path / "rival.py"
    figures = {"step_s": 1.0, "cpu_s": 2.0, "rollout_s": 0.5, "training_s": 0.5, "tokens": 64, "tokens_per_s": 64.0}
    rival.write_text(f"import sys\nassert '--samples=2' in sys.argv\nprint('{json.dumps(figures)}')")
    tiny = ["--depth=1", "--seq=64", "--vocab=300", "--problems=2", "--samples=2", "--prompt_tokens=8"]
    tiny += ["--max_tokens=8", "--micro=2", "--steps=1", "--rounds=1", f"--rival={sys.executable} {rival}"]
    out = run_command("bench.rl_step", *tiny).stdout
    assert re.search(r"^ours +\d+\.\d\d s a step: rollout \d+\.\d\d, training \d+\.\d\d; .* tokens/s; CPU ", out, re.M)
    assert "rival     1.00 s a step: rollout 0.50, training 0.50;    64.0 tokens/s; CPU 2.00 s\n" in out
    assert "ours / rival, tokens/s: " in out and "ours / rival, tokens a CPU second: " in out
