"""The plans of the spec's example command lines, and data on which other projects get stuck."""

import collections
import dataclasses
import json
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import model_on

from jaxchat import checkpoint, sharding
from jaxchat.config import BaseConfig, Compute, MidConfig, ModelConfig, SFTConfig, UserError
from jaxchat.data import pipelines
from jaxchat.data.tasks import load_task
from jaxchat.demo import World, write_world
from jaxchat.devices import start_devices
from jaxchat.eval import training
from jaxchat.tokenizer import Tokenizer
from jaxchat.train import stages
from jaxchat.train.loop import place_batch
from jaxchat.train.loss import loss_sums
from jaxchat.train.optimizer import make_optimizer
from jaxchat.train.run import find_start, plan_of
from jaxchat.train.state import init_state
from jaxchat.train.step import make_train_step
from launch import base_train, mid_train
from launch.cli import parse


@pytest.fixture
def one_device(monkeypatch):
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(
        sharding, "make_mesh", lambda devices=None, axes="": make_mesh(devices or jax.devices()[:1], axes)
    )


@pytest.fixture
def large_vocabulary(home):
    """A base directory with a tokenizer of the default size, 65,536, and some text."""
    pieces = [bytes([b]) for b in range(256)] + [bytes([a, b]) for a in range(256) for b in range(255)]
    tokenizer = Tokenizer({piece: rank for rank, piece in enumerate(pieces[: 65536 - 9])})
    tokenizer.save()
    write_world(World(0), home, base_shards=1, base_rows=5, base_val_rows=5, mid_rows=9, sft_rows=1, val_rows=1)
    return tokenizer


def test_plan_of_the_first_example(large_vocabulary, one_device):
    """python -m launch.base_train --depth=12 --target_param_data_ratio=20 --total_batch_size=262144 --sample_every=0"""
    args = ["--depth=12", "--target_param_data_ratio=20", "--total_batch_size=262144", "--sample_every=0"]
    stage = base_train.stage_for(parse(BaseConfig, args))
    plan = dict(plan_of(stage, find_start(stage)))
    # 12 layers of 12·768² and two embeddings of 65,536 × 768.
    parameters = 12 * 12 * 768**2 + 2 * 65536 * 768
    assert parameters == 185_597_952
    flops = 6 * (parameters - 65536 * 768) + 12 * 12 * 768 * 2048
    steps = 20 * parameters // 262144
    assert steps == 14_160
    assert plan["model"] == "12 layers × 768, 6 heads (6 key/value) × 128, vocabulary 65,536"
    assert plan["parameters"] == f"185,597,952; {flops:,} FLOPs a token"
    assert plan["batch"] == "32 rows × 1 device × 4 accumulated = 128 rows × 2048 = 262,144 tokens a step"
    assert plan["steps"] == (
        f"14,160; {14_160 * 262_144:,} tokens; tokens : parameters = 20.00; {14_160 * 262_144 * flops:.3e} FLOPs"
    )
    assert plan["saves"].endswith("base_checkpoints/d12/<step>, every 30 minutes, and at the end")
    assert re.fullmatch("about .* passes over about .* tokens: the data is repeated", plan["epochs"])
    assert "WARNING" not in plan


@pytest.mark.parametrize("steps, effect", [(20, "never reach their peak"), (80, "drop at once"), (400, None)])
def test_a_warmup_that_leaves_no_room(large_vocabulary, one_device, steps, effect):
    """--arch=2026 warms up for 40 steps and cools down in 65 % of all."""
    args = ["--depth=2", "--arch=2026", f"--num_iterations={steps}", "--total_batch_size=65536"]
    stage = base_train.stage_for(parse(BaseConfig, args))
    assert (effect or "") in (warning := dict(stage.plan).get("WARNING", "")) and bool(warning) == bool(effect)


