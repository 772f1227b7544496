"""Pretrain a base model: python -m launch.base_train --depth=12"""

from jaxchat import sharding
from jaxchat.config import BaseConfig
from jaxchat.data import pipelines
from jaxchat.data.encode import text_reader
from jaxchat.data.sources import ParquetText, find_shards
from jaxchat.eval.bpb import bits_per_byte
from jaxchat.eval.samples import show_samples
from jaxchat.infer.engine import Engine
from jaxchat.train import stages
from jaxchat.train.loop import Evaluation, train
from jaxchat.train.run import Setting
from launch import cli


def val_batches(config: BaseConfig, setting: Setting) -> list[dict]:
    texts = ParquetText(find_shards(config.data_dir, "val"))
    read = text_reader(texts, setting.tokenizer)
    rows = config.device_batch_size * sharding.data_shards(setting.mesh)
    return pipelines.packed_validation(
        read, range(len(texts)), rows=rows, time=config.max_seq_len, max_tokens=config.eval_tokens
    )


def run(config: BaseConfig):
    stage, setting = stages.base(config)
    cli.print_plan(stage.title, stage.plan)
    model, compute, tokenizer, mesh = setting.model, setting.compute, setting.tokenizer, setting.mesh
    batches = val_batches(config, setting) if config.eval_every > 0 else []

    def val_bpb(params):
        return {"val_bpb": bits_per_byte(params, batches, tokenizer.token_bytes, model, compute, mesh)}

    def samples(params):
        print("continuations:")
        return show_samples(Engine(params, model, tokenizer, compute))

    train(
        stage,
        [
            Evaluation("validation", config.eval_every, val_bpb, at_start=True),
            Evaluation("samples", config.sample_every, samples),
        ],
    )
    cli.next_step(f"python -m launch.mid_train --model_tag={stage.tag}")


def main(args: list[str] | None = None):
    cli.main(BaseConfig, run, args)


if __name__ == "__main__":
    main()
