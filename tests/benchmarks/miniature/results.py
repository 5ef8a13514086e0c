"""The numbers of all runs -> results: means with intervals over seeds, paired tests, budgets, provenance."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from afd_train.evaluation import provenance
from tests.benchmarks.miniature import statistics
from tests.benchmarks.miniature.measuring import METRICS, Shown
from tests.benchmarks.miniature.methods import AFD, BASE, METHODS
from tests.benchmarks.miniature.statistics import BySeed, Mean, Paired
from tests.benchmarks.miniature.study import Plan, teacher_numbers

TEACHER = "teacher"
AGAINST = (BASE, AFD)


@dataclass(frozen=True)
class Results:
    """Everything that table, plots and results.json show."""

    header: Mapping[str, Any]
    values: Mapping[str, Mapping[str, BySeed]]  # method -> metric -> seed -> value
    teacher: Mapping[str, float]  # metric -> value
    budgets: Mapping[str, Mapping[str, BySeed]]  # method -> what -> seed -> amount

    @property
    def means(self) -> dict[str, dict[str, Mean]]:
        """Method -> metric -> mean, the teacher first."""
        means = {TEACHER: {name: Mean(value, None, 1) for name, value in self.teacher.items()}}
        return means | _means(self.values)

    @property
    def spent(self) -> dict[str, dict[str, Mean]]:
        """Method -> what -> mean."""
        return _means(self.budgets)

    @property
    def metrics(self) -> dict[str, Shown]:
        """Those that this world has."""
        measured = {name for values in self.values.values() for name in values}
        return {name: shown for name, shown in METRICS.items() if name in measured}

    def tests(self, against: str) -> dict[str, dict[str, Paired]]:
        """Metric -> method -> its difference to `against`, seed by seed, Holm over methods."""
        found = {}
        for metric in self.metrics:
            other = self.values.get(against, {}).get(metric, {})
            own = {name: values[metric] for name, values in self.values.items() if name != against and metric in values}
            tests = {name: test for name, by_seed in own.items() if (test := statistics.paired(by_seed, other))}
            if tests:
                found[metric] = statistics.with_holm(tests)
        return found

    def to_json(self) -> dict[str, Any]:
        """For results.json."""
        return {
            "header": dict(self.header),
            "questions": {name: METHODS[name].question for name in self.values},
            "teacher": dict(self.teacher),
            "values": self.values,
            "budgets": self.budgets,
            "means": _plain(self.means),
            "spent": _plain(self.spent),
            "tests": {against: _plain(self.tests(against)) for against in AGAINST if against in self.values},
        }


def results_of(plan: Plan, command: str, commit: str) -> Results:
    """Of what is measured so far."""
    values: dict[str, dict[str, dict[int, float]]] = {}
    budgets: dict[str, dict[str, dict[int, float]]] = {}
    for method, seed in plan.runs:
        path = plan.numbers(method, seed)
        if not path.exists():
            continue
        numbers = json.loads(path.read_text(encoding="utf-8"))
        for kind, into in (("values", values), ("budget", budgets)):
            for name, value in numbers[kind].items():
                into.setdefault(method.name, {}).setdefault(name, {})[seed] = value
    ordered = {method.name: values[method.name] for method in plan.methods if method.name in values}
    teacher = json.loads(teacher_numbers(plan).read_text(encoding="utf-8"))
    return Results(_header(plan, command, commit, teacher["prompts"]), ordered, teacher["values"], budgets)


def _header(plan: Plan, command: str, commit: str, prompts: int) -> dict[str, Any]:
    recipe = next(iter(plan.recipes.values()))
    found = provenance.header(recipe, {}, step=0, cells=f"{prompts} x {recipe.eval.clips_per_prompt}", teacher="")
    known = ("date", "prompts x clips", "video", "machine", "packages")
    return {
        "command": command,
        "git commit": commit,
        "world": plan.world,
        "split": plan.split,
        "budget": f"{plan.minutes:g} min of one thread a run",
        **{key: found[key] for key in known},
    }


def _means(values: Mapping[str, Mapping[str, BySeed]]) -> dict[str, dict[str, Mean]]:
    return {
        method: {name: statistics.mean_of(list(by_seed.values())) for name, by_seed in of_method.items()}
        for method, of_method in values.items()
    }


def _plain(tables: Mapping[str, Mapping[str, Mean | Paired]]) -> dict[str, dict[str, dict]]:
    return {outer: {inner: vars(cell) for inner, cell in row.items()} for outer, row in tables.items()}


def seeds_of(values: Mapping[str, BySeed]) -> Sequence[int]:
    """Of a method: those of any metric."""
    return sorted({seed for by_seed in values.values() for seed in by_seed})
