"""Evaluate a chat model: python -m launch.chat_eval -i sft -a "GSM8K|MMLU" """

import dataclasses

from jaxchat.config import TrainConfig, UserError
from launch import cli


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure a chat model on six tasks: ARC-Easy, ARC-Challenge and MMLU by the likeliest letter; GSM8K, HumanEval
    and SpellingBee by answers that it writes, with the calculator. With all six comes ChatCORE.

    HumanEval's answers run in a sandbox. The results go beside the checkpoint after every task, as chat_eval_<step>.csv
    and .json; under another name where that was made with other settings.
    """

    source: str = dataclasses.field(default="sft", metadata={"alias": "-i"})
    """sft, mid or base."""
    task_name: str = dataclasses.field(default="", metadata={"alias": "-a"})
    """Tasks with | between, such as "GSM8K|MMLU"; empty: all six."""
    model_tag: str = dataclasses.field(default="", metadata={"alias": "-g"})
    """Which model; empty: the deepest d<N>, or else the newest."""
    step: int = dataclasses.field(default=-1, metadata={"alias": "-s"})
    """Which of its checkpoints; -1: the last."""
    max_problems: int = dataclasses.field(default=-1, metadata={"alias": "-x"})
    """At most so many problems of each task, a fixed draw; -1: all."""
    num_samples: int = dataclasses.field(default=1, metadata={"alias": "-n"})
    """Written answers to each problem; a problem's score is the share that is right. With several, pass@k is told."""
    temperature: float = dataclasses.field(default=0.0, metadata={"alias": "-t"})
    """Of written answers; 0: always the likeliest token."""
    top_k: int = dataclasses.field(default=50, metadata={"alias": "-k"})
    """Draw from so many likeliest tokens."""
    max_new_tokens: int = dataclasses.field(default=512, metadata={"alias": "-m"})
    """The longest written answer."""
    batch_size: int = dataclasses.field(default=64, metadata={"alias": "-b"})
    """Answers written at a time; lower it if memory runs out, the result stays the same."""
    seed: int = 0
    """Of the draws."""
    device_type: str = ""
    """cpu, cuda or tpu; empty: the best there is."""
    mesh: str = ""
    """Devices along each axis, as in base_train."""
    dtype: str = "auto"
    """Of the computation: float32 or bfloat16; auto: float32 on a CPU, bfloat16 elsewhere."""
    tasks_dir: str = ""
    """Where the tasks' files lie; empty: <base directory>/tasks."""


SETTINGS = ("max_problems", "num_samples", "temperature", "top_k", "max_new_tokens", "seed")  # what scores depend on


def names_in(config: Config) -> list[str]:
    from jaxchat.eval import chat, sandbox

    names = list(dict.fromkeys(name.strip() for name in config.task_name.split("|") if name.strip())) or [*chat.TASKS]
    for name in names:
        if name not in chat.TASKS:
            raise UserError(f"-a {config.task_name}: unknown task {name!r}; it is one of {', '.join(chat.TASKS)}")
    if "HumanEval" in names and (lacks := sandbox.missing()):
        raise UserError(
            f"HumanEval runs what the model wrote, and this kernel lacks {' and '.join(lacks)}; leave it out"
        )
    return names


def check(config: Config):
    least = {"num_samples": 1, "temperature": 0, "max_new_tokens": 1, "batch_size": 1}
    for name, value in least.items():
        if getattr(config, name) < value:
            raise UserError(f"--{name}={getattr(config, name)}; it must be at least {value}")
    if config.num_samples > 1 and config.temperature == 0:
        raise UserError(
            f"--num_samples={config.num_samples} at --temperature=0 would be the same answer each time; give a "
            "temperature such as 0.8"
        )
    if config.max_problems == 0:
        raise UserError("--max_problems=0; it must be at least 1, or -1 for all")
    if not 0 <= config.seed < 2**32:
        raise UserError(f"--seed={config.seed}; it must be from 0 to {2**32 - 1}")


def run(config: Config):
    from jaxchat import checkpoint, sharding
    from jaxchat.data.tasks import load_task
    from jaxchat.eval import chat
    from jaxchat.eval.results import mean, save_results
    from jaxchat.eval.scoring import Scorer
    from jaxchat.infer.engine import Engine
    from jaxchat.train.run import compute_for, start_devices

    check(config)
    names = names_in(config)
    shared = TrainConfig(device_type=config.device_type, mesh=config.mesh, dtype=config.dtype)
    mesh = start_devices(shared, asks=False)
    compute = compute_for(shared, mesh)
    found = checkpoint.open_model(config.source, config.model_tag, config.step)
    sharding.check_fits(found.config, mesh)
    rows = {
        name: chat.drawn(load_task(chat.TASKS[name].spec, config.tasks_dir or None), config.max_problems)
        for name in names
    }
    how = f"at temperature {config.temperature:g}" if config.temperature else "greedily"
    longest = min(config.max_new_tokens, found.config.sequence_len)  # it shares the context with the problem
    cli.print_plan(
        f"Evaluation of {found.folder.name} ({config.source})",
        [
            ("model", str(found.folder / str(found.step))),
            ("devices", f"{sharding.describe(mesh)}, compute in {compute.dtype}"),
            ("tasks", ", ".join(f"{name} {len(rows[name]):,}" for name in names)),
            ("written answers", f"{config.num_samples} a problem, {how}, at most {longest} tokens"),
        ],
    )
    params, tokenizer = found.load(mesh), found.tokenizer
    scorer = Scorer(params, found.config, compute, mesh)
    engine = Engine(params, found.config, tokenizer, compute, batch_size=config.batch_size)
    results, values, path = [], {}, None
    settings = {name: getattr(config, name) for name in SETTINGS} | {"tasks": names, "dtype": compute.dtype}
    for name in names:
        if test := chat.TASKS[name].check:
            right = chat.write_answers(
                engine,
                rows[name],
                test,
                max_tokens=config.max_new_tokens,
                temperature=config.temperature,
                top_k=config.top_k if config.top_k > 0 else None,
                seed=config.seed,
                num_samples=config.num_samples,
            )
        else:
            right = [[one] for one in chat.choose_letters(scorer, tokenizer, rows[name])]
        results.append(chat.result_of(name, right))
        results[-1].show()
        values[name] = results[-1].accuracy
        for k in [2**i for i in range(len(right[0]).bit_length())] if len(right[0]) > 1 else []:
            values[f"{name} pass@{k}"] = chat.pass_at(k, right)
            print(f"    pass@{k} {values[f'{name} pass@{k}']:.4f}", flush=True)
        if len(results) == len(chat.TASKS):
            values["ChatCORE"] = mean(results)
            print(f"ChatCORE {values['ChatCORE']:.4f}", flush=True)
        path = save_results(found, config.source, "chat_eval", results, values, "ChatCORE", settings)
    print(f"saved {path} and .csv", flush=True)
    cli.next_step(f"python -m launch.chat_cli -i {config.source} --model_tag={found.folder.name}")


def main(args: list[str] | None = None):
    cli.main(Config, run, args)


if __name__ == "__main__":
    main()
