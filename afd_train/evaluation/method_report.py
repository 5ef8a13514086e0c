"""A table of methods -> compare.html, compare.json and compare.md.  Turns numbers into words; measures nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from afd_data.files import atomic_write
from afd_train.evaluation import method_figures
from afd_train.evaluation.compare import Comparison
from afd_train.evaluation.methods import Table
from afd_train.evaluation.report import (
    Row,
    arrow,
    cell_text,
    delta_text,
    embedded,
    plain,
    show,
    show_delta,
    show_p,
    write_page,
)
from afd_train.evaluation.runs import Run

TEMPLATE = "compare.html.j2"
VERSION = 1


def write_report(folder: Path, table: Table, runs: Sequence[Run], gallery: Sequence[Row]) -> Path:
    """Write the three files into `folder`; returns compare.html.  Raises OSError."""
    with atomic_write(folder / "compare.json", "w") as file:
        json.dump(_record(table, runs), file, indent=1, allow_nan=False)
    with atomic_write(folder / "compare.md", "w") as file:
        file.write(markdown(table))
    write_page(folder / "compare.html", TEMPLATE, _context(table, runs, gallery))
    return folder / "compare.html"


def sentences(table: Table) -> list[tuple[str, str]]:
    """(tone, one plain sentence) of every method on the primary metric, whose own interval decides, without Holm."""
    return [
        _sentence(found, table)
        for found in table.summary.comparisons
        if found.metric == table.primary and found.lo is not None
    ]


def markdown(table: Table) -> str:
    """Two tables: means with intervals, differences to the baseline with p."""
    names = [column.name for column in table.columns]
    tested = [*dict.fromkeys(found.a for found in table.summary.comparisons)]
    lines = [f"# Methods against {_safe(table.baseline)}", "", "Means with 95 % intervals.", ""]
    lines += _markdown_table([f"{name} ({table.units[name]})" for name in names], _lines(table), "cells")
    if tested:
        lines += ["", f"Differences to {_safe(table.baseline)} with 95 % intervals; p after Holm over the metrics.", ""]
        lines += _markdown_table([f"{name} ({table.paired[name]})" for name in tested], _lines(table, tested), "deltas")
    if table.summary.skipped:
        skipped = "; ".join(f"{plain(name)} ({reason})" for name, reason in table.summary.skipped.items())
        lines += ["", f"Not measured: {skipped}."]
    return "\n".join(lines) + "\n"


def _markdown_table(heads: Sequence[str], lines: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    rows = [["metric", *map(_safe, heads)], ["---", *("---:" for _ in heads)]]
    for line in lines:
        values = [
            each["mean"]
            + (f" [{each['interval']}]" if each["interval"] else "")
            + (f", p {each['p']}" if each.get("p") else "")
            + (f" ({each['note']})" if each.get("note") else "")
            for each in line[key]
        ]
        rows.append([f"{line['name']} {line['arrow']}", *values])
    return [f"| {' | '.join(row)} |" for row in rows]


def _safe(name: str) -> str:
    """A folder's name inside a table of markdown."""
    return name.replace("|", "\\|").replace("<", "&lt;")


def _lines(table: Table, methods: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """A line a metric: a cell a column, a difference a method (of `methods`, else of every column)."""
    cells = {(cell.metric, cell.policy): cell for cell in table.summary.cells}
    deltas = {(found.metric, found.a): found for found in table.summary.comparisons}
    names = [column.name for column in table.columns]
    return [
        {
            "name": plain(name),
            "arrow": arrow(metric),
            "primary": name == table.primary,
            "cells": [cell_text(cells.get((name, column)), metric) for column in names],
            "deltas": [delta_text(deltas.get((name, method)), metric) for method in methods or names],
        }
        for name, metric in table.metrics.items()
        if any((name, column) in cells for column in names)
    ]


def _sentence(found: Comparison, table: Table) -> tuple[str, str]:
    metric = table.metrics[found.metric]
    values = f"{plain(found.metric)} {show(found.mean_a, metric)} against {show(found.mean_b, metric)}"
    interval = f"95 % interval {show_delta(found.lo, metric)} to {show_delta(found.hi, metric)}"
    evidence = f"({show_delta(found.delta, metric)}, {interval}, {table.paired[found.a]}, p {show_p(found.p)})"
    assert found.lo is not None and found.hi is not None  # noqa: PT018 (narrowing, not a test)
    if found.lo <= 0 <= found.hi:
        return "undecided", f"{found.a} cannot be told from {found.b}: {values} {evidence}."
    tone = "better" if (found.delta > 0) == (found.better == "higher") else "worse"
    return tone, f"{found.a} is {tone} than {found.b}: {values} {evidence}."


def _context(table: Table, runs: Sequence[Run], gallery: Sequence[Row]) -> dict[str, Any]:
    """Everything the template prints, as strings and lists."""
    import markupsafe

    methods = [column.name for column in table.columns if column.name not in ("teacher", "base")]
    logs = {
        column.name: [student.run.steps for student in column.students.values()]
        for column in table.columns
        if column.name in methods
    }
    # SVG is made from numbers and escaped names; it is the only text that is not escaped by the template.
    drawn = {
        "forest": method_figures.forest(table.summary.comparisons, methods),
        "curves": method_figures.bands(logs),
    }
    return {
        "baseline": table.baseline,
        "sentences": sentences(table),
        "gallery": embedded(gallery),
        "columns": [(column.name, table.units[column.name]) for column in table.columns],
        "paired": table.paired,
        "lines": _lines(table),
        "figures": {name: markupsafe.Markup(svg) for name, svg in drawn.items()},
        "skipped": [(plain(name), reason) for name, reason in table.summary.skipped.items()],
        "definitions": [(plain(name), metric) for name, metric in table.metrics.items()],
        "runs": [(run.name, run.policy, run.header) for run in runs],
    }


def _record(table: Table, runs: Sequence[Run]) -> dict[str, Any]:
    return {
        "version": VERSION,
        "baseline": table.baseline,
        "primary_metric": table.primary,
        "runs": [
            {"name": run.name, "method": run.method, "seed": run.seed, "policy": run.policy, "header": run.header}
            for run in runs
        ],
        "units": table.units,
        "paired": table.paired,
        "metrics": {name: asdict(metric) for name, metric in table.metrics.items()},
        "cells": [asdict(cell) for cell in table.summary.cells],
        "comparisons": [asdict(found) for found in table.summary.comparisons],
        "skipped": table.summary.skipped,
    }
