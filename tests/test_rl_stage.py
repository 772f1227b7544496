"""The stage of reinforcement learning: answers, weights, resuming, invariances, faults on purpose and wrong input."""

import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
from conftest import ROOT, model_on, random_params, xla_flags

from jaxchat import checkpoint, sharding, store
from jaxchat.config import ModelConfig, RLConfig, UserError
from jaxchat.data.tasks import Mixture, load_task
from jaxchat.infer.engine import Engine
from jaxchat.model.gpt import forward
from jaxchat.rl import batches as rl_batches
from jaxchat.rl.batches import RolloutBatches, arrange, padded_length
from jaxchat.rl.evaluation import measure
from jaxchat.rl.problems import Problems
from jaxchat.rl.rewards import checker_for, combine, parse_reward
from jaxchat.rl.rollout import Rollout
from jaxchat.tokenizer import Tokenizer
from jaxchat.train.loop import place_batch
from jaxchat.train.reporter import Unread
from jaxchat.train.state import state_from_params, state_shardings
from jaxchat.train.step import make_train_step
from launch import chat_rl
from launch.cli import parse

TEXT = "the cat and the hat, 12 + 34 = 46. "
TAG, E, G, LENGTH = "tiny", 4, 6, 64
FLAGS = [f"--examples_per_step={E}", f"--num_samples={G}", "--max_new_tokens=20", "--reward=finished"]
FLAGS += ["--device_batch_size=3", "--train_tasks=problems.jsonl", "--val_tasks=problems.jsonl"]
FLAGS += ["--eval_examples=4", "--eval_others=0", f"--model_tag={TAG}", "--device_type=cpu"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base directory with an "SFT" checkpoint that babbles, calls the tool and stops now and then; 12 problems."""
    folder = tmp_path_factory.mktemp("rl")
    rows = [
        [{"role": "user", "content": f"{n} + 4"}, {"role": "assistant", "content": f"#### {n + 4}"}] for n in range(12)
    ]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = Tokenizer.train(iter([TEXT] * 50), 280)
    config = ModelConfig(LENGTH, tokenizer.vocab_size, n_layer=1, n_head=2, n_kv_head=2, n_embd=32)
    params = random_params(config, seed=5, scale=0.3)
    likes = np.array([tokenizer.special(f"<|{name}_end|>") for name in ("python", "assistant")])
    params = params.replace(lm_head=params.lm_head.at[:, likes].multiply(2.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXCHAT_BASE_DIR", str(folder))
        checkpoints = store.Checkpoints(checkpoint.run_folder("sft", TAG))
        checkpoints.keep_tokenizer(tokenizer)
        meta = {"stage": "sft", "step": 7, "model": dataclasses.asdict(config), "tokenizer_hash": tokenizer.hash}
        checkpoints.save(7, params=params, optimizer=None, batches=None, meta=meta)
        checkpoints.close()
    return folder


@pytest.fixture
def here(made, home, monkeypatch):
    """A copy of it, as base directory and current directory."""
    shutil.copytree(made, home, dirs_exist_ok=True)
    monkeypatch.chdir(home)
    return home


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(
        sharding, "make_mesh", lambda devices=None, axes="": make_mesh(devices or jax.devices()[:1], axes)
    )


@pytest.fixture(autouse=True)
def tool(monkeypatch):
    """A tool that answers every call, whatever was called."""

    def result(engine, tokens):
        special = engine.tokenizer.special
        return [special("<|output_start|>"), *engine.tokenizer.encode("46"), special("<|output_end|>")]

    monkeypatch.setattr(Engine, "_tool_result", result)


def config_of(*flags) -> RLConfig:
    return parse(RLConfig, [*FLAGS, *flags])


def batches_of(*flags, devices=1, axes="") -> tuple[RolloutBatches, object]:
    """-> (the batches, the weights they start from)."""
    config, found = config_of(*flags), checkpoint.open_model("sft", TAG)
    mesh = sharding.make_mesh(jax.devices()[:devices], axes)
    model = model_on(mesh, found.config, attention="blocks")
    tasks = Mixture([load_task(config.train_tasks)])
    return RolloutBatches(config, model, found, tasks), found.load(mesh)


@functools.cache
def sgd_step(model):
    """(SGD, its step): one program for all batches of a shape."""
    optimizer = optax.sgd(1.0)
    return optimizer, make_train_step(model, optimizer)


def stepped(batches: RolloutBatches, batch: dict, params):
    """-> (weights after one step of SGD on a batch, which compares gradients; metrics)."""
    optimizer, step = sgd_step(batches.model)
    state, metrics = step(
        state_from_params(jax.tree.map(jax.numpy.copy, params), batches.model, optimizer),
        place_batch(batch, batches.model.mesh),
        np.float32(1.0),
    )
    return jax.device_get(state.params), jax.device_get(metrics)


def rows_of_metrics(folder):
    lines = (folder / f"chatrl_checkpoints/{TAG}/metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def learnt(folder):
    names = ("step", "reward", "loss", "grad_norm", "answer_tokens")
    return [tuple(row[name] for name in names) for row in rows_of_metrics(folder) if "loss" in row]


def test_the_command_trains_saves_evaluates_and_resumes(here, capsys):
    """End to end; then again, stopped by an error between two updates on the same answers, and resumed: bit for bit."""
    flags = [*FLAGS, "--num_iterations=3", "--updates=2", "--loss=ppo", "--save_every=1", "--eval_every=3"]
    flags += ["--sample_every=2", "--init_lr_frac=0.5"]
    chat_rl.main(flags)
    text = capsys.readouterr().out
    for words in ("Reinforcement learning of tiny", "starts from", "finished × 1", "6, 2 updates"):
        assert words in text, words
    assert text.splitlines()[-1].split("python")[-1].strip().startswith(f"-m launch.chat_cli -i rl --model_tag={TAG}")
    run = here / "chatrl_checkpoints" / TAG
    rows, whole = rows_of_metrics(here), learnt(here)
    assert [row[0] for row in whole] == [1, 2, 3, 4, 5, 6] and len({row[1] for row in whole}) > 1
    assert [row["step"] for row in rows if "pass@8" in row] == [0, 3, 6]
    # The last evaluation follows the last save, at which the best of those before was kept.
    best = max((row for row in rows if "pass@8" in row and row["step"] < 6), key=lambda row: row["val_reward"])["step"]
    assert checkpoint.steps_in(run) == sorted({4, 5, 6} | ({best} if best else set()))
    assert [sample["step"] for sample in map(json.loads, (run / "samples.jsonl").read_text().splitlines())] == [1, 5]

    samples = (run / "samples.jsonl").read_text()
    shutil.rmtree(run)
    score, calls = RolloutBatches._weigh, []

    def fails(batches, params):
        calls.append(1)
        if len(calls) == 4:  # the second update of the second step's answers
            raise RuntimeError("lost")
        return score(batches, params)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RolloutBatches, "_weigh", fails)
        with pytest.raises(RuntimeError, match="lost"):
            chat_rl.main(flags)
    assert checkpoint.steps_in(run)[-1] == 3
    chat_rl.main([*flags, "--resume"])
    assert "resumes         after step 3" in capsys.readouterr().out
    assert learnt(here) == whole and (run / "samples.jsonl").read_text() == samples


@pytest.fixture(scope="module")
def rolled(made):
    """One step's batches, rollout and weights, with tool calls, finished answers and answers that were cut off."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXCHAT_BASE_DIR", str(made))
        patch.chdir(made)

        def result(engine, tokens):
            special = engine.tokenizer.special
            return [special("<|output_start|>"), *engine.tokenizer.encode("46"), special("<|output_end|>")]

        patch.setattr(Engine, "_tool_result", result)
        batches, params = batches_of()
        batch = batches.next_batch(params, 0)
    rollout = batches._rollout
    assert 0 < sum(rollout.finished) < E * G
    return batches, params, batch, rollout


def test_what_is_learnt(rolled):
    """Sampled tokens and the end token; not prompts, not what the tool forced, not what was cut off."""
    batches, _, batch, rollout = rolled
    tokenizer, special = batches.problems.tokenizer, batches.problems.tokenizer.special
    forced = [special("<|output_start|>"), *tokenizer.encode("46"), special("<|output_end|>")]
    calls = 0
    for row, (tokens, sampled, logprobs) in enumerate(
        zip(rollout.tokens, rollout.sampled, rollout.sampler, strict=True)
    ):
        start = tokens.index(special("<|assistant_start|>")) + 1
        want = [False] * start
        while len(want) < len(tokens):
            want.append(True)
            if tokens[len(want) - 1] == special("<|python_end|>"):
                more = min(len(forced), len(tokens) - len(want))
                assert tokens[len(want) : len(want) + more] == forced[:more]
                want += [False] * more
                calls += 1
        assert sampled == want
        ended = tokens[-1] in (special("<|assistant_end|>"), special("<|bos|>"))
        assert rollout.finished[row] == (ended and sampled[-1])
        assert [p != 0 for p in logprobs] == want
    assert calls >= 2
    learnt = {}  # rows of the batch: {their tokens: targets with a weight}
    for inputs, targets, weights in zip(
        *(batch[n].reshape(-1, batch[n].shape[-1]) for n in ("inputs", "targets", "weights")), strict=True
    ):
        learnt[tuple(inputs) + tuple(targets[-1:])] = weights != 0
    for row in np.flatnonzero(np.ptp(rollout.rewards_EG, axis=1).repeat(G) > 0):
        padded = np.zeros(batch["inputs"].shape[-1] + 1, np.int32)
        padded[: len(rollout.tokens[row])] = rollout.tokens[row]
        expected = np.zeros(len(padded) - 1, bool)
        expected[: len(rollout.tokens[row]) - 1] = rollout.sampled[row][1:]
        np.testing.assert_array_equal(learnt[tuple(padded)], expected)
    assert batch["counts"].sum() == 1


def test_the_sampler_and_the_trainer_agree(rolled):
    """log π of the sampled tokens by the engine, by a whole forward pass and by the step: float32's rounding."""
    batches, params, batch, rollout = rolled
    tokens = np.zeros((E * G, LENGTH), np.int32)
    for row, of_row in enumerate(rollout.tokens):
        tokens[row, : len(of_row)] = of_row
    logits = np.float64(forward(params, tokens, batches.model.config, batches.model.compute))
    totals = np.log(np.exp(logits).sum(-1))
    for row, (of_row, sampled) in enumerate(zip(rollout.tokens, rollout.sampled, strict=True)):
        for t in np.flatnonzero(sampled):
            want = logits[row, t - 1, of_row[t]] - totals[row, t - 1]
            assert abs(rollout.sampler[row][t] - want) < 1e-5
    _, metrics = stepped(batches, batch, params)
    assert 0 < metrics["logprob_difference"] < metrics["logprob_difference_max"] < 1e-5
    assert metrics["sampler_kl"] < 1e-9


def assert_same_step(got, want, before):
    """To float32's rounding, of sums in another order. got, want: (weights, metrics)."""
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(got[1][name], want[1][name], rtol=1e-5)

    def compare(got, want, before):
        np.testing.assert_allclose(got - before, want - before, atol=1e-5 * np.abs(want - before).max())

    jax.tree.map(compare, got[0], want[0], jax.device_get(before))


SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in ((1, "", 24), (2, "fsdp=2", 3), (8, "", 1))]


