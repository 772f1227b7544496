"""Every setting of jaxchat, as frozen dataclasses: what a model is, what a stage does, and where files live.

The field names of the three stage configs are the commands' flags, and their docstrings are the commands' help.
This module imports nothing of jaxchat; everything else may import it.
"""

import dataclasses
import math
import os
import re
from pathlib import Path
from typing import Any


class UserError(Exception):
    """Something the user gave cannot work. The message is one line: what was given, what is expected, what to do.

    Commands print it and leave with exit code 2 (`launch.cli.main`); nothing has been written by then.
    """


class Preempted(Exception):
    """A run was asked to stop, and saved. Commands print the message and leave with exit code 75: start it again."""


def base_dir() -> Path:
    """The directory everything is kept under: $JAXCHAT_BASE_DIR, or ~/.cache/jaxchat."""
    given = os.environ.get("JAXCHAT_BASE_DIR") or "~/.cache/jaxchat"
    check_local("JAXCHAT_BASE_DIR", given)
    try:
        return Path(given).expanduser()
    except RuntimeError:
        raise UserError(f"{given}: no home directory is known here; set HOME, or JAXCHAT_BASE_DIR=FOLDER") from None


def check_local(name: str, paths: str):
    """Raise UserError if one of the comma-separated paths is an address such as gs://bucket/folder."""
    for path in paths.split(","):
        if address := re.match(r"\s*[A-Za-z][A-Za-z0-9+.-]*://([^/]*)", path):
            raise UserError(
                f"{name}={path.strip()}: an address can't be used as a folder; mount it and give the folder, such as: "
                f"gcsfuse --implicit-dirs --rename-dir-limit=200000 {address[1] or 'BUCKET'} FOLDER"
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and constants of a model. Two checkpoints with equal ModelConfig have interchangeable weights.

    A field that is added later takes as its default what was computed before, so that older checkpoints stay the same.
    """

    sequence_len: int = 2048
    vocab_size: int = 65536
    n_layer: int = 12
    n_head: int = 6  # query heads, N
    n_kv_head: int = 6  # key and value heads, K; must divide n_head
    n_embd: int = 768  # model width, D
    rotary_base: float = 10_000.0
    softcap: float = 15.0  # bound of the logits: softcap·tanh(u/softcap)
    norm_eps: float = 1.1920929e-07  # float32's machine epsilon, torch's default for rms_norm

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is float:
                if type(value) not in (int, float) or not 0 < value < math.inf:
                    raise UserError(f"model {field.name} is {value!r}; it must be a positive number")
            elif type(value) is not int or not 1 <= value < 2**31:
                raise UserError(f"model {field.name} is {value!r}; it must be a whole number from 1 to {2**31 - 1:,}")
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


REMATS = ("none", "dots", "full")  # from the fastest to the one that needs the least memory


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a model is computed, never what: none of this is part of a checkpoint, and all choices agree to rounding.

    dtype: of the activations and matrix products ("float32" or "bfloat16"); weights, norms, softmax and loss stay
        float32, in training the softmax of what a product in dtype gives.
    unroll: write the layers one after the other instead of looping over them (`lax.scan`): compiles slower, and runs
        faster on CPUs, with few layers, and on GPUs.
    remat: what the backward pass computes again instead of keeping: "none" (keep all), "dots" (keep the results of
        matrix products only), "full" (keep only each layer's input).
    attention: "xla", "blocks" (CPU), "cudnn" (GPU, bfloat16; "xla" where it can't) or "splash" (TPU).
    kernels: norms, rotary embedding and the loss's softmax by kernels of our own, for GPUs (model/kernels.py).
    loss_chunk_tokens: logits exist for at most this many tokens per device at a time.
    micro_tokens: a training step takes at most this many tokens of a device's micro-batch at a time, whole rows (one at
        least); 0: all. On a CPU less is in its caches' way, and in memory.
    mesh: the jax.sharding.Mesh that weights and batches lie on; None: one device.
    """

    dtype: str = "float32"
    unroll: bool = False
    remat: str = "none"
    attention: str = "xla"
    kernels: bool = False
    loss_chunk_tokens: int = 512
    micro_tokens: int = 0
    mesh: Any = None

    @classmethod
    def for_backend(cls, dtype: str = "auto", backend: str = "", remat: str = "auto", **changes):
        """The defaults for the devices at hand (or for "cpu", "gpu", "tpu"); `changes` override single fields.

        UserError: there is no such remat.
        """
        import jax  # here, so that reading a config never starts a backend

        backend = backend or jax.default_backend()
        if remat not in ("auto", *REMATS):
            raise UserError(f"--remat={remat}; it is auto or one of {', '.join(REMATS)}")
        if remat != "auto":
            changes["remat"] = remat
        if dtype == "auto":
            dtype = "float32" if backend == "cpu" else "bfloat16"
        if backend == "cpu":
            chosen = {"unroll": True, "attention": "blocks", "micro_tokens": 1024}  # what is fastest there (dev/LOG.md)
        else:
            kernel = {"gpu": "cudnn" if dtype == "bfloat16" else "xla", "tpu": "splash"}.get(backend, "xla")
            chosen = {"remat": "dots", "attention": kernel, "loss_chunk_tokens": 4096}
            if backend == "gpu":  # looped over, what each layer keeps would be copied to and from a stack of all
                capability = getattr(jax.local_devices()[0], "compute_capability", "9.0")  # none: compiled for a Hopper
                chosen |= {"unroll": True, "kernels": float(capability) >= 8, "loss_chunk_tokens": 8192}
        return cls(**(chosen | {"dtype": dtype} | changes))


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """What the three trainers have in common. 0 or -1 turns an "every" off."""

    run: str = "dummy"
    """Name of the run at Weights & Biases; "dummy": don't log there."""
    device_type: str = ""
    """cpu, cuda or tpu; empty: the best there is."""
    mesh: str = ""
    """Devices along each axis, as in data=-1,fsdp=1,tensor=1 (-1: what is left). data: each holds all weights; fsdp:
    each holds a share of every weight; tensor: each computes a share of every layer. Empty: data on CPUs, else
    fsdp=8."""
    dtype: str = "auto"
    """Of the computation: float32 or bfloat16; auto: float32 on a CPU, bfloat16 elsewhere. Weights stay float32."""
    remat: str = "auto"
    """What the backward pass computes again instead of keeping: none, dots (all but the results of matrix products), or
    full (all of a layer): each takes less memory than the one before, and longer. auto: none on a CPU, else the first
    with which the compiled step fits into memory; a resumed run begins with the one it had."""
    seed: int = 0
    """Of the initial weights and the order of the data."""
    embedding_lr: float = 0.2
    """AdamW's rate for the token embedding, × (n_embd/768)^-0.5."""
    unembedding_lr: float = 0.004
    """AdamW's rate for the output head, × (n_embd/768)^-0.5."""
    matrix_lr: float = 0.02
    """Muon's rate for the matrices of the blocks."""
    weight_decay: float = 0.0
    """AdamW's, for embedding and head."""
    save_every: int = -1
    """Save a checkpoint every so many steps, besides the last; the last three stay."""
    resume: bool = False
    """Go on from this stage's latest checkpoint under the tag, or from the start; bit for bit on CPUs. (On a
    GPU cuDNN adds up in no fixed order: there it is the same to the last digits, as two runs from the start are.)"""
    overwrite: bool = False
    """Start anew where checkpoints of this stage and tag exist, which are deleted."""
    tensorboard: bool = False
    """Also write TensorBoard event files beside the checkpoints."""
    on_nonfinite: str = "stop"
    """When a loss or a gradient is not finite: stop, or skip that step, which then changes nothing."""
    data_workers: int = 0
    """Processes of each host that tokenize; 0: threads of the trainer. The batches are the same."""
    coordinator: str = ""
    """HOST:PORT of process 0, where several train together; Slurm, TPUs, Open MPI and JobSets tell it by themselves."""
    num_processes: int = 0
    """How many processes train together."""
    process_id: int = -1
    """Which of them this is, from 0."""
    heartbeat_timeout: int = 100
    """Seconds after which a process that gives no sign of life is lost, and all end."""


@dataclasses.dataclass(frozen=True)
class BaseConfig(TrainConfig):
    """Pretrain a model from random weights on the text of parquet shards."""

    depth: int = 20
    """The one dial of the model's size: layers; the width is 64 × depth."""
    n_kv_head: int = -1
    """Key/value heads, a divisor of the heads (grouped-query attention); -1: as many as heads."""
    max_seq_len: int = 2048
    """Tokens in a row, and the longest context of the model."""
    num_iterations: int = -1
    """Steps; -1: from --target_flops, or else from --target_param_data_ratio."""
    target_flops: float = -1.0
    """Train for so many floating-point operations."""
    target_param_data_ratio: float = 20.0
    """Train on so many tokens per parameter (Chinchilla: 20)."""
    device_batch_size: int = 32
    """Rows a device computes at a time; lower it if memory runs out, the result stays the same."""
    total_batch_size: int = 524288
    """Tokens in an optimizer step, over all devices."""
    grad_clip: float = 1.0
    """Bound on the gradients' global norm; 0: none."""
    warmup_ratio: float = 0.0
    """Share of the steps in which the learning rates rise from 0."""
    warmdown_ratio: float = 0.2
    """Share of the steps, at the end, in which they fall."""
    final_lr_frac: float = 0.0
    """What they fall to, as a share."""
    eval_every: int = 250
    """Measure bits per byte on the validation shard every so many steps."""
    eval_tokens: int = 20 * 524288
    """On so many of its tokens."""
    core_metric_every: int = 2000
    """Measure CORE every so many steps, where there is a bundle (the plan tells)."""
    core_metric_max_per_task: int = 500
    """On at most so many items of each of its tasks; -1: all."""
    eval_bundle: str = ""
    """CORE's bundle, a folder or a zip; empty: <base directory>/eval_bundle, or else eval_bundle.zip."""
    sample_every: int = 2000
    """Let the model continue seven prompts every so many steps."""
    model_tag: str = ""
    """Name of the checkpoint folder; empty: d<depth>."""
    data_dir: str = ""
    """Folder of the parquet shards, column `text`, the last one for validation; empty: <base directory>/base_data."""
    packing: str = "stream"
    """Rows cut from a stream of documents, or bos_bestfit: each row begins with a document, few documents are cut, what
    is cut off is dropped, and documents don't see each other."""


@dataclasses.dataclass(frozen=True)
class MidConfig(TrainConfig):
    """Go on from a base checkpoint with a mixture of conversations: the chat format, multiple choice, the tool."""

    model_tag: str = ""
    """Which base model; empty: the deepest d<N>, or else the newest. The result is saved under the same tag."""
    step: int = -1
    """Which of its checkpoints; -1: the last."""
    num_iterations: int = -1
    """Steps; -1: one pass over the mixture."""
    max_seq_len: int = -1
    """Tokens in a row; -1: the model's own length."""
    device_batch_size: int = 32
    """Rows a device computes at a time."""
    total_batch_size: int = 524288
    """Tokens in an optimizer step, over all devices."""
    init_lr_frac: float = 1.0
    """The learning rates are multiplied by it."""
    eval_every: int = 150
    """Measure bits per byte on the validation mixture every so many steps."""
    eval_tokens: int = 20 * 524288
    """On so many of its tokens."""
    dry_run: bool = False
    """Write no checkpoint and no metrics."""
    train_tasks: str = (
        "SmolTalk/train,MMLU/auxiliary_train,GSM8K/train,identity,identity,SimpleSpelling/train:200000,"
        "SpellingBee/train:80000"
    )
    """The mixture: Name[/split][:rows] or a .jsonl file, with commas between."""
    val_tasks: str = "SmolTalk/test,MMLU/test:5200,GSM8K/test:420"
    """The mixture to validate on."""
    tasks_dir: str = ""
    """Where the tasks' files lie; empty: <base directory>/tasks."""


@dataclasses.dataclass(frozen=True)
class SFTConfig(TrainConfig):
    """Finetune for chat: only what the assistant says is learnt."""

    source: str = "mid"
    """Start from a mid or a base checkpoint."""
    model_tag: str = ""
    """Which model; empty: the deepest d<N>, or else the newest. The result is saved under the same tag."""
    step: int = -1
    """Which of its checkpoints; -1: the last."""
    num_epochs: float = 1.0
    """Passes over the mixture."""
    num_iterations: int = -1
    """Steps; -1: from --num_epochs."""
    max_seq_len: int = -1
    """Longer conversations are cut to so many tokens; -1: the model's own length."""
    device_batch_size: int = 4
    """Rows a device computes at a time: conversations, unless they are packed."""
    target_examples_per_step: int = 32
    """Conversations in an optimizer step, over all devices."""
    packing: str = "padded"
    """One conversation a row, or bestfit: several in a row of full length, which don't see each other. A step has the
    same conversations either way."""
    init_lr_frac: float = 0.02
    """The learning rates are multiplied by it."""
    eval_every: int = 100
    """Measure the validation loss every so many steps."""
    eval_steps: int = 100
    """On so many batches of device_batch_size conversations."""
    eval_metrics_every: int = 200
    """MMLU and ARC-Easy accuracy, by letter, every so many steps."""
    eval_metrics_max_problems: int = 1024
    """On at most so many problems each."""
    dry_run: bool = False
    """Write no checkpoint and no metrics."""
    train_tasks: str = (
        "ARC-Easy/train,ARC-Challenge/train,GSM8K/train,SmolTalk/train:10000,identity,"
        "SimpleSpelling:300,SpellingBee:300"
    )
    """The mixture: Name[/split][:rows] or a .jsonl file, with commas between."""
    val_tasks: str = "SmolTalk/test"
    """The mixture to validate on."""
    tasks_dir: str = ""
    """Where the tasks' files lie; empty: <base directory>/tasks."""
