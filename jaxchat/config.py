"""Settings of jaxchat as frozen dataclasses: stages, models and the flags of trainers.

Each field of a flags class is a flag of a command, and the string below the field is the flag's help.
"""

import dataclasses
import math
import os
import re
from pathlib import Path
from typing import Any


class UserError(Exception):
    """Raised for an input that cannot be used. The message says in one line what is wrong and what to do.

    Commands print the message and exit with code 2.
    """


class Preempted(Exception):
    """Raised after a run was asked to stop and has saved a checkpoint.

    Commands print the message and exit with code 75.
    """


def base_dir() -> Path:
    """Return the directory in which jaxchat keeps all files: $JAXCHAT_BASE_DIR, or ~/.cache/jaxchat."""
    given = os.environ.get("JAXCHAT_BASE_DIR") or "~/.cache/jaxchat"
    check_local("JAXCHAT_BASE_DIR", given)
    check_folder("JAXCHAT_BASE_DIR", given)
    return user_path(given)


def user_path(given: str | Path) -> Path:
    """Expand a leading ~ in a path. Raise UserError if the home directory is unknown."""
    home = os.environ.get("HOME", "/")
    remedy = "set HOME, or JAXCHAT_BASE_DIR=FOLDER, or give absolute paths"
    if str(given).startswith("~") and not os.path.isabs(home):
        raise UserError(f"{given}: HOME={home!r} is not an absolute path; {remedy}")
    try:
        return Path(given).expanduser()
    except RuntimeError:
        raise UserError(f"{given}: no home directory is known here; {remedy}") from None


def no_platform() -> str:
    """Return the error message for a machine without devices of the kind that JAX_PLATFORMS names."""
    platforms = os.environ.get("JAX_PLATFORMS")
    return f"JAX_PLATFORMS={platforms}: no such device can be used here; unset it, or set JAX_PLATFORMS=cpu"


def check_folder(name: str, path: str):
    """Raise UserError if `path`, the value of the flag or variable `name`, is a file instead of a folder."""
    if os.path.isfile(user_path(path)):
        folder = Path(path).parent
        raise UserError(f"{name}={path} is a file; give a folder, such as the one it is in: {name}={folder}")


def check_utf8(name: str, path: str):
    """Raise UserError if `path`, the value of the flag or variable `name`, is not valid UTF-8."""
    if re.search("[\ud800-\udfff]", path):
        raise UserError(f"{name}={path!r} is not UTF-8; rename it, or set LC_ALL=C.UTF-8")


def check_local(name: str, paths: str):
    """Raise UserError if a path is an address such as gs://bucket/folder, or is not valid UTF-8.

    paths: one or more paths, separated by commas. name: the flag or variable that gave them.
    """
    check_utf8(name, paths)
    for path in paths.split(","):
        # One slash is enough: pathlib and shell completion drop the second, and dbfs:/ has only one. C:/ is
        # not an address.
        address = re.match(r"\s*([A-Za-z][\w+.-]+):/+([^/]*)", path)
        if address:
            mount = f"gcsfuse --implicit-dirs --rename-dir-limit=200000 {address[2] or 'BUCKET'} FOLDER"
            known = {"gs": f"mount it and give the folder: {mount}", "file": "give the path after it alone"}
            how = known.get(address[1].lower(), "mount it or copy it, and give the folder")
            raise UserError(f"{name}={path.strip()}: an address can't be used as a folder; {how}")


@dataclasses.dataclass(frozen=True)
class StageInfo:
    """A stage of training: its names in flags, folders, commands and reports, and where it starts from."""

    name: str  # in flags and metadata
    folder: str  # of its checkpoints, inside the base directory
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


# The constants of nanochat's model in November 2025 (the defaults of ModelConfig) and in July 2026.
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
    """Declare a numeric field of ModelConfig: a positive number up to `most`. zero: also allow 0."""
    return dataclasses.field(default=default, metadata={"zero": zero, "most": most})


