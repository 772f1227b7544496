"""To and from PyTorch: python -m launch.convert --source=sft --to=hf --out=my-model"""

import dataclasses
import functools
import time
from pathlib import Path

from jaxchat.config import STAGES, Flags, ModelConfig, UserError, flag
from launch import cli


@dataclasses.dataclass(frozen=True)
class Config(Flags):
    """Convert a checkpoint to PyTorch, or one of PyTorch's to jaxchat.

    Out: --source=sft --to=hf --out=FOLDER writes a folder for Hugging Face transformers; --to=nanochat adds to a base
    directory of nanochat's. In: --from=hf --path=FOLDER --as=base --model_tag=NAME makes a checkpoint that can be
    midtrained, finetuned, evaluated and chatted with. Weights, configuration, tokenizer and metadata go along; the
    optimizer does not.
    """

    to: str = flag("", choices=("", "hf", "nanochat"))
    """Write this format: hf or nanochat."""
    source: str = flag("sft", choices=tuple(STAGES))
    """Convert a base, mid or sft checkpoint."""
    out: str = ""
    """The folder to write."""
    from_format: str = flag("", choices=("", "hf", "nanochat"), name="from")
    """Read this format: hf or nanochat."""
    path: str = ""
    """The folder to read: transformers' own; or nanochat's base directory, or one with its model_<step>.pt files."""
    as_stage: str = flag("", choices=("", *STAGES), name="as")
    """Take it in as a base, mid or sft checkpoint."""
    model_tag: str = flag("", alias="-g")
    """Out: which model; empty: the deepest d<N>, or else the newest. In: its name here."""
    step: int = flag(-1, -1, alias="-s")
    """Which of its checkpoints; -1: the last."""


def run(config: Config):
    if bool(config.to) == bool(config.from_format):
        raise UserError("give either --to=hf|nanochat --out=FOLDER, or --from=hf|nanochat --path=FOLDER --as=STAGE")
    others = (("path", config.path), ("as", config.as_stage)) if config.to else (("out", config.out),)
    for name, value in others:
        if value:
            raise UserError(f"--{name}={value} does not go with --{'to' if config.to else 'from'}")
    if config.from_format == "hf" and config.step >= 0:
        raise UserError(f"--step={config.step} does not go with --from=hf: such a folder holds one model")
    try:
        from jaxchat.convert import hugging_face, nanochat, weights
    except ImportError as problem:
        raise UserError(f"conversion needs {problem.name}; pip install 'jaxchat[convert]'") from problem
    if config.to:
        to_hf = functools.partial(hugging_face.export, chat=config.source != "base")
        export(config, to_hf if config.to == "hf" else nanochat.export)
    else:
        take_in(config, hugging_face, nanochat, weights)


def progress(config: ModelConfig):
    """A function to call with the name of each stack of weights that is done; it prints how far it has come."""
    import jax

    from jaxchat.model.params import declare

    start, done, stacks = time.perf_counter(), 0, len(jax.tree.leaves(declare(config)))

    def tell(name: str):
        nonlocal done
        done += 1
        left = (time.perf_counter() - start) / done * (stacks - done)
        print(f"  {done}/{stacks}  {name:<14}  ETA {left:.0f} s", flush=True)

    return tell


def shape_rows(model, tokenizer) -> list[tuple[str, str]]:
    from jaxchat.model.flops import num_params

    heads = f"{model.n_head} heads ({model.n_kv_head} key/value) × {model.head_dim}"
    rows = [
        ("model", f"{model.n_layer} layers × {model.n_embd}, {heads}, vocabulary {model.vocab_size:,}"),
        ("parameters", f"{num_params(model):,}; {num_params(model) * 4 / 1e9:.2f} GB in float32"),
    ]
    if tokenizer is None:
        return [*rows, ("warning", "there is no tokenizer: the weights alone are converted")]
    padding = model.vocab_size - tokenizer.vocab_size
    more = f"; the model has {padding:,} ids more, which are never text" if padding else ""
    return [*rows, ("tokenizer", f"{tokenizer.vocab_size:,} tokens, {tokenizer.hash[:12]}{more}")]


def export(config: Config, write):
    from jaxchat import checkpoint

    if not config.out:
        raise UserError(f"--to={config.to} needs --out=FOLDER")
    found = checkpoint.open_model(config.source, config.model_tag, config.step, needs_tokenizer=False)
    rows = [("from", str(found.folder / str(found.step))), *shape_rows(found.config, found.tokenizer)]
    cli.print_plan(f"Convert {found.name} to {config.to}", [*rows, ("writes", config.out)])
    try:
        written = write(found, Path(config.out).expanduser(), progress(found.config))
    except OSError as problem:
        raise UserError(
            f"{problem.filename or config.out}: {problem.strerror}; mend that, or give another --out"
        ) from problem
    print(f"wrote {written}")
    if config.to == "hf":
        print(f"next: in Python, transformers.AutoModelForCausalLM.from_pretrained({str(written)!r})")
    else:
        print(f"next: in nanochat, with NANOCHAT_BASE_DIR={config.out}, python -m scripts.chat_cli -i {config.source}")


def take_in(config: Config, hugging_face, nanochat, weights):
    from jaxchat import checkpoint

    if not (config.path and config.as_stage and config.model_tag):
        raise UserError(f"--from={config.from_format} needs --path=FOLDER, --as=base|mid|sft and --model_tag=NAME")
    target = checkpoint.run_folder(config.as_stage, config.model_tag)
    if target.exists():
        raise UserError(f"{target} is there already; choose another --model_tag, or remove it")
    path = Path(config.path).expanduser()
    if not path.is_dir():
        raise UserError(f"there is no folder {path}")
    if config.from_format == "hf":
        foreign = hugging_face.load(path)
    else:
        foreign = nanochat.load(path, config.as_stage, config.model_tag, config.step)
    weights.check(foreign)
    told = [("warning", text) for text in foreign.warnings]
    rows = [("from", str(foreign.path)), *shape_rows(foreign.config, foreign.tokenizer), *told]
    cli.print_plan(
        f"Take in a model of {config.from_format}'s as {config.as_stage} {config.model_tag}",
        [*rows, ("writes", f"{target}/{foreign.step}")],
    )
    weights.take_in(foreign, target, config.as_stage, config.from_format, progress(foreign.config))
    print(f"wrote {target}/{foreign.step}")
    if foreign.tokenizer is None:
        print(f"to train or chat with it, copy its tokenizer folder (ranks.txt, tokenizer.json) to {target}/tokenizer")
    elif config.as_stage == "base":
        cli.next_step(f"python -m launch.mid_train --model_tag={config.model_tag}")
    else:
        cli.next_step(f"python -m launch.chat_cli --source={config.as_stage} --model_tag={config.model_tag}")


def main(args: list[str] | None = None):
    cli.main(Config, run, args)


if __name__ == "__main__":
    main()
