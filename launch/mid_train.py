"""Midtrain a base model on conversations: python -m launch.mid_train --model_tag=d12"""

from jaxchat.config import MidConfig
from launch import cli


def stage_for(config: MidConfig):
    """Start the devices, open the base model and the tasks, and return the Stage that train() runs."""
    from jaxchat.data.pipelines import load_tasks
    from jaxchat.train import stages

    parent, model = cli.open_model(config, "base")
    tasks = load_tasks(config.train_tasks, config.tasks_dir, "train_tasks", documents=True)
    return stages.mid(config, model, parent, tasks)


def run(config: MidConfig):
    from jaxchat.eval import training
    from jaxchat.report import record
    from jaxchat.train.loop import train
    from jaxchat.train.run import find_start, open_run, plan_of

    began = record.begin()
    stage = stage_for(config)
    start = find_start(stage)
    plan = plan_of(stage, start)
    cli.print_plan(stage.title, plan)
    evaluations = training.mid(config, stage)
    with open_run(stage, start) as ready, record.recorded(ready, began, plan):
        train(ready, evaluations)
    if start.checkpoints:
        cli.next_step(f"python -m launch.chat_sft --model_tag={stage.tag}", tasks_dir=config.tasks_dir)


main = cli.command(MidConfig, run, several=True)

if __name__ == "__main__":
    main()
