"""Format a page that compares several runs: results, training, curves and samples."""

from jaxchat.config import STAGES
from jaxchat.model.flops import flops_per_token, num_params
from jaxchat.report.document import curves_text, escape, fence, results_table, table, training_rows
from jaxchat.report.gather import Run, StageRun
from jaxchat.report.plots import Images
from jaxchat.report.samples import Samples


def markdown(runs: list[Run], images: Images, samples: dict[str, Samples], price_per_hour: float = 0) -> str:
    """Format a comparison of runs as markdown, with links to `images` by file name.

    samples: {model tag: Samples}. price_per_hour: price of the machine. 0 leaves out the costs.
    """
    tags = [run.tag for run in runs]
    parts = [f"# {escape(', '.join(tags))}: runs of jaxchat side by side", models(runs)]
    for name, info in STAGES.items():
        having = [run for run in runs if name in run.stages]
        if having:
            stages = [run.stages[name] for run in having]
            columns = [run.tag for run in having]
            rows = [row[:-1] for row in training_rows(stages, price_per_hour)] + different_flags(stages)
            parts += [f"## {info.label}", results_table(columns, stages), table(["", *columns], rows)]
        if having and len(having) < len(runs):
            parts.append(f"Without a checkpoint: {', '.join(run.tag for run in runs if run not in having)}.")
    parts += [*curves_text(images), *samples_text(samples)]
    return "\n\n".join(part for part in parts if part) + "\n"


def models(runs: list[Run]) -> str:
    configs = [run.model for run in runs]
    rows = [
        ["parameters", *(f"{num_params(model):,}" for model in configs)],
        ["layers × width", *(f"{model.n_layer} × {model.n_embd}" for model in configs)],
        ["vocabulary", *(f"{model.vocab_size:,}" for model in configs)],
        ["tokens of context", *(f"{model.sequence_len:,}" for model in configs)],
        ["FLOPs a token", *(f"{flops_per_token(model):,}" for model in configs)],
    ]
    return table(["", *(run.tag for run in runs)], rows)


def different_flags(stages: list[StageRun]) -> list[list[str]]:
    """Return a row [flag, value per stage…] for each flag that differs. "–" is a default or unknown value."""
    flags = [stage.runs[-1].get("flags", {}) if stage.runs else {} for stage in stages]
    names = sorted({name for given in flags for name in given} - {"model_tag", "resume", "overwrite"})
    rows = [[f"--{name}", *(str(given.get(name, "–")) for given in flags)] for name in names]
    return [row for row in rows if len(set(row[1:])) > 1]


def samples_text(samples: dict[str, Samples]) -> list[str]:
    """Format the samples of all runs as markdown blocks: a heading, then one block per text or question."""
    said: dict[str, list[tuple[str, str]]] = {}
    for tag, of in samples.items():
        for text, continuation in of.continued:
            said.setdefault(f"{text} …", []).append((tag, continuation.strip()))
        for question, answers in of.answered:
            said.setdefault(f"user: {question}", []).extend(
                (f"{tag}, {STAGES[stage].label}", answer) for stage, answer in answers.items()
            )
    if not said:
        return []
    blocks = []
    for beginning, lines in said.items():
        width = max(len(who) for who, _ in lines) + 1
        blocks.append(fence("\n".join([beginning, *(f"{who + ':':<{width}} {text}" for who, text in lines)])))
    return ["## Samples", *blocks]
