"""--arch=2026 on base_train: its recipe, the horizon's numbers, and a small run by the command."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import model_on

from jaxchat import checkpoint, sharding, store
from jaxchat.config import BaseConfig, ModelConfig, SFTConfig, UserError
from jaxchat.demo import World, write_world
from jaxchat.train import stages
from jaxchat.train.horizon import decay_2026, momentum_2026
from jaxchat.train.optimizer import make_optimizer, table_2026, with_new_schedule
from jaxchat.train.run import initial_state
from jaxchat.train.schedule import lr_multiplier
from jaxchat.train.state import init_state
from launch import base_train, chat_sft, cli, tok_train


def flags(*args) -> BaseConfig:
    return cli.parse(BaseConfig, ["--arch=2026", *args])


def model(depth: int, **changes) -> ModelConfig:
    shape = {"sequence_len": 2048, "vocab_size": 32768, "arch": "2026"}
    return ModelConfig.from_depth(depth, **(shape | changes))


def test_the_recipe_is_what_is_not_given():
    got = flags("--embedding_lr=0.1")
    assert (got.embedding_lr, got.unembedding_lr, got.warmup_steps, got.grad_clip) == (0.1, 0.008, 40, 0.0)
    assert cli.parse(BaseConfig, []) == BaseConfig() and BaseConfig().embedding_lr == 0.2
    assert cli.parse(BaseConfig, ["--arch=2025"]) == BaseConfig()
    with pytest.raises(UserError, match="--total_batch_size=-1 needs --arch=2026"):
        cli.parse(BaseConfig, ["--total_batch_size=-1"])


# The table of spec-2026, 1.6: tokens a step, steps, factor on rates, Muon's decay.
@pytest.mark.parametrize(
    "depth, batch, steps, scale, decay",
    [
        (4, 262_144, 528, 0.7071, 1.890),
        (12, 524_288, 2520, 1.0, 0.280),
        (20, 1_048_576, 4980, 1.4142, 0.1002),
        (24, 1_048_576, 8352, 1.4142, 0.0597),
        (32, 2_097_152, 9600, 2.0, 0.0368),
    ],
)
def test_the_horizon(depth, batch, steps, scale, decay):
    got = stages.horizon_of(flags(), model(depth))
    assert (got.batch, got.steps) == (batch, steps)
    assert (got.lr_scale, got.decay) == (pytest.approx(scale, abs=5e-5), pytest.approx(decay, rel=2e-3))
    assert got.cooldown == round(0.65 * steps)
    speedrun = stages.horizon_of(flags("--target_param_data_ratio=8"), model(24))
    assert (speedrun.batch, speedrun.steps) == (1_048_576, 5568)
    named = dict(got.plan)
    assert f"{batch:,} tokens" in named["batch size"] and "12 tokens for each of" in named["horizon"]
    again = stages.horizon_of(stages.with_horizon(flags(), model(depth)), model(depth))
    assert (again.batch, again.steps) == (batch, steps)


def test_a_horizon_can_be_given():
    assert stages.horizon_of(flags("--num_iterations=7"), model(12)).steps == 7
    flops = stages.horizon_of(flags("--target_flops=1e18"), model(12))
    assert flops.steps == round(1e18 / (7.597e8 * 524288)) and "--target_flops=1e+18" in dict(flops.plan)["horizon"]
    with pytest.raises(UserError, match="less than one step of 524,288 tokens"):
        stages.horizon_of(flags("--target_param_data_ratio=0.001"), model(12))
    with pytest.raises(UserError, match="how long to train"):
        stages.horizon_of(flags("--target_param_data_ratio=-1"), model(12))


def test_schedules():
    """spec-2026, 3.4 to 3.6, of 1,000 steps, 650 of which cool down."""
    n, w = 1000, 650

    def rate(it):
        return float(lr_multiplier(it / n, 1 / n, warmup_ratio=40 / n, warmdown_ratio=w / n, final_lr_frac=0.05))

    assert [rate(it) for it in (0, 19, 39, 40, 350)] == pytest.approx([1 / 40, 0.5, 1, 1, 1])
    assert rate(675) == pytest.approx(0.5 + 0.5 * 0.05) and rate(999) == pytest.approx(1 / w + (1 - 1 / w) * 0.05)
    momentum, decay = momentum_2026(n, w), decay_2026(0.28, n)
    assert [float(momentum(it)) for it in (0, 200, 399)] == pytest.approx([0.85, 0.91, 0.85 + 0.12 * 399 / 400])
    assert [float(momentum(it)) for it in (400, 675, 1000)] == pytest.approx([0.97 - 0.07 * 50 / w, 0.935, 0.90])
    assert [float(decay(it)) for it in (0, 500, 1000)] == pytest.approx([0.28, 0.14, 0.0], abs=1e-6)


def test_tables_are_narrow_where_activations_are():
    base = flags("--max_seq_len=64", "--depth=2")
    assert stages.base_model(base, 300).table_dtype == "float32"  # on a CPU
    narrow = stages.base_model(dataclasses.replace(base, dtype="bfloat16"), 300)
    assert narrow.table_dtype == "bfloat16" and narrow.window_pattern == "SSSL" and narrow.n_embd == 128
    wide = dataclasses.replace(base, dtype="bfloat16", table_dtype="float32")
    assert stages.base_model(wide, 300).table_dtype == "float32"
    assert stages.base_model(BaseConfig(dtype="bfloat16"), 300).table_dtype == "float32"


def test_the_recipe_of_chat_sft():
    """What mid_train did is part of it: the mixture, several times over; the rest of the flags stay as they are."""
    got = cli.parse(SFTConfig, ["--recipe=2026", "--init_lr_frac=0.5"])
    assert got.source == "base" and got.packing == "bestfit" and got.load_optimizer and got.init_lr_frac == 0.5
    tasks = got.train_tasks.split(",")
    assert [tasks.count(name) for name in ("SmolTalk/train", "MMLU/auxiliary_train", "GSM8K/train")] == [1, 3, 4]
    assert cli.parse(SFTConfig, []) == SFTConfig() == cli.parse(SFTConfig, ["--recipe=2025"])


def test_a_step_of_chat_has_as_many_tokens_as_one_of_its_parent(monkeypatch):
    parent = SimpleNamespace(meta={"settings": {"total_batch_size": 100_000}}, tokenizer=None)
    lengths = [100, 300, 5000, 200]  # the third is cut to 1,025
    monkeypatch.setattr(
        stages, "conversation_reader", lambda tasks, tokenizer: lambda rows: [(range(lengths[i]), 1) for i in rows]
    )

    def examples(**flags):
        return stages.examples_of_step(SFTConfig(**flags), parent, lengths, 1024)

    assert examples() == 32
    assert examples(target_examples_per_step=-1) == round(100_000 / 406.25) // 32 * 32
    parent.meta = {"imported": {"meta": {"total_batch_size": 900}}}
    assert examples(target_examples_per_step=-1) == 2


def test_a_warm_start_keeps_the_moments(home):
    """The parent's weights and moments, and Adam's count; Muon's schedules start over."""
    config = ModelConfig(64, 70, 2, 2, 2, 32, layer_scales=True)
    whole, optimizer = model_on(None, config), make_optimizer(config, table=table_2026(config))
    model = dataclasses.replace(
        whole, compute=dataclasses.replace(whole.compute, mesh=sharding.make_mesh(jax.devices()[:1]))
    )
    state = init_state(0, model, optimizer)
    state = jax.tree.map(lambda a: a + jnp.asarray(7, a.dtype), state)
    checkpoints = store.Checkpoints(checkpoint.run_folder("base", "d2"))
    rest = state.rest
    meta = {"stage": "base", "step": 7, "model": dataclasses.asdict(config), "tokenizer_hash": None}
    checkpoints.save(7, params=state.params, optimizer=rest, batches=None, meta=meta)
    checkpoints.close()
    parent = checkpoint.open_model("base", "d2", needs_tokenizer=False)
    assert stages.has_state(parent)
    got = initial_state(SimpleNamespace(parent=parent, warm=True, model=model, optimizer=optimizer))
    want = state.opt_state[1].inner_states
    have = got.opt_state[1].inner_states
    assert int(got.step) == int(got.empty_steps) == 0
    assert int(have["matrix"].inner_state[0].count) == 0 and int(want["matrix"].inner_state[0].count) == 7
    for name, part in have.items():
        same = want[name] if name != "matrix" else with_new_schedule(want[name])
        jax.tree.map(np.testing.assert_array_equal, part, same)
    jax.tree.map(np.testing.assert_array_equal, got.params, state.params)
    cold = initial_state(SimpleNamespace(parent=parent, warm=False, model=model, optimizer=optimizer))
    assert not any(np.any(a) for a in jax.tree.leaves(cold.opt_state))


