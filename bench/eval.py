"""Time evaluation with a random model: python -m bench.eval --eval_bundle=DIR --tasks_dir=DIR

CORE, compilation included; and prompts of GSM8K answered all at once and one by one, without compilation.
"""

import dataclasses
import time

import jax
import numpy as np

from jaxchat import sharding
from jaxchat.config import Compute, Model, ModelConfig
from jaxchat.data.tasks import load_task
from jaxchat.eval import chat, core
from jaxchat.eval.scoring import Scorer, buckets, span_losses
from jaxchat.infer import engine as engine_module
from jaxchat.infer.engine import Engine
from jaxchat.model import params as model_params
from jaxchat.tokenizer import Tokenizer
from launch import cli


@dataclasses.dataclass(frozen=True)
class Config:
    """Time CORE and generation with a random model, whose answers run to their limit."""

    depth: int = 4
    """Layers of the model."""
    seq: int = 512
    """The model's context, in tokens."""
    vocab: int = 8192
    """Size of the vocabulary; the tokenizer is trained on the bundle's texts."""
    max_per_task: int = 100
    """Items of each of CORE's tasks."""
    prompts: int = 256
    """Prompts of GSM8K to answer all at once; 0: none."""
    alone: int = 8
    """Number of prompts to answer one at a time as well."""
    max_tokens: int = 128
    """Tokens of each answer."""
    batch_size: int = 128
    """Answers written at a time."""
    eval_bundle: str = ""
    """CORE's bundle; empty: the base directory's."""
    tasks_dir: str = ""
    """Folder of GSM8K's files; empty: <base directory>/tasks."""


def random_params(config: ModelConfig):
    """Random weights, none of them zero: answers differ, and few end by themselves."""
    leaves, tree = jax.tree.flatten(model_params.shapes(config))

    @jax.jit
    def make(key):
        keys = jax.random.split(key, len(leaves))
        return [0.05 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]

    return jax.tree.unflatten(tree, make(jax.random.key(0)))


def timed(call):
    began = time.perf_counter()
    result = call()
    return result, time.perf_counter() - began


def time_core(config: Config, model: ModelConfig, params, tokenizer: Tokenizer, bundle, mesh):
    compute = Compute.for_backend(mesh=mesh)
    scorer, before = Scorer(params, Model(model, compute)), span_losses._cache_size()
    began = time.perf_counter()

    def on_result(result):
        print(
            f"  {result.task:<34}{result.items:>5} items, {time.perf_counter() - began:6.1f} s so far",
            flush=True,
        )

    results, seconds = timed(lambda: core.evaluate(scorer, tokenizer, bundle, config.max_per_task, on_result))
    compiled = span_losses._cache_size() - before
    print(
        f"CORE: {len(results)} tasks, {sum(result.items for result in results):,} items in {seconds:.1f} s; "
        f"{compiled} compilations, {len(buckets(model.sequence_len))} lengths"
    )


def time_answers(config: Config, model: ModelConfig, params, tokenizer: Tokenizer):
    rows = chat.drawn(load_task("GSM8K/test", config.tasks_dir or None), config.prompts)
    room = model.sequence_len - config.max_tokens
    prompts = [tokenizer.render_for_completion(row)[-room:] for row in rows]
    rates = {}
    for name, asked, slots in (
        ("one at a time", prompts[: config.alone], 1),
        ("all at once", prompts, config.batch_size),
    ):
        engine = Engine(params, model, tokenizer, batch_size=slots)
        how = {"max_tokens": config.max_tokens, "temperature": 0.0}
        first = how | {"max_tokens": 2}  # all shapes, and little else
        groups = [[prompt] for prompt in asked] if slots == 1 else [asked]
        before = engine_module.decode._cache_size() + engine_module.read_prompts._cache_size()
        _, cold = timed(lambda e=engine, g=groups, h=first: [e.generate(group, **h) for group in g])
        compiled = engine_module.decode._cache_size() + engine_module.read_prompts._cache_size() - before
        answers, seconds = timed(lambda e=engine, g=groups, h=how: [e.generate(group, **h) for group in g])
        tokens = sum(len(one.tokens) for group in answers for one in group)
        rates[name] = tokens / seconds
        print(
            f"{name}: {len(asked)} prompts of {np.mean([len(p) for p in asked]):.0f} tokens, {tokens:,} "
            f"tokens in {seconds:.1f} s, {rates[name]:,.0f} tokens/s ({compiled} compilations before, "
            f"{cold:.1f} s)",
            flush=True,
        )
    print(f"all at once / one at a time: {rates['all at once'] / rates['one at a time']:.1f} ×")


def run(config: Config):
    mesh = sharding.make_mesh(jax.local_devices()[:1])
    bundle = core.load_bundle(config.eval_bundle)
    texts = (str(item.get("query") or item.get("context") or "") for task in bundle for item in task.items)
    tokenizer = Tokenizer.train(texts, config.vocab)
    model = ModelConfig.from_depth(config.depth, sequence_len=config.seq, vocab_size=tokenizer.vocab_size)
    cli.print_plan(
        "Time of evaluation",
        [
            ("model", f"depth {config.depth}, {config.seq} tokens, vocabulary {model.vocab_size:,}"),
            ("device", sharding.describe(mesh)),
            ("CORE", f"{len(bundle)} tasks, at most {config.max_per_task} items each"),
            ("answers", f"{config.prompts} of GSM8K, {config.max_tokens} tokens each"),
        ],
    )
    params = random_params(model)
    if config.prompts > 0:
        time_answers(config, model, params, tokenizer)
    if config.max_per_task > 0:
        time_core(config, model, params, tokenizer, bundle, mesh)


def main(args: list[str] | None = None):
    cli.main(Config, run, args)


if __name__ == "__main__":
    main()
