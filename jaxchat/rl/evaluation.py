"""Evaluations that run during reinforcement learning."""

from functools import partial

import jax
import numpy as np

from jaxchat import sharding
from jaxchat.config import RLConfig, UserError
from jaxchat.data import pipelines
from jaxchat.data.tasks import load_task
from jaxchat.eval import chat
from jaxchat.eval.scoring import Scorer, Span
from jaxchat.rl.problems import Problems
from jaxchat.rl.rollout import row_of
from jaxchat.train.loop import Evaluation
from jaxchat.train.stages import Stage

SAMPLES = 8  # answers per problem, from which pass@1, 2, 4 and 8 are estimated
KL_ROWS = 64  # maximum answers on which KL(policy ‖ parent) is estimated
BEST = "val_reward"  # metric by which the best checkpoint is kept
OTHERS = ("ARC-Easy", "ARC-Challenge", "MMLU")


def evaluations(config: RLConfig, stage: Stage) -> list[Evaluation]:
    """Return the evaluations of a run, or [] if --eval_every ≤ 0.

    RL problems are evaluated every --eval_every steps, multiple-choice tasks before and after training.
    """
    if config.eval_every <= 0:
        return []
    tasks = pipelines.load_tasks(config.val_tasks, config.tasks_dir, "val_tasks", documents=False)
    val, train = Problems(config, tasks, stage.tokenizer), stage.batches.problems
    half = config.eval_examples if config.eval_examples < 0 else -(-config.eval_examples // 2)
    sets = {"": (val, config.eval_examples), "train_": (train, half)}
    found = {name: task for name in OTHERS if config.eval_others and (task := _load_test(name, config))}
    prints = {name: task.fingerprint for name, task in found.items()}
    sharding.check_same(validation=tasks.fingerprint, others=prints)
    of_sets = partial(measure, stage=stage, config=config, sets=sets)
    listed = [Evaluation("problems", config.eval_every, of_sets, at_start=True, best=BEST)]
    if found:
        of_others = partial(choice_accuracies, stage=stage, tasks=found, most=config.eval_others)
        listed.append(Evaluation("other tasks", stage.num_steps + 1, of_others, at_start=True))
    return listed


def _load_test(name: str, config: RLConfig):
    """Load the test split of a task. Return None if it is not available, or if the task is trained on."""
    if name in config.train_tasks:
        return None
    try:
        return load_task(f"{name}/test", config.tasks_dir or None)
    except UserError:
        return None


def measure(params, stage: Stage, config: RLConfig, sets: dict) -> dict[str, float]:
    """Return {metric: value}: mean reward, share of finished answers, pass@k and accuracy of greedy answers.

    sets: {prefix of the metrics: (Problems, maximum number of problems)}. The prefix "" is the validation
        set, for which the KL divergence from the model before training is also estimated.
    """
    engine, values = stage.batches.engine(params), {}
    for prefix, (problems, most) in sets.items():
        chosen = [int(i) for i in chat.drawn(range(len(problems)), most)]
        how = {"temperature": config.temperature, "top_k": config.top_k}
        prompts, generations = problems.sample(engine, chosen, SAMPLES, logprobs=0, **how)
        _, right_EG, rewards_EG = problems.judge(chosen, generations)
        values[f"{prefix or 'val_'}reward"] = float(rewards_EG.mean())
        values[f"{prefix or 'val_'}finished"] = float(np.mean([one.finished for one in generations]))
        for k in (1, 2, 4, 8):
            values[f"{prefix}pass@{k}"] = chat.pass_at(k, right_EG.tolist())
        _, greedy = problems.sample(engine, chosen, 1, temperature=0.0)
        values[f"{prefix}greedy"] = float(problems.judge(chosen, greedy)[1].mean())
        if not prefix:
            rows = [row_of(prompt, one) for prompt, one in zip(prompts, generations[::SAMPLES], strict=True)]
            values["kl"] = divergence(rows[:KL_ROWS], params, stage)
    return values


def divergence(rows: list[tuple], params, stage: Stage) -> float:
    """Estimate KL(policy ‖ model before training) in nats per sampled token.

    rows: (token ids, whether the model sampled each token, log-probabilities) of each prompt with its answer.
    """
    spans = [Span(np.array(tokens, np.int32), 1, len(tokens)) for tokens, _, _ in rows]
    reference = stage.parent.load(stage.model.mesh)
    own, theirs = (Scorer(weights, stage.model, quiet=True).spans(spans) for weights in (params, reference))
    jax.tree.map(lambda array: array.delete(), reference)
    differences = [
        (other.nll - one.nll)[np.array(sampled[1:])]
        for one, other, (_, sampled, _) in zip(own, theirs, rows, strict=True)
    ]
    together = np.concatenate(differences)
    return float(together.mean()) if len(together) else 0.0


def choice_accuracies(params, stage: Stage, tasks: dict, most: int) -> dict[str, float]:
    """Return {"NAME_acc": accuracy} for multiple-choice tasks, answered by the most probable letter.

    tasks: {NAME: Task}. most: maximum number of problems of each task.
    """
    scorer = Scorer(params, stage.model)
    return {
        f"{name}_acc": chat.letter_accuracy(scorer, stage.tokenizer, task, most)
        for name, task in tasks.items()
    }
