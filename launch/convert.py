"""Convert to and from PyTorch: python -m launch.convert --source=sft --to=hf --out=my-model"""

import dataclasses
import shlex
import time

from jaxchat.config import STAGES, Flags, ModelConfig, UserError, counted, flag, how_to_install, user_path
from launch import cli


@dataclasses.dataclass(frozen=True)
class Config(Flags):
    """Convert a checkpoint to PyTorch, or a PyTorch model to a checkpoint.

    Export: --source=sft --to=hf --out=FOLDER writes a folder for Hugging Face transformers; --to=nanochat
    adds the model to a base directory of nanochat. Import: --from=hf --path=FOLDER --as=base --model_tag=NAME
    writes a checkpoint for midtraining, finetuning, evaluation and chat. This command needs PyTorch and
    transformers: make setup EXTRAS=convert

    Weights, configuration, tokenizer and metadata are converted. To and from nanochat, the optimizer state of
    a base model is converted too, if the model has nanochat's architecture of March 14, 2026 or later. The
    other program can then resume the run, but it reads the data from the start. The optimizer state of a
    nanochat run on several devices is not imported.
    """

    to: str = flag("", choices=("", "hf", "nanochat"))
    """Format to export to: hf or nanochat."""
    source: str = flag("sft", choices=tuple(STAGES))
    """Stage of the checkpoint to export: base, mid, sft or rl."""
    out: str = ""
    """Folder to export to."""
    from_format: str = flag("", choices=("", "hf", "nanochat"), name="from")
    """Format to import: hf or nanochat."""
    path: str = ""
    """Folder to import: a model saved by transformers, a base directory of nanochat, or a folder of
    model_<step>.pt files."""
    as_stage: str = flag("", choices=("", *STAGES), name="as")
    """Stage to import the model as: base, mid, sft or rl."""
    model_tag: str = flag("", alias="-g")
    """Tag of the model to export (empty: the deepest model tagged d<N>, or else the newest), or tag to give
    to the imported model."""
    step: int = flag(-1, -1, alias="-s")
    """Step of the checkpoint; -1: the last."""
    softcap: int = flag(0, 0)
    """Softcap (bound of the logits) of the nanochat checkpoint to import. Needed only for checkpoints made in
    2026 from January 18 to March 1 (15) or from March 2 to 9 (20). 0: not given."""


def run(config: Config):
    if bool(config.to) == bool(config.from_format):
        raise UserError(
            "give either --to=hf|nanochat --out=FOLDER, or --from=hf|nanochat --path=FOLDER --as=STAGE"
        )
    others = (("path", config.path), ("as", config.as_stage)) if config.to else (("out", config.out),)
    for name, value in others:
        if value:
            raise UserError(f"--{name}={value} does not go with --{'to' if config.to else 'from'}")
    if config.softcap not in (0, 15, 20) or (config.softcap and config.from_format != "nanochat"):
        raise UserError(f"--softcap={config.softcap}: it must be 15 or 20, and only with --from=nanochat")
    if config.from_format == "hf" and config.step >= 0:
        raise UserError(f"--step={config.step} does not go with --from=hf, whose folders hold one model")
    try:
        import jaxchat.convert.hugging_face
        import jaxchat.convert.nanochat  # noqa: F401
    except ImportError as problem:
        raise UserError(f"conversion needs {problem.name}: {how_to_install('convert')}") from problem
    (export if config.to else take_in)(config)


def progress(config: ModelConfig):
    """Return a callback on_weight(name) that prints progress and the ETA after each converted weight."""
    import jax

    from jaxchat.model.params import declare

    start, done, weights = time.perf_counter(), 0, len(jax.tree.leaves(declare(config)))

    def on_weight(name: str):
        nonlocal done
        done += 1
        left = (time.perf_counter() - start) / done * (weights - done)
        print(f"  {done}/{weights}  {name:<14}  ETA {left:.0f} s", flush=True)

    return on_weight


