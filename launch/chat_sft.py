"""Finetune for chat: python -m launch.chat_sft --model_tag=d12"""

from jaxchat.config import SFTConfig
from launch import cli


def stage_for(config: SFTConfig):
    """Start the devices, open the tasks and the model to finetune, and return the Stage that train() runs."""
    from jaxchat.data.pipelines import load_tasks
    from jaxchat.train import stages

    parent, model = cli.open_model(config, config.source)
    tasks = load_tasks(config.train_tasks, config.tasks_dir, "train_tasks", documents=False)
    return stages.sft(config, model, parent, tasks)


def run(config: SFTConfig):
    from jaxchat.eval import training
    from jaxchat.report import record
    from jaxchat.train.loop import train
    from jaxchat.train.run import find_start, open_run, plan_of

    began = record.begin()
    stage = stage_for(config)
    start = find_start(stage)
    plan = plan_of(stage, start)
    cli.print_plan(stage.title, plan)
    evaluations = training.sft(config, stage)
    with open_run(stage, start) as ready, record.recorded(ready, began, plan):
        train(ready, evaluations)
    if start.checkpoints:
        cli.next_step(f"python -m launch.chat_cli --model_tag={stage.tag}")


main = cli.command(SFTConfig, run, several=True)

if __name__ == "__main__":
    main()
