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
def test_decoding_beside_what_the_memory_allows(run_command, tmp_path):
    rival = tmp_path / "rival.py"
    rival.write_text("import sys\nassert '--batch=4' in sys.argv\nprint('{\"tokens_per_s\": 0.5}')")
    tiny = ["--depth=1", "--seq=64", "--vocab=300", "--batches=4", "--max_tokens=8", "--rounds=1", "--json"]
    *_, line, last = run_command("bench.decode", *tiny, f"--rival={sys.executable} {rival}").stdout.splitlines()
    assert re.search("batch +4 .* tokens/s, .* first tokens after .* MBU .*; rival 0 tokens/s, ours / rival", line)
    (found,) = json.loads(last)
    assert found["batch"] == 4 and found["ratio"] == pytest.approx(2 * found["tokens_per_s"])
    assert found["token_s"] > 0 and found["ttft_s"] > 0 and 0 < found["mbu"] < 1
