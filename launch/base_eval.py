"""Evaluate a base model: python -m launch.base_eval --model_tag=d12"""

import dataclasses
from functools import partial

from jaxchat.config import TrainConfig, UserError
from launch import cli


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure a base model: bits per byte on training and validation text, CORE over 22 tasks, and what it says.

    The results go beside its checkpoint, as base_eval_<step>.csv and .json.
    """

    model_tag: str = ""
    """Which base model; empty: the deepest d<N>, or else the newest."""
    step: int = -1
    """Which of its checkpoints; -1: the last."""
    device_type: str = ""
    """cpu, cuda or tpu; empty: the best there is."""
    mesh: str = ""
    """Devices along each axis, as in base_train."""
    dtype: str = "auto"
    """Of the computation: float32 or bfloat16; auto: float32 on a CPU, bfloat16 elsewhere."""
    eval_bundle: str = ""
    """CORE's bundle, a folder or a zip; empty: <base directory>/eval_bundle, or else eval_bundle.zip."""
    max_per_task: int = -1
    """At most so many items of each of CORE's tasks; -1: all."""
    data_dir: str = ""
    """Folder of the parquet shards, the last one for validation; empty: <base directory>/base_data."""
    device_batch_size: int = 32
    """Rows a device computes at a time for bits per byte; lower it if memory runs out, the result stays the same."""
    eval_tokens: int = 20 * 524288
    """Bits per byte on so many tokens of training and of validation text each; 0: not at all."""


def run(config: Config):
    from jaxchat import checkpoint, sharding
    from jaxchat.data import pipelines
    from jaxchat.data.encode import text_reader
    from jaxchat.data.sources import ParquetText, find_shards
    from jaxchat.eval import core
    from jaxchat.eval.bpb import bits_per_byte
    from jaxchat.eval.results import TaskResult, mean, save_results
    from jaxchat.eval.samples import show_samples
    from jaxchat.eval.scoring import Scorer
    from jaxchat.infer.engine import Engine
    from jaxchat.train.run import compute_for, start_devices

    if config.device_batch_size < 1:
        raise UserError(f"--device_batch_size={config.device_batch_size}; it must be at least 1")
    shared = TrainConfig(device_type=config.device_type, mesh=config.mesh, dtype=config.dtype)
    mesh = start_devices(shared, asks=False)
    compute = compute_for(shared, mesh)
    found = checkpoint.open_model("base", config.model_tag, config.step)
    tokenizer, model = found.tokenizer, found.config
    sharding.check_fits(model, mesh)
    bundle = core.load_bundle(config.eval_bundle)
    counts = [len(task.drawn(config.max_per_task)) for task in bundle]
    splits = ("train", "val") if config.eval_tokens > 0 else ()
    texts = {split: ParquetText(find_shards(config.data_dir, split)) for split in splits}
    cli.print_plan(
        f"Evaluation of {found.folder.name} (base)",
        [
            ("model", str(found.folder / str(found.step))),
            ("devices", f"{sharding.describe(mesh)}, compute in {compute.dtype}"),
            ("bits per byte", f"on {config.eval_tokens:,} tokens of each split" if splits else "not measured"),
            ("CORE", f"{len(bundle)} tasks, {sum(counts):,} items"),
        ],
    )
    params = found.load(mesh)
    settings = {"max_per_task": config.max_per_task, "eval_tokens": config.eval_tokens, "dtype": compute.dtype}
    values = {}
    for split, text in texts.items():
        rows = config.device_batch_size * sharding.data_shards(mesh)
        size = {"rows": rows, "time": model.sequence_len, "max_tokens": config.eval_tokens}
        batches = pipelines.packed_validation(text_reader(text, tokenizer), range(len(text)), **size)
        values[f"{split}_bpb"] = bits_per_byte(params, batches, tokenizer.token_bytes, model, compute, mesh)
        print(f"{split}_bpb {values[f'{split}_bpb']:.4f}", flush=True)
    print("CORE:")
    scorer = Scorer(params, model, compute, mesh)
    results = core.evaluate(scorer, tokenizer, bundle, config.max_per_task, TaskResult.show)
    values["core"] = mean(results)
    print(f"CORE {values['core']:.4f}", flush=True)
    save = partial(save_results, found, "base", "base_eval", results, values, "core", settings)
    save()  # before the samples: hours may lie in it
    path = save(samples=show_samples(Engine(params, model, tokenizer, compute, batch_size=8)))
    print(f"saved {path} and .csv", flush=True)
    cli.next_step(f"python -m launch.mid_train --model_tag={found.folder.name}")


def main(args: list[str] | None = None):
    cli.main(Config, run, args)


if __name__ == "__main__":
    main()
