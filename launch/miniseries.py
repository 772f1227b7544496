"""Train a series of small models and fit scaling laws: python -m launch.miniseries --depths=4,6,8,10"""

import dataclasses
import math
import shlex

from jaxchat import files
from jaxchat.config import BaseConfig, Flags, UserError, base_dir, flag
from jaxchat.speedrun import state, steps
from jaxchat.speedrun.estimate import Machine, eval_tokens, read_minutes, time_of, train_minutes
from jaxchat.speedrun.plan import table
from jaxchat.speedrun.presets import CPU, H100, TOKENIZER, Places
from jaxchat.speedrun.progress import outlook
from jaxchat.speedrun.runner import Runner, python
from jaxchat.speedrun.state import State
from jaxchat.speedrun.steps import Checkpoint, Results, Step
from launch import base_eval, cli
from launch.cluster.local import shares, visible_gpus
from launch.speedrun import flag_names, flag_words, how_to_continue, run_steps, stay_off_devices

# Flags for base_train, so that it evaluates at the beginning and the end only.
QUIET = ("--eval_every=1000000", "--core_metric_every=-1", "--sample_every=-1")
OWN = {"depth", "model_tag", "target_flops", "num_iterations", "resume", "overwrite", "dry_run", "data_dir"}
FREE = frozenset(f.name for f in dataclasses.fields(BaseConfig) if f.metadata.get("free")) - OWN


@dataclasses.dataclass(frozen=True)
class Config(Flags):
    """Train base models of several depths, and fit scaling laws to their losses.

    With --depths alone, each model is trained on a number of tokens in proportion to its size
    (--target_param_data_ratio). With --budgets too, each depth is trained for each number of FLOPs, and a
    parabola through the losses gives the best model size for each budget (isoFLOP).

    Text and a tokenizer must exist already. After an interruption, the same command continues and skips the
    runs that are done. The results are written to <base directory>/report/<name>: a page on the runs, fits
    with 95 % intervals, and plots.
    """

    depths: str = "4,6,8,10,12"
    """Depths (numbers of layers) to train, separated by commas."""
    budgets: str = ""
    """Numbers of training FLOPs, separated by commas, as in 1e17,3e17,1e18; each depth is trained for each of
    them. Empty: each depth is trained on a number of tokens in proportion to its size."""
    name: str = "miniseries"
    """Name of the series; its runs are named <name>-d<depth> or, with --budgets, <name>-d<depth>-<FLOPs>."""
    base: str = ""
    """Further flags for launch.base_train, separated by spaces, as in --base="--max_seq_len=512"."""
    core: bool = False
    """Also measure CORE of each model, with launch.base_eval."""
    base_eval: str = ""
    """Further flags for launch.base_eval, separated by spaces; only used with --core."""
    data_dir: str = ""
    """Folder of the parquet shards, of which the last is for validation; empty: <base
    directory>/base_data."""
    parallel: int = flag(0, 0)
    """Number of runs at the same time on this host, which divide its GPUs equally; 0: one per GPU, or one if
    there is no GPU."""
    redo: str = ""
    """Runs to train again, separated by commas, as in d4,d6-1e17; their old results are deleted first."""
    restarts: int = flag(3, 0)
    """Maximum number of restarts of a stopped, killed or aborted run. Other errors end the series."""
    dry_run: bool = False
    """Print the plan and do nothing."""


def run(config: Config) -> int:
    stay_off_devices()
    listed, flags = make_steps(config)
    known = State(base_dir() / "speedrun" / config.name)
    redo = steps.named(listed, "redo", config.redo)
    why = state.to_do(known, listed, listed, redo)
    places = places_of(config)
    took = known.seconds(listed)
    times = took | outlook(listed, took, why)
    left = time_of([step for step in listed if step.name in why], times, len(places))
    cli.print_plan(
        f"Series {config.name}: {len(flags)} base models",
        [
            *sizes(flags),
            ("at a time", f"{len(places)}"),
            ("time", f"about {files.duration(left)}, a rough estimate"),
            ("saves", f"{base_dir()}; page in {base_dir() / 'report' / config.name}"),
        ],
    )
    print("\n".join(table(listed, why, times, flags=config.dry_run)), flush=True)
    if config.dry_run:
        print("nothing was done: --dry_run")
        return 0
    code = run_steps(Runner(listed, known, restarts=config.restarts, places=places), listed, redo)
    how_to_continue(code, "miniseries", config)
    if code:
        return code
    report(config, flags)
    return 0