def test_plan_of_the_second_example(large_vocabulary, one_device, home, monkeypatch):
    """python -m launch.mid_train --model_tag d12 --device_batch_size=16 --eval_every=100 --init_lr_frac=0.3"""
    model = ModelConfig.from_depth(12, sequence_len=2048, vocab_size=65536)
    meta = {"stage": "base", "device_batch_size": 32}
    found = checkpoint.Found(home / "base_checkpoints/d12", 14160, meta, model, large_vocabulary)
    monkeypatch.setattr(checkpoint, "open_model", lambda source, tag, step: found if tag == "d12" else None)
    args = ["--model_tag", "d12", "--device_batch_size=16", "--eval_every=100", "--init_lr_frac=0.3"]
    tasks = f"--train_tasks={home / 'tasks/world_mid.jsonl'}"
    config = parse(MidConfig, [*args, tasks])
    assert config.eval_every == 100
    stage = mid_train.stage_for(config)
    plan = dict(plan_of(stage, find_start(stage)))
    assert plan["model"] == "12 layers × 768, 6 heads (6 key/value) × 128, vocabulary 65,536"
    assert plan["parameters"].startswith("185,597,952;")
    assert plan["starts from"] == str(home / "base_checkpoints/d12/14160")
    assert plan["batch"] == "16 rows × 1 device × 16 accumulated = 256 rows × 2048 = 524,288 tokens a step"
    assert plan["learning rates"] == "× 0.3" and plan["steps"].startswith("one pass over the mixture: about ")
    assert "warning" not in plan
    plan = dict(mid_train.stage_for(dataclasses.replace(config, device_batch_size=64)).plan)
    assert plan["warning"] == "--device_batch_size=64 exceeds base training's 32: memory may run out"


@pytest.mark.parametrize(
    "flags, steps",
    [
        ({"num_iterations": 7, "target_flops": 1e18}, 7),
        ({"target_flops": 1e18, "target_param_data_ratio": 20}, None),
        ({"target_param_data_ratio": 20}, 14160),
        ({"target_param_data_ratio": 1}, 708),
    ],
)
def test_the_first_horizon_given_counts(flags, steps):
    model = ModelConfig.from_depth(12, sequence_len=2048, vocab_size=65536)
    flops = 6 * (185_597_952 - 65536 * 768) + 12 * 12 * 768 * 2048
    config = BaseConfig(total_batch_size=262144, **{"target_param_data_ratio": -1.0, **flags})
    assert stages.horizon_of(config, model).steps == (steps or round(1e18 / (flops * 262144)))


@pytest.fixture(scope="module")
def real(shared_data):
    """A tokenizer of some real text, and the real conversations."""
    talk = load_task("SmolTalk/test", shared_data)
    texts = [m["content"] for i in range(200) for m in talk[i]["messages"]]
    return Tokenizer.train(iter(texts), 600), talk


def sft_batches(real, num_examples=800, **how):
    tokenizer, talk = real
    how = {"examples": 4, "micro_rows": 2, "time": 64, "seed": 0} | how
    return pipelines.sft_batches(talk, tokenizer, num_examples=num_examples, **how)


@pytest.mark.slow
def test_short_context_sft_on_real_conversations(real):
    """200 steps at 64 tokens, where most conversations are longer and some have nothing to learn left: never NaN."""
    tokenizer, _ = real
    model = ModelConfig.from_depth(1, sequence_len=64, vocab_size=tokenizer.vocab_size)
    optimizer, mesh = make_optimizer(model), sharding.make_mesh(jax.devices()[:1])
    bundle = model_on(mesh, model)
    step, state = make_train_step(bundle, optimizer), init_state(0, bundle, optimizer)
    losses, empty = [], 0
    batches = sft_batches(real)
    for batch in batches:
        state, metrics = step(state, place_batch(batch, mesh), np.float32(0.02))
        losses.append(float(metrics["loss"]))
        empty += not batch["weights"].any()
    batches.close()
    assert len(losses) == 200 and np.all(np.isfinite(losses))
    assert int(state.empty_steps) == empty
    assert batch["totals"]["cut"].sum() > 600 and batch["totals"]["nothing_supervised"].sum() > 50
    assert np.mean(losses[-20:]) < np.mean(losses[:20])
    assert step._cache_size() == 1


def test_no_conversation_is_dropped_or_seen_twice(real):
    """The rows of one epoch are the cut and padded conversations, each as often as it is in the data."""
    tokenizer, talk = real
    wanted, got = collections.Counter(), collections.Counter()
    for i in range(len(talk)):
        ids, mask = (np.array(part[:65]) for part in tokenizer.render_conversation(talk[i]))
        window, weights = np.zeros(65, np.int32), np.zeros(64, np.float32)
        window[: len(ids)], weights[: len(ids) - 1] = ids, mask[1:]
        wanted[window[:-1].tobytes(), window[1:].tobytes(), weights.tobytes()] += 1
    batches = sft_batches(real, num_examples=len(talk) - len(talk) % 4)
    for batch in batches:
        for row in zip(*(batch[name].reshape(-1, 64) for name in ("inputs", "targets", "weights")), strict=True):
            got[tuple(array.tobytes() for array in row)] += 1
    batches.close()
    assert got.total() == len(talk) - len(talk) % 4 and (wanted - got).total() == len(talk) % 4
    assert not got - wanted


