"""Generation: the cache against whole forward passes, rows alone against rows together, the tool, sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params

from jaxchat.config import Compute, ModelConfig, UserError
from jaxchat.infer import engine as engine_module
from jaxchat.infer.calculator import calculate
from jaxchat.infer.engine import Engine, bucket
from jaxchat.infer.sampling import sample
from jaxchat.model import gpt
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
    params = random_params(config, seed=5, scale=0.4)
    return Engine(params, config, tokenizer, Compute(attention="blocks"), batch_size=16)


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


def test_64_prompts_say_the_same_alone_together_and_in_any_order(engine, tokenizer, monkeypatch):
    """Token by token, tool calls included: the head is made to like their end, and the tool answers with a number that
    depends on all that was said so far."""
    special = tokenizer.special

    def answer(self, tokens):
        number = str(sum(i * token for i, token in enumerate(tokens)) % 97)
        return [special("<|output_start|>"), *tokenizer.encode(number), special("<|output_end|>")]

    monkeypatch.setattr(Engine, "_tool_result", answer)
    likes = np.array([special("<|python_end|>"), special("<|assistant_end|>")])
    head_DV = engine.params.lm_head.at[:, likes].multiply(2.0)
    eager = Engine(engine.params.replace(lm_head=head_DV), engine.config, tokenizer, engine.compute, batch_size=16)
    random = np.random.default_rng(0)
    asked = [random.integers(0, 250, n).tolist() for n in random.integers(1, 80, 64)]

    def said(order):
        return dict(zip(order, eager.generate([asked[i] for i in order], max_tokens=24, temperature=0.0), strict=True))

    together = said(range(64))
    assert said([*reversed(range(64))]) == together == said(random.permutation(64).tolist())
    for i in range(64):
        assert said([i]) == {i: together[i]}
    forced = [sum(one.forced) for one in together.values()]
    assert sum(map(bool, forced)) >= 10 and max(forced) > 4  # many call the tool, some twice
    assert 5 < sum(one.finished for one in together.values()) < 60 and len({len(p) for p in asked}) > 30


def test_shapes_are_few(engine, prompts):
    """One shape to decode with, and one a length to read prompts in, whatever is asked."""
    before = engine_module.read_prompts._cache_size(), engine_module.decode._cache_size()
    for count, length in ((1, 3), (40, 20), (3, 33), (17, 64), (2, 90), (20, 5)):
        engine.generate([[7] * length] * count, max_tokens=5, temperature=0.0)
    after = engine_module.read_prompts._cache_size(), engine_module.decode._cache_size()
    assert after[0] - before[0] <= len({16, 32, 64, LENGTH}) and after[1] - before[1] <= 1


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
    """A forward pass that says a script whatever it reads: token i of script n at generated position i, where n is the
    second token of the prompt; the cache's first slot holds it."""

    def __init__(self, monkeypatch, scripts, start, vocab):
        table = np.full((len(scripts), LENGTH + 1), scripts[0][-1])
        for n, script in enumerate(scripts):
            table[n, start - 1 : start - 1 + len(script)] = script
        table = jnp.asarray(table)

        def features_cached(params, tokens_BT, cache, config, compute, counts_B):
            time = tokens_BT.shape[1]
            if time > 1:
                k = cache.k_LBSKH.at[0, :, 0, 0, 0].set(tokens_BT[:, 1].astype(cache.k_LBSKH.dtype))
                cache = cache.replace(k_LBSKH=k)
            position_BT = cache.lengths_B[:, None] + jnp.arange(time)[None]
            script_B = cache.k_LBSKH[0, :, 0, 0, 0].astype(jnp.int32)
            script_BT = jnp.take_along_axis(table[script_B], jnp.clip(position_BT, 0, LENGTH), axis=1)
            return jax.nn.one_hot(script_BT, vocab), cache.advance(counts_B)

        monkeypatch.setattr(engine_module, "features_cached", features_cached)
        monkeypatch.setattr(engine_module, "logits", lambda params, x, cap: 10 * x)


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
    monkeypatch.setattr(engine_module, "read_prompts", engine_module.read_prompts.__wrapped__)
    monkeypatch.setattr(engine_module, "decode", engine_module.decode.__wrapped__)
    Scripted(monkeypatch, scripts, 4, tokenizer.vocab_size)
    engine = Engine(engine.params, engine.config, tokenizer, engine.compute, batch_size=4)
    # Eight prompts in four slots: those that wait take the places of those that are done.
    got = engine.generate([[tokenizer.bos, n % 4, 2, 3] for n in range(8)], max_tokens=60, temperature=0.0)
    assert got[4:] == got[:4]
    want = [[*sum_, *result, 7], [*bad, 9, 9], [*sum_, *result, *sum_, *result], [close, 8]]
    assert [g.tokens for g in got[:4]] == want
    assert all(g.finished for g in got)
    assert [t for t, f in zip(got[0].tokens, got[0].forced, strict=True) if f] == result
    assert not any(got[1].forced) and sum(got[2].forced) == 2 * len(result)


def test_a_result_that_is_too_long_is_none(engine, tokenizer):
    """A fraction of a fraction of a fraction has more digits than can be forced at once."""
    special = tokenizer.special

    def result(text):
        return engine._tool_result([special("<|python_start|>"), *tokenizer.encode(text), special("<|python_end|>")])

    assert len(result("1/3")) == len(tokenizer.encode(calculate("1/3"))) + 2
    assert result("1" + "/999999999999999" * 12) == []


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
