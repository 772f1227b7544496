"""A step's policy gradient against torch: transformers' model, and losses that are written out here once more."""

from functools import partial

import jax
import numpy as np
import pytest
from conftest import model_on
from convert_helpers import torch
from test_parity import in_torch, matrices, random_params

from jaxchat import sharding
from jaxchat.config import ModelConfig
from jaxchat.rl.advantages import advantages, mixed_groups
from jaxchat.rl.batches import arrange
from jaxchat.rl.rollout import Rollout
from jaxchat.rl.weights import LogProbs, Policy, policy_weights, row_scales
from jaxchat.train.step import sum_gradients_of_answers

CONFIG = ModelConfig(sequence_len=64, vocab_size=500, n_layer=2, n_head=2, n_kv_head=1, n_embd=64)
E, G, PASS = 3, 4, 2  # problems, answers to each, rows that nanochat computes at a time


def rollout_of(vocab_size: int) -> Rollout:
    """Answers of 2 to 30 random tokens, some of which a tool forced; all rewards of the last problem are alike."""
    random, rollout = np.random.default_rng(0), Rollout()
    for e in range(E):
        prompt = random.integers(0, vocab_size, 5 + e).tolist()
        for _ in range(G):
            answer = random.integers(0, vocab_size, random.integers(2, 31)).tolist()
            forced = random.random(len(answer)) < 0.25
            forced[0] = False
            rollout.tokens.append(prompt + answer)
            rollout.sampled.append([False] * len(prompt) + (~forced).tolist())
            rollout.sampler.append([0.0] * len(rollout.tokens[-1]))
    rollout.rewards = [[1.0, 0.0, 0.0, 1.0], [0.0, 0.5, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]
    return rollout


def our_weights(rollout: Rollout, kind: str, norm: str) -> np.ndarray:
    """The weights [R, T] of a step. norm "nanochat": "all_tokens" of each pass of its rows by itself."""
    mask_RT = rollout.positions(rollout.sampled) > 0
    mixed_R = np.repeat(mixed_groups(rollout.rewards_EG), G)
    if norm == "nanochat":
        passes = [slice(first, first + PASS) for first in range(0, E * G, PASS)]
        scales = [row_scales("all_tokens", mask_RT[rows], mixed_R[rows], 1) / len(passes) for rows in passes]
        scales_R1 = np.concatenate(scales)
    else:
        scales_R1 = row_scales(norm, mask_RT, mixed_R, 1)
    advantages_R = advantages(rollout.rewards_EG, kind).reshape(-1)
    return policy_weights(Policy(), advantages_R, mask_RT & mixed_R[:, None], LogProbs(), scales_R1)


def our_gradients(params, config: ModelConfig, rollout: Rollout, weights_RT: np.ndarray, step=None):
    """(gradients by the training step's own sums, N)"""
    model = model_on(sharding.make_mesh(jax.devices()[:1]), config, attention="blocks")
    batch = arrange(rollout, weights_RT, (E, G), model)
    arrays = {name: batch[name] for name in ("inputs", "targets", "weights", "counts", "sampler")}
    (gradients, _, count), _ = (step or jax.jit(partial(sum_gradients_of_answers, model=model)))(params, arrays)
    return gradients, float(count)


def their_rows(model, rollout: Rollout, rows: slice):
    """(log-probabilities, mask of the sampled tokens) of some rows, by a torch model; each [rows, T]."""
    width = max(map(len, rollout.tokens[rows]))
    pad = partial(torch.nn.functional.pad, value=0)
    ids, mask = (
        torch.stack([pad(torch.tensor(row), (0, width - len(row))) for row in values[rows]])
        for values in (rollout.tokens, rollout.sampled)
    )
    logits = model(ids[:, :-1], use_cache=False).logits
    return torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0], mask[:, 1:]


def as_nanochat(model, rollout: Rollout):
    """Each pass of a few rows is divided by its own tokens; the passes of a problem, and the problems, are averaged."""
    for e, rewards in enumerate(torch.tensor(rollout.rewards)):
        for first in range(0, G, PASS):
            logprobs, mask = their_rows(model, rollout, slice(e * G + first, e * G + first + PASS))
            better = (rewards - rewards.mean())[first : first + PASS]
            objective = (better[:, None] * logprobs * mask).sum() / mask.sum()
            (-objective / (G / PASS) / E).backward()


def by_tokens(model, rollout: Rollout):
    """One division by all sampled tokens of the problems whose rewards differ (DAPO)."""
    logprobs, mask = their_rows(model, rollout, slice(0, (E - 1) * G))
    rewards = torch.tensor(rollout.rewards[: E - 1])
    better = (rewards - rewards.mean(1, keepdim=True)).flatten()
    (-(better[:, None] * logprobs * mask).sum() / mask.sum()).backward()


def by_rows(model, rollout: Rollout):
    """GRPO: each answer's mean over its tokens, with advantages in standard deviations."""
    logprobs, mask = their_rows(model, rollout, slice(0, (E - 1) * G))
    rewards = torch.tensor(rollout.rewards[: E - 1])
    better = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)).flatten()
    (-(better * (logprobs * mask).sum(1) / mask.sum(1)).mean()).backward()


@pytest.fixture(scope="module")
def models():
    params = random_params(CONFIG)
    model = model_on(sharding.make_mesh(jax.devices()[:1]), CONFIG, attention="blocks")
    return params, in_torch(params, CONFIG), jax.jit(partial(sum_gradients_of_answers, model=model))


CASES = {"nanochat": ("mean", as_nanochat), "tokens": ("mean", by_tokens), "rows": ("std", by_rows)}


@pytest.mark.parametrize("norm", CASES)
def test_gradients_are_torchs(models, norm):
    """Each weight's gradient to 1e-5 of its norm: sums in float32 in another order (see test_parity)."""
    params, model, step = models
    kind, loss = CASES[norm]
    rollout = rollout_of(CONFIG.vocab_size)
    gradients, count = our_gradients(params, CONFIG, rollout, our_weights(rollout, kind, norm), step)
    model.zero_grad()
    loss(model, rollout)
    theirs = {name: weight.grad.numpy() for name, weight in model.named_parameters()}
    errors = {
        name: np.linalg.norm(ours - theirs[name]) / np.linalg.norm(theirs[name])
        for name, ours in matrices(gradients, CONFIG).items()
    }
    print(f"largest difference of a gradient: {max(errors.values()):.1e} of its norm")
    assert count == 1 and errors.keys() == theirs.keys()
    assert max(errors.values()) < 1e-5, errors
