"""Write the report of a run as markdown and as one HTML file: python -m launch.report --model_tag=d12"""

import dataclasses

from jaxchat.config import STAGES, Flags, base_dir, flag
from launch import cli


@dataclasses.dataclass(frozen=True)
class Config(Flags):
    """Report on a model: results of its stages side by side, curves, samples, and where and how each was
    trained. Missing stages are named and left out.

    For several tags (d12,d20) it writes a page that compares these runs. Every evaluation's JSON file beside
    the checkpoints is included. Nothing is trained or evaluated; only samples are generated.
    """

    model_tag: str = ""
    """Tag of the model; several, separated by commas: a page that compares them; empty: the deepest d<N>, or
    else the newest."""
    price_per_hour: float = flag(0.0, 0)
    """Price of the machine per hour, in any currency; 0: no cost in the report."""
    samples: bool = True
    """Generate samples: each checkpoint continues a few texts or answers a few questions."""


def run(config: Config, texts=(), questions=()):
    """Write the report. texts, questions: take these for the samples instead of the usual ones."""
    if "," in config.model_tag:
        return compare(config, [tag.strip() for tag in config.model_tag.split(",") if tag.strip()])
    from jaxchat import files
    from jaxchat.eval.samples import PROMPTS, QUESTIONS
    from jaxchat.report.document import markdown, save
    from jaxchat.report.gather import gather
    from jaxchat.report.plots import curves
    from jaxchat.report.samples import sample

    texts, questions = texts or PROMPTS, questions or QUESTIONS
    found = gather(config.model_tag)
    folder = base_dir() / "report" / found.tag
    cli.print_plan(
        f"Report of {found.tag}",
        [
            *((STAGES[name].label, f"{stage.folder}/{stage.step}") for name, stage in found.stages.items()),
            *((title, "no checkpoint, left out") for title in found.lacking),
            ("samples", f"{len(texts)} texts, {len(questions)} questions" if config.samples else "none"),
            ("saves", str(folder)),
        ],
    )
    files.check_writable(folder)
    samples = sample(found, texts, questions) if config.samples else None
    images = curves(found)
    text = markdown(found, images, samples, config.price_per_hour)
    save(folder, f"{found.tag}: a run of jaxchat", text, images)


def compare(config: Config, tags: list[str]):
    """Write a page on several runs side by side."""
    from jaxchat import files
    from jaxchat.eval.samples import PROMPTS, QUESTIONS
    from jaxchat.report import compare
    from jaxchat.report.document import save
    from jaxchat.report.gather import gather
    from jaxchat.report.samples import sample

    runs = [gather(tag) for tag in dict.fromkeys(tags)]
    folder = base_dir() / "report" / "+".join(run.tag for run in runs)
    cli.print_plan(
        f"Comparison of {', '.join(run.tag for run in runs)}",
        [
            *((run.tag, ", ".join(STAGES[name].label for name in run.stages)) for run in runs),
            ("samples", f"{len(PROMPTS)} texts, {len(QUESTIONS)} questions" if config.samples else "none"),
            ("saves", str(folder)),
        ],
    )
    files.check_writable(folder)
    samples = {run.tag: sample(run, PROMPTS, QUESTIONS) for run in runs if config.samples}
    images = compare.curves(runs)
    text = compare.markdown(runs, images, samples, config.price_per_hour)
    save(folder, f"{', '.join(run.tag for run in runs)}: runs of jaxchat", text, images)


def main(args: list[str] | None = None):
    cli.main(Config, run, args)


if __name__ == "__main__":
    main()
