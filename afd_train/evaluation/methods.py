"""Evaluated runs -> a table of methods: means with intervals, and every method against the baseline.

A method with several seeds is judged over its seeds: Student's interval of the runs' means and a paired t test, a pair
being two runs of one seed.  A method with a single run is judged over prompts, as within a run: bootstrap and sign
flips.  Holm corrects each method's p values over the metrics.  A failed clip counts as the worst of all runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from afd_data.errors import UserError
from afd_train.evaluation import quantities, relative, stats
from afd_train.evaluation.compare import Cell, Comparison, Summary, cell_of, paired, prompt_means, with_holm
from afd_train.evaluation.metric import Metric
from afd_train.evaluation.runs import Run, methods_of

SEED = 0  # of bootstrap and sign flips


@dataclass(frozen=True)
class Student:
    """One policy of one run."""

    run: Run
    policy: str


@dataclass(frozen=True)
class Column:
    """What stands under one name: a student a seed; of the teacher and a shared base a single one."""

    name: str
    students: Mapping[str, Student]


Pairs = list[tuple[Student, Student]]


@dataclass(frozen=True)
class Table:
    """Cells (`policy` is the column's name) and comparisons with the baseline, Holm applied."""

    columns: Sequence[Column]
    baseline: str
    metrics: Mapping[str, Metric]
    primary: str
    summary: Summary
    units: Mapping[str, str]  # column -> what its interval is over: "3 seeds", "64 prompts"
    paired: Mapping[str, str]  # method -> what it is compared over


def compare_methods(runs: Sequence[Run], baseline: str | None, resamples: int) -> Table:
    """`baseline`: a method, or "base", the students before training; None: that, or else the first method.

    Raises UserError for a baseline that is not there or has no seed in common with a method.
    """
    columns = _columns(runs)
    chosen = _baseline(columns, baseline)
    metrics = {name: metric for name, metric in runs[0].metrics.items() if all(name in run.metrics for run in runs)}
    pairs = {
        column.name: _pairs(column, columns, chosen)
        for column in columns
        if column.name not in (chosen, "base", "teacher")
    }
    skipped = {name: "not measured in every run" for run in runs for name in run.metrics if name not in metrics}
    cells: list[Cell] = []
    comparisons: list[Comparison] = []
    for name, metric in metrics.items():
        values = _PromptValues(name, metric, runs)
        found = [cell for column in columns if (cell := _cell(values, column, resamples))]
        if missing := [column.name for column in columns if column.name not in {cell.policy for cell in found}]:
            skipped[name] = f"of {', '.join(missing)}"
        cells += found
        if name in relative.METRICS:  # its source is tested
            continue
        tested = [_comparison(values, method, chosen, each, resamples) for method, each in pairs.items()]
        comparisons += [comparison for comparison in tested if comparison]
    for method, each in pairs.items():
        comparisons += _set_distances(method, chosen, each, resamples)
    primary = runs[0].primary if runs[0].primary in metrics else next(iter(metrics))
    prompts = len({row.prompt_id for row in next(iter(runs[0].rows.values()))})
    return Table(
        columns,
        chosen,
        metrics,
        primary,
        Summary(cells, with_holm(comparisons, primary), skipped),
        {column.name: _counted(len(column.students), prompts) for column in columns},
        {method: _counted(len(each), prompts) for method, each in pairs.items()},
    )


def _counted(seeds: int, prompts: int) -> str:
    return f"{seeds} seeds" if seeds > 1 else f"{prompts} prompts"


def _columns(runs: Sequence[Run]) -> list[Column]:
    """teacher, base and the methods.  Students of one checkpoint are one base, whoever trained on from it."""
    bases: dict[str, Student] = {}
    for run in runs:
        if "base" in run.policies:
            bases.setdefault(str(run.header.get("checkpoint base", run.name)), Student(run, "base"))
    methods = {
        name: {seed: Student(run, run.policy) for seed, run in seeds.items()}
        for name, seeds in methods_of(runs).items()
    }
    teacher = {"teacher": {"": Student(runs[0], "teacher")}} if "teacher" in runs[0].policies else {}
    named = {**teacher, **({"base": bases} if bases else {}), **methods}
    return [Column(name, students) for name, students in named.items()]


def _baseline(columns: Sequence[Column], wanted: str | None) -> str:
    names = [column.name for column in columns if column.name != "teacher"]
    if wanted is None:
        return names[0]
    if wanted not in names:
        raise UserError(f"--baseline {wanted}: no such method here. There are: {', '.join(names)}.")
    return wanted


def _pairs(column: Column, columns: Sequence[Column], baseline: str) -> Pairs:
    """(student, what it is compared with): the base of its own run, or the baseline's run of the same seed."""
    if baseline == "base":
        found = [(student, Student(student.run, "base")) for student in column.students.values()]
        if without := [base.run.folder for _, base in found if "base" not in base.run.policies]:
            raise UserError(f"{without[0]}: its base was not measured. Choose a method as --baseline.")
        return found
    others = next(each.students for each in columns if each.name == baseline)
    if len(column.students) == len(others) == 1:
        return [(next(iter(column.students.values())), next(iter(others.values())))]
    shared = [seed for seed in column.students if seed in others]
    if not shared:
        raise UserError(
            f"--baseline {baseline}: has no seed in common with {column.name}. Seeds are paired by the number at the "
            "end of the folders' names."
        )
    return [(column.students[seed], others[seed]) for seed in shared]


class _PromptValues:
    """One metric of all runs: a mean for every prompt of a student, or only a cell where sets are compared."""

    def __init__(self, name: str, metric: Metric, runs: Sequence[Run]):
        self.name, self.metric = name, metric
        rows = [row for run in runs for (of, _), group in run.rows.items() if of == name for row in group]
        self._seen = np.array([row.value for row in rows])

    def of(self, student: Student) -> dict[str, float] | None:
        """Prompt -> mean; None for a distance between sets, or where nothing was measured."""
        rows = student.run.rows.get((self.name, student.policy))
        if rows is None or not np.isfinite(self._seen).any():
            return None
        return prompt_means(rows, self.metric, self._seen)

    def mean(self, student: Student) -> float | None:
        """The run's one number."""
        means = self.of(student)
        if means is not None:
            return float(np.mean([*means.values()]))
        cell = student.run.cells.get((self.name, student.policy))
        return None if cell is None else cell.mean


def _cell(values: _PromptValues, column: Column, resamples: int) -> Cell | None:
    """Over seeds where there are several, else over prompts; None unless every seed has a value."""
    students = [*column.students.values()]
    means = [mean for student in students if (mean := values.mean(student)) is not None]
    if len(means) < len(students):
        return None
    own = [student.run.cells.get((values.name, student.policy)) for student in students]
    if len(students) > 1:
        found = stats.t_interval(np.array(means))
        clips, failed = (sum(getattr(cell, count) for cell in own if cell) for count in ("clips", "failed"))
        return Cell(values.name, column.name, found.mean, found.lo, found.hi, found.n, clips, failed)
    prompts = values.of(students[0])
    if prompts is None:
        return own[0] and replace(own[0], policy=column.name)
    rows = students[0].run.rows[values.name, students[0].policy]
    return cell_of(values.name, values.metric, column.name, rows, prompts, resamples, SEED)


def _comparison(values: _PromptValues, method: str, baseline: str, pairs: Pairs, resamples: int) -> Comparison | None:
    """None where a side has no value, or a distance between sets cannot be resampled from what a run keeps."""
    if len(pairs) == 1:
        return _over_prompts(values, method, baseline, pairs[0], resamples)
    sides = [[values.mean(student) for student in side] for side in zip(*pairs, strict=True)]
    if any(mean is None for side in sides for mean in side):
        return None
    left, right = (np.array(side, float) for side in sides)
    delta, same = stats.t_interval(left - right), np.allclose(left - right, left[0] - right[0], rtol=0, atol=1e-12)
    return Comparison(
        metric=values.name,
        better=values.metric.better,
        a=method,
        b=baseline,
        n=delta.n,
        mean_a=float(left.mean()),
        mean_b=float(right.mean()),
        delta=delta.mean,
        lo=None if same else delta.lo,  # seeds that all differ equally say nothing of their spread
        hi=None if same else delta.hi,
        p=1.0 if same else stats.paired_t_p(left - right),
        sd=float((left - right).std(ddof=1)),
    )


def _over_prompts(
    values: _PromptValues, method: str, baseline: str, pair: tuple[Student, Student], resamples: int
) -> Comparison | None:
    units = {name: values.of(student) for name, student in zip((method, baseline), pair, strict=True)}
    known = {name: means for name, means in units.items() if means is not None}
    if len(known) < 2:
        return None
    return paired(values.name, values.metric, method, baseline, known, resamples, SEED)


def _set_distances(method: str, baseline: str, pairs: Pairs, resamples: int) -> list[Comparison]:
    """Of single runs, over prompts: the distances between sets that the values of single videos say."""
    shown = {name: _shown(student) for name, student in zip((method, baseline), pairs[0], strict=True)}
    shown["teacher"] = _shown(Student(pairs[0][0].run, "teacher"))
    if len(pairs) > 1 or not all(shown.values()):
        return []
    return quantities.set_distances(shown, resamples, SEED, pairs=[(method, baseline)])[1]


def _shown(student: Student) -> dict[str, np.ndarray]:
    """What a student's videos show of `quantities.QUANTITIES`: prompt -> [takes, 3]."""
    takes: dict[str, list[list[float]]] = {}
    columns = [student.run.rows.get((name, student.policy), ()) for name in quantities.QUANTITIES]
    for of_clip in zip(*columns, strict=True):
        takes.setdefault(of_clip[0].prompt_id, []).append([row.value for row in of_clip])
    return {prompt: np.array(values) for prompt, values in takes.items()}