def make_steps(config: Config) -> tuple[list[Step], dict[str, BaseConfig]]:
    """Return (the series' steps, {run name: flags of base_train}). Raise UserError if a flag is invalid."""
    from jaxchat.checkpoint import run_folder

    run_folder("base", config.name)  # a UserError if the name cannot be a folder's
    depths = [int(depth) for depth in parse_numbers("depths", config.depths)]
    budgets = parse_numbers("budgets", config.budgets) if config.budgets else [0.0]
    given = shlex.split(config.base)
    own = OWN if config.budgets else OWN - {"num_iterations"}
    if own := sorted(flag_names(given) & own):
        raise UserError(f"--base={config.base!r}: launch.miniseries sets --{own[0]} itself; leave it out")
    places, machine, listed, flags = Places(config.data_dir), machine_of(config), [], {}
    for budget in budgets:
        for depth in depths:
            name = f"d{depth}-{budget:g}".replace("+", "") if budget else f"d{depth}"
            tag = f"{config.name}-{name}"
            words = [f"--depth={depth}", f"--model_tag={tag}", *places.flags("data_dir"), *QUIET]
            words += [*([f"--target_flops={budget:g}"] if budget else []), *given]
            flags[name] = parsed = cli.parse(BaseConfig, words)
            argv = python("launch.base_train", *flag_words(parsed, flag_names(words)))
            made, needs = (Checkpoint("base", tag),), (places.text, TOKENIZER[0])
            minutes = train_minutes(parsed, model_of(parsed), machine, core=False)
            listed.append(Step(name, argv, made, needs, minutes, resumes=True, free=FREE))
            if config.core:
                words = [f"--model_tag={tag}", *places.flags("data_dir"), *shlex.split(config.base_eval)]
                measured = cli.parse(base_eval.Config, words)  # a UserError if a flag is wrong
                argv, results = python("launch.base_eval", *words), Results("base", tag, "base_eval")
                minutes = read_minutes(eval_tokens(measured, core=True), model_of(parsed), machine)
                listed.append(Step(f"core-{name}", argv, (results,), made, minutes))
    return listed, flags


def machine_of(config: Config) -> Machine:
    """Return one run's share of this host as a Machine, to estimate times.

    Each GPU is taken for an H100 that reaches 40 % of its peak.
    """
    count = len(places_of(config))
    gpus = len(visible_gpus()) // count
    if gpus:
        return Machine(f"{gpus} GPUs", gpus, gpus * 0.4 * H100)
    return dataclasses.replace(CPU, flops=CPU.flops / count)


def model_of(flags: BaseConfig):
    from jaxchat.tokenizer import Tokenizer
    from jaxchat.train.stages import base_model

    return base_model(flags, Tokenizer.load().vocab_size)


def parse_numbers(name: str, text: str) -> list[float]:
    """Return the sorted numbers in `text`, the value of flag `name`. Raise UserError if one is invalid."""
    try:
        found = [float(word) for word in text.split(",") if word.strip()]
    except ValueError:
        found = []
    good = [0 < value < math.inf and (name != "depths" or value == int(value)) for value in found]
    if not found or not all(good):
        kind = "whole numbers" if name == "depths" else "numbers"
        raise UserError(f"--{name}={text}; it must be positive {kind} separated by commas")
    return sorted(set(found))


def sizes(flags: dict[str, BaseConfig]) -> list[tuple[str, str]]:
    """Return rows (run name, text) for the plan, with each run's number of parameters and optimizer steps."""
    from jaxchat.model.flops import num_params
    from jaxchat.train.stages import horizon_of

    models = {name: model_of(given) for name, given in flags.items()}
    return [
        (name, f"{num_params(model):,} parameters, {horizon_of(flags[name], model).steps:,} steps")
        for name, model in models.items()
    ]


def places_of(config: Config) -> tuple[dict, ...]:
    """Return one dict of environment variables per concurrent run, which give the run its share of GPUs."""
    gpus = visible_gpus()
    return tuple(shares(gpus, config.parallel or max(1, len(gpus)), "parallel"))


def report(config: Config, flags: dict[str, BaseConfig]):
    """Write the report on the series and print its fits. flags: {run name: flags of base_train}."""
    from jaxchat.report import document
    from jaxchat.scaling import fits, page, plots

    found = [page.point_of(name, own.model_tag, max(0.0, own.target_flops)) for name, own in flags.items()]
    points = [point for point in found if point]
    for name, point in zip(flags, found, strict=True):
        if point is None:
            print(f"{name} is left out: its validation bits per byte were not measured")
    if not points:
        raise UserError("none of the runs has validation bits per byte; leave --eval_every out of --base")
    folder, iso = base_dir() / "report" / config.name, fits.iso_flop(points)
    images, lines = plots.plots(points, iso), page.said(points, iso, fits.surface(points))
    text = page.markdown(config.name, points, images, lines)
    print("\n".join(lines).replace("**", ""))
    document.save(folder, f"{config.name}: a series of jaxchat", text, images)
    files.write_lines(folder / "points.jsonl", [dataclasses.asdict(point) for point in points])


main = cli.command(Config, run)

if __name__ == "__main__":
    main()
