"""Improve a chat model by reinforcement learning: python -m launch.chat_rl --model_tag=d12"""

from jaxchat.config import RLConfig
from launch import cli


def stage_for(config: RLConfig):
    """Start the devices, open the tasks and the model to improve, and return the Stage that train() runs."""
    from jaxchat.data.pipelines import load_tasks
    from jaxchat.rl.batches import RolloutBatches
    from jaxchat.train import stages

    parent, model = cli.open_model(config, config.source)
    tasks = load_tasks(config.train_tasks, config.tasks_dir, "train_tasks", documents=False)
    return stages.rl(config, model, parent, tasks, RolloutBatches(config, model, parent, tasks))


def run(config: RLConfig):
    from jaxchat.eval.chat import TASKS
    from jaxchat.report import record
    from jaxchat.rl.evaluation import BEST, evaluations
    from jaxchat.train.loop import train
    from jaxchat.train.metrics import best_step
    from jaxchat.train.run import find_start, open_run, plan_of

    began = record.begin()
    stage = stage_for(config)
    start = find_start(stage)
    plan = plan_of(stage, start)
    cli.print_plan(stage.title, plan)
    measured = evaluations(config, stage)
    with open_run(stage, start) as ready, record.recorded(ready, began, plan):
        train(ready, measured)
    if start.checkpoints:
        best = best_step(start.checkpoints.folder, BEST, stage.num_steps)
        step = str(best[0]) if best and 0 < best[0] < stage.num_steps else ""
        if best:
            print(f"best: {BEST} {best[1]:.4f}, after step {best[0]}", flush=True)
        # chat_eval measures all six tasks, which is useful if the model was trained on one of them.
        evaluated = any(name.partition("/")[0] in TASKS for name in stage.batches.problems.checked)
        command = "chat_eval" if evaluated else "chat_cli"
        cli.next_step(f"python -m launch.{command} -i rl --model_tag={stage.tag}", step=step)


main = cli.command(RLConfig, run, several=True)

if __name__ == "__main__":
    main()
