"""Describe each stage of training as data: parent checkpoint, batches, length, schedule, metadata."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import grain
import jax.numpy as jnp
import optax

from jaxchat import sharding
from jaxchat.checkpoint import Found
from jaxchat.config import (
    BASE_RECIPES,
    DEVICE_CONVERSATIONS,
    DEVICE_ROWS,
    STAGES,
    BaseConfig,
    Compute,
    MidConfig,
    Model,
    ModelConfig,
    RLConfig,
    SFTConfig,
    TrainConfig,
    UserError,
    counted,
)
from jaxchat.data import pipelines
from jaxchat.data.encode import Reader, conversation_reader, text_reader
from jaxchat.data.order import Order
from jaxchat.data.sources import ParquetText, repeated
from jaxchat.data.tasks import Mixture
from jaxchat.model.flops import flops_per_token, num_params
from jaxchat.tokenizer import Tokenizer
from jaxchat.train.horizon import REFERENCE_DEPTH, Horizon, decay_2026, horizon_2026, momentum_2026, steps_for
from jaxchat.train.optimizer import MIXING_LR, SCALAR_LR, AdamW, Muon, make_optimizer, table_2025, table_2026
from jaxchat.train.schedule import cosine, lr_multiplier

LR_SCHEDULES = {
    "linear": partial(lr_multiplier, warmup_ratio=0.0, warmdown_ratio=1.0, final_lr_frac=0.0),
    "cosine": cosine,
    "constant": partial(lr_multiplier, warmup_ratio=0.0, warmdown_ratio=0.0, final_lr_frac=1.0),
}
RATES = ("matrix_lr", "embedding_lr", "unembedding_lr")  # flags of learning rates
SAMPLE = 256  # documents from whose lengths a plan estimates the tokens of all documents


def loss_text(values: dict[str, float]) -> str:
    return f"loss {values['loss']:.4f}"


class DataBatches:
    """Batches that are read from data, for all stages but RL, which has RolloutBatches (rl/batches.py).

    A batch holds this process's rows, {inputs, targets, weights[, segments]}, as arrays [A, B, T] with A
    micro-batches. Its entry `totals` counts what was read (data/streams.py).
    """

    alone = True  # each process makes its rows without the others

    def __init__(self, iterator: grain.DatasetIterator):
        self._iterator = iterator
        self.get_state, self.set_state, self.close = iterator.get_state, iterator.set_state, iterator.close

    def next_batch(self, params, step: int) -> dict:
        """Return the next batch, ignoring the arguments. Raise StopIteration if the data has ended."""
        return next(self._iterator)

    def peek(self) -> dict:
        """Return the next batch without consuming it."""
        state = self.get_state()
        batch = next(self._iterator)
        self.set_state(state)
        return batch


@dataclasses.dataclass(frozen=True)
class Stage:
    """All that the training loop needs to know about a stage of training (base, mid, sft or rl)."""

    name: str  # a key of config.STAGES
    tag: str
    flags: TrainConfig
    model: Model
    tokenizer: Tokenizer
    optimizer: optax.GradientTransformation
    batches: DataBatches  # or a class with the same methods
    device_batch: int  # rows that a device computes at a time
    row_length: int  # tokens per row of the longest batch
    num_steps: int | None  # None: one pass over num_documents
    num_documents: int
    schedule: Callable  # (progress, progress per step) -> learning-rate multiplier
    data: dict[str, str]  # fingerprints of the data
    plan: list[tuple[str, str]]  # rows of the plan that only this stage has
    parent: Found | None = None  # checkpoint to start from; None: random weights, by flags.seed
    warm: bool = False  # start with the parent's optimizer state
    keep_state: bool = True  # save optimizer and data position in the last checkpoint, too
    headline: Callable[[dict], str] = loss_text  # (a step's numbers) -> start of its printed line

    @property
    def title(self) -> str:
        return f"{STAGES[self.name].title} {self.tag}"

    @property
    def meta(self) -> dict:
        """Metadata of the stage's checkpoints, without the step and the chosen --remat."""
        return {
            "stage": self.name,
            "data": self.data,
            "parent": self.parent.name if self.parent else None,
            "model": dataclasses.asdict(self.model.config),
            "settings": self.flags.learnt_from(),
            "tokenizer_hash": self.tokenizer.hash,
            "device_batch_size": self.device_batch,
        }


