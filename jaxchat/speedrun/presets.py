"""The presets of launch.speedrun, and the steps of a run in order."""

import dataclasses
import glob
import os

from jaxchat.config import STAGES, base_dir
from jaxchat.speedrun.demo import STEPS, TAG, commands
from jaxchat.speedrun.estimate import Machine
from jaxchat.speedrun.runner import python
from jaxchat.speedrun.steps import Checkpoint, Files, Results, Step

RECIPES = {"2025": ("mid", "sft"), "2026": ("sft",)}  # the training stages after base
EVALUATIONS = {"mid": "chat-eval-mid", "sft": "chat-eval", "rl": "chat-eval-rl"}  # the step after each stage
NONE = "none"  # value of --eval_bundle that skips CORE
TASKS = ("smoltalk", "mmlu", "gsm8k", "arc", "humaneval", "identity", "words")  # launch.download's folders
# The merge ranks, which alone decide how text is tokenized; and the tokenizer's metadata.
TOKENIZER = (Files("tokenizer/ranks.txt"), Files("tokenizer/tokenizer.json"))
COMPARED = Files("tokenizer/tok_eval.json")
TOKENIZER_SHARDS = 10  # this number of shards has more text than tok_train reads
CORE_FLOPS = 40e9  # FLOP/s that a CPU core sustains in training, measured in the demo on two cores
# Cores that this process may use: fewer than the machine has under taskset, Slurm or in a container.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
TITLE = f"{CORES} CPU core{'' if CORES == 1 else 's'}"
CPU = Machine(TITLE, 1, CORE_FLOPS * CORES, measured="the pace of the demo on two cores", start=0.2)
H100, V5E, V6E = 989e12, 197e12, 918e12  # peak FLOP/s


@dataclasses.dataclass(frozen=True)
class Preset:
    """Default settings of a run for a kind of machine."""

    about: str
    machine: Machine
    depth: int
    flags: dict[str, str] = dataclasses.field(default_factory=dict)  # {step name: additional flags}
    recipe: str = "2025"  # a key of RECIPES
    dataset: str = "fineweb-edu"  # for pretraining


GPU = "one H100's 52 % MFU at depths 12 and 20"
PRESETS = {
    "cpu": Preset("the demo's small generated world, on a CPU in minutes", CPU, 3),
    "laptop": Preset(
        "a small model of real text, overnight on a CPU with eight cores",
        CPU,
        4,
        {
            "tokenizer": "--vocab_size=16384 --max_chars=200000000",
            "base": "--max_seq_len=512 --total_batch_size=32768 --device_batch_size=8 --eval_tokens=524288 "
            "--core_metric_every=-1",
            "base-eval": "--max_per_task=100 --eval_tokens=1048576",
            "mid": "--total_batch_size=32768 --device_batch_size=8 --num_iterations=1500 "
            "--eval_tokens=524288",
            "sft": "--eval_metrics_every=-1",
            "chat-eval-mid": "--max_problems=100 --max_new_tokens=256",
            "chat-eval": "--max_problems=100 --max_new_tokens=256",
            "chat-eval-rl": "--max_problems=100 --max_new_tokens=256",
        },
    ),
    "h100": Preset(
        "depth 12 on one H100, in an evening",
        Machine("1 × H100", 1, 0.52 * H100, 80e9, 3.0, "h100:1", GPU),
        12,
    ),
    "8xh100": Preset(
        "nanochat's depth 20 of 2025",
        Machine("8 × H100", 8, 8 * 0.5 * H100, 80e9, 24.0, "h100:8", f"{GPU}; not timed on eight"),
        20,
    ),
    "8xh100-2026": Preset(
        "nanochat's depth 24 of July 2026, its architecture and recipe",
        Machine(
            "8 × H100", 8, 8 * 0.5 * H100, 80e9, 24.0, "h100:8", f"{GPU}; not timed on eight or with 2026"
        ),
        24,
        {
            "tokenizer": "--vocab_size=32768",
            "base": "--arch=2026 --target_param_data_ratio=8",
            "sft": "--recipe=2026",
        },
        recipe="2026",
        dataset="climbmix",
    ),
    "v5e-8": Preset(
        "depth 12 on eight TPU v5e chips",
        Machine("8 × TPU v5e", 8, 8 * 0.4 * V5E, 16.9e9, 0.0, "v5e:2x4", "40 % MFU, a guess"),
        12,
    ),
    "v6e-8": Preset(
        "depth 20 on eight TPU v6e chips",
        Machine("8 × TPU v6e", 8, 8 * 0.35 * V6E, 33.6e9, 0.0, "v6e:2x4", "35 % MFU, a guess"),
        20,
    ),
}


@dataclasses.dataclass(frozen=True)
class Places:
    """Paths of a run's data, as given by the user. An empty path means the default in the base directory."""

    data_dir: str = ""
    tasks_dir: str = ""
    eval_bundle: str = ""  # or NONE

    @property
    def text(self) -> Files:
        return Files(f"{absolute(self.data_dir) if self.data_dir else 'base_data'}/*.parquet", least=2)

    @property
    def tasks(self) -> tuple[Files, ...]:
        root = absolute(self.tasks_dir) if self.tasks_dir else "tasks"
        return tuple(Files(f"{root}/{name}/**/*") for name in TASKS)

    @property
    def bundle(self) -> tuple[Files, ...]:
        if self.eval_bundle == NONE:
            return ()
        place = absolute(self.eval_bundle) if self.eval_bundle else "eval_bundle"
        return (Files(place if place.endswith(".zip") else f"{place}/*"),)

    def flags(self, *names: str) -> list[str]:
        """Return a flag --name=path for each of `names` whose path the user gave."""
        given = {name: getattr(self, name) for name in names}
        return [f"--{name}={value}" for name, value in given.items() if value not in ("", NONE)]


