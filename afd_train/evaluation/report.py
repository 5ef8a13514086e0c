"""Summary, gallery and training curves -> report.html: one file that opens by double click and fetches nothing.

The page runs no script at all and its policy forbids every address but `data:`; prompts and captions are a stranger's
text and are escaped.  This module turns numbers into words; it measures nothing.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afd_data.files import atomic_write
from afd_train.evaluation import figures, quantities
from afd_train.evaluation.compare import Cell, Comparison, Summary
from afd_train.evaluation.metric import Metric

TEMPLATE = "report.html.j2"
POLICIES = ("teacher", "base", "student", "ema")
NAMES = {"teacher": "teacher", "base": "base", "student": "student", "ema": "student (EMA)"}
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Row:
    """A gallery row: one prompt's clips side by side, and what the primary metric says of each."""

    prompt: str
    reason: str
    values: Sequence[tuple[str, str, bool]]  # (policy's name, value, failed)
    mp4: bytes


@dataclass(frozen=True)
class Report:
    """What the page shows.  `groups` orders the metrics under headings; `steps` are the lines of metrics.jsonl."""

    title: str
    header: Mapping[str, Any]
    summary: Summary
    groups: Mapping[str, Mapping[str, Metric]]
    primary: str
    gallery: Sequence[Row]
    steps: Sequence[Mapping[str, float]]


def write_report(path: Path, report: Report) -> None:
    """Write the page; it appears complete or not at all.  Raises OSError."""
    write_page(path, TEMPLATE, _context(report))


def write_page(path: Path, template: str, context: Mapping[str, Any]) -> None:
    """Fill a template of this folder, escaping everything but `Markup`.  Raises OSError."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template).render(context)
    with atomic_write(path, "w") as file:
        file.write(page)


def embedded(gallery: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows of the gallery with the address of their video, which holds the video."""
    return [{"row": row, "source": "data:video/mp4;base64," + base64.b64encode(row.mp4).decode()} for row in gallery]


def verdict(comparisons: Sequence[Comparison], primary: str, metric: Metric) -> tuple[str, str]:
    """("better" | "worse" | "undecided", one plain sentence) from the primary metric's comparison with the base.

    The primary metric was named before the evaluation ran, so its own interval decides, without Holm.
    """
    found = headline(comparisons, primary)
    if found is None:
        return "undecided", "Nothing can be said: this evaluation compares no student with its base."
    name = plain(primary)
    values = f"{name} {show(found.mean_a, metric)} against {show(found.mean_b, metric)}"
    if found.lo is None or found.hi is None:
        return "undecided", f"{'One prompt decides' if found.n < 2 else 'These prompts decide'} nothing: {values}."
    who = "adapted student (EMA)" if found.a == "ema" else "adapted student"
    interval = (
        f"{show_delta(found.delta, metric)}, 95 % interval {show_delta(found.lo, metric)} to "
        f"{show_delta(found.hi, metric)}, {found.n} prompts"
    )
    if found.lo <= 0 <= found.hi:
        return "undecided", f"The {who} cannot be told from the base: {values} ({interval})."
    tone = "better" if (found.delta > 0) == (found.better == "higher") else "worse"
    return tone, f"The {who} is {tone} than the base: {values} ({interval})."


def headline(comparisons: Sequence[Comparison], primary: str) -> Comparison | None:
    """The comparison that a report leads with: the EMA student against the base, else the student."""
    found = {
        comparison.a: comparison for comparison in comparisons if (comparison.metric, comparison.b) == (primary, "base")
    }
    return found.get("ema") or found.get("student")


def plain(metric: str) -> str:
    """`object_permanence` -> `object permanence`; `_dis` stays visible, since it says which flow was used."""
    return metric.removesuffix("_dis").replace("_", " ") + (" (DIS)" if metric.endswith("_dis") else "")


def arrow(metric: Metric) -> str:
    """Which way is better."""
    return "\u2191" if metric.better == "higher" else "\u2193"


def show(value: float | None, metric: Metric) -> str:
    """A value in its unit: shares as per cent, others with three digits."""
    if value is None:
        return "-"
    decimals = _decimals(metric)
    return _digits(value) if decimals is None else f"{100 * value:.{decimals}f} %"


def show_delta(value: float | None, metric: Metric) -> str:
    """A signed difference: percentage points where values are per cent."""
    if value is None:
        return "-"
    decimals = _decimals(metric)
    return _digits(value, "+") if decimals is None else f"{100 * value:+.{decimals}f} pts"


