"""Prepare a training run: find where it starts, choose a --remat that fits in memory, create its state."""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxchat import checkpoint, seal, sharding
from jaxchat.config import REMATS, ModelConfig, TrainConfig, UserError, counted
from jaxchat.model.attention import kernel_for
from jaxchat.model.flops import flops_per_token, num_params
from jaxchat.model.layers import layers
from jaxchat.store import Checkpoints
from jaxchat.tokenizer import Tokenizer
from jaxchat.train import fit
from jaxchat.train.loop import Run, place_batch
from jaxchat.train.metrics import check_installed
from jaxchat.train.optimizer import with_new_schedule
from jaxchat.train.stages import Stage
from jaxchat.train.state import TrainState, abstract_state, init_state, state_from_params
from jaxchat.train.step import make_train_step


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run starts: at a checkpoint that it resumes from, or at step 0."""

    checkpoints: Checkpoints | None  # in the run's folder; None: nothing is written
    steps: list[int]  # steps of the existing checkpoints
    step: int = 0
    meta: dict = dataclasses.field(default_factory=dict)  # the checkpoint's metadata


def tokenizer_for(config: TrainConfig, name: str, tag: str) -> Tokenizer:
    """Load the tokenizer saved with the run to resume or, if there is none, the one in the base directory.

    name: the stage. tag: the run's --model_tag.
    """
    folder = checkpoint.run_folder(name, tag)
    kept = folder / "tokenizer"
    return Tokenizer.load(kept if config.resume and checkpoint.steps_in(folder) and kept.is_dir() else None)


def find_start(stage: Stage) -> Start:
    """Return where a run starts: at step 0 or, with --resume, at the last intact checkpoint.

    Raises UserError if there are checkpoints but no --resume or --overwrite, or if none can be resumed.
    """
    flags = stage.flags
    check_installed(run=flags.run, tensorboard=flags.tensorboard)
    sharding.check_same(
        data=stage.data, tokenizers=stage.tokenizer.hash, parents=stage.meta["parent"], flags=flags.shared()
    )
    if flags.dry_run:
        return Start(None, [])
    checkpoints = Checkpoints(checkpoint.run_folder(stage.name, stage.tag))
    steps = sharding.from_first(checkpoints.steps)
    if not steps or flags.overwrite:
        return Start(checkpoints, steps)
    if not flags.resume:
        raise UserError(
            f"{checkpoints.folder} has checkpoints up to step {steps[-1]}; "
            "continue with --resume, choose another --model_tag, or delete them with --overwrite"
        )
    last = sharding.from_first(lambda: checkpoint.whole_steps(checkpoints.folder)[-1:])
    if not last:
        raise UserError(
            f"--resume: all checkpoints in {checkpoints.folder} are damaged; start again with --overwrite, "
            "or choose another --model_tag"
        )
    meta = checkpoints.meta(last[0])
    check_same_run(stage, meta, checkpoints, last[0])
    if stage.num_steps and last[0] > stage.num_steps:  # an imported one: its settings are not compared
        raise UserError(
            f"--resume: {checkpoints.folder} is at step {last[0]:,}, but this run ends after step "
            f"{stage.num_steps:,}; give a larger --num_iterations"
        )
    return Start(checkpoints, steps, last[0], meta)


def check_same_run(stage: Stage, saved: dict, checkpoints: Checkpoints, step: int):
    """Raise UserError unless a checkpoint has the stage's model, settings, data, tokenizer and parent.

    saved: metadata of the checkpoint at `step`. An imported checkpoint must hold optimizer state, but only
    its model and tokenizer are compared.
    """
    if "imported" in saved and not checkpoints.has_state(step):
        raise UserError(
            f"--resume: {checkpoints.folder} was imported without optimizer state, so it can't be continued; "
            "start the next stage from it instead"
        )
    compared = ("settings", "model", "data", "tokenizer_hash", "parent")  # settings first: they name flags
    if "imported" in saved:
        compared, saved = ("model", "tokenizer_hash"), saved | {"settings": {}}
    # A checkpoint lacks settings and constants that were added later; their defaults have the old behaviour.
    defaults = type(stage.flags)().learnt_from()
    saved = saved | {
        "model": dataclasses.asdict(ModelConfig(**saved["model"])),
        "settings": defaults | {k: v for k, v in saved["settings"].items() if k in defaults},
    }
    saved, meta = without_folders(saved), without_folders(stage.meta)
    for what in compared:
        before, now = saved.get(what), meta.get(what)
        for flag in ("arch", "recipe") if what == "settings" else ():
            if before.get(flag) != now.get(flag):  # it sets the defaults of the others
                before, now = {flag: before.get(flag)}, {flag: now.get(flag)}
        if before != now:
            raise UserError(
                f"--resume: {checkpoints.folder} was trained with different {what}: "
                f"{sharding.difference(before, now)}; give the same again, or "
                "another --model_tag for a new run"
            )


TASK_FILE = re.compile(r"[^,]*/(?=[^/,]+\.(?:jsonl|json|ndjson)(?::\d+)?(?:,|$))", re.IGNORECASE)


def without_folders(meta: dict) -> dict:
    """Return checkpoint metadata in which paths of task files are reduced to file names.

    A run can then be resumed after its task files were moved.
    """
    settings, data = dict(meta["settings"]), {}
    if "train_tasks" in settings:
        settings["train_tasks"] = TASK_FILE.sub("", settings["train_tasks"])
    for name, content in meta.get("data", {}).items():
        place, dot, task = name.partition(". ")
        data[place + dot + TASK_FILE.sub("", task)] = content
    return meta | {"settings": settings, "data": data}


def mechanism_rows(model: ModelConfig) -> list[tuple[str, str]]:
    """Describe what the model adds to nanochat's model of November 2025, in at most one row (name, text)."""
    parts = []
    if model.window_pattern:
        parts.append(f"windows {model.window_pattern} (S {model.short_window:,}, L {model.sequence_len:,})")
    if count := sum(layer.values for layer in layers(model)):
        parts.append(f"value embeddings in {counted(count, 'layer')}")
    parts += ["scales of each layer"] if model.layer_scales else []
    parts += ["smear"] if model.smear_channels else []
    parts += ["backout"] if model.backout else []
    return [("mechanisms", ", ".join([*parts, f"embedding tables in {model.table_dtype}"]))] if parts else []


