"""Train a chat model from scratch with one command: python -m launch.speedrun --preset=8xh100"""

import contextlib
import dataclasses
import importlib.util
import os
import re
import shlex
import subprocess
import sys

from jaxchat import files, hosts
from jaxchat.config import BaseConfig, Flags, MidConfig, RLConfig, SFTConfig, UserError, base_dir, flag
from jaxchat.speedrun import estimate, presets, state, steps
from jaxchat.speedrun.demo import TAG
from jaxchat.speedrun.estimate import Machine
from jaxchat.speedrun.plan import Plan, table
from jaxchat.speedrun.presets import PRESETS, Places
from jaxchat.speedrun.progress import Progress, outlook
from jaxchat.speedrun.runner import Runner, python
from jaxchat.speedrun.state import State
from jaxchat.speedrun.steps import Files, Step
from launch import base_eval, chat_eval, cli, serve, tok_train


@dataclasses.dataclass(frozen=True)
class Config(Flags):
    """Run all steps of training a chat model, each with its own command: download, tokenizer, base, mid and
    SFT training, their evaluations and the report. Then print how to chat with the model.

    After an interruption, the same command continues. A step is skipped if its output is complete and was
    made with the same flags from the same inputs. If its flags or inputs have changed, the command names the
    change and does nothing; --redo=STEP deletes the old output and runs the step again.

    --dry_run prints the plan: steps, time, cost, disk and memory. All files are kept in the base directory,
    each step's output in speedrun/<tag>/<step>.log and the state of the run in speedrun/<tag>/status.json.

    Names of steps, for --from, --until, --only and --redo: fit (on GPUs), first-text, tasks, bundle, text,
    tokenizer, tokenizer-eval, base, base-eval, mid, chat-eval-mid, sft, chat-eval, rl, chat-eval-rl, report;
    with --preset=cpu: world, tokenizer, base, mid, sft, score.
    """

    preset: str = flag("", choices=("", *PRESETS))
    """Kind of machine: cpu (the demo), laptop, h100, 8xh100, 8xh100-2026 (nanochat's model and recipe of July
    2026), v5e-8 or v6e-8."""
    depth: int = flag(-1, 1, special=-1)
    """Number of layers. A deeper model is larger, and is trained longer and on more text. -1: the preset's
    depth."""
    model_tag: str = ""
    """Name of the run; empty: d<depth>."""
    data_dir: str = ""
    """Folder of parquet shards to train on, of which the last is for validation; empty: download the preset's
    data set (fineweb-edu or climbmix)."""
    tasks_dir: str = ""
    """Folder of the task files; empty: download them."""
    eval_bundle: str = ""
    """Folder or zip file of the CORE bundle; "none": leave CORE out; empty: download the bundle."""
    tokenizer: str = ""
    """Further flags for launch.tok_train, separated by spaces, as in --tokenizer="--vocab_size=32768"."""
    base: str = ""
    """Further flags for launch.base_train, as in --base="--num_iterations=100 --eval_every=20"."""
    mid: str = ""
    """Further flags for launch.mid_train."""
    sft: str = ""
    """Further flags for launch.chat_sft."""
    base_eval: str = ""
    """Further flags for launch.base_eval."""
    chat_eval: str = ""
    """Further flags for launch.chat_eval, which runs after midtraining and after SFT."""
    rl: bool = False
    """Also improve the SFT model with launch.chat_rl, and evaluate the result."""
    chat_rl: str = ""
    """Further flags for launch.chat_rl; only used with --rl."""
    price_per_hour: float = flag(-1.0, 0, special=-1)
    """Price of the machine per hour, in any currency; -1: the preset's price, if it has one."""
    first: str = flag("", name="from")
    """First step to run; its inputs must exist. Empty: the first step of the run."""
    until: str = ""
    """Last step to run; empty: the last step of the run."""
    only: str = ""
    """Steps to run, separated by commas; empty: all."""
    redo: str = ""
    """Steps to run again, separated by commas, after deleting their old results. All steps that need these
    results are run again too."""
    restarts: int = flag(3, 0)
    """Maximum number of restarts of a stopped, killed or aborted step. Other errors end the run."""
    check: bool = True
    """First check this machine's devices, driver, kernel and disk with launch.check."""
    dry_run: bool = False
    """Print the plan and do nothing."""
    serve: bool = False
    """Start the server at the end, instead of printing its command."""


