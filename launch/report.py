"""Write the report of a run as markdown and as one HTML file: python -m launch.report --model_tag=d12"""

import dataclasses

from jaxchat.config import STAGES, Flags, base_dir, flag
from launch import cli


@dataclasses.dataclass(frozen=True)
class Config(Flags):
    """Report on a model: results of its stages side by side, curves, samples, and where and how each was
    trained. Missing stages are named and left out.

    Every evaluation's JSON file beside the checkpoints is included. Nothing is trained or evaluated; only
    samples are generated.
    """

    model_tag: str = ""
    """Tag of the model; empty: the deepest d<N>, or else the newest."""
    price_per_hour: float = flag(0.0, 0)
    """Price of the machine per hour, in any currency; 0: no cost in the report."""
    samples: bool = True
    """Generate samples: each checkpoint continues a few texts or answers a few questions."""


def run(config: Config, texts=(), questions=()):
    """Write the report. texts, questions: what to continue and to answer instead of the usual samples."""
    from jaxchat import files
    from jaxchat.eval.samples import PROMPTS, QUESTIONS
    from jaxchat.report.document import as_html, markdown
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
    samples = sample(found, texts, questions) if config.samples else None
    images = curves(found)
    text = markdown(found, images, samples, config.price_per_hour)
    folder.mkdir(parents=True, exist_ok=True)
    for name, (_, png) in images.items():
        (folder / name).write_bytes(png)
    files.write_text(folder / "report.md", text)
    files.write_text(folder / "report.html", as_html(f"{found.tag}: a run of jaxchat", text, images))
    print(f"written: {folder / 'report.md'}, and {folder / 'report.html'} to open in a browser", flush=True)


def main(args: list[str] | None = None):
    cli.main(Config, run, args)


if __name__ == "__main__":
    main()
