"""Evaluate a chat model: python -m launch.chat_eval -i sft -a "GSM8K|MMLU" """

import dataclasses
import time

from jaxchat.config import HOTTEST, STAGES, MeshFlags, UserError, flag
from launch import cli


@dataclasses.dataclass(frozen=True)
class Config(MeshFlags):
    """Evaluate a chat model on six tasks. ChatCORE, their mean centred accuracy, is reported if all
    tasks, or all but HumanEval, are measured.

    For ARC-Easy, ARC-Challenge and MMLU, the likeliest letter counts as the answer. For GSM8K, HumanEval and
    SpellingBee, the model writes its answers and may use the calculator. HumanEval is left out if the kernel
    does not support the sandbox in which its programs run. The results are written beside the checkpoint
    after every task, as chat_eval_<step>.csv and .json. If these files hold the results of other settings, a
    hash is added to the names of the new files.
    """

    source: str = flag("sft", choices=(*STAGES,), alias="-i")
    """Stage of the model to evaluate: rl, sft, mid or base."""
    task_name: str = flag("", alias="-a")
    """Tasks to evaluate on, separated by |, such as "GSM8K|MMLU"; empty: all six."""
    model_tag: str = flag("", alias="-g")
    """Tag of the model; empty: the deepest model tagged d<N>, or else the newest model."""
    step: int = flag(-1, 0, special=-1, alias="-s")
    """Step of the checkpoint; -1: the last."""
    max_problems: int = flag(-1, 1, special=-1, alias="-x")
    """Maximum number of problems per task, drawn as a fixed random sample; -1: all."""
    num_samples: int = flag(1, 1, alias="-n")
    """Number of answers to each problem of GSM8K, HumanEval and SpellingBee. The accuracy is the fraction of
    right answers. With several, pass@k (the chance that at least one of k is right) is measured too."""
    temperature: float = flag(0.0, 0, HOTTEST, alias="-t")
    """Sampling temperature of written answers; 0: always the likeliest token."""
    top_k: int = flag(50, 0, 2**31 - 1, special=-1, alias="-k")
    """Number of likeliest tokens to sample from; 0 or -1: all."""
    max_new_tokens: int = flag(512, 1, alias="-m")
    """Maximum number of tokens in an answer that the model writes."""
    batch_size: int = flag(-1, 1, special=-1, alias="-b")
    """Number of answers that a device writes at a time; -1: as many as its memory holds, at most 64. The
    results do not depend on it."""
    seed: int = flag(0, 0, 2**32 - 1)
    """Random seed for sampling."""
    tasks_dir: str = ""
    """Folder of the task files; empty: <base directory>/tasks."""

    def __post_init__(self):
        super().__post_init__()
        if self.num_samples > 1 and self.temperature == 0:
            raise UserError(
                f"--num_samples={self.num_samples} at --temperature=0 would give the same answer each time; "
                "give a temperature such as 0.8"
            )


# Flags that change the scores.
SETTINGS = ("max_problems", "num_samples", "temperature", "top_k", "max_new_tokens", "seed")


def task_names(config: Config) -> tuple[list[str], str]:
    """Return (names of the tasks to measure, warning).

    The warning names tasks that cannot be measured on this machine, and the reason; without such tasks,
    it is "".
    """
    from jaxchat.eval import chat

    asked = dict.fromkeys(name.strip() for name in config.task_name.split("|") if name.strip())
    asked = list(asked or chat.TASKS)
    for name in asked:
        if name not in chat.TASKS:
            known = ", ".join(chat.TASKS)
            raise UserError(f"--task_name={config.task_name}: unknown task {name!r}; it is one of {known}")
    left_out = {name: why for name in asked if (why := chat.why_not(name))}
    names, why = [name for name in asked if name not in left_out], "; ".join(left_out.values())
    if not names:
        raise UserError(f"--task_name={config.task_name}: {why}; name other tasks")
    return names, f"{', '.join(left_out)} is NOT measured: {why}" if left_out else ""


def run(config: Config):
    from jaxchat import sharding
    from jaxchat.data.tasks import open_tasks
    from jaxchat.eval import chat
    from jaxchat.eval.results import check_writable, save_results
    from jaxchat.eval.scoring import Scorer, out_of_memory
    from jaxchat.infer.engine import Engine
    from jaxchat.train.fit import device_memory

    start = time.perf_counter()
    names, left_out = task_names(config)
    found, model = cli.open_model(config, config.source, asks=False)
    check_writable(found.folder)
    opened = open_tasks([chat.TASKS[name].spec for name in names], config.tasks_dir or None)
    tasks = dict(zip(names, opened, strict=True))
    sharding.check_same(
        checkpoints=found.name, tasks={name: task.fingerprint for name, task in tasks.items()}
    )
    slots = config.batch_size
    if slots < 0:
        slots = chat.batch_size_for(found.config, model.compute, device_memory(model.mesh))
    counts = [
        min(len(task), config.max_problems) if config.max_problems > 0 else len(task)
        for task in tasks.values()
    ]
    how = f"at temperature {config.temperature:g}" if config.temperature else "greedily"
    answers = f"{config.num_samples} a problem, {how}"
    # An answer shares the context with its problem.
    longest = min(config.max_new_tokens, found.config.sequence_len)
    cli.print_plan(
        f"Evaluation of {found.folder.name} ({config.source})",
        [
            ("model", str(found.folder / str(found.step))),
            ("devices", f"{sharding.describe(model.mesh)}, compute in {model.compute.dtype}"),
            ("tasks", ", ".join(f"{name} {count:,}" for name, count in zip(names, counts, strict=True))),
            ("written answers", f"{answers}, at most {longest} tokens, {slots} a device at a time"),
            *[("rows", f"{task.name}: {task.left_out}") for task in tasks.values() if task.left_out],
            *([("WARNING", left_out)] if left_out else []),
        ],
    )
    params = found.load(model.mesh)
    settings = {name: getattr(config, name) for name in SETTINGS} | {"tasks": names}
    settings["dtype"] = model.compute.dtype
    options = {name: getattr(config, name) for name in ("temperature", "seed", "num_samples")}
    options |= {"max_tokens": config.max_new_tokens, "top_k": max(0, config.top_k)}
    with out_of_memory(f"lower -b (it was {slots}), or -m, the length of answers"):
        scorer = Scorer(params, model)
        engine = Engine(params, found.config, found.tokenizer, model.compute, batch_size=slots)
        for results, values, score in chat.measure(scorer, engine, tasks, config.max_problems, **options):
            about = (found, config.source, "chat_eval", results, values, score, settings)
            path = save_results(*about, seconds=time.perf_counter() - start)
    for line in (left_out and f"WARNING: {left_out}", f"saved {path} and .csv"):
        if line:
            print(line, flush=True)
    cli.next_step(f"python -m launch.chat_cli -i {config.source} --model_tag={found.folder.name}")


main = cli.command(Config, run, several=True)

if __name__ == "__main__":
    main()
