"""Generation: the cache against whole forward passes, rows alone against rows together, the tool, sampling."""

import dataclasses
import gc
import tracemalloc
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LENGTH, THOROUGH

from jaxchat import sharding
from jaxchat.config import Compute, UserError
from jaxchat.eval import chat
from jaxchat.infer import decode as decode_module
from jaxchat.infer import engine as engine_module
from jaxchat.infer.calculator import calculate
from jaxchat.infer.engine import Engine
from jaxchat.infer.scheduler import Request
from jaxchat.model import gpt
from jaxchat.model import params as model_params

COMPUTE = Compute(attention="blocks")
forward = jax.jit(gpt.forward, static_argnums=(2, 3))


@pytest.fixture(scope="module")
def engine(params, config, tokenizer):
    return Engine(params, config, tokenizer, COMPUTE, batch_size=16)


@pytest.fixture(scope="module")
def eager(params, config, tokenizer):
    """The same, with a head that likes the tool's end and the answer's, and a tool that answers with a number
    that depends on all that was said so far."""
    special = tokenizer.special

    class Eager(Engine):
        def _tool_result(self, tokens):
            number = str(sum(i * token for i, token in enumerate(tokens)) % 97)
            return [special("<|output_start|>"), *tokenizer.encode(number), special("<|output_end|>")]

    likes = np.array([special("<|python_end|>"), special("<|assistant_end|>")])
    params = params.replace(lm_head=params.lm_head.at[:, likes].multiply(2.0))

    def make(**changes):
        return Eager(params, config, tokenizer, dataclasses.replace(COMPUTE, **changes), batch_size=16)

    make.params = params
    return make


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [[tokenizer.bos, *tokenizer.encode(text)] for text in ("the", "the cat and", "12 + 34", "a hat", "x")]


def by_whole_passes(params, engine, prompt, max_tokens):
    """Greedy decoding without a cache: the whole sequence anew for every token."""
    special = engine.tokenizer.special
    tokens = list(prompt)
    while len(tokens) < min(len(prompt) + max_tokens, LENGTH):
        padded = np.zeros((1, LENGTH), np.int32)
        padded[0, : len(tokens)] = tokens
        logits = forward(params, padded, engine.config, COMPUTE)[0, len(tokens) - 1]
        token = int(jnp.argmax(logits))
        if token in (special("<|assistant_end|>"), special("<|bos|>")):
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def test_greedy_is_what_whole_passes_give(params, engine, prompts):
    for prompt, got in zip(prompts, engine.generate(prompts, max_tokens=30, temperature=0.0), strict=True):
        assert got.tokens == by_whole_passes(params, engine, prompt, 30)


@pytest.mark.parametrize("rows", [1, 2])
def test_few_rows_on_a_gpu(params, engine, prompts, config, tokenizer, rows):
    """One row has layers of its own there (model/one_row.py), and few get more rows for their products
    (Compute.kernels; here no kernel reads it while decoding). It changes no token."""
    compute = dataclasses.replace(COMPUTE, attention="xla", kernels=True)
    few = Engine(params, config, tokenizer, compute, batch_size=rows)
    for prompt, got in zip(prompts, few.generate(prompts, max_tokens=9, temperature=0.0), strict=True):
        assert got.tokens == by_whole_passes(params, engine, prompt, 9)


def test_a_row_does_not_depend_on_its_batch(engine, prompts):
    together = engine.generate(prompts, max_tokens=20, temperature=0.0)
    for prompt, want in zip(prompts, together, strict=True):
        assert engine.generate([prompt], max_tokens=20, temperature=0.0)[0] == want


def test_64_prompts_say_the_same_alone_together_and_in_any_order(eager):
    """Token by token, tool calls included."""
    engine, random = eager(), np.random.default_rng(0)
    asked = [random.integers(0, 250, n).tolist() for n in random.integers(1, 80, 64)]

    def said(order):
        return dict(zip(order, engine.generate([asked[i] for i in order], max_tokens=24, temperature=0.0), strict=True))

    together = said(range(64))
    assert said([*reversed(range(64))]) == together == said(random.permutation(64).tolist())
    for i in range(64):
        assert said([i]) == {i: together[i]}
    forced = [sum(one.forced) for one in together.values()]
    assert sum(map(bool, forced)) >= 10 and max(forced) > 4  # many call the tool, some twice
    assert 5 < sum(one.finished for one in together.values()) < 60 and len({len(p) for p in asked}) > 30


