"""The three stages as data: where each starts, what it reads, how long, by which schedule, and what it saves."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import grain
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxchat import checkpoint, sharding
from jaxchat.checkpoint import Checkpoints, Found
from jaxchat.config import BaseConfig, Compute, MidConfig, ModelConfig, SFTConfig, TrainConfig, UserError, base_dir
from jaxchat.data import pipelines
from jaxchat.data.sources import ParquetText, find_shards
from jaxchat.model.flops import flops_per_token, num_params
from jaxchat.tokenizer import Tokenizer
from jaxchat.train.loop import Stage
from jaxchat.train.optimizer import make_optimizer
from jaxchat.train.schedule import lr_multiplier
from jaxchat.train.state import TrainState, abstract_state, init_state, state_from_params
from jaxchat.train.step import make_train_step

# These change what is shown or measured, or how it is computed, but not what is learnt: a resumed run may differ in them.
FREE_ON_RESUME = (
    "run device_type dtype save_every resume overwrite tensorboard device_batch_size eval_every eval_tokens eval_steps "
    "core_metric_every sample_every eval_metrics_every eval_metrics_max_problems val_tasks data_dir tasks_dir dry_run "
    "step model_tag"
).split()


@dataclasses.dataclass(frozen=True)
class Setting:
    """What evaluators need to know of the run they belong to."""

    model: ModelConfig
    compute: Compute
    tokenizer: Tokenizer
    mesh: Mesh


def start_devices(config: TrainConfig) -> Mesh:
    """Choose the kind of device and put all there are on a mesh."""
    if config.device_type:
        if config.device_type not in ("cpu", "cuda", "tpu"):
            raise UserError(f"--device_type={config.device_type}; it is cpu, cuda or tpu")
        jax.config.update("jax_platforms", config.device_type)
    if config.dtype not in ("auto", "float32", "bfloat16"):
        raise UserError(f"--dtype={config.dtype}; it is auto, float32 or bfloat16")
    try:
        return sharding.make_mesh()
    except RuntimeError as problem:
        raise UserError(f"no {config.device_type} device can be used: {str(problem).splitlines()[0]}") from problem


def compute_for(config: TrainConfig, mesh: Mesh) -> Compute:
    return Compute.for_backend(config.dtype, data_shards=sharding.data_shards(mesh))


def optimizer_for(config: TrainConfig, model: ModelConfig, compute: Compute, grad_clip: float = 0.0, frac: float = 1.0):
    return make_optimizer(
        model,
        matrix_lr=config.matrix_lr * frac,
        embedding_lr=config.embedding_lr * frac,
        unembedding_lr=config.unembedding_lr * frac,
        weight_decay=config.weight_decay,
        grad_clip=grad_clip,
        muon_dtype=jnp.dtype(compute.dtype),
    )


def run_folder(config: TrainConfig, source: str, tag: str, meta: dict) -> tuple[Checkpoints, int]:
    """(the run's checkpoints, the step to go on from: 0 for a new run); refuses what would be lost or would not fit."""
    checkpoints = Checkpoints(base_dir() / checkpoint.FOLDERS[source] / tag)
    steps = checkpoints.steps()
    if not steps:
        return checkpoints, 0
    if not config.resume:
        if not config.overwrite:
            raise UserError(
                f"{checkpoints.folder} has checkpoints up to step {steps[-1]}; "
                "go on with --resume, choose another --model_tag, or delete them with --overwrite"
            )
        return checkpoints, 0
    saved = checkpoints.meta(steps[-1])
    for what in ("model", "settings", "data", "tokenizer_hash", "parent"):
        if saved.get(what) != meta.get(what):
            raise UserError(f"--resume: {checkpoints.folder} was trained with another {what}: {difference(saved, meta, what)}")
    return checkpoints, steps[-1]


def difference(saved: dict, meta: dict, what: str) -> str:
    """The first entries that differ, as "name=then (now …)"."""
    then, now = saved.get(what), meta.get(what)
    if not (isinstance(then, dict) and isinstance(now, dict)):
        return f"{then} (now {now})"
    return ", ".join(f"{k}={then.get(k)} (now {now.get(k)})" for k in {**then, **now} if then.get(k) != now.get(k))


def settings(config: TrainConfig) -> dict:
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE_ON_RESUME}


