"""Every setting of jaxchat, as frozen dataclasses: stages, models, flags, and where files are kept.

The fields of a flags class are a command's flags, and their docstrings are its help.
This module imports nothing of jaxchat; everything else may import it.
"""

import dataclasses
import math
import os
import re
from pathlib import Path
from typing import Any


class UserError(Exception):
    """Something the user gave cannot work. The message says in one line what is wrong and what to do.

    Commands print it and leave with exit code 2 (`launch.cli.main`); nothing has been written by then.
    """


class Preempted(Exception):
    """A run was asked to stop, and saved. Commands print the message and leave with exit code 75."""


def base_dir() -> Path:
    """The directory everything is kept under: $JAXCHAT_BASE_DIR, or ~/.cache/jaxchat."""
    given = os.environ.get("JAXCHAT_BASE_DIR") or "~/.cache/jaxchat"
    check_local("JAXCHAT_BASE_DIR", given)
    check_folder("JAXCHAT_BASE_DIR", given)
    return user_path(given)


def user_path(given: str | Path) -> Path:
    """Expand a ~ at the start of a path that the user gave. UserError: no home directory is known."""
    home = os.environ.get("HOME", "/")
    remedy = "set HOME, or JAXCHAT_BASE_DIR=FOLDER, or give full paths"
    if str(given).startswith("~") and not os.path.isabs(home):
        raise UserError(f"{given}: HOME={home!r} is no full path; {remedy}")
    try:
        return Path(given).expanduser()
    except RuntimeError:
        raise UserError(f"{given}: no home directory is known here; {remedy}") from None


def no_platform() -> str:
    """Error message for a JAX_PLATFORMS that names a kind of device that is not here."""
    platforms = os.environ.get("JAX_PLATFORMS")
    return f"JAX_PLATFORMS={platforms}: no such device can be used here; unset it, or set JAX_PLATFORMS=cpu"


def check_folder(name: str, path: str):
    """Raise UserError if a path is a file."""
    if os.path.isfile(user_path(path)):
        folder = Path(path).parent
        raise UserError(f"{name}={path} is a file; give a folder, such as the one it is in: {name}={folder}")


def check_utf8(name: str, path: str):
    """Raise UserError if a path has bytes that are not UTF-8, which Python reads as surrogates."""
    if re.search("[\ud800-\udfff]", path):
        raise UserError(f"{name}={path!r} is not UTF-8; rename it, or set LC_ALL=C.UTF-8")


def check_local(name: str, paths: str):
    """Raise UserError if one of the paths (a,b) is an address such as gs://bucket/folder, or not UTF-8."""
    check_utf8(name, paths)
    for path in paths.split(","):
        # One slash is enough: pathlib and shells' completion leave no more, dbfs:/ has no more. C:/ is none.
        address = re.match(r"\s*([A-Za-z][\w+.-]+):/+([^/]*)", path)
        if address:
            mount = f"gcsfuse --implicit-dirs --rename-dir-limit=200000 {address[2] or 'BUCKET'} FOLDER"
            known = {"gs": f"mount it and give the folder: {mount}", "file": "give the path after it alone"}
            how = known.get(address[1].lower(), "mount it or copy it, and give the folder")
            raise UserError(f"{name}={path.strip()}: an address can't be used as a folder; {how}")


@dataclasses.dataclass(frozen=True)
class StageInfo:
    """The names of one stage of training: in flags, folders, commands and reports."""

    name: str  # in flags and metadata
    folder: str  # of its checkpoints, in the base directory
    command: str  # the module in launch/ that trains it
    label: str  # in reports
    title: str  # of its plan, before the tag
    parents: tuple[str, ...]  # the stages whose checkpoints it may start from; (): random weights
    optional: bool = False  # a model is complete without it


STAGES = {
    stage.name: stage
    for stage in (
        StageInfo("base", "base_checkpoints", "base_train", "base", "Base pretraining of", ()),
        StageInfo("mid", "mid_checkpoints", "mid_train", "mid", "Midtraining of", ("base",)),
        StageInfo("sft", "chatsft_checkpoints", "chat_sft", "SFT", "Chat finetuning of", ("mid", "base")),
        StageInfo(
            "rl",
            "chatrl_checkpoints",
            "chat_rl",
            "RL",
            "Reinforcement learning of",
            ("sft", "mid", "base"),
            optional=True,
        ),
    )
}


# The constants of nanochat's model as it was in November 2025 (the fields' defaults) and in July 2026.
ARCHITECTURES = {
    "2025": {},
    "2026": {
        "rotary_base": 100_000.0,
        "qk_scale": 1.2,
        "window_pattern": "SSSL",
        "value_gate_channels": 12,
        "value_gate_bound": 3.0,
        "layer_scales": True,
        "smear_channels": 24,
        "backout": True,
        "vocab_multiple": 64,
        "embedding_std": 0.8,
        "head_std": 0.001,
        "uniform_init": True,
        "up_scale": 0.4,
    },
}


