"""The calculator tool: arithmetic, and counting the occurrences of one text in another.

    line    = count | sum
    sum     = product (("+" | "-") product)*
    product = signed (("*" | "/" | "//" | "%") signed)*
    signed  = ("+" | "-") signed | number | "(" sum ")"
    count   = text ".count(" text ")"
    text    = '…' or "…", without quotes, backslashes or line ends inside

Expressions outside this grammar are refused. Python's parser reads the expression, but no Python code is run.
The length of the text, the nesting, and the size of every intermediate number are limited.
"""

import ast
import operator
import re
from decimal import Decimal
from itertools import accumulate

MAX_CHARS = 200
MAX_DEPTH = 20
LARGEST = 10**15  # in this range float64 represents every whole number

NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"  # commas between thousands only
TOKEN = re.compile(rf"\s*({NUMBER}|//|[-+*/%()])", re.ASCII)
COUNT = re.compile(
    r"""\s*(?:'([^'\\\r\n]*)'|"([^"\\\r\n]*)")\.count\((?:'([^'\\\r\n]*)'|"([^"\\\r\n]*)")\)\s*"""
)
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


class _Refused(Exception):
    """The expression is not in the calculator's grammar, or exceeds a limit."""


def calculate(expression: str) -> str | None:
    """Return the value of an expression as text, such as "2.5" for "5/2", or None if it can't be computed."""
    if not isinstance(expression, str) or len(expression) > MAX_CHARS:
        return None
    if match := COUNT.fullmatch(expression):
        text, part = (a if a is not None else b for a, b in (match.group(1, 2), match.group(3, 4)))
        return str(text.count(part)) if part else None
    try:
        return _as_text(_value(ast.parse(_in_python(expression), mode="eval").body))
    except (_Refused, SyntaxError, ZeroDivisionError, OverflowError):
        return None


def _in_python(expression: str) -> str:
    """Rewrite an expression for Python's parser. Raises _Refused for unknown characters or deep nesting."""
    expression = expression.rstrip()
    if TOKEN.sub("", expression):  # it has other characters
        raise _Refused
    tokens = [token.replace(",", "") for token in TOKEN.findall(expression)]
    depths = accumulate((token == "(") - (token == ")") for token in tokens)
    if max(depths, default=0) > MAX_DEPTH:
        raise _Refused
    return " ".join(str(int(token)) if token.isdecimal() else token for token in tokens)


def _as_text(value: int | float) -> str:
    if isinstance(value, float) and value == int(value):
        value = int(value)
    if isinstance(value, int):
        return str(value)
    # Twelve digits hide rounding errors, so that 0.1 + 0.2 is 0.3; a large number needs all fifteen.
    rounded = f"{value:.{15 if abs(value) >= 1e9 else 12}g}"
    return format(Decimal(rounded), "f")  # without an exponent, which the calculator can't parse


def _value(node: ast.expr, signs: int = 0) -> int | float:
    """Evaluate a parsed expression. signs: number of + and − signs directly before it; two in "--1"."""
    if isinstance(node, ast.BinOp):
        value = OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    elif isinstance(node, ast.UnaryOp) and signs < MAX_DEPTH:
        value = OPERATORS[type(node.op)](_value(node.operand, signs + 1))
    elif isinstance(node, ast.Constant):
        value = node.value
    else:  # a call, as in 2(3), or a tuple, ()
        raise _Refused
    if not -LARGEST <= value <= LARGEST:  # also refuses NaN
        raise _Refused
    return value
