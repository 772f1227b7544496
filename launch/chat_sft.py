"""Finetune for chat: python -m launch.chat_sft --model_tag=d12"""

from jaxchat.config import SFTConfig, UserError
from launch import cli


def choice_tasks(config: SFTConfig) -> list:
    """The (name, task) of multiple choice; opened before the training, so that a missing file is told then."""
    from jaxchat.data.tasks import load_task

    if config.eval_metrics_every <= 0:
        return []
    try:
        return [(name, load_task(f"{name}/test", config.tasks_dir)) for name in ("MMLU", "ARC-Easy")]
    except UserError as problem:
        raise UserError(f"{problem}; or do without this evaluation: --eval_metrics_every=-1") from problem


def val_batches(config: SFTConfig, setting) -> list[dict]:
    from jaxchat import sharding
    from jaxchat.data import pipelines
    from jaxchat.data.encode import conversation_reader
    from jaxchat.data.order import Order
    from jaxchat.train import stages

    tasks = pipelines.load_tasks(config.val_tasks, config.tasks_dir, "val_tasks", documents=False)
    order = Order([len(tasks)], config.seed)
    read = conversation_reader(tasks, setting.tokenizer)
    rows, time = config.device_batch_size * sharding.data_shards(setting.mesh), stages.row_length(config, setting.model)
    examples = min(len(tasks), config.eval_steps * config.device_batch_size)
    return pipelines.padded_validation(read, order, examples, rows=rows, time=time)


def run(config: SFTConfig):
    from jaxchat.eval.bpb import total_loss
    from jaxchat.eval.chat import letter_accuracy
    from jaxchat.eval.scoring import Scorer
    from jaxchat.report import record
    from jaxchat.train import stages
    from jaxchat.train.loop import Evaluation, train

    began = record.begin()
    stage, setting = stages.sft(config)
    cli.print_plan(stage.title, stage.plan)
    model, compute, tokenizer, mesh = setting.model, setting.compute, setting.tokenizer, setting.mesh
    batches = val_batches(config, setting) if config.eval_every > 0 else []
    choices = choice_tasks(config)

    def val_loss(params):
        nll, weight = total_loss(params, batches, model, compute, mesh)
        return {"val_loss": nll / max(weight, 1.0)}

    def accuracies(params):
        scorer, most = Scorer(params, model, compute, mesh), config.eval_metrics_max_problems
        return {f"{name}_acc": letter_accuracy(scorer, tokenizer, task, most) for name, task in choices}

    record.at_end(stage, config, began)
    train(
        stage,
        [
            Evaluation("validation", config.eval_every, val_loss, at_start=True),
            Evaluation("multiple choice", config.eval_metrics_every, accuracies),
        ],
    )
    if stage.checkpoints:
        cli.next_step(f"python -m launch.chat_cli --model_tag={stage.tag}")


def main(args: list[str] | None = None):
    cli.main(SFTConfig, run, args)


if __name__ == "__main__":
    main()
