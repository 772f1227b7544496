"""The shape of the code: who may import whom, no circles, one loop for all stages, no torch outside conversion."""

import ast
import re
from pathlib import Path

import pytest

from jaxchat.config import STAGES

ROOT = Path(__file__).resolve().parent.parent
CODE = sorted(
    path.relative_to(ROOT).as_posix() for folder in ("jaxchat", "launch") for path in ROOT.glob(f"{folder}/**/*.py")
)

# A part imports from rows above its own, and from itself. Parts of one row don't import one another, but for ALSO.
ROWS = [
    {"config"},
    {"files"},
    {"tokenizer", "sharding", "hosts", "model", "data", "seal"},
    {"checkpoint", "store", "devices"},
    {"train", "infer"},
    {"convert"},
    {"eval", "plan", "demo", "serve"},
    {"rl"},
    {"report"},
    {"speedrun", "scaling"},
    {"launch"},
]
ALSO = {("data", "tokenizer"), ("model", "sharding"), ("store", "checkpoint")}
RANK = {part: rank for rank, row in enumerate(ROWS) for part in row}

CONVERSION_ONLY = {"torch", "transformers", "safetensors"}


def part_of(module: str) -> str | None:
    """ "model" of "jaxchat.model.gpt", "launch" of "launch.cli"; None of anything that is not ours."""
    first, *rest = module.split(".")
    if first == "launch":
        return "launch"
    return rest[0] if first == "jaxchat" and rest else None