@pytest.mark.parametrize("attention", [pytest.param("xla", marks=pytest.mark.slow), "blocks"])
def test_packed_conversations_cost_what_they_cost_alone(real, attention):
    """Loss and gradients of a step packed, with random weights everywhere, are those of one conversation a row."""
    tokenizer, _ = real
    model = ModelConfig.from_depth(1, sequence_len=512, vocab_size=tokenizer.vocab_size)
    shapes = init_state(0, model_on(sharding.make_mesh(jax.devices()[:1]), model), make_optimizer(model)).params
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda a: np.float32(0.1) * random.standard_normal(a.shape, np.float32), shapes)
    sums = jax.jit(jax.value_and_grad(lambda p, b: loss_sums(p, b, model, Compute(attention=attention))[0]))

    def step(packing):
        batches = sft_batches(real, 16, examples=16, micro_rows=1, time=512, packing=packing)
        (batch,) = batches
        batches.close()
        return {f"{k}_BT": a.reshape(-1, a.shape[-1]) for k, a in batch.items() if k != "totals"}

    padded, packed = step("padded"), step("bestfit")
    assert packed["inputs_BT"].size < padded["inputs_BT"].size
    (nll, grads), (packed_nll, packed_grads) = sums(params, padded), sums(params, packed)
    # Sums in another order, rotary angles at other positions: float32 rounding; 1.2e-7 and 1.5e-6 were the most.
    np.testing.assert_allclose(packed_nll, nll, rtol=1e-6)
    for got, want in zip(jax.tree.leaves(packed_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(got, want, atol=5e-6 * float(np.abs(want).max()))
    seen, _ = sums(params, {name: a for name, a in packed.items() if name != "segments_BT"})
    assert abs(float(seen / nll) - 1) > 1e-4, "without segments they see one another"


@pytest.mark.parametrize("packing", ["padded", "bestfit"])
def test_a_step_that_devices_cannot_share_is_filled_with_empty_rows(real, packing):
    """4 conversations a step on 6 devices: the same conversations as without the rows beside them."""

    def supervised(micro_rows):
        batches = sft_batches(real, 12, micro_rows=micro_rows, time=512, packing=packing)
        steps = [(b["inputs"].shape[1], sorted(b["targets"][b["weights"] > 0].tolist())) for b in batches]
        batches.close()
        return zip(*steps, strict=True)

    (rows, filled), (_, alone) = supervised(6), supervised(1)
    assert rows == (6, 6, 6) and filled == alone and len(alone) == 3


def test_validation_depends_on_no_other_flag(home):
    """Neither seed nor device batch changes what is measured; only their own sizes do."""
    talk = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": ""}]
    rows = [[talk[0], talk[1] | {"content": f"answer {i}"}] for i in range(60)]
    (home / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = Tokenizer.train(iter(["a question and an answer 0123456789"]), 275)
    model = model_on(sharding.make_mesh(jax.devices()[:1]), ModelConfig())

    def supervised(config, device_batch):
        stage = SimpleNamespace(device_batch=device_batch, model=model, tokenizer=tokenizer, row_length=64)
        make = training.mid if isinstance(config, MidConfig) else training.sft
        batches = make(config, stage)[0].measure.keywords["batches"]
        return sorted(int(t) for b in batches for t in b["targets"][b["weights"] > 0])

    val = {"val_tasks": str(home / "val.jsonl"), "eval_metrics_every": -1}
    few, more = SFTConfig(eval_steps=5, **val), SFTConfig(eval_steps=6, **val)
    assert supervised(few, 4) == supervised(dataclasses.replace(few, seed=1), 3) != supervised(more, 4)
    mid = MidConfig(eval_tokens=500, val_tasks=val["val_tasks"])
    assert supervised(mid, 4) == supervised(dataclasses.replace(mid, seed=1), 3)


def test_float32_is_float32_on_every_device():
    """Products of float32 numbers would be TF32's on GPUs, bfloat16's on TPUs."""
    for dtype, precision in (("float32", "highest"), ("bfloat16", None), ("auto", None)):
        start_devices(BaseConfig(dtype=dtype))
        assert jax.config.jax_default_matmul_precision == precision


def test_packings_by_name(real):
    with pytest.raises(UserError, match="--packing=stream; it is padded or bestfit"):
        sft_batches(real, packing="stream")
