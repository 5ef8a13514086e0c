"""Figures of a report as inline SVG: forest plot, curves over steps, quality against motion.

Pure functions of numbers.  Text stays text and takes the page's colour (`currentColor`), so that light and dark both
work; nothing in the SVG is fetched from anywhere.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence

from afd_train.evaluation.compare import Cell, Comparison

INK = "#010203"  # stands for the page's text colour until the SVG is written
COLOURS = {"teacher": "#8a8f98", "base": "#d9822b", "student": "#5b8def", "ema": "#2aa876"}
BETTER, WORSE, UNDECIDED = "#2aa876", "#d64545", "#8a8f98"

# Panels of the training figure: title, keys of metrics.jsonl.  A panel without any of its keys is left out.
PANELS = (
    (
        "discriminator: pairs told apart",
        ("discriminator/clean_accuracy", "discriminator/held_out_accuracy"),
    ),
    ("discriminator: margin", ("discriminator/clean_margin", "discriminator/held_out_margin")),
    ("advantage: spread in a group", ("advantage/spread",)),
    ("student: loss", ("student/loss",)),
    ("student: distance", ("student/old_policy_deviation", "student/reference_distance")),
    ("gradient norms", ("student/grad_norm", "discriminator/grad_norm")),
)
VALIDATION = "validation/"


def forest(comparisons: Sequence[Comparison]) -> str:
    """Deltas of one pair in standard deviations over prompts, right = better.  "" when nothing can be drawn."""
    drawn = [found for found in comparisons if found.sd and found.lo is not None and found.hi is not None]
    if not drawn:
        return ""
    figure, axes = _figure(7.2, 0.7 + 0.3 * len(drawn))
    for height, found in enumerate(reversed(drawn)):
        assert found.sd and found.lo is not None and found.hi is not None  # noqa: PT018 (narrowing, not a test)
        scale = (1 if found.better == "higher" else -1) / found.sd
        ends = sorted((found.lo * scale, found.hi * scale))
        significant = found.p_holm < 0.05
        colour = (BETTER if found.delta * scale > 0 else WORSE) if significant else UNDECIDED
        axes.plot(ends, [height, height], color=colour, linewidth=2, solid_capstyle="round")
        axes.plot([found.delta * scale], [height], "o", color=colour, markersize=8 if found.primary else 5)
    axes.axvline(0, color=INK, linewidth=0.8, alpha=0.5)
    labels = [found.metric + (" *" if found.primary else "") for found in reversed(drawn)]
    axes.set_yticks(range(len(drawn)), labels)
    axes.set_ylim(-0.6, len(drawn) - 0.4)
    axes.set_xlabel(f"worse  <   {drawn[0].a} - {drawn[0].b}, in standard deviations over prompts   >  better")
    return as_svg(figure, "forest")


def curves(steps: Sequence[Mapping[str, float]]) -> str:
    """Training curves of metrics.jsonl (one mapping a step with `step` and flat keys).  "" without any known key."""
    keys = {key for step in steps for key, value in step.items() if isinstance(value, int | float)}
    panels = [(title, [name for name in names if name in keys]) for title, names in PANELS]
    panels += [
        (f"held-out prompts: {key.removeprefix(VALIDATION)}", [key]) for key in sorted(keys) if VALIDATION in key
    ]
    panels = [(title, names) for title, names in panels if names]
    if not panels:
        return ""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, grid = open_grid(rows, columns, 9.6, 2.1 * rows)
    for axes, (title, names) in zip(grid, panels, strict=False):
        for name, colour in zip(names, ("#5b8def", "#d9822b"), strict=False):
            points = [(step["step"], step[name]) for step in steps if isinstance(step.get(name), int | float)]
            marker = "." if len(points) < 40 else ""
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.2, marker=marker, label=name.split("/")[-1])
        axes.set_title(title, fontsize=9)
        if len(names) > 1:
            axes.legend(fontsize=7, frameon=False, labelcolor=INK)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    return as_svg(figure, "curves")


def scatter(cells: Sequence[Cell], across: str, up: str) -> str:
    """One point a policy with intervals: metric `across` against metric `up`.  "" when either is missing."""
    points = {(cell.metric, cell.policy): cell for cell in cells}
    policies = [name for name in COLOURS if (across, name) in points and (up, name) in points]
    if not policies:
        return ""
    figure, axes = _figure(4.6, 3.0)
    for policy in policies:
        x, y = points[across, policy], points[up, policy]
        axes.errorbar(x.mean, y.mean, xerr=_arms(x), yerr=_arms(y), fmt="o", color=COLOURS[policy], capsize=2)
        axes.annotate(policy, (x.mean, y.mean), xytext=(6, 5), textcoords="offset points", color=INK, fontsize=9)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.margins(0.15)
    return as_svg(figure, "scatter")


def _arms(cell: Cell) -> list[list[float]] | None:
    if cell.lo is None or cell.hi is None:
        return None
    # BCa intervals of very skewed values need not contain the mean.
    return [[max(0.0, cell.mean - cell.lo)], [max(0.0, cell.hi - cell.mean)]]


def _figure(width: float, height: float):
    figure, grid = open_grid(1, 1, width, height)
    return figure, grid[0]


def open_grid(rows: int, columns: int, width: float, height: float):
    """A figure in inches, and its axes row by row.  Never touches pyplot's global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid:
        axes.patch.set_alpha(0)
        axes.tick_params(colors=INK, labelsize=8)
        axes.xaxis.label.set(color=INK, fontsize=9)
        axes.yaxis.label.set(color=INK, fontsize=9)
        axes.title.set_color(INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(INK)
        axes.grid(color=INK, alpha=0.1, linewidth=0.6)
    return figure, grid


def as_svg(figure, name: str) -> str:
    """The <svg> element alone, with ids of its own, colours of the page and no addresses."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"afd-{name}"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"(clip-path=\"url\(#|id=\"|href=\"#)", rf"\g<1>{name}-", text)
    text = re.sub(r"font: ([0-9.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", text)
    return text.replace(INK, "currentColor")
