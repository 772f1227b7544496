"""The model against transformers' NanoChatForCausalLM, which others wrote: logits, loss, gradients, generation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert_helpers import torch, transformers
from scipy.stats import chi2

from jaxchat.config import Compute, ModelConfig
from jaxchat.convert.hugging_face import NAMES, architecture
from jaxchat.convert.weights import matrix_names, named, to_matrices
from jaxchat.infer.engine import Engine
from jaxchat.model import params as model_params
from jaxchat.model.gpt import forward
from jaxchat.train.loss import loss_sums

SHAPES = {
    "multi-head": ModelConfig(sequence_len=640, vocab_size=500, n_layer=3, n_head=4, n_kv_head=4, n_embd=128),
    "grouped": ModelConfig(sequence_len=640, vocab_size=500, n_layer=3, n_head=4, n_kv_head=2, n_embd=128),
}


def random_params(config: ModelConfig, seed: int = 0):
    """Weights that keep activations near 1, in every tensor: also those that begin as zeros."""
    random = np.random.default_rng(seed)

    def draw(weight):
        std = 1.0 if weight.shape[0] == config.vocab_size else weight.fan_in**-0.5
        return jnp.asarray(std * random.standard_normal(weight.shape), jnp.float32)

    return jax.tree.map(draw, model_params.declare(config))


def matrices(params, config: ModelConfig) -> dict[str, np.ndarray]:
    """{transformers' name: PyTorch's matrix} of weights or gradients."""
    weights, leaves = named(config), jax.tree.leaves(params)
    return {
        theirs: matrix
        for (name, weight), leaf in zip(weights.items(), leaves, strict=True)
        for theirs, matrix in zip(matrix_names(name, NAMES, config), to_matrices(weight, np.asarray(leaf)), strict=True)
    }


def in_torch(params, config: ModelConfig):
    kinds = architecture(config, None, "float32", chat=True)
    model = transformers.NanoChatForCausalLM(transformers.NanoChatConfig(**kinds))
    state = {name: torch.from_numpy(matrix) for name, matrix in matrices(params, config).items()}
    model.load_state_dict(state, strict=True)
    return model.eval()


@pytest.fixture(scope="module", params=SHAPES)
def pair(request):
    """(config, our weights, their model)"""
    config = SHAPES[request.param]
    params = random_params(config)
    return config, params, in_torch(params, config)


def tokens(config: ModelConfig, rows: int, time: int) -> np.ndarray:
    return np.random.default_rng(time).integers(0, config.vocab_size, (rows, time), dtype=np.int32)


def their_logits(model, tokens_BT):
    with torch.no_grad():
        return model(torch.from_numpy(tokens_BT).long(), use_cache=False).logits.float().numpy()


@pytest.mark.parametrize("attention", ["xla", "blocks"])
@pytest.mark.parametrize("time", [1, 7, 512, 640])
def test_logits(pair, time, attention):
    """Float32 sums in another order differ by about 1e-6 of a logit of 1; the issue allows 1e-4, 1e-5 is seen."""
    config, params, model = pair
    tokens_BT = tokens(config, 2, time)
    got = forward(params, tokens_BT, config, Compute(attention=attention))
    np.testing.assert_allclose(got, their_logits(model, tokens_BT), atol=2e-5, rtol=0)


@pytest.mark.parametrize("time", [7, 512])
def test_logits_in_bfloat16(pair, time):
    """Both round to bfloat16, at other places. A rounding has a relative error within ±2⁻⁸, of std ε = 2⁻⁸/√12 times 1.

    What a logit goes through in sequence, a layer: 10 in attention (norm, weight, product, rotation, norm,
    probabilities, sum over them, weight, product, residual sum), 10 in the MLP (norm, weight, product and square, where
    squaring doubles the product's error and so counts it four times, weight, product, residual sum); and 4 besides
    (embedding, norm, norm, head's weight). All are of the size of what they round to, as activations are near 1;
    independent, they add up to √(20·L + 4)·ε of the logits' size, 9.0e-3 for 3 layers (8.2e-3 to 9.9e-3 is seen), and
    two such errors differ by √2 more.
    """
    config, params, model = pair
    tokens_BT = tokens(config, 2, time)
    exact = their_logits(model, tokens_BT)
    theirs = their_logits(in_torch(params, config).bfloat16(), tokens_BT)
    ours = np.asarray(forward(params, tokens_BT, config, Compute(dtype="bfloat16")))

    def error(a, b):
        return np.sqrt(np.mean((a - b) ** 2)) / np.sqrt(np.mean(exact**2))

    expected = np.sqrt(20 * config.n_layer + 4) * 2**-8 / np.sqrt(12)
    print(f"bfloat16: ours {error(ours, exact):.2e}, theirs {error(theirs, exact):.2e}, expected {expected:.2e}")
    assert error(ours, exact) < 1.5 * expected
    assert error(ours, theirs) < 1.5 * np.sqrt(2) * expected


def test_loss_and_gradients(pair):
    """Of masked targets, against torch's autograd: the loss to 1e-6, each gradient to 1e-5 of its norm."""
    config, params, model = pair
    inputs_BT, targets_BT = tokens(config, 4, 97), tokens(config, 4, 96)
    targets_BT = np.concatenate([targets_BT, inputs_BT[:, :1]], axis=1)
    weights_BT = (np.random.default_rng(5).random((4, 97)) < 0.6).astype(np.float32)
    weights_BT[1] = 0

    def loss(params):
        nll, weight = loss_sums(
            params,
            {"inputs_BT": inputs_BT, "targets_BT": targets_BT, "weights_BT": weights_BT},
            config,
            Compute(loss_chunk_tokens=64),
        )
        return nll / weight

    got, grads = jax.jit(jax.value_and_grad(loss))(params)
    model.zero_grad()
    logits = model(torch.from_numpy(inputs_BT).long(), use_cache=False).logits
    labels = torch.from_numpy(np.where(weights_BT > 0, targets_BT, -100)).long()
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    want.backward()
    assert abs(float(got) - want.item()) < 1e-6 * want.item()
    theirs = dict(model.named_parameters())
    errors = {
        name: np.linalg.norm(grad - theirs[name].grad.numpy()) / np.linalg.norm(theirs[name].grad.numpy())
        for name, grad in matrices(grads, config).items()
    }
    print(f"loss {float(got):.7f} and {want.item():.7f}; largest gradient error {max(errors.values()):.2e}")
    assert errors.keys() == theirs.keys()
    assert max(errors.values()) < 1e-5, errors


class NoTokenizer:
    """What the engine asks of a tokenizer, of a model whose tokens mean nothing."""

    bos = 499

    def special(self, name):
        return 499


@pytest.mark.parametrize("length", [1, 9, 50])
def test_greedy_generation(pair, length):
    config, params, model = pair
    prompt = tokens(config, 1, length)[0]
    engine = Engine(params, config, NoTokenizer(), Compute(), batch_size=1)
    (ours,) = engine.generate([prompt.tolist()], max_tokens=64, temperature=0)
    ids = torch.from_numpy(prompt).long()[None]
    theirs = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False, use_cache=True,
        eos_token_id=499, pad_token_id=499,
    )  # fmt: skip
    assert ours.tokens == [token for token in theirs[0, length:].tolist() if token != 499]
    assert len(ours.tokens) == 64


@pytest.mark.parametrize("top_k", [pytest.param(None, marks=pytest.mark.slow), 20])
def test_sampling_draws_from_their_distribution(top_k):
    """χ² of twice 10,000 first tokens, summed. The seeds are fixed: it can't fail by chance later."""
    config = ModelConfig(sequence_len=16, vocab_size=500, n_layer=1, n_head=2, n_kv_head=1, n_embd=64)
    params = random_params(config)
    model = in_torch(params, config)
    prompt = tokens(config, 1, 7)[0]
    logits = torch.from_numpy(their_logits(model, prompt[None])[:, -1])
    if top_k:
        logits = transformers.generation.TopKLogitsWarper(top_k)(None, logits)
    expected = 10_000 * torch.softmax(logits[0].double(), 0).numpy()
    often = expected >= 5  # χ² wants as many in each class; the others are one class
    engine = Engine(params, config, NoTokenizer(), Compute(), batch_size=2000)
    statistics = []
    for seed in range(2):
        drawn = engine.generate(
            [prompt.tolist()], max_tokens=1, temperature=1.0, top_k=top_k or 0, num_samples=10_000, seed=seed
        )
        counts = np.bincount([row.tokens[0] if row.tokens else 499 for row in drawn], minlength=config.vocab_size)
        assert counts[expected == 0].sum() == 0  # nothing beyond the top k
        classes = [(counts[often], expected[often])]
        if expected[~often].sum() >= 5:
            classes.append((counts[~often].sum(keepdims=True), expected[~often].sum(keepdims=True)))
        seen, wanted = (np.concatenate(part) for part in zip(*classes, strict=True))
        statistics.append(np.sum((seen - wanted) ** 2 / wanted))
    degrees = 2 * (len(seen) - 1)
    p = chi2.sf(sum(statistics), degrees)
    print(f"chi-squared {np.round(statistics, 1)}, in all {sum(statistics):.1f} of {degrees} degrees, p = {p:.3f}")
    assert degrees >= 2 * 10 and p > 0.001
