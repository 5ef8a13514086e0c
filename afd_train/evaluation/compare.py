"""Rows (one a video and metric) -> means with intervals, and paired comparisons of two policies.

A row's NaN is a failure and counts as the worst clip seen (stats.py).  Two policies are compared over the prompts that
both have.  Knows nothing of videos, students or HTML.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from afd_data.files import atomic_write
from afd_train.evaluation import stats
from afd_train.evaluation.metric import Metric

# (a, b): the report says what a gains over b, delta = a - b.
PAIRS = (("ema", "base"), ("student", "base"), ("teacher", "ema"), ("teacher", "base"))


@dataclass(frozen=True)
class Row:
    """One number of one video.  `step` is the training step of the policy; -1 for the teacher."""

    policy: str
    prompt_id: str
    prompt: str
    take: int
    metric: str
    value: float
    step: int


@dataclass(frozen=True)
class Cell:
    """One policy on one metric: mean over `n` prompts (`clips` videos) and its interval; None where none is defined."""

    metric: str
    policy: str
    mean: float
    lo: float | None
    hi: float | None
    n: int
    clips: int
    failed: int  # clips that could not be measured, counted as the worst


@dataclass(frozen=True)
class Comparison:
    """Policy a against b, paired by prompt: delta = a - b with its 95 % interval and sign-flip p."""

    metric: str
    better: str
    a: str
    b: str
    n: int
    mean_a: float
    mean_b: float
    delta: float
    lo: float | None
    hi: float | None
    p: float
    sd: float | None = None  # of the difference, over prompts
    p_holm: float = 1.0  # adjusted over all metrics of the same pair
    primary: bool = False


@dataclass(frozen=True)
class Summary:
    """Everything that the tables of a report hold."""

    cells: list[Cell]
    comparisons: list[Comparison]
    skipped: dict[str, str]  # metric -> why it is not shown


def summarise(rows: Iterable[Row], metrics: Mapping[str, Metric], resamples: int, seed: int) -> Summary:
    """Cells of every policy and comparisons of `PAIRS`, in the table's order; Holm is not yet applied."""
    values: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        values[row.metric][row.policy].append(row)
    summary = Summary([], [], {})
    for name, metric in metrics.items():
        policies = values[name]
        seen = np.array([row.value for group in policies.values() for row in group])
        if not np.isfinite(seen).any():
            summary.skipped[name] = "no video could be measured" if seen.size else "does not apply to this teacher"
            continue
        units = {policy: prompt_means(group, metric, seen) for policy, group in policies.items()}
        for policy, group in policies.items():
            summary.cells.append(cell_of(name, metric, policy, group, units[policy], resamples, seed))
        for a, b in PAIRS:
            if a in units and b in units and units[a].keys() & units[b].keys():
                summary.comparisons.append(paired(name, metric, a, b, units, resamples, seed))
    return summary


def with_holm(comparisons: Sequence[Comparison], primary: str) -> list[Comparison]:
    """The same comparisons with `p_holm` (Holm over the metrics of each pair) and the primary metric marked."""
    done = list(comparisons)
    for pair in dict.fromkeys((found.a, found.b) for found in done):
        of_pair = [index for index, found in enumerate(done) if (found.a, found.b) == pair]
        for index, p_holm in zip(of_pair, stats.holm([done[index].p for index in of_pair]), strict=True):
            done[index] = replace(done[index], p_holm=p_holm, primary=done[index].metric == primary)
    return done


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """metrics.parquet: the rows as they are, NaN where a clip failed."""
    import pyarrow as pa
    from pyarrow import parquet

    kinds = {"str": pa.string(), "int": pa.int64(), "float": pa.float64()}
    schema = pa.schema([(name, kinds[str(field.type)]) for name, field in Row.__dataclass_fields__.items()])
    with atomic_write(path) as file:
        parquet.write_table(pa.Table.from_pylist([asdict(row) for row in rows], schema), file)


def read_rows(path: Path) -> list[Row]:
    """What `write_rows` has written.  Raises OSError, and pyarrow's ArrowException for a file of another form."""
    from pyarrow import parquet

    return [Row(**row) for row in parquet.read_table(path, columns=[*Row.__dataclass_fields__]).to_pylist()]


def prompt_means(group: Sequence[Row], metric: Metric, seen: np.ndarray) -> dict[str, float]:
    """Prompt -> mean of one policy's values of a metric, failures as the worst of `seen`."""
    values = stats.failures_as_worst(np.array([row.value for row in group]), metric.better, seen)
    return stats.unit_means([row.prompt_id for row in group], values)


def cell_of(
    name: str, metric: Metric, policy: str, group: Sequence[Row], units: dict[str, float], resamples: int, seed: int
) -> Cell:
    """Mean and interval of one policy's `prompt_means` (units); its rows are counted."""
    found = stats.bootstrap_interval(np.array(list(units.values())), resamples, seed)
    lo, hi = found.lo, found.hi
    if metric.unit == "share of videos" and found.mean in (0.0, 1.0):
        # The bootstrap of "all" or "none" has no width.
        lo, hi = stats.wilson(int(found.mean) * found.n, found.n)
    failed = sum(not np.isfinite(row.value) for row in group)
    return Cell(name, policy, found.mean, _number(lo), _number(hi), found.n, len(group), failed)


def paired(
    name: str, metric: Metric, a: str, b: str, units: Mapping[str, Mapping[str, float]], resamples: int, seed: int
) -> Comparison:
    """a against b over the prompts that both have.  units: policy -> its `prompt_means`."""
    shared = sorted(units[a].keys() & units[b].keys())
    left = np.array([units[a][prompt] for prompt in shared])
    right = np.array([units[b][prompt] for prompt in shared])
    delta = stats.bootstrap_interval(left - right, resamples, seed)
    return Comparison(
        metric=name,
        better=metric.better,
        a=a,
        b=b,
        n=len(shared),
        mean_a=float(left.mean()),
        mean_b=float(right.mean()),
        delta=delta.mean,
        lo=_number(delta.lo),
        hi=_number(delta.hi),
        p=stats.sign_flip_p(left - right, resamples, seed),
        sd=_number(float((left - right).std(ddof=1)) if len(shared) > 1 else float("nan")),
    )


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return float(value) if np.isfinite(value) else None
