"""Sample and judge answers to RL problems. A problem is a conversation that the model must complete."""

from collections.abc import Sequence

import jax
import numpy as np

from jaxchat.config import RLConfig
from jaxchat.data.tasks import Mixture
from jaxchat.eval.chat import in_threads
from jaxchat.infer.engine import Engine
from jaxchat.infer.scheduler import Generation
from jaxchat.rl.rewards import TERMS, Answer, checker_for, combine, parse_reward
from jaxchat.sharding import gather_json
from jaxchat.tokenizer import Tokenizer


class Problems:
    """The problems of several tasks, with the functions and weights that reward answers to them."""

    def __init__(self, config: RLConfig, tasks: Mixture, tokenizer: Tokenizer):
        """Find each task's checker and parse --reward. Raises UserError if either fails."""
        self.config, self.tasks, self.tokenizer = config, tasks, tokenizer
        self.reward = parse_reward(config.reward)
        checkers = {task.name: checker_for(task) for task in tasks.tasks}
        self.checked = {name: what for name, (_, what) in checkers.items()}  # for the plan
        self._checkers = {name: check for name, (check, _) in checkers.items()}

    def __len__(self) -> int:
        return len(self.tasks)

    def sample(
        self, engine: Engine, problems: Sequence[int], num_samples: int, **settings
    ) -> tuple[list[list[int]], list[Generation]]:
        """Sample num_samples answers to each problem. Return (prompts, generations grouped by prompt).

        A long prompt loses its first tokens, to leave enough of the context for an answer.
        problems: indices. settings: further arguments of Engine.generate.
        """
        context, most = engine.config.sequence_len, self.config.max_new_tokens
        room = context - min(most, context // 2)
        prompts = [self.tokenizer.render_for_completion(self.tasks[i])[-room:] for i in problems]
        generations = engine.generate(prompts, num_samples=num_samples, max_tokens=most, **settings)
        return prompts, generations

    def judge(self, problems: Sequence[int], generations: list[Generation]):
        """Judge G answers to each of E problems. Return (E·G Answers, right_EG: bool, rewards_EG: float).

        problems: indices. generations: E·G, grouped by problem. Process 0 judges for all processes.
        """
        samples = len(generations) // len(problems)
        answers = [Answer.of(generation, self.tokenizer) for generation in generations]
        judged = {}
        if jax.process_index() == 0:  # a checker that runs programs may judge differently elsewhere
            checks = [self._checkers[self.tasks.task_of(i).name] for i in problems for _ in range(samples)]
            rows = [row for i in problems for row in [self.tasks[i]] * samples]
            right = in_threads(lambda check, row, answer: check(row, answer), checks, rows, answers)
            judged = {"answer": right} | {name: [term(a) for a in answers] for name, term in TERMS.items()}
            judged = {name: list(map(float, values)) for name, values in judged.items()}
        first = gather_json(judged)[0]
        terms = {name: np.array(values).reshape(-1, samples) for name, values in first.items()}
        return answers, terms["answer"] > 0, combine(terms, self.reward)
