"""What a chat model can do: here, multiple choice by letter."""

from collections.abc import Sequence

import numpy as np

from jaxchat.infer.engine import Engine


def letter_accuracy(engine: Engine, task: Sequence[dict], max_problems: int = -1) -> float:
    """The share of a choice task's problems (of a fixed draw of max_problems) where the right letter is likeliest.

    A problem is asked as in training, up to where the assistant's letter follows, and only the letters of its own
    choices compete. Of a problem longer than the model's context the end is kept.
    """
    tokenizer, longest = engine.tokenizer, engine.config.sequence_len
    count = len(task) if max_problems < 0 else min(max_problems, len(task))
    drawn = np.random.Generator(np.random.PCG64(0)).permutation(len(task))[:count]  # neighbours share their subject
    rows = [task[int(i)] for i in drawn]
    prompts = [tokenizer.render_for_completion(row)[-longest:] for row in rows]
    letters = [
        [tokenizer.encode(letter)[0] for letter in row["letters"]] for row in rows
    ]  # one byte each, so one token
    chosen = engine.choose(prompts, letters)
    right = sum(row["letters"][c] == row["messages"][-1]["content"] for row, c in zip(rows, chosen, strict=True))
    return right / max(1, count)
