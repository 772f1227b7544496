"""Bits per byte and letter accuracy, against plain counting."""

import math

import jax
import numpy as np
import pytest
from conftest import model_on

from jaxchat import sharding
from jaxchat.config import Compute, ModelConfig
from jaxchat.data.pipelines import packed_validation
from jaxchat.eval.bpb import bits_per_byte, total_loss
from jaxchat.eval.chat import letter_accuracy
from jaxchat.model import params as model_params
from jaxchat.model.gpt import forward
from jaxchat.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(iter(["the cat and the hat sat on the mat. "] * 40), 280)


def weights_of(config, seed=0):
    leaves, tree = jax.tree.flatten(model_params.shapes(config))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(tree, [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


def test_bits_per_byte_on_one_device_and_eight(tokenizer, devices):
    """Every document's tokens in one stream; specials count on neither side."""
    config = ModelConfig(16, tokenizer.vocab_size, n_layer=1, n_head=2, n_kv_head=2, n_embd=32)
    params = weights_of(config)
    texts = ["the cat sat", "a hat, Ünd ein Hut", "", "on the mat. " * 5]
    docs = [np.array([tokenizer.bos, *tokenizer.encode(t)] if t else [], np.int32) for t in texts]

    def tokenize(indices):
        return [(docs[i], np.ones(len(docs[i]))) for i in indices]

    stream = np.concatenate(docs)
    logits_of = jax.jit(lambda inputs: forward(params, inputs, config, Compute())[0])
    nats = size = 0.0
    for first in range(0, len(stream) - 1, 16):
        window = stream[first : first + 17]
        inputs = np.zeros((1, 16), np.int32)
        inputs[0, : len(window) - 1] = window[:-1]
        logits = np.asarray(logits_of(inputs), np.float64)
        for t, target in enumerate(window[1:]):
            if target == tokenizer.bos:
                continue
            nats += np.log(np.exp(logits[t]).sum()) - logits[t, target]
            size += len(tokenizer.decode_bytes([int(target)]))
    # The first token of all is an input only; every other byte of the texts is counted once.
    assert size == sum(len(text.encode()) for text in texts)
    want = nats / (math.log(2) * size)
    for mesh, rows in ((sharding.make_mesh(devices[:1]), 3), (sharding.make_mesh(devices), 8)):
        model = model_on(mesh, config)
        batches = packed_validation(tokenize, range(4), rows=rows, time=16, max_tokens=10_000)
        got = bits_per_byte(params, batches, tokenizer.token_bytes, model)
        assert got == pytest.approx(want, rel=1e-6)
        weight = total_loss(params, batches, model)[1]
        assert weight == len(stream) - 1


class ByLength:
    """A scorer that picks the candidate numbered by the prompt's length."""

    def __init__(self):
        self.seen = []

    def choose(self, prompts, candidates):
        self.seen += list(zip(prompts, candidates, strict=True))
        return [len(prompt) % len(letters) for prompt, letters in zip(prompts, candidates, strict=True)]


def test_letter_accuracy(tokenizer):
    rows = []
    for n in range(12):
        messages = [{"role": "user", "content": "x" * n}, {"role": "assistant", "content": "ABC"[n // 4]}]
        rows.append({"messages": messages, "letters": ["A", "B", "C"]})
    scorer = ByLength()
    right = [len(tokenizer.render_for_completion(row)) % 3 == n // 4 for n, row in enumerate(rows)]
    assert 0 < sum(right) < 12
    assert letter_accuracy(scorer, tokenizer, rows) == sum(right) / 12
    scorer.seen.clear()
    five = letter_accuracy(scorer, tokenizer, rows, 5)
    places = [[tokenizer.render_for_completion(row) for row in rows].index(prompt) for prompt, _ in scorer.seen]
    assert len(set(places)) == 5 and five == sum(right[i] for i in places) / 5
    for prompt, letters in scorer.seen:
        assert prompt[-1] == tokenizer.special("<|assistant_start|>") and prompt[0] == tokenizer.bos
        assert [tokenizer.decode([letter]) for letter in letters] == ["A", "B", "C"]