def starter(
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    batches: grain.DatasetIterator,
    checkpoints: Checkpoints | None,
    resume_step: int,
    fresh: Callable[[], TrainState],
) -> Callable[[], TrainState]:
    """Make the state to begin with: the resumed one, with the batches set to where it was, or a fresh one."""

    def start() -> TrainState:
        if resume_step:
            target = abstract_state(model, optimizer, mesh)
            rest = {"step": target.step, "empty_steps": target.empty_steps, "opt_state": target.opt_state}
            params, rest = checkpoints.restore(resume_step, params=target.params, optimizer=rest, batches=batches)
            return TrainState(params=params, **rest)
        state = fresh()
        if checkpoints:
            checkpoints.delete_all()  # with --overwrite; nothing is there otherwise
        return state

    return start


def plan_rows(model: ModelConfig, mesh: Mesh, compute: Compute, rest: list[tuple[str, str]]) -> list[tuple[str, str]]:
    heads = f"{model.n_head} heads ({model.n_kv_head} key/value) × {model.head_dim}"
    shape = f"{model.n_layer} layers × {model.n_embd}, {heads}, vocabulary {model.vocab_size:,}"
    return [
        ("model", shape),
        ("parameters", f"{num_params(model):,}; {flops_per_token(model):,} FLOPs a token"),
        ("devices", f"{sharding.describe(mesh)}, compute in {compute.dtype}"),
        *rest,
    ]


def batch_row(rows: int, time: int, micro: int, per_device: int, devices: int) -> tuple[str, str]:
    text = f"{per_device} rows × {devices} devices × {micro} accumulated = {rows} rows × {time} = {rows * time:,} tokens a step"
    return "batch", text


def rows_for(config: BaseConfig | MidConfig, time: int, mesh: Mesh) -> tuple[int, int]:
    """(rows of an optimizer step, micro-batches)."""
    shards = sharding.data_shards(mesh)
    if config.device_batch_size < 1:
        raise UserError(f"--device_batch_size={config.device_batch_size}; it must be at least 1")
    unit = f"tokens = {config.device_batch_size} × {shards} rows of {time}"
    per_micro = config.device_batch_size * shards * time
    micro = pipelines.micro_batches(config.total_batch_size, per_micro, "total_batch_size", unit)
    return config.total_batch_size // time, micro


def base(config: BaseConfig) -> tuple[Stage, Setting]:
    mesh = start_devices(config)
    tokenizer = Tokenizer.load()
    texts = ParquetText(find_shards(config.data_dir, "train"))
    kv_heads = config.n_kv_head if config.n_kv_head > 0 else None
    time = config.max_seq_len
    model = ModelConfig.from_depth(config.depth, sequence_len=time, vocab_size=tokenizer.vocab_size, n_kv_head=kv_heads)
    compute = compute_for(config, mesh)
    rows, micro = rows_for(config, time, mesh)
    num_steps = base_steps(config, model)
    tokens = num_steps * config.total_batch_size
    tag = config.model_tag or f"d{config.depth}"
    meta = {
        "stage": "base",
        "model": dataclasses.asdict(model),
        "settings": settings(config),
        "data": texts.fingerprint,
        "tokenizer_hash": tokenizer.hash,
        "device_batch_size": config.device_batch_size,
    }
    checkpoints, resume_step = run_folder(config, "base", tag, meta)
    batches = pipelines.base_batches(texts, tokenizer, rows=rows, micro_batches=micro, time=time, seed=config.seed)
    optimizer = optimizer_for(config, model, compute, config.grad_clip)
    plan = plan_rows(model, mesh, compute, [
        batch_row(rows, time, micro, config.device_batch_size, sharding.data_shards(mesh)),
        ("steps", f"{num_steps:,}, from {resume_step:,}; {tokens:,} tokens; tokens : parameters = "
                  f"{tokens / num_params(model):.2f}; {tokens * flops_per_token(model):.3e} FLOPs"),
        ("data", f"{len(texts):,} documents in {len(texts.paths)} shards, the last shard is for validation"),
        ("CORE", "no evaluator in this version"),
        saves(checkpoints, config),
    ])  # fmt: skip
    schedule = partial(
        lr_multiplier,
        warmup_ratio=config.warmup_ratio,
        warmdown_ratio=config.warmdown_ratio,
        final_lr_frac=config.final_lr_frac,
    )
    fresh = partial(init_state, config.seed, model, optimizer, mesh)
    stage = Stage(
        title=f"Base pretraining of {tag}",
        plan=plan,
        model=model,
        mesh=mesh,
        start=starter(model, optimizer, mesh, batches, checkpoints, resume_step, fresh),
        step_fn=make_train_step(model, compute, optimizer, mesh),
        batches=batches,
        num_steps=num_steps,
        lr_multiplier=schedule,
        meta=meta,
        checkpoints=checkpoints,
        save_every=config.save_every,
        keep_state=True,
        resume_step=resume_step,
        run=config.run,
        tensorboard=config.tensorboard,
    )
    return stage, Setting(model, compute, tokenizer, mesh)


