"""The plan of a run: its steps, training tokens, time, cost, memory and disk space."""

import dataclasses

from jaxchat import files
from jaxchat.config import Flags, ModelConfig, base_dir, counted
from jaxchat.speedrun import estimate
from jaxchat.speedrun.presets import Preset
from jaxchat.speedrun.steps import Checkpoint, Step


@dataclasses.dataclass(frozen=True)
class Plan:
    """The steps and settings of a run, from which its time, cost, memory and disk space are estimated."""

    preset: Preset
    tag: str
    steps: list[Step]
    flags: dict[str, Flags]  # {step name: parsed flags}, for steps that users can configure
    price: float  # per hour; 0: not known
    shards: int = 0  # number to download
    core: bool = False  # whether base_train and base_eval measure CORE

    @property
    def model(self) -> ModelConfig:
        from jaxchat.train.stages import base_model  # here, since it imports jax

        return base_model(self.flags["base"], self.flags["tokenizer"].vocab_size)

    def minutes(self, step: Step) -> float:
        """Estimate the minutes that a step takes. Return 0 if they are unknown."""
        machine, model, flags = self.preset.machine, self.model, self.flags.get(step.name)
        if step.resumes:
            return estimate.train_minutes(flags, model, machine, self.core)
        if step.lane == "network":
            return machine.start + self.download(step) / estimate.NETWORK / 60
        if step.name == "tokenizer":
            return machine.start + flags.max_chars / estimate.TOKENIZER_CHARS / 60
        if step.name == "base-eval":
            return estimate.read_minutes(estimate.eval_tokens(flags, self.core), model, machine)
        if step.name.startswith("chat-eval"):
            return machine.start + estimate.chat_eval_minutes(flags)
        return machine.start

    @staticmethod
    def download(step: Step) -> float:
        """Estimate how many bytes a step downloads, assuming that no file exists yet."""
        if step.lane != "network" or step.name == "bundle":  # TASK_FILES includes the CORE bundle
            return 0.0
        shards = [word.partition("=")[2] for word in step.argv if word.startswith("--shards=")]
        return int(shards[0]) * estimate.SHARD_FILE if shards else estimate.TASK_FILES

    def disk(self, todo: list[Step]) -> float:
        """Estimate how many bytes of downloads and checkpoints the steps `todo` will add to the disk."""
        from jaxchat import checkpoint
        from jaxchat.store import KEEP

        names = {step.name for step in todo}
        there = sum(path.stat().st_size for path in (base_dir() / "base_data").glob("*.parquet"))
        text = max(0.0, self.shards * estimate.SHARD_FILE - there) if "text" in names else 0.0
        tasks = estimate.TASK_FILES if "tasks" in names else 0.0
        made = [made for step in todo for made in step.makes if isinstance(made, Checkpoint)]
        count = sum(max(0, KEEP - len(checkpoint.steps_in(run.folder))) for run in made)
        count += bool(made)  # a checkpoint is written before the oldest is deleted
        return text + tasks + count * estimate.state_bytes(self.model)

    def rows(self, todo: list[Step], left: dict[str, float], spent: float = 0.0) -> list[tuple[str, str]]:
        """Return the lines of the printed plan, as pairs (name, value).

        todo: steps to run. left: {step name: remaining seconds, or 0 if unknown}. spent: seconds that the run
        has taken so far.
        """
        from jaxchat.model.flops import num_params

        machine, model, size = self.preset.machine, self.model, files.size_text
        needed, free = self.disk(todo), files.free_space(base_dir())
        seconds = estimate.time_of(todo, left)
        unknown = [step.name for step in todo if not left[step.name]]
        more = f", plus {', '.join(unknown)} (not known)" if unknown else ""
        trained = [name for name in ("base", "mid", "sft") if name in self.flags]
        counts = [estimate.train_tokens(self.flags[name], model) for name in trained]
        tokens = [f"{name} {n:,.0f}" if n else f"{name} ?" for name, n in zip(trained, counts, strict=True)]
        cost = f"about {(spent + seconds) / 3600 * self.price:,.2f} at {self.price:g} an hour"
        time, by = f"about {files.duration(seconds)}{more}", machine.measured
        if spent:
            time, cost, by = f"{time} left", f"{cost} in all", "what has run"
        depth = counted(model.n_layer, "layer")
        rows = [
            ("model", f"{depth} × {model.n_embd}, {num_params(model):,} parameters"),
            ("tokens", ", ".join(tokens)),
            ("machine", machine.title),
            ("time", f"{time} (estimated from {by})"),
            ("cost", cost if self.price else "not known: give --price_per_hour"),
            ("memory", self.memory()),
            ("disk", f"{size(needed)} more; {size(free)} are free{'' if needed <= free else ': TOO LITTLE'}"),
            ("saves", f"{base_dir()}, as {self.tag}; logs in {base_dir() / 'speedrun' / self.tag}"),
        ]
        if self.shards:
            text = f"{self.shards} shards of {self.preset.dataset}, {size(self.shards * estimate.SHARD_FILE)}"
            beside = any(step.name == "first-text" for step in self.steps)
            rows.insert(2, ("text", text + (", downloaded while the tokenizer trains" if beside else "")))
        return rows

    def memory(self) -> str:
        """Describe how much memory the weights and the optimizer state take."""
        machine, state = self.preset.machine, estimate.state_bytes(self.model)
        needed = f"weights and optimizer take {files.size_text(state / machine.devices)} of each device"
        if not machine.memory:
            return f"weights and optimizer take {files.size_text(state)}"
        flags = f"--arch={self.flags['base'].arch} --depth={self.model.n_layer} --topology={machine.topology}"
        compiled = f"python -m launch.compile_check {flags}"
        return f"{needed}'s {files.size_text(machine.memory)}; to compile the step: {compiled}"


def table(steps: list[Step], why: dict[str, str], seconds: dict[str, float], flags: bool = True) -> list[str]:
    """Format steps as lines of a table: name, state ("to do" or "done"), time and command.

    why: {step name: reason to run it}. Steps that are not in it are done. seconds: {step name: expected or
    measured seconds, or 0 if unknown}. flags: whether to show the flags of the commands.
    """
    names = max(len(step.name) for step in steps)
    lines = [f"  {'step':<{names}}  {'state':<5}  {'time':>7}  command"]
    for step in steps:
        state = "to do" if step.name in why else "done"
        time = files.duration(seconds[step.name]) if seconds[step.name] else "?"
        note = f"  ({why[step.name]})" if why.get(step.name) else ""
        command = step.shown if flags else " ".join(step.shown.split()[:3])
        lines.append(f"  {step.name:<{names}}  {state:<5}  {time:>7}  {command}{note}")
    return lines
