"""Estimate the tokens, time, memory and disk space of a run before it starts."""

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
    """The devices for which a run is planned."""

    title: str
    devices: int
    flops: float  # FLOP/s that all devices together sustain in training
    memory: float = 0.0  # bytes per device; 0: the devices use the host's memory
    price: float = 0.0  # per hour, of all devices; 0: unknown
    topology: str = ""  # for launch.compile_check
    measured: str = ""  # source of `flops`
    start: float = 1.0  # minutes until a command starts to compute, mostly spent compiling


def time_of(steps: list[Step], times: dict[str, float], parallel: int = 1) -> float:
    """Return the total time of `steps`, in the unit of `times`. A step starts once its inputs are made.

    times: {step name: duration, or 0 to leave the step out}. parallel: number of steps that can use the
    devices at the same time. Downloads run beside these steps, one at a time.
    """
    free: dict[str, list[float]] = {"devices": [0.0] * parallel, "network": [0.0]}  # when each is free
    made: dict[Artifact, float] = {}
    for step in (step for step in steps if times[step.name]):
        lane = free[step.lane]
        begin = max([min(lane), *(made.get(artifact, 0.0) for artifact in step.needs)])
        lane[lane.index(min(lane))] = end = begin + times[step.name]
        made |= dict.fromkeys(step.makes, end)
    return max(free["devices"] + free["network"])


def train_tokens(config, model: ModelConfig) -> float:
    """Estimate how many tokens, including padding, a trainer trains on. Return 0 if unknown."""
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
    """Estimate the number of training tokens per SFT conversation, including padding."""
    length = min(SFT_TOKENS, config.max_seq_len if config.max_seq_len > 0 else model.sequence_len)
    return length // 2 if config.packing == "bestfit" else length  # bestfit rows have no padding


def step_tokens(config, model: ModelConfig) -> float:
    """Estimate the number of tokens per optimizer step of a trainer."""
    from jaxchat.train.stages import horizon_of

    if isinstance(config, BaseConfig):
        return horizon_of(config, model).batch
    if isinstance(config, MidConfig):
        return config.total_batch_size
    examples = config.target_examples_per_step
    return examples * conversation_tokens(config, model) if examples > 0 else BaseConfig.total_batch_size


def validation_tokens(config, model: ModelConfig, tokens: float, core: bool) -> float:
    """Estimate the number of tokens that the evaluations during training read.

    tokens: number of training tokens. core: whether to evaluate on the CORE benchmark too.
    """
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
    """Estimate the number of tokens in the CORE benchmark.

    max_per_task: maximum number of items per task, or -1 for all.
    """
    return CORE_TOKENS * (min(1.0, 22 * max_per_task / CORE_ITEMS) if max_per_task > 0 else 1.0)


def eval_tokens(config, core: bool) -> float:
    """Estimate how many tokens launch.base_eval reads, including the CORE benchmark if `core`."""
    return 2 * config.eval_tokens + (core_tokens(config.max_per_task) if core else 0)


def chat_eval_minutes(config) -> float:
    """Estimate roughly how many minutes launch.chat_eval takes. The machine's speed is ignored."""
    return CHAT_EVAL * (min(1.0, config.max_problems / CHAT_PROBLEMS) if config.max_problems > 0 else 1.0)


def train_minutes(config, model: ModelConfig, machine: Machine, core: bool) -> float:
    """Estimate how many minutes a trainer takes, including its evaluations. Return 0 if unknown.

    core: whether to evaluate on the CORE benchmark too.
    """
    from jaxchat.model.flops import flops_per_token

    tokens = train_tokens(config, model)
    if not tokens:
        return 0.0
    read = validation_tokens(config, model, tokens, core)
    return tokens * flops_per_token(model) / machine.flops / 60 + read_minutes(read, model, machine)


def read_minutes(tokens: float, model: ModelConfig, machine: Machine) -> float:
    """Estimate the minutes that an evaluation command takes to start and to read `tokens` tokens."""
    from jaxchat.model.flops import flops_per_token

    # A third of the FLOPs of training, at half of the FLOP/s.
    return machine.start + 2 / 3 * tokens * flops_per_token(model) / machine.flops / 60


def state_bytes(model: ModelConfig) -> int:
    """Return the size in bytes of a model's weights and optimizer state in float32."""
    import jax

    from jaxchat.model.params import declare

    weights = jax.tree.leaves(declare(model))  # Muon keeps one moment of each matrix, Adam two of the others
    return sum(math.prod(w.shape) * (8 if w.group == "matrix" else 12) for w in weights)


def shards_for(config: BaseConfig, model: ModelConfig) -> int:
    """Return how many text shards base training needs, with a 10 % reserve and one shard for validation."""
    tokens = train_tokens(config, model)
    return max(2, math.ceil(1.1 * tokens * BYTES_A_TOKEN / SHARD_BYTES) + 1)
