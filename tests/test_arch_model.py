"""The mechanisms of 2026, together and alone, against a plain float64 model; windows, decoding, sizes."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params, token_nll

from jaxchat.config import ARCHITECTURES, Compute, ModelConfig, UserError
from jaxchat.model import attention, gpt
from jaxchat.model import params as model_params
from jaxchat.model.cache import KVCache
from jaxchat.model.embedding import look_up
from jaxchat.model.flops import flops_per_token, num_params, scaling_params
from jaxchat.model.layers import Layer, layers, periods
from jaxchat.train.loss import loss_sums

PLAIN = ModelConfig(sequence_len=8, vocab_size=50, n_layer=3, n_head=4, n_kv_head=2, n_embd=32)
ALONE = {
    "scales": {"layer_scales": True},
    "values": {"value_gate_channels": 12, "value_gate_bound": 3.0},
    "smear": {"smear_channels": 24},
    "backout": {"backout": True},
    "windows": {"window_pattern": "SSL", "short_window": 3},
    "queries": {"qk_scale": 1.2},
    "rotary": {"rotary_base": 100_000.0},
    "padding": {"vocab_multiple": 64},
}
ALL = dataclasses.replace(PLAIN, **ARCHITECTURES["2026"], short_window=3)
forward = jax.jit(gpt.forward, static_argnums=(2, 3))
TOLERANCE = 5e-5  # test_model.py says why; 1e-5 is seen


def tokens(config, batch=2, time=12, seed=1):
    """More tokens than the window, and than the context, have positions."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, (batch, time), dtype=np.int32)


def weights(config, seed=0):
    return random_params(config, seed, 0.3)