def random_request(random, i) -> Request:
    return Request(
        prompt=random.integers(0, 250, random.integers(1, 60)).tolist(),
        max_tokens=int(random.integers(1, 30)),
        temperature=float(random.choice([0.0, 0.7, 1.0, 1.5])),
        top_k=int(random.choice([0, 0, 3, 50])),
        top_p=float(random.choice([1.0, 1.0, 0.5, 0.9])),
        min_p=float(random.choice([0.0, 0.0, 0.1])),
        seed=i,
        min_tokens=int(random.choice([0, 0, 5])),
        stop_tokens=[int(token) for token in random.integers(0, 250, random.integers(0, 3))],
        logprobs=2,
    )


def alone(engine, request):
    fields = {name: getattr(request, name) for name in Request.__dataclass_fields__}
    return engine.generate([fields.pop("prompt")], **fields)[0]


def among_others(engine, requests, random):
    """{request's number: Generation} of those not cancelled, with arrivals and cancellations at random times."""
    waiting, numbers, found, ended = [*enumerate(requests)], {}, {}, []
    while waiting or engine.busy:
        for _ in range(random.integers(0, 9)):
            if waiting:
                number, request = waiting.pop(0)
                numbers[engine.submit(request)] = number
        if random.random() < 0.3 and numbers:
            engine.cancel(int(random.choice([*numbers])))
        for id, new in engine.step(int(random.integers(1, 20)), full_batches=bool(random.integers(2))):
            found.setdefault(numbers[id], engine_module.Generation()).extend(new)
            ended += [numbers[id]] if new.finish else []
    assert sorted(ended) == [*range(len(requests))] and engine._scheduler.slot_of == {}
    return {number: one for number, one in found.items() if one.finish != "cancelled"}


def test_what_a_row_says_among_neighbours_that_come_and_go(eager):
    """Settings of all kinds beside each other, cancelled neighbours: tokens and log-probabilities to the bit."""
    engine, random = eager(), np.random.default_rng(1)
    requests = [random_request(random, i) for i in range(64)]
    found = among_others(engine, requests, random)
    assert 40 < len(found) < 64 and any(any(one.forced) for one in found.values())
    for number, one in found.items():
        assert one == alone(engine, requests[number]), requests[number]


@pytest.mark.parametrize("axes", [pytest.param("fsdp=2", marks=pytest.mark.slow), "data=2,fsdp=2"])
def test_several_devices_say_what_one_says(eager, devices, axes):
    """Each decodes rows of its own in a program of its own, with weights that were cut over them: the same bits."""
    mesh = sharding.make_mesh(devices[: 2 * axes.count("2")], axes)
    one, several, random = eager(), eager(mesh=mesh), np.random.default_rng(2)
    several.load(jax.device_put(eager.params, sharding.named(mesh, model_params.specs(one.config))))
    assert several._program.mesh.size == mesh.size
    requests = [random_request(random, i) for i in range(80)]
    found = among_others(several, requests, random)
    assert several._state.cache.k_BKSH[0].sharding.shard_shape(several._state.cache.k_BKSH[0].shape)[0] == 16
    assert several._params.lm_head.sharding.is_fully_replicated
    checked = [number for number in found if number % 4 == 0]
    assert {number: found[number] for number in checked} == {n: alone(one, requests[n]) for n in checked}