def constant(default, *, zero: bool = False, most: float = math.inf):
    """Declare a number of ModelConfig. zero: whether it may be 0. most: its largest value."""
    return dataclasses.field(default=default, metadata={"zero": zero, "most": most})


def rounded_up(number: int, step: int) -> int:
    return -(-number // step) * step


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and constants of a model. Two checkpoints with equal ModelConfig have interchangeable weights.

    A field added later defaults to what was computed before it existed, so that older checkpoints stay the
    same. docs/architecture.md says what each mechanism computes.
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
    qk_scale: float = constant(1.0, most=2.0)  # factor on normed queries and on normed keys
    # Letters of the layers, repeated; the last layer is L. S: a query sees short_window positions back. L: it
    # sees sequence_len back. "": all of them.
    window_pattern: str = ""
    short_window: int = constant(0, zero=True)
    # Every other layer, the last included, adds to its values an embedding of the token, times a gate.
    value_gate_channels: int = constant(0, zero=True)  # features that the gate reads; 0: no layer does
    value_gate_bound: float = 2.0  # the gate is bound·sigmoid(…)
    layer_scales: bool = False  # a layer reads a·x + b·(the embedding), a and b learnt
    smear_channels: int = constant(0, zero=True)  # read by the gate on the previous token; 0: no smear
    backout: bool = False  # the middle layer's result, times a learnt number, is taken off at the end
    vocab_multiple: int = 1  # tables and head have a multiple of this many rows, unused beyond vocab_size
    table_dtype: str = "float32"  # of the embedding and the value embeddings as stored: float32 or bfloat16
    embedding_std: float = 1.0  # of the embedding's initial values
    head_std: float = constant(0.0, zero=True)
    uniform_init: bool = False  # initial matrices are uniform, not normal
    up_scale: float = 1.0  # factor on the initial w_up

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check_constant(field, getattr(self, field.name))
        if set(self.window_pattern) - set("SL"):
            raise UserError(f"model window_pattern is {self.window_pattern!r}; it is made of letters S and L")
        if "S" in self.window_pattern and not self.short_window:
            raise UserError("model window_pattern has layers S; short_window must be 1 or more")
        if max(self.value_gate_channels, self.smear_channels) > self.n_embd:
            raise UserError(f"a gate reads more features than the model's width n_embd={self.n_embd}")
        if self.table_dtype not in ("float32", "bfloat16"):
            raise UserError(f"model table_dtype is {self.table_dtype!r}; it is float32 or bfloat16")
        if self.n_embd % self.n_head:
            raise UserError(f"model width n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")
        if self.head_dim % 2:
            raise UserError(f"head dimension {self.head_dim} is odd; rotary embedding needs an even one")
        if self.n_head % self.n_kv_head:
            raise UserError(f"n_kv_head={self.n_kv_head} must divide n_head={self.n_head}; choose a divisor")

    @classmethod
    def from_depth(
        cls,
        depth: int,
        *,
        sequence_len: int,
        vocab_size: int,
        n_kv_head: int | None = None,
        arch: str = "2025",
    ):
        """Size a model by its depth: `depth` layers, width 64·depth, one head per 128 of width, rounded up.

        More heads where cuDNN's attention needs them, whose head dimensions are multiples of 8: depth 5 has 4
        of 80, depth 17 has 17 of 64. In the architecture of 2026 the width is rounded up instead, to a
        multiple of 128, and layers S see a quarter of the context.
        """
        if depth < 1:
            raise UserError(f"--depth={depth}: a model needs at least 1 layer")
        if arch not in ARCHITECTURES:
            raise UserError(f"--arch={arch}; it is {' or '.join(ARCHITECTURES)}")
        width = 64 * depth
        if constants := ARCHITECTURES[arch]:
            width = rounded_up(width, 128)
            window = rounded_up(rounded_up(sequence_len, 4) // 4, 128)
            n_head = width // 128
            shape = (sequence_len, vocab_size, depth, n_head, n_kv_head or n_head, width)
            return cls(*shape, short_window=window, **constants)
        n_head = math.ceil(width / 128)
        while width % (8 * n_head):
            n_head += 1
        return cls(sequence_len, vocab_size, depth, n_head, n_kv_head or n_head, width)

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def plain(self) -> bool:
        """Whether the model has only weights that November 2025's architecture has."""
        return not (self.value_gate_channels or self.layer_scales or self.smear_channels or self.backout)

    @property
    def padded_vocab(self) -> int:
        """Size of the vocabulary with its padding: rows of the embedding tables, columns of the head."""
        return rounded_up(self.vocab_size, self.vocab_multiple)


def check_constant(field: dataclasses.Field, value):
    """Raise UserError unless a value is one that a field of ModelConfig can have."""
    zero, most = field.metadata.get("zero", False), field.metadata.get("most", math.inf)
    if field.type is float:
        fine = type(value) in (int, float) and 0 <= value <= most and value < math.inf and (value > 0 or zero)
        expected = "0 or more" if zero else "a positive number"
        expected += f" up to {most}" if most < math.inf else ""
    elif field.type is int:
        least = 0 if zero else 1
        fine = type(value) is int and least <= value < 2**31
        expected = f"a whole number from {least} to {2**31 - 1:,}"
    else:
        fine, expected = type(value) is field.type, {bool: "true or false", str: "a word"}[field.type]
    if not fine:
        raise UserError(f"model {field.name} is {value!r}; it must be {expected}")


REMATS = ("none", "dots", "full")  # from the fastest to the one that needs the least memory
ALL_REMATS = (*REMATS, "step")  # step: for several devices and micro-batches (model/parts.py)


def gpu_capability() -> float:
    """Compute capability of this host's first GPU, such as 9.0 for a Hopper; without a GPU 9.0."""
    import jax  # here, so that reading a config never starts a backend

    return float(getattr(jax.local_devices()[0], "compute_capability", "9.0"))


@dataclasses.dataclass(frozen=True)
class Compute:
    """Execution options: they change speed and memory, never the result (up to rounding); in no checkpoint.

    dtype: of activations and matrix products, "float32" or "bfloat16". Weights, norms, softmax and loss stay
        float32; in training the logits are rounded to dtype before the softmax.
    unroll: write the layers one after the other instead of looping over them (`lax.scan`). Compiles slower;
        runs faster on GPUs, and on CPUs with few layers.
    remat: what the backward pass computes again instead of keeping: "none" (keeps all), "dots" (all but the
        results of matrix products), "full" (all but each layer's input) or "step" (as full, and a layer
        computes all micro-batches of a step before the next layer does: model/parts.py).
    parts: equal parts in which a layer computes a device's rows, one after the other. train_step sets it.
    attention: "xla", "blocks" (CPU), "cudnn" (GPU, bfloat16; "xla" for shapes it refuses) or "splash" (TPU).
    kernels: norms, rotary embedding and the loss's softmax by our own kernels for GPUs (model/kernels.py).
    grad_dtype: what gradients of the layers' matrices are summed in, within a device and across devices:
        "float32", or "bfloat16", which sends half the bytes and loses a little with every device more.
    matmul: operands of the layers' products in training: "" as they come, "fp8" rounded to float8 in the MLP,
        "fp8-all" in all six (model/matmul.py). Unlike the rest, it changes what is learnt.
    loss_chunk_tokens: logits exist for at most this many tokens of a device at a time.
    micro_tokens: a training step computes at most this many tokens of a device's micro-batch at a time, in
        whole rows (at least one); 0: all at once. A CPU is faster with what fits into its caches.
    mesh: the jax.sharding.Mesh that weights and batches are spread over; None: one device.
    """

    dtype: str = "float32"
    unroll: bool = False
    remat: str = "none"
    parts: int = 1
    attention: str = "xla"
    kernels: bool = False
    grad_dtype: str = "float32"
    matmul: str = ""
    loss_chunk_tokens: int = 512
    micro_tokens: int = 0
    mesh: Any = None

    @classmethod
    def for_backend(cls, dtype: str = "auto", backend: str = "", remat: str = "auto", **changes):
        """Choose defaults for the devices at hand (or for "cpu", "gpu", "tpu"); `changes` override fields."""
        import jax  # here, so that reading a config never starts a backend

        backend = backend or jax.default_backend()
        if remat not in ("auto", *ALL_REMATS):
            raise UserError(f"--remat={remat}; it is auto or one of {', '.join(ALL_REMATS)}")
        if remat != "auto":
            changes["remat"] = remat
        if dtype == "auto":
            dtype = "float32" if backend == "cpu" else "bfloat16"
        if backend == "cpu":  # the fastest there: dev/LOG.md
            chosen = {"unroll": True, "attention": "blocks", "micro_tokens": 1024}
        else:
            kernel = {"gpu": "cudnn" if dtype == "bfloat16" else "xla", "tpu": "splash"}.get(backend, "xla")
            chosen = {"remat": "dots", "attention": kernel, "loss_chunk_tokens": 4096}
            if backend == "gpu":  # a loop would copy what each layer keeps to and from a stack of all layers'
                chosen |= {"unroll": True, "kernels": gpu_capability() >= 8, "loss_chunk_tokens": 8192}
        return cls(**(chosen | {"dtype": dtype} | changes))


@dataclasses.dataclass(frozen=True)
class Model:
    """A model and how it is computed on a mesh: all that a program over its weights is compiled for."""

    config: ModelConfig
    compute: Compute

    @property
    def mesh(self):
        return self.compute.mesh

    def without_fp8(self) -> "Model":
        """Return this model with products in compute.dtype, for evaluations and generation."""
        return dataclasses.replace(self, compute=dataclasses.replace(self.compute, matmul=""))


DEVICE_ROWS, DEVICE_CONVERSATIONS = 32, 4  # the most rows that --device_batch_size=-1 takes; SFT's
MOST_TOKENS = 2**24  # of a vocabulary
HOTTEST = 100.0  # highest sampling temperature: there all tokens are about as likely
EVAL_BATCH = 4  # conversations that --eval_steps counts in


def flag(
    default, least=None, most=math.inf, *, special=None, choices=(), free=False, own=False, alias="", name=""
):
    """A field of a flags class, with what Flags checks.

    least, most: the bounds of a number, inclusive; special: one more value that is allowed. choices: all
    values of a word. free: a resumed run may change it, since it changes what is shown, measured, kept or
    computed at a time, but not what is learnt. own: the processes of a run may differ in it; it is free then.
    alias: a short form, such as "-p". name: the flag's name where it is not the field's.
    """
    metadata = {"least": least, "most": most, "special": special, "choices": choices, "free": free or own}
    return dataclasses.field(default=default, metadata=metadata | {"own": own, "alias": alias, "name": name})


@dataclasses.dataclass(frozen=True)
class Flags:
    """Base class of the flags classes. UserError: a value is not one that its field allows."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, m = getattr(self, field.name), field.metadata
            if not m:  # not by flag(): any value is allowed
                continue
            choices, least, most = m["choices"], m["least"], m["most"]
            name = m["name"] or field.name
            if choices and value not in choices:
                words = ", ".join(word for word in choices[:-1] if word)
                raise UserError(f"--{name}={value}; it is {words} or {choices[-1]}")
            if least is not None and value != m["special"] and not least <= value <= most:
                allowed = f"at least {least}" if most == math.inf else f"from {least} to {most}"
                allowed += "" if m["special"] is None else f", or {m['special']}"
                raise UserError(f"--{name}={value}; it must be {allowed}")

    def learnt_from(self) -> dict:
        """The flags that affect what is learnt, by name: those that are not free."""
        return self._but("free")

    def shared(self) -> dict:
        """The flags that all processes of a run have to agree on, by name."""
        return self._but("own")

    def _but(self, kind: str) -> dict:
        fields = dataclasses.fields(self)
        return {field.name: getattr(self, field.name) for field in fields if not field.metadata.get(kind)}


@dataclasses.dataclass(frozen=True)
class DeviceFlags(Flags):
    """Flags of devices"""

    mesh = matmul = ""  # flags of the classes below
    remat = "auto"
    device_type: str = flag("", choices=("", "cpu", "cuda", "tpu"), free=True)
    """Kind of device to compute on: cpu, cuda or tpu; empty: the best one found."""
    dtype: str = flag("auto", choices=("auto", "float32", "bfloat16"))
    """Number format of activations and matrix products: float32 or bfloat16; auto: float32 on a CPU, bfloat16
    elsewhere. Checkpoints keep weights in float32, but for bfloat16 embedding tables of --arch=2026."""


@dataclasses.dataclass(frozen=True)
class MeshFlags(DeviceFlags):
    """Flags of several devices and processes"""

    mesh: str = flag("", free=True)
    """Devices along each axis, as in data=-1,fsdp=1,tensor=1 (-1: all that remain). data: each device holds
    all weights; fsdp: each holds a share of every weight; tensor: each computes a share of every layer.
    Empty: data=-1 on CPUs; elsewhere fsdp=8, or 4, 2 or 1 if 8 does not divide the devices."""
    coordinator: str = flag("", own=True)
    """Address of process 0 of several, as HOST:PORT; empty: as Slurm, TPUs, Open MPI or a JobSet say."""
    num_processes: int = flag(0, 0, free=True)
    """Number of processes that work together; 0: as the launcher says, or else 1."""
    process_id: int = flag(-1, -1, own=True)
    """Number of this process, counted from 0; -1: as the launcher says."""
    heartbeat_timeout: int = flag(100, 2, free=True)
    """Seconds without a sign of life after which a process counts as lost, and all processes end."""


@dataclasses.dataclass(frozen=True)
class TrainConfig(MeshFlags):
    """Flags that all trainers share"""

    run: str = flag("dummy", own=True)
    """Name of the run at Weights & Biases; "dummy": nothing is logged there."""
    matmul: str = flag("", choices=("", "fp8", "fp8-all"))
    """Operands of the layers' matrix products while training, on GPUs such as H100 and H200: fp8 (float8 in
    the MLP), fp8-all (float8 in all layers' products); empty: as --dtype. Evaluations compute in --dtype, and
    print how much float8 changes the loss."""
    remat: str = flag("auto", free=True)
    """What the backward pass recomputes instead of keeping: none, dots (all but the results of matrix
    products), full (everything within a layer) or step (as full; on several devices, each layer computes all
    micro-batches before the next layer does, so gradients are summed over devices once a step). Each but
    step needs less memory than the one before, and more time. auto: none on a CPU; elsewhere the first whose
    compiled step fits in memory, and for a resumed run the one it had."""
    seed: int = flag(0, 0, 2**32 - 1)
    """Random seed of the initial weights and of the order of the data."""
    embedding_lr: float = flag(0.2, 0)
    """AdamW learning rate of the token embedding, multiplied by (n_embd/768)^-0.5."""
    unembedding_lr: float = flag(0.004, 0)
    """AdamW learning rate of the output head, multiplied by (n_embd/768)^-0.5."""
    matrix_lr: float = flag(0.02, 0)
    """Muon learning rate of the matrices in the layers."""
    weight_decay: float = flag(0.0, 0)
    """AdamW weight decay of embedding and head; for a model of 2026, in which theirs are fixed, Muon's of the
    layers' matrices."""
    save_every: int = flag(-1, -1, free=True)
    """Steps between checkpoints, besides those of --save_minutes; 0 or -1: none. The last step is always
    saved, and the last three checkpoints are kept."""
    save_minutes: float = flag(30.0, 0, free=True)
    """Minutes after the latest checkpoint until the next is saved; 0: none by the clock."""
    resume: bool = flag(False, free=True)
    """Continue from this stage's latest checkpoint under the tag, or start if there is none. On CPUs the
    result equals the undisturbed run bit for bit; on GPUs up to rounding (cuDNN sums in no fixed order)."""
    overwrite: bool = flag(False, free=True)
    """Delete the checkpoints of this stage and tag, and start anew."""
    tensorboard: bool = flag(False, free=True)
    """Also write TensorBoard event files beside the checkpoints."""
    on_nonfinite: str = flag("stop", choices=("stop", "skip"), free=True)
    """What to do when a loss or a gradient is not finite: stop, or skip the step, which changes nothing."""
    data_workers: int = flag(0, 0, own=True)
    """Processes per host that tokenize; 0: threads of the trainer do. The batches do not depend on it."""

    def __post_init__(self):
        super().__post_init__()
        for one, other, why in (
            ("resume", "overwrite", "one continues from the checkpoints, the other deletes them"),
            ("resume", "dry_run", "a dry run always starts from step 0"),
        ):
            if getattr(self, one) and getattr(self, other, False):
                raise UserError(f"--{one} and --{other} contradict each other: {why}; leave one out")


# What base_train's flags are unless given, where an architecture's recipe differs from the flags' defaults.
BASE_RECIPES = {
    "2025": {},
    "2026": {
        "embedding_lr": 0.3,
        "unembedding_lr": 0.008,
        "weight_decay": 0.28,
        "target_param_data_ratio": 12.0,
        "total_batch_size": -1,
        "grad_clip": 0.0,
        "warmup_steps": 40,
        "warmdown_ratio": 0.65,
        "final_lr_frac": 0.05,
        "eval_tokens": 80 * 524288,
    },
}


@dataclasses.dataclass(frozen=True)
class BaseConfig(TrainConfig):
    """Pretrain a model from random weights on the text of parquet shards."""

    arch: str = flag("2025", choices=tuple(ARCHITECTURES))
    """Architecture, optimizer and recipe: nanochat's of November 2025 or of July 2026. 2026 means, unless
    given otherwise: --embedding_lr=0.3 --unembedding_lr=0.008 --weight_decay=0.28 (Muon's)
    --target_param_data_ratio=12 --total_batch_size=-1 --grad_clip=0 --warmup_steps=40 --warmdown_ratio=0.65
    --final_lr_frac=0.05 --eval_tokens=41943040."""
    depth: int = flag(20, 1)
    """Number of layers; the width is 64 × depth (with --arch=2026 rounded up to a multiple of 128)."""
    n_kv_head: int = flag(-1, 1, special=-1)
    """Number of key/value heads, a divisor of the query heads (grouped-query attention); -1: their number."""
    max_seq_len: int = flag(2048, 1)
    """Tokens in a training row, and the model's context length."""
    num_iterations: int = flag(-1, 1, special=-1)
    """Number of optimizer steps; -1: from --target_flops, or else from --target_param_data_ratio."""
    target_flops: float = flag(-1.0, 0, special=-1)
    """Floating-point operations to train for; -1: from --target_param_data_ratio."""
    target_param_data_ratio: float = flag(20.0, 0, special=-1)
    """Tokens to train on, per parameter of the model (Chinchilla: 20). With --arch=2026 only weights of the
    layers' matrices and the head are counted."""
    device_batch_size: int = flag(-1, 1, special=-1, free=True)
    """Rows that a device computes at a time; -1: the largest number up to 32 that divides the step. Lower it
    if memory runs out: the result stays the same up to rounding."""
    total_batch_size: int = flag(524288, 1, 2**31 - 1, special=-1)
    """Tokens in an optimizer step, over all devices; -1, with --arch=2026 only: by the model's size."""
    grad_clip: float = flag(1.0, 0)
    """Largest global norm of the gradients, to which longer ones are scaled; 0: no bound."""
    warmup_ratio: float = flag(0.0, 0, 1)
    """Fraction of steps spent warming the learning rates up from 0."""
    warmup_steps: int = flag(0, 0)
    """Number of steps spent warming the learning rates up; 0: by --warmup_ratio."""
    warmdown_ratio: float = flag(0.2, 0, 1)
    """Fraction of steps at the end spent cooling the learning rates down."""
    final_lr_frac: float = flag(0.0, 0)
    """Final learning rates, as a fraction of the peak."""
    eval_every: int = flag(250, -1, free=True)
    """Steps between measurements of bits per byte on the validation shard; 0 or -1: never."""
    eval_tokens: int = flag(20 * 524288, 1, free=True)
    """Validation tokens that bits per byte is measured on."""
    core_metric_every: int = flag(2000, -1, free=True)
    """Steps between measurements of CORE, if its bundle is there (the plan says so); 0 or -1: never."""
    core_metric_max_per_task: int = flag(500, 1, special=-1, free=True)
    """Items of each CORE task to measure on, at most; -1: all."""
    eval_bundle: str = flag("", own=True)
    """CORE's bundle, a folder or a zip; empty: <base directory>/eval_bundle, or else eval_bundle.zip."""
    sample_every: int = flag(2000, -1, free=True)
    """Steps between showing how the model continues seven prompts; 0 or -1: never."""
    model_tag: str = flag("", free=True)
    """Name of the checkpoint folder; empty: d<depth>."""
    data_dir: str = flag("", own=True)
    """Folder of parquet shards with a column `text`, the last one for validation; empty: <base
    directory>/base_data."""
    table_dtype: str = flag("auto", choices=("auto", "float32", "bfloat16"), free=True)
    """Number format in which embedding tables and their optimizer state are kept: float32 or bfloat16; auto:
    bfloat16 with --arch=2026 if activations are bfloat16, else float32."""
    packing: str = flag("stream", choices=("stream", "bos_bestfit", "nanochat"))
    """How documents fill rows. stream: rows are cut from one stream of documents; nothing is lost.
    bos_bestfit: each row begins with a document, few documents are cut, what is cut off is dropped, and
    documents don't see each other. nanochat: like bos_bestfit, but documents see each other, and each row
    takes the longest of 1,000 documents that fits."""

    @classmethod
    def given(cls, **flags):
        """Build the flags from those on a command line, the others by the recipe of its --arch."""
        return cls(**(BASE_RECIPES.get(flags.get("arch"), {}) | flags))

    def __post_init__(self):
        super().__post_init__()
        if self.total_batch_size < 0 and not BASE_RECIPES[self.arch]:
            raise UserError(f"--total_batch_size=-1 needs --arch=2026; with --arch={self.arch} give a number")
        if self.warmup_ratio + self.warmdown_ratio > 1 + 1e-9:  # 0.1 + 0.9 may be rounded up
            raise UserError(
                f"--warmup_ratio={self.warmup_ratio:g} and --warmdown_ratio={self.warmdown_ratio:g} are "
                f"{self.warmup_ratio + self.warmdown_ratio:g} together; lower one: they may be 1 at most"
            )


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(TrainConfig):
    """Flags of the trainers that start from a checkpoint"""

    model_tag: str = flag("", free=True)
    """Tag of the model to start from, and of the result; empty: the deepest d<N>, or else the newest."""
    step: int = flag(-1, -1, free=True)
    """Step of the checkpoint to start from; -1: the last."""
    dry_run: bool = flag(False, free=True)
    """Train, but write no checkpoint, no metrics and no samples."""
    tasks_dir: str = flag("", own=True)
    """Folder of the tasks' files; empty: <base directory>/tasks."""


@dataclasses.dataclass(frozen=True)
class MidConfig(FinetuneConfig):
    """Continue training a base model on conversations: the chat format, multiple choice, the tool."""

    num_iterations: int = flag(-1, 1, special=-1)
    """Number of optimizer steps; -1: one pass over the mixture."""
    max_seq_len: int = flag(-1, 1, special=-1)
    """Tokens in a training row; -1: the model's context length."""
    device_batch_size: int = flag(-1, 1, special=-1, free=True)
    """Rows that a device computes at a time; -1: the largest number up to 32 that divides the step. Lower it
    if memory runs out: the result stays the same up to rounding."""
    total_batch_size: int = flag(524288, 1, 2**31 - 1)
    """Tokens in an optimizer step, over all devices."""
    init_lr_frac: float = flag(1.0, 0)
    """Factor on all learning rates."""
    eval_every: int = flag(150, -1, free=True)
    """Steps between measurements of bits per byte on the validation mixture; 0 or -1: never."""
    eval_tokens: int = flag(20 * 524288, 1, free=True)
    """Validation tokens that bits per byte is measured on."""
    train_tasks: str = (
        "SmolTalk/train,MMLU/auxiliary_train,GSM8K/train,identity,identity,SimpleSpelling/train:200000,"
        "SpellingBee/train:80000"
    )
    """Training mixture: Name[/split][:rows] or .jsonl files, separated by commas."""
    val_tasks: str = flag("SmolTalk/test,MMLU/test:5200,GSM8K/test:420", free=True)
    """Validation mixture, written like --train_tasks."""


# The same for chat_sft: 2026 starts from a base model, and learns mid's data too.
SFT_RECIPES = {
    "2025": {},
    "2026": {
        "source": "base",
        "embedding_lr": 0.3,
        "unembedding_lr": 0.008,
        "packing": "bestfit",
        "target_examples_per_step": -1,
        "init_lr_frac": 0.8,
        "warmdown_ratio": 0.5,
        "momentum_warmup": 300,
        "load_optimizer": True,
        "train_tasks": ",".join(["SmolTalk/train", *["MMLU/auxiliary_train"] * 3, *["GSM8K/train"] * 4]),
        "val_tasks": "SmolTalk/test,MMLU/test:5200,GSM8K/test:420",
    },
}


@dataclasses.dataclass(frozen=True)
class SFTConfig(FinetuneConfig):
    """Finetune a model for chat: only what the assistant says is learnt."""

    recipe: str = flag("2025", choices=tuple(SFT_RECIPES))
    """nanochat's recipe of November 2025 or of July 2026. 2026 means, unless given otherwise: --source=base
    --embedding_lr=0.3 --unembedding_lr=0.008 --packing=bestfit --target_examples_per_step=-1
    --init_lr_frac=0.8 --warmdown_ratio=0.5 --momentum_warmup=300 --load_optimizer, and a mixture of SmolTalk
    once, MMLU three times and GSM8K four times."""
    source: str = flag("mid", choices=STAGES["sft"].parents)
    """Stage whose checkpoint to start from: mid or base."""
    num_epochs: float = flag(1.0, 0)
    """Passes over the training mixture."""
    num_iterations: int = flag(-1, 1, special=-1)
    """Number of optimizer steps; -1: from --num_epochs."""
    max_seq_len: int = flag(-1, 1, special=-1)
    """Tokens to which longer conversations are cut; -1: the model's context length."""
    device_batch_size: int = flag(-1, 1, special=-1, free=True)
    """Rows (conversations, unless they are packed) that a device computes at a time; -1: the largest number
    up to 4 that divides the step. Lower it if memory runs out: the result stays the same up to rounding."""
    target_examples_per_step: int = flag(32, 1, special=-1)
    """Conversations in an optimizer step, over all devices; -1: as many as have about the tokens of a step of
    the model that training starts from."""
    packing: str = flag("padded", choices=("padded", "bestfit"))
    """How conversations fill rows. padded: one in each row. bestfit: several in each row of full length; they
    don't see each other. A step has the same conversations either way."""
    init_lr_frac: float = flag(0.02, 0)
    """Factor on all learning rates."""
    warmdown_ratio: float = flag(1.0, 0, 1)
    """Fraction of steps at the end spent cooling the learning rates down to 0."""
    momentum_warmup: int = flag(0, 0)
    """Steps in which Muon's momentum rises from 0.85 to 0.95; 0: it is 0.95 throughout."""
    load_optimizer: bool = False
    """Start with the optimizer state of the checkpoint that training starts from, if it has one."""
    eval_every: int = flag(100, -1, free=True)
    """Steps between measurements of the validation loss; 0 or -1: never."""
    eval_steps: int = flag(100, 1, free=True)
    """Size of the validation set that the loss is measured on, in batches of 4 conversations (100: 400)."""
    eval_metrics_every: int = flag(200, -1, free=True)
    """Steps between measurements of MMLU and ARC-Easy accuracy, by letter; 0 or -1: never."""
    eval_metrics_max_problems: int = flag(1024, 1, special=-1, free=True)
    """Problems of each of MMLU and ARC-Easy to measure on, at most; -1: all."""
    train_tasks: str = (
        "ARC-Easy/train,ARC-Challenge/train,GSM8K/train,SmolTalk/train:10000,identity,"
        "SimpleSpelling:300,SpellingBee:300"
    )
    """Training mixture: Name[/split][:rows] or .jsonl files, separated by commas."""
    val_tasks: str = flag("SmolTalk/test", free=True)
    """Validation mixture, written like --train_tasks."""

    @classmethod
    def given(cls, **flags):
        """Build the flags from those on a command line, the others by the recipe of its --recipe."""
        return cls(**(SFT_RECIPES.get(flags.get("recipe"), {}) | flags))


@dataclasses.dataclass(frozen=True)
class RLConfig(FinetuneConfig):
    """Improve a chat model by reinforcement learning: in each step it writes several answers to each of some
    problems, a checker rewards the right ones, and answers better than a problem's others become likelier.

    The defaults are nanochat's: REINFORCE with the group's mean as baseline, one update a step, no KL. Unlike
    there, the token that ends an answer is learnt too, and answers are sampled from all tokens (--top_k=0).
    """

    source: str = flag("sft", choices=STAGES["rl"].parents)
    """Stage whose checkpoint to start from: sft, mid or base."""
    num_epochs: float = flag(1.0, 0)
    """Passes over the problems."""
    num_iterations: int = flag(-1, 1, special=-1)
    """Number of times that answers are sampled; -1: from --num_epochs."""
    examples_per_step: int = flag(16, 1)
    """Problems in a step, over all devices."""
    num_samples: int = flag(16, 2)
    """Answers to each problem; at least 2, since they are compared with each other."""
    max_new_tokens: int = flag(256, 1)
    """Largest number of tokens in an answer, the tool's included."""
    temperature: float = flag(1.0, 0.001, HOTTEST)
    """Sampling temperature of the answers; at 0 all answers to a problem would be the same. Any value but 1
    samples from another distribution than the one that is trained."""
    top_k: int = flag(0, 0, 2**31 - 1)
    """Number of likeliest tokens to sample from; 0: all, as in the distribution that is trained."""
    reward: str = "answer"
    """What an answer is rewarded for, as name:weight separated by commas: answer (the checker finds it
    right), format (it states a number after ####), finished (it ends by itself), tool (a tool call had a
    value). If answer is among them, the others count only for problems with both right and wrong answers."""
    advantage: str = flag("mean", choices=("mean", "loo", "std", "batch_std"))
    """What a reward is compared with. mean: the mean of its problem's answers. loo: the mean of the others.
    std: as mean, divided by the problem's standard deviation. batch_std: as mean, divided by the step's."""
    loss: str = flag("reinforce", choices=("reinforce", "ppo", "cispo", "gspo"))
    """Policy-gradient loss. With --updates=1 all are the same, but gspo gives each answer equal weight."""
    loss_norm: str = flag("tokens", choices=("tokens", "all_tokens", "rows", "constant"))
    """What a step's loss is divided by. tokens: sampled tokens of problems with different rewards.
    all_tokens: all sampled tokens. rows: each answer has equal weight, as always with --loss=gspo. constant:
    answers × --max_new_tokens."""
    updates: int = flag(1, 1)
    """Optimizer steps on the same answers."""
    clip_low: float = flag(-1.0, 0, special=-1)
    """How far the probability ratio may fall below 1 before the loss stops lowering it, with --updates above
    1; -1: 0.2, or 0.0003 for gspo."""
    clip_high: float = flag(-1.0, 0, special=-1)
    """How far the probability ratio may rise above 1 before the loss stops raising it, with --updates above
    1; -1: 0.28, or 4 for cispo, 0.0004 for gspo."""
    tis: float = flag(0.0, 0)
    """Upper bound of the importance factor (probability by the trainer ÷ by the sampler), which corrects for
    different rounding; 0: no factor. 2 is usual. Costs a forward pass."""
    kl_coef: float = flag(0.0, 0)
    """Weight of the KL divergence from the model that training starts from. Costs forward passes of both."""
    mask_truncated: bool = False
    """Learn nothing from answers that were cut off; their rewards still count in their group's baseline."""
    min_groups: int = flag(2, 1)
    """Fewest problems with different rewards for a step to learn from; with fewer it changes no weight."""
    resample: bool = False
    """Draw further problems until --examples_per_step of them have answers with different rewards, at most
    three times."""
    device_batch_size: int = flag(8, 1, free=True)
    """Answers that a device trains on at a time. Lower it if memory runs out: the result stays the same up to
    rounding."""
    init_lr_frac: float = flag(0.05, 0)
    """Factor on all learning rates."""
    lr_schedule: str = flag("linear", choices=("linear", "cosine", "constant"))
    """Course of the learning rates: linear or cosine from full to 0, or constant."""
    grad_clip: float = flag(1.0, 0)
    """Largest global norm of the gradients, to which longer ones are scaled; 0: no bound."""
    eval_every: int = flag(60, -1, free=True)
    """Steps between evaluations; also before the first step and after the last. 0 or -1: never."""
    eval_examples: int = flag(400, 1, special=-1, free=True)
    """Problems of --val_tasks to evaluate on, a fixed sample, and half as many of --train_tasks; -1: all."""
    eval_others: int = flag(256, -1, free=True)
    """Problems of each of ARC-Easy, ARC-Challenge and MMLU to measure before the first step and after the
    last, which shows what is forgotten; tasks that are not there are left out. 0: none, -1: all."""
    sample_every: int = flag(20, -1, free=True)
    """Steps between writing a problem's answers, rewards and advantages to samples.jsonl; 0 or -1: never."""
    save_every: int = flag(60, -1, free=True)
    """Steps between checkpoints, besides those of --save_minutes; 0 or -1: none. The last step is always
    saved; the last three checkpoints are kept, and the best by evaluation."""
    train_tasks: str = "GSM8K/train"
    """Problems: Name[/split][:rows] or .jsonl files of conversations, separated by commas. An answer to
    a file's problem is right if its number after #### is that of the conversation's last message or, where
    some conversations of the file end without such a number, if its text is."""
    val_tasks: str = flag("GSM8K/test", free=True)
    """Problems to evaluate on, written like --train_tasks."""

    def __post_init__(self):
        super().__post_init__()
        if self.min_groups > self.examples_per_step:
            raise UserError(
                f"--min_groups={self.min_groups} is more than the {self.examples_per_step} problems of a "
                "step; lower it, or raise --examples_per_step"
            )
