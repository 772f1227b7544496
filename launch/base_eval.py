"""Evaluate a base model: python -m launch.base_eval --model_tag=d12"""

import dataclasses
import time
from functools import partial

from jaxchat.config import MeshFlags, flag
from launch import cli


@dataclasses.dataclass(frozen=True)
class Config(MeshFlags):
    """Evaluate a base model: bits per byte of training and validation text, CORE over 22 tasks, and samples
    of text. CORE is left out if there is no CORE bundle. The results are written beside the checkpoint, as
    base_eval_<step>.csv and .json."""

    model_tag: str = flag("", alias="-g")
    """Tag of the model; empty: the deepest model tagged d<N>, or else the newest model."""
    step: int = flag(-1, 0, special=-1, alias="-s")
    """Step of the checkpoint; -1: the last."""
    eval_bundle: str = ""
    """Folder or zip file of the CORE bundle; empty: <base directory>/eval_bundle, or else eval_bundle.zip
    there."""
    max_per_task: int = flag(-1, 1, special=-1)
    """Maximum number of items of each CORE task to measure on; -1: all."""
    data_dir: str = ""
    """Folder of the parquet shards, of which the last is for validation; empty: <base
    directory>/base_data."""
    device_batch_size: int = flag(32, 1)
    """Number of rows a device computes at a time for bits per byte; lower it if memory runs out. The result
    stays the same."""
    eval_tokens: int = flag(20 * 524288, 0)
    """Number of tokens per split (training and validation) to measure bits per byte on; 0: none."""


def load_bundle(config: Config) -> tuple[list, str]:
    """Return (tasks of the CORE bundle, "") or, if there is no bundle, ([], a note that says so).

    Without a bundle, raises UserError if --eval_bundle is set or bits per byte are not measured either.
    """
    from jaxchat.eval import core

    try:
        return core.load_bundle(config.eval_bundle), ""
    except core.NoBundle as problem:
        if config.eval_bundle or config.eval_tokens <= 0:
            raise
        return [], f"NOT measured: {problem}"


def run(config: Config):
    from jaxchat import sharding
    from jaxchat.data.sources import ParquetText, find_shards
    from jaxchat.eval import core
    from jaxchat.eval.bpb import measure_text, trained_on
    from jaxchat.eval.results import TaskResult, check_writable, mean, save_results
    from jaxchat.eval.samples import show_samples
    from jaxchat.eval.scoring import Scorer, out_of_memory
    from jaxchat.infer.engine import Engine

    start = time.perf_counter()
    found, model = cli.open_model(config, "base", asks=False)
    check_writable(found.folder)
    bundle, no_core = load_bundle(config)
    items = sum(len(task.drawn(config.max_per_task)) for task in bundle)
    splits = ("train", "val") if config.eval_tokens > 0 else ()
    texts = {split: ParquetText(find_shards(config.data_dir, split)) for split in splits}
    data = {split: list(text.fingerprint.values()) for split, text in texts.items()}
    sharding.check_same(checkpoints=found.name, data=data | {"CORE items": items})
    warning = trained_on(found, texts["val"]) if texts else ""
    text_size = f"on {config.eval_tokens:,} tokens of each split"
    cli.print_plan(
        f"Evaluation of {found.folder.name} (base)",
        [
            ("model", str(found.folder / str(found.step))),
            ("devices", f"{sharding.describe(model.mesh)}, compute in {model.compute.dtype}"),
            ("bits per byte", text_size if splits else "not measured"),
            ("CORE", no_core or f"{len(bundle)} tasks, {items:,} items"),
            *([("WARNING", warning)] if warning else []),
        ],
    )
    params = found.load(model.mesh)
    settings = {name: getattr(config, name) for name in ("max_per_task", "eval_tokens")}
    settings["dtype"] = model.compute.dtype
    with out_of_memory(f"lower --device_batch_size (it was {config.device_batch_size})"):
        values = measure_text(found, params, texts, config.device_batch_size, config.eval_tokens, model)
    results = []
    if bundle:
        print("CORE:")
        with out_of_memory("use more devices"):
            scorer = Scorer(params, model)
            results = core.evaluate(scorer, found.tokenizer, bundle, config.max_per_task, TaskResult.show)
        values["core"] = mean(results)
        print(f"CORE {values['core']:.4f}", flush=True)
    cropped = {result.task: result.cropped for result in results if result.cropped}
    more = ({"cropped": cropped} if cropped else {}) | ({"warning": warning} if warning else {})
    more["seconds"] = time.perf_counter() - start
    save = partial(save_results, found, "base", "base_eval", results, values, "core", settings, **more)
    save()  # before sampling, because CORE may have taken hours
    engine = Engine(params, found.config, found.tokenizer, model.compute, batch_size=8)
    path = save(samples=show_samples(engine))
    notes = (warning and f"WARNING: {warning}", no_core and f"CORE was {no_core}")
    for line in (*filter(None, notes), f"saved {path} and .csv"):
        print(line, flush=True)
    cli.after_base(found.folder.name, found.config.plain)


main = cli.command(Config, run, several=True)

if __name__ == "__main__":
    main()
