"""Generate arithmetic problems and their results, holding out a tenth of the pairs of numbers."""

import zlib
from typing import NamedTuple

from jaxchat.demo.chance import Chance


class Sum(NamedTuple):
    """An arithmetic problem: the numbers `a` and `b` with the operator `sign` between them."""

    a: int
    sign: str  # + - * /
    b: int

    @property
    def expression(self) -> str:
        return f"{self.a}{self.sign}{self.b}"

    @property
    def result(self) -> str:
        """The problem's result as the calculator prints it. Whole numbers have no decimal point."""
        a, b = self.a, self.b
        if self.sign == "/":
            return str(a // b if a % b == 0 else a / b)
        return str({"+": a + b, "-": a - b, "*": a * b}[self.sign])

    @property
    def is_natural(self) -> bool:
        """Whether the result is a whole number of at least 0."""
        return self.result.isdigit()


def pair_is_held_out(seed: int, a: int, b: int) -> bool:
    """Return whether a world of this seed keeps (a, b), in either order, out of its training data."""
    return zlib.crc32(f"{seed} {min(a, b)} {max(a, b)}".encode()) % 10 == 0


def number(chance: Chance, max_digits: int) -> int:
    """Draw a number with 1 to `max_digits` digits. Each number of digits is equally likely."""
    digits = chance.between(1, max_digits)
    return chance.between(10 ** (digits - 1), 10**digits - 1)


def any_sum(chance: Chance) -> Sum:
    """Draw an arithmetic problem. Its numbers are below 1,000, but a dividend can be up to 1,980."""
    sign = chance.of("+-*/")
    if sign == "*":
        return Sum(number(chance, 3), sign, number(chance, 2))
    if sign == "/":
        if chance.one_in(5):
            return Sum(number(chance, 3), sign, chance.of((2, 4, 5, 8)))
        divisor = chance.between(2, 20)
        return Sum(divisor * number(chance, 2), sign, divisor)
    a, b = number(chance, 3), number(chance, 3)
    return Sum(max(a, b), sign, min(a, b)) if sign == "-" and not chance.one_in(12) else Sum(a, sign, b)


def sum_of(chance: Chance, seed: int, held_out: bool) -> Sum:
    """Draw an arithmetic problem with a held-out pair of numbers or, if not `held_out`, another pair."""
    while True:
        found = any_sum(chance)
        if pair_is_held_out(seed, found.a, found.b) == held_out:
            return found
