"""The calculator tool: arithmetic, and counting letters in a literal, by a parser of its own grammar.

    line    = count | sum
    sum     = product (("+" | "-") product)*
    product = signed (("*" | "/" | "//" | "%") signed)*
    signed  = ("+" | "-") signed | number | "(" sum ")"
    count   = text ".count(" text ")"
    text    = '…' or "…", without quotes, backslashes or line ends inside

Everything is bounded: the text, the nesting, and the size of every number on the way.
"""

import re
from decimal import Decimal

MAX_CHARS = 200
MAX_DEPTH = 20
LARGEST = 10**15  # beyond it neighbouring whole numbers are the same float

NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"  # commas between thousands only
TOKEN = re.compile(rf"\s*({NUMBER}|//|[-+*/%()])", re.ASCII)
COUNT = re.compile(
    r"""\s*(?:'([^'\\\r\n]*)'|"([^"\\\r\n]*)")\.count\((?:'([^'\\\r\n]*)'|"([^"\\\r\n]*)")\)\s*"""
)


class _Refused(Exception):
    """The expression is not one that the calculator takes."""


def calculate(expression: str) -> str | None:
    """Return an expression's value as text ("5/2" gives "2.5", "4/2" gives "2"), or None if it has none."""
    if not isinstance(expression, str) or len(expression) > MAX_CHARS:
        return None
    if match := COUNT.fullmatch(expression):
        text, part = (a if a is not None else b for a, b in (match.group(1, 2), match.group(3, 4)))
        return str(text.count(part)) if part else None
    try:
        return _as_text(_Parser(_tokens(expression)).whole())
    except (_Refused, ZeroDivisionError, OverflowError):
        return None


def _tokens(expression: str) -> list[str]:
    tokens, at = [], 0
    expression = expression.rstrip()
    while at < len(expression):
        match = TOKEN.match(expression, at)
        if not match:
            raise _Refused
        tokens.append(match[1])
        at = match.end()
    return tokens


def _as_text(value: int | float) -> str:
    if isinstance(value, float) and value == int(value):
        value = int(value)
    if isinstance(value, int):
        return str(value)
    # Twelve digits hide the last bits' rounding: 0.1 + 0.2 is 0.3. A large number needs all fifteen.
    rounded = f"{value:.{15 if abs(value) >= 1e9 else 12}g}"
    return format(Decimal(rounded), "f")  # no exponent, which the calculator would not read


def _bounded(value: int | float) -> int | float:
    if not -LARGEST <= value <= LARGEST:  # also refuses what is not a number
        raise _Refused
    return value


class _Parser:
    def __init__(self, tokens: list[str]):
        self._tokens, self._at, self._depth = tokens, 0, 0

    def _peek(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _take(self) -> str:
        token = self._peek()
        self._at += 1
        return token

    def whole(self) -> int | float:
        value = self._sum()
        if self._peek():
            raise _Refused
        return value

    def _sum(self):
        value = self._product()
        while self._peek() in ("+", "-"):
            value = _bounded(value + self._product() if self._take() == "+" else value - self._product())
        return value

    def _product(self):
        value = self._signed()
        while self._peek() in ("*", "/", "//", "%"):
            operator, right = self._take(), self._signed()
            if operator == "*":
                value = value * right
            elif operator == "/":
                value = value / right
            else:
                value = value // right if operator == "//" else value % right
            _bounded(value)
        return value

    def _signed(self):
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _Refused
        token = self._take()
        if token in ("+", "-"):
            value = self._signed()
            value = -value if token == "-" else value
        elif token == "(":
            value = self._sum()
            if self._take() != ")":
                raise _Refused
        elif token[:1].isdigit() or token[:1] == ".":
            digits = token.replace(",", "")
            value = _bounded(float(digits) if "." in digits else int(digits))
        else:
            raise _Refused
        self._depth -= 1
        return value
