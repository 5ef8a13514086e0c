"""Results -> table.md: means, budgets, paired differences, and where the numbers come from.  Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

from tests.benchmarks.miniature.budgets import TITLES
from tests.benchmarks.miniature.methods import METHODS
from tests.benchmarks.miniature.results import AGAINST, TEACHER, Results, seeds_of
from tests.benchmarks.miniature.statistics import Mean, Paired

NONE = "–"


def page(results: Results) -> str:
    """The whole file."""
    header = results.header
    parts = [
        f"# {header['world']}, {header['split']} prompts",
        "\n".join(f"* {key}: {f'`{value}`' if key == 'command' else value}" for key, value in header.items()),
        "Means over training seeds ± half of Student's 95 % interval; the base's seeds are of its videos' noise. The "
        "teacher's MMD² compares one half of its videos with the other: the floor.",
        _means(results),
        *(_differences(results, against) for against in AGAINST if against in results.values),
        "\n".join(f"* `{name}`: {METHODS[name].question}" for name in results.values),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _means(results: Results) -> str:
    head = ["method", "seeds", *(shown.title for shown in results.metrics.values()), *TITLES.values()]
    rows = []
    for method, means in results.means.items():
        count = "" if method == TEACHER else str(len(seeds_of(results.values[method])))
        cells = [_mean(means.get(name), shown.decimals) for name, shown in results.metrics.items()]
        spent = results.spent.get(method, {})
        rows.append([method, count, *cells, *(_mean(spent.get(name), 0) for name in TITLES)])
    return _table(head, rows)


def _differences(results: Results, against: str) -> str:
    """Rows are methods, cells `difference ± half (p, p after Holm)`."""
    tests = results.tests(against)
    rows = [
        [method, *(_paired(tests.get(name, {}).get(method), shown.decimals) for name, shown in results.metrics.items())]
        for method in results.values
        if method != against
    ]
    if not rows:
        return ""
    title = f"## Difference to {against}, seed by seed (paired t test: p; after Holm over methods)"
    return f"{title}\n\n{_table(['method', *(shown.title for shown in results.metrics.values())], rows)}"


def _mean(cell: Mean | None, decimals: int) -> str:
    if cell is None:
        return NONE
    return f"{cell.mean:.{decimals}f}" + ("" if cell.half is None else f" ± {cell.half:.{decimals}f}")


def _paired(cell: Paired | None, decimals: int) -> str:
    if cell is None:
        return NONE
    if cell.half is None or cell.p is None or cell.p_holm is None:
        return f"{cell.difference:+.{decimals}f}"
    return f"{cell.difference:+.{decimals}f} ± {cell.half:.{decimals}f} ({cell.p:.2g}; {cell.p_holm:.2g})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))