def base_steps(config: BaseConfig, model: ModelConfig) -> int:
    """The first given of num_iterations, target_flops, target_param_data_ratio; in steps."""
    if config.num_iterations > 0:
        return config.num_iterations
    if config.target_flops > 0:
        steps = round(config.target_flops / (flops_per_token(model) * config.total_batch_size))
        given = f"--target_flops={config.target_flops:g}"
    elif config.target_param_data_ratio > 0:
        steps = int(config.target_param_data_ratio * num_params(model)) // config.total_batch_size
        given = f"--target_param_data_ratio={config.target_param_data_ratio:g}"
    else:
        raise UserError("how long to train? give --num_iterations, --target_flops or --target_param_data_ratio")
    if steps < 1:
        raise UserError(f"{given} is less than one step of {config.total_batch_size:,} tokens; lower --total_batch_size")
    return steps


def saves(checkpoints: Checkpoints | None, config: Any) -> tuple[str, str]:
    if checkpoints is None:
        return "saves", "nothing (dry run)"
    every = f", every {config.save_every:,} steps" if config.save_every > 0 else ""
    return "saves", f"{checkpoints.folder}/<step>{every}"


def row_length(config: MidConfig | SFTConfig, model: ModelConfig) -> int:
    if config.max_seq_len > model.sequence_len:
        raise UserError(f"--max_seq_len={config.max_seq_len} is longer than the model's {model.sequence_len}; lower it")
    return config.max_seq_len if config.max_seq_len > 0 else model.sequence_len


def continued(config, source: str, found: Found, tasks, mesh: Mesh, optimizer, compute, batches, **special) -> Stage:
    """The parts of a stage that starts from another's checkpoint."""
    meta = special.pop("meta") | {
        "model": dataclasses.asdict(found.config),
        "settings": settings(config),
        "data": tasks.fingerprint,
        "tokenizer_hash": found.tokenizer.hash,
        "parent": f"{found.meta['stage']} {found.folder.name} {found.step}",
        "device_batch_size": config.device_batch_size,
    }
    checkpoints, resume_step = (None, 0) if config.dry_run else run_folder(config, source, found.folder.name, meta)

    def fresh() -> TrainState:
        return state_from_params(found.load(mesh), found.config, optimizer, mesh)

    started = ("starts from", f"{found.folder / str(found.step)}")
    data = ("data", f"{len(tasks):,} rows: " + ", ".join(f"{task.name} {len(task):,}" for task in tasks.tasks))
    rest = [started, *special.pop("plan"), data, saves(checkpoints, config)]
    return Stage(
        plan=plan_rows(found.config, mesh, compute, rest),
        model=found.config,
        mesh=mesh,
        start=starter(found.config, optimizer, mesh, batches, checkpoints, resume_step, fresh),
        step_fn=make_train_step(found.config, compute, optimizer, mesh),
        batches=batches,
        meta=meta,
        checkpoints=checkpoints,
        save_every=config.save_every,
        resume_step=resume_step,
        run=config.run,
        tensorboard=config.tensorboard,
        **special,
    )


