"""Batches for reinforcement learning: answers sampled with the weights being trained."""

import contextlib
import dataclasses
import time

import jax
import numpy as np

from jaxchat import files, sharding
from jaxchat.checkpoint import Found, run_folder
from jaxchat.config import Model, RLConfig, counted
from jaxchat.data.order import Order
from jaxchat.data.tasks import Mixture
from jaxchat.eval.chat import SLOTS, batch_size_for
from jaxchat.eval.scoring import Scorer, Span
from jaxchat.infer.engine import Engine
from jaxchat.infer.text import format_parts
from jaxchat.model.params import Params
from jaxchat.rl.advantages import advantages, mixed_groups
from jaxchat.rl.problems import Problems
from jaxchat.rl.rollout import Rollout, numbers_of
from jaxchat.rl.weights import LogProbs, Policy, clipped_share, policy_weights, row_scales
from jaxchat.train.fit import device_memory
from jaxchat.train.reporter import Unread

ROUNDS = 4  # maximum rounds of sampling in a step with --resample
ALIKE = 20  # consecutive steps without a mixed group after which a warning is printed
TRAINING_BYTES = 20  # per parameter: weight, moments, gradient and summed gradients, kept while sampling
# Default (clip_low, clip_high) of each loss, for flags that are negative.
CLIPS = {"reinforce": (0.2, 0.28), "ppo": (0.2, 0.28), "cispo": (0.2, 4.0), "gspo": (3e-4, 4e-4)}


