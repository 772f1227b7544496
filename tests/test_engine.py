"""Generation: the cache against whole forward passes, rows alone against rows together, the tool, sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat.config import Compute, ModelConfig, UserError
from jaxchat.infer import engine as engine_module
from jaxchat.infer.engine import Engine, bucket
from jaxchat.infer.sampling import sample
from jaxchat.model import gpt
from jaxchat.model import params as model_params
from jaxchat.tokenizer import Tokenizer

LENGTH = 96
forward = jax.jit(gpt.forward, static_argnums=(2, 3))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(iter(["the cat and the hat, 12 + 34 = 46. "] * 50), 280)


@pytest.fixture(scope="module")
def engine(tokenizer):
    """A model with random weights: it babbles, and now and then emits special tokens."""
    config = ModelConfig(LENGTH, tokenizer.vocab_size, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)
    leaves, tree = jax.tree.flatten(model_params.shapes(config))
    keys = jax.random.split(jax.random.key(5), len(leaves))
    params = jax.tree.unflatten(
        tree, [0.4 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    )
    return Engine(params, config, tokenizer, Compute(), batch_size=4)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [[tokenizer.bos, *tokenizer.encode(text)] for text in ("the", "the cat and", "12 + 34", "a hat", "x")]


def by_whole_passes(engine, prompt, max_tokens):
    """Greedy decoding without a cache: the whole sequence anew for every token."""
    special = engine.tokenizer.special
    tokens = list(prompt)
    while len(tokens) < min(len(prompt) + max_tokens, LENGTH):
        padded = np.zeros((1, LENGTH), np.int32)
        padded[0, : len(tokens)] = tokens
        logits = forward(engine.params, padded, engine.config, engine.compute)[0, len(tokens) - 1]
        token = int(jnp.argmax(logits))
        if token in (special("<|assistant_end|>"), special("<|bos|>")):
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def test_greedy_is_what_whole_passes_give(engine, prompts):
    for prompt, got in zip(prompts, engine.generate(prompts, max_tokens=30, temperature=0.0), strict=True):
        assert got.tokens == by_whole_passes(engine, prompt, 30)


def test_a_row_does_not_depend_on_its_batch(engine, prompts):
    together = engine.generate(prompts, max_tokens=20, temperature=0.0)
    for prompt, want in zip(prompts, together, strict=True):
        assert engine.generate([prompt], max_tokens=20, temperature=0.0)[0] == want


def test_stream_is_what_generate_gives(engine, prompts):
    for temperature in (0.0, 1.0):
        want = engine.generate(prompts[:1], max_tokens=25, temperature=temperature, seed=3)[0]
        got = list(engine.stream(prompts[0], max_tokens=25, temperature=temperature, seed=3))
        assert got == list(zip(want.tokens, want.forced, strict=True))


def test_samples_differ_and_repeat_by_seed(engine, prompts):
    first = engine.generate(prompts[:1], max_tokens=12, num_samples=4, seed=1)
    assert len({tuple(g.tokens) for g in first}) == 4
    assert engine.generate(prompts[:1], max_tokens=12, num_samples=4, seed=1) == first
    assert engine.generate(prompts[:1], max_tokens=12, num_samples=4, seed=2) != first


def test_limits(engine, prompts):
    for got in engine.generate(prompts, max_tokens=7, temperature=0.0):
        assert len(got.tokens) == 7 or got.finished
    assert [g.tokens for g in engine.generate(prompts, max_tokens=0)] == [[]] * 5
    long = (prompts[0] * LENGTH)[: LENGTH - 3]
    assert len(engine.generate([long], max_tokens=50, temperature=0.0)[0].tokens) <= 3
    full = (prompts[0] * LENGTH)[:LENGTH]
    assert engine.generate([full], max_tokens=50)[0].tokens == []
    with pytest.raises(UserError, match=f"1 to {LENGTH}"):
        engine.generate([(prompts[0] * LENGTH)[: LENGTH + 1]], max_tokens=1)


class Scripted:
    """A forward pass that says a script whatever it reads: token i of row b's script at generated position i."""

    def __init__(self, monkeypatch, scripts, start, vocab):
        table = np.full((len(scripts), LENGTH + 1), scripts[0][-1])
        for b, script in enumerate(scripts):
            table[b, start - 1 : start - 1 + len(script)] = script
        table = jnp.asarray(table)

        def features(params, tokens_BT, config, compute, cache=None):
            position_BT = cache.lengths_B[:, None] + jnp.arange(tokens_BT.shape[1])[None]
            script_BT = jnp.take_along_axis(table[: tokens_BT.shape[0]], jnp.clip(position_BT, 0, LENGTH), axis=1)
            return jax.nn.one_hot(script_BT, vocab), cache.replace(lengths_B=cache.lengths_B + tokens_BT.shape[1])

        monkeypatch.setattr(engine_module, "features", features)
        monkeypatch.setattr(engine_module, "logits", lambda params, x: 10 * x)