def show_p(p: float) -> str:
    """A p value as papers print it."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def note(cell: Cell) -> str:
    """What happened to the videos that could not be measured; "" where there are none."""
    if not cell.failed:
        return ""
    if cell.metric in quantities.METRICS:  # there they are left out
        return f"{100 * cell.failed / cell.clips:.1f} % not measurable"
    return f"{cell.failed} of {cell.clips} failed"


def _decimals(metric: Metric) -> int | None:
    """Decimals of per cent; None where the unit is not a share.  Errors of full scale are small and get one more."""
    if not metric.unit.startswith("share"):
        return None
    return 2 if metric.unit == "share of full scale" else 1


def _digits(value: float, sign: str = "") -> str:
    if abs(value) >= 1000:
        return f"{value:{sign}.0f}"
    # No exponents: what is smaller than a thousandth of a unit may as well end at the fourth decimal.
    return f"{value:{sign}.3g}" if abs(value) >= 0.001 or value == 0 else f"{value:{sign}.4f}"


def _context(report: Report) -> dict[str, Any]:
    """Everything the template prints, as strings and lists."""
    metrics = {name: metric for group in report.groups.values() for name, metric in group.items()}
    summary = report.summary
    policies = [name for name in POLICIES if any(cell.policy == name for cell in summary.cells)]
    against = "ema" if "ema" in policies else "student"
    comparisons = [found for found in summary.comparisons if (found.a, found.b) == (against, "base")]
    # SVG is made by figures.py from numbers and fixed names; it is the only text that is not escaped.
    import markupsafe

    drawn = {
        "forest": figures.forest(comparisons),
        "scatter": figures.scatter(summary.cells, "motion_mag_dis", "warp_rmse_dis"),
        "curves": figures.curves(report.steps),
    }
    tone, sentence = verdict(summary.comparisons, report.primary, metrics[report.primary])
    return {
        "title": report.title,
        "tone": tone,
        "sentence": sentence,
        "gallery": embedded(report.gallery),
        "policies": [NAMES[name] for name in policies],
        "against": NAMES[against],
        "tables": _tables(report, policies, comparisons),
        "figures": {name: markupsafe.Markup(svg) for name, svg in drawn.items()},
        "skipped": [(plain(name), reason) for name, reason in summary.skipped.items()],
        "definitions": [
            (plain(name), metric)
            for name, metric in metrics.items()
            if any(cell.metric == name for cell in summary.cells)
        ],
        "header": report.header,
    }


def _tables(report: Report, policies: Sequence[str], comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """The main table, a group of metrics at a time; metrics without any cell are left to the list of skipped ones."""
    cells = {(cell.metric, cell.policy): cell for cell in report.summary.cells}
    deltas = {found.metric: found for found in comparisons}
    tables = []
    for title, metrics in report.groups.items():
        lines = [
            {
                "name": plain(name),
                "arrow": arrow(metric),
                "primary": name == report.primary,
                "cells": [cell_text(cells.get((name, policy)), metric) for policy in policies],
                "delta": delta_text(deltas.get(name), metric),
            }
            for name, metric in metrics.items()
            if any((name, policy) in cells for policy in policies)
        ]
        if lines:
            tables.append({"title": title, "lines": lines})
    return tables


def cell_text(cell: Cell | None, metric: Metric) -> dict[str, str]:
    """mean, interval and note as the table prints them."""
    if cell is None:
        return {"mean": "-", "interval": "", "note": ""}
    interval = "" if cell.lo is None else f"{show(cell.lo, metric)} to {show(cell.hi, metric)}"
    return {"mean": show(cell.mean, metric), "interval": interval, "note": note(cell)}


def delta_text(found: Comparison | None, metric: Metric) -> dict[str, str]:
    """mean, interval, p and tone (better, worse or "") of a difference as the table prints it."""
    if found is None:
        return {"mean": "-", "interval": "", "p": "", "tone": ""}
    tone = ""
    if found.p_holm < SIGNIFICANT:
        tone = "better" if (found.delta > 0) == (found.better == "higher") else "worse"
    interval = "" if found.lo is None else f"{show_delta(found.lo, metric)} to {show_delta(found.hi, metric)}"
    return {"mean": show_delta(found.delta, metric), "interval": interval, "p": show_p(found.p_holm), "tone": tone}
