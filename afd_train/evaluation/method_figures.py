"""Figures of a comparison of methods as inline SVG: differences to the baseline, validation over steps.

Pure functions of numbers, drawn as `figures` draws: text stays text, colours are the page's, nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from afd_train.evaluation.compare import Comparison
from afd_train.evaluation.figures import BETTER, INK, UNDECIDED, VALIDATION, WORSE, as_svg, open_grid

COLOURS = ("#5b8def", "#2aa876", "#d9822b", "#b05bd6", "#d64545", "#3fb6c6", "#a08b2f", "#8a8f98")
COLUMNS = 3

Log = Sequence[Mapping[str, float]]


def forest(comparisons: Sequence[Comparison], methods: Sequence[str]) -> str:
    """A panel a metric in its own unit, a line a method: difference to the baseline with its interval.

    Green is better and red worse where Holm's p is below 0.05.  Metrics in which no method differs at all are left out;
    "" when nothing is left.
    """
    drawn = [found for found in comparisons if found.lo is not None and found.hi is not None]
    metrics = [*dict.fromkeys(found.metric for found in drawn if (found.lo, found.hi) != (0, 0))]
    if not metrics:
        return ""
    rows = -(-len(metrics) // COLUMNS)
    figure, grid = open_grid(rows, min(COLUMNS, len(metrics)), 9.6, rows * (0.75 + 0.2 * len(methods)))
    heights = {method: -index for index, method in enumerate(methods)}
    for axes, metric in zip(grid, metrics, strict=False):
        own = [found for found in drawn if found.metric == metric]
        for found in own:
            _difference(axes, found, heights[found.a])
        axes.axvline(0, color=INK, linewidth=0.8, alpha=0.5)
        axes.set_yticks([*heights.values()], [_text(method) for method in heights])
        axes.set_ylim(0.6 - len(methods), 0.6)
        axes.locator_params(axis="x", nbins=4)
        way = "right" if own[0].better == "higher" else "left"
        axes.set_title(f"{metric}{' *' if own[0].primary else ''}  ({way} is better)", fontsize=8)
    _hide(grid[len(metrics) :])
    return as_svg(figure, "methods-forest")


def bands(logs: Mapping[str, Sequence[Log]]) -> str:
    """Metrics of validation over steps: a method's mean over its seeds, its lowest and highest seed as a band.

    logs: method -> one log (lines of metrics.jsonl) a seed.  "" without any validation.
    """
    curves = {method: found for method, steps in logs.items() if (found := _curves(steps))}
    keys = sorted({key for found in curves.values() for key in found})
    if not keys:
        return ""
    rows = -(-len(keys) // COLUMNS)
    figure, grid = open_grid(rows, min(COLUMNS, len(keys)), 9.6, 2.1 * rows)
    colours = dict(zip(logs, COLOURS * (1 + len(logs) // len(COLOURS)), strict=False))
    for axes, key in zip(grid, keys, strict=False):
        for method, found in curves.items():
            if key in found:
                steps, values = found[key]
                axes.plot(steps, values.mean(axis=0), ".-", color=colours[method], linewidth=1.2, label=_text(method))
                axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colours[method], alpha=0.2)
        axes.set_title(f"held-out prompts: {key.removeprefix(VALIDATION)}", fontsize=9)
    grid[0].legend(fontsize=7, frameon=False, labelcolor=INK)
    _hide(grid[len(keys) :])
    return as_svg(figure, "methods-curves")


def _difference(axes, found: Comparison, height: int) -> None:
    colour = UNDECIDED
    if found.p_holm < 0.05:
        colour = BETTER if (found.delta > 0) == (found.better == "higher") else WORSE
    axes.plot([found.lo, found.hi], [height, height], color=colour, linewidth=2, solid_capstyle="round")
    axes.plot([found.delta], [height], "o", color=colour, markersize=6 if found.primary else 4)


def _curves(logs: Sequence[Log]) -> dict[str, tuple[list[float], np.ndarray]]:
    """Key -> steps that every seed has, values [seeds, steps]."""
    keys = {key for log in logs for line in log for key in line if key.startswith(VALIDATION)}
    curves = {}
    for key in keys:
        seeds = [{line["step"]: line[key] for line in log if isinstance(line.get(key), int | float)} for log in logs]
        steps = sorted(set.intersection(*map(set, seeds)))
        if steps:
            curves[key] = steps, np.array([[seed[step] for step in steps] for seed in seeds], float)
    return curves


def _text(name: str) -> str:
    """A folder's name as it stands: matplotlib reads what is between two dollars as a formula."""
    return name.replace("$", r"\$")


def _hide(grid: Sequence) -> None:
    for axes in grid:
        axes.set_visible(False)