def test_tool_results_are_forced(engine, tokenizer, monkeypatch):
    """Row 0 asks for a sum, row 1 for something the calculator refuses, row 2 asks twice, row 3 only closes."""
    special = tokenizer.special
    open_, close, end = special("<|python_start|>"), special("<|python_end|>"), special("<|assistant_end|>")
    out, out_end = special("<|output_start|>"), special("<|output_end|>")
    result = [out, *tokenizer.encode("46"), out_end]
    sum_ = [open_, *tokenizer.encode("12+34"), close]
    bad = [open_, *tokenizer.encode("import os"), close]
    # What the model would say while a result is forced is never looked at.
    hidden = [5] * len(result)
    scripts = [
        [*sum_, *hidden, 7, end],
        [*bad, 9, 9, end],
        [*sum_, *hidden, *sum_, *hidden, end],
        [close, 8, end],
    ]
    prompt = [tokenizer.bos, 1, 2, 3]
    monkeypatch.setattr(engine_module, "prefill", engine_module.prefill.__wrapped__)
    monkeypatch.setattr(engine_module, "decode", engine_module.decode.__wrapped__)
    Scripted(monkeypatch, scripts, len(prompt), tokenizer.vocab_size)
    got = engine.generate([prompt] * 4, max_tokens=60, temperature=0.0)
    want = [[*sum_, *result, 7], [*bad, 9, 9], [*sum_, *result, *sum_, *result], [close, 8]]
    assert [g.tokens for g in got] == want
    assert all(g.finished for g in got)
    assert [t for t, f in zip(got[0].tokens, got[0].forced, strict=True) if f] == result
    assert not any(got[1].forced) and sum(got[2].forced) == 2 * len(result)


def test_sampling_frequencies_follow_the_logits():
    """5,000 draws against softmax(logits / T); 5 standard errors of a share are at most 5·√(¼/5000) = 0.036."""
    logits_V = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    rows = jnp.arange(5000)

    def shares(temperature, top_k):
        drawn = sample(
            jnp.tile(logits_V, (5000, 1)), rows, jnp.zeros(5000, jnp.int32), np.uint32(0), temperature,
            greedy=False, top_k=top_k,
        )  # fmt: skip
        return np.bincount(drawn, minlength=4) / 5000

    np.testing.assert_allclose(shares(1.0, None), [0.5, 0.3, 0.15, 0.05], atol=0.036)
    cold = np.array([0.5, 0.3, 0.15, 0.05]) ** 2
    np.testing.assert_allclose(shares(0.5, None), cold / cold.sum(), atol=0.036)
    np.testing.assert_allclose(shares(1.0, 2), [0.625, 0.375, 0, 0], atol=0.036)


def test_buckets():
    assert [bucket(n, 16, 100) for n in (1, 16, 17, 64, 65, 100)] == [16, 16, 32, 64, 100, 100]