@pytest.mark.parametrize("devices, axes, rows", [(1, "", 1), (8, "data=2,fsdp=2,tensor=2", 1), *SLOW])
def test_devices_and_micro_batches_change_nothing(rolled, devices, axes, rows):
    """The same rollout, cut another way, also with weights that are cut. Its normaliser is of the whole step."""
    batches, params, batch, rollout = rolled
    mesh = sharding.make_mesh(jax.devices()[:devices], axes)
    model = model_on(mesh, batches.model.config, attention="blocks")
    other = RolloutBatches(
        dataclasses.replace(batches.config, device_batch_size=rows), model, batches.parent, batches.problems.tasks
    )
    other._rollout = rollout
    weights_RT, _ = other._weigh(params)
    cut = arrange(rollout, weights_RT, other._shape(), model)
    rows *= sharding.data_shards(mesh)
    assert cut["inputs"].shape[:2] == (-(-E * G // rows), rows)
    placed = jax.device_put(params, state_shardings(model, sgd_step(model)[0]).params)
    assert_same_step(stepped(other, cut, placed), stepped(batches, batch, params), params)


def test_the_order_of_rows_changes_nothing(rolled):
    """Problems in another order, and the answers to each."""
    batches, params, batch, rollout = rolled
    random = np.random.default_rng(0)
    groups, answers = random.permutation(E), [random.permutation(G) for _ in range(E)]
    rows = [e * G + g for e in groups for g in answers[e]]
    assert rows != sorted(rows)
    other = Rollout(*[[getattr(rollout, n)[r] for r in rows] for n in ("tokens", "tokens", "sampled", "sampler")])
    other.problems, other.finished = [rollout.problems[e] for e in groups], [rollout.finished[r] for r in rows]
    other.rewards = [[rollout.rewards[e][g] for g in answers[e]] for e in groups]
    moved = arrange(other, weights_of(rolled, other), batches._shape(), batches.model)
    assert not np.array_equal(moved["inputs"], batch["inputs"])
    assert_same_step(stepped(batches, moved, params), stepped(batches, batch, params), params)


def test_answers_do_not_depend_on_devices(rolled, here):
    """Nor on how the weights are cut: each device samples with whole ones."""
    batches, _, _, rollout = rolled
    other, params = batches_of(devices=2, axes="tensor=2")
    params = jax.device_put(params, state_shardings(other.model, sgd_step(other.model)[0]).params)
    other.next_batch(params, 0)
    assert (other._rollout.tokens, other._rollout.sampled) == (rollout.tokens, rollout.sampled)


def weights_of(rolled, rollout, **changes):
    batches, params, *_ = rolled
    other = RolloutBatches(
        dataclasses.replace(batches.config, **changes), batches.model, batches.parent, batches.problems.tasks
    )
    other._rollout = rollout
    return other._weigh(params)[0]


def test_a_constant_added_to_all_rewards_changes_nothing(rolled):
    rollout = rolled[-1]
    more = dataclasses.replace(rollout, rewards=[[r + 1 for r in group] for group in rollout.rewards])
    np.testing.assert_allclose(weights_of(rolled, more), weights_of(rolled, rollout), rtol=1e-14, atol=1e-17)


def test_a_group_of_equal_rewards_changes_nothing_bit_for_bit(rolled):
    batches, params, _, rollout = rolled
    mixed = [e for e, group in enumerate(rollout.rewards) if len(set(group)) > 1]
    rewards = [[1.0] * G if e == mixed[0] else group for e, group in enumerate(rollout.rewards)]
    alike = dataclasses.replace(rollout, rewards=rewards)
    rows = [e * G + g for e in range(E) if e != mixed[0] for g in range(G)]
    without = Rollout(
        *[[getattr(rollout, name)[r] for r in rows] for name in ("tokens", "tokens", "sampled", "sampler")]
    )
    without.problems, without.finished = rollout.problems[: E - 1], [rollout.finished[r] for r in rows]
    without.rewards = [group for e, group in enumerate(rollout.rewards) if e != mixed[0]]
    made = [arrange(one, weights_of(rolled, one), batches._shape(), batches.model) for one in (alike, without)]
    for name in ("inputs", "targets", "weights", "sampler"):
        np.testing.assert_array_equal(made[0][name], made[1][name])


def test_a_step_with_too_few_mixed_groups_changes_nothing_bit_for_bit(rolled):
    batches, params, _, rollout = rolled
    rollout = dataclasses.replace(rollout, rewards=[[1.0] * G, *rollout.rewards[1:]])
    weights_RT = weights_of(rolled, rollout, min_groups=E)
    assert not weights_RT.any()
    after, metrics = stepped(batches, arrange(rollout, weights_RT, batches._shape(), batches.model), params)
    assert metrics["empty_steps"] == 1 and metrics["loss"] == 0
    jax.tree.map(np.testing.assert_array_equal, after, jax.device_get(params))


def test_answers_that_were_cut_off_are_masked_on_request(rolled):
    rollout = rolled[-1]
    weights_RT = weights_of(rolled, rollout, mask_truncated=True)
    plain_RT = weights_of(rolled, rollout)
    finished = np.array(rollout.finished)
    assert plain_RT[~finished].any() and not weights_RT[~finished].any() and weights_RT[finished].any()
    scale = weights_RT[finished][plain_RT[finished] != 0] / plain_RT[finished][plain_RT[finished] != 0]
    assert np.ptp(scale) < 1e-9 and scale[0] > 1  # the same advantages over fewer tokens


def test_kl_and_tis_and_several_updates(rolled):
    """At the start π = π_ref = π_old, so KL's weights are rounding, ratios 1, and TIS's factors 1."""
    rollout, plain = rolled[-1], weights_of(rolled, rolled[-1])
    for changes in ({"kl_coef": 1.0}, {"tis": 2.0}, {"loss": "ppo", "updates": 2}, {"loss": "cispo", "updates": 2}):
        found = weights_of(rolled, dataclasses.replace(rollout, old=None), **changes)
        np.testing.assert_allclose(found, plain, atol=2e-5 * np.abs(plain).max(), err_msg=str(changes))


def test_the_weights_are_those_of_now(rolled, here):
    """Stale weights in the engine: the second step's answers are those of the weights that it is given."""
    batches, params = batches_of()
    batches.next_batch(params, 0)
    moved = jax.tree.map(lambda a: a + 0.05, params)
    batches.next_batch(moved, 1)
    fresh, _ = batches_of()
    fresh._drawn = E
    fresh.next_batch(moved, 1)
    assert fresh._rollout.tokens == batches._rollout.tokens
    fresh._drawn = E
    fresh.next_batch(params, 1)
    assert fresh._rollout.tokens != batches._rollout.tokens


def test_the_same_problems_are_answered_anew_in_another_step(here):
    batches, params = batches_of()
    answers = []
    for step in (0, 1):
        batches.set_state({"drawn": 0, "rollout": None})
        batches.next_batch(params, step)
        answers.append(batches._rollout.tokens)
    assert answers[0] != answers[1]


def test_top_k_and_temperature_reach_the_sampler(here):
    """With top_k=1 all answers to a problem are the greedy one; a cold one is close to it."""
    for flag in ("--top_k=1", "--temperature=0.001"):
        batches, params = batches_of(flag)
        batches.next_batch(params, 0)
        tokens = batches._rollout.tokens
        assert all(tokens[r] == tokens[r // G * G] for r in range(E * G)), flag
        assert any("another distribution" in value for _, value in batches.plan)


def test_the_evaluation_is_of_the_weights_and_settings_of_now(here):
    """Not of those that the engine had for the answers before; with top_k=1 all answers to a problem are one."""

    def values(batches, params):
        stage = SimpleNamespace(batches=batches, model=batches.model, parent=batches.parent)
        return measure(params, stage, batches.config, {"": (batches.problems, E)})

    batches, params = batches_of()
    batches.next_batch(params, 0)
    moved = jax.tree.map(lambda a: a + 0.05, params)
    found = values(batches, moved)
    fresh, _ = batches_of()
    assert found == values(fresh, moved) and found["kl"] != 0
    assert found["val_finished"] * E % 1 and values(fresh, params)["kl"] == 0
    alike, _ = batches_of("--top_k=1")
    assert values(alike, moved)["val_finished"] * E % 1 == 0


def test_resample_draws_until_enough_groups_are_mixed(here, monkeypatch):
    judge, asked = Problems.judge, []

    def first_alike(problems, chosen, generations):
        answers, right, rewards = judge(problems, chosen, generations)
        asked.append(chosen)
        return answers, right, rewards * 0 if len(asked) == 1 else rewards

    monkeypatch.setattr(Problems, "judge", first_alike)
    folder = here / "chatrl_checkpoints" / TAG
    folder.mkdir(parents=True, exist_ok=True)
    batches, params = batches_of("--resample", "--advantage=batch_std", "--sample_every=1")
    numbers = batches.next_batch(params, 0)["numbers"]
    assert len(asked) > 1 and batches.get_state()["drawn"] == E * len(asked) == numbers["problems_drawn"]
    assert batches._rollout.problems[0] not in asked[0] and len(batches._rollout.problems) == E
    # The advantages that are written are those of the step, without the groups that were left out.
    answers = json.loads((folder / "samples.jsonl").read_text())["answers"]
    rewards = batches._rollout.rewards_EG
    assert [answer["reward"] for answer in answers] == rewards[0].tolist()
    want = (rewards[0] - rewards[0].mean()) / rewards.std()
    np.testing.assert_allclose([answer["advantage"] for answer in answers], want, rtol=1e-4)  # beside std: 1e-6


def test_the_plan_names_the_loss_that_is_used(here):
    plan = dict(batches_of("--loss=gspo", "--loss_norm=constant")[0].plan)
    assert plan["loss"] == "gspo, advantages by mean, divided by rows" and "warning" not in plan
    assert "biased" in dict(batches_of("--updates=2")[0].plan)["warning"]


def test_the_parts_of_the_reward_are_logged(rolled):
    batches, _, batch, rollout = rolled
    start = batches.problems.tokenizer.special("<|assistant_start|>")
    forced = [not all(s[t.index(start) + 1 :]) for t, s in zip(rollout.tokens, rollout.sampled, strict=True)]
    numbers = batch["numbers"]
    assert numbers["finished"] == np.mean(rollout.finished) and numbers["tool"] == np.mean(forced) > 0
    assert numbers["format"] == 0  # the text it babbles has no ####


def test_a_warning_when_nothing_is_learnt_for_long(here, monkeypatch, capsys):
    monkeypatch.setattr(rl_batches, "ALIKE", 2)
    batches, params = batches_of("--reward=answer", "--min_groups=1")
    for step in range(4):
        assert not batches.next_batch(params, step)["weights"].any()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")]
    assert len(lines) == 2 and "for 2 steps" in lines[0] and "easier problems" in lines[0]


def test_rewards():
    assert parse_reward("answer:1, format:0.1") == {"answer": 1.0, "format": 0.1}
    for spec in ("", "answers", "answer:x", "answer,answer", "answer:nan", "answer:-1", "tool:inf"):
        with pytest.raises(UserError, match="--reward="):
            parse_reward(spec)
    terms = {"answer": np.array([[1.0, 0], [0, 0]]), "format": np.array([[1.0, 1], [1, 0]])}
    # In the second group all are wrong: form alone is not rewarded.
    np.testing.assert_array_equal(combine(terms, {"answer": 1.0, "format": 0.5}), [[1.5, 0.5], [0, 0]])
    np.testing.assert_array_equal(combine(terms, {"format": 0.5}), [[0.5, 0.5], [0.5, 0]])
    with pytest.raises(UserError, match="answer 1 to problem 0 of the step is nan; it must be a number"):
        combine({"answer": np.array([[1.0, np.nan]])}, {"answer": 1.0})


def test_checkers_agree_with_evaluation(made, tmp_path, monkeypatch):
    """The same function decides; a file is judged by its numbers if it has any, else by its text."""
    from jaxchat.data.tasks.answers import states_the_number
    from jaxchat.rl.rewards import Answer

    task = load_task(str(made / "problems.jsonl"))
    check, what = checker_for(task)
    assert what == "the number after ####"
    for text in ("#### 4", "#### 4.0", "so #### $4", "4", "#### 5", "#### 4 or 5"):
        assert check(task[0], Answer(text, [("text", text)], True)) == states_the_number(task[0], text)
    monkeypatch.chdir(tmp_path)
    path = Path("GSM8K/texts.ndjson")  # a file is not the task of that name
    path.parent.mkdir()
    tool = [
        {"type": "python", "text": "1+1"},
        {"type": "python_output", "text": "2"},
        {"type": "text", "text": " It is 2."},
    ]
    path.write_text(json.dumps([{"role": "user", "content": "?"}, {"role": "assistant", "content": tool}]) + "\n")
    task = load_task(str(path))
    check, what = checker_for(task)
    assert what == "the text"
    parts = [("python", "1+1"), ("python_output", "2"), ("text", "It is 2.")]
    assert check(task[0], Answer("", parts, True)) and not check(task[0], Answer("", [*parts, ("text", "!")], True))


def test_rows_are_padded_by_little():
    lengths = [padded_length(n, 4096) for n in range(1, 4097)]
    assert all(n <= length for n, length in enumerate(lengths, 1))
    assert max(length / n for n, length in enumerate(lengths, 1) if n >= 256) <= 1.125
    assert len({length for length in lengths if 512 < length <= 1024}) == 8
    assert padded_length(324, 4096) == 352 and padded_length(90, 100) == 96 and padded_length(99, 100) == 100


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--model_tag=none"], "no sft checkpoint named none .*there are: tiny"),
        (
            ["--source=mid"],
            "no mid checkpoint .*train one with: .*python -m launch.mid_train; tiny has checkpoints of: sft",
        ),
        (["--num_samples=1"], "--num_samples=1; it must be at least 2"),
        (["--temperature=0"], "--temperature=0.0; it must be from 0.001 to 100.0"),
        (["--temperature=-1"], "--temperature=-1.0; it must be from 0.001 to 100.0"),
        (["--min_groups=5"], "--min_groups=5 is more than the 4 problems of a step"),
        (["--reward=nice"], "--reward=nice: 'nice' is not a term"),
        (["--train_tasks=talk.jsonl"], "talk.jsonl, row 0 does not end with an answer"),
        (["--train_tasks=identity"], "identity has no checker"),
        (["--val_tasks=none.jsonl"], "no file none.jsonl"),
        (["--num_epochs=0.1"], "--num_epochs=0.1 of 12 problems is less than one step of 4"),
    ],
)
def test_wrong_input(here, flags, words, capsys):
    (here / "talk.jsonl").write_text('[{"role": "user", "content": "hello"}]\n')
    (here / "tasks/identity").mkdir(parents=True)
    (here / "tasks/identity/identity_conversations.jsonl").write_text((here / "problems.jsonl").read_text())
    with pytest.raises(SystemExit) as stop:
        chat_rl.main([*FLAGS, *flags])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1
    assert re.search(words, err), err


def test_problems_that_one_process_cannot_read(here, monkeypatch, capsys):
    """All save the step before and end with one line; the draw of the step is not in what is saved."""
    flags = [*FLAGS, "--num_iterations=2", "--eval_every=-1", "--sample_every=-1"]
    gather, calls = sharding.gather_json, []

    def of_two(value):
        if "unread" in value:
            calls.append(value)
            return [value, {"unread": len(calls) == 2}]
        return gather(value)

    run = here / "chatrl_checkpoints" / TAG
    with monkeypatch.context() as patch:
        patch.setattr(sharding, "gather_json", of_two)
        with pytest.raises(SystemExit, match="2"):
            chat_rl.main(flags)
    out, err = capsys.readouterr()
    assert "step 1 is saved: continue from it with --resume" in out and checkpoint.steps_in(run) == [1]
    assert err == "error: another process can't read its rows of step 2; its own message says why\n"

    def unreadable(tasks, row):
        raise UserError(f"row {row} can't be read")

    monkeypatch.setattr(Mixture, "__getitem__", unreadable)
    with pytest.raises(SystemExit, match="2"):
        chat_rl.main([*flags, "--resume"])
    assert re.fullmatch("error: row [0-9]+ can't be read\n", capsys.readouterr().err)
    batches, params = batches_of()
    with pytest.raises(Unread):
        batches.next_batch(params, 0)
    assert batches.get_state()["drawn"] == 0


def evaluated(*flags):
    """Run the command. -> the rows of its first and last evaluation."""
    chat_rl.main([*FLAGS, "--eval_every=1000", "--min_groups=1", "--init_lr_frac=1.0", "--sample_every=-1", *flags])
    rows = [row for row in rows_of_metrics(Path.cwd()) if "evaluation" in row]
    return rows[0], rows[-1]


@pytest.mark.slow
def test_stopping_by_itself_is_learnt(here):
    first, last = evaluated("--num_iterations=24")
    assert first["val_finished"] < 0.3 and last["val_finished"] > 0.95
    assert last["kl"] > 0.1 > abs(first["kl"])


@pytest.mark.slow
def test_shuffled_rewards_teach_nothing(here, monkeypatch):
    judge, random = Problems.judge, np.random.default_rng(0)

    def shuffled(problems, chosen, generations):
        answers, right, rewards = judge(problems, chosen, generations)
        return answers, right, random.permuted(rewards, axis=1)

    monkeypatch.setattr(Problems, "judge", shuffled)
    first, last = evaluated("--num_iterations=10")
    assert last["val_finished"] < first["val_finished"] + 0.3


@pytest.mark.slow
def test_a_bandit_finds_the_best_arm(here, monkeypatch):
    """As many arms as tokens, of which the second likeliest is right."""
    batches, params = batches_of()
    tokenizer, question = batches.problems.tokenizer, {"role": "user", "content": "which?"}
    prompt = tokenizer.render_for_completion({"messages": [question]})
    [found] = batches.engine(params).generate([prompt], max_tokens=1, temperature=0.0, logprobs=20, ignore_end=True)
    arms, ends = [token for token, _ in found.top[0][:4]], (tokenizer.bos, tokenizer.special("<|assistant_end|>"))
    best = next(token for token in arms[1:] if token not in ends)
    Path("arms.jsonl").write_text(json.dumps([question, {"role": "assistant", "content": "x"}]) + "\n")
    judge = Problems.judge

    def by_token(problems, chosen, generations):
        right = np.array([one.tokens == [best] for one in generations]).reshape(len(chosen), -1)
        return judge(problems, chosen, generations)[0], right, right.astype(float)

    monkeypatch.setattr(Problems, "judge", by_token)
    one = ["--train_tasks=arms.jsonl", "--val_tasks=arms.jsonl", "--reward=answer", "--max_new_tokens=1"]
    first, last = evaluated(*one, "--num_iterations=60", "--init_lr_frac=0.02")
    rewards = [row["reward"] for row in rows_of_metrics(Path.cwd()) if "loss" in row]
    assert first["pass@1"] < 0.1 and last["greedy"] == 1 and np.mean(rewards[-20:]) > 0.6


@pytest.mark.slow
def test_gsm8k_killed_and_resumed(here, shared_data, run_command):
    """On its real rows, with a model that babbles: killed by kill -9, then resumed: bit for bit the undisturbed run."""
    args = ["--train_tasks=GSM8K/train", "--val_tasks=GSM8K/test", f"--tasks_dir={shared_data}", "--num_iterations=10"]
    args = [*FLAGS, *args, "--eval_every=-1", "--save_every=1"]
    run_command("launch.chat_rl", *args)
    run, whole = here / "chatrl_checkpoints" / TAG, learnt(here)
    assert len(whole) == 10
    shutil.rmtree(run)
    env = os.environ | {"XLA_FLAGS": xla_flags(1)}
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.chat_rl", *args], cwd=ROOT, env=env, stdout=subprocess.DEVNULL
    )
    while process.poll() is None and not (run.is_dir() and (checkpoint.steps_in(run) or [0])[-1] >= 3):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -9
    done = run_command("launch.chat_rl", *args, "--resume")
    assert "resumes" in done.stdout and learnt(here) == whole
