"""Derive the kind of each layer from the configuration, and loop over all layers."""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxchat.config import Compute, ModelConfig
from jaxchat.model.params import Blocks, has_values, layer_of

REMAT_POLICIES = {  # what is kept for the backward pass; "none" keeps everything
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    "step": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """The kind of a layer: the properties in which the layers of a model differ.

    window: how many earlier positions a token attends to; None: all.
    values: whether the layer has a value embedding.
    """

    window: int | None
    values: bool


def layers(config: ModelConfig) -> tuple[Layer, ...]:
    """Return the kind of each layer of a model, first to last."""
    windows = {"S": config.short_window, "L": config.sequence_len, "": None}
    count, pattern = config.n_layer, config.window_pattern
    letters = [pattern[i % len(pattern)] if pattern else "" for i in range(count - 1)] + [pattern and "L"]
    valued = [bool(config.value_gate_channels) and has_values(i, count) for i in range(count)]
    return tuple(Layer(windows[letter], values) for letter, values in zip(letters, valued, strict=True))


def middle(config: ModelConfig) -> int | None:
    """Return the index of the layer whose output is subtracted from the last one's; None without backout."""
    return config.n_layer // 2 if config.backout else None


def periods(kinds: tuple[Layer, ...]) -> tuple[int, int]:
    """Return (length of the shortest repeating pattern of kinds, number of its complete repeats).

    If nothing repeats, return (number of layers, 0). With value embeddings, a pattern's length is even.
    """
    count, step = len(kinds), 2 if any(kind.values for kind in kinds) else 1
    for size in range(step, count + 1, step):
        whole = count // size * size
        if all(kinds[i] == kinds[i % size] for i in range(whole)) and (size == 1 or whole > size):
            return size, count // size
    return count, 0


def through_layers(step: Callable, x_BTD, blocks: Blocks, config: ModelConfig, compute: Compute):
    """Compute all layers in turn. Return (x_BTD, middle).

    middle: the output of the middle layer if the model has backout, which subtracts it at the end, else None.
    step: function (x_BTD, weights, kind=Layer) -> x_BTD that computes one layer.
    A repeating pattern of layers is compiled once, as a loop, unless compute.unroll is set.
    """
    kinds, mid = layers(config), middle(config)
    size, repeats = periods(kinds)
    looped = size * repeats

    def one(carry, w, kind, index, in_loop):
        x_BTD, kept_BTD = carry
        call = partial(step, kind=kind)
        if compute.remat != "none":
            prevent = compute.unroll or not in_loop
            call = jax.checkpoint(call, policy=REMAT_POLICIES[compute.remat], prevent_cse=prevent)
        x_BTD = call(x_BTD, w)
        return x_BTD, None if mid is None else jnp.where(index == mid, x_BTD, kept_BTD)

    def one_period(carry, start_and_weights):
        start, stacked = start_and_weights
        for i in range(size):
            carry = one(carry, layer_of(stacked, i, kinds[i].values), kinds[i], start + i, in_loop=True)
        return carry, None

    carry = x_BTD, None if mid is None else x_BTD
    if repeats:
        # Slicing copies weights in every step; it is skipped if the period divides the depth.
        whole = jax.tree.map(lambda a: split_periods(a, repeats, looped * a.shape[0] // len(kinds)), blocks)
        starts = size * jnp.arange(repeats)
        carry, _ = lax.scan(one_period, carry, (starts, whole), unroll=repeats if compute.unroll else 1)
    for i in range(looped, len(kinds)):
        carry = one(carry, layer_of(blocks, i, kinds[i].values), kinds[i], i, in_loop=False)
    return carry


def split_periods(stack, repeats: int, count: int):
    """Return the first `count` weights of a stack, reshaped to [repeats, count / repeats, ...]."""
    stack = stack if count == stack.shape[0] else stack[:count]
    return stack.reshape(repeats, count // repeats, *stack.shape[1:])
