"""Pretrain a base model: python -m launch.base_train --depth=12"""

import shlex

from jaxchat.config import BaseConfig
from launch import cli


def stage_for(config: BaseConfig):
    """Start the devices, build the model, open the training text, and return the Stage that train() runs."""
    from jaxchat.data.sources import ParquetText, find_shards
    from jaxchat.devices import model_for, start_devices
    from jaxchat.train import stages
    from jaxchat.train.run import tokenizer_for

    mesh = start_devices(config)
    tag = config.model_tag or f"d{config.depth}"
    tokenizer = tokenizer_for(config, "base", tag)
    model = model_for(config, stages.base_model(config, tokenizer.vocab_size), mesh)
    texts = ParquetText(find_shards(config.data_dir, "train", whole=True))
    held_out = ParquetText(find_shards(config.data_dir, "val"))
    return stages.base(config, tag, model, tokenizer, texts, held_out)


def about_tokenizer(config: BaseConfig, tokenizer, data: dict[str, str]) -> list[tuple[str, str]]:
    """Return rows for the plan: a warning if the tokenizer was trained on none of the shards in `data`.

    data: {shard name: fingerprint}. The rows are [("warning", text)] or [].
    """
    if tokenizer.knows(data):
        return []
    where = f" --data_dir={shlex.quote(config.data_dir)}" if config.data_dir else ""
    command = f"python -m launch.tok_train{where}"
    return [("warning", f"the tokenizer was trained on other text; to train one on this text: {command}")]


def run(config: BaseConfig):
    from jaxchat.eval import training
    from jaxchat.report import record
    from jaxchat.train.loop import train
    from jaxchat.train.run import find_start, open_run, plan_of

    began = record.begin()
    stage = stage_for(config)
    start = find_start(stage)
    bundle, about_core = training.core_bundle(config)
    plan = [
        *plan_of(stage, start),
        ("CORE", about_core),
        *about_tokenizer(config, stage.tokenizer, stage.data),
    ]
    cli.print_plan(stage.title, plan)
    evaluations = training.base(config, stage, bundle)
    with open_run(stage, start) as ready, record.recorded(ready, began, plan):
        train(ready, evaluations)
    if start.checkpoints:
        cli.after_base(stage.tag, stage.model.config.plain)


main = cli.command(BaseConfig, run, several=True)

if __name__ == "__main__":
    main()
