"""Midtrain a base model on conversations: python -m launch.mid_train --model_tag=d12"""

from jaxchat.config import MidConfig
from launch import cli


def val_batches(config: MidConfig, setting) -> list[dict]:
    from jaxchat import sharding
    from jaxchat.data import pipelines
    from jaxchat.data.encode import conversation_reader
    from jaxchat.data.order import Order
    from jaxchat.train import stages

    tasks = pipelines.load_tasks(config.val_tasks, config.tasks_dir, "val_tasks", documents=True)
    order = Order([len(tasks)], config.seed)
    read = conversation_reader(tasks, setting.tokenizer)
    rows, time = config.device_batch_size * sharding.data_shards(setting.mesh), stages.row_length(config, setting.model)
    return pipelines.packed_validation(
        read, map(order.index, range(len(tasks))), rows=rows, time=time, max_tokens=config.eval_tokens
    )


def run(config: MidConfig):
    from jaxchat.eval.bpb import bits_per_byte
    from jaxchat.report import record
    from jaxchat.train import stages
    from jaxchat.train.loop import Evaluation, train

    began = record.begin()
    stage, setting = stages.mid(config)
    cli.print_plan(stage.title, stage.plan)
    model, compute, tokenizer, mesh = setting.model, setting.compute, setting.tokenizer, setting.mesh
    batches = val_batches(config, setting) if config.eval_every > 0 else []

    def val_bpb(params):
        return {"val_bpb": bits_per_byte(params, batches, tokenizer.token_bytes, model, compute, mesh)}

    record.at_end(stage, config, began)
    train(stage, [Evaluation("validation", config.eval_every, val_bpb, at_start=True)])
    if stage.checkpoints:
        cli.next_step(f"python -m launch.chat_sft --model_tag={stage.tag}")


def main(args: list[str] | None = None):
    cli.main(MidConfig, run, args)


if __name__ == "__main__":
    main()