def plan_of(stage: Stage, start: Start) -> list[tuple[str, str]]:
    model, compute = stage.model.config, stage.model.compute
    depth = counted(model.n_layer, "layer")
    heads = f"{counted(model.n_head, 'head')} ({model.n_kv_head} key/value) × {model.head_dim}"
    attention = f"attention by {kernel_for(compute.attention, model.head_dim, stage.row_length)}"
    numbers = compute.dtype + (f" with {compute.matmul} products" if compute.matmul else "")
    flags = stage.flags
    every = [f"{flags.save_every:,} steps"] if flags.save_every > 0 else []
    every += [f"{flags.save_minutes:g} minutes"] if flags.save_minutes > 0 else []
    often = f", every {' and '.join(every)}, and at the end" if every else ", at the end"
    rows = [
        ("model", f"{depth} × {model.n_embd}, {heads}, vocabulary {model.vocab_size:,}"),
        *mechanism_rows(model),
        ("parameters", f"{num_params(model):,}; {flops_per_token(model, stage.row_length):,} FLOPs a token"),
        ("devices", f"{sharding.describe(stage.model.mesh)}, compute in {numbers}, {attention}"),
        *stage.plan,
        ("saves", f"{start.checkpoints.folder}/<step>{often}" if start.checkpoints else "nothing (dry run)"),
    ]
    if start.step:
        anew = ", imported; the data starts from its beginning" if "imported" in start.meta else ""
        rows.append(("resumes", f"after step {start.step:,}{anew}"))
    return rows


