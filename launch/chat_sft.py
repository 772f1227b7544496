"""Finetune for chat: python -m launch.chat_sft --model_tag=d12"""

from jaxchat import sharding
from jaxchat.config import SFTConfig
from jaxchat.data import pipelines
from jaxchat.eval.bpb import total_loss
from jaxchat.train import stages
from jaxchat.train.loop import Evaluation, train
from launch import cli


def run(config: SFTConfig):
    stage, setting = stages.sft(config)
    cli.print_plan(stage.title, stage.plan)
    model, compute, tokenizer, mesh = setting.model, setting.compute, setting.tokenizer, setting.mesh
    batches = []

    def val_loss(params):
        if not batches:
            tasks = pipelines.load_tasks(config.val_tasks, config.tasks_dir, "val_tasks", documents=False)
            order = pipelines.Shuffled(tasks, [len(tasks)], config.seed).index
            tokenize = pipelines.conversation_tokens(tasks, order, tokenizer)
            shards, time = sharding.data_shards(mesh), stages.row_length(config, model)
            examples = min(len(tasks), config.eval_steps * config.device_batch_size)
            batches.extend(
                pipelines.padded_validation(tokenize, examples, rows=config.device_batch_size * shards, time=time)
            )
        nll, weight = total_loss(params, batches, model, compute, mesh)
        return {"val_loss": nll / max(weight, 1.0)}

    train(stage, [Evaluation("validation", config.eval_every, val_loss)])
    cli.next_step(f"python -m launch.chat_cli --model_tag={stage.meta['parent'].split()[1]}")


def main(args: list[str] | None = None):
    cli.main(SFTConfig, run, args)


if __name__ == "__main__":
    main()
