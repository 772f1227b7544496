"""Estimate tokens, time, memory and disk of a run before it starts.

Once steps have run, progress.py corrects the estimated times by the measured times.
"""

import dataclasses
import math

from jaxchat.config import EVAL_BATCH, SFT_RECIPES, BaseConfig, MidConfig, ModelConfig, RLConfig, SFTConfig
from jaxchat.speedrun.steps import Artifact, Step

BYTES_A_TOKEN = 4.8  # in English web text, estimated for a vocabulary of 65,536
SHARD_BYTES = 250e6  # bytes of text in a fineweb-edu shard
SHARD_FILE = 100e6  # bytes of a shard's compressed file
TASK_FILES = 2e9  # bytes of all tasks and the CORE bundle
NETWORK = 50e6  # download rate, bytes per second
MID_TOKENS = 420e6  # in one pass over the default midtraining mixture
SFT_CONVERSATIONS = 22_500  # in the default SFT mixture
SFT_TOKENS = 600  # per SFT conversation, padded to the longest of its batch
SFT_2026_TOKENS = 480e6  # in one pass over the SFT mixture of --recipe=2026
CORE_TOKENS, CORE_ITEMS = 220e6, 90_000  # in all CORE tasks
PROBLEM_TOKENS = 150  # per MMLU or ARC problem
CHAT_EVAL, CHAT_PROBLEMS = 6.0, 100  # minutes of chat_eval with at least this many problems per task
TOKENIZER_CHARS = 3e6  # characters per second in tokenizer training


@dataclasses.dataclass(frozen=True)
class Machine:
    """The devices for which a run is planned.

    flops: FLOP/s that all devices sustain in training. memory: bytes per device. price: of all, per hour.
    """

    title: str
    devices: int
    flops: float
    memory: float = 0.0  # 0: the devices use the host's memory
    price: float = 0.0  # 0: not known
    topology: str = ""  # for launch.compile_check
    measured: str = ""  # source of `flops`
    start: float = 1.0  # minutes until a command starts to compute, mostly spent compiling


def time_of(steps: list[Step], times: dict[str, float], places: int = 1) -> float:
    """Return the time until all steps have ended, in the unit of `times`, {step name: duration}.

    A step starts once its inputs exist and the resource that it uses (step.lane) has a free slot: "devices"
    has `places` slots, "network" has one.
    """
    free: dict[str, list[float]] = {"devices": [0.0] * places, "network": [0.0]}  # when each slot is free
    made: dict[Artifact, float] = {}
    for step in (step for step in steps if times[step.name]):
        lane = free[step.lane]
        begin = max([min(lane), *(made.get(artifact, 0.0) for artifact in step.needs)])
        lane[lane.index(min(lane))] = end = begin + times[step.name]
        made |= dict.fromkeys(step.makes, end)
    return max(free["devices"] + free["network"])


def train_tokens(config, model: ModelConfig) -> float:
    """Number of tokens that a trainer with flags `config` trains on, padding included; 0: not known."""
    from jaxchat.train.stages import horizon_of

    if isinstance(config, BaseConfig):
        return horizon_of(config, model).tokens
    if isinstance(config, RLConfig):
        return 0.0
    if config.num_iterations > 0:
        return config.num_iterations * step_tokens(config, model)
    if isinstance(config, MidConfig):
        return MID_TOKENS if config.train_tasks == MidConfig.train_tasks else 0.0
    if config.train_tasks == SFT_RECIPES["2026"]["train_tasks"]:
        return SFT_2026_TOKENS * config.num_epochs
    if config.train_tasks == SFTConfig.train_tasks and config.target_examples_per_step > 0:
        return SFT_CONVERSATIONS * config.num_epochs * conversation_tokens(config, model)
    return 0.0


