"""Check what a run will need before it begins: python -m launch.check --depth=20"""

import contextlib
import dataclasses
import math
import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from jaxchat.config import MOST_TOKENS, STAGES, BaseConfig, MidConfig, SFTConfig, UserError, counted, flag
from jaxchat.speedrun.estimate import BYTES_A_TOKEN, shards_for
from launch import base_train, cli, download, tok_train


@dataclasses.dataclass(frozen=True)
class Config(BaseConfig):
    """Check in seconds what base_train, mid_train, chat_sft and the evaluations will need: text, tokenizer,
    tasks, the CORE bundle, disk, devices, driver and kernel.

    The flags are those of base_train; the other stages are checked with their default flags. Each item is
    printed on a line that begins with "ok", "warning" or "missing". The last line is the command to run next.
    The exit code is 2 if something that a stage needs is missing.
    """

    tasks_dir: str = ""
    """Folder of the task files; empty: <base directory>/tasks."""
    vocab_size: int = flag(tok_train.Config.vocab_size, 1, MOST_TOKENS)
    """Vocabulary size to assume if there is no tokenizer yet."""


class Checklist(list):
    """A list of checked items, as tuples (state, name, text, command).

    state: "ok", "warning" or "missing". command: what to run to get a missing item, or "".
    """

    def add(self, name: str, text: str, state: str = "ok", **flags: str):
        """Add an item. If `text` contains a command, make it ready to paste, with the non-empty `flags`.

        state: "ok", "warning" or "missing".
        """
        found = re.search(r"(python -m launch\.|make setup )[^;]+", text)
        command = cli.runnable(found[0], **flags) if found else ""
        text = text.replace(found[0], command) if found else text
        self.append((state, name, " ".join(text.split()), command))

    @contextlib.contextmanager
    def expecting(self, name: str, state: str = "missing", **flags: str):
        """Return a context that catches a UserError and adds its message as an item.

        `flags` are added to the command in the message.
        """
        try:
            yield
        except UserError as problem:
            self.add(name, str(problem), state, **flags)


def run(config: Config) -> int:
    from jaxchat.devices import model_for
    from jaxchat.train import stages
    from jaxchat.train.run import tokenizer_for

    tag, checks, tokenizer = config.model_tag or f"d{config.depth}", Checklist(), None
    mesh = check_devices(config, checks)
    with contextlib.suppress(UserError):
        tokenizer = tokenizer_for(config, "base", tag)
    vocab_size = tokenizer.vocab_size if tokenizer else config.vocab_size
    model, given = model_for(config, stages.base_model(config, vocab_size), mesh), config
    with checks.expecting("horizon"):
        config = stages.with_horizon(config, model.config)
    check_model(config, model, tag, checks)
    data = check_text(config, tokenizer, model, checks)
    with checks.expecting("tokenizer", data_dir=config.data_dir):
        tokenizer = tokenizer or tokenizer_for(config, "base", tag)
        warning = data and base_train.about_tokenizer(config, tokenizer, data)
        unknown = ", trained on unknown text"
        known = (", trained on these shards" if data else "") if tokenizer.trained_on else unknown
        text = warning[0][1] if warning else f"{tokenizer.vocab_size:,} tokens{known}"
        checks.add("tokenizer", text, "warning" if warning else "ok")
    check_tasks(config, checks)
    cli.print_plan(f"Check of {tag}", [(f"{state:<7}  {name}", text) for state, name, text, _ in checks])
    missing = [command for state, *_, command in checks if state == "missing"]
    if any(missing):
        print("next:", " && ".join(merge_commands(filter(None, missing))), flush=True)
    elif not missing:
        values = {field.name: getattr(given, field.name) for field in dataclasses.fields(BaseConfig)}
        usual = BaseConfig.given(arch=config.arch)
        changed = {name: str(value) for name, value in values.items() if value != getattr(usual, name)}
        more = "" if config.arch == BaseConfig.arch else f" --arch={config.arch}"
        cli.next_step(f"python -m launch.base_train{more}", **changed)
    return 2 if missing else 0