def base(
    config: BaseConfig,
    tag: str,
    model: Model,
    tokenizer: Tokenizer,
    texts: ParquetText,
    held_out: ParquetText,
) -> Stage:
    horizon = horizon_of(config, model.config)
    config = dataclasses.replace(config, total_batch_size=horizon.batch)
    cut = Cut.of(config, config.max_seq_len, model)
    num_steps, tokens = horizon.steps, horizon.tokens
    flops = f"{tokens * flops_per_token(model.config):.3e} FLOPs"
    ratio = f"tokens : parameters = {tokens / num_params(model.config):.2f}"
    shards = f"{counted(len(texts), 'document')} in {counted(len(texts.paths), 'shard')}"
    shards += "; the last shard is for validation"
    warmup, warmdown, too_long = lr_phases(config, horizon)
    warnings = [repeated(texts.fingerprint, held_out.fingerprint), too_long]
    data_tokens = tokens_in(text_reader(texts, tokenizer), range(min(SAMPLE, len(texts))), len(texts))
    return Stage(
        name="base",
        tag=tag,
        flags=config,
        model=model,
        tokenizer=tokenizer,
        optimizer=optimizer_for(config, model, grad_clip=config.grad_clip, horizon=horizon),
        batches=DataBatches(
            pipelines.base_batches(
                texts,
                tokenizer,
                time=config.max_seq_len,
                seed=config.seed,
                packing=config.packing,
                **cut.pipeline_options(config, model),
            )
        ),
        device_batch=cut.device_batch,
        row_length=config.max_seq_len,
        num_steps=num_steps,
        num_documents=len(texts),
        schedule=partial(
            lr_multiplier,
            warmup_ratio=warmup,
            warmdown_ratio=warmdown,
            final_lr_frac=config.final_lr_frac,
        ),
        data=texts.fingerprint | held_out.fingerprint,
        plan=[
            cut.plan_row(config.max_seq_len, model),
            ("steps", f"{num_steps:,}; {tokens:,} tokens; {ratio}; {flops}"),
            *horizon.plan,
            ("data", shards),
            epochs_row(tokens, data_tokens),
            *(("WARNING", text) for text in warnings if text),
        ],
    )


def mid(config: MidConfig, model: Model, parent: Found, tasks: Mixture) -> Stage:
    time = row_length(config, model.config)
    cut = Cut.of(config, time, model)
    num_steps = config.num_iterations if config.num_iterations > 0 else None
    read, order = conversation_reader(tasks, parent.tokenizer), Order([len(tasks)], seed=0)
    sample = [order.index(i) for i in range(min(SAMPLE, len(tasks)))]
    data_tokens, batch = tokens_in(read, sample, len(tasks)), config.total_batch_size
    one_pass = f"one pass over the mixture: about {data_tokens / batch:,.0f} steps, {data_tokens:,.0f} tokens"
    plan = [
        parent_row(parent),
        cut.plan_row(time, model),
        ("steps", f"{num_steps:,}" if num_steps else one_pass),
        ("learning rates", f"× {config.init_lr_frac:g}"),
        data_row(tasks),
    ]
    if num_steps:
        plan.append(epochs_row(num_steps * batch, data_tokens))
    base_rows = parent.meta.get("device_batch_size", cut.device_batch)
    if config.device_batch_size > base_rows:
        more = f"--device_batch_size={config.device_batch_size} exceeds base training's {base_rows}"
        plan.append(("warning", f"{more}: memory may run out"))
    return Stage(
        **common_fields("mid", config, model, parent, tasks),
        plan=plan,
        optimizer=optimizer_for(config, model, init_lr_frac=config.init_lr_frac),
        batches=DataBatches(
            pipelines.mid_batches(
                tasks,
                parent.tokenizer,
                time=time,
                seed=config.seed,
                endless=num_steps is not None,
                **cut.pipeline_options(config, model),
            )
        ),
        device_batch=cut.device_batch,
        row_length=time,
        num_steps=num_steps,
        schedule=partial(lr_multiplier, warmup_ratio=0.0, warmdown_ratio=0.2, final_lr_frac=0.0),
    )