def conversation_tokens(config: SFTConfig, model: ModelConfig) -> int:
    """Estimated number of tokens per conversation in the training rows of SFT, padding included."""
    length = min(SFT_TOKENS, config.max_seq_len if config.max_seq_len > 0 else model.sequence_len)
    return length // 2 if config.packing == "bestfit" else length  # bestfit rows have no padding


def step_tokens(config, model: ModelConfig) -> float:
    """Number of tokens in an optimizer step of a trainer with flags `config`."""
    from jaxchat.train.stages import horizon_of

    if isinstance(config, BaseConfig):
        return horizon_of(config, model).batch
    if isinstance(config, MidConfig):
        return config.total_batch_size
    examples = config.target_examples_per_step
    return examples * conversation_tokens(config, model) if examples > 0 else BaseConfig.total_batch_size


def validation_tokens(config, model: ModelConfig, tokens: float, core: bool) -> float:
    """Number of tokens that evaluations (CORE too if `core`) read while training on `tokens` tokens."""
    steps = tokens / step_tokens(config, model)

    def times(every: int, first: int = 0) -> int:
        return math.ceil(steps / every) + first if every > 0 else 0

    validations = times(config.eval_every, 1)  # before the first step too
    if isinstance(config, SFTConfig):
        problems = 2 * times(config.eval_metrics_every) * max(0, config.eval_metrics_max_problems)
        conversations = validations * config.eval_steps * EVAL_BATCH
        return problems * PROBLEM_TOKENS + conversations * conversation_tokens(config, model)
    read = validations * config.eval_tokens
    if core and isinstance(config, BaseConfig):
        read += times(config.core_metric_every) * core_tokens(config.core_metric_max_per_task)
    return read


def core_tokens(max_per_task: int) -> float:
    """Number of tokens in CORE's prompts. max_per_task: maximum number of items of a task; -1: all."""
    return CORE_TOKENS * (min(1.0, 22 * max_per_task / CORE_ITEMS) if max_per_task > 0 else 1.0)


def eval_tokens(config, core: bool) -> float:
    """Number of tokens that base_eval with flags `config` reads. core: whether it measures CORE."""
    return 2 * config.eval_tokens + (core_tokens(config.max_per_task) if core else 0)


def chat_eval_minutes(config) -> float:
    """Rough estimate of the minutes that chat_eval with flags `config` takes on any machine."""
    return CHAT_EVAL * (min(1.0, config.max_problems / CHAT_PROBLEMS) if config.max_problems > 0 else 1.0)


def train_minutes(config, model: ModelConfig, machine: Machine, core: bool) -> float:
    """Minutes to train with flags `config`, and evaluate (CORE too if `core`); 0: not known."""
    from jaxchat.model.flops import flops_per_token

    tokens = train_tokens(config, model)
    if not tokens:
        return 0.0
    read = validation_tokens(config, model, tokens, core)
    return tokens * flops_per_token(model) / machine.flops / 60 + read_minutes(read, model, machine)


def read_minutes(tokens: float, model: ModelConfig, machine: Machine) -> float:
    """Minutes to start a command that evaluates on `tokens` tokens, and to run it.

    Evaluation is assumed to take a third of the FLOPs of training on these tokens, at half of the FLOP/s.
    """
    from jaxchat.model.flops import flops_per_token

    return machine.start + 2 / 3 * tokens * flops_per_token(model) / machine.flops / 60


def state_bytes(model: ModelConfig) -> int:
    """Bytes of float32 weights and optimizer state: Adam keeps two moments, Muon one."""
    import jax

    from jaxchat.model.params import declare

    weights = jax.tree.leaves(declare(model))
    return sum(math.prod(w.shape) * (8 if w.group == "matrix" else 12) for w in weights)


def shards_for(config: BaseConfig, model: ModelConfig) -> int:
    """Number of shards to download: 10 % more than training uses without repetition, plus 1 to validate."""
    tokens = train_tokens(config, model)
    return max(2, math.ceil(1.1 * tokens * BYTES_A_TOKEN / SHARD_BYTES) + 1)
