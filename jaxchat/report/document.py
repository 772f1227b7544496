"""Format the report as markdown and as one self-contained HTML file."""

import base64
import html
import math
import re
import textwrap
from pathlib import Path

from markdown_it import MarkdownIt

from jaxchat import files
from jaxchat.config import STAGES, counted
from jaxchat.files import duration
from jaxchat.model.flops import flops_per_token, num_params
from jaxchat.report.gather import LAST, Run, StageRun
from jaxchat.report.plots import Images
from jaxchat.report.samples import Samples

ANSWERS = 8  # largest number shown per problem
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2430; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; margin: 1.8em 0 .6em; } h1 { margin-top: 0; }
h2 { border-bottom: 1px solid #d5dbe3; padding-bottom: .2em; }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .9em; border-bottom: 1px solid #e3e7ed; text-align: left; overflow-wrap: anywhere; }
th { border-bottom: 2px solid #b6c0cd; white-space: nowrap; }
img { max-width: 100%; height: auto; }
pre { background: #f4f6f9; padding: .7em 1em; border-radius: 6px; white-space: pre-wrap;
  overflow-wrap: anywhere; }
code { font: 14px/1.45 ui-monospace, monospace; overflow-wrap: anywhere; }
"""


def markdown(run: Run, images: Images, samples: Samples | None, price_per_hour: float = 0) -> str:
    """Format a run's report as markdown, with links to `images` by file name.

    samples: None if not generated. price_per_hour: price of the machine. 0 leaves out the costs.
    """
    model = run.model
    shape = f"{counted(model.n_layer, 'layer')} × {model.n_embd}, {counted(model.n_head, 'head')} "
    shape += f"({model.n_kv_head} key/value)"
    parts = [
        f"# {escape(run.tag)}: a run of jaxchat",
        f"{num_params(model):,} parameters: {shape}, vocabulary {model.vocab_size:,}, {model.sequence_len:,} "
        f"tokens of context; {flops_per_token(model):,} FLOPs a token.",
    ]
    if run.lacking:
        parts.append(f"No checkpoint with this tag, so left out: {', '.join(run.lacking)}.")
    parts += [
        "## Results",
        results_table(titles(run), list(run.stages.values())),
        *tokenizer_section(run),
        "## Training",
        training(run, price_per_hour),
        *curves_text(images),
        *samples_text(samples),
    ]
    parts += [part for stage in run.stages.values() for part in answers_text(stage)]
    parts += ["## Where and how", origin(run)]
    return "\n\n".join(part for part in parts if part) + "\n"


def curves_text(images: Images) -> list[str]:
    shown = [f"### {title}\n\n![{title}]({name})" for name, (title, _) in images.items()]
    return ["## Curves", *(shown or ["No step was logged."])]


def results_table(columns: list[str], stages: list[StageRun]) -> str:
    """Format all results of the stages as a markdown table with notes below. columns: title of each stage."""
    names = dict.fromkeys(name for stage in stages for name in stage.measured)
    names = sorted(names, key=lambda name: not name.endswith(("loss", "reward", "bpb")))  # these first
    rows = [[name, *(number(stage.measured.get(name)) for stage in stages)] for name in names]
    text = table(["", *columns], rows)
    for name in ("loss", "reward"):
        if name in names:
            text += f"\n\n`{name}` is the training {name}, a mean of the last {LAST} steps."
    if any(name == "core" or name.startswith("ChatCORE") for name in names):
        text += "\n\nA task's row is its accuracy. `core` and ChatCORE are means over tasks of "
        text += "(accuracy − chance) ÷ (1 − chance): guessing is 0, all right is 1."
    for title, stage in zip(columns, stages, strict=True):
        for found in stage.sampled:
            text += f"\n\nOnly a sample of the items was measured for {escape(title)}: {found}."
        for reason in stage.left_out:
            text += f"\n\nLeft out of {escape(title)}: {escape(reason)}."
    return text


def tokenizer_section(run: Run) -> list[str]:
    """Format the bytes per token of several tokenizers as markdown blocks. Return [] if not measured."""
    if not run.compression:
        return []
    unit = "bytes_per_token"
    columns = [name for name in next(iter(run.compression.values())) if name.endswith(unit)]
    rows = [[text, *(number(found.get(name)) for name in columns)] for text, found in run.compression.items()]
    names = [name.removesuffix(f"_{unit}").replace(unit, "ours") for name in columns]
    return ["## Tokenizer", "Average number of bytes per token:", table(["", *names], rows)]


def training(run: Run, price_per_hour: float) -> str:
    stages, seconds = list(run.stages.values()), run.tokenizer_seconds
    rows = training_rows(stages, price_per_hour, num_params(run.model), seconds)
    text = table(["", *titles(run), "in all"], rows)
    if seconds:
        text += f"\n\nThe wall time in all includes {duration(seconds)} for the tokenizer."
    return text


def training_rows(
    stages: list[StageRun], price_per_hour: float, parameters: float = math.inf, extra: float = 0
) -> list:
    """Return table rows on training, such as tokens, time and cost: [name, value of each stage…, total].

    A value that is 0 or not known is "–". price_per_hour: price of the machine. 0 leaves out the cost.
    parameters: number of parameters, for the row "tokens : parameters". inf leaves out this row.
    extra: seconds to add to the total wall time, and so to the total cost.
    """

    def totalled(show, value, extra: float = 0) -> tuple[list[str], str]:
        values = [value(stage) for stage in stages]
        return [show(one) if one else "–" for one in values], show(sum(values) + extra)

    def cost(seconds: float) -> str:
        return f"{seconds / 3600 * price_per_hour:,.2f}"

    def seconds(stage: StageRun) -> float:
        return stage.wall_seconds + stage.eval_seconds

    rows = [
        ("last checkpoint", [f"step {s.step:,}" for s in stages], ""),
        ("starts from", [s.parent for s in stages], ""),
        ("tokens", *totalled("{:,}".format, lambda s: s.tokens)),
        ("tokens : parameters", *totalled("{:.2f}".format, lambda s: s.tokens / parameters)),
        ("FLOPs", *totalled("{:.2e}".format, lambda s: s.flops)),
        ("tokens/s, median", [number(s.median("tokens_per_s")) for s in stages], ""),
        ("MFU, median", [percent(s.median("mfu")) for s in stages], ""),
        ("waiting for data", [percent(s.share("data_wait_seconds")) for s in stages], ""),
        ("sampling answers", [percent(s.share("rollout_seconds")) for s in stages], ""),
        ("training", *totalled(duration, lambda s: s.wall_seconds)),
        ("evaluations", *totalled(duration, lambda s: s.eval_seconds)),
        ("wall time", *totalled(duration, seconds, extra)),
    ]
    if price_per_hour:
        rows.append((f"cost, at {price_per_hour:g} an hour", *totalled(cost, seconds, extra)))
    return [[name, *values, total] for name, values, total in rows if {*values} != {"–"}]


def samples_text(samples: Samples | None) -> list[str]:
    if samples is None:
        return ["## Samples", "Not generated: --no_samples."]
    parts = []
    if samples.continued:
        parts.append(
            "## Texts that the base model continues\n\nThe likeliest continuation of each beginning."
        )
        parts += [fence(f"{text} … {continuation.strip()}") for text, continuation in samples.continued]
    if samples.answered:
        parts.append(
            "## Conversations\n\nThe likeliest answers. Tool calls and their results are in brackets."
        )
        for question, found in samples.answered:
            width = max(map(len, [*(stage.label for stage in STAGES.values()), "user"])) + 1
            lines = [f"{'user:':<{width}} {question}"]
            lines += [f"{STAGES[name].label + ':':<{width}} {text}" for name, text in found.items()]
            parts.append(fence("\n".join(lines)))
    return parts


def answers_text(stage: StageRun) -> list[str]:
    """Format the sampled answers to RL's first and last logged problem, with rewards, as markdown blocks."""
    parts = []
    for sample in stage.answers[:1] + stage.answers[1:][-1:]:
        lines = [f"user: {sample['messages'][-2]['content']}"]
        for answer in sample["answers"][:ANSWERS]:
            lines.append(f"{answer['reward']:6.2f} {answer['advantage']:+6.2f}  {answer['text']}")
        parts.append(f"After step {sample['step'] - 1}:\n\n{fence(chr(10).join(lines))}")
    if parts:
        label = STAGES[stage.name].label
        about = "The reward, advantage and text of each answer in one group, to the same problem."
        parts.insert(0, f"## Answers that {label} learnt from\n\n{about}")
    return parts


def origin(run: Run) -> str:
    """Format the recorded machine, versions, commit, flags and plan of each stage as markdown."""
    parts, recorded = [], {STAGES[name].label: stage.runs for name, stage in run.stages.items()}
    trained = {label: runs for label, runs in recorded.items() if runs}
    facts = {"machine": "Machine", "devices": "Devices", "versions": "Versions", "git": "Code"}
    for key, title in facts.items():
        values = {}
        for label, runs in trained.items():
            values.setdefault(str(runs[-1].get(key) or "not known"), []).append(label)
        listed = [value if len(values) == 1 else f"{value} ({', '.join(of)})" for value, of in values.items()]
        if listed:
            parts.append(f"- {title}: {escape('; '.join(listed))}")
    parts = ["\n".join(parts), *(last_run(label, runs) for label, runs in trained.items())]
    if unknown := [label for label in recorded if label not in trained]:
        parts.append(
            f"Not recorded for {', '.join(unknown)}: it was imported, or killed while it was trained."
        )
    return "\n\n".join(parts).strip()


def last_run(title: str, runs: list[dict]) -> str:
    about = runs[-1]
    plan = about.get("plan") or []
    width = max((len(name) for name, _ in plan), default=0)
    lines = [f"{name:<{width}}  {value}" for name, value in plan]
    flags = " ".join(f"--{name}={value}" for name, value in about.get("flags", {}).items())
    flags = f"flags: {flags or 'none'}"
    lines.append(textwrap.fill(flags, 96, subsequent_indent=7 * " ", break_on_hyphens=False))
    when = about.get("began", "at a time not known").replace("T", " ").replace("+00:00", " UTC")
    began = f"{title}, begun {when}"
    if len(runs) > 1:
        began += f", the last of {len(runs)} times"
    if about.get("ended", "done") != "done":
        began += f", ended by {about['ended']}"
    return f"### {escape(began)}\n\n{fence(chr(10).join(lines))}"


def titles(run: Run) -> list[str]:
    return [STAGES[name].label for name in run.stages]


def number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if math.isfinite(value) and abs(value) >= 100 else f"{value:.4f}"


def percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def escape(text: str) -> str:
    """Escape text so that markdown shows it literally and on one line, even in a table cell."""
    return re.sub(
        r"([\\`*\[\]<>|~&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", " ".join(printable(text).split())
    )


def fence(text: str) -> str:
    """Put text into a fenced markdown block. The fence is longer than any fence in the text."""
    text = printable(text)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    marks = "`" * max(3, longest + 1)
    return f"{marks}text\n{text}\n{marks}"


def printable(text: str) -> str:
    return "".join(
        c if c.isprintable() or c in "\n\t\N{NO-BREAK SPACE}" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    lines += [[escape(cell) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def as_html(title: str, text: str, images: Images) -> str:
    """Render markdown as one HTML page with embedded style and images. HTML in `text` is escaped."""
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    for name, (_, png) in images.items():
        body = body.replace(f'src="{name}"', f'src="data:image/png;base64,{base64.b64encode(png).decode()}"')
    head = f'<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n<style>{STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}</body>\n</html>\n'


def save(folder: Path, title: str, text: str, images: Images):
    """Write report.md, report.html and the images to a folder, and print the paths of both reports."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (_, png) in images.items():
        (folder / name).write_bytes(png)
    files.write_text(folder / "report.md", text)
    files.write_text(folder / "report.html", as_html(title, text, images))
    print(f"written: {folder / 'report.md'}, and {folder / 'report.html'} to open in a browser", flush=True)