@pytest.mark.slow
def test_each_of_8_devices_writes_an_eighth_of_the_answers(eager, devices):
    """As chat_eval writes them; the answers are one device's."""
    one, several, texts = eager(), eager(mesh=sharding.make_mesh(devices)), []
    several.load(jax.device_put(eager.params, sharding.named(several.compute.mesh, model_params.specs(one.config))))
    rows = [{"messages": [{"role": "user", "content": f"{n} + {n % 7}?"}, {"role": "assistant", "content": ""}]}
            for n in range(64)]  # fmt: skip
    admit, written = several._scheduler.admit, Counter()

    def counted(full_batches):
        ids = admit(full_batches)
        written.update(several._scheduler.slot_of[id] // several.batch_size for id in ids)
        return ids

    several._scheduler.admit = counted
    for engine in (one, several):
        texts.append([])
        chat.write_answers(engine, rows, lambda row, text: texts[-1].append((row["messages"][0]["content"], text)),
                           quiet=True, max_tokens=16, temperature=0.0)  # fmt: skip
    assert written == dict.fromkeys(range(8), 8)
    assert sorted(texts[0]) == sorted(texts[1]) and len({text for _, text in texts[0]}) > 30


def test_shapes_are_few(engine, prompts):
    """One shape to decode with and one a length to read prompts in, whatever is asked; few variants of each."""
    before = engine_module.read_prompts._cache_size(), engine_module.decode._cache_size()
    for count, length in ((1, 3), (40, 20), (3, 33), (17, 64), (2, 90), (20, 5)):
        engine.generate([[7] * length] * count, max_tokens=5, temperature=0.0)
    after = engine_module.read_prompts._cache_size(), engine_module.decode._cache_size()
    assert after[0] - before[0] <= len({16, 32, 64, LENGTH}) and after[1] - before[1] <= 1
    for how in (
        {"temperature": 0.0, "top_k": 5}, {"seed": 3}, {"seed": 4, "max_tokens": 9}, {"temperature": 0.3}, {"top_k": 7},
        {"top_k": 8, "top_p": 0.5}, {"min_p": 0.1, "min_tokens": 3}, {"stop_tokens": [4]}, {"ignore_end": True},
    ):  # fmt: skip
        engine.generate(prompts, **({"max_tokens": 3} | how))
    assert engine_module.decode._cache_size() - after[1] <= len({"plain", "filtered"})
    before = engine_module.decode._cache_size()
    for logprobs in (0, 1, 2, 5, 6, 20):
        engine.generate(prompts, max_tokens=3, temperature=0.0, logprobs=logprobs)
    assert engine_module.decode._cache_size() - before <= len({0, 5, 20})


def test_the_cache_is_as_long_as_its_rows_need(params, config, tokenizer, monkeypatch):
    """It grows while rows run, and starts anew when all are done; what they say is what whole passes give."""
    monkeypatch.setattr(engine_module, "SLOT_BLOCK", 16)
    monkeypatch.setattr(engine_module, "SHORTEST_CACHE", 32)
    engine = Engine(params, config, tokenizer, COMPUTE, batch_size=4)
    seen = []
    for length in (3, 20, 90, 3):
        prompt = [length] * length
        if length == 20:
            engine.submit(Request([5], 25))  # still there when the next one needs a longer cache
            engine.step(1)
            id = engine.submit(Request(prompt, 30, temperature=0.0))
            said = engine_module.Generation()
            while engine.busy:
                for event in engine.step():
                    said.extend(event.new) if event.id == id else None
        else:
            (said,) = engine.generate([prompt], max_tokens=5, temperature=0.0)
        assert said.tokens == by_whole_passes(params, engine, prompt, 30 if length == 20 else 5)
        seen.append(engine._state.cache.slots)
    assert seen == [32, 64, 96, 32]


def test_weights_are_replaced(eager, params, engine, prompts):
    other = Engine(eager.params, engine.config, engine.tokenizer, COMPUTE, batch_size=16)
    how = {"max_tokens": 8, "temperature": 0.0}
    want, compiled = engine.generate(prompts, **how), engine_module.decode._cache_size()
    assert other.generate(prompts, **how) != want
    other.load(params)
    assert other.generate(prompts, **how) == want
    assert engine_module.decode._cache_size() == compiled


def test_stream_is_what_generate_gives(engine, prompts):
    for temperature in (0.0, 1.0):
        want = engine.generate(prompts[:1], max_tokens=25, temperature=temperature, seed=3)[0]
        got = list(engine.stream(prompts[0], max_tokens=25, temperature=temperature, seed=3))
        assert got == list(zip(want.tokens, want.forced, strict=True))


def test_a_stream_that_is_closed_frees_its_slot(engine, prompts):
    stream = engine.stream(prompts[0], max_tokens=50, ignore_end=True)
    next(stream)
    with pytest.raises(RuntimeError, match="other requests"):
        engine.generate(prompts, max_tokens=1)
    stream.close()
    assert not engine.busy and engine.generate(prompts, max_tokens=1)


@pytest.mark.parametrize("where", ["empty_state", "read_prompts", "decode"])
def test_ctrl_c_at_any_moment_leaves_an_engine_that_works(params, config, tokenizer, prompts, monkeypatch, where):
    """Python raises KeyboardInterrupt when a call returns, before its result is stored."""
    wanted = Engine(params, config, tokenizer, COMPUTE, batch_size=1).generate(prompts[:1], max_tokens=9)
    engine, whole = Engine(params, config, tokenizer, COMPUTE, batch_size=1), getattr(engine_module, where)

    def interrupted(*args, **more):
        whole(*args, **more)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine_module, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(prompts[:1], max_tokens=9)
    assert not engine.busy and not engine._scheduler.running  # else the next would wait for a slot for ever
    assert engine.generate(prompts[:1], max_tokens=9) == wanted


def test_nothing_is_kept_of_what_has_ended(engine):
    for n in range(300):
        engine.submit(Request([n % 250], 1 + n % 2, temperature=0.0))
        if n % 20 == 0:
            engine.cancel(n)
            engine.step()
    while engine.busy:
        engine.step()
    assert not (engine.busy or engine._running or engine._scheduler.running or engine._scheduler.slot_of)


@pytest.mark.slow
def test_memory_stays_flat(engine):
    """Over 1,000 requests, with JAXCHAT_THOROUGH=1 10,000. A request that stays is more than 1,000 bytes."""
    random = np.random.default_rng(4)

    def serve(count):
        for n in range(count):
            id = engine.submit(Request([n % 250] * int(random.integers(1, 9)), int(random.integers(1, 4)), seed=n))
            if random.random() < 0.1:
                engine.cancel(id)
            while len(engine._scheduler.waiting) >= 16:  # a dict stays as large as it ever was
                engine.step()
        while engine.busy:
            engine.step()
        gc.collect()
        return tracemalloc.get_traced_memory()[0], len(jax.live_arrays())

    tracemalloc.start()
    try:
        (before, arrays), (after, arrays_after) = serve(300), serve(10_000 if THOROUGH else 1_000)
    finally:
        tracemalloc.stop()
    assert arrays_after == arrays and after - before < 100_000


def test_samples_differ_and_repeat_by_seed(engine, prompts):
    first = engine.generate(prompts[:1], max_tokens=12, num_samples=4, seed=1)
    assert len({tuple(g.tokens) for g in first}) == 4
    assert engine.generate(prompts[:1], max_tokens=12, num_samples=4, seed=1) == first
    assert engine.generate(prompts[:1], max_tokens=12, num_samples=4, seed=2) != first


def test_limits(engine, prompts):
    for got in engine.generate(prompts, max_tokens=7, temperature=0.0):
        assert len(got.tokens) == 7 or got.finished
    assert [g.tokens for g in engine.generate(prompts, max_tokens=0)] == [[]] * 5
    long = prompts[0] * LENGTH
    assert len(engine.generate([long[: LENGTH - 3]], max_tokens=50, temperature=0.0)[0].tokens) <= 3
    assert engine.generate([long[:LENGTH]], max_tokens=50)[0].tokens == []
    with pytest.raises(UserError, match=f"1 to {LENGTH}"):
        engine.generate([long[: LENGTH + 1]], max_tokens=1)


def exact_scores(params, config, tokens):
    """log-probabilities [tokens, V] of what follows each token, in float64 from a whole float32 pass."""
    padded = np.pad(np.array(tokens, np.int32), (0, LENGTH - len(tokens)))[None]
    z = np.asarray(forward(params, padded, config, COMPUTE)[0, : len(tokens)], np.float64)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def test_log_probabilities_are_those_of_a_whole_pass(eager, config):
    """Of sampled and forced tokens, of the one that ends, of the prompt, of the likeliest. 1e-5: a float32
    sum of 280 exponentials of numbers below 15."""
    engine, random, ends, forced = eager(), np.random.default_rng(3), 0, 0
    for i, logprobs in enumerate((0, 3, 20, 5, 2, 7)):
        prompt = random.integers(0, 250, int(random.integers(2, 50))).tolist()
        how = {"max_tokens": 30, "temperature": 1.2, "top_k": 40, "seed": i}
        (got,) = engine.generate([prompt], **how, logprobs=logprobs, prompt_logprobs=i % 2 == 1)
        assert got.tokens == engine.generate([prompt], **how)[0].tokens
        last = [got.end[0]] if got.end else []
        exact = exact_scores(eager.params, config, [*prompt, *got.tokens])
        after = exact[len(prompt) - 1 :]
        values = [*got.logprobs, *([got.end[1]] if got.end else [])]
        want = [after[n, token] for n, token in enumerate([*got.tokens, *last])]
        np.testing.assert_allclose(values, want, atol=1e-5)
        for n, alternatives in enumerate(got.top):
            assert len(alternatives) == logprobs
            np.testing.assert_allclose([p for _, p in alternatives], np.sort(after[n])[::-1][:logprobs], atol=1e-5)
            np.testing.assert_allclose(
                [after[n, token] for token, _ in alternatives], [p for _, p in alternatives], atol=1e-5
            )
            if got.tokens[n] in dict(alternatives):
                assert dict(alternatives)[got.tokens[n]] == got.logprobs[n]  # the very number
        if i % 2:
            np.testing.assert_allclose(got.prompt_logprobs, exact[range(len(prompt) - 1), prompt[1:]], atol=1e-5)
            assert len(got.prompt_top) == len(prompt) - 1 and len(got.prompt_top[0]) == logprobs
        ends, forced = ends + len(last), forced + sum(got.forced)
    assert ends and forced


def test_a_prompt_alone_has_log_probabilities(engine, params, config):
    (got,) = engine.generate([[3, 1, 4, 1, 5]], max_tokens=0, logprobs=1, prompt_logprobs=True)
    assert got.tokens == [] and got.finish == "length"
    want = exact_scores(params, config, [3, 1, 4, 1, 5])[range(4), [1, 4, 1, 5]]
    np.testing.assert_allclose(got.prompt_logprobs, want, atol=1e-5)


def test_a_temperature_of_almost_nothing_is_none(engine, prompts):
    want = engine.generate(prompts, max_tokens=9, temperature=0.0)
    for temperature in (1.2e-38, 1e-7):
        for settings in ({}, {"top_k": 3, "top_p": 0.5}):
            assert engine.generate(prompts, max_tokens=9, temperature=temperature, **settings) == want


def test_a_call_at_the_prompt_s_end_is_run(engine, tokenizer):
    special = tokenizer.special
    asked = [tokenizer.bos, special("<|python_start|>"), *tokenizer.encode("12+34"), special("<|python_end|>")]
    result = [special("<|output_start|>"), *tokenizer.encode("46"), special("<|output_end|>")]
    (got,) = engine.generate([asked], max_tokens=len(result) + 2, ignore_end=True)
    assert got.tokens[: len(result)] == result and got.forced[: len(result) + 1] == [True] * len(result) + [False]
    (without,) = engine.generate([asked], max_tokens=4, tool=False)
    assert not any(without.forced)


def test_stop_tokens_are_of_the_vocabulary(engine, tokenizer):
    with pytest.raises(UserError, match="stop_tokens"):
        engine.submit(Request([1], 1, stop_tokens=[tokenizer.vocab_size]))


def test_ends(engine, prompts):
    """A stop token ends like the model's own end; min_tokens and ignore_end put it off."""
    how = {"max_tokens": 40, "temperature": 0.0}
    plain = engine.generate(prompts, **how, ignore_end=True)
    assert all(len(one.tokens) == 40 and one.finish == "length" for one in plain)
    for prompt, one in zip(prompts, plain, strict=True):
        stop = one.tokens[9]
        first = one.tokens.index(stop)
        (got,) = engine.generate([prompt], **how, ignore_end=True, stop_tokens=[stop])
        assert got.finished and got.tokens == one.tokens[:first] and got.end == (stop, None)
        (got,) = engine.generate([prompt], **how, ignore_end=True, stop_tokens=[stop], min_tokens=first + 1)
        assert (
            got.tokens[:first] == one.tokens[:first] and len(got.tokens) > first and stop not in got.tokens[: first + 1]
        )


class Scripted:
    """A forward pass that says a script whatever it reads: token i of script n at generated position i, where
    n is the second token of the prompt; the cache's first slot holds it."""

    def __init__(self, monkeypatch, scripts, start, vocab):
        table = np.full((len(scripts), LENGTH + 1), scripts[0][-1])
        for n, script in enumerate(scripts):
            table[n, start - 1 : start - 1 + len(script)] = script
        table = jnp.asarray(table)

        def said(script_B, positions_BT):
            script_BT = jnp.take_along_axis(table[script_B.astype(int)], jnp.clip(positions_BT, 0, LENGTH), axis=1)
            return jax.nn.one_hot(script_BT, vocab)

        def features_prompt(params, tokens_BT, lengths_B, config, compute):
            cache = decode_module.KVCache.empty(config, *tokens_BT.shape, jnp.float32)
            first = cache.k_BKSH[0].at[:, 0, 0, 0].set(tokens_BT[:, 1].astype(float))
            cache = cache.replace(k_BKSH=(first, *cache.k_BKSH[1:]), lengths_B=lengths_B)
            return said(tokens_BT[:, 1], jnp.arange(tokens_BT.shape[1])[None]), cache

        def features_cached(params, tokens_BT, cache, config, compute, counts_B):
            return said(cache.k_BKSH[0][:, 0, 0, 0], cache.lengths_B[:, None]), cache.advance(counts_B)

        monkeypatch.setattr(decode_module, "features_prompt", features_prompt)
        monkeypatch.setattr(decode_module, "features_cached", features_cached)
        monkeypatch.setattr(decode_module, "logits", lambda params, x, cap: 10 * x)


def test_tool_results_are_forced(params, engine, tokenizer, monkeypatch):
    """Row 0 asks for a sum, row 1 for something the calculator refuses, row 2 asks twice, row 3 only closes."""
    special = tokenizer.special
    open_, close, end = special("<|python_start|>"), special("<|python_end|>"), special("<|assistant_end|>")
    out, out_end = special("<|output_start|>"), special("<|output_end|>")
    result = [out, *tokenizer.encode("46"), out_end]
    sum_ = [open_, *tokenizer.encode("12+34"), close]
    bad = [open_, *tokenizer.encode("import os"), close]
    # What the model would say while a result is forced is never looked at.
    hidden = [5] * len(result)
    scripts = [[*sum_, *hidden, 7, end], [*bad, 9, 9, end], [*sum_, *hidden, *sum_, *hidden, end], [close, 8, end]]
    monkeypatch.setattr(engine_module, "read_prompts", engine_module.read_prompts.__wrapped__)
    monkeypatch.setattr(engine_module, "decode", engine_module.decode.__wrapped__)
    Scripted(monkeypatch, scripts, 4, tokenizer.vocab_size)
    engine = Engine(params, engine.config, tokenizer, COMPUTE, batch_size=4)
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
    call, called = tokenizer.special("<|python_start|>"), tokenizer.special("<|python_end|>")

    def result(text):
        return engine._tool_result([call, *tokenizer.encode(text), called])

    assert len(result("1/3")) == len(tokenizer.encode(calculate("1/3"))) + 2
    assert result("1" + "/999999999999999" * 12) == []