@pytest.mark.slow
def test_from_base_to_chat_by_the_commands(home, monkeypatch, capsys):
    """chat_sft --recipe=2026 takes a model that --arch=2026 trained, with its moments, in steps of as many tokens."""
    monkeypatch.chdir(home)
    size = {"base_shards": 2, "base_rows": 100, "base_val_rows": 20, "mid_rows": 1, "sft_rows": 200, "val_rows": 20}
    write_world(World(1), home / "world", **size)
    tok_train.main(["--vocab_size=300", "--data_dir=world/base_data"])
    never = ["--eval_every=-1", "--device_batch_size=1"]
    shape = ["--depth=1", "--max_seq_len=128", "--total_batch_size=1024", "--num_iterations=2", "--sample_every=-1"]
    base_train.main(["--arch=2026", "--data_dir=world/base_data", *never, *shape])
    capsys.readouterr()
    tasks = "--train_tasks=world/tasks/world_sft.jsonl,world/tasks/world_sft.jsonl"
    chat_sft.main(["--recipe=2026", "--num_iterations=3", "--eval_metrics_every=-1", tasks, *never])
    assert "continues from the checkpoint's state" in capsys.readouterr().out
    rows = map(json.loads, (home / "chatsft_checkpoints/d1/metrics.jsonl").read_text().splitlines())
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 3 and np.isfinite(losses).all()
