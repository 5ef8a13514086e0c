"""Results -> one page of plots, as PNG and SVG."""

from __future__ import annotations

import math
from pathlib import Path

from tests.benchmarks.miniature.measuring import METRICS
from tests.benchmarks.miniature.methods import SWEEP
from tests.benchmarks.miniature.results import TEACHER, Results

COLUMNS = 3
INK, TEACHERS = "#2a6f97", "#8a8f98"


def write_plots(results: Results, folder: Path) -> None:
    """Write plots.png and plots.svg: a panel a metric, permanence against motion, and the sweep of SFT's steps."""
    from matplotlib.figure import Figure

    shown = list(results.metrics)
    sweep = {steps: method for steps, method in SWEEP.items() if method in results.values}
    panels = len(shown) + 1 + bool(sweep)
    height = 0.9 + 0.24 * (len(results.values) + 1)
    rows = math.ceil(panels / COLUMNS)
    figure = Figure(figsize=(4.6 * COLUMNS, max(2.4, height) * rows), layout="constrained")
    grid = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    for name, axes in zip(shown, grid, strict=False):
        _metric(axes, results, name)
    _scatter(grid[len(shown)], results)
    if sweep:
        _sweep(grid[len(shown) + 1], results, sweep)
    for axes in grid[panels:]:
        axes.set_axis_off()
    header = results.header
    figure.suptitle(f"{header['world']}, {header['split']} prompts: means over seeds and 95 % intervals")
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # it is laid out, and need not be for every file
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"plots.{suffix}", dpi=110, bbox_inches="tight")


def _metric(axes, results: Results, name: str) -> None:
    """Methods from top to bottom; the line is the teacher's value."""
    means = {method: values[name] for method, values in results.means.items() if name in values and method != TEACHER}
    for place, mean in enumerate(means.values()):
        axes.errorbar(mean.mean, place, xerr=mean.half, fmt="o", color=INK, capsize=3)
    if name in results.teacher:
        axes.axvline(results.teacher[name], color=TEACHERS, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(means)), list(means), fontsize=8)
    axes.invert_yaxis()
    better = {"higher": "more is better", "lower": "less is better", "teacher": "the teacher's is best"}
    axes.set_title(f"{METRICS[name].title} ({better[METRICS[name].better]})", fontsize=9)


def _scatter(axes, results: Results) -> None:
    for method, means in results.means.items():
        across, up = means["dyn"], means["perm"]
        colour = TEACHERS if method == TEACHER else INK
        axes.errorbar(across.mean, up.mean, xerr=across.half, yerr=up.half, fmt="o", color=colour, capsize=2)
        axes.annotate(method, (across.mean, up.mean), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.set_xlabel(METRICS["dyn"].title, fontsize=8)
    axes.set_title(f"{METRICS['perm'].title} against motion", fontsize=9)


def _sweep(axes, results: Results, sweep: dict[int, str]) -> None:
    for name, marker in (("phys", "o"), ("perm", "s")):
        means = [results.means[method][name] for method in sweep.values()]
        halves = [mean.half or 0.0 for mean in means]
        axes.errorbar(
            list(sweep), [mean.mean for mean in means], yerr=halves, marker=marker, capsize=3, label=METRICS[name].title
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(sweep), [str(steps) for steps in sweep])
    axes.set_xlabel("denoising steps of a chunk", fontsize=8)
    axes.set_title("the same SFT students, drawn in more steps", fontsize=9)
    axes.legend(fontsize=7)