def norm(x):
    return x / np.sqrt(np.mean(x * x) + 1.1920929e-07)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def plain_attention(h, w, c, i, embedded):
    """One layer's attention, one position and one head at a time. h: normed inputs; embedded: value embeddings."""
    H, group = c.n_embd // c.n_head, c.n_head // c.n_kv_head
    letter = (c.window_pattern * c.n_layer)[i] if c.window_pattern and i < c.n_layer - 1 else "L"
    window = c.short_window if letter == "S" else c.sequence_len if c.window_pattern else 10**9

    def rotary(x, t):
        angle = t * float(c.rotary_base) ** (-2 * np.arange(H // 2) / H)
        one, two = x[: H // 2], x[H // 2 :]
        return np.concatenate([one * np.cos(angle) + two * np.sin(angle), two * np.cos(angle) - one * np.sin(angle)])

    q = [[c.qk_scale * norm(rotary(x @ w["wq"][i][:, n], t)) for n in range(c.n_head)] for t, x in enumerate(h)]
    k = [[c.qk_scale * norm(rotary(x @ w["wk"][i][:, n], t)) for n in range(c.n_kv_head)] for t, x in enumerate(h)]
    v = [[x @ w["wv"][i][:, n] for n in range(c.n_kv_head)] for x in h]
    if embedded is not None:
        for t, x in enumerate(h):
            for n in range(c.n_kv_head):
                gate = c.value_gate_bound * sigmoid(x[: c.value_gate_channels] @ w["value_gate"][i // 2][:, n])
                v[t][n] = v[t][n] + gate * embedded[t][n]
    result = []
    for t in range(len(h)):
        y, seen = np.zeros(c.n_embd), range(max(0, t - window), t + 1)
        for n in range(c.n_head):
            scores = np.exp([q[t][n] @ k[s][n // group] / np.sqrt(H) for s in seen])
            y += sum(p * v[s][n // group] for p, s in zip(scores / scores.sum(), seen, strict=True)) @ w["wo"][i][n]
        result.append(y)
    return result


def plain_logits(p, row, c):
    """spec-2026's model of one row of tokens in float64. p: {name: array}, the blocks' without "blocks."."""
    e = [norm(p["wte"][token]) for token in row]
    xs = list(e)
    if c.smear_channels:
        for t in range(1, len(row)):
            gate = p["smear_scale"][0] * sigmoid(e[t][: c.smear_channels] @ p["smear_gate"])
            xs[t] = e[t] + gate * e[t - 1]
    first, half = list(xs), None
    for i in range(c.n_layer):
        if c.layer_scales:
            a, b = p["stream_scale"][i], p["embedding_scale"][i]
            xs = [a * x + b * x0 for x, x0 in zip(xs, first, strict=True)]
        valued = c.value_gate_channels and i % 2 == (c.n_layer - 1) % 2
        embedded = [p["value_table"][i // 2][token] for token in row] if valued else None
        ys = plain_attention([norm(x) for x in xs], p, c, i, embedded)
        xs = [x + y for x, y in zip(xs, ys, strict=True)]
        xs = [x + np.maximum(norm(x) @ p["w_up"][i], 0) ** 2 @ p["w_down"][i] for x in xs]
        half = list(xs) if i == c.n_layer // 2 else half
    if c.backout:
        xs = [x - p["backout_scale"][0] * y for x, y in zip(xs, half, strict=True)]
    u = np.array([norm(x) @ p["lm_head"] for x in xs])[:, : c.vocab_size]
    return 15 * np.tanh(u / 15)


def by_name(params, config) -> dict[str, np.ndarray]:
    leaves = zip(model_params.named(config), jax.tree.leaves(params), strict=True)
    return {name.removeprefix("blocks."): np.asarray(leaf, np.float64) for name, leaf in leaves}


CASES = {name: dataclasses.replace(PLAIN, **change) for name, change in ALONE.items()}
CASES |= {"all, 3 layers": ALL, "all, 4 layers": dataclasses.replace(ALL, n_layer=4)}


@pytest.mark.parametrize("case", CASES)
def test_forward_is_the_specs(case):
    config = CASES[case]
    params, tokens_BT = weights(config), tokens(config)
    got = forward(params, tokens_BT, config, Compute())
    want = [plain_logits(by_name(params, config), row, config) for row in tokens_BT]
    np.testing.assert_allclose(got, want, atol=TOLERANCE)


def loss_of(config, tokens_BT, compute=None):
    batch = {"inputs_BT": tokens_BT[:, :-1], "targets_BT": tokens_BT[:, 1:]}
    batch["weights_BT"] = np.ones(batch["inputs_BT"].shape, np.float32)

    compute = compute or Compute(loss_chunk_tokens=16)

    def loss(params):
        nll, weight = loss_sums(params, batch, config, compute)
        return nll / weight

    return loss


def test_gradients_are_the_specs():
    """Along a random direction of each weight, beside differences of the plain float64 model."""
    config, tokens_BT = ALL, tokens(ALL, batch=1)
    params = weights(config)
    value, grads = jax.jit(jax.value_and_grad(loss_of(config, tokens_BT)))(params)
    p, g, random = by_name(params, config), by_name(grads, config), np.random.default_rng(0)

    def plain_loss(p):
        z = plain_logits(p, tokens_BT[0, :-1], config)
        log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
        return -np.mean(log_p[np.arange(len(z)), tokens_BT[0, 1:]])

    np.testing.assert_allclose(value, plain_loss(p), rtol=1e-6)
    for name, grad in g.items():
        way = random.standard_normal(grad.shape)
        if name in ("wte", "lm_head", "value_table"):  # rows of the padding take no part
            way *= np.abs(grad) > 0
        want = (plain_loss(p | {name: p[name] + 1e-5 * way}) - plain_loss(p | {name: p[name] - 1e-5 * way})) / 2e-5
        # Float32's sums; a difference of two float64 losses is good to 1e-10.
        assert abs(np.sum(grad * way) - want) < 2e-5 * np.linalg.norm(grad) * np.linalg.norm(way), name


@pytest.mark.parametrize(
    "form",
    [
        {"remat": "dots", "unroll": True, "attention": "blocks"},
        *(pytest.param(form, marks=pytest.mark.slow) for form in ({"unroll": True}, {"remat": "full"})),
    ],
)
def test_every_form_gives_the_same_loss_and_gradient(form):
    """Five layers in periods of two with one left, whose windows and value embeddings alternate."""
    config = dataclasses.replace(ALL, n_layer=5, window_pattern="SL")
    assert periods(layers(config)) == (2, 2)
    params, tokens_BT = weights(config), tokens(config)
    got, got_grad = jax.jit(jax.value_and_grad(loss_of(config, tokens_BT, Compute(**form))))(params)
    want, want_grad = jax.jit(jax.value_and_grad(loss_of(config, tokens_BT, Compute())))(params)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=4e-6 * float(jnp.abs(b).max())), got_grad, want_grad
    )


@pytest.mark.parametrize("attention", ["xla", "blocks"])
def test_cache_gives_what_the_whole_sequence_gives(attention, monkeypatch):
    """A prompt, a second chunk of several tokens, then token by token, rows waiting in turn, across all windows."""
    monkeypatch.setattr("jaxchat.model.attention_cpu.SLOT_BLOCK", 4)
    config = dataclasses.replace(ALL, sequence_len=16)
    params, compute = weights(config), Compute(attention=attention)
    tokens_BT, rows = tokens(config, batch=2, time=16), np.arange(2)
    whole = np.asarray(forward(params, tokens_BT, config, compute))
    prompt = jax.jit(gpt.features_prompt, static_argnums=(3, 4))
    cached = jax.jit(gpt.features_cached, static_argnums=(3, 4))

    def agree(x_D, b, position):
        z = gpt.logits(params.lm_head, x_D, config.softcap)[: config.vocab_size]
        np.testing.assert_allclose(z, whole[b, position], atol=TOLERANCE)

    lengths = np.array([5, 3], np.int32)
    x_BTD, cache = prompt(params, tokens_BT[:, :5], lengths, config, compute)
    for b in rows:
        agree(x_BTD[b, lengths[b] - 1], b, lengths[b] - 1)
    cache = KVCache.empty(config, 3, 12, jnp.float32).place(cache, np.array([2, 0])).resize(16)
    slots, next_34, counts = np.array([2, 0]), np.zeros((3, 4), np.int32), np.zeros(3, np.int32)
    for b in rows:  # the second chunk; the third slot stays empty
        next_34[slots[b]] = tokens_BT[b, lengths[b] : lengths[b] + 4]
        counts[slots[b]] = 4 - b
    x_BTD, cache = cached(params, next_34, cache, config, compute, counts)
    for b in rows:
        for t in range(4 - b):
            agree(x_BTD[slots[b], t], b, lengths[b] + t)
        lengths[b] += 4 - b
    for turn in range(8):
        next_31, counts = np.full((3, 1), turn, np.int32), np.zeros(3, np.int32)
        for b in rows:
            if (turn + b) % 3 and lengths[b] < 16:
                next_31[slots[b]], counts[slots[b]] = tokens_BT[b, lengths[b]], 1
        x_BTD, cache = cached(params, next_31, cache, config, compute, counts)
        for b in rows:
            if counts[slots[b]]:
                agree(x_BTD[slots[b], 0], b, lengths[b])
        lengths += counts[slots]
    np.testing.assert_array_equal(np.asarray(cache.lengths_B)[slots], lengths)


def test_a_row_that_begins_anew_has_no_token_before():
    config = dataclasses.replace(ALL, n_layer=1, sequence_len=16)
    params, tokens_BT = weights(config), tokens(config, batch=1, time=5)
    read = jax.jit(gpt.features_cached, static_argnums=(3, 4))
    first, cache = read(params, tokens_BT, KVCache.empty(config, 1, 16, jnp.float32), config, Compute())
    again, _ = read(params, tokens_BT, cache.replace(lengths_B=np.zeros(1, np.int32)), config, Compute())
    np.testing.assert_array_equal(first, again)
    rest = np.roll(tokens_BT, -2, axis=1)
    from_2, _ = read(params, rest, cache.replace(lengths_B=np.array([2], np.int32)), config, Compute())
    np.testing.assert_allclose(from_2[:, :3], first[:, 2:], atol=1e-5)  # the token before the cut is still known


def test_segments_do_not_see_one_another():
    """Two documents packed in a row are what each is alone: no smear crosses, nor does attention."""
    params, tokens_BT = weights(ALL), tokens(ALL, batch=1, time=8)
    segments_BT = np.array([[0, 0, 0, 1, 1, 1, 1, 1]], np.int32)
    batch = {"inputs_BT": tokens_BT, "targets_BT": tokens(ALL, batch=1, time=8, seed=2)}
    packed = token_nll(params, batch | {"segments_BT": segments_BT}, ALL, Compute())
    alone = [
        token_nll(params, {name: a[:, part] for name, a in batch.items()}, ALL, Compute())
        for part in (slice(0, 3), slice(3, 8))
    ]
    np.testing.assert_allclose(packed, np.concatenate(alone, axis=1), atol=TOLERANCE)
    assert np.abs(token_nll(params, batch, ALL, Compute())[:, 3:] - packed[:, 3:]).max() > 1e-3


@pytest.mark.parametrize("kernel", ["xla", "blocks", "splash"])
@pytest.mark.parametrize("window", [1, 5, 150])
def test_a_query_sees_window_and_one_keys(kernel, window, monkeypatch):
    """Values of ones at one position: a query's result is above 0 exactly where it sees that position."""
    monkeypatch.setitem(attention.KERNELS, "splash", partial(attention.splash_attention, interpret=True))
    time, at = 260, 70
    q, k = np.random.default_rng(0).standard_normal((2, 1, time, 2, 64)).astype(np.float32)
    v = np.zeros((1, time, 2, 64), np.float32)
    v[:, at] = 1
    y = np.asarray(attention.causal_attention(q / 8, k / 8, v, kernel, window=window))[0, :, 0, 0]
    np.testing.assert_array_equal(np.flatnonzero(y > 0), np.arange(at, at + window + 1))


def test_sizes_of_known_depths():
    """The table of spec-2026, 1.6."""
    d12, d24 = (ModelConfig.from_depth(depth, sequence_len=2048, vocab_size=32768, arch="2026") for depth in (12, 24))
    assert (num_params(d12), scaling_params(d12)) == (286_261_730, 110_100_912)
    assert (num_params(d24), scaling_params(d24)) == (1_384_122_122, 729_810_624)
    assert flops_per_token(d12) == 6 * (scaling_params(d12) + 24) + 12 * 768 * (9 * 512 + 3 * 2048)
    assert f"{flops_per_token(d12):.3e} {flops_per_token(d24):.3e}" == "7.597e+08 4.775e+09"
    d5 = ModelConfig.from_depth(5, sequence_len=1024, vocab_size=300, arch="2026")
    assert (d5.n_embd, d5.n_head, d5.head_dim, d5.short_window, d5.padded_vocab) == (384, 3, 128, 256, 320)


def test_layers():
    d12 = layers(ModelConfig.from_depth(12, sequence_len=2048, vocab_size=300, arch="2026"))
    assert [layer.window for layer in d12] == [512, 512, 512, 2048] * 3
    assert [i for i, layer in enumerate(d12) if layer.values] == [1, 3, 5, 7, 9, 11]
    d6 = layers(ModelConfig.from_depth(6, sequence_len=2048, vocab_size=300, arch="2026"))
    assert d6[-1] == Layer(2048, True) and d6[4] == Layer(512, False)
    assert layers(ModelConfig(n_layer=2)) == (Layer(None, False),) * 2
    for depth, want in ((24, (4, 6)), (26, (4, 6)), (5, (5, 0)), (9, (4, 2)), (1, (1, 0))):
        kinds = layers(ModelConfig.from_depth(depth, sequence_len=2048, vocab_size=300, arch="2026"))
        assert periods(kinds) == want, depth
    assert periods(layers(ModelConfig(n_layer=1))) == (1, 1) and periods(layers(ModelConfig())) == (1, 12)


def test_init_follows_the_spec():
    config = ModelConfig.from_depth(4, sequence_len=8, vocab_size=300, arch="2026")
    params = model_params.init(jax.random.key(0), config)
    D, blocks = config.n_embd, params.blocks
    np.testing.assert_allclose(blocks.stream_scale, [1.15, 1.15 - 0.1 / 3, 1.15 - 0.2 / 3, 1.05], rtol=1e-6)
    np.testing.assert_allclose(blocks.embedding_scale, [0.20, 0.15, 0.10, 0.05], rtol=1e-6)
    assert (float(params.smear_scale[0]), float(params.backout_scale[0])) == (0.0, np.float32(0.2))
    assert not np.any(blocks.wo) and not np.any(blocks.w_down)
    for array, std in ((params.wte, 0.8), (params.lm_head, 0.001)):
        assert np.std(array) == pytest.approx(std, rel=4 / np.sqrt(2 * array.size))
    for array, low, high in (
        (blocks.wq, -np.sqrt(3 / D), np.sqrt(3 / D)),
        (blocks.wv, -np.sqrt(3 / D), np.sqrt(3 / D)),
        (blocks.w_up, -0.4 * np.sqrt(3 / D), 0.4 * np.sqrt(3 / D)),
        (blocks.value_table, -np.sqrt(3 / D), np.sqrt(3 / D)),
        (blocks.value_gate, 0.0, 0.02),
        (params.smear_gate, 0.0, 0.02),
    ):
        assert low <= np.min(array) and np.max(array) <= high
        near = np.mean((array < low + 0.1 * (high - low)) | (array > high - 0.1 * (high - low)))
        assert near == pytest.approx(0.2, abs=5 * np.sqrt(0.16 / array.size))  # evenly spread: a fifth is there


def test_the_padding_is_no_word():
    """Its logits are not in the loss, and its columns of the head get no gradient."""
    config = CASES["padding"]
    params, tokens_BT = weights(config), tokens(config)
    params = params.replace(lm_head=params.lm_head.at[:, 50:].set(10.0))
    value, grads = jax.jit(jax.value_and_grad(loss_of(config, tokens_BT)))(params)
    z = np.asarray(forward(params, tokens_BT[:, :-1], config, Compute()), np.float64)
    assert z.shape[-1] == 50 and params.lm_head.shape[1] == params.wte.shape[0] == 64
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    want = -np.take_along_axis(log_p, tokens_BT[:, 1:, None], axis=-1).mean()
    np.testing.assert_allclose([value, loss_of(config, tokens_BT)(params)], want, rtol=1e-5)
    assert not np.any(grads.lm_head[:, 50:]) and np.all(np.any(grads.lm_head[:, :50], axis=0))


def test_gradients_of_a_bfloat16_table_are_summed_in_float32():
    """3,000 ones: a bfloat16 sum stops at 256, where 1 is less than half a step."""
    table = jnp.zeros((4, 2), jnp.bfloat16)
    grad = jax.grad(lambda table: look_up(table, np.zeros((3, 1000), np.int32), "float32").sum())(table)
    assert grad.dtype == jnp.bfloat16 and np.allclose(grad[0].astype(np.float32), 3008)  # 3,000 rounded


@pytest.mark.parametrize(
    "change, said",
    [
        ({"window_pattern": "SX"}, "made of letters S and L"),
        ({"window_pattern": "S"}, "short_window must be 1 or more"),
        ({"smear_channels": 33}, "more features than the model's width n_embd=32"),
        ({"table_dtype": "int8"}, "it is float32 or bfloat16"),
        ({"qk_scale": 2.5}, "it must be a positive number up to 2.0"),
        ({"head_std": -1.0}, "it must be 0 or more"),
        ({"backout": 1}, "it must be true or false"),
    ],
)
def test_impossible_constants_are_refused(change, said):
    with pytest.raises(UserError, match=said):
        dataclasses.replace(PLAIN, **change)


def test_unknown_architectures_are_refused():
    with pytest.raises(UserError, match="--arch=2027; it is 2025 or 2026"):
        ModelConfig.from_depth(4, sequence_len=8, vocab_size=8, arch="2027")
