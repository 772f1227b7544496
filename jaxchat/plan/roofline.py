"""Roofline model: lower bounds on the time of each part of a training step."""

import dataclasses
import re

import jax

from jaxchat.config import ModelConfig
from jaxchat.model.flops import peak_flops
from jaxchat.model.layers import layers
from jaxchat.plan.hlo import Program

# Bytes per second from vendors' data sheets, by a part of jax.Device.device_kind. MEMORY: reads and writes.
# RING: sent by a device in a ring within a slice or host (for TPUs: both directions of one axis).
MEMORY = {"H200": 4.8e12, "H100": 3.35e12, "v4": 1.2e12, "v5 lite": 0.82e12, "v5": 2.77e12, "v6": 1.64e12}
RING = {"H200": 450e9, "H100": 450e9, "v4": 90e9, "v5 lite": 90e9, "v5": 180e9, "v6": 180e9}

# Bytes per second that a device sends between hosts of GPUs (a 400 Gbit/s card each) or slices of TPUs.
NETWORK = {"H200": 50e9, "H100": 50e9, "v": 6.25e9}


@dataclasses.dataclass(frozen=True)
class Bound:
    """Lower bound on the time of one part of a step, and what sets it: "FLOPs", "memory" or "links"."""

    seconds: float
    limit: str


def rate(table: dict[str, float], device: jax.Device) -> float | None:
    return next((value for name, value in table.items() if re.search(rf"\b{name}", device.device_kind)), None)


def attention_flops(model: ModelConfig, tokens: float, time: int, again: bool) -> float:
    """Return the FLOPs of the attention kernels for `tokens` tokens, forward and backward.

    Scores that are masked don't count. time: tokens per row.
    again: whether to count the forward pass twice, because the backward pass recomputes it.
    """
    windows = [min(time, layer.window or time) for layer in layers(model)]
    seen = sum(window * (1 - window / (2 * time)) for window in windows)  # mean keys per query
    return 4 * model.n_embd * seen * tokens * (4.5 if again else 3.5)


def bounds(program: Program, device: jax.Device, attention: float, far: bool = False) -> dict[str, Bound]:
    """Return {part of the program: lower bound on its time}, or {} if the device's peak rates are unknown.

    All collectives together are one part.
    attention: FLOPs of the attention kernels, which HLO text does not state.
    far: whether all-reduces cross the slower links between GPU hosts or TPU slices.
    """
    peak, memory, ring = peak_flops(device), rate(MEMORY, device), rate(RING, device)
    if not (peak and memory and ring):
        return {}
    sent = program.sent()
    summed = sent.pop("all-reduce", 0.0)
    sending = sum(sent.values()) / ring + summed / (rate(NETWORK, device) if far else ring)
    found = {}
    for name, work in program.parts.items():
        flops = work.flops + (attention if name == "attention" else 0)
        computed, moved = flops / peak, work.bytes / memory
        found[name] = Bound(max(computed, moved), "FLOPs" if computed > moved else "memory")
    return found | {"collectives": Bound(sending, "links")}