def mid(config: MidConfig) -> tuple[Stage, Setting]:
    mesh = start_devices(config)
    found = checkpoint.open_model("base", config.model_tag, config.step)
    compute, time = compute_for(config, mesh), row_length(config, found.config)
    tasks = pipelines.load_tasks(config.train_tasks, config.tasks_dir, "train_tasks", documents=True)
    rows, micro = rows_for(config, time, mesh)
    num_steps = config.num_iterations if config.num_iterations > 0 else None
    optimizer = optimizer_for(config, found.config, compute, frac=config.init_lr_frac)
    batches = pipelines.mid_batches(
        tasks, found.tokenizer, rows=rows, micro_batches=micro, time=time, seed=config.seed, endless=bool(num_steps)
    )
    plan = [
        batch_row(rows, time, micro, config.device_batch_size, sharding.data_shards(mesh)),
        ("steps", f"{num_steps:,}" if num_steps else "one pass over the mixture"),
        ("learning rates", f"× {config.init_lr_frac:g}"),
    ]
    if config.device_batch_size > (base_rows := found.meta.get("device_batch_size", config.device_batch_size)):
        plan.append(("warning", f"device_batch_size {config.device_batch_size} exceeds base's {base_rows}: memory may run out"))
    stage = continued(
        config,
        "mid",
        found,
        tasks,
        mesh,
        optimizer,
        compute,
        batches,
        title=f"Midtraining of {found.folder.name}",
        plan=plan,
        meta={"stage": "mid"},
        num_steps=num_steps,
        lr_multiplier=partial(lr_multiplier, warmup_ratio=0.0, warmdown_ratio=0.2, final_lr_frac=0.0),
        keep_state=True,
    )
    return stage, Setting(found.config, compute, found.tokenizer, mesh)


def sft(config: SFTConfig) -> tuple[Stage, Setting]:
    mesh = start_devices(config)
    if config.source not in ("mid", "base"):
        raise UserError(f"--source={config.source}; it is mid or base")
    found = checkpoint.open_model(config.source, config.model_tag, config.step)
    compute, time = compute_for(config, mesh), row_length(config, found.config)
    tasks = pipelines.load_tasks(config.train_tasks, config.tasks_dir, "train_tasks", documents=False)
    shards, examples = sharding.data_shards(mesh), config.target_examples_per_step
    unit = f"conversations = {config.device_batch_size} × {shards}"
    micro = pipelines.micro_batches(examples, config.device_batch_size * shards, "target_examples_per_step", unit)
    num_examples = round(config.num_epochs * len(tasks))
    if config.num_iterations > 0:
        num_examples = config.num_iterations * examples
    if num_examples < 1:
        raise UserError(f"--num_epochs={config.num_epochs:g} of {len(tasks)} conversations is less than one")
    num_steps = -(-num_examples // examples)
    optimizer = optimizer_for(config, found.config, compute, frac=config.init_lr_frac)
    batches = pipelines.sft_batches(
        tasks,
        found.tokenizer,
        examples=examples,
        micro_batches=micro,
        time=time,
        seed=config.seed,
        num_examples=num_examples,
    )
    per_step = f"{config.device_batch_size} rows × {shards} devices × {micro} accumulated = {examples} conversations a step"
    plan = [
        ("batch", f"{per_step}, cut at {time} tokens"),
        ("steps", f"{num_steps:,}: {num_examples:,} conversations"),
        ("learning rates", f"× {config.init_lr_frac:g}"),
    ]
    stage = continued(
        config,
        "sft",
        found,
        tasks,
        mesh,
        optimizer,
        compute,
        batches,
        title=f"Chat finetuning of {found.folder.name}",
        plan=plan,
        meta={"stage": "sft"},
        num_steps=num_steps,
        lr_multiplier=partial(lr_multiplier, warmup_ratio=0.0, warmdown_ratio=1.0, final_lr_frac=0.0),
        keep_state=False,
    )
    return stage, Setting(found.config, compute, found.tokenizer, mesh)

