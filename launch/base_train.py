"""Pretrain a base model: python -m launch.base_train --depth=12"""

from jaxchat.config import BaseConfig
from launch import cli


def val_batches(config: BaseConfig, setting) -> list[dict]:
    from jaxchat import sharding
    from jaxchat.data import pipelines
    from jaxchat.data.encode import text_reader
    from jaxchat.data.sources import ParquetText, find_shards

    texts = ParquetText(find_shards(config.data_dir, "val"))
    read = text_reader(texts, setting.tokenizer)
    rows = config.device_batch_size * sharding.data_shards(setting.mesh)
    return pipelines.packed_validation(
        read, range(len(texts)), rows=rows, time=config.max_seq_len, max_tokens=config.eval_tokens
    )


def core_bundle(config: BaseConfig) -> tuple[list, str]:
    """(CORE's tasks, the plan's words about them); no tasks where there is no bundle and none was named."""
    from jaxchat.eval import core

    if config.core_metric_every <= 0:
        return [], "not measured"
    try:
        bundle = core.load_bundle(config.eval_bundle)
        for task in bundle:  # too few items are told before the training
            task.drawn(config.core_metric_max_per_task)
    except core.NoBundle as problem:
        if config.eval_bundle:
            raise
        return [], f"not measured: {problem}"
    return bundle, f"{len(bundle)} tasks every {config.core_metric_every:,} steps"


def run(config: BaseConfig):
    from jaxchat.eval import core
    from jaxchat.eval.bpb import bits_per_byte
    from jaxchat.eval.results import mean
    from jaxchat.eval.samples import show_samples
    from jaxchat.eval.scoring import Scorer
    from jaxchat.infer.engine import Engine
    from jaxchat.report import record
    from jaxchat.train import stages
    from jaxchat.train.loop import Evaluation, train

    began = record.begin()
    stage, setting = stages.base(config)
    bundle, told = core_bundle(config)
    stage.plan.append(("CORE", told))
    cli.print_plan(stage.title, stage.plan)
    model, compute, tokenizer, mesh = setting.model, setting.compute, setting.tokenizer, setting.mesh
    batches = val_batches(config, setting) if config.eval_every > 0 else []

    def val_bpb(params):
        return {"val_bpb": bits_per_byte(params, batches, tokenizer.token_bytes, model, compute, mesh)}

    def samples(params):
        show_samples(Engine(params, model, tokenizer, compute, batch_size=8))
        return {}

    def core_metric(params):
        scorer = Scorer(params, model, compute, mesh)
        return {"core": mean(core.evaluate(scorer, tokenizer, bundle, config.core_metric_max_per_task))}

    record.at_end(stage, config, began)
    train(
        stage,
        [
            Evaluation("validation", config.eval_every, val_bpb, at_start=True),
            Evaluation("CORE", config.core_metric_every if bundle else -1, core_metric),
            Evaluation("samples", config.sample_every, samples),
        ],
    )
    cli.next_step(f"python -m launch.mid_train --model_tag={stage.tag}")


def main(args: list[str] | None = None):
    cli.main(BaseConfig, run, args)


if __name__ == "__main__":
    main()
