"""The three stages as data: where each starts, what it reads, how long, by which schedule, and what it saves."""

from functools import partial

from jax.sharding import Mesh

from jaxchat import checkpoint, sharding
from jaxchat.checkpoint import Found
from jaxchat.config import BaseConfig, MidConfig, ModelConfig, SFTConfig, UserError
from jaxchat.data import pipelines
from jaxchat.data.encode import conversation_reader
from jaxchat.data.order import Order
from jaxchat.data.sources import ParquetText, find_shards
from jaxchat.data.tasks import Mixture
from jaxchat.model.flops import flops_per_token, num_params
from jaxchat.tokenizer import Tokenizer
from jaxchat.train.loop import Stage
from jaxchat.train.run import Setting, batch_row, compute_for, make_stage, optimizer_for, start_devices
from jaxchat.train.schedule import lr_multiplier
from jaxchat.train.state import init_state, state_from_params


def base(config: BaseConfig) -> tuple[Stage, Setting]:
    mesh = start_devices(config)
    tag = config.model_tag or f"d{config.depth}"
    own = checkpoint.run_folder("base", tag) / "tokenizer"
    tokenizer = Tokenizer.load(own if config.resume and own.is_dir() else None)
    texts = ParquetText(find_shards(config.data_dir, "train", whole=True))
    validation = ParquetText(find_shards(config.data_dir, "val"))
    time = config.max_seq_len
    model = ModelConfig.from_depth(
        config.depth,
        sequence_len=time,
        vocab_size=tokenizer.vocab_size,
        n_kv_head=config.n_kv_head if config.n_kv_head > 0 else None,
    )
    setting = Setting(model, compute_for(config, mesh), tokenizer, mesh)
    rows, micro = rows_for(config, time, mesh)
    num_steps = base_steps(config, model)
    tokens = num_steps * config.total_batch_size
    optimizer = optimizer_for(config, setting, grad_clip=config.grad_clip)
    batches = pipelines.base_batches(
        texts, tokenizer, time=time, seed=config.seed, packing=config.packing, **share_of(config, rows, micro, mesh)
    )

    def plan(resume_step: int) -> list[tuple[str, str]]:
        begun = f", from {resume_step:,}" if resume_step else ""
        ratio = f"tokens : parameters = {tokens / num_params(model):.2f}"
        return [
            batch_row(rows, time, micro, config.device_batch_size, mesh),
            ("steps", f"{num_steps:,}{begun}; {tokens:,} tokens; {ratio}; {tokens * flops_per_token(model):.3e} FLOPs"),
            ("data", f"{len(texts):,} documents in {len(texts.paths)} shards; the last shard is for validation"),
        ]

    stage = make_stage(
        config,
        setting,
        source="base",
        tag=tag,
        title=f"Base pretraining of {tag}",
        meta={"stage": "base", "data": texts.fingerprint | validation.fingerprint},
        plan=plan,
        optimizer=optimizer,
        batches=batches,
        fresh=partial(init_state, config.seed, model, optimizer, mesh),
        row_length=time,
        num_steps=num_steps,
        num_documents=len(texts),
        lr_multiplier=partial(
            lr_multiplier,
            warmup_ratio=config.warmup_ratio,
            warmdown_ratio=config.warmdown_ratio,
            final_lr_frac=config.final_lr_frac,
        ),
        keep_state=True,
    )
    return stage, setting


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
        batch = f"one step of {config.total_batch_size:,} tokens"
        raise UserError(f"{given} is less than {batch}; lower --total_batch_size")
    return steps


def mid(config: MidConfig) -> tuple[Stage, Setting]:
    mesh = start_devices(config)
    found = checkpoint.open_model("base", config.model_tag, config.step)
    setting = Setting(found.config, compute_for(config, mesh), found.tokenizer, mesh)
    time = row_length(config, found.config)
    tasks = pipelines.load_tasks(config.train_tasks, config.tasks_dir, "train_tasks", documents=True)
    rows, micro = rows_for(config, time, mesh)
    num_steps = config.num_iterations if config.num_iterations > 0 else None
    optimizer = optimizer_for(config, setting, init_lr_frac=config.init_lr_frac)
    batches = pipelines.mid_batches(
        tasks,
        found.tokenizer,
        time=time,
        seed=config.seed,
        endless=num_steps is not None,
        **share_of(config, rows, micro, mesh),
    )

    def plan(resume_step: int) -> list[tuple[str, str]]:
        begun = f", from {resume_step:,}" if resume_step else ""
        told = [
            parent_row(found),
            batch_row(rows, time, micro, config.device_batch_size, mesh),
            ("steps", (f"{num_steps:,}" if num_steps else one_pass(tasks, found.tokenizer, rows * time)) + begun),
            ("learning rates", f"× {config.init_lr_frac:g}"),
            data_row(tasks),
        ]
        base_rows = found.meta.get("device_batch_size", config.device_batch_size)
        if config.device_batch_size > base_rows:
            more = f"device_batch_size {config.device_batch_size} exceeds base's {base_rows}"
            told.append(("warning", f"{more}: memory may run out"))
        return told

    stage = make_stage(
        config,
        setting,
        source="mid",
        tag=found.folder.name,
        title=f"Midtraining of {found.folder.name}",
        meta={"stage": "mid", "data": tasks.fingerprint, "parent": found.name},
        plan=plan,
        optimizer=optimizer,
        batches=batches,
        fresh=lambda: state_from_params(found.load(mesh), found.config, optimizer, mesh),
        dry_run=config.dry_run,
        row_length=time,
        num_steps=num_steps,
        num_documents=len(tasks),
        lr_multiplier=partial(lr_multiplier, warmup_ratio=0.0, warmdown_ratio=0.2, final_lr_frac=0.0),
        keep_state=True,
    )
    return stage, setting


