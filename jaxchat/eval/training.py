"""The evaluations that run during the training stages base, mid and SFT."""

from functools import partial

from jaxchat import sharding
from jaxchat.config import EVAL_BATCH, BaseConfig, MidConfig, SFTConfig, TrainConfig, UserError
from jaxchat.data import pipelines
from jaxchat.data.encode import conversation_reader, text_reader
from jaxchat.data.order import Order
from jaxchat.data.sources import ParquetText, find_shards
from jaxchat.data.tasks import load_task
from jaxchat.eval import core
from jaxchat.eval.bpb import bits_per_byte, total_loss
from jaxchat.eval.chat import letter_accuracy
from jaxchat.eval.results import mean
from jaxchat.eval.samples import show_samples
from jaxchat.eval.scoring import Scorer
from jaxchat.infer.engine import Engine
from jaxchat.train.loop import Evaluation
from jaxchat.train.stages import Stage

MOST_DRIFT = 0.01  # relative change of the loss by float8 matmuls above which a warning is printed


def base(config: BaseConfig, stage: Stage, bundle: list[core.CoreTask]) -> list[Evaluation]:
    batches = []
    if config.eval_every > 0:
        texts = ParquetText(find_shards(config.data_dir, "val"))
        sharding.check_same(validation=texts.fingerprint)
        read = text_reader(texts, stage.tokenizer)
        batches = packed_batches(config, stage, read, range(len(texts)))
    of_core = partial(core_metric, stage=stage, bundle=bundle, max_per_task=config.core_metric_max_per_task)
    return [
        *validations(config, stage, val_bpb, batches),
        Evaluation("CORE", config.core_metric_every if bundle else -1, of_core),
        Evaluation("samples", config.sample_every, partial(samples, stage=stage)),
    ]


def core_bundle(config: BaseConfig) -> tuple[list[core.CoreTask], str]:
    """Return CORE's tasks, and a line about CORE for the plan that base_train prints.

    The tasks are [] if CORE is off, or if there is no bundle and --eval_bundle is not set. Raises UserError
    if --eval_bundle names no bundle, if a bundle is malformed, or if a task has too few items.
    """
    if config.core_metric_every <= 0:
        return [], "not measured"
    why = ""
    try:
        bundle = core.load_bundle(config.eval_bundle)
        for task in bundle:  # so that too few items fail before training
            task.drawn(config.core_metric_max_per_task)
    except core.NoBundle as problem:
        if config.eval_bundle:
            raise
        bundle, why = [], f"not measured: {problem}"
    items = {task.label: len(task.items) for task in bundle}
    sharding.check_same(bundles=items)  # a process with other tasks would hang the rest
    return bundle, why or f"{len(bundle)} tasks every {config.core_metric_every:,} steps"


def mid(config: MidConfig, stage: Stage) -> list[Evaluation]:
    batches = []
    if config.eval_every > 0:
        tasks = pipelines.load_tasks(config.val_tasks, config.tasks_dir, "val_tasks", documents=True)
        sharding.check_same(validation=tasks.fingerprint)
        order = Order([len(tasks)], seed=0)  # independent of --seed, so that runs can be compared
        read = conversation_reader(tasks, stage.tokenizer)
        batches = packed_batches(config, stage, read, map(order.index, range(len(tasks))))
    return validations(config, stage, val_bpb, batches)


def packed_batches(config: BaseConfig | MidConfig, stage: Stage, read, documents) -> list[dict]:
    rows = stage.device_batch * sharding.data_shards(stage.model.mesh)
    size = {"rows": rows, "time": stage.row_length, "max_tokens": config.eval_tokens}
    return pipelines.packed_validation(read, documents, **size)


def sft(config: SFTConfig, stage: Stage) -> list[Evaluation]:
    batches, tasks = [], []
    if config.eval_every > 0:
        val = pipelines.load_tasks(config.val_tasks, config.tasks_dir, "val_tasks", documents=False)
        sharding.check_same(validation=val.fingerprint)
        batches = pipelines.padded_validation(
            conversation_reader(val, stage.tokenizer),
            Order([len(val)], seed=0),
            min(len(val), config.eval_steps * EVAL_BATCH),
            rows=stage.device_batch * sharding.data_shards(stage.model.mesh),
            time=stage.row_length,
        )
    if config.eval_metrics_every > 0:
        tasks = choice_tasks(config)
        sharding.check_same(tasks={name: task.fingerprint for name, task in tasks})
    letters = partial(accuracies, stage=stage, tasks=tasks, most=config.eval_metrics_max_problems)
    return [
        *validations(config, stage, val_loss, batches),
        Evaluation("multiple choice", config.eval_metrics_every, letters),
    ]


def choice_tasks(config: SFTConfig) -> list:
    """Return SFT's multiple-choice tasks as (name, task) pairs; raise UserError if one can't be opened."""
    try:
        return [(name, load_task(f"{name}/test", config.tasks_dir)) for name in ("MMLU", "ARC-Easy")]
    except UserError as problem:
        raise UserError(f"{problem}; or turn this evaluation off: --eval_metrics_every=-1") from problem


def validations(config: TrainConfig, stage: Stage, measure, batches: list[dict]) -> list[Evaluation]:
    """Return the evaluations of the batches: `measure`, and if float8 is used, how it changes the loss."""
    about = {"stage": stage, "batches": batches}
    found = [Evaluation("validation", config.eval_every, partial(measure, **about), at_start=True)]
    if stage.model.compute.matmul and batches:
        found.append(Evaluation("float8", config.eval_every, partial(fp8_drift, **about)))
    return found


def fp8_drift(params, stage: Stage, batches: list[dict]) -> dict[str, float]:
    """Return {"fp8_drift": relative change of the first batch's loss due to float8}; warn if it is large."""
    models = stage.model, stage.model.without_fp8()
    (with_fp8, _), (without, _) = (total_loss(params, batches[:1], model) for model in models)
    drift = with_fp8 / without - 1
    if abs(drift) > MOST_DRIFT:
        print(
            f"WARNING: --matmul={stage.model.compute.matmul} changes the validation loss by {drift:+.1%}, "
            f"more than {MOST_DRIFT:.0%}; --resume can't change it, so consider a new run without it",
            flush=True,
        )
    return {"fp8_drift": drift}


def val_bpb(params, stage: Stage, batches: list[dict]) -> dict[str, float]:
    return {"val_bpb": bits_per_byte(params, batches, stage.tokenizer.token_bytes, stage.model.without_fp8())}


def val_loss(params, stage: Stage, batches: list[dict]) -> dict[str, float]:
    nll, weight = total_loss(params, batches, stage.model.without_fp8())
    return {"val_loss": nll / weight}


def core_metric(params, stage: Stage, bundle: list[core.CoreTask], max_per_task: int) -> dict[str, float]:
    scorer = Scorer(params, stage.model.without_fp8())
    return {"core": mean(core.evaluate(scorer, stage.tokenizer, bundle, max_per_task))}


def samples(params, stage: Stage) -> dict[str, float]:
    show_samples(Engine(params, stage.model.config, stage.tokenizer, stage.model.compute, batch_size=8))
    return {}


def accuracies(params, stage: Stage, tasks: list, most: int) -> dict[str, float]:
    scorer = Scorer(params, stage.model.without_fp8())
    return {f"{name}_acc": letter_accuracy(scorer, stage.tokenizer, task, most) for name, task in tasks}
