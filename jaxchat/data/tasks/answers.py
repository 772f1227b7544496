"""Parse the final number of an answer, which GSM8K and SpellingBee write as in "#### 18"."""

import re
from fractions import Fraction

NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{2,3})*,[0-9]{3}|[0-9]+)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,2})?|\.[0-9]+"
BEFORE = r"(?:[\s*_(\[{\"'`“‘$¢-¥₠-⃏\\]|\\boxed)*"  # bold type, brackets, quotes, currency signs, LaTeX
FINAL = re.compile(
    rf"####{BEFORE}(?:([-+−–]){BEFORE})?({NUMBER})(?:\s*/\s*([0-9]+))?"
    r"(?!(?:(?!####)[^\n])*\d)"  # refuses more digits: "3 + 4 = 7", "1,23", "18 or 19"
)


def final_number(text: str) -> Fraction | None:
    """Return the first number that follows "####" and is the last number on its line, or None.

    Symbols such as "$" may stand between "####" and the number, but words may not.
    """
    found = FINAL.search(text)
    if not found:
        return None
    sign, number, divisor = found.groups()
    try:
        value = Fraction(number.replace(",", "")) / Fraction(divisor or 1)
    except (ValueError, ZeroDivisionError):  # thousands of digits; "18/0"
        return None
    return -value if sign in tuple("-−–") else value


def states_the_number(row: dict, text: str) -> bool:
    """Return whether the final number of `text` equals that of the right answer, `row`'s last message."""
    content = row["messages"][-1]["content"]
    wanted = content if isinstance(content, str) else "".join(part["text"] for part in content)
    return (number := final_number(text)) is not None and number == final_number(wanted)