def sft(config: SFTConfig) -> tuple[Stage, Setting]:
    mesh = start_devices(config)
    if config.source not in ("mid", "base"):
        raise UserError(f"--source={config.source}; it is mid or base")
    found = checkpoint.open_model(config.source, config.model_tag, config.step)
    setting = Setting(found.config, compute_for(config, mesh), found.tokenizer, mesh)
    time = row_length(config, found.config)
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
    optimizer = optimizer_for(config, setting, init_lr_frac=config.init_lr_frac)
    batches = pipelines.sft_batches(
        tasks,
        found.tokenizer,
        examples=examples,
        micro_rows=examples // micro,
        time=time,
        seed=config.seed,
        num_examples=num_examples,
        packing=config.packing,
        share=sharding.share_of_rows(mesh, examples // micro),
    )

    def plan(resume_step: int) -> list[tuple[str, str]]:
        begun = f", from {resume_step:,}" if resume_step else ""
        product = f"{config.device_batch_size} rows × {shards} devices × {micro} accumulated"
        return [
            parent_row(found),
            ("batch", f"{product} = {examples} conversations a step, cut at {time} tokens, {config.packing}"),
            ("steps", f"{num_steps:,}{begun}: {num_examples:,} conversations"),
            ("learning rates", f"× {config.init_lr_frac:g}"),
            data_row(tasks),
        ]

    stage = make_stage(
        config,
        setting,
        source="sft",
        tag=found.folder.name,
        title=f"Chat finetuning of {found.folder.name}",
        meta={"stage": "sft", "data": tasks.fingerprint, "parent": found.name},
        plan=plan,
        optimizer=optimizer,
        batches=batches,
        fresh=lambda: state_from_params(found.load(mesh), found.config, optimizer, mesh),
        dry_run=config.dry_run,
        row_length=time,
        num_steps=num_steps,
        num_documents=len(tasks),
        lr_multiplier=partial(lr_multiplier, warmup_ratio=0.0, warmdown_ratio=1.0, final_lr_frac=0.0),
        keep_state=False,
    )
    return stage, setting


def rows_for(config: BaseConfig | MidConfig, time: int, mesh: Mesh) -> tuple[int, int]:
    """(rows of an optimizer step, micro-batches)."""
    shards = sharding.data_shards(mesh)
    unit = f"tokens = {config.device_batch_size} × {shards} rows of {time}"
    per_micro = config.device_batch_size * shards * time
    micro = pipelines.micro_batches(config.total_batch_size, per_micro, "total_batch_size", unit)
    return config.total_batch_size // time, micro


def share_of(config: BaseConfig | MidConfig, rows: int, micro: int, mesh: Mesh) -> dict:
    """What of each step this process makes, and by how many workers."""
    share = sharding.share_of_rows(mesh, rows // micro)
    return {"rows": rows, "micro_batches": micro, "share": share, "workers": config.data_workers}


def row_length(config: MidConfig | SFTConfig, model: ModelConfig) -> int:
    if config.max_seq_len > model.sequence_len:
        raise UserError(f"--max_seq_len={config.max_seq_len} is longer than the model's {model.sequence_len}; lower it")
    return config.max_seq_len if config.max_seq_len > 0 else model.sequence_len


def one_pass(tasks: Mixture, tokenizer: Tokenizer, tokens_per_step: int, sample: int = 512) -> str:
    """How many steps one pass is, as far as the lengths of `sample` rows tell."""
    order = Order([len(tasks)], seed=0)
    rows = list(conversation_reader(tasks, tokenizer)(order.index(i) for i in range(min(sample, len(tasks)))))
    tokens = sum(len(ids) for ids, _ in rows) / len(rows) * len(tasks)
    return f"one pass over the mixture: about {tokens / tokens_per_step:,.0f} of about {tokens:,.0f} tokens in all"


def parent_row(found: Found) -> tuple[str, str]:
    return "starts from", str(found.folder / str(found.step))


def data_row(tasks: Mixture) -> tuple[str, str]:
    return "data", f"{len(tasks):,} rows: " + ", ".join(task.summary for task in tasks.tasks)