def modules_imported(path: str, source: str) -> set[str]:
    """Full names of all that the file at `path` (from the repository's root) imports, anywhere in it."""
    package = path.removesuffix(".py").split("/")[:-1]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def wrong_imports(path: str, source: str) -> list[str]:
    modules = modules_imported(path, source)
    here = part_of(path.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    wrong = []
    if "convert" not in path:
        wrong += [f"{path} imports {module}" for module in modules if module.split(".")[0] in CONVERSION_ONLY]
    if here is None:  # jaxchat/__init__.py
        return wrong + [f"{path} imports {module}" for module in modules if part_of(module)]
    for module in modules:
        there = part_of(module)
        if there and there != here and (here, there) not in ALSO and not RANK[there] < RANK[here]:
            wrong.append(f"{path} imports {module}")
    return wrong


def asks_for_stage(path: str, source: str) -> list[str]:
    """Where the code compares something with the name of a stage, by ==, in, or match."""
    if path.startswith("launch/") or path == "jaxchat/train/stages.py":
        return []
    return [
        f"{path}:{node.lineno} asks which stage it is in: {ast.unparse(node)}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Compare | ast.MatchValue)
        and any(isinstance(part, ast.Constant) and part.value in STAGES for part in ast.walk(node))
    ]


@pytest.mark.parametrize("path", CODE)
def test_file(path):
    source = (ROOT / path).read_text()
    assert part_of(path.removesuffix(".py").replace("/", ".")) in {*RANK, "__init__"}, "give the new part a row in ROWS"
    assert wrong_imports(path, source) == []
    assert asks_for_stage(path, source) == []
    assert long_functions(path, source) == []
    assert [line for line in source.splitlines() if len(line) > 110] == []


def circles(sources: dict[str, str]) -> list[str]:
    """Circles of imports between files, as "a → b → a", each once. sources: {path: source}."""
    module_of = {path: path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in sources}
    modules = set(module_of.values())
    imports = {
        module_of[path]: {
            name if name in modules else name.rpartition(".")[0] for name in modules_imported(path, source)
        }
        for path, source in sources.items()
    }
    found, done = [], set()

    def visit(module: str, path: list[str]):
        if module in path:
            found.append(" → ".join([*path[path.index(module) :], module]))
        elif module not in done:
            for name in sorted(imports[module] & modules - {module}):
                visit(name, [*path, module])
            done.add(module)

    for module in sorted(modules):
        visit(module, [])
    return found


def test_the_readme_shows_the_order_of_imports():
    text = (ROOT / "README.md").read_text()
    shown = text[text.index("    config →") : text.index("→ launch\n") + len("→ launch")]
    assert [set(re.findall(r"\w+", row)) for row in shown.split("→")] == ROWS


def test_no_files_import_each_other():
    assert circles({path: (ROOT / path).read_text() for path in CODE}) == []


def test_a_circle_is_found():
    sources = {
        "jaxchat/model/gpt.py": "def f():\n    from jaxchat.model import kernels",
        "jaxchat/model/kernels.py": "from jaxchat.model.cache import KVCache",
        "jaxchat/model/cache.py": "import jaxchat.model.gpt",
        "jaxchat/config.py": "import jaxchat.model.gpt",
    }
    around = ["jaxchat.model.cache", "jaxchat.model.gpt", "jaxchat.model.kernels", "jaxchat.model.cache"]
    assert circles(sources) == [" → ".join(["jaxchat.model.gpt", *around[2:], "jaxchat.model.gpt"])]


def long_functions(path: str, source: str) -> list[str]:
    """Functions that don't fit on a screen of 60 lines."""
    return [
        f"{path}:{node.name} {node.end_lineno - node.lineno + 1}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 60
    ]


@pytest.mark.parametrize(
    "path, source",
    [
        ("jaxchat/config.py", "import jaxchat.model.gpt"),
        ("jaxchat/model/gpt.py", "from jaxchat.data import packing"),
        ("jaxchat/model/gpt.py", "def f():\n    from ..tokenizer import Tokenizer"),
        ("jaxchat/model/gpt.py", "from .. import tokenizer"),
        ("jaxchat/tokenizer.py", "from jaxchat import data"),
        ("jaxchat/train/loop.py", "import jaxchat.eval.bpb"),
        ("jaxchat/infer/engine.py", "from jaxchat.train.state import State"),
        ("jaxchat/eval/core.py", "from launch import cli"),
        ("jaxchat/__init__.py", "from jaxchat.config import UserError"),
        ("jaxchat/model/gpt.py", "import torch.nn"),
        ("launch/demo.py", "from safetensors.numpy import save_file"),
    ],
)
def test_a_wrong_import_is_found(path, source):
    assert len(wrong_imports(path, source)) == 1


@pytest.mark.parametrize(
    "path, source",
    [
        ("jaxchat/data/pipelines.py", "from jaxchat.tokenizer import Tokenizer"),
        ("jaxchat/data/tasks/gsm8k.py", "from ..sources import find_shards"),
        ("jaxchat/train/loop.py", "from jaxchat import checkpoint, config\nfrom . import step"),
        ("launch/base_train.py", "import jaxchat.train.loop\nfrom launch import cli"),
        ("launch/convert.py", "import torch"),
        ("jaxchat/convert/weights.py", "import safetensors"),
    ],
)
def test_a_right_import_passes(path, source):
    assert wrong_imports(path, source) == []


@pytest.mark.parametrize(
    "source",
    [
        "if stage.name == 'mid': pass",
        "save = 'base' != name",
        "if name in ('base', 'mid'): pass",
        "match name:\n    case 'sft': pass",
    ],
)
def test_a_question_about_the_stage_is_found(source):
    assert len(asks_for_stage("jaxchat/train/loop.py", source)) == 1
    assert asks_for_stage("jaxchat/train/stages.py", source) == []


def without_encoding(source: str) -> list[str]:
    """Calls that read or write text in whatever encoding the user's terminal has."""
    found = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        method = isinstance(call.func, ast.Attribute) and call.func.attr in ("read_text", "write_text")
        if (
            method
            and ast.unparse(call.func.value) != "files"
            and "encoding" not in {word.arg for word in call.keywords}
        ):
            found.append(ast.unparse(call))
    return found


def test_text_is_utf8_whatever_the_terminal():
    assert without_encoding("path.read_text(), path.write_text('é'), files.write_text(path, 'é')") == [
        "path.read_text()",
        "path.write_text('é')",
    ]
    assert {
        path: calls for path in CODE if (calls := without_encoding((ROOT / path).read_text(encoding="utf-8")))
    } == {}
