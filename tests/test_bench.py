"""The benchmarks run and tell what they say they tell; what they measure is not judged here."""

import json
import re
import sys

import pytest

TINY = ["--depth=1", "--seq=32", "--batch=2", "--vocab=300", "--steps=2"]


@pytest.mark.slow
def test_step_tells_what_the_rival_tells(run_command):
    told = json.loads(run_command("bench.step", *TINY, "--json", "--stage=sft").stdout.splitlines()[-1])
    fields = (
        "framework device depth seq batch vocab compiled step_s tokens_per_s flops_per_s parameters peak_bytes loss"
    )
    assert list(told) == fields.split()
    assert told["tokens_per_s"] == pytest.approx(64 / told["step_s"], rel=0.01) and 0 < told["loss"] < 10
    both = run_command("bench.step", *TINY, "--ways=unroll=True,unroll=False attention=xla", "--micro_rows=1,2").stdout
    assert both.count("× the first") == 4


@pytest.mark.slow
def test_compare_with_itself(run_command):
    said = run_command("bench.compare", f"{sys.executable} -m bench.step --json", "--rounds=1", *TINY).stdout
    assert "ours / rival, tokens/s: " in said and "ours / rival, memory: " in said


@pytest.mark.slow
def test_profile_finds_every_part(run_command):
    said = run_command("bench.profile", *TINY).stdout
    for part in ("attention, forward", "attention, backward", "mlp, forward", "loss ", "optimizer"):
        assert part in said


@pytest.mark.slow
def test_loop_tells_what_it_adds(run_command, shared_data):
    said = run_command("bench.loop", f"--data_dir={shared_data / 'pretrain'}", *TINY[:-1], "--steps=6").stdout
    assert re.search(r"between two steps \d+\.\d\d ms, \d+\.\d\d% of a step", said)


@pytest.mark.slow
def test_eval_times_core_and_answers(run_command, shared_data):
    tiny = ["--depth=1", "--seq=64", "--vocab=300", "--max_per_task=11", "--prompts=4", "--alone=1", "--max_tokens=4"]
    data = [f"--eval_bundle={shared_data / 'eval_bundle'}", f"--tasks_dir={shared_data}", "--batch_size=4"]
    said = run_command("bench.eval", *tiny, *data).stdout
    assert "all at once / one at a time: " in said and "CORE: 22 tasks, 242 items in " in said
    assert re.search("[12] compilations, 2 lengths", said)


@pytest.mark.slow
def test_decoding_beside_the_floor(run_command):
    tiny = ["--depth=1", "--seq=64", "--vocab=300", "--batches=1,4", "--max_tokens=8"]
    said = run_command("bench.decode", *tiny).stdout
    assert len(re.findall(r"batch +[14] .* tokens/s, .* × the floor", said)) == 2