def sft(config: SFTConfig, model: Model, parent: Found, tasks: Mixture) -> Stage:
    time = row_length(config, model.config)
    devices, examples = sharding.data_shards(model.mesh), examples_of_step(config, parent, tasks, time)
    batch, micro = pipelines.cut_step(
        examples, devices, config.device_batch_size, DEVICE_CONVERSATIONS, fills=True
    )
    num_examples = round(config.num_epochs * len(tasks))
    if config.num_iterations > 0:
        num_examples = config.num_iterations * examples
    if num_examples < 1:
        given = f"--num_epochs={config.num_epochs:g} of {len(tasks)} conversations"
        raise UserError(f"{given} is less than one conversation; raise it to at least {1 / len(tasks):.1g}")
    all_rows = {"time": time, "seed": config.seed, "num_examples": num_examples}
    pipelines.check_supervised(tasks, parent.tokenizer, **all_rows)
    num_steps = -(-num_examples // examples)
    product = f"{counted(batch, 'row')} × {counted(devices, 'device')} × {micro} accumulated"
    product += "" if batch * devices * micro == examples else ", some empty,"
    repeated = "" if num_examples <= len(tasks) else f", {num_examples / len(tasks):.2g} epochs"
    warm = config.load_optimizer and has_state(parent)
    optimizer = "continues from the checkpoint's state" if warm else "fresh: the checkpoint holds no state"
    return Stage(
        **common_fields("sft", config, model, parent, tasks),
        optimizer=optimizer_for(
            config, model, init_lr_frac=config.init_lr_frac, momentum_warmup=config.momentum_warmup
        ),
        batches=DataBatches(
            pipelines.sft_batches(
                tasks,
                parent.tokenizer,
                examples=examples,
                micro_rows=batch * devices,
                **all_rows,
                packing=config.packing,
                share=sharding.share_of_rows(model.mesh, batch * devices),
            )
        ),
        device_batch=batch,
        row_length=time,
        num_steps=num_steps,
        schedule=partial(
            lr_multiplier, warmup_ratio=0.0, warmdown_ratio=config.warmdown_ratio, final_lr_frac=0.0
        ),
        plan=[
            parent_row(parent),
            ("batch", f"{product} = {examples} conversations a step, cut at {time} tokens, {config.packing}"),
            ("steps", f"{num_steps:,}: {num_examples:,} conversations{repeated}"),
            ("learning rates", f"× {config.init_lr_frac:g}"),
            *([("optimizer", optimizer)] if config.load_optimizer else []),
            data_row(tasks),
        ],
        warm=warm,
        keep_state=False,
    )


def rl(config: RLConfig, model: Model, parent: Found, tasks: Mixture, batches) -> Stage:
    """Return the Stage of reinforcement learning. batches: RolloutBatches (rl/batches.py)."""
    rollouts = int(config.num_epochs * len(tasks)) // config.examples_per_step
    if config.num_iterations > 0:
        rollouts = config.num_iterations
    if rollouts < 1:
        raise UserError(
            f"--num_epochs={config.num_epochs:g} of {len(tasks)} problems is less than one step of "
            f"{config.examples_per_step} problems; lower --examples_per_step"
        )
    num_steps = rollouts * config.updates
    seen = rollouts * config.examples_per_step
    updates = f", {config.updates} updates each" if config.updates > 1 else ""
    return Stage(
        **common_fields("rl", config, model, parent, tasks),
        optimizer=optimizer_for(
            config, model, grad_clip=config.grad_clip, init_lr_frac=config.init_lr_frac, momentum_warmup=0
        ),
        batches=batches,
        device_batch=config.device_batch_size,
        row_length=model.config.sequence_len,
        num_steps=num_steps,
        schedule=LR_SCHEDULES[config.lr_schedule],
        plan=[
            parent_row(parent),
            ("steps", f"{num_steps:,}{updates}: {seen:,} problems, {seen / len(tasks):.2g} epochs"),
            ("learning rates", f"× {config.init_lr_frac:g}, {config.lr_schedule}"),
            data_row(tasks),
            *batches.plan,
        ],
        keep_state=False,
        headline=reward_text,
    )


def base_model(config: BaseConfig, vocab_size: int) -> ModelConfig:
    heads = config.n_kv_head if config.n_kv_head > 0 else None
    shape = {"sequence_len": config.max_seq_len, "vocab_size": vocab_size, "n_kv_head": heads}
    model, table_dtype = ModelConfig.from_depth(config.depth, arch=config.arch, **shape), config.table_dtype
    if table_dtype == "auto":
        dtype = Compute.for_backend(config.dtype).dtype
        table_dtype = "float32" if model.plain else dtype
    return dataclasses.replace(model, table_dtype=table_dtype)


def horizon_of(config: BaseConfig, model: ModelConfig) -> Horizon:
    """Return the length of base training and the settings that depend on it, by the rules of --arch."""
    if not BASE_RECIPES[config.arch]:
        batch = config.total_batch_size
        return Horizon(steps_for(config, model, batch, num_params(model), "parameters")[0], batch)
    reference = ModelConfig.from_depth(
        REFERENCE_DEPTH, sequence_len=model.sequence_len, vocab_size=model.vocab_size, arch=config.arch
    )
    return horizon_2026(config, model, reference)


def lr_phases(config: BaseConfig, horizon: Horizon) -> tuple[float, float, str]:
    """Return the fractions of base training's steps spent on warmup and cooldown, and a warning or ""."""
    steps, warning = horizon.steps, ""
    warmup = config.warmup_steps / steps if config.warmup_steps else config.warmup_ratio
    warmdown = horizon.cooldown / steps if horizon.cooldown else config.warmdown_ratio
    if config.warmup_steps and (warmup + warmdown) * steps > steps + 1:  # 1: the cooldown was rounded
        effect = "they never reach their peak" if warmup > 1 else "they drop at once where warmup ends"
        warning = f"learning rates: warmup is {warmup:.0%} of the steps and cooldown {warmdown:.0%}"
        warning += f", so {effect}; lower --warmup_steps"
    return warmup, warmdown, warning


def with_horizon(config: BaseConfig, model: ModelConfig) -> BaseConfig:
    """Return the flags with --total_batch_size set to the batch size that horizon_of chooses."""
    return dataclasses.replace(config, total_batch_size=horizon_of(config, model).batch)


def common_fields(name: str, config: TrainConfig, model: Model, parent: Found, tasks: Mixture) -> dict:
    """Return {field: value} of the Stage fields that mid, sft and rl set in the same way."""
    return {
        "name": name,
        "tag": parent.tag,
        "flags": config,
        "model": model,
        "tokenizer": parent.tokenizer,
        "num_documents": len(tasks),
        "data": tasks.fingerprint,
        "parent": parent,
    }


def examples_of_step(config: SFTConfig, parent: Found, tasks: Mixture, time: int) -> int:
    """Return the number of conversations per SFT step: --target_examples_per_step.

    If that is -1, choose the number that gives about as many tokens per step as the parent's training had.
    time: tokens per row, to which longer conversations are cut.
    """
    if config.target_examples_per_step > 0:
        return config.target_examples_per_step
    settings = parent.meta.get("settings") or parent.meta.get("imported", {}).get("meta", {})
    tokens = settings.get("total_batch_size") or BaseConfig.total_batch_size
    order, count = Order([len(tasks)], seed=0), min(SAMPLE, len(tasks))
    read = conversation_reader(tasks, parent.tokenizer)(map(order.index, range(count)))
    mean = sum(min(len(ids), time + 1) for ids, _ in read) / count
    examples = max(1, round(tokens / mean))
    return examples // 32 * 32 or examples  # a multiple of 32 can be divided among devices


def has_state(found: Found) -> bool:
    """Return whether a checkpoint holds optimizer state besides the weights."""
    return (found.path / "optimizer").is_dir()


def reward_text(values: dict[str, float]) -> str:
    """Format a step's rewards, which RL prints in place of the loss."""
    return f"reward {values['reward']:.3f}  mixed groups {values['groups_mixed']:.0%}"


def optimizer_for(
    config: TrainConfig, model: Model, *, grad_clip: float = 0.0, **options
) -> optax.GradientTransformation:
    """Return the optimizer of a stage. options: further keyword arguments of table_for."""
    table, dtype = table_for(config, model.config, **options), jnp.dtype(model.compute.dtype)
    return make_optimizer(model.config, table=table, grad_clip=grad_clip, muon_dtype=dtype, mesh=model.mesh)


def table_for(
    config: TrainConfig,
    model: ModelConfig,
    *,
    init_lr_frac: float = 1.0,
    momentum_warmup: int = 300,
    horizon: Horizon | None = None,
) -> dict[str, Muon | AdamW]:
    """Return the optimizer's table, {group of weights: rule}: table_2025 if model.plain, else table_2026.

    init_lr_frac: factor on the learning rates of `config`.
    momentum_warmup: number of updates in which Muon's momentum rises from 0.85 to 0.95.
    horizon: settings of base training. They scale the learning rates and, in table_2026, set Muon's momentum
    and weight decay.
    """
    scale = init_lr_frac * (horizon.lr_scale if horizon else 1.0)
    rates = {name: getattr(config, name) * scale for name in RATES}
    old = table_2025(model, weight_decay=config.weight_decay, momentum_warmup=momentum_warmup, **rates)
    if model.plain:
        return old
    momentum, decay = old["matrix"].momentum, None
    if horizon:
        momentum = momentum_2026(horizon.steps, horizon.cooldown)
        decay = decay_2026(horizon.decay, horizon.steps)
    elif config.weight_decay:
        decay = optax.constant_schedule(config.weight_decay)
    mixing = {"scalar_lr": SCALAR_LR * scale, "mixing_lr": MIXING_LR * init_lr_frac}
    return table_2026(model, momentum=momentum, decay=decay, **rates, **mixing)


@dataclasses.dataclass(frozen=True)
class Cut:
    """How the rows of a training step are divided into micro-batches, in base training and midtraining."""

    rows: int  # rows per step
    device_batch: int
    micro_batches: int

    @classmethod
    def of(cls, config: BaseConfig | MidConfig, time: int, model: Model):
        rows = pipelines.rows_of_step(config.total_batch_size, time)
        devices = sharding.data_shards(model.mesh)
        return cls(rows, *pipelines.cut_step(rows, devices, config.device_batch_size, DEVICE_ROWS))

    def pipeline_options(self, config: BaseConfig | MidConfig, model: Model) -> dict:
        """Return keyword arguments that a data pipeline needs to read this process's rows of each step."""
        share = sharding.share_of_rows(model.mesh, self.rows // self.micro_batches)
        rows = {"rows": self.rows, "micro_batches": self.micro_batches, "share": share}
        return rows | {"workers": config.data_workers}

    def plan_row(self, time: int, model: Model) -> tuple[str, str]:
        devices = sharding.data_shards(model.mesh)
        product = f"{counted(self.device_batch, 'row')} × {counted(devices, 'device')}"
        product += f" × {self.micro_batches} accumulated"
        return "batch", f"{product} = {self.rows} rows × {time} = {self.rows * time:,} tokens a step"


def row_length(config: MidConfig | SFTConfig, model: ModelConfig) -> int:
    if config.max_seq_len > model.sequence_len:
        longest = f"the model's context of {model.sequence_len} tokens"
        raise UserError(f"--max_seq_len={config.max_seq_len} is longer than {longest}; lower it")
    return config.max_seq_len if config.max_seq_len > 0 else model.sequence_len


def tokens_in(read: Reader, sample: Sequence[int], num_documents: int) -> float:
    """Estimate the number of tokens in all documents from the documents with the indices `sample`."""
    lengths = [len(ids) for ids, _ in read(sample)]
    return sum(lengths) / len(lengths) * num_documents


def epochs_row(tokens: int, data_tokens: float) -> tuple[str, str]:
    """Return the plan's row (name, text) that compares the tokens to train on with those in the data."""
    epochs = tokens / data_tokens if data_tokens else math.inf
    passes = f"{epochs:.2g}" if epochs < 10 else f"{epochs:,.0f}"
    repeated = ": the data is repeated" if epochs > 1 else ""
    return "epochs", f"about {passes} passes over about {data_tokens:,.0f} tokens{repeated}"


def parent_row(parent: Found) -> tuple[str, str]:
    return "starts from", str(parent.path)


def data_row(tasks: Mixture) -> tuple[str, str]:
    counts = Counter(task.summary for task in tasks.tasks)  # a task may be listed several times
    parts = [f"{count} × {summary}" if count > 1 else summary for summary, count in counts.items()]
    return "data", f"{len(tasks):,} rows: {', '.join(parts)}"