def merge_commands(commands: Iterable[str]) -> list[str]:
    """Drop repeated commands, and merge all downloads to the same folder into one command."""
    joined: dict[tuple, dict] = {}  # {(the command before the names, --to): {name or other flag: None}}
    for command in commands:
        before, download, after = command.partition("launch.download ")
        words = shlex.split(after)
        to = [word for word in words if word.startswith("--to=")]
        rest = dict.fromkeys(word for word in words if word not in to)
        joined.setdefault((before + download, *to), {}).update(rest)
    return [
        before + shlex.join([*sorted(rest, key=lambda word: word.startswith("-")), *to])
        for (before, *to), rest in joined.items()
    ]


def check_devices(config: Config, checks: Checklist):
    """Check the driver and devices. Return a mesh of the devices or, if they cannot be used, of CPUs."""
    import jax

    from jaxchat import devices, hosts, sharding

    checks.add("driver", *devices.about_driver())
    with checks.expecting("devices"):
        mesh, note = devices.start_devices(config, alone=True), ""
        place = hosts.detect(config.coordinator, config.num_processes, config.process_id)
        if not hosts.is_alone(place):
            note = " in this process alone; memory and batch are checked for these"
        elif devices.DRIVER.is_file() and jax.default_backend() == "cpu" and not jax.config.jax_platforms:
            note = ": JAX found no GPU, although there is a driver"
        checks.add("devices", sharding.describe(mesh) + note, "warning" if note else "ok")
        return mesh
    jax.config.update("jax_platforms", "cpu")
    return sharding.make_mesh()


def check_model(config: Config, model, tag: str, checks: Checklist):
    """Check device memory, disk space for the checkpoints of model `tag`, and how devices divide batches."""
    import jax

    from jaxchat import checkpoint, files
    from jaxchat.store import KEEP
    from jaxchat.train import fit, stages
    from jaxchat.train.state import abstract_state

    state = abstract_state(model, stages.optimizer_for(config, model, grad_clip=config.grad_clip))
    arrays = jax.tree.leaves(state)
    on_device = [math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in arrays]
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // model.mesh.size
    memory, needed = fit.device_memory(model.mesh) or host, sum(on_device)
    text = f"{files.size_text(memory)} a device; weights and optimizer take {files.size_text(needed)}"
    more = ": lower --depth, or use more devices (--mesh)" if needed > memory else ""
    checks.add("memory", text + more, "missing" if more else "ok")
    # Only a warning for mid, which can take another --total_batch_size. SFT's step fits on any number of
    # devices.
    for name, flags, bad in (("base", config, "missing"), ("mid", MidConfig(), "warning")):
        with checks.expecting(f"{name} batch", bad):
            cut = stages.Cut.of(flags, config.max_seq_len, model)
            checks.add(f"{name} batch", cut.plan_row(config.max_seq_len, model)[1])
    # Space for one checkpoint more than KEEP, because it is written before the oldest is deleted.
    size = needed = sum(a.size * a.dtype.itemsize for a in arrays)
    for stage in (stage for stage in STAGES.values() if not stage.optional):
        folder, name = checkpoint.run_folder(stage.name, tag), f"{stage.label} disk"
        steps = checkpoint.steps_in(folder)
        needed += max(0, KEEP - len(steps)) * size
        with checks.expecting(name):
            files.check_space(folder, needed)
            total, free = files.size_text(needed), files.size_text(files.free_space(folder))
            text = f"{KEEP} checkpoints of {files.size_text(size)}, one more while saving; "
            text += f"up to this stage in all {total} of {free} free"
            refused = steps and not (config.resume or config.overwrite)
            text += f"; step {steps[-1]} exists: add --resume or --overwrite" if refused else ""
            checks.add(name, text, "warning" if refused else "ok")