class RolloutBatches:
    """Batches for train_step: answers sampled with the current weights, and a loss weight for each token.

    To resume exactly, a checkpoint stores the number of problems drawn and, if answers are used for several
    updates, the answers.
    """

    alone = False  # the processes work together: process 0 rewards all answers

    def __init__(self, config: RLConfig, model: Model, parent: Found, tasks: Mixture):
        self.config, self.model, self.parent = config, model, parent
        self.problems = Problems(config, tasks, parent.tokenizer)
        self.policy = policy_of(config)
        self._order = Order([len(tasks)], config.seed)
        self._drawn = 0  # number of problems drawn from the order
        self._rollout: Rollout | None = None
        self._engine: Engine | None = None
        self._reference: Params | None = None
        self._alike = 0  # steps in a row without a mixed group

    def get_state(self) -> dict:
        more = self._rollout is not None and self.config.updates > 1
        return {"drawn": self._drawn, "rollout": dataclasses.asdict(self._rollout) if more else None}

    def set_state(self, state: dict):
        self._drawn = state["drawn"]
        self._rollout = Rollout(**state["rollout"]) if state["rollout"] else None

    def close(self):
        self._engine = None

    def peek(self) -> dict:
        """Return a batch of blank rows, which has the same array names and types as later batches."""
        return arrange(Rollout(), np.zeros((0, 1)), self._shape(), self.model)

    def engine(self, params: Params) -> Engine:
        """Return the engine that samples answers, loaded with these weights."""
        if self._engine is None:
            slots = slots_for(self.config, self.model)
            c = self.model.config
            self._engine = Engine(params, c, self.parent.tokenizer, self.model.compute, batch_size=slots)
        else:
            self._engine.load(params)
        return self._engine

    def next_batch(self, params: Params, step: int) -> dict:
        jax.block_until_ready(params)  # so that the times below exclude the previous step
        number, update = divmod(step, self.config.updates)
        numbers = {"data_wait_seconds": 0.0}
        if update == 0:
            drawn = self._drawn
            try:
                numbers |= self._roll_out(params, number, step)
            except Exception:
                self._drawn = drawn  # so that a checkpoint saved now repeats the step
                raise
        weights_RT, more = self._weigh(params)
        batch = arrange(self._rollout, weights_RT, self._shape(), self.model)
        batch["numbers"] = numbers | more | batch["numbers"]
        return batch

    @property
    def plan(self) -> list[tuple[str, str]]:
        """Pairs (name, text) that describe sampling, reward and loss in the summary printed before a run."""
        c, tasks = self.config, self.problems.checked
        micro_batches, rows = self._shape()
        devices = sharding.data_shards(self.model.mesh)
        count, slots = c.examples_per_step * c.num_samples, slots_for(c, self.model)
        product = f"{counted(rows // devices, 'row')} × {counted(devices, 'device')}"
        answers = f"{c.examples_per_step} problems × {c.num_samples} = {count} a step, at most "
        answers += f"{c.max_new_tokens} tokens, {slots} a device at a time"
        reward = ", ".join(f"{name} × {weight:g}" for name, weight in self.problems.reward.items())
        right = ", ".join(f"{what} ({name})" for name, what in tasks.items())
        found = [
            ("answers", answers),
            ("batch", f"{product} × {micro_batches} accumulated, or fewer"),
            ("reward", f"{reward}; checked by {right}"),
            ("loss", f"{c.loss}, advantages by {c.advantage}, divided by {norm_of(c)}"),
        ]
        if c.updates > 1 and c.loss == "reinforce":
            how = "reinforce is biased in updates after the first; --loss=ppo corrects for it"
            found.append(("warning", how))
        if c.temperature != 1 or c.top_k:
            how = f"temperature {c.temperature:g}" if c.temperature != 1 else f"top_k {c.top_k}"
            how += ": answers are sampled from another distribution than the one being trained"
            found.append(("warning", how))
        return found

    def _shape(self) -> tuple[int, int]:
        """Return (micro-batches in a step, rows in a micro-batch over all processes)."""
        rows = self.config.device_batch_size * sharding.data_shards(self.model.mesh)
        return -(-self.config.examples_per_step * self.config.num_samples // rows), rows

    def _roll_out(self, params: Params, number: int, step: int) -> dict[str, float]:
        """Sample and judge answers, and store them in self._rollout. Return timings and rates to log.

        number: index of the rollout, from which the sampling seeds are derived.
        """
        config, began = self.config, time.perf_counter()
        engine, judging = self.engine(params), 0.0
        rollout, answers, right = Rollout(), [], []
        for attempt in range(ROUNDS if config.resample else 1):
            first, self._drawn = self._drawn, self._drawn + config.examples_per_step
            problems = [self._order.index(i) for i in range(first, self._drawn)]
            self._check_readable(problems, step)
            how = {"temperature": config.temperature, "top_k": config.top_k, "logprobs": 0}
            how["seed"] = seed_of(config.seed, number, attempt)
            prompts, generations = self.problems.sample(engine, problems, config.num_samples, **how)
            judged = time.perf_counter()
            said, right_EG, rewards_EG = self.problems.judge(problems, generations)
            judging += time.perf_counter() - judged
            rollout.add(problems, prompts, generations, rewards_EG)
            answers, right = answers + said, right + right_EG.tolist()
            if mixed_groups(rollout.rewards_EG).sum() >= config.examples_per_step:
                break
        seconds = time.perf_counter() - began - judging
        rollout.numbers = numbers_of(rollout, answers, np.array(right))
        self._warn(rollout)
        self._rollout = rollout.best_groups(config.examples_per_step)
        if config.sample_every > 0 and number % config.sample_every == 0 and not config.dry_run:
            self._write_sample(rollout, answers, step + 1)
        tokens = rollout.numbers["answer_tokens"] * len(answers)
        rates = {"rollout_tokens_per_s": tokens / seconds, "problems_drawn": float(len(rollout.problems))}
        return {"rollout_seconds": seconds, "reward_seconds": judging} | rates

    def _check_readable(self, problems: list[int], step: int):
        """Raise Unread on all processes if one of them cannot read the problems with these indices."""
        own = None
        try:
            for problem in problems:
                self.problems.tasks[problem]
        except Exception as problem:
            own = problem
        if any(one["unread"] for one in sharding.gather_json({"unread": own is not None})):
            raise Unread(step + 1) from own

    def _weigh(self, params: Params) -> tuple[np.ndarray, dict[str, float]]:
        """Return (loss weight of each target token, float64 [R, T]; {name: number} to log)."""
        config, rollout = self.config, self._rollout
        sampled_RT = rollout.positions(rollout.sampled) > 0
        mixed_E = mixed_groups(rollout.rewards_EG)
        numbers = {"advantage": 0.0} | rollout.numbers
        if mixed_E.sum() < config.min_groups:
            return np.zeros(sampled_RT.shape), numbers
        if config.mask_truncated:
            sampled_RT &= np.array(rollout.finished)[:, None]
        mixed_R = np.repeat(mixed_E, config.num_samples)
        advantages_R = advantages(rollout.rewards_EG, config.advantage).reshape(-1)
        mask_RT, began = sampled_RT & mixed_R[:, None], time.perf_counter()
        logprobs = self._logprobs(params, mask_RT)
        scales_R1 = row_scales(norm_of(config), sampled_RT, mixed_R, config.max_new_tokens)
        weights_RT = policy_weights(self.policy, advantages_R, mask_RT, logprobs, scales_R1)
        if config.kl_coef and mask_RT.any():
            numbers["kl"] = float((logprobs.now - logprobs.reference)[mask_RT].mean())
        numbers |= {
            "advantage": float(np.abs(advantages_R).mean()),
            "logprob_seconds": time.perf_counter() - began,
            "clipped": clipped_share(self.policy, advantages_R, mask_RT, logprobs),
        }
        return weights_RT, numbers

    def _logprobs(self, params: Params, mask_RT: np.ndarray) -> LogProbs:
        """Return the log-probabilities that the loss needs, or zeros if the loss needs none."""
        policy, rollout = self.policy, self._rollout
        ratio = policy.loss != "reinforce" and self.config.updates > 1
        if not (ratio or policy.tis or policy.kl_coef):
            zeros_RT = np.zeros(mask_RT.shape)
            return LogProbs(zeros_RT, zeros_RT)
        now = self._score(params, mask_RT)
        if rollout.old is None:
            rollout.old = now
        reference = now
        if policy.kl_coef:
            reference = self._score(self.reference(), mask_RT)
        return LogProbs(*map(rollout.positions, (now, rollout.old, rollout.sampler, reference)))

    def reference(self) -> Params:
        """Return the weights of the model before training, the reference of the KL divergence."""
        if self._reference is None:
            self._reference = self.parent.load(self.model.mesh)
        return self._reference

    def _score(self, params: Params, mask_RT: np.ndarray) -> list[list[float]]:
        """Return the log-probability of each token, as a list per row; zeros for rows whose mask is all 0."""
        found = [[0.0] * len(tokens) for tokens in self._rollout.tokens]
        rows = [int(row) for row in np.flatnonzero(mask_RT.any(axis=1))]
        tokens = [np.array(self._rollout.tokens[row], np.int32) for row in rows]
        spans = [Span(row, 1, len(row)) for row in tokens]
        for row, score in zip(rows, Scorer(params, self.model, quiet=True).spans(spans), strict=True):
            found[row] = [0.0, *(-score.nll).tolist()]
        return found

    def _warn(self, rollout: Rollout):
        """Warn at every ALIKE-th step in a row in which all answers to each problem got the same reward."""
        self._alike = 0 if mixed_groups(rollout.rewards_EG).any() else self._alike + 1
        if self._alike and self._alike % ALIKE == 0 and jax.process_index() == 0:
            reward = rollout.numbers["reward"]
            how = "easier problems, a longer SFT or a larger --num_samples"
            if rollout.numbers["right"]:
                how = "harder problems or a higher --temperature"
            print(
                f"WARNING: for {self._alike} steps all answers to each problem were equally good (reward "
                f"{reward:.3f}), so nothing was learnt; try {how}",
                flush=True,
            )

    def _write_sample(self, rollout: Rollout, answers: list, step: int):
        """Add a problem and its answers to samples.jsonl, preferably one whose answers differ in reward."""
        if jax.process_index() > 0:
            return
        mixed_E = mixed_groups(rollout.rewards_EG)
        group, samples = int(np.argmax(mixed_E)), self.config.num_samples
        problem = self.problems.tasks[rollout.problems[group]]
        # best_groups puts the same group first in self._rollout.
        advantages_G = advantages(self._rollout.rewards_EG, self.config.advantage)[0]
        own = answers[group * samples : (group + 1) * samples]
        about = {
            "step": step,
            "problem": self.problems.tasks.name_of(rollout.problems[group]),
            "messages": problem["messages"],
            "answers": [
                {"text": format_parts(answer.parts), "reward": reward, "advantage": float(advantage)}
                for answer, reward, advantage in zip(own, rollout.rewards[group], advantages_G, strict=True)
            ],
        }
        path = run_folder("rl", self.parent.folder.name) / "samples.jsonl"
        with contextlib.suppress(OSError):  # a full disk should not end a run
            # After resuming from an earlier checkpoint, the rows of later steps are replaced.
            files.write_lines(path, [*(row for row in files.read_lines(path) if row["step"] < step), about])


def policy_of(config: RLConfig) -> Policy:
    low, high = CLIPS[config.loss]
    return Policy(
        loss=config.loss,
        clip_low=low if config.clip_low < 0 else config.clip_low,
        clip_high=high if config.clip_high < 0 else config.clip_high,
        tis=config.tis,
        kl_coef=config.kl_coef,
    )


def norm_of(config: RLConfig) -> str:
    """Return the kind of loss normalization: "rows" for GSPO, otherwise --loss_norm."""
    return "rows" if config.loss == "gspo" else config.loss_norm


def seed_of(*parts: int) -> int:
    """Derive a random seed, 0 to 2³² − 1, from all the given numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def slots_for(config: RLConfig, model: Model) -> int:
    """Return how many answers a device samples at a time: its share of a step, or fewer to save memory."""
    share = -(-config.examples_per_step * config.num_samples // model.mesh.size)
    memory = device_memory(model.mesh)
    most = max(SLOTS, share) if memory else SLOTS
    return min(share, batch_size_for(model.config, model.compute, memory, most=most, each=TRAINING_BYTES))


def padded_length(longest: int, context: int) -> int:
    """Return the length to pad rows to: `longest` rounded up to one of a few lengths, at most `context`.

    They are few because the step is compiled for each. Above 256 tokens, padding adds at most an eighth.
    """
    step = max(32, 2 ** (longest.bit_length() - 4))
    return min(context, -(-longest // step) * step)


def arrange(rollout: Rollout, weights_RT: np.ndarray, shape: tuple[int, int], model: Model) -> dict:
    """Return this process's part of a batch for train_step: {name: array}, and "totals" and "numbers" to log.

    The batch has the rows with any nonzero weight, then blank rows. Arrays are [micro-batches, rows, T],
    where T is the padded length of the longest row with a nonzero weight.
    shape: (micro-batches, rows of a micro-batch over all processes).
    """
    context, (micro_batches, rows) = model.config.sequence_len, shape
    chosen = np.flatnonzero(weights_RT.any(axis=1))
    longest = max((len(rollout.tokens[row]) - 1 for row in chosen), default=1)
    time = padded_length(longest, context)
    tokens = np.zeros((micro_batches * rows, time + 1), np.int32)
    weights, sampler, counts = np.zeros((3, micro_batches * rows, time), np.float32)
    for place, row in enumerate(chosen):
        of_row = rollout.tokens[row]
        tokens[place, : len(of_row)] = of_row
        sampler[place, : len(of_row) - 1] = rollout.sampler[row][1:]
        weights[place, : len(of_row) - 1] = weights_RT[row, : len(of_row) - 1]
    counts[0, 0] = 1.0  # the weights are already normalized, so the step's N is 1
    arrays = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}
    arrays |= {"counts": counts, "sampler": sampler}
    first, end = sharding.share_of_rows(model.mesh, rows)

    def mine(array):
        whole = array.reshape(micro_batches, rows, *array.shape[1:])
        return np.ascontiguousarray(whole[:, first:end])

    trained = (weights != 0).sum(axis=1, dtype=np.int32)
    computed = -(-len(chosen) // rows) * rows * time
    return {name: mine(array) for name, array in arrays.items()} | {
        "totals": {"trained_tokens": mine(trained)},
        "numbers": {"computed_tokens": float(computed)},
    }