# {step: (its flags class, the flag here that adds to its flags, the flags that do not change its result)}.
# None: the flags that a trainer may change when it resumes.
SAME = {"device_type", "mesh", "batch_size", "device_batch_size"}
ADDED = {
    "tokenizer": (tok_train.Config, "tokenizer", {"overwrite"}),
    "base": (BaseConfig, "base", None),
    "base-eval": (base_eval.Config, "base_eval", SAME),
    "mid": (MidConfig, "mid", None),
    "chat-eval-mid": (chat_eval.Config, "chat_eval", SAME),
    "sft": (SFTConfig, "sft", None),
    "chat-eval": (chat_eval.Config, "chat_eval", SAME),
    "rl": (RLConfig, "chat_rl", None),
    "chat-eval-rl": (chat_eval.Config, "chat_eval", SAME),
}
# Flags that launch.speedrun sets itself.
OWN = {"resume", "overwrite", "dry_run", "model_tag", "source", "step", "depth", "data_dir", "tasks_dir"}


def run(config: Config) -> int:
    stay_off_devices()
    if not hosts.is_alone(hosts.detect()):
        raise UserError("launch.speedrun is for one host; on several, start each command with launch.cluster")
    demo = config.preset == "cpu"
    with cli.base_directory(base_dir() / "demo") if demo else contextlib.nullcontext():
        code = plan_and_perform(config)
    # Outside the demo's base directory, because the printed command enters it by itself.
    how_to_continue(code, "speedrun", config)
    if not code and partial(config) and not config.dry_run:
        rest = dataclasses.replace(config, first="", until="", only="", redo="")
        cli.next_step(f"python -m launch.speedrun {shlex.join(flag_words(rest))}")
    return code


def stay_off_devices():
    """Make jax use only the CPU in this process, so that the processes of the steps can use the devices."""
    import jax  # here, so that --help answers at once

    jax.config.update("jax_platforms", "cpu")  # not in the environment, which the steps inherit


def partial(config: Config) -> bool:
    return bool(config.first or config.until or config.only)


def plan_and_perform(config: Config) -> int:
    plan = make_plan(config)
    if config.serve:
        serve.check_installed()
    known = State(base_dir() / "speedrun" / plan.tag)
    chosen = steps.chosen(plan.steps, config.first, config.until, config.only)
    redo = steps.named(plan.steps, "redo", config.redo)
    why = state.to_do(known, plan.steps, chosen, redo)
    todo = [step for step in chosen if step.name in why]
    took = known.seconds(chosen)
    times = took | outlook(chosen, took, why)
    kept = [step.name for step in chosen if step.lane == "devices" and why.get(step.name) != state.AGAIN]
    spent = sum(took[name] for name in kept)
    cli.print_plan(f"Run {plan.tag}: {plan.preset.about}", plan.rows(todo, times, spent))
    print("\n".join(table(chosen, why, times, flags=config.dry_run)), flush=True)
    missing = check(plan, todo) if config.check and "base" in why and config.preset != "cpu" else []
    if config.dry_run:
        print("nothing was done: --dry_run")
        return 0
    if missing:
        raise UserError(f"missing: {'; '.join(missing)}. Nothing was started; --no_check starts anyway")
    files.check_space(base_dir(), int(plan.disk(todo)), "free some, or set JAXCHAT_BASE_DIR to another disk")
    runner = Runner(chosen, known, restarts=config.restarts)
    return perform(config, plan, runner, redo)


def perform(config: Config, plan: Plan, runner: Runner, redo: set[str]) -> int:
    """Run the chosen steps and return the exit code.

    If the whole run is complete, also print the command of the server or, with --serve, start it.
    """
    if code := run_steps(runner, plan.steps, redo, plan.price):
        return code
    if partial(config):
        return 0
    server = f"python -m launch.serve --model_tag={plan.tag}"
    cli.next_step(server if config.serve else f"{server} --open_browser")
    if config.serve:  # replaces this process, so that signals reach it
        os.execv(sys.executable, [sys.executable, *server.split()[1:]])
    return 0


