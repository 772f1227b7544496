"""Count a model's parameters and floating-point operations, and look up the peak FLOP/s of devices."""

import math
import re

import jax

from jaxchat.config import ModelConfig
from jaxchat.model.layers import layers
from jaxchat.model.params import declare

# Dense bfloat16 peak of one device in FLOP/s, by jax.Device.device_kind; from the vendors' data sheets. A
# name with a word that is neither here nor in ANY_VARIANT is another device: a slower one, or a slice of a
# GPU (MIG, vGPU).
PEAK_FLOPS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "H100": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "A100": 312e12,
    "A100 PCIe": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,  # a chip is two devices
}
ANY_VARIANT = r"|nvidia|geforce|sxm\d|\d+gb?|hbm3e?"  # words that say nothing about the peak


def num_params(config: ModelConfig) -> int:
    return sum(math.prod(w.shape) for w in jax.tree.leaves(declare(config)))


def flops_per_token(config: ModelConfig, time: int | None = None) -> int:
    """Return the training FLOPs per token, forward and backward.

    Each weight of a matrix counts 6 FLOPs, except that embedding tables count 0. Attention counts 12·n_embd·T
    per layer, masked scores included (PaLM, appendix B), with T limited to the layer's window.
    time: T, the number of tokens per row; None: the model's context length.
    """
    weights = jax.tree.leaves(declare(config))
    multiplied = sum(math.prod(w.shape) for w in weights if w.fan_in and not w.lookup)
    time = time or config.sequence_len
    seen = sum(time if layer.window is None else min(time, layer.window) for layer in layers(config))
    return 6 * multiplied + 12 * config.n_embd * seen


def scaling_params(config: ModelConfig) -> int:
    """Return the model size of nanochat's scaling rules: weights in the layers' matrices and the LM head."""
    kinds = ("matrix", "head")
    return sum(math.prod(w.shape) for w in jax.tree.leaves(declare(config)) if w.group in kinds)


def peak_flops(device: jax.Device) -> float | None:
    """Return a device's peak bfloat16 FLOP/s, or None if it is not known (on a CPU, for example)."""
    kind = _words(device.device_kind)
    return next((peak for name, peak in PEAK_FLOPS.items() if _words(name) == kind), None)


def _words(name: str) -> set[str]:
    return {word for word in re.split(r"[\s-]+", name.lower()) if not re.fullmatch(ANY_VARIANT, word)}