def rounded_up(number: int, step: int) -> int:
    return -(-number // step) * step


def how_to_install(extra: str) -> str:
    """Return the command that installs one of the extras of pyproject.toml, for messages."""
    return f"make setup EXTRAS={extra}, or in the checkout: pip install -c constraints.txt -e '.[{extra}]'"


def counted(number: int, noun: str) -> str:
    """Format a number and a noun, as in "1 head" or "2 heads"."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and constants of a model, which checkpoints store. docs/architecture.md explains them.

    A new field's default must leave the computation unchanged, because older checkpoints lack the field.
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
    # One letter per layer, repeated as needed; the last layer is always "L". In "S" a query sees short_window
    # positions back, in "L" sequence_len. Without a pattern it sees all earlier positions.
    window_pattern: str = ""
    short_window: int = constant(0, zero=True)
    # Every other layer, including the last, adds a gated embedding of the token to its values.
    value_gate_channels: int = constant(0, zero=True)  # features that the gate reads; 0: no such embedding
    value_gate_bound: float = 2.0  # the gate is bound·sigmoid(…)
    layer_scales: bool = False  # a layer's input is a·x + b·(the token's embedding), with a and b learnt
    smear_channels: int = constant(0, zero=True)  # features that the previous token's gate reads; 0: no smear
    backout: bool = False  # subtract the middle layer's output, times a learnt number, from the last layer's
    vocab_multiple: int = 1  # pad tables and head from vocab_size to a multiple of this many rows
    table_dtype: str = "float32"  # stored dtype of token and value embeddings: float32 or bfloat16
    embedding_std: float = 1.0  # standard deviation of the initial token embeddings
    head_std: float = constant(0.0, zero=True)
    uniform_init: bool = False  # draw initial matrices from a uniform instead of a normal distribution
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
            heads = counted(self.n_head, "head")
            raise UserError(
                f"--n_kv_head={self.n_kv_head} does not divide the model's {heads}; give "
                f"a divisor of {self.n_head}"
            )

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
        """Return the configuration of a model with `depth` layers and width 64·depth.

        With arch "2026" the width is rounded up to a multiple of 128. There is one query head per 128 of
        width, or more if the head dimension would not be a multiple of 8.
        n_kv_head: number of key/value heads; None: as many as query heads.
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
        """Whether the model has only weights that exist in nanochat's architecture of November 2025."""
        return not (self.value_gate_channels or self.layer_scales or self.smear_channels or self.backout)

    @property
    def padded_vocab(self) -> int:
        """Vocabulary size with padding, as in the shapes of the embedding tables and the head."""
        return rounded_up(self.vocab_size, self.vocab_multiple)


def check_constant(field: dataclasses.Field, value):
    """Raise UserError unless `value` is valid for a field of ModelConfig."""
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


REMATS = ("none", "dots", "full")  # each is slower than the one before it, and needs less memory
ALL_REMATS = (*REMATS, "step")  # "step" is for several devices and micro-batches (model/parts.py)


def gpu_capability() -> float:
    """Return the CUDA compute capability of this process's first GPU, or 9.0 (Hopper) if it has none."""
    import jax  # here, so that reading a config never starts a backend

    return float(getattr(jax.local_devices()[0], "compute_capability", "9.0"))


@dataclasses.dataclass(frozen=True)
class Compute:
    """Execution options: they change speed and memory, and the results only by rounding (`matmul` coarsely).

    dtype: "float32" or "bfloat16", for activations and matrix products. Norms, softmax and loss stay float32.
    unroll: write the layers one after the other instead of looping over them (`lax.scan`). This compiles more
        slowly, but runs faster on GPUs and, with few layers, on CPUs.
    remat: what the backward pass recomputes: "none", "dots" (all but matrix products), "full" (all but each
        layer's input) or "step" (like "full", but each layer computes all micro-batches of a step before the
        next layer starts).
    parts: number of micro-batches that a layer computes in turn with remat="step". train_step sets it.
    attention: "xla", "blocks" (CPU), "splash" (TPU) or "cudnn" (GPU, bfloat16; "xla" for unsupported shapes).
    kernels: compute norms, rotary embedding and the loss's softmax with the GPU kernels of model/kernels.py.
    grad_dtype: dtype in which gradients of the layers' matrices are summed, also across devices: "float32" or
        "bfloat16".
    matmul: which of the layers' matrix products use float8 in training: "" (none), "fp8" (the MLP's) or
        "fp8-all".
    loss_chunk_tokens: maximum number of tokens per device whose logits exist at the same time.
    micro_tokens: maximum number of tokens per device that a training step computes at a time, but at least
        one row; 0: no limit.
    mesh: the jax.sharding.Mesh over which weights and batches are sharded; None: one device.
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
        """Return the default options for this machine's devices, or for `backend` ("cpu", "gpu" or "tpu").

        dtype, remat: "auto" means the default for the kind of device. changes: values of further options.
        """
        import jax  # here, so that reading a config never starts a backend

        backend = backend or jax.default_backend()
        if remat not in ("auto", *ALL_REMATS):
            raise UserError(f"--remat={remat}; it is auto or one of {', '.join(ALL_REMATS)}")
        if remat != "auto":
            changes["remat"] = remat
        if dtype == "auto":
            dtype = "float32" if backend == "cpu" else "bfloat16"
        if backend == "cpu":  # the fastest options on CPUs, measured in dev/LOG.md
            chosen = {"unroll": True, "attention": "blocks", "micro_tokens": 1024}
        else:
            kernel = {"gpu": "cudnn" if dtype == "bfloat16" else "xla", "tpu": "splash"}.get(backend, "xla")
            chosen = {"remat": "dots", "attention": kernel, "loss_chunk_tokens": 4096}
            if backend == "gpu":  # a loop would copy all activations to and from stacks over the layers
                chosen |= {"unroll": True, "kernels": gpu_capability() >= 8, "loss_chunk_tokens": 8192}
        return cls(**(chosen | {"dtype": dtype} | changes))


@dataclasses.dataclass(frozen=True)
class Model:
    """A model's configuration and execution options, which together determine its compiled programs."""

    config: ModelConfig
    compute: Compute

    @property
    def mesh(self):
        return self.compute.mesh

    def without_fp8(self) -> "Model":
        """Return this model without float8 matrix products, for evaluation and generation."""
        return dataclasses.replace(self, compute=dataclasses.replace(self.compute, matmul=""))


DEVICE_ROWS, DEVICE_CONVERSATIONS = 32, 4  # largest choices of --device_batch_size=-1; the latter for SFT
MOST_TOKENS = 2**24  # largest vocabulary size
HOTTEST = 100.0  # highest sampling temperature, at which all tokens are about equally likely
EVAL_BATCH = 4  # conversations per batch of --eval_steps


def flag(
    default, least=None, most=math.inf, *, special=None, choices=(), free=False, own=False, alias="", name=""
):
    """Declare a field of a flags class and the values that it can have.

    least, most: inclusive bounds of a number. special: one more value that is allowed.
    choices: all allowed values of a string.
    free: a resumed run may change the value, because it does not affect what is learnt.
    own: each process of a run may have its own value. Implies `free`.
    alias: a short form, such as "-p". name: the flag's name, if it is not the field's.
    """
    metadata = {"least": least, "most": most, "special": special, "choices": choices, "free": free or own}
    return dataclasses.field(default=default, metadata=metadata | {"own": own, "alias": alias, "name": name})


@dataclasses.dataclass(frozen=True)
class Flags:
    """Base class of all flags classes. Raises UserError if a value is outside the limits of its field."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, m = getattr(self, field.name), field.metadata
            if not m:  # declared without flag(): any value is allowed
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
        """Return {name: value} of the flags that affect what is learnt, which a resumed run cannot change."""
        return self._but("free")

    def shared(self) -> dict:
        """Return {name: value} of the flags that must be the same in all processes of a run."""
        return self._but("own")

    def _but(self, kind: str) -> dict:
        fields = dataclasses.fields(self)
        return {field.name: getattr(self, field.name) for field in fields if not field.metadata.get(kind)}


@dataclasses.dataclass(frozen=True)
class DeviceFlags(Flags):
    """Device flags"""

    mesh = matmul = ""  # flags of the subclasses below
    remat = "auto"
    device_type: str = flag("", choices=("", "cpu", "cuda", "tpu"), free=True)
    """Kind of device to compute on: "cpu", "cuda" or "tpu"; empty: the best kind found."""
    dtype: str = flag("auto", choices=("auto", "float32", "bfloat16"))
    """Number format of activations and matrix products; "auto": float32 on a CPU, bfloat16 elsewhere.
    Checkpoints keep weights in float32, except embedding tables that --table_dtype keeps in bfloat16."""


@dataclasses.dataclass(frozen=True)
class MeshFlags(DeviceFlags):
    """Flags for several devices and processes"""

    mesh: str = flag("", free=True)
    """Sizes of the mesh's axes, as in data=-1,fsdp=1,tensor=1 (-1: all remaining devices). Along data, each
    device holds all weights; along fsdp, a shard of every weight; along tensor, each computes a part of every
    layer. Empty: data=-1 and, except on CPUs, fsdp=8 (or 4, 2 or 1, to divide the number of devices)."""
    coordinator: str = flag("", own=True)
    """Address of process 0, as HOST:PORT; empty: as given by Slurm, Open MPI, a JobSet or the TPU host."""
    num_processes: int = flag(0, 0, free=True)
    """Number of processes in the run; 0: as given by the launcher, or else 1."""
    process_id: int = flag(-1, -1, own=True)
    """Index of this process, counted from 0; -1: as given by the launcher."""
    heartbeat_timeout: int = flag(100, 2, free=True)
    """Seconds without a heartbeat after which a process counts as lost and all processes end."""


@dataclasses.dataclass(frozen=True)
class TrainConfig(MeshFlags):
    """Flags shared by all trainers"""

    run: str = flag("dummy", own=True)
    """Name of the run in Weights & Biases; "dummy": log nothing there."""
    matmul: str = flag("", choices=("", "fp8", "fp8-all"))
    """Use float8 in the layers' matrix products in training, on GPUs such as H100: "fp8" (in the MLP) or
    "fp8-all" (in all of them); empty: no. Evaluations don't use it, but print how it changes the loss."""
    remat: str = flag("auto", free=True)
    """What the backward pass recomputes to save memory: "none", "dots" (all but the results of matrix
    products) or "full" (everything within a layer). Each needs less memory and more time than the one before.
    "step": like "full", but gradients are summed over devices once a step, not once a micro-batch. "auto":
    "none" on a CPU, elsewhere the fastest that fits in memory; a resumed run keeps its earlier choice."""
    seed: int = flag(0, 0, 2**32 - 1)
    """Random seed of the initial weights, the order of the data and the answers that RL samples."""
    embedding_lr: float = flag(0.2, 0)
    """AdamW learning rate of the token embedding, multiplied by (n_embd/768)^-0.5."""
    unembedding_lr: float = flag(0.004, 0)
    """AdamW learning rate of the output head, multiplied by (n_embd/768)^-0.5."""
    matrix_lr: float = flag(0.02, 0)
    """Muon learning rate of the matrices in the layers."""
    weight_decay: float = flag(0.0, 0)
    """AdamW weight decay of the embedding and the head. For models of --arch=2026, it is instead Muon's
    weight decay of the layers' matrices."""
    save_every: int = flag(-1, -1, free=True)
    """Steps between checkpoints, in addition to those of --save_minutes; 0 or -1: save only by
    --save_minutes. The last step is always saved, and the last three checkpoints are kept."""
    save_minutes: float = flag(30.0, 0, free=True)
    """Minutes between checkpoints; 0: save only by --save_every."""
    resume: bool = flag(False, free=True)
    """Continue from the latest checkpoint of this stage and --model_tag, or start from step 0 if there is
    none. The result equals that of an uninterrupted run, exactly on CPUs and up to rounding on GPUs."""
    overwrite: bool = flag(False, free=True)
    """Delete all checkpoints of this stage and --model_tag, and start from step 0."""
    dry_run: bool = flag(False, free=True)
    """Train without writing checkpoints, metrics or samples."""
    tensorboard: bool = flag(False, free=True)
    """Also write TensorBoard event files beside the checkpoints."""
    on_nonfinite: str = flag("stop", choices=("stop", "skip"), free=True)
    """What to do when a loss or a gradient is not finite: "stop" the run, or "skip" the step's update."""
    data_workers: int = flag(0, 0, own=True)
    """Number of tokenizing subprocesses per trainer process; 0: tokenize in threads of the trainer."""

    def __post_init__(self):
        super().__post_init__()
        for one, other, why in (
            ("resume", "overwrite", "one continues from the checkpoints, the other deletes them"),
            ("resume", "dry_run", "a dry run always starts from step 0"),
        ):
            if getattr(self, one) and getattr(self, other):
                raise UserError(f"--{one} and --{other} contradict each other: {why}; leave one out")


# Defaults of base_train's flags by --arch, where they differ from the defaults of the fields.
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
    """Architecture, optimizer and recipe: nanochat's of November 2025 ("2025") or of July 2026 ("2026").
    "2026" changes these defaults: --embedding_lr=0.3 --unembedding_lr=0.008 --weight_decay=0.28 (Muon's)
    --target_param_data_ratio=12 --total_batch_size=-1 --grad_clip=0 --warmup_steps=40 --warmdown_ratio=0.65
    --final_lr_frac=0.05 --eval_tokens=41943040. Learning rates and weight decay are multiplied by the square
    root of (tokens per step ÷ 524288), and the weight decay also by the number of weights at depth 12 ÷ that
    of this model."""
    depth: int = flag(20, 1)
    """Number of layers. The model's width is 64 × depth, with --arch=2026 rounded up to a multiple of 128."""
    n_kv_head: int = flag(-1, 1, special=-1)
    """Number of key/value heads, which must divide the number of query heads; -1: as many as query heads."""
    max_seq_len: int = flag(2048, 1)
    """Tokens in a training row, and the model's context length."""
    num_iterations: int = flag(-1, 1, special=-1)
    """Number of optimizer steps; -1: set by --target_flops, or else by --target_param_data_ratio."""
    target_flops: float = flag(-1.0, 0, special=-1)
    """Total floating-point operations of training; -1: set by --target_param_data_ratio."""
    target_param_data_ratio: float = flag(20.0, 0, special=-1)
    """Number of training tokens per model parameter (Chinchilla: 20); -1: unused, so --num_iterations or
    --target_flops must be given. With --arch=2026, only the weights of the layers' matrices and of the output
    head are counted as parameters."""
    device_batch_size: int = flag(-1, 1, special=-1, free=True)
    """Rows per device and micro-batch; -1: the largest divisor, up to 32, of the device's rows per step.
    Lower it if memory runs out: the result stays the same up to rounding."""
    total_batch_size: int = flag(524288, 1, 2**31 - 1, special=-1)
    """Tokens per optimizer step, over all devices; -1 (only with --arch=2026): set by the model's size."""
    grad_clip: float = flag(1.0, 0)
    """Maximum global norm of the gradients; larger gradients are scaled down to it. 0: no clipping."""
    warmup_ratio: float = flag(0.0, 0, 1)
    """Fraction of steps spent warming the learning rates up from 0."""
    warmup_steps: int = flag(0, 0)
    """Number of steps spent warming the learning rates up from 0; 0: set by --warmup_ratio."""
    warmdown_ratio: float = flag(0.2, 0, 1)
    """Fraction of steps, at the end, in which the learning rates fall to --final_lr_frac."""
    final_lr_frac: float = flag(0.0, 0)
    """Final learning rates, as a fraction of the peak."""
    eval_every: int = flag(250, -1, free=True)
    """Steps between measurements of bits per byte on the validation shard; 0 or -1: never."""
    eval_tokens: int = flag(20 * 524288, 1, free=True)
    """Number of validation tokens to measure bits per byte on."""
    core_metric_every: int = flag(2000, -1, free=True)
    """Steps between measurements of the CORE metric, if there is an --eval_bundle; 0 or -1: never."""
    core_metric_max_per_task: int = flag(500, 1, special=-1, free=True)
    """Maximum number of examples per CORE task to measure on; -1: all."""
    eval_bundle: str = flag("", own=True)
    """Folder or zip file of the CORE tasks; empty: eval_bundle or eval_bundle.zip in the base directory."""
    sample_every: int = flag(2000, -1, free=True)
    """Steps between samples: the model's continuations of seven prompts are printed. 0 or -1: never."""
    model_tag: str = flag("", free=True)
    """Name of the checkpoint folder; empty: d<depth>."""
    data_dir: str = flag("", own=True)
    """Folder of parquet shards with a column `text`; empty: <base directory>/base_data. The last shard in it
    is for validation."""
    table_dtype: str = flag("auto", choices=("auto", "float32", "bfloat16"), free=True)
    """Number format of the embedding tables and their optimizer state; "auto": bfloat16 with --arch=2026 if
    activations are bfloat16, else float32."""
    packing: str = flag("stream", choices=("stream", "bos_bestfit", "nanochat"))
    """How documents fill rows. "stream": documents are concatenated and cut into rows, and nothing is
    dropped. "bos_bestfit": each row begins with a document, few documents are cut, the cut-off ends are
    dropped, and documents in a row don't attend to each other. "nanochat": like "bos_bestfit", but documents
    in a row attend to each other, and the longest that fits is chosen from 1,000 documents instead of 64."""

    @classmethod
    def given(cls, **flags):
        """Build the config from given flags. Other flags have the defaults of the given --arch."""
        return cls(**(BASE_RECIPES.get(flags.get("arch"), {}) | flags))

    def __post_init__(self):
        super().__post_init__()
        if self.total_batch_size < 0 and not BASE_RECIPES[self.arch]:
            raise UserError(f"--total_batch_size=-1 needs --arch=2026; with --arch={self.arch} give a number")
        if self.warmup_ratio + self.warmdown_ratio > 1 + 1e-9:  # 0.1 + 0.9 may be rounded up
            raise UserError(
                f"--warmup_ratio={self.warmup_ratio:g} and --warmdown_ratio={self.warmdown_ratio:g} are "
                f"{self.warmup_ratio + self.warmdown_ratio:g} together; lower one: the sum must be at most 1"
            )


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(TrainConfig):
    """Flags for trainers that start from a checkpoint"""

    model_tag: str = flag("", free=True)
    """Name of the checkpoint folder, for the starting model and the result; empty: the d<N> with the largest
    N, or else the newest folder."""
    step: int = flag(-1, -1, free=True)
    """Step of the checkpoint to start from; -1: the last."""
    tasks_dir: str = flag("", own=True)
    """Folder of the task files; empty: <base directory>/tasks."""


@dataclasses.dataclass(frozen=True)
class MidConfig(FinetuneConfig):
    """Train a base model on conversations that teach the chat format, multiple choice and tool use."""

    num_iterations: int = flag(-1, 1, special=-1)
    """Number of optimizer steps; -1: one pass over the mixture."""
    max_seq_len: int = flag(-1, 1, special=-1)
    """Tokens in a training row; -1: the model's context length."""
    device_batch_size: int = flag(-1, 1, special=-1, free=True)
    """Rows per device and micro-batch; -1: the largest divisor, up to 32, of the device's rows per step.
    Lower it if memory runs out: the result stays the same up to rounding."""
    total_batch_size: int = flag(524288, 1, 2**31 - 1)
    """Tokens per optimizer step, over all devices."""
    init_lr_frac: float = flag(1.0, 0)
    """Factor that multiplies all learning rates."""
    eval_every: int = flag(150, -1, free=True)
    """Steps between measurements of bits per byte on the validation mixture; 0 or -1: never."""
    eval_tokens: int = flag(20 * 524288, 1, free=True)
    """Number of validation tokens to measure bits per byte on."""
    train_tasks: str = (
        "SmolTalk/train,MMLU/auxiliary_train,GSM8K/train,identity,identity,SimpleSpelling/train:200000,"
        "SpellingBee/train:80000"
    )
    """Tasks of the training mixture: Name[/split][:rows] or .jsonl files, separated by commas."""
    val_tasks: str = flag("SmolTalk/test,MMLU/test:5200,GSM8K/test:420", free=True)
    """Validation mixture, written like --train_tasks."""


# Defaults of chat_sft's flags by --recipe. "2026" starts from a base model and also learns mid_train's data.
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
    """Finetune a model on conversations, learning only the assistant's tokens."""

    recipe: str = flag("2025", choices=tuple(SFT_RECIPES))
    """Recipe: nanochat's of November 2025 ("2025") or of July 2026 ("2026"). "2026" changes these defaults:
    --source=base --embedding_lr=0.3 --unembedding_lr=0.008 --packing=bestfit --target_examples_per_step=-1
    --init_lr_frac=0.8 --warmdown_ratio=0.5 --momentum_warmup=300 --load_optimizer. Its --train_tasks are
    SmolTalk once, MMLU three times and GSM8K four times, and its --val_tasks are those of mid_train."""
    source: str = flag("mid", choices=STAGES["sft"].parents)
    """Stage whose checkpoint to start from: mid or base."""
    num_epochs: float = flag(1.0, 0)
    """Passes over the training mixture."""
    num_iterations: int = flag(-1, 1, special=-1)
    """Number of optimizer steps; -1: set by --num_epochs."""
    max_seq_len: int = flag(-1, 1, special=-1)
    """Maximum number of tokens of a conversation; longer ones are cut. -1: the model's context length."""
    device_batch_size: int = flag(-1, 1, special=-1, free=True)
    """Rows per device and micro-batch; -1: chosen automatically, at most 4. A row has one conversation, or
    several if they are packed. Lower it if memory runs out: the result stays the same up to rounding."""
    target_examples_per_step: int = flag(32, 1, special=-1)
    """Conversations in an optimizer step, over all devices; -1: chosen so that a step has about as many
    tokens as a step of the run that made the starting checkpoint."""
    packing: str = flag("padded", choices=("padded", "bestfit"))
    """How conversations fill rows. "padded": one conversation per row. "bestfit": several conversations,
    which don't attend to each other, per full-length row. Steps have the same conversations either way."""
    init_lr_frac: float = flag(0.02, 0)
    """Factor that multiplies all learning rates."""
    warmdown_ratio: float = flag(1.0, 0, 1)
    """Fraction of steps at the end spent cooling the learning rates down to 0."""
    momentum_warmup: int = flag(0, 0)
    """Number of steps in which Muon's momentum rises from 0.85 to 0.95; 0: it is always 0.95."""
    load_optimizer: bool = False
    """Load the optimizer state of the starting checkpoint, if it has one."""
    eval_every: int = flag(100, -1, free=True)
    """Steps between measurements of the validation loss; 0 or -1: never."""
    eval_steps: int = flag(100, 1, free=True)
    """Number of batches of 4 conversations to measure the validation loss on."""
    eval_metrics_every: int = flag(200, -1, free=True)
    """Steps between measurements of accuracy on MMLU and ARC-Easy (multiple choice); 0 or -1: never."""
    eval_metrics_max_problems: int = flag(1024, 1, special=-1, free=True)
    """Maximum number of problems per task (MMLU, ARC-Easy) to measure on; -1: all."""
    train_tasks: str = (
        "ARC-Easy/train,ARC-Challenge/train,GSM8K/train,SmolTalk/train:10000,identity,"
        "SimpleSpelling:300,SpellingBee:300"
    )
    """Tasks of the training mixture: Name[/split][:rows] or .jsonl files, separated by commas."""
    val_tasks: str = flag("SmolTalk/test", free=True)
    """Validation mixture, written like --train_tasks."""

    @classmethod
    def given(cls, **flags):
        """Build the config from given flags. Other flags have the defaults of the given --recipe."""
        return cls(**(SFT_RECIPES.get(flags.get("recipe"), {}) | flags))


@dataclasses.dataclass(frozen=True)
class RLConfig(FinetuneConfig):
    """Improve a chat model by reinforcement learning: each step samples several answers to each of several
    problems, a checker rewards right answers, and training makes answers with higher rewards likelier.

    The defaults are nanochat's: REINFORCE with the mean reward of a problem's answers as baseline, one update
    per step, no KL term. But jaxchat also trains the token that ends an answer, and samples from all tokens.
    """

    source: str = flag("sft", choices=STAGES["rl"].parents)
    """Stage whose checkpoint to start from: sft, mid or base."""
    num_epochs: float = flag(1.0, 0)
    """Passes over the training problems."""
    num_iterations: int = flag(-1, 1, special=-1)
    """Number of rollouts (rounds of sampling), each with --updates optimizer steps; -1: by --num_epochs."""
    examples_per_step: int = flag(16, 1)
    """Number of problems in a rollout, over all devices."""
    num_samples: int = flag(16, 2)
    """Number of answers to each problem, at least 2."""
    max_new_tokens: int = flag(256, 1)
    """Maximum number of tokens in an answer, including tool output."""
    temperature: float = flag(1.0, 0.001, HOTTEST)
    """Sampling temperature of the answers. With any value but 1, answers are sampled from a different
    distribution than the one that is trained."""
    top_k: int = flag(0, 0, 2**31 - 1)
    """Number of likeliest tokens to sample from; 0: all."""
    reward: str = "answer"
    """What an answer is rewarded for, as name:weight, separated by commas: "answer" (it is right), "format"
    (it has a number after ####), "finished" (it ends by itself), "tool" (a tool call returned a value). With
    "answer", the others count only for problems that have both right and wrong answers."""
    advantage: str = flag("mean", choices=("mean", "loo", "std", "batch_std"))
    """How advantages are computed from rewards. "mean": reward minus the mean reward of the problem's
    answers. "loo": reward minus the mean reward of the problem's other answers. "std": like "mean", divided
    by the standard deviation of the problem's rewards. "batch_std": like "mean", divided by the standard
    deviation of all rewards in the step."""
    loss: str = flag("reinforce", choices=("reinforce", "ppo", "cispo", "gspo"))
    """Policy-gradient loss. With --updates=1 all have equal gradients; "gspo" implies --loss_norm=rows."""
    loss_norm: str = flag("tokens", choices=("tokens", "all_tokens", "rows", "constant"))
    """How the loss is averaged. "tokens": over the sampled tokens of problems whose answers differ in reward.
    "all_tokens": over all sampled tokens. "rows": over each answer's tokens, then over the answers to
    problems whose answers differ in reward; --loss=gspo always uses this. "constant": the sum is divided by
    the number of answers × --max_new_tokens."""
    updates: int = flag(1, 1)
    """Number of optimizer steps on the answers of a rollout."""
    clip_low: float = flag(-1.0, 0, special=-1)
    """How far the probability ratio of new to old policy may fall below 1 before the loss is clipped, with
    --updates above 1 and --loss=ppo or gspo; -1: 0.2, or 0.0003 for gspo."""
    clip_high: float = flag(-1.0, 0, special=-1)
    """How far the probability ratio of new to old policy may rise above 1 before the loss is clipped, with
    --updates above 1 and --loss=ppo, cispo or gspo; -1: 0.28, or 4 for cispo, or 0.0004 for gspo."""
    tis: float = flag(0.0, 0)
    """Upper bound of importance weights (probability in the trainer ÷ probability in the sampler), which
    correct for differences in rounding; 0: no importance weights. 2 is usual. Costs a forward pass."""
    kl_coef: float = flag(0.0, 0)
    """Weight of the KL divergence from the starting model; 0: none. Costs forward passes of both models."""
    mask_truncated: bool = False
    """Learn nothing from answers that were cut off. Their rewards still count in the baseline."""
    min_groups: int = flag(2, 1)
    """Minimum number of problems in a rollout whose answers differ in reward; else nothing is learnt."""
    resample: bool = False
    """Draw more problems, at most three times, until --examples_per_step problems have answers that differ in
    reward."""
    device_batch_size: int = flag(8, 1, free=True)
    """Answers per device and micro-batch. Lower it if memory runs out: results stay equal up to rounding."""
    init_lr_frac: float = flag(0.05, 0)
    """Factor that multiplies all learning rates."""
    lr_schedule: str = flag("linear", choices=("linear", "cosine", "constant"))
    """Schedule of the learning rates: "linear" or "cosine" decay to 0, or "constant"."""
    grad_clip: float = flag(1.0, 0)
    """Maximum global norm of the gradients; larger gradients are scaled down to it. 0: no clipping."""
    eval_every: int = flag(60, -1, free=True)
    """Steps between evaluations, which also run before the first step and after the last; 0 or -1: never."""
    eval_examples: int = flag(400, 1, special=-1, free=True)
    """Number of problems of --val_tasks in an evaluation, always the same ones; -1: all. Half as many
    problems of --train_tasks are evaluated too."""
    eval_others: int = flag(256, -1, free=True)
    """Number of problems of each of ARC-Easy, ARC-Challenge and MMLU to evaluate on before and after
    training, to show what is forgotten; 0: none; -1: all. Tasks missing or trained on are skipped."""
    sample_every: int = flag(20, -1, free=True)
    """Rollouts between records of one problem's answers and rewards in samples.jsonl; 0 or -1: no records."""
    save_every: int = flag(60, -1, free=True)
    """Steps between checkpoints, in addition to those of --save_minutes; 0 or -1: save only by
    --save_minutes. The last three checkpoints and the best by evaluation are kept."""
    train_tasks: str = "GSM8K/train"
    """Training problems: Name[/split][:rows] or .jsonl files of conversations, separated by commas. An answer
    to a problem of a file is right if its number after #### equals that of the conversation's last message.
    If any conversation of the file has no such number, the texts are compared instead."""
    val_tasks: str = flag("GSM8K/test", free=True)
    """Validation problems, written like --train_tasks."""

    def __post_init__(self):
        super().__post_init__()
        if self.min_groups > self.examples_per_step:
            raise UserError(
                f"--min_groups={self.min_groups} is more than the {self.examples_per_step} problems of a "
                "step; lower it, or raise --examples_per_step"
            )