def shape_rows(model, tokenizer) -> list[tuple[str, str]]:
    from jaxchat.model.flops import num_params

    depth = counted(model.n_layer, "layer")
    heads = f"{counted(model.n_head, 'head')} ({model.n_kv_head} key/value) × {model.head_dim}"
    rows = [
        ("model", f"{depth} × {model.n_embd}, {heads}, vocabulary {model.vocab_size:,}"),
        ("parameters", f"{num_params(model):,}; {num_params(model) * 4 / 1e9:.2f} GB in float32"),
    ]
    if tokenizer is None:
        return [*rows, ("warning", "there is no tokenizer; only the weights are converted")]
    padding = model.vocab_size - tokenizer.vocab_size
    more = f"; the model has {padding:,} further ids, which no text uses" if padding else ""
    return [*rows, ("tokenizer", f"{tokenizer.vocab_size:,} tokens, {tokenizer.hash[:12]}{more}")]


def export(config: Config):
    from jaxchat import checkpoint
    from jaxchat.convert import hugging_face, nanochat

    if not config.out:
        raise UserError(f"--to={config.to} needs --out=FOLDER")
    found = checkpoint.open_model(config.source, config.model_tag, config.step, needs_tokenizer=False)
    rows = [("from", str(found.path)), *shape_rows(found.config, found.tokenizer), ("writes", config.out)]
    cli.print_plan(f"Convert {found.name} to {config.to}", rows)
    out, on_weight = user_path(config.out), progress(found.config)
    try:
        if config.to == "hf":
            written = hugging_face.export(found, out, on_weight, chat=config.source != "base")
        else:
            written = nanochat.export(found, out, on_weight)
    except OSError as problem:
        name = problem.filename or config.out
        raise UserError(
            f"{name}: {problem.strerror or problem}; fix that, or give another --out"
        ) from problem
    print(f"wrote {written}")
    if config.to == "hf":
        print(f"next: in Python, transformers.AutoModelForCausalLM.from_pretrained({str(written)!r})")
    else:
        folder = shlex.quote(str(out.absolute()))
        print(f"next: in nanochat, NANOCHAT_BASE_DIR={folder} python -m scripts.chat_cli -i {config.source}")


def take_in(config: Config):
    from jaxchat import checkpoint
    from jaxchat.convert import hugging_face, nanochat, weights

    if not (config.path and config.as_stage and config.model_tag):
        raise UserError(
            f"--from={config.from_format} needs --path=FOLDER, --as=base|mid|sft|rl and --model_tag=NAME"
        )
    target = checkpoint.run_folder(config.as_stage, config.model_tag)
    if target.exists():
        raise UserError(f"{target} exists; choose another --model_tag, or remove it")
    path = user_path(config.path)
    if not path.is_dir():
        raise UserError(f"there is no folder {path}; give --path the folder to import")
    if config.from_format == "hf":
        foreign = hugging_face.load(path)
    else:
        foreign = nanochat.load(path, config.as_stage, config.model_tag, config.step, config.softcap)
    weights.check(foreign)
    rows = [("from", str(foreign.path)), *shape_rows(foreign.config, foreign.tokenizer)]
    optimizer = None
    if config.from_format == "nanochat" and config.as_stage == "base":
        optimizer, about = nanochat.load_optimizer(foreign)
        rows.append(("optimizer", about))
    title = f"Import a model from {config.from_format} as {config.as_stage} {config.model_tag}"
    cli.print_plan(title, [*rows, ("writes", f"{target}/{foreign.step}")])
    weights.take_in(foreign, target, config.as_stage, config.from_format, progress(foreign.config), optimizer)
    print(f"wrote {target}/{foreign.step}")
    if foreign.tokenizer is None:
        print(
            "to train or chat with it, copy its tokenizer folder (ranks.txt, tokenizer.json) to "
            f"{target}/tokenizer"
        )
    elif config.as_stage == "base":
        cli.after_base(config.model_tag, foreign.config.plain)
    else:
        cli.next_step(f"python -m launch.chat_cli --source={config.as_stage} --model_tag={config.model_tag}")


main = cli.command(Config, run)

if __name__ == "__main__":
    main()