def run_steps(runner: Runner, listed: list[Step], redo: set[str], price: float = 0.0) -> int:
    """Run the steps of `runner`, print a summary and return the exit code.

    listed: all steps of the run. redo: names of steps whose outputs are deleted first. price: price of the
    machine per hour; 0: not known. Raises UserError if the run is in progress in another process.
    """
    known = runner.state
    try:
        held = files.lock(known.path("run", "lock"), f"process {os.getpid()}")
    except files.Held as other:
        raise UserError(f"the run is already in progress in {other}; see {known.path('status')}") from None
    with open(held, "rb"):
        if known.again(listed, redo):
            known.forget(listed, redo)
        progress = Progress(runner, price)
        code = runner.run()
        progress.write("stopped" if runner.stopped else "failed" if code else "done")
        if not code:
            known.complete()
            print(progress.summary(), flush=True)
    return code


def how_to_continue(code: int, command: str, config: Flags):
    """If a run's exit code is not 0, print the command that continues it. command: its module in launch/."""
    if code:
        saved = code == os.EX_TEMPFAIL
        print(f"{'stopped and saved; to continue' if saved else 'to continue once the error is fixed'}:")
        cli.next_step(f"python -m launch.{command} {shlex.join(flag_words(config))}")


def make_plan(config: Config) -> Plan:
    """Return the plan of the run that the flags describe. Raise UserError if a flag is invalid."""
    if not config.preset:
        known = "; ".join(f"{name}: {preset.about}" for name, preset in PRESETS.items())
        raise UserError(f"which machine? give --preset=NAME ({known})")
    preset = PRESETS[config.preset]
    price = preset.machine.price if config.price_per_hour < 0 else config.price_per_hour
    if config.preset == "cpu":
        for name in ("depth", "model_tag", "data_dir", "tasks_dir", "eval_bundle", "rl"):
            if getattr(config, name) != getattr(Config, name):
                raise UserError(f"--{name} does not go with --preset=cpu, the demo; leave it out")
        return estimated(Plan(preset, TAG, *with_flags(presets.demo_steps(), config), price))
    from jaxchat import checkpoint

    depth = config.depth if config.depth > 0 else preset.depth
    tag = config.model_tag or f"d{depth}"
    checkpoint.run_folder("base", tag)  # a UserError if the tag cannot be a folder's name
    places = Places(config.data_dir, config.tasks_dir, config.eval_bundle)

    def planned(shards: int) -> Plan:
        listed = presets.real_steps(preset, tag, depth, places, shards, config.rl)
        number, core = 0 if config.data_dir else shards, bool(places.bundle)
        return Plan(preset, tag, *with_flags(listed, config), price, number, core)

    plan = planned(2)
    if not config.data_dir:
        plan = planned(estimate.shards_for(plan.flags["base"], plan.model))
    priced = [f"--price_per_hour={price:g}"] if price else []
    *others, report = plan.steps
    report = dataclasses.replace(report, argv=(*report.argv, *priced))
    return estimated(dataclasses.replace(plan, steps=[*fit_step(plan), *others, report]))


def estimated(plan: Plan) -> Plan:
    listed = [dataclasses.replace(step, minutes=plan.minutes(step)) for step in plan.steps]
    return dataclasses.replace(plan, steps=listed)


def fit_step(plan: Plan) -> list[Step]:
    """Return a step that compiles base_train's training step, to check that it fits the preset's GPUs.

    The result is a list: [] if the preset has no GPUs or JAX's CUDA plugin is not installed.
    """
    machine = plan.preset.machine
    if not machine.topology.startswith("h") or importlib.util.find_spec("jax_cuda13_plugin") is None:
        return []
    from jaxchat.train.stages import with_horizon  # here, because it imports jax

    base = with_horizon(plan.flags["base"], plan.model)
    names = ("arch", "depth", "device_batch_size", "total_batch_size", "max_seq_len", "mesh", "remat")
    words = [f"--{name}={value}" for name in names if (value := getattr(base, name)) != ""]
    words += [f"--topology={machine.topology}", f"--vocab_size={plan.model.vocab_size}", "--find_batch=0"]
    return [Step("fit", python("launch.compile_check", *words), (Files(f"speedrun/{plan.tag}/fit.log"),))]


