"""The words of docstrings, help texts, messages and pages: plain English, and help texts that can be read alone."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CODE = sorted([*ROOT.glob("jaxchat/**/*.py"), *ROOT.glob("launch/**/*.py")])
DATA = sorted([*ROOT.glob("jaxchat/**/*.txt"), *ROOT.glob("jaxchat/**/*.toml")])
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
AVOIDED = re.compile(r"\b(told|tells|mend|mends)\b|so many|gone on with", re.IGNORECASE)
FRAGMENT = re.compile(r"(Of|On|And|But|So|In|At|To|Not|With) ")  # a help text that leans on the one before it


def test_words_that_readers_stumble_over():
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in [*CODE, *DATA, *PAGES]
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if AVOIDED.search(line)
    ]
    assert len(found) <= 10, "\n".join(found)


def help_texts(source: str) -> list[str]:
    """The docstring after each annotated field of each class."""
    return [
        text.value.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef)
        for field, text in zip(node.body, node.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    ]


def test_help_texts_can_be_read_alone():
    found = {path.relative_to(ROOT).as_posix(): help_texts(path.read_text()) for path in CODE}
    assert sum(map(len, found.values())) > 100
    leaning = [f"{path}: {text}" for path, texts in found.items() for text in texts if FRAGMENT.match(text)]
    assert leaning == []
