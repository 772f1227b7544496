"""What the stages share: the devices, a run's folder, what a plan tells, and putting a Stage together."""

import dataclasses
from collections.abc import Callable

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxchat import checkpoint, hosts, sharding
from jaxchat.config import REMATS, Compute, ModelConfig, TrainConfig, UserError
from jaxchat.model.attention import kernel_for
from jaxchat.model.flops import flops_per_token, num_params
from jaxchat.store import Checkpoints
from jaxchat.tokenizer import Tokenizer
from jaxchat.train import fit
from jaxchat.train.loop import Stage, place_batch
from jaxchat.train.optimizer import make_optimizer
from jaxchat.train.state import TrainState, abstract_state, state_from_params
from jaxchat.train.step import make_train_step

# These change what is shown, measured or kept, or how many rows are computed at a time, but not what is learnt: a
# resumed run may differ in them.
FREE_ON_RESUME = (
    *("run", "device_type", "save_every", "resume", "overwrite", "tensorboard", "dry_run", "model_tag", "step"),
    *("eval_every", "eval_tokens", "eval_steps", "eval_metrics_every", "eval_metrics_max_problems", "sample_every"),
    *("core_metric_every", "val_tasks", "data_dir", "tasks_dir", "device_batch_size", "data_workers", "remat"),
    *("on_nonfinite", "core_metric_max_per_task", "eval_bundle", "mesh"),
    *("coordinator", "num_processes", "process_id", "heartbeat_timeout"),
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a run computes with; its evaluators use it too."""

    model: ModelConfig
    compute: Compute
    tokenizer: Tokenizer
    mesh: Mesh

    def __post_init__(self):
        sharding.check_fits(self.model, self.mesh)


def start_devices(config: TrainConfig, asks: bool = True) -> Mesh:
    """Choose the kind of device, connect with the other processes, put all devices on a mesh. asks: see hosts.start."""
    if config.device_type:
        if config.device_type not in ("cpu", "cuda", "tpu"):
            raise UserError(f"--device_type={config.device_type}; it is cpu, cuda or tpu")
        jax.config.update("jax_platforms", config.device_type)
    if config.dtype not in ("auto", "float32", "bfloat16"):
        raise UserError(f"--dtype={config.dtype}; it is auto, float32 or bfloat16")
    if config.on_nonfinite not in ("stop", "skip"):
        raise UserError(f"--on_nonfinite={config.on_nonfinite}; it is stop or skip")
    for name in ("device_batch_size", "seed", "eval_tokens", "eval_steps", "data_workers"):
        value, least = getattr(config, name, 1), 0 if name in ("seed", "data_workers") else 1
        if value < least:
            raise UserError(f"--{name}={value}; it must be at least {least}")
    for name in ("warmup_ratio", "warmdown_ratio"):
        if not 0 <= getattr(config, name, 0.0) <= 1:
            raise UserError(f"--{name}={getattr(config, name)}; it must be from 0 to 1")
    sharding.keep_compiled()
    sharding.take_memory()
    hosts.start(config, asks=asks)
    try:
        return sharding.make_mesh(axes=config.mesh)
    except (RuntimeError, AssertionError) as problem:  # which of them depends on what is installed
        kind = config.device_type or "such"
        raise UserError(
            f"no {kind} device can be used here; install jaxchat's extra for it (cuda12, cuda13, tpu), or give "
            "--device_type=cpu"
        ) from problem


def compute_for(config: TrainConfig, mesh: Mesh) -> Compute:
    return Compute.for_backend(config.dtype, remat=config.remat, mesh=mesh)


def optimizer_for(
    config: TrainConfig, setting: Setting, *, grad_clip: float = 0.0, init_lr_frac: float = 1.0
) -> optax.GradientTransformation:
    return make_optimizer(
        setting.model,
        matrix_lr=config.matrix_lr * init_lr_frac,
        embedding_lr=config.embedding_lr * init_lr_frac,
        unembedding_lr=config.unembedding_lr * init_lr_frac,
        weight_decay=config.weight_decay,
        grad_clip=grad_clip,
        muon_dtype=jnp.dtype(setting.compute.dtype),
        mesh=setting.mesh,
    )


def open_run(config: TrainConfig, source: str, tag: str, meta: dict) -> tuple[Checkpoints, int]:
    """(the run's checkpoints, the step to go on from: 0 for a new run); refuses what would be lost or would not fit."""
    checkpoints = Checkpoints(checkpoint.run_folder(source, tag))
    steps = sharding.gather_json({"steps": checkpoints.steps()})[0]["steps"]  # as the first process sees it
    if not steps:
        return checkpoints, 0
    if not config.resume:
        if not config.overwrite:
            raise UserError(
                f"{checkpoints.folder} has checkpoints up to step {steps[-1]}; "
                "go on with --resume, choose another --model_tag, or delete them with --overwrite"
            )
        return checkpoints, 0
    last = checkpoint.whole_steps(checkpoints.folder)[-1:] if jax.process_index() == 0 else []
    last = sharding.gather_json({"last": last})[0]["last"]
    if not last:
        raise UserError(
            f"--resume: all checkpoints in {checkpoints.folder} are damaged; start anew with --overwrite, or choose "
            "another --model_tag"
        )
    saved = checkpoints.meta(last[0])
    if "imported" in saved:
        raise UserError(
            f"--resume: {checkpoints.folder} was imported, without an optimizer; it can be midtrained or tuned"
        )
    # A setting or constant that did not exist when the checkpoint was written had what is its default now.
    saved["model"] = dataclasses.asdict(ModelConfig(**saved["model"]))
    saved["settings"] = {k: saved["settings"].get(k, default) for k, default in settings(type(config)()).items()}
    for what in ("model", "settings", "data", "tokenizer_hash", "parent"):
        if saved.get(what) != meta.get(what):
            change = difference(saved.get(what), meta.get(what))
            raise UserError(
                f"--resume: {checkpoints.folder} was trained with different {what}: {change}; give what it was trained "
                "with, or another --model_tag for a new run"
            )
    return checkpoints, last[0]


def settings(config: TrainConfig) -> dict:
    """What a run has learnt from, of its flags."""
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE_ON_RESUME}


def difference(then, now) -> str:
    """The entries that differ, as "name=then (now …)"."""
    if not (isinstance(then, dict) and isinstance(now, dict)):
        return f"{then} (now {now})"
    return ", ".join(f"{k}={then.get(k)} (now {now.get(k)})" for k in {**then, **now} if then.get(k) != now.get(k))


def batch_row(rows: int, time: int, micro: int, per_device: int, mesh: Mesh) -> tuple[str, str]:
    devices = sharding.data_shards(mesh)
    product = f"{per_device} rows × {devices} devices × {micro} accumulated = {rows} rows"
    return "batch", f"{product} × {time} = {rows * time:,} tokens a step"


def starter(
    setting: Setting,
    optimizer: optax.GradientTransformation,
    batches: grain.DatasetIterator,
    checkpoints: Checkpoints | None,
    resume_step: int,
    fresh: Callable[[], TrainState],
    choose_step: Callable[[dict], None],
    overwrite: bool,
    num_steps: int | None,
) -> Callable[[], TrainState]:
    """Make the state to begin with: the resumed one, with the batches set to where it was, or a fresh one.

    choose_step is called with a batch first: nothing has been deleted or written by then, and no state is in memory.
    """

    steps_seen = checkpoints.steps() if checkpoints else []

    def look():
        """Data that cannot be read and steps that are too large are told now."""
        began = batches.get_state()
        first = next(batches)
        if not int(sharding.agree(first["totals"], setting.mesh).get("targets", 1)):
            raise UserError("all documents are empty; give data that holds text")
        choose_step(place_batch(first, setting.mesh))
        batches.set_state(began)

    def finished_state(target: TrainState) -> TrainState:
        """Of a checkpoint that holds weights only: it must be the last of its run."""
        if resume_step != num_steps:
            raise UserError(
                f"--resume: {checkpoints.folder / str(resume_step)} holds weights only, so training can't go on from "
                "it; start anew with --overwrite"
            )
        params, _ = checkpoints.restore(resume_step, params=target.params, optimizer=None, batches=None)
        return state_from_params(params, setting.model, optimizer, setting.mesh)

    def start() -> TrainState:
        if not resume_step or fit.device_memory(setting.mesh):
            look()
        if resume_step:
            target = abstract_state(setting.model, optimizer, setting.mesh)
            checkpoints.lock(steps_seen)
            if not checkpoints.has_state(resume_step):
                return finished_state(target)
            rest = {"step": target.step, "empty_steps": target.empty_steps, "opt_state": target.opt_state}
            params, rest = checkpoints.restore(resume_step, params=target.params, optimizer=rest, batches=batches)
            return TrainState(params=params, **rest)
        state = fresh()
        if checkpoints:
            checkpoints.lock(steps_seen)
            if overwrite:
                checkpoints.delete_all()
            checkpoints.keep_tokenizer(setting.tokenizer)
        return state

    return start


def make_stage(
    config: TrainConfig,
    setting: Setting,
    *,
    source: str,
    tag: str,
    meta: dict,
    plan: Callable[[int], list[tuple[str, str]]],
    optimizer: optax.GradientTransformation,
    batches: grain.DatasetIterator,
    fresh: Callable[[], TrainState],
    keep_state: bool,
    row_length: int,
    dry_run: bool = False,
    **special,
) -> Stage:
    """A Stage from what is its own: where it starts (fresh), its batches, its schedule.

    source: the name of its checkpoints' folder in checkpoint.FOLDERS; plan: of the step to go on from, what this stage
    tells beside model and devices; row_length: of the longest batch; special: fields of Stage that are its own only.
    """
    meta = meta | {
        "model": dataclasses.asdict(setting.model),
        "settings": settings(config),
        "tokenizer_hash": setting.tokenizer.hash,
        "device_batch_size": config.device_batch_size,
    }
    checkpoints, resume_step = (None, 0) if dry_run else open_run(config, source, tag, meta)
    model, compute = setting.model, setting.compute
    remats = [compute.remat]
    if config.remat == "auto" and fit.device_memory(setting.mesh):
        # A resumed run goes on as it began, to the bit; before it was written down, that was the default.
        first = checkpoints.meta(resume_step).get("remat", compute.remat) if resume_step else REMATS[0]
        remats = REMATS[REMATS.index(first) :]
    steps = {
        remat: make_train_step(model, dataclasses.replace(compute, remat=remat), optimizer, setting.mesh)
        for remat in remats
    }
    meta["remat"] = remats[0]

    def choose_step(batch: dict):
        longest = {
            name: jax.ShapeDtypeStruct((*a.shape[:-1], row_length), a.dtype, sharding=a.sharding)
            for name, a in batch.items()
        }
        args = (abstract_state(model, optimizer, setting.mesh), longest, np.float32(1.0))
        meta["remat"] = fit.first_that_fits(steps, setting.mesh, *args)

    heads = f"{model.n_head} heads ({model.n_kv_head} key/value) × {model.head_dim}"
    attention = f"attention by {kernel_for(compute.attention, model.head_dim, row_length)}"
    every = f", every {config.save_every:,} steps" if config.save_every > 0 else ""
    return Stage(
        plan=[
            ("model", f"{model.n_layer} layers × {model.n_embd}, {heads}, vocabulary {model.vocab_size:,}"),
            ("parameters", f"{num_params(model):,}; {flops_per_token(model, row_length):,} FLOPs a token"),
            ("devices", f"{sharding.describe(setting.mesh)}, compute in {compute.dtype}, {attention}"),
            *plan(resume_step),
            ("saves", f"{checkpoints.folder}/<step>{every}" if checkpoints else "nothing (dry run)"),
        ],
        tag=tag,
        model=model,
        mesh=setting.mesh,
        start=starter(
            *(setting, optimizer, batches, checkpoints, resume_step, fresh, choose_step, config.overwrite),
            special["num_steps"],
        ),
        step_fns=steps,
        batches=batches,
        meta=meta,
        checkpoints=checkpoints,
        keep_state=keep_state,
        save_every=config.save_every,
        resume_step=resume_step,
        on_nonfinite=config.on_nonfinite,
        run=config.run,
        tensorboard=config.tensorboard,
        **special,
    )
