"""Every setting of jaxchat, as frozen dataclasses: what a model is, what a stage does, and where files live.

The field names of the three stage configs are the commands' flags, and their docstrings are the commands' help.
This module imports nothing of jaxchat; everything else may import it.
"""

import dataclasses
import math
import os
from pathlib import Path


class UserError(Exception):
    """Something the user gave cannot work. The message is one line: what was given, what is expected, what to do.

    Commands print it and leave with exit code 2 (`launch.cli.main`); nothing has been written by then.
    """


def base_dir() -> Path:
    """The directory everything is kept under: $JAXCHAT_BASE_DIR, or ~/.cache/jaxchat."""
    return Path(os.environ.get("JAXCHAT_BASE_DIR") or "~/.cache/jaxchat").expanduser()


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a model. Two checkpoints with equal ModelConfig have interchangeable weights."""

    sequence_len: int = 2048
    vocab_size: int = 65536
    n_layer: int = 12
    n_head: int = 6  # query heads, N
    n_kv_head: int = 6  # key and value heads, K; must divide n_head
    n_embd: int = 768  # model width, D

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise UserError(f"model {field.name} is {getattr(self, field.name)}; it must be at least 1")
        if self.n_embd % self.n_head:
            raise UserError(f"model width n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")
        if self.head_dim % 2:
            raise UserError(f"head dimension {self.head_dim} is odd; rotary embedding turns pairs, choose it even")
        if self.n_head % self.n_kv_head:
            raise UserError(f"n_kv_head={self.n_kv_head} does not divide n_head={self.n_head}")

    @classmethod
    def from_depth(cls, depth: int, *, sequence_len: int, vocab_size: int, n_kv_head: int | None = None):
        """The model of one dial: `depth` layers, width 64·depth, one head per 128 of width (rounded up).

        Where the rounded-up head count does not divide the width (depth 5, say), the next one that gives an even
        head dimension is taken.
        """
        if depth < 1:
            raise UserError(f"--depth={depth}: a model needs at least 1 layer")
        width = 64 * depth
        n_head = math.ceil(width / 128)
        while width % (2 * n_head):
            n_head += 1
        return cls(sequence_len, vocab_size, depth, n_head, n_kv_head or n_head, width)

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a model is computed, never what: none of this is part of a checkpoint, and all choices agree to rounding.

    dtype: of the activations and matrix products ("float32" or "bfloat16"); weights, norms, softmax and loss stay float32.
    unroll: write the layers one after the other instead of looping over them (`lax.scan`): compiles slower, and runs
        about a tenth faster on a CPU with few layers.
    remat: what the backward pass computes again instead of keeping: "none" (keep all), "dots" (keep the results of
        matrix products only), "full" (keep only each layer's input).
    attention: "xla", or "cudnn" (GPU, bfloat16).
    loss_chunk_tokens: logits exist for at most this many tokens per device at a time.
    data_shards: over how many devices the rows of a batch are spread.
    """

    dtype: str = "float32"
    unroll: bool = False
    remat: str = "none"
    attention: str = "xla"
    loss_chunk_tokens: int = 512
    data_shards: int = 1

    @classmethod
    def for_backend(cls, dtype: str = "auto", **changes):
        """The defaults for the devices at hand; `changes` override single fields."""
        import jax  # here, so that reading a config never starts a backend

        backend = jax.default_backend()
        if dtype == "auto":
            dtype = "float32" if backend == "cpu" else "bfloat16"
        if backend == "cpu":
            chosen = {"unroll": True}
        else:
            cudnn = backend == "gpu" and dtype == "bfloat16"
            chosen = {"remat": "dots", "attention": "cudnn" if cudnn else "xla", "loss_chunk_tokens": 4096}
        return cls(**(chosen | {"dtype": dtype} | changes))
