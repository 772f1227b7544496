"""Format a scaling series as a markdown page with a table of its runs, the fits and the plots."""

import math

import numpy as np

from jaxchat.report.document import escape, number, table
from jaxchat.report.gather import read_stage
from jaxchat.report.plots import Images
from jaxchat.scaling import fits
from jaxchat.scaling.fits import Estimate, IsoFlop, Minimum, Point, Surface

OUTSIDE = "the minimum is outside the range of trained sizes: add smaller or larger depths"


def point_of(name: str, tag: str, budget: float = 0.0) -> Point | None:
    """Return the run of base model `tag` as a Point, or None if its validation bits per byte are missing.

    name: label of the point. budget: requested training FLOPs; 0: none were requested.
    """
    from jaxchat.model.flops import num_params

    run = read_stage("base", tag)
    if run is None or not math.isfinite(run.measured.get("val_bpb", math.nan)):
        return None
    measured = run.measured
    return Point(
        name, num_params(run.model), run.tokens, run.flops, measured["val_bpb"], measured.get("core"), budget
    )


def markdown(title: str, points: list[Point], images: Images, lines: list[str]) -> str:
    """Format a series as a markdown page: a table of `points`, the paragraphs `lines`, and plots.

    images: {file name: (title, PNG)} of the plots, to which the page links.
    """
    rows = [
        [
            point.name,
            f"{point.parameters:,.0f}",
            f"{point.tokens:,.0f}",
            f"{point.tokens / point.parameters:.3g}",
            f"{point.flops:.2e}",
            number(point.loss),
            number(point.core),
        ]
        for point in points
    ]
    columns = ["run", "parameters N", "tokens D", "D : N", "FLOPs C", "bits per byte", "CORE"]
    parts = [f"# {escape(title)}: a series of base models", table(columns, rows), "## Fits", *lines]
    parts += [f"## {title}\n\n![{title}]({name})" for name, (title, _) in images.items()]
    return "\n\n".join(parts) + "\n"


def said(points: list[Point], iso: IsoFlop | None, law: Surface | None) -> list[str]:
    """Describe fits in markdown paragraphs and tables. iso, law: None if not fitted."""
    parts = []
    if iso:
        rows = [minimum_row(found) for found in iso.minima]
        parts.append("The best model of each budget, by a parabola of the loss in log N:")
        parts.append(table(["budget, FLOPs", "N", "D", "D : N", "bits per byte", ""], rows))
        of = "no interval" if math.isnan(iso.a.low) else "95 % intervals"
        of += "" if all(found.inside for found in iso.minima) else "; extrapolated, so not to be trusted"
        noise = "" if math.isnan(iso.noise) else f"; the runs scatter by {iso.noise:.4f} around the parabolas"
        parts.append(f"**N ∝ C^a with a = {shown(iso.a)}, D ∝ C^b with b = {shown(iso.b)}** ({of}{noise}).")
    elif fits.by_budget(points):
        parts.append("No power law of the best models: it needs two budgets whose parabolas have a minimum.")
    if law:
        names = ("E", "A", "alpha", "B", "beta")
        listed = ", ".join(f"{name} = {shown(getattr(law, name))}" for name in names)
        parts.append(
            f"**loss = E + A/N^alpha + B/D^beta**: {listed}. From it a = {shown(law.a)}, b = {shown(law.b)}."
        )
    else:
        parts.append(
            "No fit of loss = E + A/N^alpha + B/D^beta: it needs seven runs with several ratios D : N."
        )
    if len(points) > 2:
        flops, losses = (np.array([getattr(point, name) for point in points]) for name in ("flops", "loss"))
        parts.append(f"Over all runs, loss ∝ C^{shown(fits.slope_of(flops, losses))}.")
    return parts


def minimum_row(found: Minimum) -> list[str]:
    return [
        f"{found.budget:.2e}",
        f"{found.parameters:,.0f}",
        f"{found.tokens:,.0f}",
        f"{found.tokens / found.parameters:.3g}",
        number(found.loss),
        "" if found.inside else OUTSIDE,
    ]


def shown(estimate: Estimate) -> str:
    """Format an estimate as "0.49 (0.45 to 0.53)", or as the value alone if it has no interval."""
    if math.isnan(estimate.low):
        return f"{estimate.value:.3g}"
    return f"{estimate.value:.3g} ({estimate.low:.3g} to {estimate.high:.3g})"
