"""Random choices that are the same everywhere: each is drawn from a text such as "0:document:17"."""

import random
from collections.abc import Sequence


class Chance(random.Random):
    """A source of choices seeded by a string, the same on every machine and Python.

    Every method draws from `random()` alone: it is the only draw whose values Python promises to keep.
    """

    def below(self, n: int) -> int:
        """A number from 0 to n - 1, each equally likely."""
        return int(self.random() * n)

    def between(self, low: int, high: int) -> int:
        """A number from low to high, both included."""
        return low + self.below(high - low + 1)

    def of(self, items: Sequence):
        """Draw one of `items`, each equally likely."""
        return items[self.below(len(items))]

    def one_in(self, n: float) -> bool:
        """True once in n times."""
        return self.random() * n < 1.0

    def weighed(self, weights: dict):
        """Draw a key of {key: weight}, with a probability proportional to its weight."""
        left = self.random() * sum(weights.values())
        for key, weight in weights.items():
            left -= weight
            if left < 0:
                return key
        return key  # rounding left a hair over

    def ordered(self, items: Sequence) -> list:
        """All of `items` in a random order."""
        return [item for _, _, item in sorted((self.random(), i, item) for i, item in enumerate(items))]
