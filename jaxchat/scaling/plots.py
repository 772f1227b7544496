"""Plots of a scaling series: isoFLOP curves and minima, best N and D, loss and CORE as functions of FLOPs."""

from collections import Counter

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from jaxchat.report.plots import Images, png_of
from jaxchat.scaling.fits import IsoFlop, Point, by_budget


def plots(points: list[Point], iso: IsoFlop | None) -> Images:
    """Draw the plots for which there are enough points. Return {file name: (title, PNG)}."""
    images = {}
    if by_budget(points):
        images["isoflop.png"] = "Loss of models of equal compute", draw(iso_flop_curves, points, iso)
    if iso:
        images["optimal.png"] = "Best model and data for a compute budget", draw(optimal, iso)
    images["loss.png"] = "Validation bits per byte against compute", draw(against_compute, points, "loss")
    if sum(point.core is not None for point in points) > 1:
        images["core.png"] = "CORE against compute", draw(against_compute, points, "core")
    return images


def draw(what, *about) -> bytes:
    figure = Figure(figsize=(9, 4), layout="constrained")
    what(figure, *about)
    for axis in figure.axes:
        axis.grid(alpha=0.25, which="both")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(which="both", labelsize=7)
        axis.tick_params(axis="x", which="both", labelrotation=30)
    return png_of(figure)


def iso_flop_curves(figure: Figure, points: list[Point], iso: IsoFlop | None):
    axis = figure.subplots()
    groups = by_budget(points)
    colors = dict(zip(groups, colormaps["viridis"](np.linspace(0.1, 0.85, len(groups))), strict=True))
    for budget, of in groups.items():
        n, losses = np.array([(point.parameters, point.loss) for point in of]).T
        axis.plot(n, losses, "o", color=colors[budget], markersize=5, label=f"{budget:.1e} FLOPs")
    for found in iso.minima if iso else ():
        n, color = [point.parameters for point in groups[found.budget]], colors[found.budget]
        fine = np.geomspace(min(*n, found.parameters), max(*n, found.parameters), 100)
        axis.plot(fine, np.polyval(found.parabola, np.log(fine)), "--", color=color, linewidth=1)
        axis.plot(found.parameters, found.loss, "*", color=color, markersize=13, markeredgecolor="black")
    axis.set(xscale="log", xlabel="parameters N", ylabel="validation, bits per byte")
    axis.legend(frameon=False, fontsize=8)


def optimal(figure: Figure, iso: IsoFlop):
    budgets = np.array([found.budget for found in iso.minima])
    fine = np.geomspace(budgets.min() / 2, budgets.max() * 2, 50)
    names = (("parameters", "N", iso.a), ("tokens", "D", iso.b))
    for axis, (name, letter, exponent), line in zip(figure.subplots(1, 2), names, iso.lines, strict=True):
        axis.plot(fine, np.exp(np.polyval(line, np.log(fine))), "-", color="#1f4e8c", linewidth=1.2)
        for inside, marker in ((True, "o"), (False, "x")):
            shown = [found for found in iso.minima if found.inside == inside]
            xy = [found.budget for found in shown], [getattr(found, name) for found in shown]
            axis.plot(*xy, marker, color="#c2571a", label="" if inside else "outside the trained sizes")
        axis.set(xscale="log", yscale="log", xlabel="FLOPs C", ylabel=f"best {name} {letter}")
        axis.set_title(f"{letter} ∝ C^{exponent.value:.2f}", fontsize=10)
        if not all(found.inside for found in iso.minima):
            axis.legend(frameon=False, fontsize=8)


def against_compute(figure: Figure, points: list[Point], name: str):
    axis = figure.subplots()
    shown = [point for point in points if getattr(point, name) is not None]
    flops, values, n = np.array([(point.flops, getattr(point, name), point.parameters) for point in shown]).T
    place = axis.scatter(flops, values, c=np.log10(n), cmap="viridis")
    sides = Counter()
    for point in sorted(shown, key=lambda point: getattr(point, name)):
        where, budget = (point.flops, getattr(point, name)), f"{point.flops:.1e}"
        # Names of runs of one budget alternate between right and left, because their points may be close.
        left = sides[budget] % 2 == 1
        place_of_name = {"xytext": (-6, 3), "ha": "right"} if left else {"xytext": (6, 3), "ha": "left"}
        axis.annotate(point.name, where, fontsize=7, textcoords="offset points", **place_of_name)
        sides[budget] += 1
    axis.margins(x=0.12)
    figure.colorbar(place, ax=axis, label="log10 of parameters")
    axis.set(xscale="log", xlabel="FLOPs C", ylabel="bits per byte" if name == "loss" else "CORE")
