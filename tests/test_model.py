"""The model against a plain float64 one, its own other forms, and known sizes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import token_nll

from jaxchat import sharding
from jaxchat.config import Compute, ModelConfig, UserError
from jaxchat.model import gpt
from jaxchat.model import params as model_params
from jaxchat.model.cache import KVCache
from jaxchat.model.flops import flops_per_token, num_params, peak_flops
from jaxchat.train.loss import Chunking, chunk_length, loss_sums, weighted_nll

CONFIG = ModelConfig(sequence_len=16, vocab_size=50, n_layer=2, n_head=4, n_kv_head=2, n_embd=32)
forward = jax.jit(gpt.forward, static_argnums=(2, 3))
# Float32 rounds to 6e-8; sums of some hundred terms over two layers and logits of up to 15 were seen to differ by
# 4e-6 from float64. A wrong mask, sign or scale differs by more than 0.01.
TOLERANCE = 5e-5


def random_params(config, seed=0, scale=0.3):
    """Weights with none zero, so that every part of the model matters."""
    leaves, tree = jax.tree.flatten(model_params.shapes(config))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    weights = [scale * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, weights)


def tokens(config, batch=3, time=12, seed=1):
    return np.random.default_rng(seed).integers(0, config.vocab_size, (batch, time), dtype=np.int32)


def plain_forward(params, tokens_BT, config):
    """The model of November 2025 in float64, one position and one head at a time."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    H, group = config.n_embd // config.n_head, config.n_head // config.n_kv_head

    def norm(x):
        return x / np.sqrt(np.mean(x * x) + 1.1920929e-07)

    def rotary(x, t):
        y = np.empty(H)
        for i in range(H // 2):
            angle = t * 10_000.0 ** (-2 * i / H)
            y[i] = x[i] * np.cos(angle) + x[i + H // 2] * np.sin(angle)
            y[i + H // 2] = -x[i] * np.sin(angle) + x[i + H // 2] * np.cos(angle)
        return y

    result = []
    for row in tokens_BT:
        xs = [norm(p.wte[token]) for token in row]
        for layer in range(config.n_layer):
            w = jax.tree.map(lambda a, layer=layer: a[layer], p.blocks)
            h = [norm(x) for x in xs]
            q = [[norm(rotary(h[t] @ w.wq[:, n], t)) for n in range(config.n_head)] for t in range(len(xs))]
            k = [[norm(rotary(h[t] @ w.wk[:, n], t)) for n in range(config.n_kv_head)] for t in range(len(xs))]
            v = [[h[t] @ w.wv[:, n] for n in range(config.n_kv_head)] for t in range(len(xs))]
            for t in range(len(xs)):
                y = np.zeros(config.n_embd)
                for n in range(config.n_head):
                    scores = np.array([q[t][n] @ k[s][n // group] / np.sqrt(H) for s in range(t + 1)])
                    weights = np.exp(scores - scores.max())
                    weights /= weights.sum()
                    y += sum(weights[s] * v[s][n // group] for s in range(t + 1)) @ w.wo[n]
                x = xs[t] + y
                xs[t] = x + np.maximum(norm(x) @ w.w_up, 0) ** 2 @ w.w_down
        result.append([15 * np.tanh(norm(x) @ p.lm_head / 15) for x in xs])
    return np.array(result)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_forward_is_the_specs(kv_heads):
    config = dataclasses.replace(CONFIG, n_kv_head=kv_heads)
    params = random_params(config)
    got = forward(params, tokens(config), config, Compute())
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, plain_forward(params, tokens(config), config), atol=TOLERANCE)


@pytest.mark.parametrize(
    "form", [{"unroll": True}, {"remat": "full"}, {"remat": "dots"}, {"loss_chunk_tokens": 16}, {"attention": "blocks"}]
)
def test_every_form_gives_the_same_loss_and_gradient(form):
    params = random_params(CONFIG)
    batch = {"inputs_BT": tokens(CONFIG), "targets_BT": tokens(CONFIG, seed=2)}
    batch["weights_BT"] = np.random.default_rng(3).random((3, 12), np.float32)

    def loss(params, compute):
        nll, weight = loss_sums(params, batch, CONFIG, compute)
        return nll / weight

    loss_and_grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    want, want_grad = loss_and_grad(params, Compute())
    got, got_grad = loss_and_grad(params, dataclasses.replace(Compute(), **form))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6 * float(jnp.abs(b).max())), got_grad, want_grad
    )


def whole_nll(x_BTD, head_DV, targets_BT, weights_BT, chunking):
    """weighted_nll as anyone would write it, all logits at once."""
    z_BTV = gpt.logits(head_DV, x_BTD, chunking.cap)
    nll_BT = jax.nn.logsumexp(z_BTV, axis=-1) - jnp.take_along_axis(z_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jnp.sum(weights_BT * nll_BT)


@pytest.mark.parametrize("devices", [1, 8])
def test_the_loss_of_every_token(devices):
    """Beside all logits at once; its weighted sum is the loss. 12 positions in chunks of 4 and of 5."""
    mesh = sharding.make_mesh(jax.devices()[:devices], "fsdp=2,tensor=2" if devices > 1 else "")
    compute = Compute(mesh=mesh, loss_chunk_tokens=4 if devices > 1 else 16)
    params, inputs, targets = random_params(CONFIG), tokens(CONFIG, batch=4), tokens(CONFIG, batch=4, seed=2)
    weights = np.random.default_rng(3).normal(size=targets.shape).astype(np.float32)
    batch = {"inputs_BT": inputs, "targets_BT": targets, "weights_BT": weights}
    nll_BT = token_nll(params, batch, CONFIG, compute)
    log_p = jax.nn.log_softmax(forward(params, inputs, CONFIG, Compute()))
    want = -np.take_along_axis(np.asarray(log_p), targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(nll_BT, want, atol=TOLERANCE)
    loss, count = jax.jit(loss_sums, static_argnums=(2, 3))(params, batch, CONFIG, compute)
    np.testing.assert_allclose([loss, count], [np.sum(weights * want), weights.sum()], atol=48 * TOLERANCE)


@pytest.mark.parametrize(
    "batch, time, most, want",
    [(2, 512, 512, 256), (3, 2048, 512, 128), (1, 2039, 512, 510), (4, 7, 64, 7), (9, 7, 4, 1)],
)
def test_chunks_are_never_short(batch, time, most, want):
    """The longest divisor that fits, 128 of 2048 where 170 do; where that is short, as for a prime, padded chunks."""
    assert chunk_length(batch, time, Compute(loss_chunk_tokens=most)) == want


# 3e-7 and 4.5e-3 are seen. bfloat16 rounds by 2e-3 at most: logits, their gradients, and what the products give.
@pytest.mark.parametrize("dtype, atol", [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_the_loss_and_its_gradients(dtype, atol):
    """Of features, head and weights, beside autodiff of all logits at once; these are up to ±14.9: the cap bends."""
    keys = jax.random.split(jax.random.key(0), 4)
    x_BTD, head_DV = jax.random.normal(keys[0], (3, 8, 16)), jax.random.normal(keys[1], (16, 40)) * 3
    x_BTD, head_DV = x_BTD.astype(dtype), head_DV.astype(dtype).astype(jnp.float32)
    targets_BT = jax.random.randint(keys[2], (3, 8), 0, 40)
    weights_BT = jax.random.uniform(keys[3], (3, 8))

    def value_and_gradients(loss, x_BTD):
        def scaled(x_BTD, head_DV, weights_BT):
            return 3 * loss(x_BTD, head_DV, targets_BT, weights_BT, Chunking(4, 15.0))

        return jax.jit(jax.value_and_grad(scaled, (0, 1, 2)))(x_BTD, head_DV, weights_BT)

    found = value_and_gradients(weighted_nll, x_BTD)
    expected = value_and_gradients(whole_nll, x_BTD.astype(jnp.float32))
    assert found[1][0].dtype == dtype
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.float32(a), b, rtol=0, atol=atol * abs(b).max())


@pytest.mark.parametrize("part", ["value", "gradients"])
def test_memory_of_the_loss(part):
    """Temporary memory, as compiled, has no term that grows with the product of vocabulary V and tokens N.

    From sizes (V, N), (2V, N), (V, 2N) and (2V, 2N) a + b·V + c·N cancels out, and what is left is what a further pair
    of token and id takes: 4 bytes at least for whole float32 logits, nothing, but for the alignment of buffers, for
    chunks of them.
    """
    D, chunking = 16, Chunking(128, 15.0)

    def temporary(loss, vocab, time):
        numbers = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, time, D), (D, vocab), (2, time))]
        x_BTD, head_DV, weights_BT = numbers
        targets_BT = jax.ShapeDtypeStruct((2, time), jnp.int32)
        function = loss if part == "value" else jax.value_and_grad(loss, argnums=(0, 1))
        lowered = jax.jit(function, static_argnums=4).lower(x_BTD, head_DV, targets_BT, weights_BT, chunking)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    def bytes_a_pair(loss):
        (small, wide), (long, both) = ([temporary(loss, vocab, time) for vocab in (2048, 4096)] for time in (512, 1024))
        return (both - wide - long + small) / (2 * 512 * 2048)

    assert abs(bytes_a_pair(weighted_nll)) < 0.01
    assert bytes_a_pair(whole_nll) > 3.9


@pytest.mark.parametrize("attention", ["xla", "blocks"])
def test_cache_gives_what_the_whole_sequence_gives(attention, monkeypatch):
    """Prompts of different lengths, placed in rows of a larger cache; then token by token, one row waiting in turn."""
    monkeypatch.setattr("jaxchat.model.attention_cpu.SLOT_BLOCK", 4)  # rows end in different blocks
    params, compute = random_params(CONFIG), Compute(attention=attention)
    tokens_BT, prompts = tokens(CONFIG, time=16), np.arange(3)
    whole = np.asarray(forward(params, tokens_BT, CONFIG, compute))
    features_cached = jax.jit(gpt.features_cached, static_argnums=(3, 4))

    def read(tokens_BT, cache, counts_B):
        x_BTD, cache = features_cached(params, tokens_BT, cache, CONFIG, compute, counts_B)
        return gpt.logits(params.lm_head, x_BTD, CONFIG.softcap), cache

    lengths = np.array([3, 7, 5], np.int32)
    logits, cache = read(tokens_BT[:, :7], KVCache.empty(CONFIG, 3, 8, jnp.float32), lengths)
    for b, length in enumerate(lengths):
        np.testing.assert_allclose(logits[b, :length], whole[b, :length], atol=TOLERANCE)
    rows = np.array([2, 0, 1])  # the fourth stays empty
    cache = KVCache.empty(CONFIG, 4, 16, jnp.float32).place(cache, rows)
    for turn in range(8):
        counts_B, next_B1 = np.array([1, 1, 1, 0], np.int32), np.zeros((4, 1), np.int32)
        next_B1[rows, 0] = tokens_BT[prompts, lengths]
        counts_B[turn % 3], next_B1[turn % 3] = 0, turn  # a row that waits reads any token
        logits, cache = read(next_B1, cache, counts_B)
        read_now = counts_B[rows] > 0
        np.testing.assert_allclose(logits[rows, 0][read_now], whole[prompts, lengths][read_now], atol=TOLERANCE)
        lengths = lengths + counts_B[rows]


def test_no_position_sees_a_later_one():
    params, tokens_BT = random_params(CONFIG), tokens(CONFIG)
    changed = tokens_BT.copy()
    changed[:, 6:] = (changed[:, 6:] + 1) % CONFIG.vocab_size
    before = forward(params, tokens_BT, CONFIG, Compute())
    after = forward(params, changed, CONFIG, Compute())
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert np.abs(before[:, 6:] - after[:, 6:]).max() > 0.01


def test_bfloat16_stays_near():
    params, tokens_BT = random_params(CONFIG), tokens(CONFIG)
    got = forward(params, tokens_BT, CONFIG, Compute(dtype="bfloat16"))
    want = forward(params, tokens_BT, CONFIG, Compute())
    assert got.dtype == jnp.float32
    # bfloat16 keeps 8 bits: 0.4 % a rounding, and some twenty roundings on the way to logits of up to 15.
    assert 0 < np.abs(got - want).max() < 20 * 0.004 * 15


def test_sizes_of_known_depths():
    d20 = ModelConfig.from_depth(20, sequence_len=2048, vocab_size=65536)
    assert (d20.n_embd, d20.n_head, d20.n_kv_head, d20.head_dim) == (1280, 10, 10, 128)
    assert num_params(d20) == 560_988_160  # nanochat states 561M
    matrices = 20 * 12 * 1280**2 + 65536 * 1280
    assert flops_per_token(d20) == 6 * matrices + 12 * 20 * 1280 * 2048
    assert flops_per_token(d20, time=256) == 6 * matrices + 12 * 20 * 1280 * 256
    assert ModelConfig.from_depth(3, sequence_len=8, vocab_size=8).n_head == 2  # ceil(192 / 128)


def test_init_follows_the_spec():
    config = ModelConfig.from_depth(4, sequence_len=8, vocab_size=300)
    params = model_params.init(jax.random.key(0), config)
    for zero in (params.lm_head, params.blocks.wo, params.blocks.w_down):
        assert not np.any(zero)
    D = config.n_embd
    for weights, std in [
        (params.wte, 1.0),
        (params.blocks.wq, D**-0.5),
        (params.blocks.wv, D**-0.5),
        (params.blocks.w_up, D**-0.5),
    ]:
        assert np.std(weights) == pytest.approx(std, rel=4 / np.sqrt(2 * weights.size))  # 4 standard errors
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


def test_a_new_weight_changes_no_other(monkeypatch):
    """Initial keys come from names, not from places in the tree."""
    before, declared = model_params.init(jax.random.key(0), CONFIG), model_params.declare(CONFIG)
    more = {"a_new_one": declared.wte, "blocks": declared.blocks, "wte": declared.wte, "lm_head": declared.lm_head}
    monkeypatch.setattr(model_params, "declare", lambda config: more)
    after = model_params.init(jax.random.key(0), CONFIG)
    jax.tree.map(np.testing.assert_array_equal, after["blocks"], before.blocks)
    assert np.array_equal(after["wte"], before.wte) and not np.array_equal(after["a_new_one"], before.wte)
    assert not np.array_equal(before.blocks.wk, before.blocks.wv)  # of one shape


@pytest.mark.parametrize("change", [{"n_kv_head": 3}, {"n_head": 5}, {"vocab_size": 0}])
def test_impossible_shapes_are_refused(change):
    with pytest.raises(UserError):
        dataclasses.replace(CONFIG, **change)


def test_peak_flops_by_name():
    class Device:
        device_kind = "NVIDIA H200"

    assert peak_flops(Device()) == 989e12
    Device.device_kind = "TPU7x"  # one of a chip's two, of 2,307 TFLOP/s together
    assert peak_flops(Device()) == 1153.5e12
    kinds = {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H100 NVL": 835e12,
        "NVIDIA L4": 121e12,
    }
    kinds |= dict.fromkeys(["NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB", "NVIDIA A100 80GB PCIe"], 312e12)
    kinds |= {"NVIDIA GH200 144G HBM3e": 989e12, "NVIDIA GeForce RTX 4090": 165e12, "TPU v5 lite": 197e12}
    slower = ["NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D"]
    slower += ["GRID A100-7-40C", "NVIDIA A100-4-20C", "NVIDIA L4-24Q", "NVIDIA H100 CNX", "NVIDIA A100-SXM-64GB"]
    kinds |= dict.fromkeys(slower)
    for kind, peak in (kinds | {"cpu": None, "NVIDIA H20": None, "NVIDIA GB200": None, "NVIDIA L40G": None}).items():
        Device.device_kind = kind
        assert peak_flops(Device()) == peak, kind