@contextlib.contextmanager
def open_run(stage: Stage, start: Start) -> Iterator[Run]:
    """Context manager that yields a stage's Run, its state initialised or restored from `start`.

    It tries values of --remat, fastest first, until a step fits in memory, and locks the run's folder.
    Nothing is written or deleted until every check has passed. On exit, it waits for the save in progress.
    """
    checkpoints = start.checkpoints
    try:
        # A resumed run needs a first batch only to choose the step by its memory, if a memory limit is known.
        needs_batch = not start.step or fit.device_memory(stage.model.mesh)
        batch = largest_batch(stage) if needs_batch else None
        steps = step_functions(stage, start, batch)
        remat = next(iter(steps))  # the only one if memory limits are unknown
        if needs_batch:
            state = abstract_state(stage.model, stage.optimizer)
            remat = fit.first_that_fits(steps, stage.model.mesh, state, batch, np.float32(1.0))
        if start.step:
            checkpoints.lock(start.steps)
            state = restore(stage, start)
        else:
            state = initial_state(stage)
            if checkpoints:
                checkpoints.lock(start.steps)
                if stage.flags.overwrite:
                    checkpoints.delete_all()
                checkpoints.keep_tokenizer(stage.tokenizer)
        yield Run(stage, state, steps[remat], start.step, checkpoints, stage.meta | {"remat": remat})
    finally:
        stage.batches.close()
        if checkpoints:
            checkpoints.close()


def largest_batch(stage: Stage) -> dict[str, jax.ShapeDtypeStruct]:
    """Return {name: ShapeDtypeStruct} of the stage's largest possible batch, without consuming any data.

    Raises UserError if all documents are empty.
    """
    batch = stage.batches.peek()
    if not int(sharding.agree(batch["totals"], stage.model.mesh).get("targets", 1)):
        raise UserError("all documents are empty; give data that holds text")
    return {
        name: jax.ShapeDtypeStruct((*a.shape[:-1], stage.row_length), a.dtype, sharding=a.sharding)
        for name, a in place_batch(batch, stage.model.mesh).items()
    }


def step_functions(stage: Stage, start: Start, batch: dict) -> dict[str, Callable]:
    """Return {value of --remat: jitted training step} for the values to try, fastest first.

    batch: ShapeDtypeStructs of the largest batch. It is used only if the memory limit is known.
    """
    compute, mesh = stage.model.compute, stage.model.mesh
    remats = [compute.remat]
    if stage.flags.remat == "auto" and fit.device_memory(mesh):
        remats = fit.remats_to_try(batch, mesh)
        if start.step:
            # A resumed run keeps its remat, to be bitwise identical; metadata without it means the default.
            first = start.meta.get("remat", compute.remat)
            remats = remats[remats.index(first) :] if first in remats else REMATS[-1:]

    def step_with(remat: str) -> Callable:
        changed = dataclasses.replace(compute, remat=remat)
        return make_train_step(dataclasses.replace(stage.model, compute=changed), stage.optimizer)

    return {remat: step_with(remat) for remat in remats}


def initial_state(stage: Stage) -> TrainState:
    """Create the state of step 0, with the parent checkpoint's weights or, without a parent, random weights.

    The optimizer state is fresh or, if stage.warm, the parent's.
    """
    if stage.parent is None:
        return init_state(stage.flags.seed, stage.model, stage.optimizer)
    if not stage.warm:
        return state_from_params(stage.parent.load(stage.model.mesh), stage.model, stage.optimizer)
    parent, target = stage.parent, abstract_state(stage.model, stage.optimizer)
    if wrong := seal.damage(parent.path, ("optimizer",)):
        raise UserError(f"{parent.path} is damaged: {wrong}; use --no_load_optimizer for a fresh optimizer")
    stored = Checkpoints(parent.folder)
    params, rest = stored.restore(parent.step, params=target.params, optimizer=target.rest, batches=None)
    # Two arrays, since the training step donates both.
    step, empty_steps = jnp.zeros_like(rest["step"]), jnp.zeros_like(rest["empty_steps"])
    return TrainState(step, empty_steps, params, with_new_schedule(rest["opt_state"]))


def restore(stage: Stage, start: Start) -> TrainState:
    """Return the state of the checkpoint to resume from, and move the data pipeline to the saved position."""
    checkpoints, target = start.checkpoints, abstract_state(stage.model, stage.optimizer)
    if checkpoints.has_state(start.step):
        params, rest = checkpoints.restore(
            start.step, params=target.params, optimizer=target.rest, batches=stage.batches
        )
        return TrainState(params=params, **rest)
    if start.step != stage.num_steps:  # only a finished run's last checkpoint may hold only weights
        raise UserError(
            f"--resume: {checkpoints.folder / str(start.step)} holds weights only, so training can't "
            "continue from it; start again with --overwrite"
        )
    params, _ = checkpoints.restore(start.step, params=target.params, optimizer=None, batches=None)
    return state_from_params(params, stage.model, stage.optimizer)