def with_flags(listed: list[Step], config: Config) -> tuple[list[Step], dict[str, Flags]]:
    """Add the preset's and the user's flags to the steps. Return (steps, {step name: parsed flags})."""
    found, parsed = [], {}
    for step in listed:
        if step.name in ADDED:
            kind, name, free = ADDED[step.name]
            given = getattr(config, name)
            try:
                extra = shlex.split(given)
                preset = shlex.split(PRESETS[config.preset].flags.get(step.name, ""))
                words = [*step.argv[3:], *preset, *extra]
                parsed[step.name] = flags = cli.parse(kind, words)
            except (UserError, ValueError) as problem:
                raise UserError(f"--{name}={given!r}: {problem}") from None
            if own := sorted(flag_names(extra) & OWN):
                raise UserError(f"--{name}={given!r}: launch.speedrun sets --{own[0]} itself; leave it out")
            if free is None:
                free = {field.name for field in dataclasses.fields(kind) if field.metadata.get("free")}
            argv = (*step.argv[:3], *flag_words(flags, flag_names(words)))
            step = dataclasses.replace(step, argv=argv, free=frozenset(free - OWN))
        found.append(step)
    used = {ADDED[name][1] for name in parsed}
    for _, name, _ in ADDED.values():
        if getattr(config, name) and name not in used:
            more = "; it needs --rl" if name == "chat_rl" else ""
            raise UserError(f"--{name}={getattr(config, name)!r}: this run has no such step{more}")
    return found, parsed


def flag_names(words: list[str]) -> set[str]:
    """Return the names of the flags in a command's arguments."""
    return {w.partition("=")[0][2:].replace("-", "_") for w in words if w.startswith("--")}


def flag_words(flags: Flags, given: set[str] = frozenset()) -> list[str]:
    """Return command-line arguments for the flags that are named in `given` or differ from their defaults."""
    words = []
    for field in dataclasses.fields(flags):
        value, name = getattr(flags, field.name), field.metadata.get("name") or field.name
        if value != field.default or name in given:
            words.append(f"--{name}={int(value) if isinstance(value, bool) else value}")
    return words


def check(plan: Plan, todo: list[Step]) -> list[str]:
    """Run launch.check and print its findings, except on items that steps in `todo` will make.

    Return the printed findings on missing items.
    """
    names = {step.name for step in todo}
    tasks = [word for word in plan_flags(plan, "sft") if word.startswith("--tasks_dir=")]
    words = [*plan_flags(plan, "base"), *tasks, "--resume"]
    words.append(f"--vocab_size={plan.flags['tokenizer'].vocab_size}")
    words.append("--core_metric_every=1")  # base-eval measures CORE in any case
    done = subprocess.run([sys.executable, "-m", "launch.check", *words], capture_output=True, text=True)
    found = re.findall(r"^  (ok|warning|missing) +(\S+(?: \S+)?)  +(.*)$", done.stdout, re.M)
    if not found:
        raise UserError(f"launch.check failed: {done.stderr.strip()[-500:]}; --no_check skips it")
    named = any(word.startswith("--eval_bundle=") for word in words)
    brought = names & {"text", "tokenizer"} | (set() if named else {"CORE"})  # made by steps, or optional
    if "tasks" in names:
        brought |= {name for _, name, text in found if "launch.download" in text} - {"text", "CORE"}
    judged = [wrong_devices(plan.preset.machine, line) if line[1] == "devices" else line for line in found]
    # Memory is irrelevant if the devices are not the preset's.
    found = judged if judged == found else [line for line in judged if line[1] != "memory"]
    # Leave out disk and batches: the plan above has them, for the steps of this run and with all flags.
    shown = [
        (state, name, text)
        for state, name, text in found
        if not (name in brought or name.endswith(" disk") or name.endswith(" batch") and state == "ok")
        and not (name == "mid batch" and "mid" not in names)
    ]
    rows = [(f"{state:<7}  {name}", text.removesuffix(" every 1 steps")) for state, name, text in shown]
    cli.print_plan("This machine", rows)
    return [f"{name}: {text}" for state, name, text in shown if state == "missing"]


def wrong_devices(machine: Machine, line: tuple[str, str, str]) -> tuple[str, str, str]:
    """Return launch.check's finding on devices, changed to "missing" if they are not those of `machine`.

    line: the finding, as (state, name, text).
    """
    state, name, text = line
    right = text.startswith(f"{machine.devices} × ") and "cpu" not in text
    if state == "missing" or not machine.topology or right:
        return line
    return "missing", name, f"{text}, but the preset is for {machine.title}"


def plan_flags(plan: Plan, name: str) -> list[str]:
    [step] = [step for step in plan.steps if step.name == name]
    return list(step.argv[3:])


main = cli.command(Config, run)

if __name__ == "__main__":
    main()