def absolute(path: str) -> str:
    """Make a path absolute and escape it for use in a glob pattern."""
    return glob.escape(os.path.abspath(os.path.expanduser(path)))


def demo_steps() -> list[Step]:
    """Return the steps of the demo, in order."""
    flags = commands(base_dir() / "tasks", seed=0, rows=2, steps=STEPS)
    text, world = Files("base_data/*.parquet", least=5), Files("tasks/world_*.jsonl", least=3)
    base, mid, sft = (Checkpoint(stage, TAG) for stage in ("base", "mid", "sft"))

    def train(name: str, command: str, made: Checkpoint, *needs) -> Step:
        return Step(name, python(f"launch.{command}", *flags[command]), (made,), needs, resumes=True)

    return [
        Step("world", python("launch.demo", "--part=world", "--seed=0"), (text, world)),
        Step("tokenizer", python("launch.tok_train", *flags["tok_train"]), TOKENIZER, (text,)),
        train("base", "base_train", base, text, TOKENIZER[0]),
        train("mid", "mid_train", mid, base, world),
        train("sft", "chat_sft", sft, mid, world),
        Step("score", python("launch.demo", "--part=score", "--seed=0"), (), (text, base, mid, sft)),
    ]


def tokenizer_text(places: Places, shards: int, dataset: str) -> Files:
    """Return the text shards on which the tokenizer is trained.

    These are all shards if the user gave a folder, or if there are at most TOKENIZER_SHARDS. Otherwise, they
    are the first shards, which the step "first-text" downloads.
    """
    if places.data_dir or shards <= TOKENIZER_SHARDS:
        return all_text(places, shards)
    first = TOKENIZER_SHARDS - (dataset == "climbmix")  # one of climbmix's is its last, for validation
    return Files("base_data/*.parquet", least=first, first=first)


def downloads(places: Places, shards: int, dataset: str) -> list[Step]:
    """Return the steps that download the text, tasks and CORE bundle for which the user gave no path."""

    def fetch(name: str, *words: str, **about) -> Step:
        return Step(name, python("launch.download", *words), lane="network", **about)

    everything = fetch("text", dataset, f"--shards={shards}", makes=(all_text(places, shards),))
    few, steps = shards <= TOKENIZER_SHARDS, []
    if not places.data_dir:
        some = (tokenizer_text(places, shards, dataset),)
        first = fetch("first-text", dataset, f"--shards={TOKENIZER_SHARDS}", makes=some)
        steps.append(everything if few else first)
    if not places.tasks_dir:
        steps.append(fetch("tasks", "all-tasks", makes=places.tasks))
    if not places.eval_bundle:
        steps.append(fetch("bundle", "core-bundle", makes=places.bundle))
    if not (places.data_dir or few):  # while the tokenizer trains on the first shards
        steps.append(everything)
    return steps


def all_text(places: Places, shards: int) -> Files:
    """Return all text shards: at least `shards` files, or at least two in a folder that the user gave."""
    return places.text if places.data_dir else dataclasses.replace(places.text, least=shards)


def real_steps(preset: Preset, tag: str, depth: int, places: Places, shards: int, rl: bool) -> list[Step]:
    """Return the steps of a run on real data, before the preset's and the user's flags are added.

    shards: number of text shards to download. rl: whether to include RL and its evaluation.
    """
    text, some = all_text(places, shards), tokenizer_text(places, shards, preset.dataset)
    base, of_base = Checkpoint("base", tag), Results("base", tag, "base_eval")
    tasks, tagged = places.tasks, f"--model_tag={tag}"
    shard_flags, text_flags = places.flags("data_dir"), [tagged, *places.flags("data_dir", "eval_bundle")]
    task_flags = [tagged, *places.flags("tasks_dir")]

    def step(name: str, command: str, flags: list[str], makes: tuple, needs: tuple, resumes=False) -> Step:
        return Step(name, python(f"launch.{command}", *flags), makes, needs, resumes=resumes)

    steps = [
        *downloads(places, shards, preset.dataset),
        step("tokenizer", "tok_train", shard_flags, TOKENIZER, (some,)),
        step("tokenizer-eval", "tok_eval", shard_flags, (COMPARED,), (some, TOKENIZER[0])),
        step(
            "base",
            "base_train",
            [f"--depth={depth}", *text_flags],
            (base,),
            (text, TOKENIZER[0], *places.bundle),
            resumes=True,
        ),
        step("base-eval", "base_eval", text_flags, (of_base,), (text, base, *places.bundle)),
    ]
    made, before = [base, of_base], base
    chats = [*RECIPES[preset.recipe], *(["rl"] if rl else [])]
    for stage in chats:
        model, results = Checkpoint(stage, tag), Results(stage, tag, "chat_eval")
        asked = [f"--source={stage}", *task_flags]
        steps += [
            step(stage, STAGES[stage].command, task_flags, (model,), (before, *tasks), resumes=True),
            step(EVALUATIONS[stage], "chat_eval", asked, (results,), (model, *tasks)),
        ]
        made, before = [*made, model, results], model
    return [*steps, step("report", "report", [tagged], (), tuple(made))]
