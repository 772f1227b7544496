"""Scoring as plainly as it goes: one sequence at a time, no batch, no padding, no cache, all in float64."""

import jax
import numpy as np

LONGER = 4  # a row may be so many times longer than the context that the model was trained with


class PlainModel:
    """The model of November 2025 in float64."""

    def __init__(self, params, config):
        self.p, self.config = jax.tree.map(lambda a: np.asarray(a, np.float64), params), config

    def logits(self, tokens, first: int) -> np.ndarray:
        """[T − first, V]: what follows each token from place `first` on."""
        config, p, T = self.config, self.p, len(tokens)
        H, group = config.head_dim, config.n_head // config.n_kv_head

        def norm(x):
            return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1.1920929e-07)

        angles = np.arange(T)[:, None] * 10_000.0 ** (-np.arange(0, H, 2) / H)[None]
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

        def rotate(x_TNH):
            a, b = x_TNH[..., : H // 2], x_TNH[..., H // 2 :]
            return np.concatenate([a * cos + b * sin, b * cos - a * sin], -1)

        later = np.triu(np.ones((T, T), bool), 1)
        x = norm(p.wte[np.asarray(tokens)])
        for layer in range(config.n_layer):
            w = jax.tree.map(lambda a, layer=layer: a[layer], p.blocks)
            q, k, v = (np.tensordot(norm(x), matrix, 1) for matrix in (w.wq, w.wk, w.wv))
            q, k = norm(rotate(q)), norm(rotate(k))
            y = np.zeros_like(x)
            for n in range(config.n_head):
                scores = q[:, n] @ k[:, n // group].T / np.sqrt(H)
                scores[later] = -np.inf
                weights = np.exp(scores)
                y += weights / weights.sum(-1, keepdims=True) @ v[:, n // group] @ w.wo[n]
            x = x + y
            x = x + np.maximum(norm(x) @ w.w_up, 0) ** 2 @ w.w_down
        return 15 * np.tanh(norm(x[first:]) @ p.lm_head / 15)

    def span(self, tokens, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """(loss, whether no other was likelier) of each of tokens[start:end]; rows keep LONGER contexts."""
        cut = max(0, len(tokens) - LONGER * self.config.sequence_len)
        tokens, start, end = tokens[cut:], max(1, start - cut), end - cut
        z = self.logits(tokens, start - 1)[: end - start]
        targets = np.asarray(tokens[start:end], np.int64)
        own = z[np.arange(len(targets)), targets]
        return np.log(np.exp(z).sum(-1)) - own, z.argmax(-1) == targets
