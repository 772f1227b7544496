"""Write the report of a run as markdown and as one HTML file: python -m launch.report --model_tag=d12"""

import dataclasses

from jaxchat.config import STAGES, Flags, base_dir, flag
from launch import cli


@dataclasses.dataclass(frozen=True)
class Config(Flags):
    """Report on a model: results of its stages side by side, curves, samples, and where and how each stage
    was trained. Missing stages are named and left out.

    For several tags (d12,d20), the report is a page that compares these runs. Results of evaluations are read
    from the JSON files beside the checkpoints. Only samples are generated; nothing is trained or evaluated.
    """

    model_tag: str = ""
    """Tag of the model, or several tags to compare, separated by commas; empty: the deepest model tagged
    d<N>, or else the newest model."""
    price_per_hour: float = flag(0.0, 0)
    """Price of the machine per hour, in any currency; 0: no cost in the report."""
    samples: bool = True
    """Generate samples: each checkpoint continues a few texts or answers a few questions."""


def run(config: Config, texts=(), questions=()):
    """Write the report.

    For its samples, base models continue `texts` and chat models answer `questions`. () stands for
    default texts or questions.
    """
    from jaxchat import files
    from jaxchat.eval.samples import PROMPTS, QUESTIONS
    from jaxchat.report import compare, document, plots
    from jaxchat.report.gather import gather
    from jaxchat.report.samples import sample

    texts, questions = texts or PROMPTS, questions or QUESTIONS
    given = dict.fromkeys(tag.strip() for tag in config.model_tag.split(",") if tag.strip())
    runs, several = [gather(tag) for tag in given or [""]], len(given) > 1
    tags = [run.tag for run in runs]
    names, folder = ", ".join(tags), base_dir() / "report" / "+".join(tags)
    if several:
        rows = [(run.tag, ", ".join(STAGES[name].label for name in run.stages)) for run in runs]
    else:
        stages, lacking = runs[0].stages, runs[0].lacking
        rows = [(STAGES[name].label, f"{stage.folder}/{stage.step}") for name, stage in stages.items()]
        rows += [(title, "no checkpoint, left out") for title in lacking]
    rows.append(("samples", f"{len(texts)} texts, {len(questions)} questions" if config.samples else "none"))
    cli.print_plan(f"{'Comparison' if several else 'Report'} of {names}", [*rows, ("saves", str(folder))])
    files.check_writable(folder)
    samples = {run.tag: sample(run, texts, questions) for run in runs if config.samples}
    images = plots.curves(runs)
    if several:
        text = compare.markdown(runs, images, samples, config.price_per_hour)
    else:
        text = document.markdown(runs[0], images, samples.get(runs[0].tag), config.price_per_hour)
    document.save(folder, f"{names}: {'runs' if several else 'a run'} of jaxchat", text, images)


main = cli.command(Config, run)

if __name__ == "__main__":
    main()
