"""Reproducible random choices, seeded by a string such as "0:document:17"."""

import random
from collections.abc import Sequence


class Chance(random.Random):
    """Random choices seeded by a string, the same on every machine and version of Python."""

    # Only random() is used, because Python promises stable values for no other method.

    def below(self, n: int) -> int:
        """Draw an integer from 0 to n - 1, each equally likely."""
        return int(self.random() * n)

    def between(self, low: int, high: int) -> int:
        """Draw an integer from low to high, both included."""
        return low + self.below(high - low + 1)

    def of(self, items: Sequence):
        """Draw one of `items`, each equally likely."""
        return items[self.below(len(items))]

    def one_in(self, n: float) -> bool:
        """Return True with probability 1/n."""
        return self.random() * n < 1.0

    def weighted(self, weights: dict):
        """Draw a key of `weights`, with a probability proportional to the key's weight."""
        left = self.random() * sum(weights.values())
        for key, weight in weights.items():
            left -= weight
            if left < 0:
                return key
        return key  # rounding error left a remainder

    def shuffled(self, items: Sequence) -> list:
        """Return all of `items` as a list in random order."""
        return [item for _, _, item in sorted((self.random(), i, item) for i, item in enumerate(items))]
