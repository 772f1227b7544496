"""The number in an answer, as GSM8K and SpellingBee state it at the end: "#### 18"."""

import re
from fractions import Fraction

NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{2,3})*,[0-9]{3}|[0-9]+)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,2})?|\.[0-9]+"
BEFORE = r"(?:[\s*_(\[{\"'`“‘$¢-¥₠-⃏\\]|\\boxed)*"  # bold type, brackets, quotes, currency signs, LaTeX
FINAL = re.compile(
    rf"####{BEFORE}(?:([-+−–]){BEFORE})?({NUMBER})(?:\s*/\s*([0-9]+))?"
    r"(?!(?:(?!####)[^\n])*\d)"  # else it is not one number: "3 + 4 = 7", "1,23", "18 or 19"
)


def final_number(text: str) -> Fraction | None:
    """The number after ####, if it is the only one on its line; of several the first.

    "18.00", "$18", "**18**", "\\boxed{18}", "(18)", "18/1" and "18 dollars" are 18, "1e3" is 1000. Before the
    number there may be signs, but no words; what follows is not read ("5%" is 5).
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
    """Return whether an answer's final number equals that of the row's own answer."""
    content = row["messages"][-1]["content"]
    wanted = content if isinstance(content, str) else "".join(part["text"] for part in content)
    return (number := final_number(text)) is not None and number == final_number(wanted)