def check_text(config: Config, tokenizer, model, checks: Checklist) -> dict[str, str]:
    """Check whether there is enough text to train without repeating any.

    Return {shard name: fingerprint}, or {} if there is no text. Without a tokenizer (None), the number of
    tokens is estimated from the bytes.
    """
    from jaxchat.data.encode import text_reader
    from jaxchat.data.sources import SOURCE, ParquetText, find_shards, open_parquet, repeated
    from jaxchat.train.stages import SAMPLE, horizon_of, tokens_in

    tokens = horizon_of(config, model.config).tokens
    try:
        texts = ParquetText(find_shards(config.data_dir, "train", whole=True))
        held_out = ParquetText(find_shards(config.data_dir, "val"))
    except UserError as problem:
        name = "fineweb-edu" if model.config.plain else "climbmix"
        wanted = f"{name} --shards={shards_for(config, model.config)}"
        checks.add("text", str(problem).replace("fineweb-edu --shards=8", wanted), "missing")
        return {}
    if tokenizer:
        there = tokens_in(text_reader(texts, tokenizer), range(min(SAMPLE, len(texts))), len(texts))
    else:
        about = [open_parquet(path, ["text"]).metadata for path in texts.paths]
        sizes = [m.row_group(i).total_byte_size for m in about for i in range(m.num_row_groups)]
        there = sum(sizes) / BYTES_A_TOKEN
    shards, epochs = len(texts.paths), tokens / max(1, there)
    text = f"{counted(shards, 'shard')} and one for validation, about {there:,.0f} tokens; "
    text += f"base reads {tokens:,}: {epochs:.2g} epochs"
    if epochs > 1:
        source = texts.paths[0].parent / SOURCE
        repo = source.read_text(encoding="utf-8").split()[0] if source.is_file() else ""
        names = [name for name, known in download.SETS.items() if getattr(known, "repo", None) == repo]
        count = math.ceil(shards * epochs) + 1
        more = f"python -m launch.download {names[0]} --shards={count}" if names else f"{count:,} shards"
        text += f"; to repeat no text: {more}"
    twins = repeated(texts.fingerprint, held_out.fingerprint)
    text += f"; {twins}" if twins else ""
    checks.add("text", text, "warning" if epochs > 1 or twins else "ok", to=config.data_dir)
    return texts.fingerprint | held_out.fingerprint


def check_tasks(config: Config, checks: Checklist):
    """Check that the tasks of mid_train, chat_sft and chat_eval and the CORE bundle can be opened, and that
    programs of HumanEval can run on this machine."""
    from jaxchat.data.tasks import load_task
    from jaxchat.eval.chat import TASKS, why_not
    from jaxchat.eval.training import core_bundle

    uses = [("mid", MidConfig.train_tasks), ("mid", MidConfig.val_tasks), ("SFT", SFTConfig.train_tasks)]
    uses += [("SFT", SFTConfig.val_tasks), *(("chat_eval", task.spec) for task in TASKS.values())]
    needed: dict[str, dict[str, tuple[str, str]]] = {}  # {task: {split: (spec, first stage that needs it)}}
    for stage, specs in uses:
        for spec in specs.split(","):
            split = spec.partition(":")[0]
            needed.setdefault(split.partition("/")[0], {}).setdefault(split, (spec, stage))
    for name, splits in needed.items():
        with checks.expecting(name):
            found = [(load_task(spec, config.tasks_dir), stage) for spec, stage in splits.values()]
            checks.add(name, ", ".join(f"{task.summary} ({stage})" for task, stage in found))
    place = Path(config.eval_bundle)
    with checks.expecting("CORE", to=str(place.parent) if place.name == "eval_bundle" else ""):
        bundle, about = core_bundle(config)
        checks.add("CORE", about, "ok" if bundle else "warning")
    why = why_not("HumanEval")
    about = f"HumanEval is not measured: {why}" if why else "programs of HumanEval can run here"
    checks.add("sandbox", about, "warning" if why else "ok")


main = cli.command(Config, run)

if __name__ == "__main__":
    main()
