"""Estimates of a run before it begins: tokens, time, memory, disk. Measured times replace them as it goes."""

import dataclasses
import math

from jaxchat.config import SFT_RECIPES, BaseConfig, MidConfig, ModelConfig, SFTConfig

BYTES_A_TOKEN = 4.8  # of English web text with 65,536 tokens: an estimate until there is a tokenizer
SHARD_BYTES = 250e6  # of text in a shard of fineweb-edu
SHARD_FILE = 100e6  # bytes of its file
TASK_FILES = 2e9  # bytes of all tasks and of CORE's bundle
NETWORK = 50e6  # bytes a second of a download
MID_TOKENS = 420e6  # of one pass over mid's default mixture
SFT_CONVERSATIONS = 22_500  # of SFT's default mixture
SFT_TOKENS = 600  # of one of them, in a row as long as the longest of its batch
SFT_2026_TOKENS = 480e6  # of one pass over the mixture of its recipe of 2026
CORE_TOKENS, CORE_ITEMS = 220e6, 90_000  # of all of CORE's prompts
CHAT_EVAL, CHAT_PROBLEMS = 6.0, 100  # minutes of chat_eval, with this many problems a task or more
TOKENIZER_CHARS = 3e6  # a second


@dataclasses.dataclass(frozen=True)
class Machine:
    """The devices of a preset, and what they can do.

    flops: FLOP/s that all of them sustain in training. memory: bytes of each. price: of an hour.
    """

    title: str
    devices: int
    flops: float
    memory: float = 0.0  # 0: the host's
    price: float = 0.0  # 0: not known
    topology: str = ""  # for launch.compile_check
    measured: str = ""  # where `flops` is from
    start: float = 1.0  # minutes until a command computes: compiling, mostly


def mid_tokens(config: MidConfig, model: ModelConfig) -> float:
    """Tokens of midtraining; 0: not known."""
    if config.num_iterations > 0:
        return config.num_iterations * config.total_batch_size
    return MID_TOKENS if config.train_tasks == MidConfig.train_tasks else 0.0


def sft_tokens(config: SFTConfig, model: ModelConfig) -> float:
    """Tokens of chat finetuning, padding included; 0: not known."""
    if config.train_tasks == SFT_RECIPES["2026"]["train_tasks"] and config.num_iterations < 0:
        return SFT_2026_TOKENS * config.num_epochs
    if config.target_examples_per_step < 0:
        return config.num_iterations * BaseConfig.total_batch_size if config.num_iterations > 0 else 0.0
    length = min(SFT_TOKENS, config.max_seq_len if config.max_seq_len > 0 else model.sequence_len)
    if config.packing == "bestfit":  # rows without padding
        length //= 2
    if config.num_iterations > 0:
        return config.num_iterations * config.target_examples_per_step * length
    standard = config.train_tasks == SFTConfig.train_tasks
    return SFT_CONVERSATIONS * config.num_epochs * length if standard else 0.0


def eval_tokens(config, core: bool) -> float:
    """Tokens that base_eval reads, with or without CORE. config: its flags."""
    if not core:
        return 2 * config.eval_tokens
    items = 22 * config.max_per_task
    share = min(1.0, items / CORE_ITEMS) if items > 0 else 1.0
    return 2 * config.eval_tokens + share * CORE_TOKENS


def chat_eval_minutes(config) -> float:
    """Minutes that chat_eval takes: a guess, the same for all machines. config: its flags."""
    return CHAT_EVAL * (min(1.0, config.max_problems / CHAT_PROBLEMS) if config.max_problems > 0 else 1.0)


def train_minutes(tokens: float, model: ModelConfig, machine: Machine) -> float:
    """Minutes to train on `tokens`; 0: not known."""
    from jaxchat.model.flops import flops_per_token

    return machine.start + tokens * flops_per_token(model) / machine.flops / 60 if tokens else 0.0


def read_minutes(tokens: float, model: ModelConfig, machine: Machine) -> float:
    """Minutes to evaluate a model on tokens: a third of training's FLOPs, at half of its FLOP/s."""
    from jaxchat.model.flops import flops_per_token

    return machine.start + 2 / 3 * tokens * flops_per_token(model) / machine.flops / 60


def state_bytes(model: ModelConfig) -> int:
    """Bytes of weights and optimizer in float32: Adam keeps two moments, Muon one."""
    import jax

    from jaxchat.model.params import declare

    weights = jax.tree.leaves(declare(model))
    return sum(math.prod(w.shape) * (8 if w.group == "matrix" else 12) for w in weights)


def shards_for(config: BaseConfig, model: ModelConfig) -> int:
    """Number of shards to train on without repeating any, with a tenth to spare and one more for
    validation."""
    from jaxchat.train.stages import horizon_of

    tokens = horizon_of(config, model).tokens
    return max(2, math.ceil(1.1 * tokens * BYTES_A_TOKEN / SHARD_BYTES) + 1)
